"""The user's own connection, whichever library it is of: begin, execute, commit, and how to open another.

A process opens a database file with one SQLite library only: when a second library closes its handle, the
first one's POSIX locks on the file are dropped, and committed rows can vanish. So what is written to the
user's file is written, and later read, by the library that the user has it open with.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

import apsw

from safedefer.errors import BadTransactionStateError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

#: Databases whose CREATE TABLE is part of a transaction.
_DIALECTS: Final = frozenset({"sqlite", "postgresql"})
#: Seconds that a connection of our own waits for a lock.
_PATIENCE: Final = 30.0


class Source(Protocol):
    """One connection of the user's. Statements have named parameters, ``:name``."""

    @property
    def path(self) -> str | None:
        """The SQLite file, absolute; None if it has none."""
        ...

    @property
    def identity(self) -> str | None:
        """What names the database in this process; None for one that only this connection sees."""
        ...

    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        ...

    def begin(self) -> None:
        """Open a transaction."""
        ...

    def check(self) -> None:
        """Check that an open transaction is one. Raises ``BadTransactionStateError``."""
        ...

    def commit(self) -> None:
        """Commit it."""
        ...

    def rollback(self) -> None:
        """Undo it."""
        ...

    def execute(self, statement: str, values: Mapping[str, object] = ..., /) -> int:
        """Run a statement; return how many rows it changed."""
        ...

    def rows(self, statement: str, values: Mapping[str, object] = ..., /) -> Sequence[Sequence[Any]]:
        """Run a query."""
        ...

    def reopen(self) -> Callable[[], AbstractContextManager[Source]] | None:
        """How to open another connection to the same database by the same library; None if that cannot be."""
        ...


def source_of(connection: object) -> Source:
    """Return what speaks to a sqlite3 or apsw connection, or a SQLAlchemy connection or session.

    Raises:
        BadTransactionStateError: It is none of these, or its database cannot do it.
    """
    if isinstance(connection, sqlite3.Connection):
        return SQLite3Source(connection)
    if isinstance(connection, apsw.Connection):
        return ApswSource(connection)
    if "sqlalchemy" in sys.modules:
        source = _sqlalchemy_source(connection)
        if source is not None:
            return source
    raise BadTransactionStateError(
        f"a {type(connection).__name__} is no connection that is known here; pass a sqlite3.Connection, an "
        "apsw.Connection, or a SQLAlchemy Connection or Session (of an AsyncSession its sync_session)"
    )


def opener_of(url: str) -> tuple[str, Callable[[], AbstractContextManager[Source]]]:
    """Return the identity of the database that a URL names, and how to connect to it.

    ``sqlite:///shop.db`` is opened with Python's own sqlite3; other URLs are SQLAlchemy's.

    Raises:
        ConfigurationError: The URL is not understood, or SQLAlchemy is not installed.
    """
    if url.startswith("sqlite:///"):
        path = os.path.realpath(url.removeprefix("sqlite:///"))
        return path, lambda: _open_sqlite3(path)
    try:
        import sqlalchemy as sa  # noqa: PLC0415 - optional: only for who uses it

        engine = sa.create_engine(url)
    except Exception as error:
        raise ConfigurationError(
            "the outbox's URL is none of sqlite:///path and of SQLAlchemy's (pip install sqlalchemy, and a driver)"
        ) from error
    return _engine_identity(engine), lambda: _open_engine(engine)


# --- Python's sqlite3 -----------------------------------------------------------------------------


