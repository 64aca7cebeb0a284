"""A user of a PostgreSQL database with one table, by every driver: what tests do is written once.

The methods are coroutines; those of a driver that blocks never suspend, and run without a loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from urllib.parse import parse_qs, urlsplit

import asyncpg
import django
import psycopg
import sqlalchemy as sa
from django.conf import settings
from django.db import connections, transaction
from sqlalchemy import orm
from sqlalchemy.ext import asyncio as aio

from safedefer.transactions.databases import run_now


class User:
    """One connection."""

    is_async = False

    def __init__(self, dsn):
        self.dsn = dsn
        self.connection = None
        self._runner = asyncio.Runner() if self.is_async else None

    def run(self, scenario):
        """Run a coroutine to its end."""
        return self._runner.run(scenario) if self._runner else run_now(scenario)

    def start(self):
        self.run(self.open())
        return self

    def stop(self):
        self.run(self.close())
        if self._runner:
            self._runner.close()

    @contextlib.asynccontextmanager
    async def within(self, block):
        """Enter a block of either kind."""
        if self.is_async:
            async with block as value:
                yield value
        else:
            with block as value:
                yield value

    def own(self):
        """Open a transaction of the user's own."""
        return self.within(self.connection.transaction())

    def savepoint(self):
        return self.within(self.connection.transaction())

    async def sql(self, statement):
        await _ready(self.connection.execute(statement))

    async def close(self):
        await _ready(self.connection.close())


async def _ready(value):
    return await value if hasattr(value, "__await__") else value


class Psycopg(User):
    autocommit = False

    async def open(self):
        self.connection = psycopg.connect(self.dsn, autocommit=self.autocommit)


class PsycopgAutocommit(Psycopg):
    autocommit = True


class PsycopgAsync(User):
    is_async = True
    autocommit = False

    async def open(self):
        self.connection = await psycopg.AsyncConnection.connect(self.dsn, autocommit=self.autocommit)


class PsycopgAsyncAutocommit(PsycopgAsync):
    autocommit = True


class Asyncpg(User):
    is_async = True

    async def open(self):
        self.connection = await asyncpg.connect(self.dsn)


class AsyncpgPool(User):
    is_async = True

    async def open(self):
        self._pool = await asyncpg.create_pool(self.dsn, min_size=1, max_size=1)
        self.connection = await self._pool.acquire()

    async def close(self):
        await self._pool.release(self.connection)
        await self._pool.close()


class AlchemyConnection(User):
    driver = "psycopg"
    engine = staticmethod(sa.create_engine)

    async def open(self):
        # The host must come last: SQLAlchemy would take a path for a name.
        self.made = self.engine(self.dsn.replace("postgresql://", f"postgresql+{self.driver}://", 1))
        self.connection = await self.get()

    async def get(self):
        return self.made.connect()

    def own(self):
        return self.within(self.connection.begin())

    def savepoint(self):
        return self.within(self.connection.begin_nested())

    async def sql(self, statement):
        await _ready(self.connection.execute(sa.text(statement)))

    async def close(self):
        await _ready(self.connection.close())
        await _ready(self.made.dispose())


class AlchemySession(AlchemyConnection):
    async def get(self):
        return orm.Session(self.made)


class AlchemyAsyncpgConnection(AlchemyConnection):
    is_async = True
    driver = "asyncpg"
    engine = staticmethod(aio.create_async_engine)

    async def get(self):
        return await self.made.connect()


class AlchemyAsyncpgSession(AlchemyAsyncpgConnection):
    async def get(self):
        return aio.AsyncSession(self.made)


class AlchemyPsycopgSession(AlchemyAsyncpgSession):
    driver = "psycopg"


class Django(User):
    async def open(self):
        configure_django(self.dsn)
        self.connection = connections["default"]

    def own(self):
        return self.within(transaction.atomic())

    savepoint = own

    async def sql(self, statement):
        with self.connection.cursor() as cursor:
            cursor.execute(statement)


def configure_django(dsn):
    """Make Django's default connection one to a database."""
    parts = urlsplit(dsn)
    if not settings.configured:
        settings.configure(DATABASES={})
        django.setup()
    connections.close_all()
    with contextlib.suppress(AttributeError):
        del connections["default"]
    connections.settings["default"] = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.path.removeprefix("/"),
        "USER": parts.username or "",
        "PASSWORD": parts.password or "",
        "HOST": parts.hostname or parse_qs(parts.query).get("host", [""])[0],
        "PORT": parts.port or "",
    }
    connections.configure_settings(connections.settings)


USERS = [
    Psycopg, PsycopgAutocommit, PsycopgAsync, PsycopgAsyncAutocommit, Asyncpg, AsyncpgPool,
    AlchemyConnection, AlchemySession, AlchemyAsyncpgConnection, AlchemyAsyncpgSession, AlchemyPsycopgSession, Django,
]  # fmt: skip
