"""Health: whether a process lives, whether it can take tasks, and its metrics, as pages of text.

A page says constant sentences and numbers: no argument, key or token, and no text of an error.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, Protocol, TypeVar

from safedefer.concurrency.threads import Threads
from safedefer.errors import MissingExtra
from safedefer.observe.counts import Counts, Series, Sums
from safedefer.observe.store import StoreReading, read_store

if TYPE_CHECKING:
    from safedefer.observe.store import Outboxes
    from safedefer.queues.base import PullQueue

_T = TypeVar("_T")

_log: Final = logging.getLogger("safedefer")

#: Seconds without a look at the queue after which a dispatcher is not ready.
STALE_SECONDS: Final = 60.0
#: Seconds that a page waits for the store.
STORE_SECONDS: Final = 5.0
#: Seconds for which an answer of the store serves all who ask.
_KEEP_SECONDS: Final = 1.0
_PLAIN: Final = "text/plain; charset=utf-8"

STARTING: Final = "it has not begun to take tasks"
DRAINING: Final = "it is stopping, and takes no more tasks"
STORE: Final = "the store does not answer"
LEASING: Final = "the dispatcher has not looked at the queue for a minute"


class Page(NamedTuple):
    """What is answered to a request."""

    status: int
    text: bytes
    type: str = _PLAIN


class Pages(Protocol):
    """What a health server shows."""

    async def alive(self) -> Page:
        """``/healthz``: the process lives, and its event loop turns."""
        ...

    async def ready(self) -> Page:
        """``/readyz``: tasks are taken."""
        ...

    async def metrics(self) -> Page:
        """``/metrics``, in Prometheus's text format."""
        ...


ALIVE: Final = Page(200, b"alive\n")


def readiness(reasons: Sequence[str], note: str = "") -> Page:
    """Return the page ``/readyz``.

    Args:
        reasons: Why no task is taken; none: tasks are.
        note: A sentence more.
    """
    lines = [*(f"not ready: {reason}" for reason in reasons)] or ["ready"]
    text = "\n".join([*lines, *([note] if note else [])])
    return Page(503 if reasons else 200, f"{text}\n".encode())


def metrics_page(
    sums: Sums,
    gauges: Mapping[Series, float],
    reading: StoreReading | None,
    *,
    processes: tuple[int, int] | None = None,
) -> Page:
    """Return the page ``/metrics``: 404 if Prometheus's library is not installed.

    Args:
        sums: Counters and histograms of all processes.
        gauges: Gauges of them.
        reading: What the store said; None if it did not answer.
        processes: How many worker processes are ready, and how many there should be.
    """
    try:
        from safedefer.observe import metrics  # noqa: PLC0415  # only where the page is asked for
    except MissingExtra as error:
        return Page(404, f"{error}\n".encode())

    def families() -> metrics.Families:
        yield from metrics.of_events(sums, gauges)
        yield from metrics.of_store(reading)
        if processes is not None:
            yield from metrics.of_processes(*processes)

    return Page(200, metrics.exposition(families), metrics.CONTENT_TYPE)


class _Shared(Generic[_T]):
    """One call in a thread for all who ask at once; its answer is kept for a moment.

    So nobody who reaches the port makes the store work more than once a second, and a call that hangs is not made again.
    """

    def __init__(self, threads: Threads, call: Callable[[], _T]) -> None:
        self._threads = threads
        self._call = call
        self._asked: asyncio.Future[_T] | None = None
        self._at = 0.0

    async def __call__(self) -> _T:
        """Return the answer. Raises what the call raises, and ``TimeoutError``."""
        asked = self._asked
        if asked is None or (asked.done() and time.monotonic() - self._at > _KEEP_SECONDS):
            self._at = time.monotonic()
            asked = self._asked = self._threads(self._call)
        await asyncio.wait({asked}, timeout=STORE_SECONDS)
        if not asked.done():
            raise TimeoutError
        return asked.result()


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a process's health is of."""

    queue: Callable[[], PullQueue]
    outbox: Outboxes
    clock: Callable[[], float] = time.time
    """Seconds since the epoch."""


class Health:
    """The health of this process. Used in one event loop.

    Args:
        subject: The queue and the outboxes.
        counts: What counts its events.
    """

    def __init__(self, subject: Subject, counts: Counts) -> None:
        self.started = False
        """Whether it takes tasks, or did."""
        self.draining = False
        """Whether it was asked to stop."""
        self.leased_at: Callable[[], float | None] | None = None
        """Returns when the dispatcher looked at the queue last, in seconds of the monotonic clock; None: there is none."""
        self._subject = subject
        self._counts = counts
        self._began = time.monotonic()
        self._threads = Threads(2, "safedefer-health")
        self._ping: _Shared[bool] = _Shared(self._threads, self._ask_for_an_answer)
        self._read: _Shared[StoreReading] = _Shared(self._threads, self._ask_for_numbers)

    def _ask_for_an_answer(self) -> bool:
        self._subject.queue().next_due(now=self._subject.clock())
        return True

    def _ask_for_numbers(self) -> StoreReading:
        return read_store(self._subject.queue(), self._subject.outbox, now=self._subject.clock())

    async def reasons(self) -> list[str]:
        """Return why this process takes no tasks; nothing if it does."""
        found = []
        if not self.started:
            found.append(STARTING)
        if self.draining:
            found.append(DRAINING)
        if not await _answer(self._ping):
            found.append(STORE)
        if self.leased_at is not None:
            leased = self.leased_at()
            if time.monotonic() - (self._began if leased is None else leased) > STALE_SECONDS:
                found.append(LEASING)
        return found

    async def reading(self) -> StoreReading | None:
        """Return the store's numbers; None if it does not answer in time."""
        return await _answer(self._read)

    async def alive(self) -> Page:
        """Return the page ``/healthz``."""
        return ALIVE

    async def ready(self) -> Page:
        """Return the page ``/readyz``."""
        return readiness(await self.reasons())

    async def metrics(self) -> Page:
        """Return the page ``/metrics``."""
        reading = await self.reading()
        return await asyncio.to_thread(partial(metrics_page, self._counts.copy(), self._counts.gauges(), reading))

    def close(self) -> None:
        """Let go of the threads."""
        self._threads.close(wait=False, cancel=True)


async def _answer(shared: _Shared[_T]) -> _T | None:
    """Return what a shared call returns; None if the store does not answer."""
    try:
        return await shared()
    except Exception as error:  # noqa: BLE001  # of the storage, or of a row that somebody wrote into it
        _log.debug("the store does not answer a health check (%s)", type(error).__name__)
        return None
