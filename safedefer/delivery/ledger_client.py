"""Ledger client of the handler: batches begin and finish calls, and extends the leases of running tasks.

No task runs before the ledger admitted it, and no answer goes out before the ledger has its end.
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

#: Seconds between two tries to write down how a run ended.
_STORE_AGAIN: Final = 0.25
#: Beats in the length of a lease: a run is extended at every second one.
_BEATS: Final = 6


class LedgerClient:
    """The ledger, as the handlers of one process use it.

    Args:
        ledger: The ledger.
        in_thread: How it is called.
        clock: Seconds since the epoch.
        seconds: How long the ledger believes in a silent run.
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
        """Ask to run."""
        self.end: Batches[RunEnd, bool] = Batches(self._end_many, orphaned=self._orphaned)
        """Write down how a run ended; as ``finish``, but tried once."""
        self.renewal = RunRenewal(ledger, in_thread, clock=clock, seconds=seconds)

    def owner(self) -> str:
        """Return a name that no other run has."""
        # With the process: a forked one has the same name and numbers.
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
        # The loop may be taken down, and cancels whatever it has: a thread goes on, and finish is idempotent.
        ending.add_done_callback(lambda done: in_thread() if done.cancelled() else None)
        return ending

    async def record(self, record: AttemptRecord) -> None:
        """Write down an attempt that never came to run."""
        await self._in_thread(partial(self._ledger().record_many, (record,)))

    async def finish(self, end: RunEnd) -> None:
        """Write down how a run ended: also if the caller is cancelled meanwhile, and again if the storage fails.

        Raises:
            QueueUnavailable: It failed for as long as nobody else may run the task.
        """
        try:
            await self.end(end)  # what is cancelled here is written all the same
        except QueueUnavailable as error:
            await asyncio.shield(self._finish_late(end, error))

    async def _finish_late(self, end: RunEnd, error: BaseException) -> None:
        """Try again: the disk is full, say. Late is better than run again, as long as nobody else may run it."""
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
        """Go on where the caller has hung up, and the end of its run was not written down."""
        late = asyncio.get_running_loop().create_task(self._finish_late(end, error))
        self._late.add(late)
        late.add_done_callback(self._late.discard)
        late.add_done_callback(_forget)


def _forget(task: asyncio.Task[None]) -> None:
    """Take notice of how a task ended, which nobody else does."""
    if not task.cancelled():
        task.exception()


class RunRenewal:
    """Extends the ledger's leases of running tasks, all with one timer.

    Most runs end before the first beat, and cost two entries in a dictionary.

    Args:
        ledger: Where the leases are extended.
        in_thread: How it is called.
        clock: Seconds since the epoch.
        seconds: How long the ledger believes in a silent run.
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
        """By owner, with the beat of its admission or last extension."""
        self._beat = 0
        self._timer: asyncio.TimerHandle | None = None
        self._beating: asyncio.Task[None] | None = None

    def add(self, execution: Execution) -> None:
        """Extend the lease of a run from now on; within a running loop."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # a new event loop: drop the state of the old one
            self._loop = loop
            self._forget()
        self._runs[execution.owner] = execution, self._beat
        if self._timer is None:
            self._timer = loop.call_later(self._seconds / _BEATS, self._tick, loop)

    def remove(self, execution: Execution) -> None:
        """Stop extending it."""
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
            self._beating = loop.create_task(self._prolong(due))

    async def _prolong(self, due: list[Execution]) -> None:
        def extend() -> None:
            with contextlib.suppress(QueueUnavailable):  # tried again at the next turn
                self._ledger().extend_many(due, now=self._clock(), lease=self._seconds)

        await self._in_thread(extend)
