"""How an event loop calls a queue: in threads, or on its own connections where the engine has them.

Only what every task costs is here. What is asked now and then goes to a thread in any case.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from safedefer.concurrency.threads import InThread
    from safedefer.queues.base import Lease, LeaseCalls, Leasing, Settlement


class ThreadedLeasing:
    """The ``LeaseCalls`` of a queue, in threads."""

    def __init__(self, queue: Leasing, in_thread: InThread) -> None:
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
async def lease_calls(queue: Leasing, in_thread: InThread) -> AsyncIterator[LeaseCalls]:
    """Give the calls of a queue for the running loop: on its own connections, or in threads."""
    async with queue.on_loop() as calls:
        yield ThreadedLeasing(queue, in_thread) if calls is None else calls


@contextlib.asynccontextmanager
async def no_connections() -> AsyncIterator[None]:
    """Be ``Leasing.on_loop`` of an engine that has no connections of event loops."""
    yield None
