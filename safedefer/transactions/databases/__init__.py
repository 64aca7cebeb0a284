"""The user's own connection, whichever library it is of: begin, execute, commit, and how to open another.

No library is imported here that the user has not imported.
"""

from __future__ import annotations

import os
import sys
from typing import Final
from urllib.parse import urlsplit

from safedefer.errors import BadTransactionStateError
from safedefer.transactions.databases import postgres, sqlalchemy, sqlite
from safedefer.transactions.databases.base import AwaitedConnection, Opener, Source, run_now
from safedefer.transactions.databases.django import django_source

__all__ = ["AwaitedConnection", "Opener", "Source", "opener_of", "run_now", "source_of"]


def source_of(connection: object) -> Source:
    """Return what speaks to a connection of sqlite3, apsw, psycopg, asyncpg, SQLAlchemy or Django.

    Raises:
        BadTransactionStateError: It is none of these, or its database cannot do it.
    """
    for find in _KINDS:
        source = find(connection)
        if source is not None:
            return source
    psycopg2 = sys.modules.get("psycopg2")
    if psycopg2 is not None and isinstance(connection, psycopg2.extensions.connection):
        raise BadTransactionStateError(
            "a connection of psycopg2 is known here only below SQLAlchemy; use psycopg 3 (pip install 'psycopg[binary]')"
        )
    raise BadTransactionStateError(
        f"a {type(connection).__name__} is no connection that is known here; pass one of psycopg 3, asyncpg, sqlite3 or "
        "apsw, a SQLAlchemy connection or session, or Django's connection (of a pool or an engine, one that it gave)"
    )


_KINDS: Final = (
    sqlite.sqlite3_source,
    sqlite.apsw_source,
    postgres.psycopg_source,
    postgres.asyncpg_source,
    sqlalchemy.sqlalchemy_source,
    django_source,
)


def opener_of(url: str) -> tuple[str, Opener]:
    """Return the identity of the database that a URL names, and how to connect to it.

    ``sqlite:///shop.db`` is opened with Python's own sqlite3, ``postgresql://user@host/shop`` with psycopg 3 or
    asyncpg; other URLs are SQLAlchemy's.

    Raises:
        ConfigurationError: The URL is not understood, or what it needs is not installed.
    """
    if url.startswith("sqlite:///"):
        path = os.path.realpath(url.removeprefix("sqlite:///"))
        return path, sqlite.open_file(path)
    if urlsplit(url).scheme in {"postgresql", "postgres"}:
        return postgres.open_url(url)
    return sqlalchemy.open_url(url)
