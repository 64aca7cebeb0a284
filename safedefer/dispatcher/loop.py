"""The dispatcher: leases due tasks, delivers them, settles what came of it.

It believes nothing but the handler's answer, and decodes nothing: a token goes from the queue to the
handler as the bytes that it is. Delivery is in process or by HTTP POST; either way it ends in
``Delivery.handle``, which verifies.

Three things go on at once: leases are taken, a little ahead of free places; tasks are delivered, as many
as there are places; and what has ended is settled, in batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

from safedefer.concurrency.threads import Threads
from safedefer.dispatcher.attempt import Courier
from safedefer.dispatcher.leases import Leases, name_of
from safedefer.dispatcher.request_headers import attempt_headers
from safedefer.dispatcher.retry_policy import asks_to_wait, judge
from safedefer.dispatcher.transport import Deliver, HttpDelivery, InProcessDelivery, Interrupted, Unreachable
from safedefer.errors import QueueError
from safedefer.queues.base import Lease, PullQueue, Settlement
from safedefer.queues.loop_calls import QueueCalls, ThreadedQueue, queue_calls
from safedefer.queues.rates import QueueLimits
from safedefer.queues.rules import (
    MAX_BACKOFF,
    MAX_DOUBLINGS,
    MIN_BACKOFF,
    REJECT_LIMIT,
    REJECT_SECONDS,
    backoff,
    give_back,
    gives_up,
    with_queues_options,
)

__all__ = [
    "MAX_BACKOFF",
    "MAX_DOUBLINGS",
    "MIN_BACKOFF",
    "REJECT_LIMIT",
    "REJECT_SECONDS",
    "Deliver",
    "Dispatcher",
    "DispatcherOptions",
    "HttpDelivery",
    "InProcessDelivery",
    "Interrupted",
    "Unreachable",
    "asks_to_wait",
    "attempt_headers",
    "backoff",
    "gives_up",
    "judge",
]

_T = TypeVar("_T")
_log: Final = logging.getLogger("safedefer.dispatcher")

#: Leasing, settling, prolonging, and what is asked now and then.
_THREADS: Final = 4
#: How far ahead of free places tasks are leased, in seconds of the work that was done of late.
_AHEAD_SECONDS: Final = 0.02
#: And in times that a lease took of late, so that there is work while the next one is under way.
_AHEAD_LEASES: Final = 3.0
#: But never more than so many times the places.
_AHEAD_PLACES: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatcherOptions:
    """How a dispatcher works."""

    concurrency: int = 16
    """Deliveries at once."""
    lease_seconds: float = 60.0
    """How long a silent dispatcher keeps a task; a live one prolongs it."""
    drain_seconds: float = 30.0
    """How long a stop waits for what is being delivered."""
    queues: Sequence[str] | None = None
    """The queues to empty; None is all."""
    poll_seconds: float = 5.0
    """The longest sleep between two looks at the queue."""
    limits: Sequence[QueueLimits] | None = None
    """Put in force at the start, for every dispatcher of the queue; None leaves them as they are."""
    retry_options: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By queue: what counts where a task brings nothing of its own."""


@dataclass(slots=True)
class _State:
    """What is under way, in one ``run``."""

    leases: Leases
    courier: Courier
    ended: deque[float]
    """When the last deliveries ended, as many as may run at once."""
    ready: deque[Lease] = field(default_factory=deque)
    """Leased ahead, and started when a place is free."""
    few: int = 0
    """With no more than so many of them it is time to lease."""
    deliveries: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """By the owner of the lease."""
    leasing: bool = False
    lease_took: float = 0.0
    """Seconds, of late."""
    dry: bool = False
    """Whether the last look at the queue found less than was asked for."""
    configured: bool = False
    """Whether the limits are in force."""

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not (self.ready or self.deliveries or self.leasing) and self.leases.idle


