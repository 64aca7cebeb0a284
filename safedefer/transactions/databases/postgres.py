"""psycopg 3, whose connections block or are awaited, and asyncpg.

A failed statement ends what can be done in a PostgreSQL transaction but undoing it. Their COMMIT is then
answered with ROLLBACK and no error, so ``commit`` looks first.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager, closing
from functools import lru_cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from safedefer.errors import BadTransactionStateError, ConfigurationError, MissingExtra
from safedefer.queues.addresses import describe
from safedefer.transactions.databases.base import Opener, Source, ready

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_PARAMETER: Final = re.compile(r"(?<![:\w]):([a-z]\w*)")
_DEFAULT_PORT: Final = 5432
#: Seconds that a connection of our own takes to be made, at most.
_PATIENCE: Final = 10
#: Modes of TLS that take an unencrypted connection; for the others asyncpg has a context.
_LAX_TLS: Final = frozenset({"disable", "allow", "prefer"})


def undone() -> BadTransactionStateError:
    """Return the error of a transaction that cannot be committed any more."""
    return BadTransactionStateError(
        "a statement has failed in this transaction, which was therefore undone; let the error end the block, "
        "or wrap in a savepoint what may fail"
    )


@lru_cache(maxsize=64)
def _numbered(statement: str) -> tuple[str, tuple[str, ...]]:
    """Return a statement with ``$1`` for ``:name``, and the names in order."""
    names = tuple(dict.fromkeys(_PARAMETER.findall(statement)))
    return _PARAMETER.sub(lambda match: f"${names.index(match[1]) + 1}", statement), names


def _identity(host: object, port: object, database: object, user: object) -> str:
    return f"postgresql://{user}@{host or ''}:{port or _DEFAULT_PORT}/{database}"


class _Postgres:
    """What the two have in common."""

    dialect = "postgresql"
    native = True
    is_apsw = False
    path = None

    async def check(self) -> None:
        """Nothing to check: the server says whether a transaction is open."""


# --- psycopg 3 ------------------------------------------------------------------------------------


def psycopg_source(connection: Any) -> Source | None:
    """Return what speaks to a connection of psycopg 3; None if it is none.

    Raises:
        BadTransactionStateError: It is in pipeline mode.
    """
    psycopg = sys.modules.get("psycopg")
    if psycopg is None or not isinstance(connection, psycopg.Connection | psycopg.AsyncConnection):
        return None
    if connection.pgconn.pipeline_status:
        raise BadTransactionStateError(
            "in pipeline mode a connection does not know whether a transaction is open; begin the block outside of it"
        )
    return PsycopgSource(psycopg, connection)


class PsycopgSource(_Postgres):
    """A ``psycopg.Connection`` or a ``psycopg.AsyncConnection``."""

    def __init__(self, psycopg: Any, connection: Any) -> None:
        self._psycopg = psycopg
        self._connection = connection
        self.is_async: bool = isinstance(connection, psycopg.AsyncConnection)
        self._opened: Any = None

    @property
    def identity(self) -> str | None:
        """Server, database and user."""
        info = self._connection.info
        return _identity(info.host, info.port, info.dbname, info.user)

    def in_transaction(self) -> bool:
        """Whether a transaction is open, also one that has failed."""
        return self._connection.info.transaction_status.name in {"INTRANS", "INERROR", "ACTIVE"}

    async def begin(self) -> None:
        """Open a transaction, in autocommit mode too."""
        opened = self._connection.transaction()
        await ready(opened.__aenter__() if self.is_async else opened.__enter__())
        self._opened = opened

    async def commit(self) -> None:
        """Commit. Raises ``BadTransactionStateError`` if a statement has failed."""
        if self._connection.closed:  # psycopg would pass over it
            raise BadTransactionStateError("the connection was closed, and its transaction undone; connect again")
        if self._connection.info.transaction_status.name == "INERROR":
            await self.rollback()
            raise undone()
        await self._end(None)

    async def rollback(self) -> None:
        """Undo."""
        await self._end(self._psycopg.Rollback())

    async def _end(self, error: BaseException | None) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            how = (None if error is None else type(error), error, None)
            await ready(opened.__aexit__(*how) if self.is_async else opened.__exit__(*how))

    async def execute(self, statement: str, values: Mapping[str, object] = {}, /) -> int:
        """Run a statement; return how many rows it changed."""
        cursor = await self._run(statement, values)
        return int(cursor.rowcount)

    async def rows(self, statement: str, values: Mapping[str, object] = {}, /) -> Sequence[Sequence[Any]]:
        """Run a query, whatever row factory the user has chosen."""
        cursor = await self._run(statement, values)
        found: Sequence[Sequence[Any]] = await ready(cursor.fetchall())
        return found

    async def _run(self, statement: str, values: Mapping[str, object]) -> Any:
        text, names = _numbered(statement)
        return await self._execute(text, [values[name] for name in names])

    async def run(self, statement: str, values: Sequence[object], /) -> None:
        """Run a statement with parameters ``$1``."""
        await self._execute(statement, values)

    async def _execute(self, statement: str, values: Sequence[object]) -> Any:
        make = self._psycopg.AsyncRawCursor if self.is_async else self._psycopg.RawCursor
        cursor = make(self._connection, row_factory=self._psycopg.rows.tuple_row)
        return await ready(cursor.execute(statement, list(values) or None))

    def reopen(self) -> Opener | None:
        """Connect with the same parameters, in the way that blocks."""
        info = self._connection.info
        # The DSN does not repeat the password.
        return _open_psycopg(self._psycopg.conninfo.make_conninfo(info.dsn, password=info.password or None))


def _open_psycopg(url: str) -> Opener:
    @asynccontextmanager
    async def connect() -> AsyncIterator[Source]:
        import psycopg  # noqa: PLC0415 - optional: it is here when it was asked for
        from psycopg import conninfo  # noqa: PLC0415 - as above

        known = conninfo.conninfo_to_dict(url)
        patience = known.get("connect_timeout") or _PATIENCE
        with closing(psycopg.connect(url, autocommit=True, connect_timeout=int(patience))) as connection:
            yield PsycopgSource(psycopg, connection)

    return Opener(connect)


# --- asyncpg --------------------------------------------------------------------------------------


def asyncpg_source(connection: Any) -> Source | None:
    """Return what speaks to a connection of asyncpg, a pool's too; None if it is none."""
    asyncpg = sys.modules.get("asyncpg")
    if asyncpg is None or not isinstance(connection, asyncpg.Connection):
        return None
    return AsyncpgSource(asyncpg, connection)


