"""The numbers of the overview: queues, what ended of late as a chart, and what is wrong."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Final, NamedTuple

from safedefer.dashboard.access import Access
from safedefer.dashboard.alarms import Alarm, alarms
from safedefer.dashboard.managed import Managed
from safedefer.dashboard.queue_rows import MINUTES, QueueRow
from safedefer.dashboard.reports import Reported, put_together
from safedefer.queues.base import NOTICE_SECONDS, AttemptTime, EndCount, Notice, QueueStats, TaskState
from safedefer.queues.rates import QueueControl

_STEP: Final = 60.0
#: Seconds for which an answer of the store serves all who ask: pages ask every few seconds. And how many times as long as it
#: took: counting a million tasks takes a second. What processes say is few rows, and is asked for by itself.
_KEEP_SECONDS: Final = 1.0
_KEEP_TIMES: Final = 4.0
#: Queues that are asked for their next task.
_ASKED: Final = 50
#: Queues that are shown; names in a storage may be those that somebody wrote.
_QUEUES: Final = 200


class Bar(NamedTuple):
    """One minute of the chart: heights are in units of the drawing."""

    x: int
    succeeded: int
    died: int
    succeeded_height: float
    died_height: float
    label: str


class Latency(NamedTuple):
    """How long attempts took."""

    median: float
    slow: float
    """99 of 100 took no longer."""
    number: int
    """How many attempts this is of: the newest ones."""


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
    latency: Latency | None
    """None: no attempt of the last minutes is recorded."""
    as_of: float
    """When the store was asked, in seconds since the epoch."""

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
    untaken: Mapping[str, float]
    times: Sequence[AttemptTime]


class _Told(NamedTuple):
    """What processes say."""

    until: float
    """As above."""
    now: float
    """When it was read, in seconds since the epoch: who has said nothing since then need not be silent."""
    notices: Sequence[Notice]


class Numbers:
    """Asks the store for the numbers of the overview, at most once a second.

    Args:
        app: The application.
    """

    def __init__(self, app: Managed) -> None:
        self._app = app
        self._lock = Lock()
        self._answer: _Answer | None = None
        self._lock_told = Lock()
        self._told: _Told | None = None

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
                untaken = self._untaken(stats, now)
                times = queue.attempt_times(since=now - MINUTES * _STEP)
                ended = time.monotonic()
                until = ended + max(_KEEP_SECONDS, _KEEP_TIMES * (ended - began))
                answer = _Answer(until, now, stats, ends, controls, rows, untaken, times)
                self._answer = answer
            return answer

    def _untaken(self, stats: Sequence[QueueStats], now: float) -> dict[str, float]:
        """Return for how long the next task of each queue has been due: of a queue that gives none, there is none."""
        found = {}
        for each in [each for each in stats if each.waiting][:_ASKED]:
            due = self._app.queue.next_due(now=now, queues=[each.queue])
            found[each.queue] = 0.0 if due is None else max(now - due, 0.0)
        return found

    def reported(self, *, now: float) -> Reported:
        """Return what all processes say of themselves. Raises ``QueueUnavailable``."""
        with self._lock_told:  # another one than for the counts, which may take a second
            told = self._told
            if told is None or time.monotonic() > told.until:
                notices = self._app.queue.notices(since=now - NOTICE_SECONDS)
                told = self._told = _Told(time.monotonic() + _KEEP_SECONDS, now, notices)
        return put_together(told.notices, self._app.notices, now=told.now)

    def forget(self) -> None:
        """Ask anew next time: somebody has changed something."""
        with self._lock, self._lock_told:
            self._answer = self._told = None

    def overview(self, access: Access, *, now: float) -> Overview:
        """Return what a person may see. Raises ``QueueUnavailable``."""
        answer = self._ask(now)
        self._app.notices.look_on()
        rows = self._rows(answer, access)
        reported = self.reported(now=now) if access.reads_all else Reported(alive=self.reported(now=now).alive)
        outbox = answer.outbox_rows if access.reads_all else 0
        bars, most = _bars([each for each in answer.ends if access.may_read(each.queue)])
        times = sorted(each.seconds for each in answer.times if access.may_read(each.queue))
        found = alarms(rows, outbox, reported, now=now)
        return Overview(
            queues=rows,
            outbox_rows=outbox,
            bars=bars,
            most=most,
            alarms=found,
            latency=_latency(times),
            as_of=answer.now,
        )

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
        untaken=answer.untaken.get(name, 0.0),
    )


def _latency(times: Sequence[float]) -> Latency | None:
    """Return the median and the 99th percentile of sorted times."""
    if not times:
        return None
    return Latency(times[(len(times) - 1) // 2], times[(len(times) * 99 - 1) // 100], len(times))


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
