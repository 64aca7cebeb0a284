"""Dead letters run again as new tasks: verified as they are now, and signed anew.

Nothing that the storage says of a letter is signed: the new token says what the old one said, and the ledger must not
contradict it. No argument is decoded: the handler decodes them, within the limits of the key that signed the first task
of the chain, which ``root`` names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import cast

from safedefer.claims import Claims, Root, split_audience
from safedefer.errors import CapabilityExceeded, DeferError, Error, RejectedTask, ReplayedTask
from safedefer.keys import Keyring
from safedefer.ledger import VerifiedLetter
from safedefer.options import QUEUE_URLS, Options, Task, TaskRetryOptions
from safedefer.queues.base import BlobsFull, DeadFilter, PullQueue, TaskState, TaskView
from safedefer.sending.builder import Builder, in_order, stored_retry_options
from safedefer.sending.ids import new_task_id
from safedefer.sending.routes import ANY_URL, Routes, lifetime
from safedefer.signing import Verifier, check_begun, is_over
from safedefer.task import VerifiedTask


class DeadLetters:
    """Re-runs dead letters.

    Args:
        verifier: Turns their tokens into verified tasks.
        keyring: The keys, whose limits a new task keeps to.
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
        builder: Builder,
        routes: Routes,
        queue: Callable[[], PullQueue],
        load_policy: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._verifier = verifier
        self._keyring = keyring
        self._builder = builder
        self._routes = routes
        self._queue = queue
        self._load_policy = load_policy
        self._clock = clock

    def retry(self, task_id: str, *, queue: str | None = None, eta: datetime | None = None) -> Task | None:
        """Re-run one as a new task, which names it in ``retry_of``; None if there is none.

        Raises:
            RejectedTask: It does not verify now, or the ledger says that it may not run again; it stays where it is.
            UnknownQueueError: There is no such queue.
            DeferError: The new task cannot be signed or stored.
            InvalidTaskError: The queue's name or the eta is impossible.
        """
        view = self._queue().find(task_id)
        if view is None or view.state is not TaskState.DEAD:
            return None
        self._load_policy()
        now = self._clock()
        # Whatever URL is stored: the new task has the one that was signed.
        task = self._verifier.verify(view.token, url=ANY_URL, now=now, expired=True)
        if not isinstance(task, VerifiedTask):
            raise RejectedTask("the dead letter holds a pointer whose stored token is gone; restore the blobs")
        claims = task.claims
        if claims["jti"] != task_id:
            raise ReplayedTask(
                "the dead letter is stored under an id that its token does not have; defer the task anew"
            )
        check_begun(claims, now)  # the storage must not bring forward what waits
        letter = VerifiedLetter(claims["aud"], task.digest, claims["exp"], expired=is_over(claims, now))
        root = claims.get("root") or Root(id=task_id, kid=task.kid)
        options = self._options(claims, root, view, queue, eta)
        again, queued = self._builder.package(self._renewed(claims, root, options, now), options, now)
        return again if self._queue().replace_dead(task_id, queued, letter, now=now) else None

    def _options(self, claims: Claims, root: Root, view: TaskView, queue: str | None, eta: datetime | None) -> Options:
        """Return those of the new task, checked: also whether the key of the first one may sign for the queue."""
        _, old_queue, target, url = split_audience(claims["aud"])
        options = Options(
            headers=claims.get("headers", {}),
            # Where none were signed, what the storage says stays a hint of the storage: it is not signed.
            retry_options=_signed_retry_options(claims)
            if "retry" in claims
            else stored_retry_options(view.retry_options),
            queue=queue or old_queue,
            eta=eta,
            target=target,
            url=f"{QUEUE_URLS}{queue}" if queue and url == f"{QUEUE_URLS}{old_queue}" else url,
        )
        self._routes.check(options)
        key = next(key for key in self._keyring.keys if key.kid == root["kid"])
        if key.queues is not None and options.queue not in key.queues:
            raise CapabilityExceeded(
                f"key {key.kid} may not sign for the queue {options.queue!a}; defer the task anew there"
            )
        return options

    def _renewed(self, claims: Claims, root: Root, options: Options, now: float) -> Claims:
        """Return the claims of the new task."""
        due = int(options.due(now))
        environment, _, target, _ = split_audience(claims["aud"])
        renewed: Claims = {
            **claims,
            "jti": new_task_id(now),
            "iat": int(now),
            "nbf": due,
            "exp": due + lifetime(self._routes.retry_options(options.queue, _signed_retry_options(claims))),
            "aud": f"{environment}:{options.queue}:{target}:{options.path}",
            "retry_of": claims["jti"],
            "root": root,
        }
        renewed.pop("name", None)
        return in_order(renewed)

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
                except (RejectedTask, DeferError, BlobsFull) as error:  # our key may not sign it, or it is too large
                    refused[view.id] = error
                else:
                    tasks += [] if task is None else [task]
        return tasks, refused


def _signed_retry_options(claims: Claims) -> TaskRetryOptions | None:
    return stored_retry_options(cast("dict[str, float]", claims.get("retry", {})))
