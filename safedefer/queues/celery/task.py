"""How Celery handles the messages of the one task, whatever the settings of the application say of its tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from celery import Celery, Task  # type: ignore[import-untyped]

#: How Celery handles the one task, whatever its own settings and annotations say of all tasks.
HANDLED: Final[Mapping[str, Any]] = {
    "acks_late": True,
    "reject_on_worker_lost": True,
    "retry_on_worker_lost": False,  # which the broker would not confirm
    # What runs into Celery's hard time limit goes back to the queue.
    "acks_on_failure_or_timeout": False,
    "acks_on_failure": False,
    "acks_on_timeout": False,
    "expires": None,
    "ignore_result": True,
    "store_errors_even_if_ignored": False,
    "track_started": False,
    "max_retries": None,
    "serializer": "json",
    "Request": "safedefer.queues.celery.worker:_SyncedRequest",
}


class _DeliverTask(Task):  # type: ignore[misc]
    """The one task. A base class of the application's own tasks says nothing of it."""

    @classmethod
    def annotate(cls) -> None:
        """Take the settings of the application, but for ours: Celery calls this when it has read them all."""
        super().annotate()
        for name, value in HANDLED.items():
            setattr(cls, name, value)


def register(celery: Celery, run: Callable[..., None], name: str) -> Any:
    """Make the one task of an application, which is bound to what ``run`` gets first."""
    return celery.task(run, name=name, bind=True, base=_DeliverTask, **HANDLED)
