"""The actions: each is a POST, checked against what the person may do, and written into the audit log. May block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from safedefer.claims import split_audience
from safedefer.dashboard.access import Access
from safedefer.dashboard.audit import AuditLog
from safedefer.dashboard.guard import PageRefusal
from safedefer.dashboard.lookup import bulk_ids, dead_filter, dead_values
from safedefer.dashboard.managed import Managed
from safedefer.dashboard.pages import Values
from safedefer.dashboard.render import link
from safedefer.errors import DeferError, RejectedTask
from safedefer.queues.base import BlobsFull, DeadFilter, TaskState, TaskView

_REFUSED: Final = (RejectedTask, DeferError, BlobsFull)


class Actions:
    """What people can do. Each method returns the URL of the page that says that it was done.

    Args:
        app: The application.
        audit: Where it is written down.
        clock: Seconds since the epoch.
    """

    def __init__(self, app: Managed, *, audit: AuditLog, clock: Callable[[], float]) -> None:
        self._app = app
        self._audit = audit
        self._clock = clock

    def _task(self, access: Access, action: str, values: Values, *states: TaskState) -> TaskView:
        task_id = values.get("id", "")
        view = self._app.queue.find(task_id) if task_id and "\0" not in task_id else None
        if view is None or not access.may_read(view.queue):
            raise PageRefusal(
                404, "There is no such task. It may have ended long ago, or have been run again under a new id."
            )
        self._check(access, action, view.queue, view.id)
        if view.state not in states:
            raise PageRefusal(409, f"The task is {view.state} now; look at it again.")
        return view

    def _check(self, access: Access, action: str, queue: str, subject: str) -> None:
        if not access.may_act(queue):
            self._audit.add(access.user, action, subject=subject, queue=queue, result="not allowed", allowed=False)
            raise PageRefusal(403, f"You may look at the queue {queue}, and not act on it.")

    def retry(self, access: Access, values: Values) -> str:
        """Run a dead letter again."""
        view = self._task(access, "retry", values, TaskState.DEAD)
        try:
            self._check_signed_queue(access, view)
            task = self._app.retry(view.id)
        except _REFUSED as error:
            self._audit.add(access.user, "retry", subject=view.id, queue=view.queue, result=f"refused: {error.slug}")
            raise PageRefusal(409, f"It may not run again now: {error.slug}: {error}") from error
        if task is None:
            raise PageRefusal(409, "The dead letter is gone: somebody else has run it again or discarded it.")
        self._audit.add(access.user, "retry", subject=view.id, queue=view.queue, result=f"runs again as {task.id}")
        return link("task", id=task.id, done="retried", n=1)

    def _check_signed_queue(self, access: Access, view: TaskView) -> None:
        """Check the queue that was signed too: it is the one in which the task runs. Raises ``PageRefusal`` or ``RejectedTask``."""
        self._check(access, "retry", split_audience(self._app.authenticate(view.token)["aud"])[1], view.id)

    def retry_all(self, access: Access, values: Values) -> str:
        """Run the dead letters again that a filter means, if they are as many as the button said."""
        where, ids = self._bulk(access, values)
        again = 0
        for task_id in ids:
            try:
                view = self._app.queue.find(task_id)
                if view is not None and view.state is TaskState.DEAD:
                    self._check_signed_queue(access, view)
                    again += self._app.retry(task_id) is not None
            except (*_REFUSED, PageRefusal):
                continue
        subject = ", ".join(f"{name} {value}" for name, value in dead_values(where).items())
        result = f"{again} of {len(ids)} run again"
        self._audit.add(access.user, "retry all", subject=subject, queue=where.queue, result=result)
        return link("dead", **_shown(values), done="retried" if again == len(ids) else "refused", n=again)

    def discard(self, access: Access, values: Values) -> str:
        """Delete a dead letter."""
        view = self._task(access, "discard", values, TaskState.DEAD)
        count = self._app.queue.drop_dead([view.id])
        self._audit.add(access.user, "discard", subject=view.id, queue=view.queue)
        return link("dead", done="discarded", n=count)

    def discard_all(self, access: Access, values: Values) -> str:
        """Delete the dead letters that a filter means, if they are as many as the button said."""
        where, ids = self._bulk(access, values)
        count = sum(self._app.queue.drop_dead(ids[at : at + 50]) for at in range(0, len(ids), 50))
        subject = ", ".join(f"{name} {value}" for name, value in dead_values(where).items())
        self._audit.add(access.user, "discard all", subject=subject, queue=where.queue, result=f"{count} discarded")
        return link("dead", **_shown(values), done="discarded", n=count)

    def _bulk(self, access: Access, values: Values) -> tuple[DeadFilter, list[str]]:
        where = dead_filter(values)
        if where.before is None:
            raise PageRefusal(400, "The form says no time; open the page again.")
        ids = bulk_ids(self._app, where, access)
        if str(len(ids)) != values.get("count"):
            raise PageRefusal(
                409, f"The filter means {len(ids)} now, and not what the button said; look again. Nothing was done."
            )
        return where, ids

    def cancel(self, access: Access, values: Values) -> str:
        """Cancel a task that waits or runs."""
        view = self._task(access, "cancel", values, TaskState.WAITING, TaskState.RUNNING)
        if not self._app.cancel(view.id):
            raise PageRefusal(409, "The task has ended meanwhile.")
        self._audit.add(access.user, "cancel", subject=view.id, queue=view.queue)
        return link("task", id=view.id, done="cancelled")

    def pause(self, access: Access, values: Values) -> str:
        """Pause a queue."""
        return self._pause(access, values, paused=True)

    def resume(self, access: Access, values: Values) -> str:
        """End the pause of a queue."""
        return self._pause(access, values, paused=False)

    def _pause(self, access: Access, values: Values, *, paused: bool) -> str:
        action = "pause" if paused else "resume"
        queue = self._queue(access, action, values)
        self._app.queue.pause(queue, paused=paused, now=self._clock())
        self._audit.add(access.user, action, subject=queue, queue=queue)
        return link("queues", done="paused" if paused else "resumed")

    def purge(self, access: Access, values: Values) -> str:
        """Cancel all that waits in a queue."""
        queue = self._queue(access, "purge", values)
        count = self._app.queue.purge(queue, now=self._clock())
        self._audit.add(access.user, "purge", subject=queue, queue=queue, result=f"{count} cancelled")
        return link("queues", done="purged", n=count)

    def _queue(self, access: Access, action: str, values: Values) -> str:
        queue = values.get("queue", "")
        self._check(access, action, queue, queue)
        self._app.check_queue(queue)
        return queue


def _shown(values: Values) -> dict[str, str]:
    """Return the filter of the page that the button was on: without the time of the click."""
    where = dead_values(dead_filter(values))
    if values.get("until_now"):
        where.pop("before", None)
    return where