class AsyncpgSource(_Postgres):
    """An ``asyncpg.Connection``."""

    is_async = True

    def __init__(self, asyncpg: Any, connection: Any) -> None:
        self._asyncpg = asyncpg
        self._connection = connection
        self._opened: Any = None
        # Not public, but the only place that knows; without them the database must be named to the relay.
        self._address = getattr(connection, "_addr", None)
        self._parameters = getattr(connection, "_params", None)

    @property
    def identity(self) -> str | None:
        """Server, database and user."""
        if self._address is None or self._parameters is None:
            return None
        return _identity(*_server(self._address), self._parameters.database, self._parameters.user)

    def in_transaction(self) -> bool:
        """Whether a transaction is open, also one that has failed."""
        return bool(self._connection.is_in_transaction())

    async def begin(self) -> None:
        """Open a transaction."""
        opened = self._connection.transaction()
        await opened.start()
        self._opened = opened

    async def commit(self) -> None:
        """Commit. Raises ``BadTransactionStateError`` if a statement has failed."""
        try:
            await self._connection.execute("SELECT 1")
        except self._asyncpg.InFailedSQLTransactionError as error:
            await self.rollback()
            raise undone() from error
        opened, self._opened = self._opened, None
        await opened.commit()

    async def rollback(self) -> None:
        """Undo."""
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened.rollback()

    async def execute(self, statement: str, values: Mapping[str, object] = {}, /) -> int:
        """Run a statement; return how many rows it changed."""
        text, names = _numbered(statement)
        tag = str(await self._connection.execute(text, *(values[name] for name in names)))
        count = tag.rpartition(" ")[2]
        return int(count) if count.isdecimal() else -1

    async def rows(self, statement: str, values: Mapping[str, object] = {}, /) -> Sequence[Sequence[Any]]:
        """Run a query."""
        text, names = _numbered(statement)
        found: Sequence[Sequence[Any]] = await self._connection.fetch(text, *(values[name] for name in names))
        return found

    async def run(self, statement: str, values: Sequence[object], /) -> None:
        """Run a statement with parameters ``$1``."""
        await self._connection.execute(statement, *values)

    def reopen(self) -> Opener | None:
        """Connect with the same parameters."""
        if self._address is None or self._parameters is None:
            return None
        host, port = _server(self._address)
        known = self._parameters
        mode = getattr(known.sslmode, "name", "")
        return _open_asyncpg(
            host=host,
            port=port,
            user=known.user,
            password=known.password,
            database=known.database,
            ssl=mode if mode in _LAX_TLS else known.ssl,
            server_settings=known.server_settings,
        )


