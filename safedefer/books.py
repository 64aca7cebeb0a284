"""The handler's books: what begins and what ends is entered in the ledger, in batches, and kept alive between.

Nothing runs that was not entered, and no answer goes out before the end is.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from safedefer.batches import Batches
from safedefer.errors import QueueUnavailable
from safedefer.keeper import Keeper
from safedefer.ledger import Admission, AttemptRecord, Execution, Ledger, RunEnd
from safedefer.queues.calls import ledger_here
from safedefer.threads import InThread

#: Seconds between two tries to write down how a run ended.
_STORE_AGAIN: Final = 0.25


class Books:
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
        self.keeper = Keeper(ledger, in_thread, clock=clock, seconds=seconds)

    def owner(self) -> str:
        """Return a name that no other run has."""
        # With the process: a forked one has the same name and numbers.
        return f"{self._name}-{os.getpid()}-{next(self._numbers)}"

    def _begin_many(self, executions: list[Execution], _gone: bool) -> asyncio.Future[Sequence[Admission]]:
        ledger = self._ledger()
        here, now = ledger_here(ledger), self._clock()
        if here is not None:
            return asyncio.ensure_future(here.begin_many(executions, now=now, lease=self._seconds))
        return self._in_thread(partial(ledger.begin_many, executions, now=now, lease=self._seconds))

    def _end_many(self, ends: list[RunEnd], gone: bool) -> asyncio.Future[Sequence[bool]]:
        ledger = self._ledger()
        here = ledger_here(ledger)
        in_thread = partial(self._in_thread, partial(ledger.finish_many, ends))
        if here is None or gone:
            return in_thread()
        ending = asyncio.ensure_future(here.finish_many(ends))
        # The loop may be taken down, and cancels whatever it has: a thread goes on, and told twice is told once.
        ending.add_done_callback(lambda done: in_thread() if done.cancelled() else None)
        return ending

    async def record(self, record: AttemptRecord) -> None:
        """Write down an attempt that never came to run."""
        await self._in_thread(partial(self._ledger().record, record))

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
