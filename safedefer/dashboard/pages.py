"""The pages: each is a function of who asks and of the URL, which returns the name of a template and its values. May block."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, TypeAlias

from safedefer.claims import split_audience
from safedefer.dashboard.access import Access
from safedefer.dashboard.alarms import REFUSALS
from safedefer.dashboard.arguments import arguments_of
from safedefer.dashboard.audit import AuditLog
from safedefer.dashboard.guard import PageRefusal
from safedefer.dashboard.lookup import BULK, ROWS, TaskQuery, all_dead, bulk_ids, dead_filter, dead_values, find_tasks
from safedefer.dashboard.managed import Managed
from safedefer.dashboard.obstacles import limits_text, obstacles, read_claims_of
from safedefer.dashboard.overview import Numbers
from safedefer.dashboard.reports import Reported
from safedefer.observe.trace_links import trace_link
from safedefer.queues.addresses import full_place
from safedefer.queues.base import TaskState, TaskView

Values: TypeAlias = Mapping[str, str]
"""The values of a URL's query or of a form."""
Made: TypeAlias = tuple[str, dict[str, Any]]
"""The name of a template, and its values."""

_NUMBER: Final = re.compile(r"[0-9]{1,8}")
#: What a page says after an action, by the code in its URL: no text of a page comes from a URL.
_DONE: Final = {
    "retried": "Runs again: {n}.",
    "refused": "Run again: {n}. Some stay: their tokens are refused now, or they were run again already.",
    "discarded": "Discarded: {n}.",
    "cancelled": "Cancelled. A task that runs is stopped within some seconds.",
    "paused": "The queue is paused; what runs goes on.",
    "resumed": "The queue goes on.",
    "purged": "Cancelled in the queue: {n}.",
}


def done_text(values: Values) -> str:
    """Return what was done, as the URL says it by a code and a number."""
    number = values.get("n", "")
    return _DONE.get(values.get("done", ""), "").format(n=number if _NUMBER.fullmatch(number) else "some")