class Dispatcher:
    """Empties a queue.

    Args:
        queue: The queue.
        deliver: How a task gets to a handler.
        clock: Seconds since the epoch.
        options: How it works.
        rng: Where jitter comes from.
    """

    def __init__(
        self,
        queue: PullQueue,
        deliver: Deliver,
        *,
        clock: Callable[[], float],
        options: DispatcherOptions | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._queue = queue
        self._deliver = deliver
        self._clock = clock
        self._options = options or DispatcherOptions()
        self._random = rng or random.Random()  # noqa: S311  # jitter; a secret source costs a system call
        self._owner = secrets.token_hex(8)
        self._state = self._begin()
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._threads: Threads | None = None
        self._calls: QueueCalls = ThreadedQueue(queue, self._in_thread)

    def _begin(self) -> _State:
        options = self._options
        leases = Leases(
            self._queue,
            self._settle_many,
            self._in_thread,
            clock=self._clock,
            seconds=options.lease_seconds,
            patience=options.drain_seconds,
            makes_room=any(limits.max_concurrent is not None for limits in options.limits or ()),
        )
        courier = Courier(self._queue, self._deliver, self._in_thread, clock=self._clock, rng=self._random)
        return _State(leases, courier, deque(maxlen=options.concurrency))

    def stop(self) -> None:
        """Lease nothing more, finish what is being delivered, then return from ``run``."""
        self._stopping.set()
        self._changed.set()
        self._queue.wake()

    async def run(self) -> None:
        """Work until ``stop``. Storage that fails is tried again; nothing else ends it."""
        self._threads = Threads(_THREADS, "safedefer-dispatcher")
        async with queue_calls(self._queue, self._in_thread) as self._calls:
            await self._work()

    async def _work(self) -> None:
        leases = self._state.leases
        helpers = [asyncio.create_task(leases.keep_settling()), asyncio.create_task(leases.keep_extending())]
        try:
            while not self._stopping.is_set():
                try:
                    await self._configure()
                    if not await self._turn():
                        await self._rest()
                except Exception as error:  # noqa: BLE001  # the storage's, or of a row that somebody wrote into it
                    _log.error("the queue is unavailable (%s); trying again", name_of(error))
                    self._changed.clear()  # a place that is free does not help
                    if not self._stopping.is_set():
                        await self._sleep(1.0)
            await self._drain()
        finally:
            await self._end(helpers)

    async def _configure(self) -> None:
        limits = self._options.limits
        if limits is not None and not self._state.configured:
            await self._in_thread(partial(self._queue.configure, limits, now=self._clock()))
        self._state.configured = True

    async def run_until_empty(self) -> None:
        """Work until no task is due or being delivered: for tests and scripts. Later tasks stay."""
        watcher = asyncio.create_task(self._stop_when_empty())
        try:
            await self.run()
        finally:
            watcher.cancel()

    async def _stop_when_empty(self) -> None:
        while True:
            await asyncio.sleep(0.01)
            if not self._state.idle:
                continue
            try:
                due = await self._next_due()
            except QueueError:  # run() says so, and tries again
                continue
            if (due is None or due > self._clock()) and self._state.idle:
                self.stop()
                return

    # --- Leasing ---

    async def _turn(self) -> bool:
        """Lease and start what fits; whether there may be more."""
        wanted = self._wanted()
        if wanted <= 0:
            return False
        state = self._state
        state.leasing = True
        try:
            began = time.monotonic()
            leases = await self._calls.lease(
                owner=self._owner,
                limit=wanted,
                seconds=self._options.lease_seconds,
                now=self._clock(),
                queues=self._options.queues,
            )
            state.lease_took = (state.lease_took + time.monotonic() - began) / 2
            state.dry = len(leases) < wanted
            if self._options.retry_options:
                leases = [self._completed(lease) for lease in leases]
            state.leases.add(leases)
            state.ready.extend(leases)
        finally:
            state.leasing = False
        self._start()
        return not state.dry

    def _completed(self, lease: Lease) -> Lease:
        """Return a lease whose task has the retry options of its queue where it has none of its own."""
        queues_own = self._options.retry_options.get(lease.task.queue)
        return with_queues_options(lease, queues_own) if queues_own else lease

    def _wanted(self) -> int:
        """How many tasks to lease now: for the free places, and a little ahead where tasks are short."""
        state = self._state
        if state.courier.places and state.courier.places.pause(now=self._clock()) > 0:
            return 0
        free = self._options.concurrency - len(state.deliveries)
        ahead = 0 if state.dry else self._ahead()
        state.few = ahead // 2
        if state.ready or free <= 0:
            return 0 if len(state.ready) > state.few else ahead - len(state.ready)
        return free + ahead

    def _ahead(self) -> int:
        ended = self._state.ended
        if len(ended) < self._options.concurrency:
            return 0
        rate = len(ended) / max(time.monotonic() - ended[0], 1e-6)
        seconds = _AHEAD_SECONDS + _AHEAD_LEASES * self._state.lease_took
        return min(_AHEAD_PLACES * self._options.concurrency, int(rate * seconds))

    async def _rest(self) -> None:
        """Sleep until a place is free, a task falls due, or one is enqueued by whatever process."""
        self._changed.clear()
        state, now = self._state, self._clock()
        if state.courier.places and (pause := state.courier.places.pause(now=now)) > 0:
            await self._sleep(pause)
        elif state.ready or len(state.deliveries) >= self._options.concurrency:
            await self._sleep(self._options.poll_seconds)
        else:
            due = await self._next_due()
            poll = self._options.poll_seconds
            timeout = poll if due is None else min(max(due - now, 0.0), poll)
            if timeout > 0 and not self._stopping.is_set():
                await self._in_thread(partial(self._queue.wait, timeout))

    async def _next_due(self) -> float | None:
        return await self._in_thread(partial(self._queue.next_due, now=self._clock(), queues=self._options.queues))

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    # --- Delivering ---

    def _start(self) -> None:
        state, loop = self._state, asyncio.get_running_loop()
        while state.ready and len(state.deliveries) < self._options.concurrency and not self._stopping.is_set():
            lease = state.ready.popleft()
            state.deliveries[lease.owner] = loop.create_task(self._deliver_one(lease))

    async def _deliver_one(self, lease: Lease) -> None:
        try:
            self._state.leases.settle(lease, await self._state.courier.settlement(lease))
        except asyncio.CancelledError:
            # The drain is over. Whether it ran, and still runs, is for the ledger to say.
            self._state.leases.settle(lease, give_back(lease, now=self._clock()))
            raise
        finally:
            self._make_place(lease)

    def _make_place(self, lease: Lease) -> None:
        state = self._state
        state.deliveries.pop(lease.owner, None)
        state.ended.append(time.monotonic())
        self._start()
        if len(state.ready) <= state.few:
            self._changed.set()

    # --- The end ---

    async def _drain(self) -> None:
        self._give_back()
        deliveries = set(self._state.deliveries.values())
        if deliveries:
            await asyncio.wait(deliveries, timeout=self._options.drain_seconds)

    def _give_back(self) -> None:
        """Let others have what was leased ahead."""
        state = self._state
        while state.ready:
            lease = state.ready.popleft()
            state.leases.settle(lease, give_back(lease, now=self._clock()))

    async def _end(self, helpers: Sequence[asyncio.Task[None]]) -> None:
        self._queue.wake()  # whoever cancels run() leaves a thread that waits
        self._give_back()
        unfinished = set(self._state.deliveries.values())
        for task in (*unfinished, *helpers):
            task.cancel()
        await asyncio.gather(*unfinished, *helpers, return_exceptions=True)
        with contextlib.suppress(TimeoutError):  # leases run out by themselves
            async with asyncio.timeout(self._options.drain_seconds + 1.0):
                await self._state.leases.flush()
        if self._threads is not None:
            self._threads.close(wait=False)
        self._state = self._begin()
        self._stopping.clear()

    async def _settle_many(self, settlements: Sequence[tuple[Lease, Settlement]], *, now: float) -> Sequence[bool]:
        return await self._calls.settle_many(settlements, now=now)

    def _in_thread(self, call: Callable[[], _T], /) -> asyncio.Future[_T]:
        assert self._threads is not None  # run() makes them
        return self._threads(call)
