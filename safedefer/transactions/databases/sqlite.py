"""Python's sqlite3, and apsw.

A process opens a database file with one SQLite library only: when a second library closes its handle, the
first one's POSIX locks on the file are dropped, and committed rows can vanish. So what is written to the
user's file is written, and later read, by the library that the user has it open with.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any, Final

import apsw

from safedefer.errors import BadTransactionStateError
from safedefer.transactions.databases.base import Opener, Source

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

#: Seconds that a connection of our own waits for a lock. The next sweep tries again.
_PATIENCE: Final = 5.0
#: On connections of our own: what the file's views and triggers say calls no function that could do harm.
DISTRUST_SCHEMA: Final = "PRAGMA trusted_schema = OFF"


class _SQLite:
    """What the two have in common."""

    is_async = False
    dialect = "sqlite"
    native = False
    is_apsw = False

    async def check(self) -> None:
        """Nothing to check: the library asks SQLite."""

    async def run(self, statement: str, values: Sequence[object], /) -> None:  # noqa: ARG002 - the seam has them
        """Refuse: a queue's own statements are PostgreSQL's, and ``native`` says that they do not run here."""
        raise BadTransactionStateError("a SQLite connection runs no statement of PostgreSQL's; use the outbox")


def sqlite3_source(connection: object) -> Source | None:
    """Return what speaks to a ``sqlite3.Connection``; None if it is none."""
    return SQLite3Source(connection) if isinstance(connection, sqlite3.Connection) else None


def apsw_source(connection: object) -> Source | None:
    """Return what speaks to an ``apsw.Connection``; None if it is none."""
    return ApswSource(connection) if isinstance(connection, apsw.Connection) else None


class SQLite3Source(_SQLite):
    """A ``sqlite3.Connection``."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @property
    def path(self) -> str | None:
        """The file, absolute."""
        files = [file for _, name, file in self._rows("PRAGMA database_list", {}) if name == "main" and file]
        return os.path.realpath(files[0]) if files else None

    @property
    def identity(self) -> str | None:
        """The file."""
        return self.path

    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return self._connection.in_transaction

    async def begin(self) -> None:
        """Take the write lock."""
        self._connection.execute("BEGIN IMMEDIATE")

    async def commit(self) -> None:
        """Commit, unless that is done."""
        if self.in_transaction():
            self._connection.commit()

    async def rollback(self) -> None:
        """Undo, unless that is done."""
        if self.in_transaction():
            self._connection.rollback()

    async def execute(self, statement: str, values: Mapping[str, object] = {}, /) -> int:
        """Run a statement; return how many rows it changed."""
        with closing(self._connection.execute(statement, values)) as cursor:
            return cursor.rowcount

    async def rows(self, statement: str, values: Mapping[str, object] = {}, /) -> Sequence[Sequence[Any]]:
        """Run a query, whatever row factory the user has chosen."""
        return self._rows(statement, values)

    def _rows(self, statement: str, values: Mapping[str, object]) -> Sequence[Sequence[Any]]:
        with closing(self._connection.cursor()) as cursor:
            cursor.row_factory = None
            return cursor.execute(statement, values).fetchall()

    def reopen(self) -> Opener | None:
        """Open the file again."""
        path = self.path
        return None if path is None else open_file(path)


def open_file(path: str) -> Opener:
    """Return how to open a file with Python's sqlite3."""

    @asynccontextmanager
    async def connect() -> AsyncIterator[Source]:
        # mode=rw: a database that is not there yet has no outbox, and is not ours to create.
        if not os.path.exists(path):  # noqa: ASYNC240, PTH110 - a text, as everything here; nothing here suspends
            raise FileNotFoundError(path)
        with closing(sqlite3.connect(f"file:{_quote(path)}?mode=rw", uri=True, timeout=_PATIENCE)) as connection:
            connection.isolation_level = None
            connection.execute(DISTRUST_SCHEMA)
            yield SQLite3Source(connection)

    return Opener(connect)


def _quote(path: str) -> str:
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")


class ApswSource(_SQLite):
    """An ``apsw.Connection``."""

    is_apsw = True

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

    async def begin(self) -> None:
        """Take the write lock."""
        self.connection.execute("BEGIN IMMEDIATE")

    async def commit(self) -> None:
        """Commit, unless that is done."""
        if self.in_transaction():
            self.connection.execute("COMMIT")

    async def rollback(self) -> None:
        """Undo, unless that is done."""
        if self.in_transaction():
            self.connection.execute("ROLLBACK")

    async def execute(self, statement: str, values: Mapping[str, object] = {}, /) -> int:
        """Run a statement; return how many rows it changed."""
        self.connection.execute(statement, values)
        return self.connection.changes()

    async def rows(self, statement: str, values: Mapping[str, object] = {}, /) -> Sequence[Sequence[Any]]:
        """Run a query, whatever row trace the user has set."""
        cursor = self.connection.cursor()
        cursor.row_trace = None
        return cursor.execute(statement, values).fetchall()

    def reopen(self) -> Opener | None:
        """Open the file again."""
        path = self.path
        return None if path is None else _open_apsw(path)


def _open_apsw(path: str) -> Opener:
    @asynccontextmanager
    async def connect() -> AsyncIterator[Source]:
        connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            connection.set_busy_timeout(int(_PATIENCE * 1000))
            connection.execute(DISTRUST_SCHEMA)
            yield ApswSource(connection)
        finally:
            connection.close()

    return Opener(connect)
