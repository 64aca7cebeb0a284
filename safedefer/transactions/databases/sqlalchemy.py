"""SQLAlchemy 2: connections and sessions, sync and async.

An async one delegates to the sync one below it, in a greenlet (``run_sync``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

from safedefer.errors import BadTransactionStateError, ConfigurationError
from safedefer.queues.addresses import describe
from safedefer.transactions.databases.base import Opener, Source, run_now
from safedefer.transactions.databases.postgres import asyncpg_source, psycopg_source, undone
from safedefer.transactions.databases.sqlite import DISTRUST_SCHEMA

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_T = TypeVar("_T")

#: Databases whose CREATE TABLE is part of a transaction.
_DIALECTS: Final = frozenset({"sqlite", "postgresql"})
#: Drivers whose connections are known here.
_NATIVE: Final = frozenset({"psycopg", "asyncpg"})
#: PostgreSQL's code of what comes after an error in a transaction.
_FAILED: Final = "25P02"


def sqlalchemy_source(connection: object) -> Source | None:
    """Return what speaks to a connection or session of SQLAlchemy; None if it is none.

    Raises:
        BadTransactionStateError: Its database cannot do it, or it is not connected.
    """
    if "sqlalchemy" not in sys.modules:
        return None
    import sqlalchemy as sa  # noqa: PLC0415 - optional: it is here when the user has imported it
    from sqlalchemy import orm  # noqa: PLC0415 - as above

    awaited: Any = None
    if "sqlalchemy.ext.asyncio" in sys.modules:
        from sqlalchemy.ext import asyncio as aio  # noqa: PLC0415 - as above

        if isinstance(connection, aio.async_scoped_session):
            connection = connection()
        if isinstance(connection, aio.AsyncConnection | aio.AsyncSession):
            awaited = connection
            connection = awaited.sync_session if isinstance(awaited, aio.AsyncSession) else awaited.sync_connection
            if connection is None:
                raise BadTransactionStateError(
                    "the connection is not connected yet; get it with `async with engine.connect() as connection:`"
                )
    if isinstance(connection, orm.scoped_session):
        connection = connection()
    if not isinstance(connection, sa.Connection | orm.Session):
        return None
    bind = connection if isinstance(connection, sa.Connection) else connection.get_bind()
    if bind.dialect.name not in _DIALECTS:
        raise BadTransactionStateError(
            f"an outbox in {bind.dialect.name} is not supported: creating its table would commit; use SQLite or "
            "PostgreSQL, or defer after the commit"
        )
    return SQLAlchemySource(connection, bind.engine, awaited)


class SQLAlchemySource:
    """A ``Connection`` or ``Session``; of an ``AsyncConnection`` or ``AsyncSession`` the one below it, and itself."""

    is_apsw = False

    def __init__(self, connection: Any, engine: Any, awaited: Any = None) -> None:
        self._connection = connection
        self._engine = engine
        self._awaited = awaited
        self.is_async: bool = awaited is not None
        self.dialect: str = str(engine.dialect.name)
        self.native: bool = engine.dialect.driver in _NATIVE

    async def _call(self, work: Callable[[], _T]) -> _T:
        if self._awaited is None:
            return work()
        result: _T = await self._awaited.run_sync(lambda _: work())
        return result

    @property
    def path(self) -> str | None:
        """The SQLite file, absolute."""
        if _is_in_memory(self._engine) or self.dialect != "sqlite":
            return None
        return os.path.realpath(str(self._engine.url.database).removeprefix("file:").partition("?")[0])

    @property
    def identity(self) -> str | None:
        """The engine's database."""
        return _identity(self._engine)

    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return bool(self._connection.in_transaction())

    async def begin(self) -> None:
        """Open a transaction. Raises ``BadTransactionStateError`` where every statement would be its own."""
        await self._call(self._connection.begin)
        await self.check()

    async def check(self) -> None:
        """Check that an open transaction is one.

        Raises:
            BadTransactionStateError: The connection is in AUTOCOMMIT mode: every statement is committed at once.
        """
        chosen = await self._call(self._isolation_level)
        if str(chosen).upper() == "AUTOCOMMIT":
            raise BadTransactionStateError(
                "the connection is in AUTOCOMMIT mode, where nothing can be undone; use another isolation level"
            )

    def _isolation_level(self) -> object:
        connection = self._connection if hasattr(self._connection, "get_execution_options") else None
        connection = self._connection.connection() if connection is None else connection
        chosen = connection.get_execution_options().get("isolation_level")
        return getattr(self._engine.dialect, "_on_connect_isolation_level", None) if chosen is None else chosen

    async def commit(self) -> None:
        """Commit, unless that is done. Raises ``BadTransactionStateError`` if a statement has failed."""
        if not self.in_transaction():
            return
        if self.dialect == "postgresql":
            from sqlalchemy.exc import DBAPIError  # noqa: PLC0415 - see above

            try:
                await self.rows("SELECT 1")
            except DBAPIError as error:
                if _FAILED not in {getattr(error.orig, name, None) for name in ("sqlstate", "pgcode")}:
                    raise
                await self.rollback()
                raise undone() from error
        await self._call(self._connection.commit)

    async def rollback(self) -> None:
        """Undo, unless that is done."""
        if self.in_transaction():
            await self._call(self._connection.rollback)

    async def execute(self, statement: str, values: Mapping[str, object] = {}, /) -> int:
        """Run a statement; return how many rows it changed."""
        return await self._call(lambda: int(self._run(statement, values).rowcount))

    async def rows(self, statement: str, values: Mapping[str, object] = {}, /) -> Sequence[Sequence[Any]]:
        """Run a query."""
        found: Sequence[Sequence[Any]] = await self._call(lambda: self._run(statement, values).fetchall())
        return found

    def _run(self, statement: str, values: Mapping[str, object]) -> Any:
        import sqlalchemy as sa  # noqa: PLC0415 - see above

        return self._connection.execute(sa.text(statement), dict(values))

    async def run(self, statement: str, values: Sequence[object], /) -> None:
        """Run a statement with parameters ``$1`` on the driver's connection, whose transaction has begun."""
        await self._call(lambda: self._run_below(statement, values))

    def _run_below(self, statement: str, values: Sequence[object]) -> None:
        from sqlalchemy.util import await_only  # noqa: PLC0415 - see above

        bound = (
            self._connection if hasattr(self._connection, "get_execution_options") else self._connection.connection()
        )
        driver = bound.connection.driver_connection
        source = psycopg_source(driver) or asyncpg_source(driver)
        assert source is not None, "checked by its name"
        work = source.run(statement, values)
        if source.is_async:
            await_only(work)
        else:
            run_now(work)

    def reopen(self) -> Opener | None:
        """Connect as the engine does."""
        return open_engine(self._engine)


