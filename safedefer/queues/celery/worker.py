"""What a Celery worker loads by name: how it acknowledges the messages of the one task, and what it does before it stops."""

from __future__ import annotations

import logging
import os
from typing import Any, ClassVar, Final

from celery import bootsteps  # type: ignore[import-untyped]
from celery.worker import state  # type: ignore[import-untyped]
from celery.worker.request import Request  # type: ignore[import-untyped]

from safedefer.queues.celery.acknowledging import Answered
from safedefer.queues.celery.engine import PARENT, acknowledgements_of, check_content

_log: Final = logging.getLogger("safedefer.celery")


class _SyncedRequest(Request):  # type: ignore[misc]
    """A message of the one Celery task, as the worker's parent holds it until it is acknowledged.

    Celery lets go of a message also where its task did not return: it was revoked, expired, was terminated, or raised. Then
    nobody has ended the task, so the message goes back to the broker. The store cancels tasks.
    """

    _mark: object = None
    _unanswered = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # The next delivery of a task has the id of the last one: Celery takes a message that the broker delivers again for one
        # that is done (``worker_deduplicate_successful_tasks``). The ledger knows.
        self.delivery_info["redelivered"] = False
        acknowledgements = acknowledgements_of(self.task.app)
        if acknowledgements is not None:
            self._mark = acknowledgements.mark
        # A child leaves the sync only of a message that this class will acknowledge.
        self.request_dict[PARENT] = 0 if acknowledgements is None else os.getpid()

    def revoked(self) -> bool:
        """Return False: a task is cancelled in the store, and expires by its token."""
        if self.id in state.revoked:
            _log.warning("Celery's revoke does not cancel task %s; use `safedefer tasks cancel`", self.id)
        return False

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """End the child that runs the task, and give the message back."""
        self._unanswered = True
        super().terminate(pool, signal)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:  # noqa: FBT002  # Celery's
        """Give the message back."""
        self._unanswered = True
        super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)

    def reject(self, requeue: bool = False) -> None:  # noqa: FBT002  # Celery's
        """Drop the message if no child got it: Celery cannot read it. Else give it back."""
        super().reject(requeue=requeue or self._unanswered)

    def acknowledge(self) -> None:
        """Acknowledge the message, once the store has synced what the child has stored."""
        acknowledgements = acknowledgements_of(self.task.app)
        if self._unanswered:
            self.reject(requeue=True)
        elif acknowledgements is None or self.acknowledged:
            super().acknowledge()
        else:
            stops = state.should_stop is not None or state.should_terminate is not None
            acknowledgements.add(Answered(super().acknowledge, self._put_back, self._mark), last=stops)

    def _put_back(self) -> None:
        if not self.acknowledged:
            _log.warning("the store may have lost the end of task %s; the broker delivers it again", self.id)
            self.reject(requeue=True)


class _LastSync(bootsteps.StartStopStep):  # type: ignore[misc]
    """Acknowledges what waits for a sync, before a worker that stops leaves its broker."""

    requires: ClassVar[tuple[str, ...]] = ("celery.worker.consumer:Tasks",)

    def start(self, parent: Any) -> None:
        """See that messages can be read, and ask the store for its mark: no message was received yet."""
        check_content(parent.app)
        acknowledgements = acknowledgements_of(parent.app)
        if acknowledgements is not None:
            acknowledgements.listen(parent.hub)
            acknowledgements.begin()

    def stop(self, parent: Any) -> None:
        """Sync, and acknowledge; not where the worker connects to its broker again, which does not wait for the store."""
        acknowledgements = acknowledgements_of(parent.app)
        if acknowledgements is not None and parent.blueprint.state != bootsteps.RUN:
            acknowledgements.end()
