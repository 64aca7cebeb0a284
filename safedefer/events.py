"""Events: frozen records for logs and metrics, and the log line and level of each. They identify tasks and never quote them.

An observer is any callable that takes an event. A plain one runs in the thread of the event and must be quick; an async
one is awaited in a thread of its own, one event after the other. An exception that it raises is logged and changes nothing.

Over 450 lines, since each event is here with the documentation of its fields, and the log's line of each is beside it.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from safedefer.concurrency.aside import Aside

__all__ = [
    "Event",
    "LogObserver",
    "Observer",
    "Observers",
    "ProcessStarted",
    "ProcessStopping",
    "QueueLate",
    "QueueTrouble",
    "RequestRefused",
    "TargetDown",
    "TargetUp",
    "TaskDead",
    "TaskEnqueued",
    "TaskHandled",
    "TaskRetried",
    "TaskStarted",
]

_log: Final = logging.getLogger("safedefer")

#: Seconds between two log lines about refusals of one reason.
REFUSALS_EVERY: Final = 60.0
#: Seconds that async observers have at the end for the events that wait.
FLUSH_SECONDS: Final = 2.0
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
class TaskStarted:
    """A handler begins an attempt: the task is authentic, and the ledger admits it. ``TaskHandled`` tells its end."""

    task_id: str
    queue: str
    callable: str
    kid: str
    attempt: int


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
    """A slug, or None where the handler gave the task up: its ``TaskHandled`` has the reason."""
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
    """``leasing``, ``settling``, ``extending leases``, or ``writing`` a notice for the dashboard."""
    reason: str
    """The text of an error of ours, which says what to do, or the name of another one."""
    count: int
    """Failures since the event before; 0: it works again."""
    seconds: float
    """Since the first of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLate:
    """Tasks are due and nobody takes them: told when the next one has been due for seconds, then once a minute."""

    queue: str
    """The one that is most behind; empty if that is not known."""
    seconds: float
    """For how long the next task has been due; 0: tasks are taken in time again."""
    waiting: int
    """Tasks that wait in this queue."""


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
    | TaskStarted
    | TaskHandled
    | TaskRetried
    | TaskDead
    | RequestRefused
    | TargetDown
    | TargetUp
    | QueueTrouble
    | QueueLate
    | ProcessStarted
    | ProcessStopping
)
"""Any of the events."""
Observer: TypeAlias = Callable[[Event], Awaitable[object] | None]
"""What is called with every event, and awaited if it is async."""


class Observers:
    """Several observers as one: each gets every event, whatever another one raises.

    An async observer (``async def``, or one whose call returns an awaitable) has a thread with an event loop of its own, and
    a queue of 1,000 events; more are dropped, counted and logged. So it cannot hold up a task or another observer. A
    future is left to the loop that it belongs to.

    Args:
        observers: Called in this order.
    """

    def __init__(self, *observers: Observer) -> None:
        self._asides: dict[int, Aside[Any]] = {}
        """Of async observers, by their place."""
        self._set(observers)

    def _set(self, observers: tuple[Observer, ...]) -> None:
        self.only_log: bool = all(type(each) is LogObserver or hears_only_troubles(each) for each in observers)
        """Whether nobody but the default log hears: it does not act on every event."""
        self._of_starts = [each for each in observers if getattr(type(each), "hears_starts", True) is not False]
        self._observers = observers
        self._calls = tuple(
            self._aside(place, each).put if _is_async(each) else each for place, each in enumerate(observers)
        )

    def __call__(self, event: Event) -> None:
        """Hand an event to each of them."""
        for place, observer in enumerate(self._calls):
            try:
                if (result := observer(event)) is not None:
                    self._await(place, result)
            except Exception:  # noqa: BLE001  # as notify, without a call more
                _log.exception("an observer failed; mend it")

    def __iter__(self) -> Iterator[Observer]:
        """Go through the observers."""
        return iter(self._observers)

    def add(self, observer: Observer) -> None:
        """Let one more observer have all events from now on."""
        self._set((*self._observers, observer))

    @property
    def hears_starts(self) -> bool:
        """Whether one of them may act on ``TaskStarted``."""
        return any(map(hears_started, self._of_starts))

    @property
    def has_async(self) -> bool:
        """Whether events may wait for an observer."""
        return bool(self._asides)

    def flush(self, seconds: float = FLUSH_SECONDS) -> bool:
        """Wait until the async observers had all events, for ``seconds`` at most; return whether they had."""
        end = time.monotonic() + seconds
        return min((each.flush(end - time.monotonic()) for each in [*self._asides.values()]), default=True)

    def close(self, seconds: float = FLUSH_SECONDS) -> None:
        """Flush for ``seconds`` at most and end the threads of async observers, which get no more events."""
        end = time.monotonic() + seconds
        for aside in [*self._asides.values()]:
            aside.close(end - time.monotonic())

    def _await(self, place: int, result: object) -> None:
        import asyncio  # noqa: PLC0415 - as below

        if inspect.isawaitable(result) and not asyncio.isfuture(result):
            self._aside(place, None).put(result)

    def _aside(self, place: int, observer: Observer | None) -> Aside[Any]:
        """Return what awaits for the observer at a place: its calls, or without it what they returned."""
        # Here and not at the top: without an async observer there is no event loop to load.
        from safedefer.concurrency.aside import Aside, of_awaitables  # noqa: PLC0415

        if (aside := self._asides.get(place)) is None:
            aside = of_awaitables() if observer is None else Aside(observer)  # type: ignore[arg-type]
            aside = self._asides.setdefault(place, aside)  # no lock, which a forked child could find taken
        return aside


