"""What a PostgreSQL queue does as the store of a push engine: keeps values, buries what is no job, hands waiting tasks over."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from safedefer.queues.base import BLOB_KEY, BlobsFull, QueuedTask
from safedefer.queues.postgres.ends import free_unique
from safedefer.queues.postgres.pgqueuer import STATEMENTS
from safedefer.queues.postgres.rows import Hold, ledger_keys
from safedefer.queues.postgres.statements import SQL, changed_rows, to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safedefer.queues.base import Lease
    from safedefer.queues.postgres.connection import Connection
    from safedefer.queues.postgres.store import PostgresStore


class PostgresKeep:
    """A ``Keep`` in the queue's database. Every method may raise ``QueueUnavailable``."""

    def __init__(self, store: PostgresStore, limit: int) -> None:
        self._store = store
        self._limit = limit

    def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return the values of those keys that have one."""
        rows = self._store.run(lambda connection: connection.fetch(SQL["kept_get"], list(keys)), idempotent=True)
        return {row["key"]: bytes(row["value"]) for row in rows}

    def put(self, key: str, value: bytes, *, expires: int) -> None:
        """Store a value until a time."""

        async def action(connection: Connection) -> None:
            if key.startswith(BLOB_KEY):
                (total,) = await connection.fetch(SQL["kept_blob_bytes"], key)
                if total["bytes"] + len(value) > self._limit:
                    raise BlobsFull(self._limit)
            await connection.execute(SQL["kept_put"], key, expires, value)

        self._store.run(action)

    def delete(self, keys: Sequence[str], /) -> None:
        """Delete values."""
        self._store.run(lambda connection: connection.execute(SQL["kept_delete"], list(keys)))


async def bury(
    connection: Connection, *, task: QueuedTask, reason: str | None, attempts: int, now: float, verified: bool
) -> bool:
    """Make a dead letter of a task that is no job, in a transaction."""
    values = (
        task.id, task.queue, task.name, task.callable_name, task.url, task.target, task.audience,
        json.dumps(dict(task.headers)), json.dumps(dict(task.retry_options)), task.eta, task.created, task.expires,
        attempts, reason, now, task.token, verified,
    )  # fmt: skip
    if not changed_rows(await connection.execute(SQL["dead_bury"], *values)):
        return False
    await connection.execute(SQL["attempts_have_letter"], task.id)
    return True


async def hand_over(connection: Connection, *, leases: Sequence[Lease]) -> list[bool]:
    """Forget leased tasks, in a transaction; False for each lost lease."""
    holds = [Hold.read(lease.owner) for lease in leases]
    named = [
        {"id": hold.job, "manager": hold.manager, "updated": hold.updated, "audience": "", "task_id": ""}
        for hold in holds
        if hold is not None
    ]
    ours = {row["id"] for row in await connection.fetch(SQL["held"], to_json(named))}
    results = [hold is not None and hold.job in ours for hold in holds]
    tasks = [lease.task for lease, held in zip(leases, results, strict=True) if held]
    if not tasks:
        return results
    jobs = sorted(ours)
    await connection.execute(STATEMENTS.log, jobs, ["deleted"] * len(jobs), [None] * len(jobs))
    await connection.execute(SQL["progress_delete"], jobs)
    if blobs := [task.blob_id for task in tasks if task.blob_id is not None]:
        await connection.execute(SQL["blobs_drop"], blobs)
    if unique := [task for task in tasks if task.unique_key is not None]:
        await free_unique(connection, unique)
    if names := [(task.queue, task.name) for task in tasks if task.name is not None]:
        await connection.execute(SQL["names_free"], [queue for queue, _ in names], [name for _, name in names])
    await connection.execute(SQL["ledger_settle_retry"], ledger_keys(tasks))
    await connection.execute(SQL["attempts_become_stray"], [task.id for task in tasks])
    return results
