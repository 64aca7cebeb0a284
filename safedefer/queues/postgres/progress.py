"""Progress: the counters of tasks whose first delivery was not the last (table ``progress``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from safedefer.queues.postgres.statements import SQL, to_json
from safedefer.queues.rules import Counters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safedefer.queues.postgres.connection import Connection

#: The columns, in the order of ``Counters``.
_COLUMNS: Final = (
    "attempts",
    "deliveries",
    "executions",
    "first_attempt",
    "rejections",
    "first_rejection",
    "previous_response",
    "retry_reason",
)


async def read_progress(connection: Connection, jobs: Sequence[int]) -> dict[int, Counters]:
    """Return the counters of jobs by id; a job that was not delivered before has none."""
    rows = await connection.fetch(SQL["progress"], jobs)
    return {row["job_id"]: Counters._make(row[column] for column in _COLUMNS) for row in rows}


async def write_progress(connection: Connection, counters: Mapping[int, Counters]) -> None:
    """Store counters of jobs by id, new ones or in place of those before."""
    rows = [{"job_id": job, **dict(zip(_COLUMNS, counted, strict=True))} for job, counted in counters.items()]
    await connection.execute(SQL["progress_set"], to_json(rows))
