"""The leases of a dispatcher: extended while deliveries are under way, and settled in batches.

One call settles, in one transaction, all deliveries that ended while the call before it was under way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Final, Protocol, TypeAlias

from safedefer.concurrency.beat import Beat
from safedefer.dispatcher.reports import Reports
from safedefer.queues.base import Lease, Leasing, Settlement, Verdict

_log: Final = logging.getLogger("safedefer.dispatcher")

#: Seconds between two tries to settle.
_SETTLE_AGAIN: Final = 0.5
#: Seconds from the begin of one settle call to the next: what ends meanwhile is settled together. Nothing waits for it, but
#: for a queue with a cap.
_GATHER_SECONDS: Final = 0.005
#: The most seconds between two tries to extend after an error.
_EXTEND_AGAIN: Final = 1.0

_Settled: TypeAlias = tuple[Lease, Settlement]


class SettleMany(Protocol):
    """``Leasing.settle_many``, awaited."""

    async def __call__(self, settlements: Sequence[_Settled], /, *, now: float) -> Sequence[bool]:
        """Settle tasks."""
        ...


class Leases:
    """The leases that are not settled yet.

    Args:
        queue: The queue.
        settle_many: Settles tasks in it.
        clock: Returns seconds since the epoch.
        seconds: The length of a lease.
        patience: The most seconds to wait for a settle call after a cancellation.
        makes_room: Whether an ended task may let another one be leased: a queue has a cap.
        hang_seconds: Seconds without a turn of the event loop after which no lease is extended.
        reports: Tells what became of tasks, and of failures.
    """

    def __init__(
        self,
        queue: Leasing,
        settle_many: SettleMany,
        *,
        clock: Callable[[], float],
        seconds: float,
        patience: float,
        makes_room: bool,
        hang_seconds: float,
        reports: Reports,
    ) -> None:
        self._reports = reports
        self._queue = queue
        self._settle_many = settle_many
        self._clock = clock
        self._seconds = seconds
        self._patience = patience
        self._makes_room = makes_room
        self._hang_seconds = hang_seconds
        self._held: dict[str, Lease] = {}
        self._ended: list[_Settled] = []
        self._settling = False
        self._settle_now = asyncio.Event()

    @property
    def idle(self) -> bool:
        """Whether all leases are settled."""
        return not (self._held or self._ended or self._settling)

    def add(self, leases: Iterable[Lease]) -> None:
        """Extend these leases from now on, until they are settled."""
        self._held.update((lease.owner, lease) for lease in leases)

    def settle(self, lease: Lease, settlement: Settlement) -> None:
        """Settle a task with the next batch."""
        self._ended.append((lease, settlement))
        self._settle_now.set()

    async def keep_settling(self) -> None:
        """Settle ended deliveries until cancelled."""
        while True:
            await self._settle_now.wait()
            self._settle_now.clear()
            began = time.monotonic()
            await self.flush()
            gather = _GATHER_SECONDS - (time.monotonic() - began)
            if gather > 0 and not self._makes_room:
                await asyncio.sleep(gather)

    async def flush(self) -> None:
        """Settle all ended deliveries. After an error of the storage, try again."""
        while self._ended:
            batch, self._ended = self._ended, []
            self._settling = True
            try:
                await self._settle_batch(batch)
            except Exception as error:  # noqa: BLE001  # after any error the tasks are ours until they are settled
                self._reports.failed("settling", error)
                self._ended = batch + self._ended
                await asyncio.sleep(_SETTLE_AGAIN)
            finally:
                self._settling = False

    async def _settle_batch(self, batch: list[_Settled]) -> None:
        settling = asyncio.ensure_future(self._settle_many(batch, now=self._clock()))
        try:
            kept: Sequence[bool] = await asyncio.shield(settling)
        except asyncio.CancelledError:
            # The call goes on. A second call would change nothing, and report the leases as lost.
            await asyncio.wait({settling}, timeout=self._patience)
            if settling.done() and not settling.cancelled() and settling.exception() is None:
                self._note(batch, settling.result())
            else:
                self._ended = batch + self._ended
            raise
        self._note(batch, kept)
        if self._makes_room or any(settlement.verdict is Verdict.RETRY for _, settlement in batch):
            # A retry may fall due earlier than the task waited for, and an ended task makes room under a cap.
            self._queue.wake()

    def _note(self, batch: Sequence[_Settled], kept: Sequence[bool]) -> None:
        self._reports.worked("settling")
        self._reports.settled(batch, kept)
        for (lease, _), ours in zip(batch, kept, strict=True):
            self._held.pop(lease.owner, None)
            if not ours:
                _log.warning("task %a was delivered elsewhere meanwhile", lease.task.id)

    async def keep_extending(self) -> None:
        """Extend all leases, three times in the length of one and from a thread of their own, until cancelled."""
        beat = Beat(self._extend, first=self._seconds / 3, name="safedefer-leases", hang_seconds=self._hang_seconds)
        loop = asyncio.get_running_loop()
        beat.start(loop)
        try:
            await loop.create_future()
        finally:
            beat.stop()

    def _extend(self, _turning: Container[asyncio.AbstractEventLoop]) -> float:
        """Extend all leases; return the seconds to the next time. The settlement of a lost lease reports it."""
        pause = self._seconds / 3
        held = list(self._held.copy().values())  # the copy is made at once; the event loop changes it meanwhile
        if held:
            try:
                self._queue.extend_many(held, seconds=self._seconds, now=self._clock())
            except Exception as error:  # noqa: BLE001  # the next turn tries again
                self._reports.failed("extending leases", error)
                return min(pause, _EXTEND_AGAIN)
            self._reports.worked("extending leases")
        return pause
