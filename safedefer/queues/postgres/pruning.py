"""Pruning: deletes tombstones, history, records and ledger entries by age, and orphaned blobs; archives old dead letters."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

from safedefer.queues.postgres.statements import SQL
from safedefer.queues.rules import LEDGER_LEEWAY

if TYPE_CHECKING:
    from safedefer.queues.base import StorageOptions
    from safedefer.queues.postgres.connection import Connection
    from safedefer.queues.postgres.pools import Pools

_EVERY_SECONDS: Final = 60.0
#: The wait after a pruning that reached its limit.
_AGAIN_SECONDS: Final = 0.2
_AT_ONCE: Final = 500


class Pruning:
    """Prunes a database, about once a minute when dispatchers ask for it.

    Args:
        options: The ages and numbers from which on rows go.
    """

    def __init__(self, options: StorageOptions) -> None:
        self._options = options
        self._next = float("-inf")

    def is_due(self, now: float) -> bool:
        """Whether a minute has passed since the last pruning of this process, or that one reached its limit."""
        return now >= self._next

    async def run(self, pools: Pools, *, now: float) -> None:
        """Prune on connections of the running loop, and set the time of the next pruning."""
        self._next = now + _EVERY_SECONDS

        async def action(connection: Connection) -> int:
            return await self.prune(connection, now=now)

        if await pools.run(action, purpose="relaxed") >= _AT_ONCE:
            self._next = now + _AGAIN_SECONDS

    async def prune(self, connection: Connection, *, now: float) -> int:
        """Delete or archive up to 500 rows of each kind, each kind in a statement of its own; returns how many."""
        options = self._options
        before = now - options.history_seconds
        removed = 0
        for name, values in (
            ("names_prune", (now, _AT_ONCE)),
            ("ended_prune", (before, _AT_ONCE)),
            ("attempts_prune", (before, _AT_ONCE)),
            ("dead_archive_old", (now, now - options.dead_seconds, _AT_ONCE)),
            ("dead_archive_excess", (now, options.dead_limit, _AT_ONCE)),
            ("ledger_prune", (now - LEDGER_LEEWAY, _AT_ONCE)),
            ("kept_prune", (now - LEDGER_LEEWAY, _AT_ONCE)),
        ):
            removed += len(await connection.fetch(SQL[name], *values))
        orphaned = await connection.fetch(SQL["blobs_orphaned"], _some_id(), _AT_ONCE)
        (blobs,) = await connection.fetch(SQL["blobs_drop"], [row["id"] for row in orphaned])
        (totals,) = await connection.fetch(SQL["totals_bad"])
        if totals["bad"]:  # somebody else wrote them
            await connection.execute(SQL["totals_count"])
        return removed + int(blobs["dropped"])


def _some_id() -> str:
    """Return a random text before a random blob's id; every sixteenth time before them all."""
    text = secrets.token_urlsafe(3)
    return text if secrets.randbelow(16) else ""
