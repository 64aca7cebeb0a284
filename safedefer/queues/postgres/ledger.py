"""The ledger and the blobs in the queue's PostgreSQL database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from safedefer.ledger import Admission, AttemptRecord, EndState, Execution, RunEnd
from safedefer.queues.postgres.operations import RECORDS_KEPT, SQL, add_records, ago, changed
from safedefer.queues.postgres.rows import joined, record_values, to_json

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from safedefer.queues.postgres.calls import PostgresCalls
    from safedefer.queues.postgres.operations import Connection

_T = TypeVar("_T")

OK: Final = 200
LEEWAY: Final = 3600
"""Seconds that an entry is kept after its token expired."""

_PRUNED_AT_ONCE: Final = 1000


class Engine(Protocol):
    """What runs things on the database."""

    def run(self, action: Callable[[Connection], Awaitable[_T]], /, *, durable: bool = True, again: bool = False) -> _T:
        """Run an action on a connection and wait for what it returns; ``again``: twice, where the connection breaks."""
        ...

    def wait_for(self, call: Callable[[PostgresCalls], Coroutine[Any, Any, _T]], /) -> _T:
        """Make one of the calls that every task costs, and wait for it."""
        ...

    @property
    def here(self) -> PostgresCalls | None:
        """The calls of the running loop, if there are connections of it."""
        ...


async def begin_many(connection: Connection, executions: Sequence[Execution], *, lease: float) -> list[Admission]:
    """Admit runs. One that is there twice is admitted once."""
    results: list[Admission | None] = [None] * len(executions)
    pending = list(range(len(executions)))
    while pending:
        # A statement can change a row once only: what is there again has its turn in the next.
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
    # In one order, so that two batches do not wait for each other.
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
        ago(lease),
    )
    if changed(begun) == len(asked):
        for index in which.values():
            results[index] = Admission.RUN
        return
    names = to_json([{"audience": audience, "task_id": task_id} for audience, task_id in which])
    for row in await connection.fetch(SQL["ledger_find"], names):
        index = which.pop((row["audience"], row["task_id"]))
        if bytes(row["digest"]) != executions[index].digest:
            results[index] = Admission.CONFLICT
        elif row["state"] == "running" and row["owner"] == executions[index].owner:
            results[index] = Admission.RUN
        elif row["state"] in {"running", "retry"}:
            results[index] = Admission.RUNNING
        else:
            results[index] = Admission.DUPLICATE
    for index in which.values():  # forgotten between the two statements: its time is over
        results[index] = Admission.DUPLICATE


def _name(run: Execution) -> tuple[str, str]:
    return run.audience, run.task_id


async def finish_many(connection: Connection, ends: Sequence[RunEnd]) -> list[bool]:
    """Store the ends of runs, and their records in either case."""
    told_once = len({(run.audience, run.task_id) for run, _, _ in ends}) == len(ends)
    if told_once and all(state is EndState.SUCCEEDED and _says_no_more(record, run) for run, state, record in ends):
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
        if changed(succeeded) == len(ends):
            return [True] * len(ends)
    # What was changed so is found again, as a success that is told a second time.
    rows: list[dict[str, object]] = []
    records: list[dict[str, object]] = []
    for run, state, record in ends:
        row: dict[str, object] = {
            "audience": run.audience,
            "task_id": run.task_id,
            "owner": run.owner,
            "state": str(state),
        }
        if state is EndState.SUCCEEDED and _says_no_more(record, run):
            row["began"], row["finished"] = record.started, record.ended
        else:
            records.append(record_values(record))
        rows.append(row)
    found = await connection.fetch(SQL["ledger_finish"], to_json(rows), to_json(records))
    ours = {(row["audience"], row["task_id"], row["owner"]) for row in found}
    results = [(run.audience, run.task_id, run.owner) in ours for run, _, _ in ends]
    # A success that found the ledger to be another's is remembered as well.
    unheld = [
        record for (_, _, record), row, held in zip(ends, rows, results, strict=True) if "began" in row and not held
    ]
    await add_records(connection, unheld)
    return results


def _says_no_more(record: AttemptRecord, run: Execution) -> bool:
    """Whether the record of a success says nothing but when it was: the ledger's own row says that."""
    return (
        record.outcome == EndState.SUCCEEDED
        and record.status == OK
        and record.reason is record.exception_type is record.traceback is None
        and record.task_id == run.task_id
        and record.audience == run.audience
    )


