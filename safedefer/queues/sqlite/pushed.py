"""What a SQLite queue does as the store of a push engine: keeps values, buries what has no row, hands waiting tasks over."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

from safedefer.queues import rules
from safedefer.queues.base import BLOB_KEY, BlobsFull, QueuedTask
from safedefer.queues.sqlite.connection import SQL, Handle
from safedefer.queues.sqlite.ledger import finish_all
from safedefer.queues.sqlite.operations import standing
from safedefer.queues.sqlite.repair import number
from safedefer.queues.sqlite.rows import task_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import apsw

    from safedefer.ledger import Execution, RunEnd
    from safedefer.queues.base import Lease
    from safedefer.queues.sqlite.writer import Writer


class SQLiteKeep:
    """A ``Keep`` in the queue's file."""

    def __init__(self, writer: Writer, reader: Handle, limit: int) -> None:
        self._writer = writer
        self._reader = reader
        self._limit = limit

    def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return the values of those keys that have one."""
        with self._reader.use() as connection:
            found = connection.execute(SQL["kept_get"], {"keys": json.dumps(list(keys))}).fetchall()
        return {str(key): value for key, value in found if isinstance(value, bytes)}

    def put(self, key: str, value: bytes, *, expires: int) -> None:
        """Store a value until a time."""

        def action(connection: apsw.Connection) -> None:
            if key.startswith(BLOB_KEY):
                others = number(connection.execute(SQL["kept_blob_bytes"], {"key": key}).get) or 0
                if others + len(value) > self._limit:
                    raise BlobsFull(self._limit)
            connection.execute(SQL["kept_put"], {"key": key, "value": value, "expires": expires})

        self._writer.run(action)

    def delete(self, keys: Sequence[str], /) -> None:
        """Delete values."""
        self._writer.run(
            lambda connection: connection.execute(SQL["kept_delete"], {"keys": json.dumps(list(keys))}).close()
        )


class SQLitePushedCalls:
    """``PushedCalls`` that the writer's thread answers."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    async def begin_first(
        self,
        executions: Sequence[Execution],
        keys: Sequence[Sequence[str]],
        *,
        now: float,
        lease: float,
        synced: bool,  # noqa: ARG002  # the process that runs the task ends with the machine, as its begin
    ) -> Sequence[Mapping[str, bytes] | None]:
        """Admit runs of tasks that the ledger does not know."""
        action = partial(begin_first, executions=executions, keys=keys, until=now + lease)
        return await self._writer.call(action, durable=False)

    async def finish_many(self, ends: Sequence[RunEnd], *, synced: bool) -> Sequence[bool]:
        """Store the ends of runs."""
        return await self._writer.call(partial(finish_all, ends=ends), durable=synced)


def begin_first(
    connection: apsw.Connection, executions: Sequence[Execution], keys: Sequence[Sequence[str]], *, until: float
) -> list[dict[str, bytes] | None]:
    """Admit runs of tasks that the ledger does not know, within a transaction."""
    found: list[dict[str, bytes] | None] = []
    for execution, names in zip(executions, keys, strict=True):
        connection.execute(SQL["ledger_begin_first"], (*execution, until))
        if not connection.changes():
            found.append(None)
            continue
        rows = connection.execute(SQL["kept_get"], {"keys": json.dumps(list(names))})
        found.append({str(key): value for key, value in rows if isinstance(value, bytes)})
    return found


def prune(connection: apsw.Connection, *, now: float, limit: int) -> int:
    """Delete values whose time is over, within a transaction; returns how many."""
    connection.execute(SQL["kept_prune"], {"before": now - rules.LEDGER_LEEWAY, "limit": limit})
    return connection.changes()


def bury(
    connection: apsw.Connection, task: QueuedTask, *, reason: str | None, attempts: int, now: float, verified: bool
) -> bool:
    """Make a dead letter of a task that has no row, within a transaction."""
    values = {**task_values(task), "reason": reason, "attempts": attempts, "now": now, "verified": int(verified)}
    connection.execute(SQL["dead_bury"], values)
    if not connection.changes():
        return False
    connection.execute(SQL["attempts_have_letter"], {"id": task.id})
    return True


def hand_over(connection: apsw.Connection, leases: Sequence[Lease]) -> list[bool]:
    """Forget leased tasks, within a transaction; False for each lost lease."""
    return [_forget(connection, lease) for lease in leases]


def _forget(connection: apsw.Connection, lease: Lease) -> bool:
    row = standing(connection, lease.task.id)
    if row is None or row.owner != lease.owner:
        return False
    if row.name is not None:
        connection.execute(SQL["name_free"], {"queue": row.queue, "name": row.name})
    connection.execute(SQL["task_delete"], (row.seq,))
    connection.execute(SQL["ledger_settle_retry"], {"audience": row.audience, "task_id": lease.task.id})
    connection.execute(SQL["attempts_become_stray"], {"id": lease.task.id})
    return True