def _server(address: Any) -> tuple[str, int]:
    """Return host and port; of a socket its folder, and the number at its end."""
    if isinstance(address, str):
        return str(PurePath(address).parent), int(address.rpartition(".")[2])
    return str(address[0]), int(address[1])


def _open_asyncpg(*arguments: Any, **parameters: Any) -> Opener:
    @asynccontextmanager
    async def connect() -> AsyncIterator[Source]:
        import asyncpg  # noqa: PLC0415 - optional: here when it was asked for

        connection = await asyncpg.connect(*arguments, **parameters)
        try:
            yield AsyncpgSource(asyncpg, connection)
        finally:
            await connection.close()

    return Opener(connect, is_async=True)


# --- By URL ---------------------------------------------------------------------------------------


def open_url(url: str) -> tuple[str, Opener]:
    """Return the identity of the database that a ``postgresql://`` URL names, and how to connect to it.

    psycopg is used where it is installed, else asyncpg.

    Raises:
        MissingExtra: Neither is installed.
        ConfigurationError: The URL is malformed.
    """
    try:
        import psycopg  # noqa: PLC0415 - optional: only for who uses it
        from psycopg import conninfo  # noqa: PLC0415 - as above
    except ImportError:
        try:
            import asyncpg  # noqa: F401, PLC0415 - as above
        except ImportError:
            raise MissingExtra("postgres", "an outbox in PostgreSQL") from None
        return _identity_of(url), _open_asyncpg(url)
    try:
        known = conninfo.conninfo_to_dict(url)
    except psycopg.Error as error:
        # Without its cause, which may quote the URL.
        raise ConfigurationError(
            f"the outbox's URL is no URL of PostgreSQL ({describe(url, error)}); write postgresql://user@host/name"
        ) from None
    return _identity(known.get("host"), known.get("port"), known.get("dbname"), known.get("user")), _open_psycopg(url)


def _identity_of(url: str) -> str:
    """Return the identity of the database that a URL names, by the URL alone. It is logged, and has no password."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    user, _, place = parts.netloc.rpartition("@")
    host, _, port = place.rpartition(":") if place.rpartition(":")[2].isdigit() else (place, "", "")
    return _identity(
        query.get("host") or unquote(host),
        query.get("port") or port,
        query.get("dbname") or query.get("database") or unquote(parts.path.lstrip("/")),
        query.get("user") or unquote(user.partition(":")[0]),
    )
