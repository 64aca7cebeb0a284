"""Ledger client of the handler: batches begin and finish calls, and extends the leases of running tasks.

No task runs before the ledger has admitted it, and no answer goes out before the ledger has stored its end.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import secrets
import time
from collections.abc import Callable, Container, Coroutine, Sequence
from functools import partial
from typing import Any, Final

from safedefer.concurrency.batches import Batches
from safedefer.concurrency.beat import HANG_SECONDS, Beat
from safedefer.concurrency.threads import InThread
from safedefer.errors import QueueUnavailable
from safedefer.ledger import Admission, AttemptRecord, EndState, Execution, Ledger, RunEnd

_log: Final = logging.getLogger("safedefer")

#: Seconds between two tries to store the end of a run.
_STORE_AGAIN: Final = 0.25
#: Seconds between two looks for tasks that were cancelled while they run.
_LOOK_SECONDS: Final = 1.0
#: Beats in the length of a lease. A run is extended at every second beat.
_BEATS: Final = 6


class LedgerClient:
    """The ledger, as the handlers of one process use it.

    Args:
        ledger: Returns the ledger.
        in_thread: Calls it in a thread.
        clock: Returns seconds since the epoch.
        seconds: The length of a run's lease. The ledger takes a run for dead when its lease expires.
        cancel: Called with the id of a task that was cancelled while it runs, from a thread.
    """

    def __init__(
        self,
        ledger: Callable[[], Ledger],
        in_thread: InThread,
        *,
        clock: Callable[[], float],
        seconds: float,
        cancel: Callable[[str], None],
    ) -> None:
        self._ledger = ledger
        self._in_thread = in_thread
        self._clock = clock
        self._seconds = seconds
        self._name = secrets.token_hex(8)
        self._numbers = itertools.count()
        self._late: set[asyncio.Task[None]] = set()
        self.begin: Batches[Execution, Admission] = Batches(self._begin_many, unclaimed=self.give_back)
        """Ask the ledger to admit a run."""
        self.end: Batches[RunEnd, bool] = Batches(self._end_many, orphaned=self._orphaned)
        """Store the end of a run; as ``finish``, but with one try."""
        self.renewal: RunRenewal = RunRenewal(ledger, clock=clock, seconds=seconds, cancel=cancel)

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

    async def finish(self, end: RunEnd, *, patient: bool = False) -> None:
        """Store the end of a run, also if the caller is cancelled meanwhile; try again if the storage fails.

        ``patient``: nothing waits for it, and it may be stored some milliseconds later together with others.

        Raises:
            QueueUnavailable: The storage failed until the run's lease expired.
        """
        try:
            await self.end(end, patient=patient)  # cancelled here, the end is stored all the same
        except QueueUnavailable as error:
            await asyncio.shield(self._finish_late(end, error))
        except asyncio.CancelledError:
            self.end.hurry()
            raise

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

    def finish_in_thread(self, end: RunEnd) -> None:
        """Store the end of a run whose event loop is closed, from the thread of the run; try again as ``finish`` does.

        Raises:
            QueueUnavailable: The storage failed until the run's lease expired.
        """
        deadline = time.monotonic() + self._seconds
        while True:
            try:
                self._ledger().finish_many([end])
            except QueueUnavailable:
                if time.monotonic() + _STORE_AGAIN > deadline:
                    raise
                time.sleep(_STORE_AGAIN)
            else:
                return

    def give_back(self, execution: Execution, admission: Admission | None) -> None:
        """End a run that was admitted after its caller was cancelled: else no other may begin until its lease expires."""
        if admission is Admission.RUN:
            now = self._clock()
            # As a rejected one it is not charged: none of the task's own code ran.
            record = AttemptRecord(execution.task_id, execution.audience, now, now, "rejected", None, "cancelled")
            self._store_late(self.finish((execution, EndState.RETRY, record)))

    def _orphaned(self, end: RunEnd, error: BaseException) -> None:
        """Go on storing the end of a run whose caller was cancelled before the end was stored."""
        self._store_late(self._finish_late(end, error))

    def _store_late(self, storing: Coroutine[Any, Any, None]) -> None:
        late = asyncio.get_running_loop().create_task(storing)
        self._late.add(late)
        late.add_done_callback(self._late.discard)
        late.add_done_callback(_forget)


def _forget(task: asyncio.Task[None]) -> None:
    """Retrieve the exception of a task that is not awaited; else asyncio logs it."""
    if not task.cancelled():
        task.exception()


class RunRenewal:
    """Extends the ledger's leases of running tasks, from a thread of its own.

    Most runs end before the first beat; they cost one entry in a dictionary, and its removal.

    Args:
        ledger: Returns the ledger.
        clock: Returns seconds since the epoch.
        seconds: The length of a run's lease.
        cancel: Called with the id of a task that was cancelled while it runs, from a thread.
        hang_seconds: Seconds without a turn of the event loop after which no lease is extended.
    """

    def __init__(
        self,
        ledger: Callable[[], Ledger],
        *,
        clock: Callable[[], float],
        seconds: float,
        cancel: Callable[[str], None],
        hang_seconds: float = HANG_SECONDS,
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._seconds = seconds
        self._cancel = cancel
        self._looked_at: set[str] = set()
        """Owners of the runs that the last look found."""
        self.looks: Beat = Beat(
            self._look, first=_LOOK_SECONDS, name="safedefer-cancels", hang_seconds=hang_seconds, log=False
        )
        self.beat: Beat = Beat(self._tick, first=seconds / _BEATS, name="safedefer-runs", hang_seconds=hang_seconds)
        self._runs: dict[str, _Extended] = {}
        """Runs by owner."""
        self._count = 0

    def add(self, execution: Execution) -> None:
        """Extend the lease of a run from now on. Call it in a running event loop."""
        loop = asyncio.get_running_loop()  # once: it asks the system for the process, before Python 3.12
        self.beat.start(loop)
        self.looks.start(loop)
        self._runs[execution.owner] = _Extended(execution, self._count, loop)

    def detach(self, execution: Execution) -> None:
        """Go on extending the lease of a run in a thread whose event loop is being closed, until ``remove``."""
        run = self._runs.get(execution.owner)
        if run is not None:
            run.loop = None
            self.beat.hold()

    def remove(self, execution: Execution) -> None:
        """Stop extending the lease of a run."""
        run = self._runs.pop(execution.owner, None)
        if run is not None and run.loop is None:
            self.beat.release()

    def close(self) -> None:
        """Extend no more."""
        self._runs.clear()
        self.beat.stop()
        self.looks.stop()

    def _look(self, _turning: Container[asyncio.AbstractEventLoop]) -> float:
        """Ask, in the thread, which runs were cancelled of those that the last look found too."""
        runs = self._runs.copy()
        lasting = [run.execution for owner, run in runs.items() if owner in self._looked_at]
        self._looked_at = set(runs)
        if lasting:
            try:
                cancelled = self._ledger().cancelled_many(lasting)
            except Exception as error:  # noqa: BLE001  # after any error the next look tries again
                _log.error("the ledger cannot be asked for cancelled tasks (%s)", type(error).__name__)
                cancelled = ()
            for execution, is_cancelled in zip(lasting, cancelled, strict=False):
                if is_cancelled:
                    self._cancel(execution.task_id)
        return _LOOK_SECONDS

    def _tick(self, turning: Container[asyncio.AbstractEventLoop]) -> float:
        """Extend, in the thread, what has lasted for two beats and whose event loop turns."""
        self._count += 1
        due = []
        # The copy is made at once; event loops add and remove meanwhile.
        for run in self._runs.copy().values():
            loop = run.loop
            if loop is not None and loop.is_closed():
                self._runs.pop(run.execution.owner, None)
            elif self._count - run.beat > 1 and (loop is None or loop in turning):
                due.append(run)
        if due:
            for run in due:
                run.beat = self._count
            try:
                self._ledger().extend_many([run.execution for run in due], now=self._clock(), lease=self._seconds)
            except Exception as error:  # noqa: BLE001  # after any error the next beats try again
                _log.error("runs cannot be extended (%s)", type(error).__name__)
        return self._seconds / _BEATS


class _Extended:
    """A run, with the beat of its admission or last extension, and its event loop; None where a thread outlasts it."""

    __slots__ = ("beat", "execution", "loop")

    def __init__(self, execution: Execution, beat: int, loop: asyncio.AbstractEventLoop) -> None:
        self.execution = execution
        self.beat = beat
        self.loop: asyncio.AbstractEventLoop | None = loop
