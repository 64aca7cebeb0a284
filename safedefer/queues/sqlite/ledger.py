"""The ledger and the blobs in the queue's SQLite file."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING, Final

from safedefer.concurrency.threads import Threads
from safedefer.errors import QueueUnavailable
from safedefer.ledger import Admission, AttemptRecord, EndState, Execution, RunEnd
from safedefer.queues import rules
from safedefer.queues.sqlite import operations
from safedefer.queues.sqlite.connection import SQL, Handle
from safedefer.queues.sqlite.many import execute_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    import apsw

    from safedefer.queues.sqlite.log_sync import LogSync
    from safedefer.queues.sqlite.writer import Writer

#: The most syncs at once: event loops do not wait for each other.
_SYNCS: Final = 4


class SQLiteLedgerCalls:
    """``LedgerCalls`` that the writer's thread answers: no other thread waits for it.

    A sync takes as long as many commits. So ends are committed without one, and the log is synced afterwards, in a thread:
    until that is done nobody hears of them, and meanwhile the writer goes on.
    """

    def __init__(self, writer: Writer, sync_log: LogSync) -> None:
        self._writer = writer
        self._sync_log = sync_log
        self._threads = Threads(_SYNCS, "safedefer-sync")

    async def begin_many(self, executions: Sequence[Execution], *, now: float, lease: float) -> Sequence[Admission]:
        """Do what ``SQLiteLedger.begin_many`` does."""
        action = partial(begin_all, executions=executions, now=now, lease=lease)
        return await self._writer.call(action, durable=False, urgent=True)

    async def finish_many(self, ends: Sequence[RunEnd]) -> Sequence[bool]:
        """Do what ``SQLiteLedger.finish_many`` does."""
        counted = await self._writer.call(partial(finish_all, ends=ends), durable=False)
        try:
            synced = self._threads(self._sync_log)
        except RuntimeError as error:
            raise QueueUnavailable(f"the log cannot be synced ({error}); allow the process more threads") from error
        await synced
        return counted


class SQLiteLedger:
    """A ``Ledger`` in the queue's file."""

    def __init__(self, writer: Writer, reader: Handle, sync_log: LogSync) -> None:
        self._writer = writer
        self._reader = reader
        self._here = SQLiteLedgerCalls(writer, sync_log)

    @property
    def here(self) -> SQLiteLedgerCalls:
        """The calls of the running loop, whichever it is: the writer's thread answers it."""
        return self._here

    def begin_many(self, executions: Sequence[Execution], *, now: float, lease: float) -> Sequence[Admission]:
        """Ask to run, in one transaction; ``lease`` is seconds."""
        return self._writer.run(partial(begin_all, executions=executions, now=now, lease=lease), durable=False)

    def extend_many(self, executions: Sequence[Execution], *, now: float, lease: float) -> Sequence[bool]:
        """Extend the leases of runs; False for each that another owner has."""
        until = now + lease
        return self._writer.run(
            lambda connection: [extend(connection, execution, until=until) for execution in executions], durable=False
        )

    def lost_many(self, executions: Sequence[Execution], *, now: float) -> Sequence[bool]:
        """Return for which of these tasks a run began and neither ended nor is extended any more."""
        with self._reader.use() as connection:
            return [
                connection.execute(SQL["ledger_is_lost"], {**_key(run), "digest": run.digest, "now": now}).get
                is not None
                for run in executions
            ]

    def cancelled_many(self, executions: Sequence[Execution]) -> Sequence[bool]:
        """Return which of these runs belong to tasks that were cancelled."""
        with self._reader.use() as connection:
            return [connection.execute(SQL["ledger_cancelled"], _key(run)).get is not None for run in executions]

    def finish_many(self, ends: Sequence[RunEnd]) -> Sequence[bool]:
        """Store the ends of runs and their records; False stands for one that does not count any more."""
        return self._writer.run(partial(finish_all, ends=ends))

    def record_many(self, records: Sequence[AttemptRecord]) -> None:
        """Store records of attempts that ran nothing."""

        def action(connection: apsw.Connection) -> None:
            for record in records:
                operations.add_record(connection, record)

        self._writer.run(action)