def _is_async(observer: Observer) -> bool:
    """Whether a call returns a coroutine, as far as can be seen before it."""
    call = inspect.getattr_static(type(observer), "__call__", None)
    return inspect.iscoroutinefunction(observer) or inspect.iscoroutinefunction(call)


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
        traceback_of: Returns the text of an exception that is logged with the line of its task; None logs its type only.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        traceback_of: Callable[[BaseException], str] | None = None,
    ) -> None:
        self._traceback_of = traceback_of
        self.level = logging.INFO
        """The level of a task that succeeded (App Engine ``set_log_level``)."""
        self._clock = clock
        self._lock = RLock()  # reentrant: a signal handler may defer at any point
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
            case TaskStarted():
                text, more = "task %s starts: %s, attempt %d", {"safedefer": event}
                _log.debug(text, event.task_id, event.callable, event.attempt, extra=more)
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
            "task %s %s: %s, attempt %d, %.3f s%s%s%s",
            event.task_id,
            event.outcome,
            event.callable or "an oversize task whose token was not read",
            event.attempt,
            event.seconds,
            f" ({event.reason})" if event.reason else "",
            f": {event.error_type}" if event.error_type else "",
            self._traceback(event.error),
            extra={"safedefer": event},
        )

    def _traceback(self, error: BaseException | None) -> str:
        """Return an exception's text as lines that are indented: none of them can look like the line of another event."""
        if error is None or self._traceback_of is None:
            return ""
        return "".join(f"\n    {line}" for line in self._traceback_of(error).splitlines())

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
                    self._refusals.pop(reason, None)
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
    event: TaskRetried | TaskDead | TargetDown | TargetUp | QueueTrouble | QueueLate | ProcessStarted | ProcessStopping,
) -> tuple[int, str, *tuple[object, ...]]:
    """Return the level, the format and the values of the log line of a dispatcher's or process's event."""
    match event:
        case QueueTrouble() | QueueLate():
            return _line_of_queue(event)
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
            # Of a task that its handler gave up, the dispatcher knows only that: the handler logged the reason.
            return logging.ERROR, text, event.task_id, event.reason or "failed", event.attempts
        case TargetDown():
            text = "the handler %s takes no connection (%s); its tasks wait, and it is tried again"
            return logging.WARNING, text, event.address, event.reason
        case TargetUp():
            text = "the handler %s takes connections again, after %.1f s; %d deliveries were put off meanwhile"
            return logging.WARNING, text, event.address, event.seconds, event.waited


def _line_of_queue(event: QueueTrouble | QueueLate) -> tuple[int, str, *tuple[object, ...]]:
    """Return the same for an event about a queue."""
    match event:
        case QueueTrouble(count=0):
            return logging.WARNING, "%s works again, after %.1f s", event.doing, event.seconds
        case QueueTrouble(count=1):
            return logging.ERROR, "%s failed: %s; trying again", event.doing, event.reason
        case QueueTrouble():
            text = "%s failed: %s; %d times more, for %.0f s now"
            return logging.ERROR, text, event.doing, event.reason, event.count, event.seconds
        case QueueLate(seconds=0):
            return logging.WARNING, "no task is late any more"
        case QueueLate():
            text = "tasks are late: in the queue %a %d wait, and the next one has been due for %.1f s; more are deferred than run, or nobody ran them"
            return logging.WARNING, text, event.queue, event.waiting, event.seconds


def banner(event: ProcessStarted) -> str:
    """Return what a process is, in one line: its queue, environment, policy, keys and tasks at once."""
    several = "" if event.processes == 1 else f" in each of {event.processes} processes"
    return (
        f"safedefer {event.command}: the queue is in {event.queue}; environment {event.environment}; "
        f"policy {', '.join(event.policy) or 'allows nothing'}; keys {', '.join(event.keys)}; "
        f"{event.concurrency} tasks at once{several}"
    )


def hears_only_troubles(observer: Observer) -> bool:
    """Whether an observer acts on no event of a task that is stored, or runs well."""
    return getattr(observer, "hears_only_troubles", False) is True


def hears_enqueued(observer: Observer) -> bool:
    """Whether an observer may act on ``TaskEnqueued``: the default log does so at debug level only."""
    if isinstance(observer, Observers):
        return not observer.only_log or any(map(hears_enqueued, observer))
    if hears_only_troubles(observer):
        return False
    return type(observer) is not LogObserver or _log.isEnabledFor(logging.DEBUG)


def hears_started(observer: Observer) -> bool:
    """Whether an observer may act on ``TaskStarted``: the default log does so at debug level only."""
    if type(observer) is LogObserver:  # a subclass may do more
        return _log.isEnabledFor(logging.DEBUG)
    return getattr(observer, "hears_starts", True) is not False and not hears_only_troubles(observer)


def is_heard(observer: Observer, outcome: str, reason: str | None) -> bool:
    """Whether an observer may act on ``TaskHandled``: the default log does not if its level is off."""
    if isinstance(observer, Observers):
        return not observer.only_log or any(is_heard(each, outcome, reason) for each in observer)
    if isinstance(observer, LogObserver) and type(observer) is LogObserver:  # a subclass may do more
        return _log.isEnabledFor(observer.level_of(outcome, reason))
    return outcome == "rejected" or not hears_only_troubles(observer)


def notify(observer: Observer, event: Event) -> None:
    """Call an observer. Log an exception that it raises, and go on."""
    try:
        observer(event)
    except Exception:  # noqa: BLE001  # the task goes on after any error of an observer
        _log.exception("an observer failed; mend it")
