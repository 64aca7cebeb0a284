"""Events: frozen records for logs and metrics. They identify tasks and never quote them.

An observer is any callable that takes an event. It runs in the thread of the event and must be quick. An exception
that it raises is logged and changes nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Final, TypeAlias

__all__ = [
    "Event",
    "LogObserver",
    "Observer",
    "Observers",
    "ProcessStarted",
    "ProcessStopping",
    "QueueTrouble",
    "RequestRefused",
    "TargetDown",
    "TargetUp",
    "TaskDead",
    "TaskEnqueued",
    "TaskHandled",
    "TaskRetried",
]

_log: Final = logging.getLogger("safedefer")

#: Seconds between two log lines about refusals of one reason.
REFUSALS_EVERY: Final = 60.0
#: The most reasons that are told apart; refusals for others are counted together.
_REASONS: Final = 100
_OTHERS: Final = "others"


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
    error_type: str | None = None
    """The type of the exception that ended the attempt, with its module."""
    error: BaseException | None = field(default=None, repr=False, compare=False)
    """The exception itself, for observers that report it. Its text may hold what the task was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRefused:
    """A handler refused a request: malformed, not signed by one of our keys, or for another audience."""

    status: int
    reason: str
    """A slug such as ``bad-signature``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRetried:
    """A dispatcher tries a task again later."""

    task_id: str
    queue: str
    callable: str
    """As it is stored: a hint."""
    reason: str | None
    """A slug."""
    status: int | None
    """That of the answer; None if there was none."""
    attempts: int
    """Charged attempts so far."""
    seconds: float
    """From now until the task is due again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDead:
    """A dispatcher gave a task up. It is a dead letter, unless the ledger knows that it succeeded after all."""

    task_id: str
    queue: str
    callable: str
    """As it is stored: a hint."""
    reason: str | None
    """A slug."""
    attempts: int
    """Charged attempts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetDown:
    """A handler took no connection. Its tasks wait, uncharged, and one of them tries it again at growing intervals."""

    address: str
    """Empty where the handler is in the dispatcher's own process."""
    reason: str
    """The name of the error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetUp:
    """A handler that was down takes connections again."""

    address: str
    seconds: float
    """How long it was down."""
    waited: int
    """How many deliveries of tasks were put off meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueTrouble:
    """The queue fails a dispatcher, again and again; the first failure is told at once, the others once a minute."""

    doing: str
    """``leasing``, ``settling`` or ``extending leases``."""
    reason: str
    """The text of an error of ours, which says what to do, or the name of another one."""
    count: int
    """Failures since the event before; 0: it works again."""
    seconds: float
    """Since the first of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStarted:
    """A process of ``safedefer run``, ``serve`` or ``dispatch`` takes tasks from now on."""

    command: str
    pid: int
    queue: str
    """Where the queue is: an absolute path, or the address of a database without user and password."""
    environment: str
    policy: Sequence[str]
    """The patterns."""
    keys: Sequence[str]
    """The ids of the keys, each with its state."""
    concurrency: int
    """Tasks at once in this process."""
    processes: int
    """Worker processes of its supervisor; 1 without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStopping:
    """A process was asked to stop: it takes no more tasks, and waits for those that run."""

    command: str
    pid: int
    running: int
    """Tasks, or deliveries of tasks, that it waits for."""
    seconds: float
    """How long it waits at most."""


Event: TypeAlias = (
    TaskEnqueued
    | TaskHandled
    | TaskRetried
    | TaskDead
    | RequestRefused
    | TargetDown
    | TargetUp
    | QueueTrouble
    | ProcessStarted
    | ProcessStopping
)
"""Any of the events."""
Observer: TypeAlias = Callable[[Event], None]
"""What is called with every event."""


class Observers:
    """Several observers as one: each gets every event, whatever another one raises.

    Args:
        observers: Called in this order.
    """

    def __init__(self, *observers: Observer) -> None:
        self._set(observers)

    def _set(self, observers: tuple[Observer, ...]) -> None:
        self._observers = observers
        self.only_log = all(type(each) is LogObserver for each in observers)
        """Whether nobody but the default log hears: it does not act on every event."""

    def __call__(self, event: Event) -> None:
        """Hand an event to each of them."""
        for observer in self._observers:
            try:
                observer(event)
            except Exception:  # noqa: BLE001  # as notify, without a call more
                _log.exception("an observer failed; mend it")

    def __iter__(self) -> Iterator[Observer]:
        """Go through the observers."""
        return iter(self._observers)

    def add(self, observer: Observer) -> None:
        """Let one more observer have all events from now on."""
        self._set((*self._observers, observer))


@dataclass(slots=True)
class _Refusals:
    """The refusals of one reason since its last log line."""

    logged: float
    """When that was."""
    count: int = 0
    last: RequestRefused | None = None


