"""Events: frozen records for logs and metrics. They identify tasks and never quote them.

An observer is any callable that takes an event. It runs in the thread of the event and must be quick. An exception
that it raises is logged and changes nothing.
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
    """``defer()`` stored a task."""

    task_id: str
    queue: str
    callable: str
    size: int
    """Length of the token in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskHandled:
    """A handler answered the request for an authentic task."""

    task_id: str
    queue: str
    callable: str
    kid: str
    outcome: str
    """The ``Safedefer-Outcome``."""
    status: int
    reason: str | None
    """A slug, unless the outcome is ``succeeded``."""
    attempt: int
    seconds: float
    """From the arrival of the request to the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRefused:
    """A handler refused a request: malformed, not signed by one of our keys, or for another audience."""

    status: int
    reason: str
    """A slug such as ``bad-signature``."""


Event: TypeAlias = TaskEnqueued | TaskHandled | RequestRefused
"""Any of the events."""
Observer: TypeAlias = Callable[[Event], None]
"""What is called with every event."""


class LogObserver:
    """Logs events, each with the event in ``extra``. No text of a log line comes from unsigned bytes."""

    def __init__(self) -> None:
        self.level = logging.INFO
        """The level of a task that succeeded (App Engine ``set_log_level``)."""

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
    """Whether an observer may act on ``TaskEnqueued``: the default log does so at debug level only."""
    return type(observer) is not LogObserver or _log.isEnabledFor(logging.DEBUG)


def is_heard(observer: Observer, outcome: str, reason: str | None) -> bool:
    """Whether an observer may act on ``TaskHandled``: the default log does not if its level is off."""
    if isinstance(observer, LogObserver) and type(observer) is LogObserver:  # a subclass may do more
        return _log.isEnabledFor(observer.level_of(outcome, reason))
    return True


def notify(observer: Observer, event: Event) -> None:
    """Call an observer. Log an exception that it raises, and go on."""
    try:
        observer(event)
    except Exception:  # noqa: BLE001  # the task goes on after any error of an observer
        _log.exception("an observer failed; mend it")
