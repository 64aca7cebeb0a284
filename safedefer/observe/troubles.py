"""What goes wrong in a process, as an observer keeps it: a short document, which other processes can read.

No argument, key or token is in it: reasons, callables of verified tokens, addresses without password, and texts of our errors.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, Final, NamedTuple, TypeAlias

from safedefer.events import Event, QueueLate, QueueTrouble, RequestRefused, TargetDown, TargetUp, TaskHandled
from safedefer.queues.addresses import place
from safedefer.queues.base import NOTICE_BYTES, Notice

WINDOW_SECONDS: Final = 900.0
"""For how long refusals and rejections are remembered."""
_STEP: Final = 60.0
#: Entries of a kind that are remembered, and the most that are written.
_KEPT: Final = 50
_WRITTEN: Final = 10
_MOST_TEXT: Final = 300
#: Counts and times that somebody may have stored.
_LARGEST: Final = 1e12
#: Seconds by which the clock of another process may be ahead.
_AHEAD: Final = 60.0


class DownTarget(NamedTuple):
    """A target that takes no connection."""

    address: str
    reason: str
    since: float
    """Seconds since the epoch."""

    @property
    def name(self) -> str:
        """The address, or words where the handler is in the dispatcher's own process."""
        return self.address or "in the dispatcher's process"


class StoreTrouble(NamedTuple):
    """Something that fails at the store."""

    doing: str
    text: str
    since: float


class LateQueue(NamedTuple):
    """A queue whose next task has been due for too long."""

    queue: str
    since: float
    """When that task fell due."""


class Refused(NamedTuple):
    """Requests that were refused."""

    reason: str
    times: int
    last: float
    """When the last one came."""


class Rejected(NamedTuple):
    """Attempts that the code here cannot run: a version skew, mostly."""

    reason: str
    callable: str
    times: int
    last: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessReport:
    """What a process says of itself. A hint: whoever may write the store may have written it."""

    process: str = ""
    at: float = 0.0
    """When it was said."""
    since: float = 0.0
    """When the process began to say something."""
    command: str = ""
    takes: bool = False
    """Whether it takes tasks from the queue."""
    beats: bool = False
    """Whether it says something every few seconds."""
    ended: bool = False
    """Whether it has ended as it was asked to."""
    queues: tuple[str, ...] | None = None
    """Those that it takes tasks of; None: all."""
    down: tuple[DownTarget, ...] = ()
    troubles: tuple[StoreTrouble, ...] = ()
    late: tuple[LateQueue, ...] = ()
    refused: tuple[Refused, ...] = ()
    rejected: tuple[Rejected, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.down or self.troubles or self.late or self.refused or self.rejected)

    def text(self) -> str:
        """Return this as the text of a notice: as much of it as has room."""
        most = _WRITTEN
        while True:
            document: dict[str, Any] = {
                "command": self.command,
                "since": self.since,
                "takes": self.takes,
                "beats": self.beats,
                "ended": self.ended,
                "queues": None if self.queues is None else [_cut(each) for each in self.queues[:most]],
            }
            for name in _LISTS:
                document[name] = [[_cut(part) for part in entry] for entry in getattr(self, name)[:most]]
            text = json.dumps(document, ensure_ascii=False)
            if len(text.encode("utf-8", "replace")) <= NOTICE_BYTES or not most:
                return text.encode("utf-8", "replace").decode()
            most //= 2

    @classmethod
    def read(cls, notice: Notice, *, now: float) -> ProcessReport | None:
        """Return what a notice says; None if it is not one of ours."""
        try:
            if notice.at > now + _AHEAD:
                return None
            document = json.loads(notice.text)
            queues = document["queues"]
            values: dict[str, Any] = {
                name: tuple(_entry(kind, entry) for entry in document[name][:_WRITTEN]) for name, kind in _LISTS.items()
            }
            return cls(
                process=_text(notice.process),
                at=min(_number(notice.at), now),
                command=_text(document["command"]),
                since=_number(document["since"]),
                takes=document["takes"] is True,
                beats=document["beats"] is True,
                ended=document["ended"] is True,
                queues=None if queues is None else tuple(_text(each) for each in queues[:_WRITTEN]),
                **values,
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None


_Entry: TypeAlias = DownTarget | StoreTrouble | LateQueue | Refused | Rejected
_LISTS: Final[Mapping[str, type[_Entry]]] = {
    "down": DownTarget,
    "troubles": StoreTrouble,
    "late": LateQueue,
    "refused": Refused,
    "rejected": Rejected,
}
_NUMBERS: Final = frozenset({"since", "last"})


def _entry(kind: type[_Entry], values: Any) -> Any:
    made: list[Any] = []
    for name, value in zip(kind._fields, values, strict=True):
        if name in _NUMBERS:
            made.append(_number(value))
        elif name == "times":
            made.append(int(_number(value)))
        else:
            made.append(_text(value))
    return kind(*made)


def _number(value: Any) -> float:
    if type(value) not in {int, float} or not math.isfinite(value) or not 0 <= value <= _LARGEST:
        raise ValueError("no number of ours")
    return value  # type: ignore[no-any-return]


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("no text")
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in value[:_MOST_TEXT])


