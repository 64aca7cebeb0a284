"""The numbers of the overview: queues, what ended of late as a chart, and what is wrong."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Final, NamedTuple

from safedefer.dashboard.access import Access
from safedefer.dashboard.managed import Managed
from safedefer.dashboard.signals import DownTarget, Signals
from safedefer.queues.base import EndCount, QueueStats, TaskState
from safedefer.queues.rates import QueueControl

MINUTES: Final = 15
"""Minutes that the chart shows."""
_STEP: Final = 60.0
#: Seconds for which an answer of the store serves all who ask: pages ask every few seconds. And how many times as long as it
#: took: counting a million tasks takes a second.
_KEEP_SECONDS: Final = 1.0
_KEEP_TIMES: Final = 4.0
#: Seconds of lag that are shown as wrong.
LATE_SECONDS: Final = 60.0
#: Queues that are shown; names in a storage may be those that somebody wrote.
_QUEUES: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueRow:
    """One queue."""

    name: str
    waiting: int = 0
    running: int = 0
    dead: int = 0
    lag: float = 0.0
    """Seconds."""
    succeeded: int = 0
    """In the last minutes, as ``died`` and ``cancelled``."""
    died: int = 0
    cancelled: int = 0
    control: QueueControl | None = None

    @property
    def paused(self) -> bool:
        """Whether nothing of it is delivered until it is resumed."""
        return self.control is not None and (self.control.paused or self.control.limits.rate == 0)

    @property
    def is_late(self) -> bool:
        """Whether its oldest task waits too long."""
        return self.lag > LATE_SECONDS


class Bar(NamedTuple):
    """One minute of the chart: heights are in units of the drawing."""

    x: int
    succeeded: int
    died: int
    succeeded_height: float
    died_height: float
    label: str


class Alarm(NamedTuple):
    """Something that is wrong, and the page that says more."""

    text: str
    page: str
    queue: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """What the overview shows."""

    queues: list[QueueRow]
    outbox_rows: int | None
    """None: an outbox cannot be read."""
    bars: list[Bar]
    most: int
    """The number of the highest bar."""
    alarms: list[Alarm]
    down: list[DownTarget]

    def total(self, name: str) -> int:
        """Return the sum of a number over all queues."""
        return sum(int(getattr(row, name)) for row in self.queues)

    @property
    def lag(self) -> float:
        """The lag of the queue that is most behind."""
        return max((row.lag for row in self.queues), default=0.0)


class _Answer(NamedTuple):
    until: float
    """When it is asked anew, by the monotonic clock."""
    now: float
    stats: Sequence[QueueStats]
    ends: Sequence[EndCount]
    controls: Sequence[QueueControl]
    outbox_rows: int | None


class Numbers:
    """Asks the store for the numbers of the overview, at most once a second.

    Args:
        app: The application.
        signals: What this process has seen.
    """

    def __init__(self, app: Managed, signals: Signals) -> None:
        self._app = app
        self._signals = signals
        self._lock = Lock()
        self._answer: _Answer | None = None

    def _ask(self, now: float) -> _Answer:
        with self._lock:
            answer = self._answer
            if answer is None or time.monotonic() > answer.until:
                began = time.monotonic()
                queue = self._app.queue
                stats = queue.stats(now=now)
                ends = queue.ends(since=now - MINUTES * _STEP, step=_STEP)
                controls = queue.controls(now=now)
                rows = self._app.outbox.count()
                ended = time.monotonic()
                until = ended + max(_KEEP_SECONDS, _KEEP_TIMES * (ended - began))
                answer = _Answer(until, now, stats, ends, controls, rows)
                self._answer = answer
            return answer

    def forget(self) -> None:
        """Ask anew next time: somebody has changed something."""
        with self._lock:
            self._answer = None

    def overview(self, access: Access, *, now: float) -> Overview:
        """Return what a person may see. Raises ``QueueUnavailable``."""
        answer = self._ask(now)
        rows = self._rows(answer, access)
        down = self._signals.down() if access.reads_all else []
        outbox = answer.outbox_rows if access.reads_all else 0
        bars, most = _bars([each for each in answer.ends if access.may_read(each.queue)])
        alarms = _alarms(rows, outbox, down)
        return Overview(queues=rows, outbox_rows=outbox, bars=bars, most=most, alarms=alarms, down=down)

    def _rows(self, answer: _Answer, access: Access) -> list[QueueRow]:
        stats = {each.queue: each for each in answer.stats}
        controls = {each.queue: each for each in answer.controls}
        file = self._app.queue_file
        declared = {*(section.name for section in file.queue)} if file else set[str]()
        ended = {each.queue for each in answer.ends}
        names = sorted({"default", *stats, *controls, *declared, *ended, *(self._app.queues or ())})
        return [
            _row(name, stats.get(name), controls.get(name), answer)
            for name in [name for name in names if access.may_read(name)][:_QUEUES]
        ]


def _row(name: str, stats: QueueStats | None, control: QueueControl | None, answer: _Answer) -> QueueRow:
    def count(state: TaskState) -> int:
        return sum(each.number for each in answer.ends if each.queue == name and each.state is state)

    oldest = None if stats is None else stats.oldest
    return QueueRow(
        name=name,
        waiting=stats.waiting if stats else 0,
        running=stats.running if stats else 0,
        dead=stats.dead if stats else 0,
        lag=0.0 if oldest is None else max(answer.now - oldest, 0.0),
        succeeded=count(TaskState.SUCCEEDED),
        died=count(TaskState.DEAD),
        cancelled=count(TaskState.CANCELLED),
        control=control,
    )


#: The drawing: its height, and the width of a minute.
_HEIGHT: Final = 80
_WIDTH: Final = 24


def _bars(ends: Sequence[EndCount]) -> tuple[list[Bar], int]:
    counts = [[0, 0] for _ in range(MINUTES)]
    for each in ends:
        # A clock that is ahead ends tasks in a step to come.
        if each.state is not TaskState.CANCELLED and 0 <= each.step <= MINUTES:
            counts[min(each.step, MINUTES - 1)][each.state is TaskState.DEAD] += each.number
    most = max(*(sum(each) for each in counts), 1)
    bars = []
    for number, (succeeded, died) in enumerate(counts):
        ago = MINUTES - number
        heights = [0.0 if not count else max(round(_HEIGHT * count / most, 1), 2.0) for count in (succeeded, died)]
        label = f"{ago} to {ago - 1} min ago: {succeeded} succeeded, {died} died"
        bars.append(Bar(number * _WIDTH, succeeded, died, heights[0], heights[1], label))
    return bars, most


def _alarms(rows: Sequence[QueueRow], outbox: int | None, down: Sequence[DownTarget]) -> list[Alarm]:
    found = [Alarm(f"The target {each.name} does not answer ({each.reason}).", "system") for each in down]
    for row in rows:
        if row.paused and row.waiting:
            found.append(
                Alarm(
                    f"The queue {row.name} is paused: {row.waiting} wait, the oldest for {duration(row.lag)}.",
                    "queues",
                )
            )
        elif row.is_late:
            text = f"The queue {row.name} is {duration(row.lag)} behind: {row.waiting} wait, {row.running} run."
            found.append(Alarm(text, "tasks", row.name))
        if row.died:
            text = (
                f"{row.died} died in the queue {row.name} in the last {MINUTES} min ({row.dead} dead letters in all)."
            )
            found.append(Alarm(text, "dead", row.name))
    if outbox is None:
        found.append(Alarm("An outbox cannot be read: transactional tasks may be waiting in it.", "system"))
    return found


def duration(seconds: float) -> str:
    """Return a length of time for people: its two largest units."""
    if not seconds >= 1:  # NaN too: a hint in the storage, which nobody signed
        return "0 s"
    whole = int(min(seconds, 1e11))
    parts = []
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        number, whole = divmod(whole, size)
        if number:
            parts.append(f"{number} {unit}")
        elif parts:
            break
    return " ".join(parts[:2])
