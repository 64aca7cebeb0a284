"""The ledger, in the queue's PostgreSQL database."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from safedefer.ledger import Admission, AttemptRecord, EndState, Execution, RunEnd
from safedefer.queues.postgres.records import add_records, is_plain_success, record_values, trim_records
from safedefer.queues.postgres.statements import SQL, changed_rows, interval, joined, to_json
from safedefer.queues.rules import RUNNING, Known, admit, leaves_charge

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safedefer.queues.postgres.connection import Connection
    from safedefer.queues.postgres.pools import Pools
    from safedefer.queues.postgres.store import PostgresStore


async def begin_many(connection: Connection, executions: Sequence[Execution], *, lease: float) -> list[Admission]:
    """Admit runs, in one statement where all of them may begin. A run that is asked for twice is admitted once."""
    results: list[Admission | None] = [None] * len(executions)
    pending = list(range(len(executions)))
    while pending:
        # A statement changes a row only once: the second request for an entry goes into the next statement.
        round_: dict[tuple[str, str], int] = {}
        for index in pending:
            round_.setdefault((executions[index].audience, executions[index].task_id), index)
        await _begin_each_once(connection, executions, round_, results, lease=lease)
        pending = [index for index in pending if results[index] is None]
    return [result for result in results if result is not None]


async def _begin_each_once(
    connection: Connection,
    executions: Sequence[Execution],
    which: dict[tuple[str, str], int],
    results: list[Admission | None],
    *,
    lease: float,
) -> None:
    # Lock order: two batches that lock entries in the same order cannot deadlock.
    asked = sorted((executions[index] for index in which.values()), key=_name)
    begun = await connection.execute(
        SQL["ledger_begin"],
        *joined(
            [run.audience for run in asked],
            [run.task_id for run in asked],
            [run.digest.hex() for run in asked],
            [run.owner for run in asked],
            [str(run.expires) for run in asked],
        ),
        interval(lease),
    )
    if changed_rows(begun) == len(asked):
        for index in which.values():
            results[index] = Admission.RUN
        return
    names = to_json([{"audience": audience, "task_id": task_id} for audience, task_id in which])
    for row in await connection.fetch(SQL["ledger_find"], names):
        index = which.pop((row["audience"], row["task_id"]))
        results[index] = _admission(executions[index], row)
    for index in which.values():  # pruned between the two statements: its token has expired
        results[index] = Admission.DUPLICATE


def _admission(run: Execution, row: Mapping[str, Any]) -> Admission:
    """Return what became of a run that ``ledger_begin`` was asked for together with one that it did not admit."""
    known = Known(row["state"], row["uncharged"], row["alive"], row["early"])
    admission = admit(run, digest=bytes(row["digest"]), owner=row["owner"], entry=known)
    ours = known.state == RUNNING and row["owner"] == run.owner
    # Another owner's run ended, or its lease ran out, only after the statement: the task may run the next time.
    return Admission.RUNNING if admission is Admission.RUN and not ours else admission


def _name(run: Execution) -> tuple[str, str]:
    return run.audience, run.task_id


async def finish_many(connection: Connection, ends: Sequence[RunEnd]) -> list[bool]:
    """Store the ends of runs; returns which count. The records are stored in either case."""
    results = [False] * len(ends)
    pending = list(range(len(ends)))
    while pending:
        # A statement changes a row only once: the second end of an entry goes into the next statement.
        round_: dict[tuple[str, str], int] = {}
        for index in pending:
            round_.setdefault(_name(ends[index][0]), index)
        # Lock order: as in begin_many and extend_many.
        places = [round_[name] for name in sorted(round_)]
        for index, counts in zip(places, await _finish_each_once(connection, [ends[i] for i in places]), strict=True):
            results[index] = counts
        pending = [index for index in pending if round_[_name(ends[index][0])] != index]
    return results


async def _finish_each_once(connection: Connection, ends: Sequence[RunEnd]) -> list[bool]:
    if all(state is EndState.SUCCEEDED and is_plain_success(record, run) for run, state, record in ends):
        succeeded = await connection.execute(
            SQL["ledger_succeed"],
            *joined(
                [run.audience for run, _, _ in ends],
                [run.task_id for run, _, _ in ends],
                [run.owner for run, _, _ in ends],
                [repr(record.started) for _, _, record in ends],
                [repr(record.ended) for _, _, record in ends],
            ),
        )
        if changed_rows(succeeded) == len(ends):
            return [True] * len(ends)
    # ledger_finish is idempotent: it counts a success that ledger_succeed has just stored as ours.
    rows: list[dict[str, object]] = []
    records: list[dict[str, object]] = []
    for run, state, record in ends:
        row: dict[str, object] = {
            "audience": run.audience,
            "task_id": run.task_id,
            "owner": run.owner,
            "digest": run.digest.hex(),
            "state": str(state),
            "owed": leaves_charge(state, record),
        }
        if state is EndState.SUCCEEDED and is_plain_success(record, run):
            row["began"], row["finished"] = record.started, record.ended
        else:
            records.append(record_values(record))
        rows.append(row)
    found = await connection.fetch(SQL["ledger_finish"], to_json(rows), to_json(records))
    ours = {(row["audience"], row["task_id"], row["owner"]) for row in found}
    results = [(run.audience, run.task_id, run.owner) in ours for run, _, _ in ends]
    if others := [run for (run, _, _), held in zip(ends, results, strict=True) if not held]:
        await note_life(connection, others)
    # A success that does not count is recorded too.
    not_ours = [
        record for (_, _, record), row, held in zip(ends, rows, results, strict=True) if "began" in row and not held
    ]
    await add_records(connection, not_ours)
    return results


async def note_life(connection: Connection, runs: Sequence[Execution]) -> None:
    """Note that runs ended, or live, that may have been taken for lost."""
    keys = [
        {"audience": run.audience, "task_id": run.task_id, "digest": run.digest.hex()}
        for run in sorted(runs, key=_name)
    ]
    await connection.execute(SQL["ledger_lives"], to_json(keys))


class LedgerOnLoop:
    """``LedgerCalls`` on the connections of one event loop. Each call is one statement where that is possible.

    Args:
        store: Opened by the first call: it checks the tables.
        pools: Those of the running loop.
    """

    def __init__(self, store: PostgresStore, pools: Pools) -> None:
        self._store = store
        self._pools = pools

    async def begin_many(self, executions: Sequence[Execution], *, now: float, lease: float) -> Sequence[Admission]:  # noqa: ARG002 - the database's clock
        """Do what ``PostgresLedger.begin_many`` does."""
        await self._store.open_async()
        action = partial(begin_many, executions=executions, lease=lease)
        # The running owner is admitted again: without a second call, a begin whose answer got lost would block the task
        # until its lease runs out.
        return await self._pools.run(action, purpose="durable", idempotent=True)

    async def finish_many(self, ends: Sequence[RunEnd]) -> Sequence[bool]:
        """Do what ``PostgresLedger.finish_many`` does."""
        await self._store.open_async()
        return await self._pools.run(partial(finish_many, ends=ends), purpose="durable")


class PostgresLedger:
    """A ``Ledger`` in the queue's database. Leases go by the database's clock; ``now`` is ignored.

    Every method may raise ``QueueUnavailable``.
    """

    def __init__(self, store: PostgresStore) -> None:
        self._store = store

    @property
    def here(self) -> LedgerOnLoop | None:
        """The calls on connections of the running loop, within ``PostgresQueue.on_loop``; else None."""
        pools = self._store.here
        return None if pools is None else LedgerOnLoop(self._store, pools)

    def begin_many(self, executions: Sequence[Execution], *, now: float, lease: float) -> Sequence[Admission]:  # noqa: ARG002 - the database's clock
        """Ask to run; ``lease`` is seconds."""
        return self._store.run(partial(begin_many, executions=executions, lease=lease), idempotent=True)

    def extend_many(self, executions: Sequence[Execution], *, now: float, lease: float) -> Sequence[bool]:  # noqa: ARG002 - the seam has it
        """Extend the leases of runs; False for each that another owner has."""
        # Lock order: as in begin_many and finish_many.
        asked = [
            {"audience": run.audience, "task_id": run.task_id, "owner": run.owner}
            for run in sorted(executions, key=_name)
        ]
        values = to_json(asked), interval(lease)
        rows = self._store.run(
            lambda connection: connection.fetch(SQL["ledger_extend"], *values), purpose="relaxed", idempotent=True
        )
        ours = {(row["audience"], row["task_id"], row["owner"]) for row in rows}
        if others := [run for run in executions if (run.audience, run.task_id, run.owner) not in ours]:
            self._store.run(partial(note_life, runs=others), purpose="relaxed", idempotent=True)
        return [(run.audience, run.task_id, run.owner) in ours for run in executions]

    def lost_many(self, executions: Sequence[Execution], *, now: float) -> Sequence[bool]:  # noqa: ARG002 - the database's clock
        """Return for which of these tasks a run began and neither ended nor is extended any more."""
        keys = to_json(
            [{"audience": run.audience, "task_id": run.task_id, "digest": run.digest.hex()} for run in executions]
        )
        rows = self._store.run(
            lambda connection: connection.fetch(SQL["ledger_is_lost"], keys), purpose="relaxed", idempotent=True
        )
        lost = {(row["audience"], row["task_id"]) for row in rows}
        return [_name(run) in lost for run in executions]

    def cancelled_many(self, executions: Sequence[Execution]) -> Sequence[bool]:
        """Return which of these runs belong to tasks that were cancelled."""
        names = to_json([{"audience": run.audience, "task_id": run.task_id} for run in executions])
        rows = self._store.run(
            lambda connection: connection.fetch(SQL["ledger_find"], names), purpose="relaxed", idempotent=True
        )
        cancelled = {(row["audience"], row["task_id"]) for row in rows if row["state"] == EndState.CANCELLED}
        return [_name(run) in cancelled for run in executions]

    def finish_many(self, ends: Sequence[RunEnd]) -> Sequence[bool]:
        """Store the ends of runs and their records; False stands for one that does not count any more.

        The call may be repeated after an error: a stored end counts once.
        """
        return self._store.run(partial(finish_many, ends=ends))

    def record_many(self, records: Sequence[AttemptRecord]) -> None:
        """Store records of attempts that ran nothing."""

        async def action(connection: Connection) -> None:
            await add_records(connection, records)
            # Trimmed each time: a holder of a token can post it any number of times.
            for task_id in dict.fromkeys(record.task_id for record in records):
                await trim_records(connection, task_id)

        self._store.run(action)