class LogObserver:
    """Logs events, each with the event in ``extra``. No text of a log line comes from unsigned bytes.

    The first refusal of a reason is logged at once. Those that follow are counted, and logged with their number when
    any event comes a minute or more after the last line: a flood of requests makes no flood of lines.

    Args:
        clock: Returns seconds that only grow.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.level = logging.INFO
        """The level of a task that succeeded (App Engine ``set_log_level``)."""
        self._clock = clock
        self._lock = Lock()
        self._refusals: dict[str, _Refusals] = {}
        """By reason: those of the last minute, and those that are not logged yet."""

    def __call__(self, event: Event) -> None:
        """Log one event."""
        match event:
            case TaskEnqueued():
                _log.debug("task %s enqueued: %s", event.task_id, event.callable, extra={"safedefer": event})
            case TaskHandled():
                self._handled(event)
            case RequestRefused():
                self._refused(event)
            case _:
                level, text, *values = _line_of(event)
                _log.log(level, text, *values, extra={"safedefer": event})
        if self._refusals:
            self._log_counts()

    def _handled(self, event: TaskHandled) -> None:
        level = self.level_of(event.outcome, event.reason)
        if not _log.isEnabledFor(level):  # before the values of the line are made: another observer wanted the event
            return
        _log.log(
            level,
            "task %s %s: %s, attempt %d, %.3f s%s%s",
            event.task_id,
            event.outcome,
            event.callable,
            event.attempt,
            event.seconds,
            f" ({event.reason})" if event.reason else "",
            f": {event.error_type}" if event.error_type and event.reason == "exception" else "",
            extra={"safedefer": event},
        )

    def _refused(self, event: RequestRefused) -> None:
        with self._lock:
            known = self._refusals
            reason = event.reason if event.reason in known or len(known) < _REASONS else _OTHERS
            if (refusals := known.get(reason)) is not None:
                refusals.count += 1
                refusals.last = event
                return
            known[reason] = _Refusals(self._clock())
        _log.warning("request refused: %s", reason, extra={"safedefer": event})

    def _log_counts(self) -> None:
        """Log how many refusals followed those lines that are a minute old; forget a reason that had none."""
        lines: list[tuple[str, int, RequestRefused | None]] = []
        with self._lock:
            now = self._clock()
            for reason, refusals in list(self._refusals.items()):
                if now - refusals.logged < REFUSALS_EVERY:
                    continue
                if refusals.count:
                    lines.append((reason, refusals.count, refusals.last))
                    self._refusals[reason] = _Refusals(now)
                else:
                    del self._refusals[reason]
        for reason, count, last in lines:
            _log.warning("request refused: %s, %d more since the last line", reason, count, extra={"safedefer": last})

    def level_of(self, outcome: str, reason: str | None) -> int:
        """Return the level at which the end of a run is logged."""
        if reason == "singular-task-failure":
            return logging.DEBUG
        if outcome in {"failed", "rejected"}:
            return logging.ERROR
        return logging.WARNING if outcome == "retry" else self.level


def _line_of(
    event: TaskRetried | TaskDead | TargetDown | TargetUp | QueueTrouble | ProcessStarted | ProcessStopping,
) -> tuple[int, str, *tuple[object, ...]]:
    """Return the level, the format and the values of the log line of a dispatcher's or process's event."""
    match event:
        case ProcessStarted():
            return logging.INFO, "process %d started: %s", event.pid, banner(event)
        case ProcessStopping():
            text = "process %d stops: it waits for %d tasks, %.0f s at most"
            return logging.INFO, text, event.pid, event.running, event.seconds
        case TaskRetried():
            text = "task %a is due again in %.1f s (%s), attempts: %d"
            return logging.DEBUG, text, event.task_id, event.seconds, event.reason, event.attempts
        case TaskDead():
            text = "task %a is dead (%s), attempts: %d; `safedefer dead show` says more, `safedefer dead retry` runs it again"
            return logging.ERROR, text, event.task_id, event.reason, event.attempts
        case TargetDown():
            text = "the handler %s takes no connection (%s); its tasks wait, and it is tried again"
            return logging.WARNING, text, event.address, event.reason
        case TargetUp():
            text = "the handler %s takes connections again, after %.1f s; %d deliveries were put off meanwhile"
            return logging.WARNING, text, event.address, event.seconds, event.waited
        case QueueTrouble(count=0):
            return logging.WARNING, "%s works again, after %.1f s", event.doing, event.seconds
        case QueueTrouble(count=1):
            return logging.ERROR, "%s failed: %s; trying again", event.doing, event.reason
        case QueueTrouble():
            text = "%s failed: %s; %d times more, for %.0f s now"
            return logging.ERROR, text, event.doing, event.reason, event.count, event.seconds


def banner(event: ProcessStarted) -> str:
    """Return what a process is, in one line: its queue, environment, policy, keys and tasks at once."""
    several = "" if event.processes == 1 else f" in each of {event.processes} processes"
    return (
        f"safedefer {event.command}: the queue is in {event.queue}; environment {event.environment}; "
        f"policy {', '.join(event.policy) or 'allows nothing'}; keys {', '.join(event.keys)}; "
        f"{event.concurrency} tasks at once{several}"
    )


def hears_enqueued(observer: Observer) -> bool:
    """Whether an observer may act on ``TaskEnqueued``: the default log does so at debug level only."""
    if isinstance(observer, Observers):
        return not observer.only_log or any(map(hears_enqueued, observer))
    return type(observer) is not LogObserver or _log.isEnabledFor(logging.DEBUG)


def is_heard(observer: Observer, outcome: str, reason: str | None) -> bool:
    """Whether an observer may act on ``TaskHandled``: the default log does not if its level is off."""
    if isinstance(observer, Observers):
        return not observer.only_log or any(is_heard(each, outcome, reason) for each in observer)
    if isinstance(observer, LogObserver) and type(observer) is LogObserver:  # a subclass may do more
        return _log.isEnabledFor(observer.level_of(outcome, reason))
    return True


def notify(observer: Observer, event: Event) -> None:
    """Call an observer. Log an exception that it raises, and go on."""
    try:
        observer(event)
    except Exception:  # noqa: BLE001  # the task goes on after any error of an observer
        _log.exception("an observer failed; mend it")
