"""The dispatcher: leases due tasks, delivers each to its handler, and settles it by the handler's answer.

The dispatcher decodes nothing: it hands the bytes of a token from the queue to the handler, in this process
or by HTTP POST. Either way they end in ``Delivery.handle``, which verifies them.

Three activities run at once: the loop leases tasks, some ahead of free slots; each slot delivers one task; and
ended deliveries are settled in batches.

A task that may have ended processes (``rules.must_be_alone``) is a *suspect*. It waits until all that was leased with it
has ended, runs alone, and nothing else is leased or begun meanwhile: else its neighbours would be lost with it, time
after time.

Over 450 lines, since the three activities share the state of one run.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

from safedefer.concurrency.beat import HANG_SECONDS
from safedefer.concurrency.threads import Threads
from safedefer.dispatcher.attempt import AttemptRunner
from safedefer.dispatcher.leases import Leases
from safedefer.dispatcher.prefetch import Prefetch
from safedefer.dispatcher.reports import Reports
from safedefer.dispatcher.request_headers import attempt_headers
from safedefer.dispatcher.retry_policy import asks_to_wait, judge
from safedefer.dispatcher.shares import ANSWERS_SECONDS
from safedefer.dispatcher.transport import Deliver, HttpDelivery, InProcessDelivery, Interrupted, Unreachable
from safedefer.errors import ConfigurationError, QueueError
from safedefer.events import LogObserver, Observer
from safedefer.queues.base import DispatchedQueue, Lease, LeaseCalls, Settlement
from safedefer.queues.loop_calls import ThreadedLeasing, lease_calls
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

#: For leasing, settling, extending, and occasional calls.
_THREADS: Final = 4
#: The longest wait for deliveries to begin before the queue is looked at again: both need the interpreter.
_BEGIN_SECONDS: Final = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatcherOptions:
    """Options of a dispatcher."""

    concurrency: int = 16
    """The slots: the most deliveries at once."""
    lease_seconds: float = 60.0
    """Seconds after which a lease expires unless it is extended; a live dispatcher extends it."""
    hang_seconds: float = HANG_SECONDS
    """Seconds without a turn of the event loop after which no lease is extended."""
    drain_seconds: float = 30.0
    """The longest wait for deliveries under way after ``stop``."""
    queues: Sequence[str] | None = None
    """The queues to lease from; None is all."""
    poll_seconds: float = 5.0
    """The longest sleep between two lease calls."""
    limits: Sequence[QueueLimits] | None = None
    """Limits to store at the start, for every dispatcher of the queue; None leaves the stored ones as they are."""
    retry_options: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Retry options by queue, for tasks without options of their own."""
    owner: str | None = None
    """The owner of all leases, unique among dispatchers; None makes one."""
    dead_owners: Sequence[str] = ()
    """Owners of dispatchers whose processes have ended: what they had leased, and not begun, is leased again at once."""


@dataclass(slots=True)
class _RunState:
    """The state of one ``run``."""

    leases: Leases
    attempts: AttemptRunner
    prefetch: Prefetch
    deliveries: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """Deliveries under way, by the owner of the lease."""
    storing: set[str] = field(default_factory=set)
    """Those of them whose task's code has ended: they hold no slot while its end is stored."""
    suspect: Lease | None = None
    """A task that waits until nothing else runs, or runs alone now."""
    leasing: bool = False
    """Whether a lease call is under way."""
    configured: bool = False
    """Whether the limits are stored, and the leases of dead dispatchers released."""

    @property
    def slots(self) -> int:
        """The slots that are taken."""
        return len(self.deliveries) - len(self.storing)

    @property
    def idle(self) -> bool:
        """Whether no task is leased, and no lease call is under way."""
        busy = self.prefetch.ready or self.deliveries or self.leasing or self.suspect is not None
        return not busy and self.leases.idle


