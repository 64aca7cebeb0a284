"""Lease and settle on the connections of one event loop: the caller's (``on_loop``), or the store's own for threads.

A task may block the caller's loop. So a transaction of several statements never runs there: it would hold row locks
for as long. It runs on the store's own loop; on the caller's loop each statement is a transaction by itself.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

from safedefer.errors import QueueUnavailable
from safedefer.queues.postgres.leasing import lease, manager_of
from safedefer.queues.postgres.settling import settle
from safedefer.queues.postgres.statements import SQL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safedefer.queues.base import Lease, Settlement
    from safedefer.queues.postgres.connection import Connection
    from safedefer.queues.postgres.pools import Pools
    from safedefer.queues.postgres.pruning import Pruning
    from safedefer.queues.postgres.store import Connections, PostgresStore


class PostgresCalls:
    """``LeaseCalls`` on the connections of one event loop.

    Args:
        store: The connections of the process.
        pools: Those of the loop that awaits the calls.
        pruning: Run by ``lease`` when it is due.
        tombstone_seconds: How long the names of ended tasks stay taken.
        own_loop: Whether that loop is the store's own.
    """

    def __init__(
        self, store: PostgresStore, pools: Pools, *, pruning: Pruning, tombstone_seconds: float, own_loop: bool
    ) -> None:
        self._store = store
        self._pools = pools
        self._pruning = pruning
        self._tombstone_seconds = tombstone_seconds
        self._own_loop = own_loop

    async def lease(
        self, *, owner: str, limit: int, seconds: float, now: float, queues: Sequence[str] | None = None
    ) -> Sequence[Lease]:
        """Do what ``PostgresQueue.lease`` does."""
        self._store.watch.seen()
        connections = await self._store.open_async()
        connections.listen()
        if seconds != self._store.noted_lease_seconds:
            await self._note_lease_seconds(connections, seconds)
        action = partial(
            lease,
            own_loop=None if self._own_loop else partial(connections.transact, purpose="leases"),
            owner=owner,
            manager=manager_of(owner),
            limit=limit,
            seconds=seconds,
            now=now,
            queues=queues,
            tombstone_seconds=self._tombstone_seconds,
        )
        leases = await self._pools.run(action, purpose="leases")
        if self._pruning.is_due(now):
            with contextlib.suppress(QueueUnavailable):  # the leases are committed: they must reach the caller
                await self._pruning.run(self._pools, now=now)
        return leases

    async def _note_lease_seconds(self, connections: Connections, seconds: float) -> None:
        """Write the length of a lease into the database, for processes that only look."""
        if connections.lease_seconds != seconds:

            async def action(connection: Connection) -> None:
                await connection.execute(SQL["settings_lease"], seconds)

            await self._pools.run(action, purpose="durable")
            connections.lease_seconds = seconds
        self._store.noted_lease_seconds = seconds

    async def settle_many(self, settlements: Sequence[tuple[Lease, Settlement]], *, now: float) -> Sequence[bool]:
        """Do what ``PostgresQueue.settle_many`` does."""
        if not settlements:
            return ()
        connections = await self._store.open_async()
        action = partial(
            settle,
            own_loop=None if self._own_loop else partial(connections.transact, purpose="relaxed"),
            settlements=settlements,
            now=now,
            tombstone_seconds=self._tombstone_seconds,
        )
        # Relaxed: a settlement lost in a crash of the server is repeated from the ledger, whose commits are synced.
        return await self._pools.run(action, purpose="relaxed")