def begin_all(
    connection: apsw.Connection, executions: Sequence[Execution], *, now: float, lease: float
) -> list[Admission]:
    """Admit runs, within a transaction: those of tasks that the ledger does not know in one call."""
    until = now + lease
    before = connection.total_changes()
    execute_rows(connection, "ledger_begin_first", [(*execution, until) for execution in executions])
    if connection.total_changes() - before == len(executions):
        return [Admission.RUN] * len(executions)
    # An entry that is new has the owner of its run, and admits it.
    return [_begin(connection, execution, now=now, until=until) for execution in executions]


def _begin(connection: apsw.Connection, execution: Execution, *, now: float, until: float) -> Admission:
    """Admit a run of a task that the ledger knows."""
    entry = operations.find_ledger(connection, execution.audience, execution.task_id)
    assert entry is not None  # in this transaction nobody else deletes it
    admission = rules.admit(execution, digest=entry.digest, owner=entry.owner, entry=entry.known(now))
    if admission is Admission.RUN:
        values: dict[str, str | float] = {**_key(execution), "owner": execution.owner, "until": until}
        connection.execute(SQL["ledger_begin"], values)
    return admission


def finish_all(connection: apsw.Connection, ends: Sequence[RunEnd]) -> list[bool]:
    """Store the ends of runs, within a transaction. Every record is stored."""
    execute_rows(connection, "attempt_insert", [record for _, _, record in ends])
    # Whoever posts a token again and again is settled by nobody: now and then the records are trimmed here.
    trimmed = [(run.task_id, rules.RECORDS_KEPT) for run, _, _ in ends if not random.getrandbits(4)]  # not a secret
    connection.executemany(SQL["attempts_trim"], trimmed)
    values = [_end_values(*end) for end in ends]
    connection.execute("SAVEPOINT ends")
    before = connection.total_changes()
    execute_rows(connection, "ledger_finish", values)
    counted = connection.total_changes() - before == len(ends)
    if not counted:  # which of them did not is seen one by one
        connection.execute("ROLLBACK TO ends")
    connection.execute("RELEASE ends")
    if counted:
        return [True] * len(ends)
    return [_finish(connection, run, each) for (run, _, _), each in zip(ends, values, strict=True)]


def _end_values(execution: Execution, state: EndState, record: AttemptRecord) -> tuple[str | int | bytes, ...]:
    """Return the bindings of ``ledger_finish``."""
    owed = int(rules.leaves_charge(state, record))
    return execution.audience, execution.task_id, execution.digest, execution.owner, state.value, owed


def _finish(connection: apsw.Connection, execution: Execution, values: tuple[str | int | bytes, ...]) -> bool:
    """Store the end of one run."""
    connection.execute(SQL["ledger_finish"], values)
    return connection.changes() > 0 or _lives(connection, execution)


def extend(connection: apsw.Connection, execution: Execution, *, until: float) -> bool:
    """Prolong a run, within a transaction; False if it is no longer ours."""
    values: dict[str, str | float | bytes] = {**_key(execution), "owner": execution.owner, "until": until}
    connection.execute(SQL["ledger_extend"], values)
    return connection.changes() > 0 or _lives(connection, execution)


def _lives(connection: apsw.Connection, execution: Execution) -> bool:
    """Note that a run lives, or ended, that was taken for lost; False: it changes nothing else."""
    connection.execute(SQL["ledger_lives"], {**_key(execution), "digest": execution.digest})
    return False


def prune(connection: apsw.Connection, *, now: float, limit: int) -> int:
    """Forget up to ``limit`` entries whose token expired, within a transaction."""
    connection.execute(SQL["ledger_prune"], {"now": now, "before": now - rules.LEDGER_LEEWAY, "limit": limit})
    return connection.changes()


def _key(execution: Execution) -> dict[str, str]:
    return {"audience": execution.audience, "task_id": execution.task_id}


class SQLiteBlobs:
    """A ``BlobStore`` in the queue's file."""

    def __init__(self, writer: Writer, reader: Handle) -> None:
        self._writer = writer
        self._reader = reader

    def get(self, blob_id: str) -> bytes | None:
        """Return the bytes, or None if there are none. Raises ``QueueUnavailable``."""
        with self._reader.use() as connection:
            data: bytes | None = connection.execute(SQL["blob_get"], (blob_id,)).get
            return data

    def delete(self, blob_id: str) -> None:
        """Delete a blob; nothing happens if there is none."""
        self._writer.run(lambda connection: connection.execute(SQL["blob_delete"], (blob_id,)).close())