def _cut(value: Any) -> Any:
    return value[:_MOST_TEXT] if type(value) is str else value


@dataclass(slots=True)
class _Tally:
    """How often something happened, by the minute."""

    last: float = 0.0
    minutes: Counter[int] = field(default_factory=Counter)

    def add(self, now: float) -> None:
        self.last = now
        self.minutes[int(now // _STEP)] += 1

    def count(self, now: float) -> int:
        """Return how often it happened of late, and forget what is older."""
        first = int((now - WINDOW_SECONDS) // _STEP)
        for minute in [minute for minute in self.minutes if minute <= first]:
            del self.minutes[minute]
        return self.minutes.total()


class Troubles:
    """An observer that remembers what is wrong in this process. Thread-safe.

    Args:
        clock: Seconds since the epoch.
        changed: Called when something is wrong that was not, or is no longer.
    """

    hears_only_troubles = True
    """It acts on no event of a task that runs well: such events need not be made for it."""

    def __init__(self, clock: Callable[[], float], changed: Callable[[], object] = lambda: None) -> None:
        self._clock = clock
        self._changed = changed
        self.forget()

    def forget(self) -> None:
        """Begin anew: in a forked child, which has troubles of its own."""
        self._lock = RLock()  # reentrant: a signal handler may defer at any point
        self._down: dict[str, DownTarget] = {}
        self._troubles: dict[str, StoreTrouble] = {}
        self._late: dict[str, LateQueue] = {}
        self._refused: dict[str, _Tally] = {}
        self._rejected: dict[tuple[str, str], _Tally] = {}

    @property
    def is_handler_down(self) -> bool:
        """Whether a handler of this process's tasks takes none."""
        with self._lock:
            return bool(self._down)

    def __call__(self, event: Event) -> None:
        """Take in an event."""
        if isinstance(event, TaskHandled) and event.outcome != "rejected":
            return
        now = self._clock()
        with self._lock:
            if type(event) is RequestRefused:  # first: anybody can cause these
                _tally(self._refused, event.reason, now)
            elif not self._take_in(event, now):
                return
        self._changed()

    def _take_in(self, event: Event, now: float) -> bool:
        match event:
            case TargetDown():
                address = place(event.address) if event.address else ""
                _put(self._down, event.address, DownTarget(address, event.reason, now))
            case TargetUp():
                self._down.pop(event.address, None)
            case QueueTrouble(count=0):
                self._troubles.pop(event.doing, None)
            case QueueTrouble():
                _put(self._troubles, event.doing, StoreTrouble(event.doing, event.reason, now - event.seconds))
            case QueueLate(seconds=0):
                self._late.clear()
            case QueueLate():
                self._late = {event.queue: LateQueue(event.queue, now - event.seconds)}
            case TaskHandled():
                _tally(self._rejected, (event.reason or "", event.callable), now)
            case _:
                return False
        return True

    def report(self, **values: Any) -> ProcessReport:
        """Return what is wrong now; ``values`` are the other fields of the report."""
        now = self._clock()
        with self._lock:
            for tallies in (self._refused, self._rejected):
                for key in [key for key, tally in tallies.items() if not tally.count(now)]:
                    del tallies[key]  # type: ignore[arg-type]
            refused = [Refused(reason, tally.count(now), tally.last) for reason, tally in self._refused.items()]
            rejected = [Rejected(*key, tally.count(now), tally.last) for key, tally in self._rejected.items()]
            return ProcessReport(
                at=now,
                down=tuple(sorted(self._down.values())),
                troubles=tuple(sorted(self._troubles.values())),
                late=tuple(self._late.values()),
                refused=tuple(sorted(refused, key=lambda each: -each.times)),
                rejected=tuple(sorted(rejected, key=lambda each: -each.times)),
                **values,
            )


def _put(known: dict[str, Any], key: str, value: Any) -> None:
    if key in known or len(known) < _KEPT:
        known[key] = value


def _tally(known: dict[Any, _Tally], key: Any, now: float) -> None:
    tally = known.get(key)
    if tally is None:
        if len(known) >= _KEPT:
            return
        tally = known[key] = _Tally()
    tally.add(now)
