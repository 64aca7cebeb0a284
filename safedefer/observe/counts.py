"""What events add up to: counters, histograms and gauges, kept without Prometheus's library.

An observer adds to a dictionary, which takes about a microsecond. A worker process sends what was added to its
supervisor, which adds up all workers and keeps the sums when one of them is replaced.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from threading import RLock
from typing import Any, Final, TypeAlias

from safedefer.events import (
    Event,
    QueueTrouble,
    RequestRefused,
    TargetDown,
    TargetUp,
    TaskDead,
    TaskEnqueued,
    TaskHandled,
    TaskRetried,
)
from safedefer.queues.addresses import place

Series: TypeAlias = tuple[str, ...]
"""The name of a metric, and the values of its labels."""

ENQUEUED: Final = "safedefer_tasks_enqueued_total"
ATTEMPTS: Final = "safedefer_attempts_total"
SECONDS: Final = "safedefer_attempt_seconds"
REFUSED: Final = "safedefer_requests_refused_total"
RETRIED: Final = "safedefer_tasks_retried_total"
DEAD: Final = "safedefer_tasks_dead_total"
TARGET_DOWN: Final = "safedefer_target_down"
TROUBLE: Final = "safedefer_queue_trouble"

COUNTERS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    ENQUEUED: ("Tasks that this process stored.", ("queue",)),
    ATTEMPTS: ("Attempts: deliveries that a handler took, by their end.", ("queue", "outcome", "reason")),
    REFUSED: ("Requests that were refused: malformed, not signed by our keys, or for others.", ("reason",)),
    RETRIED: ("Deliveries after which a dispatcher tries the task again.", ("queue", "reason")),
    DEAD: ("Tasks that a dispatcher gave up.", ("queue", "reason")),
}
"""What counters are of, and their labels."""
HISTOGRAMS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    SECONDS: ("Seconds from the arrival of an attempt's request to its answer.", ("callable",)),
}
GAUGES: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    TARGET_DOWN: ("1 while a handler takes no connection; the name is empty for one in the same process.", ("target",)),
    TROUBLE: ("1 while the storage fails a dispatcher.", ("doing",)),
}
BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)
"""Upper bounds of the buckets of a histogram, in seconds."""
OTHERS: Final = "others"
"""The value of every label of what is beyond the limit of series, or has a label that cannot be shown."""

#: Outcomes of deliveries that no handler took as an attempt.
_NO_ATTEMPT: Final = frozenset({"busy", "early", "running", "duplicate"})
_QUEUE: Final = re.compile(r"[a-zA-Z0-9_-]{1,500}")
_LONGEST_LABEL: Final = 500


def queue_label(name: str) -> str:
    """Return the name of a queue, or ``others`` for what is in the storage and is no name."""
    return name if _QUEUE.fullmatch(name) else OTHERS


def _target_label(address: str) -> str:
    """Return the address of a handler without user and password; empty for the one in this process."""
    return place(address) if address else ""


class Sums:
    """Counters and histograms by series. Not thread-safe.

    Args:
        limit: The most series of a metric; what comes after is added up as one.
    """

    def __init__(self, limit: int = 1_000) -> None:
        self.totals: dict[Series, float] = {}
        self.histograms: dict[Series, list[float]] = {}
        """For each series the number in each bucket, in the last one too, and the sum of the values."""
        self._limit = limit
        self._series: dict[str, int] = {}

    def add(self, series: Series, number: float = 1.0) -> None:
        """Add to a counter."""
        try:
            self.totals[series] += number
        except KeyError:
            key = self._admit(series, self.totals)
            self.totals[key] = self.totals.get(key, 0.0) + number

    def observe(self, series: Series, value: float) -> None:
        """Add a value to a histogram."""
        cells = self._cells(series)
        cells[bisect_left(BUCKETS, value)] += 1.0
        cells[-1] += value

    def _cells(self, series: Series) -> list[float]:
        cells = self.histograms.get(series)
        if cells is None:
            cells = self.histograms.setdefault(self._admit(series, self.histograms), [0.0] * (len(BUCKETS) + 2))
        return cells

    def _admit(self, series: Series, known: Mapping[Series, object]) -> Series:
        name, *labels = series
        showable = all(len(label) <= _LONGEST_LABEL and label.isprintable() for label in labels)
        if not showable or self._series.get(name, 0) >= self._limit:
            return (name, *(OTHERS for _ in labels))
        if series not in known:
            self._series[name] = self._series.get(name, 0) + 1
        return series

    def merge(self, other: Sums) -> None:
        """Add all of another's."""
        for series, number in other.totals.items():
            self.add(series, number)
        for series, added in other.histograms.items():
            cells = self._cells(series)
            cells[:] = map(sum, zip(cells, added, strict=True))

    def dump(self) -> dict[str, Any]:
        """Return this as JSON's values."""
        return {
            "totals": [[*series, number] for series, number in self.totals.items()],
            "histograms": [[list(series), cells] for series, cells in self.histograms.items()],
        }

    @classmethod
    def load(cls, document: Any) -> Sums:
        """Return what ``dump`` made. Raises ``ValueError``, ``TypeError`` or ``KeyError`` for anything else."""
        made = cls()
        for *series, number in document["totals"]:
            if series[0] not in COUNTERS:
                raise ValueError("no counter of ours")
            made.add(tuple(map(str, series)), float(number))
        for series, cells in document["histograms"]:
            if series[0] not in HISTOGRAMS or len(cells) != len(BUCKETS) + 2:
                raise ValueError("no histogram of ours")
            mine = made._cells(tuple(map(str, series)))
            mine[:] = map(float, cells)
        return made


