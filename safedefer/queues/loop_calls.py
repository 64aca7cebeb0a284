"""How an event loop calls a queue: in threads, or on its own connections where the engine has them.

Only what every task costs is here. What is asked now and then goes to a thread in any case.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Protocol, TypeGuard

from safedefer.concurrency.threads import InThread
from safedefer.ledger import Admission, Execution, Ledger, RunEnd
from safedefer.queues.base import Lease, PullQueue, Queue, Settlement


class QueueCalls(Protocol):
    """``PullQueue.lease`` and ``PullQueue.settle_many``, awaited."""

    async def lease(
        self, *, owner: str, limit: int, seconds: float, now: float, queues: Sequence[str] | None = None
    ) -> Sequence[Lease]:
        """Claim tasks."""
        ...

    async def settle_many(self, settlements: Sequence[tuple[Lease, Settlement]], *, now: float) -> Sequence[bool]:
        """Settle tasks."""
        ...


class LedgerCalls(Protocol):
    """``Ledger.begin_many`` and ``Ledger.finish_many``, awaited."""

    async def begin_many(self, executions: Sequence[Execution], *, now: float, lease: float) -> Sequence[Admission]:
        """Ask to run."""
        ...

    async def finish_many(self, ends: Sequence[RunEnd]) -> Sequence[bool]:
        """Store the ends of runs."""
        ...


class LoopQueue(PullQueue, Protocol):
    """A queue that can have connections of an event loop."""

    def on_loop(self) -> AbstractAsyncContextManager[QueueCalls]:
        """Have connections of the running loop while the context lasts; its ledger then has them too."""
        ...


class LoopLedger(Ledger, Protocol):
    """The ledger of such a queue."""

    @property
    def here(self) -> LedgerCalls | None:
        """The calls of the running loop, if there are connections of it now."""
        ...


def _is_loop_queue(queue: Queue) -> TypeGuard[LoopQueue]:
    return hasattr(type(queue), "on_loop")  # of the class: what wraps a queue is to be called itself


def _is_loop_ledger(ledger: Ledger) -> TypeGuard[LoopLedger]:
    return hasattr(type(ledger), "here")


class ThreadedQueue:
    """The calls of a queue, in threads."""

    def __init__(self, queue: PullQueue, in_thread: InThread) -> None:
        self._queue = queue
        self._in_thread = in_thread

    async def lease(
        self, *, owner: str, limit: int, seconds: float, now: float, queues: Sequence[str] | None = None
    ) -> Sequence[Lease]:
        """Claim tasks."""
        call = partial(self._queue.lease, owner=owner, limit=limit, seconds=seconds, now=now, queues=queues)
        return await self._in_thread(call)

    async def settle_many(self, settlements: Sequence[tuple[Lease, Settlement]], *, now: float) -> Sequence[bool]:
        """Settle tasks."""
        return await self._in_thread(partial(self._queue.settle_many, settlements, now=now))


@contextlib.asynccontextmanager
async def queue_calls(queue: PullQueue, in_thread: InThread) -> AsyncIterator[QueueCalls]:
    """Give the calls of a queue for the running loop: on its own connections, or in threads."""
    if not _is_loop_queue(queue):
        yield ThreadedQueue(queue, in_thread)
        return
    async with queue.on_loop() as calls:
        yield calls


@contextlib.asynccontextmanager
async def on_loop(queue: Queue) -> AsyncIterator[None]:
    """Let a queue, and so its ledger, have connections of the running loop while the context lasts, if the engine can."""
    if not _is_loop_queue(queue):
        yield
        return
    async with queue.on_loop():
        yield


def ledger_here(ledger: Ledger) -> LedgerCalls | None:
    """Return the calls of a ledger that has connections of the running loop; None: use a thread."""
    return ledger.here if _is_loop_ledger(ledger) else None
