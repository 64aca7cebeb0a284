"""What a PostgreSQL queue does as the store of a push engine: keeps values, buries what is no job, hands waiting tasks over."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

from safedefer.queues.base import BLOB_KEY, BlobsFull, QueuedTask
from safedefer.queues.postgres.ends import free_unique
from safedefer.queues.postgres.ledger import finish_many
from safedefer.queues.postgres.pgqueuer import STATEMENTS
from safedefer.queues.postgres.rows import Hold, ledger_keys
from safedefer.queues.postgres.statements import SQL, changed_rows, interval, joined, to_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safedefer.ledger import Execution, RunEnd
    from safedefer.queues.base import Lease
    from safedefer.queues.postgres.connection import Connection
    from safedefer.queues.postgres.pools import Pools, Purpose
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


class PostgresPushedCalls:
    """``PushedCalls`` on the connections of one event loop.

    Args:
        store: Opened by the first call: it checks the tables.
        pools: Those of the running loop.
    """

    def __init__(self, store: PostgresStore, pools: Pools) -> None:
        self._store = store
        self._pools = pools

    async def begin_first(
        self,
        executions: Sequence[Execution],
        keys: Sequence[Sequence[str]],
        *,
        now: float,  # noqa: ARG002 - the database's clock
        lease: float,
        synced: bool,
    ) -> Sequence[Mapping[str, bytes] | None]:
        """Admit runs of tasks that the ledger does not know, in one statement."""
        await self._store.open_async()
        action = partial(begin_first, executions=executions, keys=keys, lease=lease)
        # Where the answer of the first call got lost, the second one finds the run: the slower way admits it again.
        return await self._pools.run(action, purpose=_purpose(synced=synced), idempotent=True)

    async def finish_many(self, ends: Sequence[RunEnd], *, synced: bool) -> Sequence[bool]:
        """Store the ends of runs, in one statement where that is possible."""
        await self._store.open_async()
        return await self._pools.run(partial(finish_all, ends=ends), purpose=_purpose(synced=synced))


def _purpose(*, synced: bool) -> Purpose:
    return "durable" if synced else "relaxed"


async def begin_first(
    connection: Connection, *, executions: Sequence[Execution], keys: Sequence[Sequence[str]], lease: float
) -> list[Mapping[str, bytes] | None]:
    """Admit runs of tasks that the ledger does not know; give what is kept under the keys of each."""
    # Lock order: as in the ledger's begin_many. A task that is asked for twice is admitted once.
    asked = sorted(executions, key=lambda run: (run.audience, run.task_id))
    rows = await connection.fetch(
        SQL["ledger_begin_first"],
        *joined(
            [run.audience for run in asked],
            [run.task_id for run in asked],
            [run.digest.hex() for run in asked],
            [run.owner for run in asked],
            [str(run.expires) for run in asked],
        ),
        interval(lease),
        [key for names in keys for key in names],
    )
    owners = {row["owner"] for row in rows if row["key"] is None}
    kept = {row["key"]: bytes(row["value"]) for row in rows if row["key"] is not None}
    return [
        {key: kept[key] for key in names if key in kept} if run.owner in owners else None
        for run, names in zip(executions, keys, strict=True)
    ]


async def finish_all(connection: Connection, *, ends: Sequence[RunEnd]) -> list[bool]:
    """Store the ends of runs; enter those again whose begin a crash of the server has undone."""
    counted = await finish_many(connection, ends)
    if all(counted):
        return counted
    missing = {(run.audience, run.task_id): run for (run, _, _), held in zip(ends, counted, strict=True) if not held}
    rows = [
        {"audience": run.audience, "task_id": run.task_id, "digest": run.digest.hex(), "owner": run.owner, "expires": run.expires}
        for _, run in sorted(missing.items())
    ]  # fmt: skip
    if not changed_rows(await connection.execute(SQL["ledger_restore"], to_json(rows))):
        return counted
    again = iter(await finish_many(connection, [end for end, held in zip(ends, counted, strict=True) if not held]))
    return [held or next(again) for held in counted]


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
