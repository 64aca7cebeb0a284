"""pgqueuer's own statements (enqueue, dequeue: which job is next; retry, log) on its tables, with parts of ours put into them.

pgqueuer builds its SQL at run time. ``_with_ours`` replaces one known fragment of a statement, and refuses a pgqueuer
whose statement does not contain that fragment exactly once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import asyncpg
from pgqueuer._version import version as pgqueuer_version
from pgqueuer.adapters.persistence.qb import QueryQueueBuilder
from pgqueuer.domain.settings import DBSettings, Durability
from pgqueuer.types import Channel, QueueEntrypoint, QueueManagerId

from safedefer.errors import ConfigurationError
from safedefer.queues.postgres.statements import SQL, interval

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safedefer.queues.postgres.connection import Connection

SCHEMA: Final = "safedefer"

#: Every name is given explicitly: pgqueuer's own defaults come from PGQUEUER_* variables, which are the user's.
NAMES: Final[DBSettings] = DBSettings(
    prefix="",
    db_schema=SCHEMA,
    channel=Channel("ch_pgqueuer"),
    function="fn_pgqueuer_changed",
    statistics_table="pgqueuer_statistics",
    queue_status_type="pgqueuer_status",
    queue_table="pgqueuer",
    queue_table_log="pgqueuer_log",
    trigger="tg_pgqueuer_changed",
    schedules_table="pgqueuer_schedules",
    durability=Durability.durable,
    widen_id=True,
)

#: The first minor version whose SQL this release was not tested with.
_UNTESTED: Final = (1, 7)

UNWANTED_INDEX: Final = f"{NAMES.queue_table}_priority_id_id1_idx"
"""Dropped by ``migrate``: the planner prefers it to the index that begins with the entrypoint (``drop_tempting_index``)."""

_SLOT_INDEX: Final = f"{NAMES.queue_table}_picked_slot_idx"

#: The entrypoints in pgqueuer's INSERT. ``admit`` takes their place: it checks names, keys and blobs, and returns them.
_ENTRYPOINTS: Final = "$2::text[]"
#: The last SELECT of pgqueuer's dequeue statement, and the columns of it that a lease needs.
_PICKED: Final = "SELECT * FROM claimed"
_NEEDED: Final = SQL["claimed"].rstrip(";")
#: More of the same statement, for ``pick_free``: its begin, its end, and where it names the queues to pick from ($2).
_BEGIN: Final = "WITH\n"
_ORDERED: Final = f"{_PICKED} ORDER BY priority DESC, id ASC;"
_QUEUES: Final = "SELECT UNNEST($2::text[]) AS entrypoint"
_STALE_QUEUES: Final = "stale.entrypoint = ANY($2)"
#: What the retry of a job adds to, in 32 bits.
_COUNTED: Final = "attempts = attempts + 1"
#: The last condition of the jobs that pgqueuer picks again because their heartbeat is old. It picks them whatever the cap.
_STALE: Final = "AND stale.execute_after < NOW()"


class Statements:
    """pgqueuer's statements.

    Attributes:
        enqueue: Admits and inserts jobs. Parameters: see ``enqueue.enqueue_values``.
        retry: Queues a picked job again: id, delay, traceback.
        log: Ends jobs: arrays of id, status, traceback.
    """

    def __init__(self) -> None:
        self._builder = QueryQueueBuilder(settings=NAMES)
        counted = "attempts = least(attempts, 2147483646) + 1"
        self.retry: str = _with_ours(self._builder.build_retry_job_query(), {_COUNTED: counted})
        self.log: str = self._builder.build_log_job_query()
        # One statement for admission and insertion: one round trip, and atomic without BEGIN.
        self.enqueue: str = _with_ours(self._builder.build_enqueue_query(), {_ENTRYPOINTS: SQL["admit"]})
        self._pick_free = self._build_pick_free()

    async def pick_free(
        self, connection: Connection, queues: Sequence[str] | None, *, limit: int, seconds: float, manager: UUID
    ) -> Sequence[Mapping[str, Any]]:
        """Return the row of ``look``, and pick due jobs at once unless something is to be done before: see ``available``.

        Args:
            connection: Where.
            queues: Only these; None: all.
            limit: Jobs at most.
            seconds: A picked job without a heartbeat for so long is picked again.
            manager: pgqueuer's ``queue_manager_id``.
        """
        return await connection.fetch(self._pick_free, limit, queues, manager, interval(seconds))

    def _build_pick_free(self) -> str:
        dequeue = self._dequeue({"default": 0}, limit=1, seconds=1.0, manager=UUID(int=0)).sql
        parts = {
            _BEGIN: f"WITH seen AS MATERIALIZED (\n{SQL['look'].rstrip(';')}\n),\n",
            _QUEUES: SQL["available"].rstrip(";"),
            _STALE_QUEUES: "stale.entrypoint = ANY (ARRAY (SELECT entrypoint FROM available))",
            _ORDERED: SQL["look_and_claimed"].replace("FROM needed", f"FROM (\n{_NEEDED}\n) AS needed"),
        }
        return _with_ours(dequeue, parts)

    def _dequeue(self, queues: Mapping[str, int], *, limit: int, seconds: float, manager: UUID) -> Any:
        return self._builder.build_dequeue_query(
            batch_size=limit,
            entrypoints=[QueueEntrypoint(queue) for queue in queues],
            concurrency_limits=list(queues.values()),
            queue_manager_id=QueueManagerId(manager),
            global_concurrency_limit=None,
            heartbeat_timeout=interval(seconds),
        )

    async def dequeue(
        self, connection: Connection, queues: Mapping[str, int], *, limit: int, seconds: float, manager: UUID
    ) -> Sequence[Mapping[str, Any]]:
        """Pick due jobs.

        Args:
            connection: Where.
            queues: The cap on concurrency of each queue to pick from; 0 is none.
            limit: Jobs at most.
            seconds: A picked job without a heartbeat for so long is picked again.
            manager: pgqueuer's ``queue_manager_id``.
        """
        query = self._dequeue(queues, limit=limit, seconds=seconds, manager=manager)
        statement = _with_ours(query.sql, {_PICKED: _NEEDED})
        if not any(queues.values()):
            return await connection.fetch(statement, *query.args)
        within = f"{_STALE} AND stale.id <> ALL (${len(query.args) + 1}::bigint[])"
        statement = _with_ours(statement, {_STALE: within})
        try:
            async with connection.transaction():
                over = await connection.fetch(SQL["over_cap"], list(queues), list(queues.values()), interval(seconds))
                return await connection.fetch(statement, *query.args, [row["id"] for row in over])
        except asyncpg.UniqueViolationError as error:
            if getattr(error, "constraint_name", None) != _SLOT_INDEX:
                raise
        except asyncpg.DeadlockDetectedError:
            pass
        return ()  # another dispatcher took the last slot under the cap


def untested(version: str) -> str | None:
    """Return a warning if a pgqueuer is newer than those that this release was tested with; else None."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if numbers < _UNTESTED:
        return None
    first = ".".join(map(str, _UNTESTED))
    return f"pgqueuer {version} is newer than this safedefer was tested with; install 'pgqueuer<{first}', or upgrade safedefer"


def _with_ours(statement: str, parts: Mapping[str, str]) -> str:
    """Return a statement of pgqueuer's with fragments replaced: ``parts`` maps theirs to ours."""
    for theirs, ours in parts.items():
        if statement.count(theirs) != 1:
            raise ConfigurationError(
                f"pgqueuer {pgqueuer_version} has statements that are not known here; install an older one"
            )
        statement = statement.replace(theirs, ours)
    return statement


STATEMENTS: Final = Statements()