async def recorded_success(connection: Connection, *, audience: str, task_id: str) -> list[AttemptRecord]:
    """Return the record of the run that succeeded, if the ledger has it."""
    return [
        AttemptRecord(
            task_id=task_id,
            audience=audience,
            started=row["began"],
            ended=row["finished"],
            outcome=EndState.SUCCEEDED,
            status=OK,
        )
        for row in await connection.fetch(SQL["ledger_success"], audience, task_id)
    ]


class PostgresLedger:
    """A ``Ledger`` in the queue's database. Leases are by the database's clock, whatever ``now`` says."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def here(self) -> PostgresCalls | None:
        """The calls of the running loop, within ``PostgresQueue.on_loop``."""
        return self._engine.here

    def begin(self, execution: Execution, *, now: float, lease: float) -> Admission:
        """Ask to run; ``lease`` is seconds. Raises ``QueueUnavailable``."""
        return self.begin_many((execution,), now=now, lease=lease)[0]

    def begin_many(self, executions: Sequence[Execution], *, now: float, lease: float) -> Sequence[Admission]:
        """Do what ``begin`` does for each."""
        return self._engine.wait_for(lambda calls: calls.begin_many(executions, now=now, lease=lease))

    def extend(self, execution: Execution, *, now: float, lease: float) -> bool:  # noqa: ARG002 - the seam has it
        """Prolong the run; False if it is no longer ours."""
        values = (execution.audience, execution.task_id, execution.owner, ago(lease))
        rows: Sequence[Any] = self._engine.run(
            lambda connection: connection.fetch(SQL["ledger_extend"], *values), durable=False, again=True
        )
        return bool(rows)

    def finish(self, execution: Execution, state: EndState, record: AttemptRecord) -> bool:
        """Store the end of a run and its record in one transaction; False if it is no longer ours."""
        return self.finish_many(((execution, state, record),))[0]

    def finish_many(self, ends: Sequence[RunEnd]) -> Sequence[bool]:
        """Do what ``finish`` does for each. What is stored when the rest fails is found stored when it is told again."""
        return self._engine.wait_for(lambda calls: calls.finish_many(ends))

    def record(self, record: AttemptRecord) -> None:
        """Store an attempt that never came to run."""

        async def action(connection: Connection) -> None:
            await add_records(connection, [record])
            # Whoever has a token can post it again and again.
            await connection.execute(SQL["attempts_trim"], record.task_id, RECORDS_KEPT)

        self._engine.run(action)

    def prune(self, *, now: float) -> int:
        """Forget entries whose ``expires`` is over an hour past; returns how many."""
        total = 0
        values = (now - LEEWAY, _PRUNED_AT_ONCE)
        while removed := len(self._engine.run(lambda connection: connection.fetch(SQL["ledger_prune"], *values))):
            total += removed
        return total


class PostgresBlobs:
    """A ``BlobStore`` in the queue's database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def get(self, blob_id: str) -> bytes | None:
        """Return the bytes, or None if there are none. Raises ``QueueUnavailable``."""
        rows = self._engine.run(lambda connection: connection.fetch(SQL["blob_get"], blob_id), again=True)
        return bytes(rows[0]["data"]) if rows else None

    def delete(self, blob_id: str) -> None:
        """Delete a blob; nothing happens if there is none."""
        self._engine.run(lambda connection: connection.fetch(SQL["blobs_drop"], [blob_id]))

    def collect(self, *, now: float) -> int:  # noqa: ARG002 - other stores need the time
        """Delete blobs that no waiting task points to; returns how many."""
        rows: Sequence[Any] = self._engine.run(lambda connection: connection.fetch(SQL["blobs_collect"]))
        return int(rows[0]["dropped"])
