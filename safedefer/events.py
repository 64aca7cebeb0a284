"""Events: frozen records of what happened, for logs and metrics. They identify and never quote.

An observer is any callable that takes an event. It runs where the event happens and must be quick;
what it raises is logged and changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

__all__ = ["Event", "LogObserver", "Observer", "RequestRefused", "TaskEnqueued", "TaskHandled"]

_log: Final = logging.getLogger("safedefer")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEnqueued:
    """``defer()`` has stored a task."""

    task_id: str
    queue: str
    callable: str
    size: int
    """Length of the token in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskHandled:
    """A handler has answered for an authentic task."""

    task_id: str
    queue: str
    callable: str
    kid: str
    outcome: str
    """The ``Safedefer-Outcome``."""
    status: int
    reason: str | None
    """A slug, where the outcome is not ``succeeded``."""
    attempt: int
    seconds: float
    """From the arrival of the request to the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRefused:
    """A handler has refused a request that is not from a holder of our keys, or is for somebody else."""

    status: int
    reason: str
    """A slug such as ``bad-signature``."""


Event: TypeAlias = TaskEnqueued | TaskHandled | RequestRefused
"""Any of the events."""
Observer: TypeAlias = Callable[[Event], None]
"""What is called with every event."""


class LogObserver:
    """Logs events with ids and slugs in ``extra``; nothing in a line comes from outside the signature."""

    def __init__(self) -> None:
        self.level = logging.INFO
        """The level in normal circumstances (App Engine ``set_log_level``)."""

    def __call__(self, event: Event) -> None:
        """Log one event."""
        match event:
            case TaskEnqueued():
                _log.debug("task %s enqueued: %s", event.task_id, event.callable, extra={"safedefer": event})
            case TaskHandled():
                _log.log(
                    self.level_of(event.outcome, event.reason),
                    "task %s %s: %s, attempt %d, %.3f s%s",
                    event.task_id,
                    event.outcome,
                    event.callable,
                    event.attempt,
                    event.seconds,
                    f" ({event.reason})" if event.reason else "",
                    extra={"safedefer": event},
                )
            case RequestRefused():
                _log.warning("request refused: %s", event.reason, extra={"safedefer": event})

    def level_of(self, outcome: str, reason: str | None) -> int:
        """Return the level at which the end of a run is logged."""
        if reason == "singular-task-failure":
            return logging.DEBUG
        if outcome in {"failed", "rejected"}:
            return logging.ERROR
        return logging.WARNING if outcome == "retry" else self.level


def hears_enqueued(observer: Observer) -> bool:
    """Whether an observer would do anything with ``TaskEnqueued``."""
    return type(observer) is not LogObserver or _log.isEnabledFor(logging.DEBUG)


def is_heard(observer: Observer, outcome: str, reason: str | None) -> bool:
    """Whether an observer would do anything with ``TaskHandled``: a log whose level is off would not."""
    if isinstance(observer, LogObserver) and type(observer) is LogObserver:  # a subclass may do more
        return _log.isEnabledFor(observer.level_of(outcome, reason))
    return True


def notify(observer: Observer, event: Event) -> None:
    """Tell an observer, and outlive what it raises."""
    try:
        observer(event)
    except Exception:  # noqa: BLE001  # whatever it is, the task goes on
        _log.exception("an observer failed; mend it")