def open_engine(engine: Any) -> Opener | None:
    """Return how to connect to an engine's database; None if it is in memory.

    There a pool gives each thread a database of its own, or all of them one connection, whose transaction is the user's.
    """
    if _is_in_memory(engine):
        return None
    return _open_async(engine) if engine.dialect.is_async else _open_own(engine)


# What connects is the user's engine's. But its pool may have nothing left to give, or be of another loop; and a
# connection must not be kept: it would be carried across a fork.


def _open_own(engine: Any) -> Opener:
    made: list[Any] = []

    @asynccontextmanager
    async def connect() -> AsyncIterator[Source]:
        import sqlalchemy as sa  # noqa: PLC0415 - see above

        if not made:
            made.append(sa.create_engine(engine.url, pool=engine.pool.recreate()))
        (own,) = made
        try:
            with own.connect() as connection:
                source = SQLAlchemySource(connection, own)
                await _distrust(source)
                yield source
        finally:
            own.dispose()

    return Opener(connect)


def _open_async(engine: Any) -> Opener:
    @asynccontextmanager
    async def connect() -> AsyncIterator[Source]:
        from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415 - see above

        own = create_async_engine(engine.url, pool=engine.pool.recreate())
        try:
            async with own.connect() as connection:
                source = SQLAlchemySource(connection.sync_connection, own.sync_engine, connection)
                await _distrust(source)
                yield source
        finally:
            await own.dispose()

    return Opener(connect, is_async=True)


async def _distrust(source: SQLAlchemySource) -> None:
    if source.dialect == "sqlite":
        await source.execute(DISTRUST_SCHEMA)
        await source.rollback()  # SQLAlchemy opens a transaction for it


def open_url(url: str) -> tuple[str, Opener]:
    """Return the identity of the database that one of SQLAlchemy's URLs names, and how to connect to it.

    Raises:
        ConfigurationError: The URL is not understood, or SQLAlchemy or the driver is not installed.
    """
    try:
        import sqlalchemy as sa  # noqa: PLC0415 - optional: only for who uses it

        engine = sa.create_engine(url)
        opener = open_engine(engine)
        identity = _identity(engine)
    except Exception as error:  # noqa: BLE001  # whatever library
        # Without its cause, which may quote the URL.
        raise ConfigurationError(
            f"the outbox's URL is none of sqlite:///path, postgresql://... and SQLAlchemy's ({describe(url, error)}); "
            "correct it, or install what it needs (pip install sqlalchemy, and a driver)"
        ) from None
    if opener is None:
        raise ConfigurationError(
            "the outbox's URL is a database in memory, where nothing is left to sweep; name a file"
        )
    return identity, opener


def _identity(engine: Any) -> str:
    # Without a host or a file the URL does not say which database it is; a creator of the user's may know.
    vague = _is_in_memory(engine) or (
        engine.dialect.name == "postgresql" and not engine.url.host and not engine.url.query
    )
    return f"sqlalchemy:{id(engine)}" if vague else f"sqlalchemy:{_shown(engine)}"


def _shown(engine: Any) -> str:
    """Return the URL of a database with its user, without its password and parameters; one of another host is another."""
    url = engine.url
    return (
        f"{url.drivername}://{url.username or ''}@{url.host or ''}:{url.port or ''}/{url.database or ''}{_hosts(url)}"
    )


def _hosts(url: Any) -> str:
    # In a URL of PostgreSQL's these may be parameters.
    return "".join(f"&{name}={url.query[name]}" for name in ("host", "port", "dbname", "user") if name in url.query)


def _is_in_memory(engine: Any) -> bool:
    return engine.dialect.name == "sqlite" and engine.url.database in {None, "", ":memory:"}
