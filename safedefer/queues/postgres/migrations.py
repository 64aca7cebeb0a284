"""Migrations: creates the queue's tables or brings them up to date, and checks that they fit this release."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import TYPE_CHECKING, Any, Final

import asyncpg
from pgqueuer._version import version as pgqueuer_version
from pgqueuer.adapters.persistence.qb import QueryBuilderEnvironment, QueryQueueBuilder, QuerySchedulerBuilder
from pgqueuer.db import AsyncpgDriver
from pgqueuer.queries import Queries

from safedefer.errors import ConfigurationError, QueueUnavailable
from safedefer.queues.addresses import check_url, describe, place
from safedefer.queues.postgres import errors
from safedefer.queues.postgres.errors import BROKEN, CONNECT_SECONDS, REMEDY_MIGRATE, remedy_for
from safedefer.queues.postgres.pgqueuer import NAMES, SCHEMA, UNWANTED_INDEX, untested
from safedefer.queues.postgres.statements import SQL

if TYPE_CHECKING:
    from collections.abc import Iterable

_log: Final = logging.getLogger("safedefer")

MIGRATIONS: Final = ("migration_1", "migration_2", "migration_3", "migration_4", "migration_5")
"""Step n brings the tables of safedefer from version n - 1 to n. Steps are appended, never edited."""

#: Key of the advisory lock that serializes migrations.
_MIGRATION_LOCK: Final = 0x5AFE_DEFE
#: Seconds that a migration waits for another one, or for whoever else holds a lock: any role of the database can take that one.
_LOCK_SECONDS: Final = 60
#: The length of a lease of a database in which no dispatcher has noted its own, and the longest to believe.
_LEASE_SECONDS: Final = 60.0
_MOST_LEASE_SECONDS: Final = 7 * 86_400.0


def migrate(dsn: str) -> list[str]:
    """Create the tables of a database, or bring them up to date; returns a line for each step done.

    Raises:
        ConfigurationError: The URL is malformed, or the schema is another role's.
        QueueUnavailable: The database is not there, its user may not make tables, or a lock did not become free.
    """
    check_url(dsn)
    try:
        return asyncio.run(_migrate(dsn))
    except asyncpg.LockNotAvailableError as error:
        raise QueueUnavailable(
            f"the database at {place(dsn)} was not migrated: a lock was not free for {_LOCK_SECONDS} s; see in pg_locks who holds "
            "it, and migrate again"
        ) from error
    except BROKEN as error:
        raise QueueUnavailable(
            f"the database at {place(dsn)} was not migrated ({describe(dsn, error)}); "
            + remedy_for(error, "see that it runs, and that this user may create a schema in it")
        ) from error


async def check_schema(connection: Any) -> tuple[str, float]:
    """Return the marker and the lease seconds of a database.

    Raises:
        ConfigurationError: The database was not migrated, or by another release, or the schema is another role's.
    """
    await _check_owner(connection)
    if (warning := untested(pgqueuer_version)) is not None:
        _log.warning(warning)
    if not (await connection.fetchrow(SQL["has_settings"]))["found"]:
        raise ConfigurationError(f"the queue's tables are not in this database; {REMEDY_MIGRATE}")
    settings = await connection.fetchrow(SQL["settings"])
    if settings is None or settings["version"] < len(MIGRATIONS):
        raise ConfigurationError(f"the queue's tables are of an older safedefer; {REMEDY_MIGRATE}")
    if settings["version"] > len(MIGRATIONS):
        raise ConfigurationError(
            f"the queue's tables have version {settings['version']}, and this safedefer knows versions up to "
            f"{len(MIGRATIONS)}; upgrade safedefer"
        )
    if settings["pgqueuer"] != pgqueuer_version:
        plan = await _queries(connection).plan_upgrade()
        if _wanted(plan.statements):
            raise ConfigurationError(
                f"the tables are of pgqueuer {ascii(settings['pgqueuer'])[1:-1]}; {REMEDY_MIGRATE}"
            )
    seconds = settings["lease_seconds"]
    # Somebody else may have written what is no number of seconds, or endless: those who only look would wait for ever.
    return settings["marker"], seconds if 0 < seconds <= _MOST_LEASE_SECONDS else _LEASE_SECONDS


async def _check_owner(connection: Any) -> None:
    """Refuse a schema in which another role could have this one run its code. Before anything in it is used."""
    found = await connection.fetchrow(SQL["foreign"])
    if found is None:
        return
    what = (
        "the schema safedefer"
        if found["kind"] == "schema"
        else f"the {found['kind']} {found['name']!a} in the schema safedefer"
    )
    raise ConfigurationError(
        f"{what} belongs to {found['owner']!a}, whose code it could run as {found['me']!a}; if it is the queue's, give all of it to "
        "the owner of the database (REASSIGN OWNED BY), else drop it and run `safedefer migrate`"
    )


def _queries(connection: Any) -> Queries:
    """Return pgqueuer's own interface to its tables in our schema."""
    return Queries(
        AsyncpgDriver(connection),
        qbe=QueryBuilderEnvironment(settings=NAMES),
        qbq=QueryQueueBuilder(settings=NAMES),
        qbs=QuerySchedulerBuilder(settings=NAMES),
    )


def _wanted(statements: Iterable[str]) -> list[str]:
    """Return the statements of a pgqueuer upgrade that apply here: all but the index that ``migrate`` drops."""
    return [statement for statement in statements if UNWANTED_INDEX not in statement]


async def _migrate(dsn: str) -> list[str]:
    connection = await asyncpg.connect(
        dsn,
        timeout=CONNECT_SECONDS,
        server_settings={
            "application_name": "safedefer",
            "search_path": errors.SEARCH_PATH,
            "lock_timeout": f"{_LOCK_SECONDS}s",
        },
    )
    done = []
    try:
        # Concurrent migrations wait here, for each other.
        await connection.execute("SELECT pg_catalog.pg_advisory_lock(CAST($1 AS pg_catalog.int8))", _MIGRATION_LOCK)
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        await _check_owner(connection)
        queries = _queries(connection)
        if await queries.schema_is_installed():
            if wanted := _wanted((await queries.plan_upgrade()).statements):
                await queries.apply_upgrade()
            done += [f"pgqueuer: {statement}" for statement in wanted]
        else:
            await queries.install(create_schema=False)
            await queries.optimize_autovacuum()
            done.append(f"pgqueuer: installed {pgqueuer_version}")
        await connection.execute(SQL["drop_tempting_index"])
        settings = None
        if (await connection.fetchrow(SQL["has_settings"]))["found"]:
            settings = await connection.fetchrow(SQL["settings"])
        at = 0 if settings is None else settings["version"]
        for number, name in enumerate(MIGRATIONS[at:], start=at + 1):
            async with connection.transaction():
                await connection.execute(SQL[name])
                if number == 1:
                    await connection.execute(SQL["settings_insert"], secrets.token_hex(16))
                await connection.execute(SQL["settings_version"], number, pgqueuer_version)
            done.append(f"safedefer: {name}")
        await connection.execute(SQL["settings_version"], max(at, len(MIGRATIONS)), pgqueuer_version)
    finally:
        connection.terminate()
    return done