class SQLite3Source:
    """A ``sqlite3.Connection``."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @property
    def path(self) -> str | None:
        """The file, absolute."""
        return _main_file(self.rows("PRAGMA database_list"))

    @property
    def identity(self) -> str | None:
        """The file."""
        return self.path

    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return self._connection.in_transaction

    def begin(self) -> None:
        """Take the write lock."""
        self._connection.execute("BEGIN IMMEDIATE")

    def check(self) -> None:
        """Nothing to check: the library asks SQLite."""

    def commit(self) -> None:
        """Commit."""
        self._connection.commit()

    def rollback(self) -> None:
        """Undo."""
        self._connection.rollback()

    def execute(self, statement: str, values: Mapping[str, object] = {}, /) -> int:
        """Run a statement; return how many rows it changed."""
        with closing(self._connection.execute(statement, values)) as cursor:
            return cursor.rowcount

    def rows(self, statement: str, values: Mapping[str, object] = {}, /) -> Sequence[Sequence[Any]]:
        """Run a query, whatever row factory the user has chosen."""
        with closing(self._connection.cursor()) as cursor:
            cursor.row_factory = None
            return cursor.execute(statement, values).fetchall()

    def reopen(self) -> Callable[[], AbstractContextManager[Source]] | None:
        """Open the file again."""
        path = self.path
        return None if path is None else lambda: _open_sqlite3(path)


@contextmanager
def _open_sqlite3(path: str) -> Iterator[Source]:
    # mode=rw: a database that is not there yet has no outbox, and is not ours to create.
    if not os.path.exists(path):  # noqa: PTH110 - a text, as everything here
        raise FileNotFoundError(path)
    with closing(sqlite3.connect(f"file:{_quote(path)}?mode=rw", uri=True, timeout=_PATIENCE)) as connection:
        connection.isolation_level = None
        yield SQLite3Source(connection)


def _quote(path: str) -> str:
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _main_file(databases: Sequence[Sequence[Any]]) -> str | None:
    files = [file for _, name, file in databases if name == "main" and file]
    return os.path.realpath(files[0]) if files else None


# --- apsw -----------------------------------------------------------------------------------------


class ApswSource:
    """An ``apsw.Connection``."""

    def __init__(self, connection: apsw.Connection) -> None:
        self.connection = connection

    @property
    def path(self) -> str | None:
        """The file, absolute."""
        return os.path.realpath(self.connection.filename) if self.connection.filename else None

    @property
    def identity(self) -> str | None:
        """The file."""
        return self.path

    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return self.connection.in_transaction

    def begin(self) -> None:
        """Take the write lock."""
        self.connection.execute("BEGIN IMMEDIATE")

    def check(self) -> None:
        """Nothing to check: the library asks SQLite."""

    def commit(self) -> None:
        """Commit."""
        self.connection.execute("COMMIT")

    def rollback(self) -> None:
        """Undo."""
        self.connection.execute("ROLLBACK")

    def execute(self, statement: str, values: Mapping[str, object] = {}, /) -> int:
        """Run a statement; return how many rows it changed."""
        self.connection.execute(statement, values)
        return self.connection.changes()

    def rows(self, statement: str, values: Mapping[str, object] = {}, /) -> Sequence[Sequence[Any]]:
        """Run a query, whatever row trace the user has set."""
        cursor = self.connection.cursor()
        cursor.row_trace = None
        return cursor.execute(statement, values).fetchall()

    def reopen(self) -> Callable[[], AbstractContextManager[Source]] | None:
        """Open the file again."""
        path = self.path
        return None if path is None else lambda: _open_apsw(path)


@contextmanager
def _open_apsw(path: str) -> Iterator[Source]:
    connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        connection.set_busy_timeout(int(_PATIENCE * 1000))
        yield ApswSource(connection)
    finally:
        connection.close()


# --- SQLAlchemy -----------------------------------------------------------------------------------


def _sqlalchemy_source(connection: object) -> Source | None:
    import sqlalchemy as sa  # noqa: PLC0415 - optional: it is here when the user has imported it
    from sqlalchemy import orm  # noqa: PLC0415 - as above

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
    return SQLAlchemySource(connection, bind.engine)


class SQLAlchemySource:
    """A SQLAlchemy ``Connection`` or ``Session``."""

    def __init__(self, connection: Any, engine: Any) -> None:
        self._connection = connection
        self._engine = engine

    @property
    def path(self) -> str | None:
        """The SQLite file, absolute."""
        database = self._engine.url.database
        if self._engine.dialect.name != "sqlite" or not database or database == ":memory:":
            return None
        return os.path.realpath(str(database).removeprefix("file:").partition("?")[0])

    @property
    def identity(self) -> str | None:
        """The engine's database."""
        return _engine_identity(self._engine)

    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return bool(self._connection.in_transaction())

    def begin(self) -> None:
        """Open a transaction. Raises ``BadTransactionStateError`` where every statement would be its own."""
        self._connection.begin()
        self.check()

    def check(self) -> None:
        """Check that an open transaction is one.

        Raises:
            BadTransactionStateError: The connection is in AUTOCOMMIT mode: every statement is committed at once.
        """
        connection = self._connection if hasattr(self._connection, "get_execution_options") else None
        connection = self._connection.connection() if connection is None else connection
        chosen = connection.get_execution_options().get("isolation_level")
        if chosen is None:
            chosen = getattr(self._engine.dialect, "_on_connect_isolation_level", None)
        if str(chosen).upper() == "AUTOCOMMIT":
            raise BadTransactionStateError(
                "the connection is in AUTOCOMMIT mode, where nothing can be undone; use another isolation level"
            )

    def commit(self) -> None:
        """Commit."""
        self._connection.commit()

    def rollback(self) -> None:
        """Undo."""
        self._connection.rollback()

    def execute(self, statement: str, values: Mapping[str, object] = {}, /) -> int:
        """Run a statement; return how many rows it changed."""
        return int(self._run(statement, values).rowcount)

    def rows(self, statement: str, values: Mapping[str, object] = {}, /) -> Sequence[Sequence[Any]]:
        """Run a query."""
        found: Sequence[Sequence[Any]] = self._run(statement, values).fetchall()
        return found

    def _run(self, statement: str, values: Mapping[str, object]) -> Any:
        import sqlalchemy as sa  # noqa: PLC0415 - see above

        return self._connection.execute(sa.text(statement), dict(values))

    def reopen(self) -> Callable[[], AbstractContextManager[Source]] | None:
        """Take another connection from the engine."""
        return None if self.identity is None else lambda: _open_engine(self._engine)


@contextmanager
def _open_engine(engine: Any) -> Iterator[Source]:
    with engine.connect() as connection:
        yield SQLAlchemySource(connection, engine)


def _engine_identity(engine: Any) -> str:
    if engine.dialect.name == "sqlite" and engine.url.database in (None, "", ":memory:"):
        return f"sqlalchemy:{id(engine)}"
    return f"sqlalchemy:{engine.url}"