class DashboardPages:
    """Makes the pages.

    Args:
        app: The application.
        numbers: The numbers of the overview.
        audit: What people did.
        clock: Seconds since the epoch.
        trace_url: Where traces are shown; None shows no links.
    """

    def __init__(
        self, app: Managed, *, numbers: Numbers, audit: AuditLog, clock: Callable[[], float], trace_url: str | None
    ) -> None:
        self._trace_url = trace_url
        self._app = app
        self._numbers = numbers
        self._audit = audit
        self._clock = clock

    def overview(self, access: Access, _values: Values) -> Made:
        """Return the overview."""
        return "overview", {"overview": self._numbers.overview(access, now=self._clock())}

    def live(self, access: Access, _values: Values) -> Made:
        """Return the part of the overview that is polled."""
        return "live", {"overview": self._numbers.overview(access, now=self._clock())}

    def tasks(self, access: Access, values: Values) -> Made:
        """Return the list of the tasks of one state that match."""
        query = TaskQuery.read(values)
        return "tasks", {"query": query, "found": find_tasks(self._app, query, access), "states": list(TaskState)}

    def task(self, access: Access, values: Values) -> Made:
        """Return the page of one task. Raises ``PageRefusal`` if there is none that the person may see."""
        now = self._clock()
        view = self.readable(access, values.get("id", ""))
        claims, why = read_claims_of(self._app, view)
        # Whoever may see a queue sees no argument of another one by what the storage says.
        if claims is not None and not access.may_read(split_audience(claims["aud"])[1]):
            claims, why = None, "it was signed for another queue"
        control = next((each for each in self._app.queue.controls(now=now) if each.queue == view.queue), None)
        return "task", {
            "view": view,
            "claims": claims,
            "unread": why,
            "arguments": None if claims is None or "blob" in claims else arguments_of(claims),
            "obstacles": obstacles(self._app, view, claims, control, now=now),
            "trace_link": trace_link(self._trace_url, None if claims is None else claims.get("trace")),
            "may_act": access.may_act(view.queue),
            "is_dead": view.state is TaskState.DEAD,
            "is_live": view.state in {TaskState.WAITING, TaskState.RUNNING},
        }

    def readable(self, access: Access, task_id: str) -> TaskView:
        """Return a task. Raises ``PageRefusal`` if there is none, or none that the person may see: the answer is the same."""
        view = self._app.queue.find(task_id) if task_id and "\0" not in task_id else None
        if view is None or not access.may_read(view.queue):
            raise PageRefusal(
                404, "There is no such task. It may have ended long ago, or have been run again under a new id."
            )
        return view

    def dead(self, access: Access, values: Values) -> Made:
        """Return the list of dead letters that a filter means."""
        where, found, after = dead_filter(values), list[TaskView](), values.get("after", "")
        # What dies while the page is read is not meant by its button.
        now = self._clock()
        bulk = where if where.before is not None and where.before < now else replace(where, before=now)
        count = len(bulk_ids(self._app, bulk, access))
        at, _, last = after.partition("~")
        try:
            start = (float(at), last) if after else None
        except ValueError:
            start = None
        more = False
        for view in all_dead(self._app, where, start):
            if access.may_read(view.queue):
                more = len(found) == ROWS
                if more:
                    break
                found.append(view)
        return "dead", {
            "where": dead_values(where),
            "found": found,
            "after": f"{found[-1].ended!r}~{found[-1].id}" if more else "",
            "count": count,
            "bulk": {**dead_values(bulk), "count": str(count), "until_now": "1" if bulk is not where else ""},
            "most": BULK,
        }

    def queues(self, access: Access, _values: Values) -> Made:
        """Return the queues with their limits."""
        overview = self._numbers.overview(access, now=self._clock())
        return "queues", {"overview": overview, "access": access, "limits_text": limits_text}

    def system(self, access: Access, _values: Values) -> Made:
        """Return keys, targets, refusals, outboxes, and what people did."""
        entries = [
            entry
            for entry in reversed(self._audit.entries)
            if access.reads_all or (entry.queue is not None and access.may_read(entry.queue))
        ]
        reported = self._numbers.reported(now=self._clock()) if access.reads_all else Reported()
        return "system", {
            "reported": reported,
            "refusals": REFUSALS,
            "keys": self._app.keyring.keys if access.reads_all else (),
            "place": full_place(self._app.queue, self._app.queue_place) if access.reads_all else "",
            "outbox_rows": self._app.outbox.count() if access.reads_all else 0,
            "reads_all": access.reads_all,
            "entries": entries,
        }

    def confirm(self, access: Access, values: Values) -> Made:
        """Return the question that comes before what cannot be undone. Raises ``PageRefusal``."""
        action = values.get("do", "")
        if action in {"discard", "cancel"}:
            view = self.readable(access, values.get("id", ""))
            question = {
                "discard": "Discard this dead letter for good? Its arguments and attempts are deleted.",
                "cancel": "Cancel this task? It does not run again.",
            }[action]
            return "confirm", {
                "action": action,
                "question": question,
                "button": {"discard": "Discard it", "cancel": "Cancel it"}[action],
                "subject": f"{view.callable_name} {view.id}",
                "fields": {"id": view.id},
                "back": f"task?id={view.id}",
            }
        if action == "discard-all":
            where = dead_filter({**values, "before": values.get("before") or f"{self._clock():.6f}"})
            count = len(bulk_ids(self._app, where, access))
            fields = dead_values(where)
            return "confirm", {
                "action": action,
                "question": f"Discard {count} dead letter{'' if count == 1 else 's'} for good? What they hold is deleted.",
                "button": f"Discard {count}",
                "subject": ", ".join(f"{name} {value}" for name, value in dead_values(dead_filter(values)).items())
                or "all",
                "fields": {**fields, "count": str(count)},
                "back": "dead",
            }
        queue = values.get("queue", "")
        row = next((row for row in self._numbers.overview(access, now=self._clock()).queues if row.name == queue), None)
        if action != "purge" or row is None:
            raise PageRefusal(404, "There is nothing to confirm.")
        return "confirm", {
            "action": action,
            "question": f"Cancel everything that waits in the queue {queue}? {row.waiting} wait now. What runs goes on.",
            "button": f"Purge {queue}",
            "subject": queue,
            "fields": {"queue": queue},
            "back": "queues",
        }