class Dispatcher:
    """Leases the due tasks of a queue and delivers them to handlers.

    Args:
        queue: The queue.
        deliver: The transport.
        clock: Returns seconds since the epoch.
        options: Concurrency, times and limits.
        rng: The source of jitter.
        observer: Told of tasks that are put off or given up, of handlers that are down, and of a queue that fails; logs
            by default.
    """

    def __init__(
        self,
        queue: DispatchedQueue,
        deliver: Deliver,
        *,
        clock: Callable[[], float],
        options: DispatcherOptions | None = None,
        rng: random.Random | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._reports = Reports(LogObserver() if observer is None else observer, clock=clock)
        self._queue = queue
        self._deliver = deliver
        self._clock = clock
        self._options = options or DispatcherOptions()
        self._random = rng or random.Random()  # noqa: S311  # jitter; a secret source costs a system call
        self._owner = self._options.owner or secrets.token_hex(8)
        self._state = self._begin()
        self.leased_at: float | None = None
        """When the queue answered last, or needed no question, in seconds of the monotonic clock."""
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._threads: Threads | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: LeaseCalls = ThreadedLeasing(queue, self._in_thread)

    def _begin(self) -> _RunState:
        options = self._options
        leases = Leases(
            self._queue,
            self._settle_many,
            clock=self._clock,
            seconds=options.lease_seconds,
            patience=options.drain_seconds,
            makes_room=any(limits.max_concurrent is not None for limits in options.limits or ()),
            hang_seconds=options.hang_seconds,
            reports=self._reports,
        )
        attempts = AttemptRunner(
            self._queue,
            self._deliver,
            self._in_thread,
            clock=self._clock,
            rng=self._random,
            slots=options.concurrency,
            retry_options=options.retry_options,
            reports=self._reports,
        )
        return _RunState(leases, attempts, Prefetch(options.concurrency))

    @property
    def delivering(self) -> int:
        """The number of deliveries under way."""
        return len(self._state.deliveries)

    def stop(self) -> None:
        """Lease no more tasks, finish the deliveries under way, then return from ``run``."""
        self._stopping.set()
        self._changed.set()
        self._queue.wake()

    async def run(self) -> None:
        """Lease and deliver until ``stop``. After an error of the storage, try again.

        Raises:
            ConfigurationError: The queue cannot be used as it is, such as a database without tables.
        """
        self._threads = Threads(_THREADS, "safedefer-dispatcher")
        self._loop = asyncio.get_running_loop()
        async with lease_calls(self._queue, self._in_thread) as self._calls:
            await self._work()

    async def _work(self) -> None:
        leases = self._state.leases
        helpers = [asyncio.create_task(leases.keep_settling()), asyncio.create_task(leases.keep_extending())]
        try:
            while not self._stopping.is_set():
                try:
                    await self._configure()
                    more = await self._turn()
                    self.leased_at = time.monotonic()
                    if not more:
                        await self._rest()
                except ConfigurationError:  # tables are missing, or of another version: no later turn can succeed
                    await self._drain()
                    raise
                except Exception as error:  # noqa: BLE001  # of the storage, or of a row that an attacker wrote into it
                    self._reports.failed("leasing", error)
                    self._changed.clear()  # a slot that becomes free must not end the sleep
                    if not self._stopping.is_set():
                        await self._sleep(1.0)
            await self._drain()
        finally:
            await self._end(helpers)

    async def _configure(self) -> None:
        if self._state.configured:
            return
        limits, dead = self._options.limits, self._options.dead_owners
        if limits is not None:
            await self._in_thread(partial(self._queue.configure, limits, now=self._clock()))
        if dead:
            await self._in_thread(partial(self._queue.release, dead, now=self._clock()))
        self._state.configured = True

    async def run_until_empty(self) -> None:
        """Work until no task is due or under way, for tests and scripts. Tasks due later stay queued."""
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
            except QueueError:  # run() logs it, and tries again
                continue
            if (due is None or due > self._clock()) and self._state.idle:
                self.stop()
                return

    # --- Leasing ---

    async def _turn(self) -> bool:
        """Lease tasks and start their deliveries. Return whether the queue may have more tasks due."""
        state = self._state
        if state.attempts.targets and state.attempts.targets.pause(now=self._clock()) > 0:
            return False
        self._start()  # a target that had no room may have some, or has been silent for long enough
        wanted = state.prefetch.wanted(state.slots - self._extra)
        if wanted <= 0 or state.suspect is not None:
            return False
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
            took = time.monotonic() - began
            self._reports.worked("leasing")
            state.leases.add(leases)
            more = state.prefetch.leased(leases, wanted=wanted, seconds=took)
            self._set_suspect_aside()
        finally:
            state.leasing = False
        self._start()
        return more and state.suspect is None

    def _set_suspect_aside(self) -> None:
        """Keep one of the leased tasks that must run alone, and give the others back: another process may take them."""
        for lease in self._state.prefetch.take_suspects():
            if self._state.suspect is None:
                self._state.suspect = lease
            else:
                self._state.leases.settle(lease, give_back(lease, now=self._clock()))

    async def _rest(self) -> None:
        """Sleep until a slot is free, a task falls due, or any process enqueues one."""
        self._changed.clear()
        state, now = self._state, self._clock()
        if state.attempts.targets and (pause := state.attempts.targets.pause(now=now)) > 0:
            await self._sleep(pause)
        elif state.slots >= self._options.concurrency + self._extra or state.suspect is not None:
            poll = self._options.poll_seconds  # a target may turn out to hang, which makes room for another one
            await self._sleep(min(poll, ANSWERS_SECONDS) if self._deliver.several else poll)
        elif state.prefetch.ready:  # their targets have no room
            await self._sleep(min(self._options.poll_seconds, ANSWERS_SECONDS))
        else:
            if state.deliveries:
                await self._sleep(_BEGIN_SECONDS)
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
        state = self._state
        ready = state.prefetch.ready
        waiting: list[Lease] = []
        while ready and state.slots < self._options.concurrency + self._extra and not self._stopping.is_set():
            self._start_one(ready.popleft(), waiting)
        ready.extendleft(reversed(waiting))
        suspect = state.suspect
        if suspect is not None and not ready and not state.deliveries and not self._stopping.is_set():
            self._start_one(suspect, waiting)
            if suspect.owner not in state.deliveries and not waiting:  # it was postponed
                self._end_suspect()

    @property
    def _extra(self) -> int:
        """The slots beyond ``concurrency``: one for each target that hangs."""
        return self._state.attempts.shares.hung if self._deliver.several else 0

    def _start_one(self, lease: Lease, waiting: list[Lease]) -> None:
        if self._deliver.several and not self._has_room(lease, waiting):
            return
        assert self._loop is not None  # run() notes it
        delivery = self._loop.create_task(self._deliver_one(lease))
        self._state.deliveries[lease.owner] = delivery

    def _end_suspect(self) -> None:
        self._state.suspect = None
        self._changed.set()

    def _has_room(self, lease: Lease, waiting: list[Lease]) -> bool:
        """Take a slot for the target of a task. Without room, the task is postponed if the target is silent, else waits."""
        shares, address = self._state.attempts.shares, self._deliver.address(lease.task)
        if shares.has_room(address):
            shares.begin(address)
            return True
        settlement = shares.postpone(address, now=self._clock())
        if settlement is None:
            waiting.append(lease)
        else:
            self._state.leases.settle(lease, settlement)
        return False

    async def _deliver_one(self, lease: Lease) -> None:
        settlement: Settlement | None = None
        try:
            settlement = await self._state.attempts.run(lease, partial(self._ran, lease))
        finally:
            self._free_slot(lease)
            # Without one it was cancelled: the drain is over. The ledger knows whether the task ran, and still runs.
            self._state.leases.settle(lease, give_back(lease, now=self._clock()) if settlement is None else settlement)

    def _ran(self, lease: Lease) -> None:
        """Free the slot of a task whose code has ended, before its end is stored."""
        if self._state.suspect is not lease:
            self._state.storing.add(lease.owner)
            self._slot_is_free()

    def _free_slot(self, lease: Lease) -> None:
        state = self._state
        state.deliveries.pop(lease.owner, None)
        if state.suspect is lease:
            self._end_suspect()
        if self._deliver.several:
            state.attempts.shares.end(self._deliver.address(lease.task))
        if lease.owner in state.storing:
            state.storing.discard(lease.owner)
            if not state.deliveries:
                self._start()  # a suspect waits for the last one
        else:
            self._slot_is_free()

    def _slot_is_free(self) -> None:
        state = self._state
        state.prefetch.delivered()
        self._start()
        if state.prefetch.is_low:
            self._changed.set()

    # --- The end ---

    async def _drain(self) -> None:
        self._give_back()
        deliveries = set(self._state.deliveries.values())
        if deliveries:
            await asyncio.wait(deliveries, timeout=self._options.drain_seconds)

    def _give_back(self) -> None:
        """Give back the leases that wait for a slot: other dispatchers may take those tasks."""
        state = self._state
        suspect, state.suspect = state.suspect, None
        if suspect is not None and suspect.owner not in state.deliveries:
            state.prefetch.ready.append(suspect)
        while state.prefetch.ready:
            lease = state.prefetch.ready.popleft()
            state.leases.settle(lease, give_back(lease, now=self._clock()))

    async def _end(self, helpers: Sequence[asyncio.Task[None]]) -> None:
        self._queue.wake()  # after a cancellation of run() a thread may still wait
        self._give_back()
        unfinished = set(self._state.deliveries.values())
        for task in (*unfinished, *helpers):
            task.cancel()
        await asyncio.gather(*unfinished, *helpers, return_exceptions=True)
        with contextlib.suppress(TimeoutError):  # leases that are not settled expire
            async with asyncio.timeout(self._options.drain_seconds + 1.0):
                await self._state.leases.flush()
        if self._threads is not None:
            self._threads.close(wait=False)
        self._state = self._begin()
        # The next run may be in another event loop.
        self._stopping, self._changed = asyncio.Event(), asyncio.Event()

    async def _settle_many(self, settlements: Sequence[tuple[Lease, Settlement]], *, now: float) -> Sequence[bool]:
        return await self._calls.settle_many(settlements, now=now)

    def _in_thread(self, call: Callable[[], _T], /) -> asyncio.Future[_T]:
        assert self._threads is not None  # run() makes them
        return self._threads(call)
