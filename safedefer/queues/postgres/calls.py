"""The four calls that every task costs, on the connections of one event loop: to lease, begin, finish and settle.

The loop is that of whoever calls, or the one of the engine's own thread, for those who would block. A task may block the
caller's loop: so nothing holds rows there, each statement is a transaction, and what takes more goes to the engine's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING, Protocol

from safedefer.errors import QueueUnavailable
from safedefer.queues.postgres import operations
from safedefer.queues.postgres.ledger import begin_many, finish_many
from safedefer.queues.postgres.operations import SQL
from safedefer.queues.postgres.store import STATEMENTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from safedefer.ledger import Admission, Execution, RunEnd
    from safedefer.queues.base import Lease, Settlement
    from safedefer.queues.postgres.store import Connections, Pools, Watch


class Host(Protocol):
    """The queue that these calls are made for."""

    watch: Watch
    manager: UUID
    tombstone_seconds: float
    lease_seconds: float | None
    """Which the database was told."""

    @property
    def is_open(self) -> bool:
        """Whether ``open`` would not block."""
        ...

    def open(self) -> Connections:
        """Connect and check the tables, if that was not done. Raises ``QueueUnavailable``."""
        ...

    def is_time_to_prune(self, now: float) -> bool:
        """Whether something is to be forgotten now."""
        ...

    async def prune_here(self, pools: Pools, *, now: float) -> int:
        """Forget what is too old."""
        ...


class PostgresCalls:
    """Calls on the connections of one event loop.

    Args:
        host: The queue.
        pools: The connections.
        engines: Whether the loop is the engine's own.
    """

    def __init__(self, host: Host, pools: Pools, *, engines: bool) -> None:
        self._host = host
        self._pools = pools
        self._engines = engines

    async def _ready(self) -> Connections:
        return self._host.open() if self._host.is_open else await asyncio.to_thread(self._host.open)

    async def lease(
        self, *, owner: str, limit: int, seconds: float, now: float, queues: Sequence[str] | None = None
    ) -> Sequence[Lease]:
        """Do what ``PostgresQueue.lease`` does."""
        host = self._host
        host.watch.seen()
        connections = await self._ready()
        connections.listen()
        if seconds != host.lease_seconds:
            if connections.lease_seconds != seconds:
                note = partial(operations.execute, statement=SQL["settings_lease"], values=(seconds,))
                await self._pools.run(note, purpose="durable")
                connections.lease_seconds = seconds
            host.lease_seconds = seconds
        action = partial(
            operations.lease,
            statements=STATEMENTS,
            apart=None if self._engines else partial(connections.apart, purpose="leases"),
            owner=owner,
            manager=host.manager,
            limit=limit,
            seconds=seconds,
            now=now,
            queues=queues,
        )
        leases = await self._pools.run(action, purpose="leases")
        if host.is_time_to_prune(now):
            with contextlib.suppress(QueueUnavailable):  # what was leased is leased
                await host.prune_here(self._pools, now=now)
        return leases

    async def settle_many(self, settlements: Sequence[tuple[Lease, Settlement]], *, now: float) -> Sequence[bool]:
        """Do what ``PostgresQueue.settle_many`` does."""
        if not settlements:
            return ()
        connections = await self._ready()
        action = partial(
            operations.settle,
            statements=STATEMENTS,
            apart=None if self._engines else partial(connections.apart, purpose="relaxed"),
            settlements=settlements,
            now=now,
            tombstone_seconds=self._host.tombstone_seconds,
        )
        # What a crash of the server undoes, the next delivery finds in the ledger, which is synced.
        return await self._pools.run(action, purpose="relaxed")

    async def begin_many(self, executions: Sequence[Execution], *, now: float, lease: float) -> Sequence[Admission]:  # noqa: ARG002 - the database's clock
        """Do what ``PostgresLedger.begin_many`` does."""
        await self._ready()
        # Who asks again is let in again: or else what was committed, and whose answer was lost, waits for the lease.
        return await self._pools.run(
            partial(begin_many, executions=executions, lease=lease), purpose="durable", again=True
        )

    async def finish_many(self, ends: Sequence[RunEnd]) -> Sequence[bool]:
        """Do what ``PostgresLedger.finish_many`` does."""
        await self._ready()
        return await self._pools.run(partial(finish_many, ends=ends), purpose="durable")