class Counts:
    """The observer that counts. Thread-safe."""

    hears_starts = False
    """It acts on the end of an attempt only: no event of its start need be made for it."""

    def __init__(self) -> None:
        self._lock = RLock()  # reentrant: a signal handler may defer at any point, and be counted
        self._sums = Sums()
        self._gauges: dict[Series, float] = {}

    def __call__(self, event: Event) -> None:
        """Count one event."""
        count = _COUNTED.get(type(event))
        if count is not None:
            with self._lock:
                count(self, event)

    def take(self) -> Sums:
        """Return what was added since ``take`` was called last, and begin anew."""
        with self._lock:
            taken, self._sums = self._sums, Sums()
        return taken

    def copy(self) -> Sums:
        """Return all that was added."""
        made = Sums()
        with self._lock:
            made.merge(self._sums)
        return made

    def gauges(self) -> dict[Series, float]:
        """Return the current values of gauges."""
        with self._lock:
            return dict(self._gauges)

    def _enqueued(self, event: TaskEnqueued) -> None:
        self._sums.add((ENQUEUED, event.queue))

    def _handled(self, event: TaskHandled) -> None:
        if event.outcome not in _NO_ATTEMPT:
            self._sums.add((ATTEMPTS, event.queue, event.outcome, event.reason or ""))
            self._sums.observe((SECONDS, event.callable), event.seconds)

    def _refused(self, event: RequestRefused) -> None:
        self._sums.add((REFUSED, event.reason))

    def _retried(self, event: TaskRetried) -> None:
        self._sums.add((RETRIED, queue_label(event.queue), event.reason or ""))

    def _dead(self, event: TaskDead) -> None:
        self._sums.add((DEAD, queue_label(event.queue), event.reason or ""))

    def _down(self, event: TargetDown) -> None:
        self._gauges[TARGET_DOWN, _target_label(event.address)] = 1.0

    def _up(self, event: TargetUp) -> None:
        self._gauges[TARGET_DOWN, _target_label(event.address)] = 0.0

    def _trouble(self, event: QueueTrouble) -> None:
        self._gauges[TROUBLE, event.doing] = float(event.count > 0)


_COUNTED: Final[Mapping[type[Event], Callable[[Counts, Any], None]]] = {
    TaskEnqueued: Counts._enqueued,  # noqa: SLF001  # of this module
    TaskHandled: Counts._handled,  # noqa: SLF001
    RequestRefused: Counts._refused,  # noqa: SLF001
    TaskRetried: Counts._retried,  # noqa: SLF001
    TaskDead: Counts._dead,  # noqa: SLF001
    TargetDown: Counts._down,  # noqa: SLF001
    TargetUp: Counts._up,  # noqa: SLF001
    QueueTrouble: Counts._trouble,  # noqa: SLF001
}


def dump_gauges(gauges: Mapping[Series, float]) -> list[list[Any]]:
    """Return gauges as JSON's values."""
    return [[*series, value] for series, value in gauges.items()]


def load_gauges(document: Any) -> dict[Series, float]:
    """Return what ``dump_gauges`` made. Raises ``ValueError`` or ``TypeError`` for anything else."""
    found: dict[Series, float] = {}
    for *series, value in document:
        if series[0] not in GAUGES:
            raise ValueError("no gauge of ours")
        found[tuple(map(str, series))] = float(value)
    return found


def highest(several: Mapping[object, Mapping[Series, float]]) -> dict[Series, float]:
    """Return of each gauge the highest value that a process has."""
    found: dict[Series, float] = {}
    for gauges in several.values():
        for series, value in gauges.items():
            found[series] = max(value, found.get(series, value))
    return found
