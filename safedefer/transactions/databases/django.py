"""Django's connections: ``django.db.connection``, ``connections["other"]``. Statements go to the driver below."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

from safedefer.errors import BadTransactionStateError
from safedefer.transactions.databases.base import Opener, Source
from safedefer.transactions.databases.postgres import psycopg_source, undone
from safedefer.transactions.databases.sqlite import SQLite3Source, open_file

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def django_source(connection: Any) -> Source | None:
    """Return what speaks to a connection of Django's; None if it is none.

    Raises:
        BadTransactionStateError: Its database or driver cannot do it.
    """
    django = sys.modules.get("django.db")
    base = sys.modules.get("django.db.backends.base.base")
    if django is None or base is None:
        return None
    if isinstance(connection, type(django.connection)):  # stands for this thread's
        connection = django.connections[connection.alias]
    if not isinstance(connection, base.BaseDatabaseWrapper):
        return None
    alias = connection.alias
    if django.connections[alias] is not connection:
        raise BadTransactionStateError(f"this thread's connection is django.db.connections[{alias!r}]; pass that one")
    return DjangoSource(connection)


def is_in_transaction(connection: Any) -> bool:
    """Whether a transaction of a connection of Django's is open: in ``atomic``, or as long as autocommit is off.

    The transaction that Django's ``TestCase`` puts around a test does not count, as for ``atomic(durable=True)``: what
    the test calls is outside a transaction in production. One that is not connected yet has none.
    """
    blocks = getattr(connection, "atomic_blocks", None)
    if blocks:
        return not getattr(blocks[-1], "_from_testcase", False)
    return bool(connection.in_atomic_block or (connection.connection is not None and not connection.autocommit))


class DjangoSource:
    """A connection of Django's to SQLite, or to PostgreSQL by psycopg 3."""

    is_async = False
    is_apsw = False

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._opened: Any = None
        connection.ensure_connection()
        self.dialect = "sqlite" if connection.vendor == "sqlite" else "postgresql"
        self.native: bool = self.dialect == "postgresql"
        self.path: str | None = self._below().path
        self.identity: str | None = self._below().identity

    def _below(self) -> Source:
        """Return what speaks to the driver's connection, which Django changes now and then."""
        self._connection.ensure_connection()
        below = self._connection.connection
        source = SQLite3Source(below) if self._connection.vendor == "sqlite" else psycopg_source(below)
        if source is None:
            raise BadTransactionStateError(
                f"an outbox by Django's {self._connection.vendor} and {type(below).__module__} is not supported; use "
                "SQLite, or PostgreSQL with psycopg 3 (pip install 'psycopg[binary]'), or defer after the commit"
            )
        return source

    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return is_in_transaction(self._connection)

    async def begin(self) -> None:
        """Enter ``atomic``."""
        opened = sys.modules["django.db.transaction"].atomic(using=self._connection.alias)
        opened.__enter__()
        self._opened = opened

    async def check(self) -> None:
        """Nothing to check: Django knows."""

    async def commit(self) -> None:
        """Leave ``atomic``. Raises ``BadTransactionStateError`` if a statement has failed."""
        if self._connection.needs_rollback or not await self._is_usable():
            await self.rollback()
            raise undone()
        opened, self._opened = self._opened, None
        opened.__exit__(None, None, None)

    async def _is_usable(self) -> bool:
        if self.dialect == "sqlite":
            return True
        return bool(self._connection.connection.info.transaction_status.name != "INERROR")

    async def rollback(self) -> None:
        """Leave ``atomic``, undoing it."""
        opened, self._opened = self._opened, None
        if opened is not None:
            error = BadTransactionStateError("undone")
            opened.__exit__(type(error), error, None)

    async def execute(self, statement: str, values: Mapping[str, object] = {}, /) -> int:
        """Run a statement; return how many rows it changed."""
        with self._connection.wrap_database_errors:
            return await self._below().execute(statement, values)

    async def rows(self, statement: str, values: Mapping[str, object] = {}, /) -> Sequence[Sequence[Any]]:
        """Run a query."""
        with self._connection.wrap_database_errors:
            return await self._below().rows(statement, values)

    async def run(self, statement: str, values: Sequence[object], /) -> None:
        """Run a statement with parameters ``$1``; errors are psycopg's."""
        await self._below().run(statement, values)

    def reopen(self) -> Opener | None:
        """Open the file again, or make a copy, which is a connection of its own."""
        if self.identity is None:
            return None
        if self.dialect == "sqlite":
            return open_file(self.identity)
        connection = self._connection

        @asynccontextmanager
        async def connect() -> AsyncIterator[Source]:
            with closing(connection.copy()) as copy:
                copy.ensure_connection()
                source = psycopg_source(copy.connection)
                assert source is not None, "as the connection that it is a copy of"
                yield source

        return Opener(connect)
