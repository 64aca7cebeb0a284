"""Errors of the queue's database, from asyncpg or psycopg, as the errors of safedefer."""

from __future__ import annotations

import asyncio
from typing import Final

import asyncpg

from safedefer.errors import ConfigurationError, QueueUnavailable, TaskAlreadyExistsError, TombstonedTaskError
from safedefer.queues.addresses import describe, place
from safedefer.queues.base import AlreadyWaiting, BlobsFull, BlobTaken

REMEDY_MIGRATE: Final = "run `safedefer migrate`"

CONNECT_SECONDS: Final = 10
"""Timeout of a connection attempt, and of running statements when the queue is closed."""

SEARCH_PATH: Final = "safedefer"
"""``search_path`` of all connections of the queue; PostgreSQL looks into ``pg_catalog`` before it.

In a schema such as ``public`` another role may have made functions or operators whose types fit better than those of
``pg_catalog``. They would run as the role of the queue.
"""

BROKEN: Final = (
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    # asyncpg raises this one for a connection that ends between two protocol messages.
    asyncpg.InternalClientError,
    asyncio.TimeoutError,
    TimeoutError,
)
"""Exceptions that an asyncpg call raises when the statement, the connection or the server fails."""

#: Prefixes of the SQLSTATEs that end a connection: connection errors, shutdown of the server, idle transaction timeout.
_GONE: Final = ("08", "57P", "25P03")

#: What to do about some SQLSTATEs: who may not connect, a database that is not there, a full disk of the server, no connection
#: left, a transaction that may only read.
_REMEDIES: Final = {
    "28000": "correct the user in its URL, or have it admit this user from here (pg_hba.conf)",
    "28P01": "correct the user and the password in its URL",
    "3D000": "correct the database in its URL, or create it",
    "53100": "its disk is full; free some space and try again",
    "53300": "no connection is left; raise its limit (max_connections), or run fewer processes",
    "25006": "it takes no writes; name the primary server, not a standby, or set default_transaction_read_only off",
}

#: What a role needs that did not make the tables (SQLSTATE 42501).
_RIGHTS: Final = "give this role its rights on the schema safedefer, or use the role that ran `safedefer migrate`"

#: Errors that the values of a row cause: out of range, in the way of another row, too long for an index.
_OF_VALUES: Final = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.ProgramLimitExceededError)


def is_of_a_value(error: BaseException) -> bool:
    """Whether a value of a row caused an error: that of the database, or what ``Pools.run`` made of it."""
    return isinstance(error, _OF_VALUES) or isinstance(error.__cause__, _OF_VALUES)


def remedy_for(error: BaseException, otherwise: str) -> str:
    """Return what to do about an error of the server that any statement may meet, and ``otherwise`` about others."""
    return _REMEDIES.get(getattr(error, "sqlstate", None) or "", otherwise)


def failure(dsn: str, error: BaseException, *, in_doubt: bool = False) -> QueueUnavailable:
    """Return the error of a database that fails; ``in_doubt``: the answer to a commit was lost."""
    runs = "see that it runs, that it takes connections from here, and that its disk is not full"
    remedy = _RIGHTS if getattr(error, "sqlstate", None) == "42501" else remedy_for(error, runs)
    if in_doubt:
        remedy += "; whether the tasks were stored is not known: one with a name can be deferred again"
    return QueueUnavailable(f"the queue's database at {place(dsn)} failed ({describe(dsn, error)}); {remedy}")


def closed(dsn: str) -> QueueUnavailable:
    """Return the error of a call on a closed queue."""
    return QueueUnavailable(f"the queue at {place(dsn)} was closed; open a new one")


def is_gone(error: BaseException) -> bool:
    """Whether an error means that the connection is lost. An error without SQLSTATE comes from the driver, so it does."""
    if isinstance(error, TimeoutError):
        return False
    state = getattr(error, "sqlstate", None)
    return state is None or state.startswith(_GONE)


def about(error: BaseException) -> str:
    """Return the DETAIL of a database error: of a refusal, the id, name or number that it names."""
    diagnosis = getattr(error, "diag", None)
    detail = getattr(error, "detail", None) if diagnosis is None else diagnosis.message_detail
    return detail or ""


def refusal(error: BaseException) -> Exception | None:
    """Return the error of safedefer for a database error that our statements raise (SD001 to SD007, missing tables); else None."""
    detail = about(error)
    match getattr(error, "sqlstate", None):
        case "SD001":
            return TaskAlreadyExistsError(f"the task {detail} is in this queue already; enqueue it once")
        case "SD002":
            return TombstonedTaskError(f"the task {detail} ended in this queue; defer it anew, with a new id")
        case "SD003":
            return TaskAlreadyExistsError(
                f"a task named {detail!r} is waiting or running in this queue; choose another name"
            )
        case "SD004":
            return TombstonedTaskError(
                f"a task of this name ended in this queue, and its name is free again in {float(detail):.0f} s; "
                "choose another name"
            )
        case "SD005":
            return AlreadyWaiting(detail)
        case "SD006":
            return BlobTaken(detail)
        case "SD007":
            return BlobsFull(detail)
        case "23505":
            return TaskAlreadyExistsError("a task of this id is in this queue already; enqueue it once")
        case "3F000" | "42P01" | "42883":
            return ConfigurationError(f"the queue's tables are not in this database; {REMEDY_MIGRATE}")
    return None
