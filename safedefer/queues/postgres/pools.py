"""The asyncpg pools of one event loop, and the server settings of each purpose."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar

import asyncpg

from safedefer.queues.postgres import errors
from safedefer.queues.postgres.errors import BROKEN, CONNECT_SECONDS, closed, failure, is_gone, refusal
from safedefer.queues.postgres.statements import SQL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from safedefer.queues.postgres.connection import Connection

_T = TypeVar("_T")

_STATEMENT_SECONDS: Final = 60.0
#: Lifetime of a prepared statement. A plan made for an empty table scans all of it once it is full, so plans must be renewed.
_PLANNED_SECONDS: Final = 5

Purpose: TypeAlias = Literal["durable", "relaxed", "leases"]
"""The settings of a connection.

``durable`` commits are synced to disk, also where the role or the database has ``synchronous_commit = off``: the begin and end of
a run, and enqueued tasks, survive a crash of the server.
``relaxed`` commits are not: a settlement lost in a crash is repeated by the next delivery, which the ledger answers.
``leases`` are relaxed too, and may not sort: pgqueuer's dequeue must walk the index in the order of the jobs' ids,
because sorting a million due jobs takes seconds. Each statement keeps one plan for all values: PostgreSQL made a new one for each
dequeue, which took longer than to run it.
"""
_SETTINGS: Final[Mapping[Purpose, Mapping[str, str]]] = {
    "durable": {},
    "relaxed": {"synchronous_commit": "off"},
    "leases": {"synchronous_commit": "off", "enable_sort": "off", "plan_cache_mode": "force_generic_plan"},
}
#: Forces look-ups by index: the planner's row counts are stale for tables that grow and shrink by thousands a second.
_BY_INDEX: Final = {"jit": "off", "enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"}
#: Limits how long a vanished or suspended machine can hold row locks that others wait for.
_MISSED: Final = {
    "idle_in_transaction_session_timeout": "20s",
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
}


async def _keep(_connection: object) -> None:
    """Reset nothing when a connection is released: only our own statements run on it."""


async def _sync_commits(connection: asyncpg.Connection) -> None:
    try:
        await connection.execute(SQL["sync_commits"])
    except BaseException:
        # asyncpg would close it politely, and wait for a server that has just not answered.
        connection.terminate()
        raise


class Pools:
    """The pools of one event loop, one for each purpose, created on first use.

    Args:
        dsn: The database.
        most: Connections at most for each purpose.
    """

    def __init__(self, dsn: str, most: int) -> None:
        self._dsn = dsn
        self._most = most
        self._pools: dict[Purpose, asyncpg.Pool] = {}
        self._kept: dict[Purpose, Any] = {}
        """Connections that nobody uses and that were not given back, one of each pool: to give it back and to acquire it again
        costs more than a statement does."""
        self._waiting: Counter[Purpose] = Counter()
        """Calls that acquire a connection now."""
        self._closed = False

    async def _pool(self, purpose: Purpose) -> asyncpg.Pool:
        if self._closed:
            raise closed(self._dsn)
        pool = self._pools.get(purpose)
        if pool is None:  # min_size=0: this connects nothing and does not suspend
            pool = self._pools[purpose] = await asyncpg.create_pool(
                self._dsn,
                min_size=0,
                max_size=self._most,
                command_timeout=_STATEMENT_SECONDS,
                timeout=CONNECT_SECONDS,
                max_cached_statement_lifetime=_PLANNED_SECONDS,
                reset=_keep,
                init=_sync_commits if purpose == "durable" else None,
                server_settings={
                    "application_name": "safedefer",
                    "search_path": errors.SEARCH_PATH,
                    **_BY_INDEX,
                    **_MISSED,
                    **_SETTINGS[purpose],
                },
            )
        return pool

    async def run(
        self,
        action: Callable[[Connection], Awaitable[_T]],
        *,
        purpose: Purpose,
        transaction: bool = False,
        idempotent: bool = False,
    ) -> _T:
        """Run an action on a connection and return its result.

        Args:
            action: The statements.
            purpose: The pool.
            transaction: Run them in one transaction; without it each statement is its own.
            idempotent: The action may be run twice: it is run again on another connection if the first one breaks.

        Raises:
            QueueUnavailable: The database failed. A refusal by our own statements raises the error it stands for.
        """
        try:
            return await self._run(action, purpose=purpose, transaction=transaction, idempotent=idempotent)
        except BROKEN as error:
            raise refusal(error) or failure(self._dsn, error) from error

    async def _run(
        self, action: Callable[[Any], Awaitable[_T]], *, purpose: Purpose, transaction: bool, idempotent: bool
    ) -> _T:
        try:
            async with self._connection(purpose) as connection:
                if not transaction:
                    return await action(connection)
                async with connection.transaction():
                    return await action(connection)
        except BROKEN as error:
            if not idempotent or not is_gone(error):
                raise
        return await self._run(action, purpose=purpose, transaction=transaction, idempotent=False)

    @contextlib.asynccontextmanager
    async def _connection(self, purpose: Purpose) -> AsyncIterator[Any]:
        """Give a connection, and terminate it if it may be broken afterwards."""
        pool = await self._pool(purpose)
        connection = await self._take(pool, purpose)
        usable = True
        try:
            yield connection
        except BaseException as error:
            # An error that the server answers leaves the connection usable; after any other its state is unknown.
            if not isinstance(error, asyncpg.PostgresError) or is_gone(error):
                usable = False
                with contextlib.suppress(*BROKEN):  # the pool may have dropped it already
                    connection.terminate()
            raise
        finally:
            if usable and not (self._closed or purpose in self._kept or self._waiting[purpose]):
                self._kept[purpose] = connection
            else:
                with contextlib.suppress(*BROKEN):  # a connection that ends now changes nothing about the result
                    await pool.release(connection)

    async def _take(self, pool: asyncpg.Pool, purpose: Purpose) -> Any:
        kept = self._kept.pop(purpose, None)
        if kept is not None:
            with contextlib.suppress(*BROKEN):  # it has ended meanwhile, and the pool has dropped it
                if not kept.is_closed():
                    return kept
                await pool.release(kept)
        self._waiting[purpose] += 1
        try:
            return await pool.acquire(timeout=CONNECT_SECONDS)
        finally:
            self._waiting[purpose] -= 1

    async def close(self) -> None:
        """Wait up to half of ``CONNECT_SECONDS`` for running statements, and disconnect."""
        self._closed = True
        pools = list(self._pools.values())
        try:
            async with asyncio.timeout(CONNECT_SECONDS / 2):
                for purpose, connection in self._kept.items():
                    with contextlib.suppress(*BROKEN):
                        await self._pools[purpose].release(connection)
                await asyncio.gather(*(pool.close() for pool in pools))
        except BaseException as error:
            self.terminate()
            if not isinstance(error, BROKEN):
                raise

    def terminate(self) -> None:
        """Disconnect at once."""
        self._closed = True
        for pool in self._pools.values():
            with contextlib.suppress(*BROKEN, RuntimeError):  # RuntimeError: the pool's loop is closed
                pool.terminate()
