"""Records of attempts: rows of ``attempts``, and the record of a success that the ledger's own row holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from safedefer.ledger import AttemptRecord, EndState
from safedefer.queues.postgres.statements import SQL, to_json
from safedefer.queues.rules import RECORDS_KEPT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safedefer.ledger import Execution
    from safedefer.queues.postgres.connection import Connection

_OK: Final = 200


async def add_records(connection: Connection, records: Sequence[AttemptRecord]) -> None:
    """Store records of attempts."""
    if records:
        await connection.execute(SQL["attempts_insert"], to_json([record_values(record) for record in records]))


async def trim_records(connection: Connection, task_id: str) -> None:
    """Delete all but the newest ``RECORDS_KEPT`` records of a task."""
    await connection.execute(SQL["attempts_trim"], task_id, RECORDS_KEPT)


async def records_of(connection: Connection, task_ids: Sequence[str]) -> dict[str, list[AttemptRecord]]:
    """Return the newest ``RECORDS_KEPT`` records of each task, oldest first."""
    found: dict[str, list[AttemptRecord]] = {}
    for row in await connection.fetch(SQL["attempts_of"], task_ids):
        found.setdefault(row["task_id"], []).append(_record(row))
    return {task_id: records[-RECORDS_KEPT:] for task_id, records in found.items()}


def record_values(record: AttemptRecord) -> dict[str, object]:
    """Return one row of the parameter of ``attempts_insert``."""
    return {
        "task_id": record.task_id,
        "audience": record.audience,
        "started": record.started,
        "ended": record.ended,
        "outcome": record.outcome,
        "status": record.status,
        "reason": record.reason,
        "exception_type": _storable(record.exception_type),
        "traceback": _storable(record.traceback),
    }


def _record(row: Mapping[str, Any]) -> AttemptRecord:
    return AttemptRecord(**dict(row))


def _storable(text: str | None) -> str | None:
    """Return text without NUL and lone surrogates, which PostgreSQL refuses."""
    if text is None:
        return None
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def is_plain_success(record: AttemptRecord, run: Execution) -> bool:
    """Whether ``began`` and ``finished`` of the ledger's row hold all of a success's record, so that it needs no row."""
    return (
        record.outcome == EndState.SUCCEEDED
        and record.status == _OK
        and record.reason is record.exception_type is record.traceback is None
        and record.task_id == run.task_id
        and record.audience == run.audience
    )


async def recorded_success(connection: Connection, *, audience: str, task_id: str) -> list[AttemptRecord]:
    """Return the record of a success that the ledger's row holds; empty if there is none."""
    return [
        AttemptRecord(
            task_id=task_id,
            audience=audience,
            started=row["began"],
            ended=row["finished"],
            outcome=EndState.SUCCEEDED,
            status=_OK,
        )
        for row in await connection.fetch(SQL["ledger_success"], audience, task_id)
    ]
