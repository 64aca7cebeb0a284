"""Ledger client of the handler: batches begin and finish calls, and extends the leases of running tasks.

No task runs before the ledger has admitted it, and no answer goes out before the ledger has stored its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from safedefer.concurrency.batches import Batches
from safedefer.concurrency.threads import InThread
from safedefer.errors import QueueUnavailable
from safedefer.ledger import Admission, AttemptRecord, Execution, Ledger, RunEnd

#: Seconds between two tries to store the end of a run.
_STORE_AGAIN: Final = 0.25
#: Beats in the length of a lease. A run is extended at every second beat.
_BEATS: Final = 6


class LedgerClient:
    """The ledger, as the handlers of one process use it.

    Args:
        ledger: Returns the ledger.
        in_thread: Calls it in a thread.
        clock: Returns seconds since the epoch.
        seconds: The length of a run's lease. The ledger takes a run for dead when its lease expires.
    """

    def __init__(
        self, ledger: Callable[[], Ledger], in_thread: InThread, *, clock: Callable[[], float], seconds: float
    ) -> None:
        self._ledger = ledger
        self._in_thread = in_thread
        self._clock = clock
        self._seconds = seconds
        self._name = secrets.token_hex(8)
        self._numbers = itertools.count()
        self._late: set[asyncio.Task[None]] = set()
        self.begin: Batches[Execution, Admission] = Batches(self._begin_many)
        """Ask the ledger to admit a run."""
        self.end: Batches[RunEnd, bool] = Batches(self._end_many, orphaned=self._orphaned)
        """Store the end of a run; as ``finish``, but with one try."""
        self.renewal = RunRenewal(ledger, in_thread, clock=clock, seconds=seconds)

    def owner(self) -> str:
        """Return a new owner, unique among all runs."""
        # With the id of the process: a forked child has the same name and numbers.
        return f"{self._name}-{os.getpid()}-{next(self._numbers)}"

    def _begin_many(self, executions: list[Execution], _gone: bool) -> asyncio.Future[Sequence[Admission]]:
        ledger = self._ledger()
        here, now = ledger.here, self._clock()
        if here is not None:
            return asyncio.ensure_future(here.begin_many(executions, now=now, lease=self._seconds))
        return self._in_thread(partial(ledger.begin_many, executions, now=now, lease=self._seconds))

    def _end_many(self, ends: list[RunEnd], gone: bool) -> asyncio.Future[Sequence[bool]]:
        ledger = self._ledger()
        here = ledger.here
        in_thread = partial(self._in_thread, partial(ledger.finish_many, ends))
        if here is None or gone:
            return in_thread()
        ending = asyncio.ensure_future(here.finish_many(ends))
        # A loop that is closed cancels its futures. A thread then stores the ends again: finish is idempotent.
        ending.add_done_callback(lambda done: in_thread() if done.cancelled() else None)
        return ending

    async def record(self, record: AttemptRecord) -> None:
        """Store the record of an attempt that ended before the run began."""
        await self._in_thread(partial(self._ledger().record_many, (record,)))

    async def finish(self, end: RunEnd) -> None:
        """Store the end of a run, also if the caller is cancelled meanwhile; try again if the storage fails.

        Raises:
            QueueUnavailable: The storage failed until the run's lease expired.
        """
        try:
            await self.end(end)  # cancelled here, the end is stored all the same
        except QueueUnavailable as error:
            await asyncio.shield(self._finish_late(end, error))

    async def _finish_late(self, end: RunEnd, error: BaseException) -> None:
        """Try again (a full disk gets room) until the lease expires: before that no other handler may run the task."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._seconds
        while isinstance(error, QueueUnavailable) and loop.time() + _STORE_AGAIN <= deadline:
            await asyncio.sleep(_STORE_AGAIN)
            try:
                await self.end(end)
            except QueueUnavailable as again:
                error = again
            else:
                return
        raise error

    def _orphaned(self, end: RunEnd, error: BaseException) -> None:
        """Go on storing the end of a run whose caller was cancelled before the end was stored."""
        late = asyncio.get_running_loop().create_task(self._finish_late(end, error))
        self._late.add(late)
        late.add_done_callback(self._late.discard)
        late.add_done_callback(_forget)


def _forget(task: asyncio.Task[None]) -> None:
    """Retrieve the exception of a task that is not awaited; else asyncio logs it."""
    if not task.cancelled():
        task.exception()


class RunRenewal:
    """Extends the ledger's leases of running tasks, all with one timer.

    Most runs end before the first beat; they cost one entry in a dictionary, and its removal.

    Args:
        ledger: Returns the ledger.
        in_thread: Calls it in a thread.
        clock: Returns seconds since the epoch.
        seconds: The length of a run's lease.
    """

    def __init__(
        self, ledger: Callable[[], Ledger], in_thread: InThread, *, clock: Callable[[], float], seconds: float
    ) -> None:
        self._ledger = ledger
        self._in_thread = in_thread
        self._clock = clock
        self._seconds = seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forget()

    def _forget(self) -> None:
        self._runs: dict[str, tuple[Execution, int]] = {}
        """Runs by owner, each with the beat of its admission or last extension."""
        self._beat = 0
        self._timer: asyncio.TimerHandle | None = None
        self._beating: asyncio.Task[None] | None = None

    def add(self, execution: Execution) -> None:
        """Extend the lease of a run from now on. Call it in a running event loop."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # a new event loop: drop the state of the old one
            self._loop = loop
            self._forget()
        self._runs[execution.owner] = execution, self._beat
        if self._timer is None:
            self._timer = loop.call_later(self._seconds / _BEATS, self._tick, loop)

    def remove(self, execution: Execution) -> None:
        """Stop extending the lease of a run."""
        self._runs.pop(execution.owner, None)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._runs:
            self._timer = None
            return
        self._timer = loop.call_later(self._seconds / _BEATS, self._tick, loop)
        self._beat += 1
        due = [execution for execution, beat in self._runs.values() if self._beat - beat > 1]
        if due and (self._beating is None or self._beating.done()):
            self._runs.update((execution.owner, (execution, self._beat)) for execution in due)
            self._beating = loop.create_task(self._extend(due))

    async def _extend(self, due: list[Execution]) -> None:
        def extend() -> None:
            with contextlib.suppress(QueueUnavailable):  # the next beat tries again
                self._ledger().extend_many(due, now=self._clock(), lease=self._seconds)

        await self._in_thread(extend)
