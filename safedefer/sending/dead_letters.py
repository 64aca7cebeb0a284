"""Dead letters run again as new tasks: verified as they are now, and signed anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime

from safedefer.claims import Claims, split_audience
from safedefer.codecs.protocol import Codec
from safedefer.errors import CapabilityExceeded, Error, RejectedTask, UnknownQueueError
from safedefer.execution.prepare import prepare
from safedefer.keys import Keyring
from safedefer.options import QUEUE_URLS, Options, Task
from safedefer.queues.base import DeadFilter, PullQueue, TaskState, TaskView
from safedefer.sending.builder import Builder, stored_retry_options
from safedefer.sending.ids import new_task_id
from safedefer.sending.routes import ANY_URL, Routes, lifetime
from safedefer.signing import Verifier
from safedefer.task import VerifiedTask


class DeadLetters:
    """Re-runs dead letters.

    Args:
        verifier: Turns their tokens into verified tasks.
        keyring: The keys, whose limits a new task keeps to.
        codecs: By ``cty``.
        builder: Signs the new task.
        routes: Where tasks may go.
        queue: Returns the queue; called for every call.
        load_policy: Imports the modules that the policy names.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        *,
        verifier: Verifier,
        keyring: Keyring,
        codecs: Mapping[str, Codec],
        builder: Builder,
        routes: Routes,
        queue: Callable[[], PullQueue],
        load_policy: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._verifier = verifier
        self._keyring = keyring
        self._codecs = codecs
        self._builder = builder
        self._routes = routes
        self._queue = queue
        self._load_policy = load_policy
        self._clock = clock

    def retry(self, task_id: str, *, queue: str | None = None, eta: datetime | None = None) -> Task | None:
        """Re-run one as a new task, which names it in ``retry_of``; None if there is none.

        Raises:
            RejectedTask: It does not verify now; it stays where it is.
            UnknownQueueError: There is no such queue.
            InvalidTaskError: The queue's name or the eta is impossible.
        """
        view = self._queue().find(task_id)
        if view is None or view.state is not TaskState.DEAD:
            return None
        self._load_policy()
        # Whatever URL is stored: the new task has the one that was signed.
        task = self._verifier.verify(view.token, url=ANY_URL, now=self._clock(), expired=True)
        if not isinstance(task, VerifiedTask):
            raise RejectedTask("the dead letter holds a pointer whose stored token is gone; restore the blobs")
        # Decoded under the limits of the key that signed: signing again must not widen what it could name.
        prepare(task, self._codecs)
        now = self._clock()
        options = self._options(task, view, queue, eta)
        again, queued = self._builder.package(self._renewed(task, options, task_id, now), options, now)
        return again if self._queue().replace_dead(task_id, queued, now=now) else None

    def _options(self, task: VerifiedTask, view: TaskView, queue: str | None, eta: datetime | None) -> Options:
        """Return those of the new task, checked: also whether the key that signed the old one may sign for the queue."""
        _, old_queue, target, url = split_audience(task.claims["aud"])
        options = Options(
            headers=task.claims.get("headers", {}),
            retry_options=stored_retry_options(view.retry_options),
            queue=queue or old_queue,
            eta=eta,
            target=target,
            url=f"{QUEUE_URLS}{queue}" if queue and url == f"{QUEUE_URLS}{old_queue}" else url,
        )
        self._routes.check(options)
        key = next(key for key in self._keyring.keys if key.kid == task.identity.kid)
        if key.queues is not None and options.queue not in key.queues:
            raise CapabilityExceeded(
                f"key {key.kid} may not sign for the queue {options.queue!a}; defer the task anew there"
            )
        return options

    def _renewed(self, task: VerifiedTask, options: Options, retry_of: str, now: float) -> Claims:
        """Return the claims of the new task."""
        due = int(options.due(now))
        environment, _, target, _ = split_audience(task.claims["aud"])
        renewed: Claims = {
            **task.claims,
            "jti": new_task_id(now),
            "iat": int(now),
            "nbf": due,
            "exp": due + lifetime(self._routes.retry_options(options.queue, options.retry_options)),
            "aud": f"{environment}:{options.queue}:{target}:{options.path}",
            "retry_of": retry_of,
        }
        renewed.pop("name", None)
        return renewed

    def retry_all(self, where: DeadFilter, *, queue: str | None = None) -> tuple[list[Task], dict[str, Error]]:
        """Re-run every dead letter that ``where`` means; return the new tasks, and by id why others stay.

        Raises:
            UnknownQueueError: There is no such ``queue``.
        """
        if queue is not None:
            self._routes.check(Options(queue=queue))
        tasks: list[Task] = []
        refused: dict[str, Error] = {}
        after: tuple[float, str] | None = None
        started = self._clock()
        # Those that die again meanwhile are left for the next call.
        where = replace(where, before=min(started, started if where.before is None else where.before))
        while page := self._queue().dead_letters(where, after=after):
            for view in page:
                after = (view.ended or 0.0, view.id)
                try:
                    task = self.retry(view.id, queue=queue)
                except (RejectedTask, UnknownQueueError) as error:  # the latter: our key may not sign for its queue
                    refused[view.id] = error
                else:
                    tasks += [] if task is None else [task]
        return tasks, refused
