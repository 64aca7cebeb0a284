"""The user's own connection, whichever library it is of: begin, execute, commit, and how to open another.

A library is imported here, and so is the module that speaks to it, when there is a connection of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import unquote

from safedefer.errors import BadTransactionStateError
from safedefer.queues.addresses import check_url
from safedefer.transactions.ambient import is_ndb
from safedefer.transactions.databases.base import AwaitedConnection, Opener, Source, run_now

__all__ = ["AwaitedConnection", "Opener", "Source", "opener_of", "run_now", "source_of", "split_schema"]

_SCHEMA: Final = r"(?<=[?&])schema=([^&#]*)&?"


def _sqlite3(connection: object) -> Source | None:
    from safedefer.transactions.databases import sqlite  # noqa: PLC0415 - see above

    return sqlite.sqlite3_source(connection)


def _apsw(connection: object) -> Source | None:
    from safedefer.transactions.databases import sqlite  # noqa: PLC0415 - see above

    return sqlite.apsw_source(connection)


def _psycopg(connection: object) -> Source | None:
    from safedefer.transactions.databases import postgres  # noqa: PLC0415 - see above

    return postgres.psycopg_source(connection)


def _asyncpg(connection: object) -> Source | None:
    from safedefer.transactions.databases import postgres  # noqa: PLC0415 - see above

    return postgres.asyncpg_source(connection)


def _sqlalchemy(connection: object) -> Source | None:
    from safedefer.transactions.databases import sqlalchemy  # noqa: PLC0415 - see above

    return sqlalchemy.sqlalchemy_source(connection)


def _django(connection: object) -> Source | None:
    from safedefer.transactions.databases import django  # noqa: PLC0415 - see above

    return django.django_source(connection)


def _psycopg2(_: object) -> Source | None:
    raise BadTransactionStateError(
        "a connection of psycopg2 is known here only below SQLAlchemy; use psycopg 3 (pip install 'psycopg[binary]')"
    )


#: By the package of the connection's class, or of one that it inherits from. Django's may inherit from a driver's.
_KINDS: Final[Mapping[str, Callable[[object], Source | None]]] = {
    "django": _django,
    "sqlalchemy": _sqlalchemy,
    "sqlite3": _sqlite3,
    "apsw": _apsw,
    "psycopg": _psycopg,
    "asyncpg": _asyncpg,
    "psycopg2": _psycopg2,
}


def source_of(connection: object) -> Source:
    """Return what speaks to a connection of sqlite3, apsw, psycopg, asyncpg, SQLAlchemy or Django.

    Raises:
        BadTransactionStateError: It is none of these, or its database cannot do it.
    """
    if is_ndb(connection):
        raise BadTransactionStateError(
            "app.once needs a SQL database; in Datastore, look inside the transaction of the effect for an entity whose key "
            "names the effect, and put that entity if it is not there"
        )
    # The class that it says it has, too: a proxy may stand for a connection.
    classes = (*type(connection).__mro__, *connection.__class__.__mro__)
    packages = {str(each.__module__).partition(".")[0] for each in classes}
    for package, find in _KINDS.items():
        if package in packages and (source := find(connection)) is not None:
            return source
    raise BadTransactionStateError(
        f"a {type(connection).__name__} is no connection that is known here; pass one of psycopg 3, asyncpg, sqlite3 or "
        "apsw, a SQLAlchemy connection or session, Django's connection (of a pool or an engine, one that it gave), or the "
        "module google.cloud.ndb"
    )


def split_schema(url: str) -> tuple[str, str | None]:
    """Return a URL without its parameter ``schema``, and the schema that it names.

    It is ours: ``postgresql://shop@db/shop?schema=sales`` is the outbox in the schema ``sales``. A SQLite file has none.
    """
    found = re.search(_SCHEMA, url)
    if found is None or url.startswith("sqlite"):
        return url, None
    return (url[: found.start()] + url[found.end() :]).rstrip("?&"), unquote(found[1]) or None


def opener_of(url: str) -> tuple[str, Opener]:
    """Return the identity of the database that a URL names, and how to connect to it.

    ``sqlite:///shop.db`` is opened with Python's own sqlite3, ``postgresql://user@host/shop`` with psycopg 3 or
    asyncpg; other URLs are SQLAlchemy's.

    Raises:
        ConfigurationError: The URL is not understood, or what it needs is not installed.
    """
    if url.startswith("sqlite:///"):
        from safedefer.transactions.databases import sqlite  # noqa: PLC0415 - see above

        path = os.path.realpath(url.removeprefix("sqlite:///"))
        return path, sqlite.open_file(path)
    if url.partition(":")[0].lower() in {"postgresql", "postgres"}:
        from safedefer.transactions.databases import postgres  # noqa: PLC0415 - see above

        return postgres.open_url(check_url(url))
    from safedefer.transactions.databases import sqlalchemy  # noqa: PLC0415 - see above

    return sqlalchemy.open_url(url)
