"""Prometheus: the metrics of one process, or of the worker processes of a supervisor. The only importer of its library.

The series, their names and the buckets of histograms are in ``counts``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from safedefer.errors import MissingExtra
from safedefer.observe.counts import BUCKETS, COUNTERS, GAUGES, HISTOGRAMS, Counts, Series, Sums
from safedefer.observe.store import StoreReading, read_store

try:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ModuleNotFoundError as _error:
    raise MissingExtra("metrics", "metrics for Prometheus") from _error

if TYPE_CHECKING:
    from safedefer.events import Observers
    from safedefer.observe.store import Outboxes
    from safedefer.queues.base import PullQueue

__all__ = ["Metrics"]

_log: Final = logging.getLogger("safedefer")

Families: TypeAlias = Iterator[Metric]
"""Metrics with their samples."""

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""The media type of ``exposition``."""


class HasMetrics(Protocol):
    """What metrics are of: an ``App``."""

    @property
    def observers(self) -> Observers:
        """Who is told of events."""
        ...

    @property
    def queue(self) -> PullQueue:
        """The queue."""
        ...

    @property
    def outbox(self) -> Outboxes:
        """The outboxes."""
        ...


class Metrics(Collector):
    """The metrics of this process, for a registry of your own: ``REGISTRY.register(Metrics(app))``.

    It counts events from now on. ``safedefer run``, ``serve`` and ``dispatch`` need none: ``--health`` serves the same.

    Args:
        app: The application.
        store: Whether to ask its store at each scrape for the depth and lag of queues, dead letters and outbox rows. These
            are the same in every process: one of them should ask.
    """

    def __init__(self, app: HasMetrics, *, store: bool = True) -> None:
        self._app = app
        self._store = store
        self._counts = Counts()
        app.observers.add(self._counts)

    def describe(self) -> Iterator[Metric]:
        """Return nothing: a registry must not ask the store when this is registered."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Give all metrics, and ask the store."""
        yield from of_events(self._counts.copy(), self._counts.gauges())
        if self._store:
            try:
                reading = read_store(self._app.queue, self._app.outbox, now=time.time())
            except Exception as error:  # noqa: BLE001  # of the storage: the other metrics of the registry are shown
                _log.debug("the store does not answer a scrape (%s)", type(error).__name__)
                reading = None
            yield from of_store(reading)


def of_events(sums: Sums, gauges: Mapping[Series, float]) -> Iterator[Metric]:
    """Give the metrics that events add up to."""
    for name, (text, labels) in COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=labels)
        for series, number in sums.totals.items():
            if series[0] == name:
                counter.add_metric(series[1:], number)
        yield counter
    for name, (text, labels) in HISTOGRAMS.items():
        histogram = HistogramMetricFamily(name, text, labels=labels)
        for series, cells in sums.histograms.items():
            if series[0] == name:
                histogram.add_metric(series[1:], _cumulative(cells), cells[-1])
        yield histogram
    for name, (text, labels) in GAUGES.items():
        gauge = GaugeMetricFamily(name, text, labels=labels)
        for series, value in gauges.items():
            if series[0] == name:
                gauge.add_metric(series[1:], value)
        yield gauge


def _cumulative(cells: list[float]) -> list[tuple[str, float]]:
    found, total = [], 0.0
    for bound, number in zip((*map(str, BUCKETS), "+Inf"), cells, strict=False):  # the last cell is the sum
        total += number
        found.append((bound, total))
    return found


def of_store(reading: StoreReading | None) -> Iterator[Metric]:
    """Give the metrics of a store; None: it did not answer, and has no numbers."""
    yield GaugeMetricFamily("safedefer_store_up", "Whether the store answered this scrape.", value=reading is not None)
    tasks = GaugeMetricFamily("safedefer_queue_tasks", "Tasks that wait or run.", labels=("queue", "state"))
    lag = GaugeMetricFamily(
        "safedefer_queue_lag_seconds", "Seconds by which the oldest task that waits is late.", labels=("queue",)
    )
    dead = GaugeMetricFamily("safedefer_dead_letters", "Dead letters, without archived ones.", labels=("queue",))
    rows = GaugeMetricFamily("safedefer_outbox_rows", "Rows of all outboxes, which wait to be relayed.", labels=())
    if reading is not None:
        for queue, one in sorted(reading.queues.items()):
            tasks.add_metric((queue, "waiting"), one.waiting)
            tasks.add_metric((queue, "running"), one.running)
            lag.add_metric((queue,), one.lag)
            dead.add_metric((queue,), one.dead)
        if reading.outbox_rows is not None:
            rows.add_metric((), reading.outbox_rows)
    yield from (tasks, lag, dead, rows)


def of_processes(ready: int, wanted: int) -> Iterator[Metric]:
    """Give the number of worker processes."""
    family = GaugeMetricFamily("safedefer_worker_processes", "Worker processes.", labels=("state",))
    family.add_metric(("ready",), ready)
    family.add_metric(("wanted",), wanted)
    yield family


def exposition(families: Callable[[], Iterator[Metric]]) -> bytes:
    """Return metrics in Prometheus's text format, from a registry of their own."""

    class Once(Collector):
        def describe(self) -> Iterator[Metric]:
            return iter(())

        def collect(self) -> Iterator[Metric]:
            return families()

    registry = CollectorRegistry()
    registry.register(Once())
    return generate_latest(registry)
