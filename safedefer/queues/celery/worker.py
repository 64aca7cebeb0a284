"""What a Celery worker loads by name: how it acknowledges the messages of the one task, and what it does before it stops."""

from __future__ import annotations

from typing import Any, ClassVar

from celery import bootsteps  # type: ignore[import-untyped]
from celery.worker import state  # type: ignore[import-untyped]
from celery.worker.request import Request  # type: ignore[import-untyped]

from safedefer.queues.celery.engine import acknowledgements_of


class _SyncedRequest(Request):  # type: ignore[misc]
    """A message of the one Celery task, as the worker's parent holds it until it is acknowledged."""

    def acknowledge(self) -> None:
        """Acknowledge the message, once the store has synced what the child has stored."""
        acknowledgements = acknowledgements_of(self.task.app)
        if acknowledgements is None or self.acknowledged:
            super().acknowledge()
        else:
            stops = state.should_stop is not None or state.should_terminate is not None
            acknowledgements.add(super().acknowledge, last=stops)


class _LastSync(bootsteps.StartStopStep):  # type: ignore[misc]
    """Acknowledges what waits for a sync, before a worker that stops leaves its broker."""

    requires: ClassVar[tuple[str, ...]] = ("celery.worker.consumer:Tasks",)

    def start(self, parent: Any) -> None:
        """Do nothing."""

    def stop(self, parent: Any) -> None:
        """Sync, and acknowledge."""
        acknowledgements = acknowledgements_of(parent.app)
        if acknowledgements is not None:
            acknowledgements.flush()
