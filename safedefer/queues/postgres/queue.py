"""The PostgreSQL queue: any number of machines, on pgqueuer.

pgqueuer keeps, picks, retries and ends the jobs, and its own dashboards show them. What it has not is beside its
tables: names and tombstones, unique keys, rates, deliveries that are counted although a worker was killed, the
ledger, blobs and dead letters. All of it is in the schema ``safedefer``, made by ``safedefer migrate``.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import time
import weakref
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeVar
from uuid import uuid4

from safedefer.errors import LeaseLost, QueueUnavailable
from safedefer.queues.base import (
    Capabilities,
    DeadFilter,
    Lease,
    QueuedTask,
    QueueStats,
    Settlement,
    TaskState,
    TaskView,
)
from safedefer.queues.postgres import operations
from safedefer.queues.postgres.calls import PostgresCalls
from safedefer.queues.postgres.errors import closed, place, refusal
from safedefer.queues.postgres.ledger import LEEWAY, PostgresBlobs, PostgresLedger, recorded_success
from safedefer.queues.postgres.operations import SQL, ago
from safedefer.queues.postgres.rows import Hold, attempt_record, dead_view, ended_view, job_view, read_task
from safedefer.queues.postgres.store import STATEMENTS, Connections, Pools, Purpose, Watch, migrate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence

    from safedefer.ledger import AttemptRecord
    from safedefer.queues.postgres.operations import Connection
    from safedefer.queues.rates import QueueControl, QueueLimits

__all__ = ["PostgresQueue", "migrate"]

_T = TypeVar("_T")

_CAPABILITIES: Final = Capabilities(streams=True, due_order=False, exact_wake=False)
_PRUNE_EVERY: Final = 60.0
_PRUNE_AGAIN: Final = 0.2
_AT_ONCE: Final = 500
_STORED_AT_ONCE: Final = 100
_FOREVER: Final = 1e18
_DEFAULT_STATES: Final = (TaskState.WAITING, TaskState.RUNNING, TaskState.DEAD)


@dataclass(slots=True)
class _Here:
    """What there is of an event loop that is not the engine's own."""

    calls: PostgresCalls
    pools: Pools
    process: int
    users: int = 0


class PostgresQueue:
    """A ``PullQueue`` in a PostgreSQL database (14 or newer), for any number of machines.

    Args:
        dsn: ``postgresql://user@host/database``; libpq's parameters may follow after a ``?``.
        tombstone_seconds: How long the name of an ended task is not free (App Engine: 9 days).
        history_seconds: How long ``find`` and ``tasks`` know what succeeded or was cancelled.
        blob_limit: Bytes that all stored tokens of oversize tasks may take together.
        dead_seconds: Older dead letters are archived.
        dead_limit: Of more dead letters the oldest are archived.
        producers: Connections at most through which this process enqueues.
        workers: Connections at most for each of leasing, settling and keeping the ledger, of each event loop within
            ``on_loop`` and of the engine's own; one more listens.

    Nothing is connected before the first call. Every method may raise ``QueueUnavailable``, and the first
    ``ConfigurationError`` if the database was not migrated.
    """

    def __init__(
        self,
        dsn: str,
        *,
        tombstone_seconds: float = 9 * 86400,
        history_seconds: float = 7 * 86400,
        blob_limit: int = 2**30,
        dead_seconds: float = 90 * 86400,
        dead_limit: int = 100_000,
        producers: int = 8,
        workers: int = 4,
    ) -> None:
        self._dsn = dsn
        self.tombstone_seconds = tombstone_seconds
        self._history_seconds = history_seconds
        self._blob_limit = blob_limit
        self._dead_seconds = dead_seconds
        self._dead_limit = dead_limit
        self._sizes = (producers, workers)
        self.lease_seconds: float | None = None
        self._next_prune = float("-inf")
        self._closed = False
        self._after_fork()
        self._ledger = PostgresLedger(self)
        self._blobs = PostgresBlobs(self)
        _queues.add(self)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._connections: Connections | None = None
        self._loops: dict[asyncio.AbstractEventLoop, _Here] = {}
        self._failed: tuple[float, QueueUnavailable | None] = (0.0, None)
        """When it was last tried in vain to connect, and why."""
        self.manager = uuid4()
        self.watch = Watch()

    def before_fork_in_child(self) -> None:
        """Let go of what is the parent's; its connections are kept, unused, so that nobody ends them."""
        if self._connections is not None:
            _inherited.append(self._connections)
        _inherited.append(self._loops)
        self._after_fork()

    def __repr__(self) -> str:
        """Show the address, without a password."""
        return f"{type(self).__name__}({place(self._dsn)!r})"

    @property
    def capabilities(self) -> Capabilities:
        """All but the order: pgqueuer picks what was enqueued first; and a wait ends now and then for nothing."""
        return _CAPABILITIES

    @property
    def ledger(self) -> PostgresLedger:
        """The ledger in the same database."""
        return self._ledger

    @property
    def blobs(self) -> PostgresBlobs:
        """The blobs in the same database."""
        return self._blobs

    @property
    def marker(self) -> str:
        """A text that names the database."""
        return self.open().marker

    def close(self) -> None:
        """Finish what was accepted and disconnect. Later calls raise ``QueueUnavailable``."""
        with self._lock:
            self._closed = True
            connections, self._connections = self._connections, None
            loops, self._loops = self._loops, {}
        for loop, here in loops.items():
            with contextlib.suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(here.pools.terminate)
        self.watch.wake()
        if connections is not None:
            connections.close()

    # --- Connections ------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether ``open`` would not block."""
        return self._connections is not None

    def open(self) -> Connections:
        """Connect and check the tables, if that was not done."""
        asked = time.monotonic()
        with self._lock:
            if self._closed:
                raise closed(self._dsn)
            if self._connections is None:
                since, error = self._failed
                if error is not None and since >= asked:  # others need not wait for the same, one after the other
                    raise QueueUnavailable(str(error)) from error
                try:
                    self._connections = Connections(self._dsn, *self._sizes, watch=self.watch)
                except QueueUnavailable as again:
                    self._failed = time.monotonic(), again
                    raise
            return self._connections

    def run(
        self,
        action: Callable[[Connection], Awaitable[_T]],
        /,
        *,
        durable: bool = True,
        leases: bool = False,
        transaction: bool = False,
        again: bool = False,
    ) -> _T:
        """Run an action on a connection and wait for what it returns.

        Without ``durable`` a crash of the server may undo it shortly after; without ``transaction`` each statement
        is one of its own; with ``again`` it is done a second time where the connection breaks.
        """
        purpose: Purpose = "leases" if leases else "durable" if durable else "relaxed"
        return self.open().run(action, purpose=purpose, transaction=transaction, again=again)

    def wait_for(self, call: Callable[[PostgresCalls], Coroutine[Any, Any, _T]], /) -> _T:
        """Make one of the calls that every task costs on the engine's own loop, and wait for it."""
        connections = self.open()
        return connections.wait_for(call(PostgresCalls(self, connections.pools, engines=True)))

    @contextlib.asynccontextmanager
    async def on_loop(self) -> AsyncIterator[PostgresCalls]:
        """Have connections of the running loop while the context lasts: the ledger's ``here`` has them then.

        Up to ``workers`` for each of leasing, settling and keeping the ledger; made when they are needed.
        """
        loop = asyncio.get_running_loop()
        for other in [other for other in self._loops if other.is_closed()]:
            self._loops.pop(other).pools.terminate()
        here = self._loops.get(loop)
        if here is None:
            pools = Pools(self._dsn, self._sizes[1])
            here = self._loops[loop] = _Here(PostgresCalls(self, pools, engines=False), pools, os.getpid())
        here.users += 1
        try:
            yield here.calls
        finally:
            here.users -= 1
            if not here.users and here.process == os.getpid():  # a forked child's connections are its parent's
                if self._loops.get(loop) is here:
                    del self._loops[loop]
                await here.pools.close()

    @property
    def here(self) -> PostgresCalls | None:
        """The calls of the running loop, within ``on_loop``."""
        here = self._loops.get(asyncio.get_running_loop())
        return None if here is None else here.calls

    # --- Giving tasks -----------------------------------------------------------------------------

    def enqueue(self, task: QueuedTask, /) -> None:
        """Store a task, with its blob, in one transaction.

        Raises ``TaskAlreadyExistsError``, ``TombstonedTaskError`` and ``QueueUnavailable``.
        """
        self.enqueue_many((task,))

    def enqueue_many(self, tasks: Iterable[QueuedTask], /) -> None:
        """Store all tasks or none, in one transaction; raises what ``enqueue`` raises, and what the iterator raises.

        While some hundreds are stored, the next are taken from the iterator.
        """
        parts = iter(tasks)
        batches = iter(lambda: list(islice(parts, _STORED_AT_ONCE)), [])
        values = (
            (operations.enqueue(batch, blob_limit=self._blob_limit), {task.id for task in batch}) for batch in batches
        )
        if self.open().producers.store(values):
            self.watch.changed()

    def enqueue_statements(self, tasks: Sequence[QueuedTask], /) -> list[tuple[str, tuple[object, ...]]]:
        """Return the statements that enqueue tasks, with ``$1`` placeholders, for a transaction of the user's.

        They are enqueued if and only if that transaction commits. ``refusal`` says what their errors mean.
        """
        return [(STATEMENTS.enqueue, operations.enqueue(tasks, blob_limit=self._blob_limit))]

    def refusal(self, error: BaseException, /) -> Exception | None:
        """Return what a database error of ``enqueue_statements`` means in our words; None if it is no refusal."""
        return refusal(error)

    def cancel(self, task_id: str, *, now: float) -> bool:
        """End a waiting task unrun, in the ledger too; False if it does not wait."""
        return self._cancel([task_id], now=now) > 0

    def _cancel(self, task_ids: Sequence[str], *, now: float) -> int:
        return self.run(
            partial(
                operations.cancel,
                statements=STATEMENTS,
                task_ids=task_ids,
                now=now,
                seconds=self._seconds(),
                tombstone_seconds=self.tombstone_seconds,
            ),
            transaction=True,
        )

    def replace_dead(self, task_id: str, task: QueuedTask, *, now: float) -> bool:  # noqa: ARG002 - the seam has it
        """Enqueue ``task`` and remove the dead letter, in one transaction; False if there is none."""

        async def action(connection: Connection) -> bool:
            if not await operations.drop_dead(connection, STATEMENTS, [task_id]):
                return False
            for statement, values in self.enqueue_statements((task,)):
                await connection.execute(statement, *values)
            return True

        replaced = self.run(action, transaction=True)
        self.watch.changed()
        return replaced

    def drop_dead(self, task_ids: Sequence[str]) -> int:
        """Delete dead letters, archived ones too, in one transaction; returns how many there were."""
        return self.run(lambda connection: operations.drop_dead(connection, STATEMENTS, task_ids), transaction=True)

    # --- Holding queues back ----------------------------------------------------------------------

    def configure(self, limits: Sequence[QueueLimits], *, now: float) -> None:  # noqa: ARG002 - the database's clock
        """Put the declared limits in force, for every dispatcher of the database."""
        self.run(lambda connection: operations.configure(connection, limits), transaction=True)

    def controls(self, *, now: float) -> Sequence[QueueControl]:  # noqa: ARG002 - the database's clock
        """What holds queues back, as it stands, sorted by name."""

        async def action(connection: Connection) -> list[QueueControl]:
            here = await operations.clock(connection)
            return [control.refill(here) for control in (await operations.controls(connection)).values()]

        return self.run(action)

    def pause(self, queue: str, *, paused: bool, now: float) -> None:  # noqa: ARG002 - the database's clock
        """Lease nothing of a queue until it is resumed; what runs goes on."""
        self.run(partial(operations.change_control, queue=queue, paused=paused), transaction=True)
        self.wake()

    def hold(self, queue: str, *, until: float, now: float) -> None:
        """Lease nothing of a queue before ``until``; an earlier time changes nothing."""
        action = partial(operations.change_control, queue=queue, hold_for=until - now)
        self.run(action, transaction=True, durable=False)

    def purge(self, queue: str, *, now: float) -> int:
        """Cancel all that waits in a queue at the time of the call, some hundreds in a transaction; returns how many."""
        newest = self.run(lambda connection: connection.fetch(SQL["newest_job"]))[0]["newest"]
        total = position = 0
        while True:
            values = (queue, position, newest, _AT_ONCE)
            rows = self.run(partial(_fetch, statement=SQL["purge_next"], values=values))
            if not rows:
                return total
            total += self._cancel([row["dedupe_key"] for row in rows], now=now)
            position = rows[-1]["id"]

    # --- Taking tasks -----------------------------------------------------------------------------

    def lease(
        self, *, owner: str, limit: int, seconds: float, now: float, queues: Sequence[str] | None = None
    ) -> Sequence[Lease]:
        """Claim up to ``limit`` due tasks, the one that was enqueued first before the others.

        A lease ends ``seconds`` after the last sign of life, as whoever looks for lost ones counts them: all
        dispatchers of a database should be given the same.
        """
        return self.wait_for(
            lambda calls: calls.lease(owner=owner, limit=limit, seconds=seconds, now=now, queues=queues)
        )

    def _seconds(self) -> float:
        return self.open().lease_seconds if self.lease_seconds is None else self.lease_seconds

    def extend(self, lease: Lease, *, seconds: float, now: float) -> Lease:
        """Prolong a lease. Raises ``LeaseLost``."""
        hold = Hold.read(lease.owner)
        if hold is not None and self.run(
            lambda connection: connection.fetch(SQL["extend"], hold.job, hold.manager, hold.updated),
            durable=False,
            again=True,
        ):
            return lease._replace(until=now + seconds)
        raise _lost(lease)

    def settle(self, lease: Lease, settlement: Settlement, *, now: float) -> None:
        """Say how a delivery ended. Raises ``LeaseLost`` and changes nothing if it is not ours now."""
        if not self.settle_many(((lease, settlement),), now=now)[0]:
            raise _lost(lease)

    def settle_many(self, settlements: Sequence[tuple[Lease, Settlement]], *, now: float) -> Sequence[bool]:
        """Settle several in one transaction; False stands for a lost lease."""
        return self.wait_for(lambda calls: calls.settle_many(settlements, now=now))

    def next_due(self, *, now: float, queues: Sequence[str] | None = None) -> float | None:
        """When the next task or lease falls due, maybe in the past, or its queue lets it; None if there is none."""
        return self.run(partial(operations.next_due, seconds=self._seconds(), now=now, queues=queues), again=True)

    def wait(self, timeout: float) -> bool:
        """Block until a task may have been enqueued (by any process) or ``timeout`` seconds pass."""
        self.open().listen()
        return self.watch.wait(timeout)

    def wake(self) -> None:
        """End a ``wait`` of this process early."""
        self.watch.wake()

    def prune(self, *, now: float) -> int:
        """Forget what is too old: tombstones, history, stray records, ledger entries; returns how many.

        Does a bounded amount in one call. ``lease`` has it done about once a minute, and sooner if much is old.
        """
        return self.run(self._pruning(now), durable=False)

    def _pruning(self, now: float) -> Callable[[Connection], Awaitable[int]]:
        return partial(
            operations.prune,
            now=now,
            history_seconds=self._history_seconds,
            dead_seconds=self._dead_seconds,
            dead_limit=self._dead_limit,
            leeway=LEEWAY,
            limit=_AT_ONCE,
        )

    def is_time_to_prune(self, now: float) -> bool:
        """Whether it is about a minute since the last time; asked by ``lease``."""
        return now >= self._next_prune

    async def prune_here(self, pools: Pools, *, now: float) -> int:
        """Do what ``prune`` does, on connections of the running loop, and say when it is time again."""
        self._next_prune = now + _PRUNE_EVERY
        pruned = await pools.run(self._pruning(now), purpose="relaxed")
        if pruned >= _AT_ONCE:
            self._next_prune = now + _PRUNE_AGAIN
        return pruned

    # --- Looking ----------------------------------------------------------------------------------

    def stats(self, *, now: float) -> Sequence[QueueStats]:  # noqa: ARG002 - the database's clock
        """Counts of every queue that has a task or a dead letter, sorted by name."""
        seconds = ago(self._seconds())

        async def action(connection: Connection) -> tuple[Any, Any]:
            return await connection.fetch(SQL["stats"], seconds), await connection.fetch(SQL["stats_dead"])

        tasks, dead = self.run(action)
        counts = {row["queue"]: (row["waiting"], row["running"], row["oldest"]) for row in tasks}
        deaths = {row["queue"]: row["dead"] for row in dead}
        found = []
        for queue in sorted({*counts, *deaths}):
            waiting, running, oldest = counts.get(queue, (0, 0, None))
            found.append(
                QueueStats(queue=queue, waiting=waiting, running=running, dead=deaths.get(queue, 0), oldest=oldest)
            )
        return found

    def tasks(
        self, *, states: Sequence[TaskState] = (), queue: str | None = None, limit: int = 100
    ) -> Sequence[TaskView]:
        """List tasks, newest first, without records; without ``states``: waiting, running and dead."""

        async def action(connection: Connection) -> list[TaskView]:
            found: list[TaskView] = []
            for state in dict.fromkeys(states or _DEFAULT_STATES):
                found += await _list(connection, state, queue, limit)
            return found

        found = self.run(action)
        found.sort(key=lambda task: task.created, reverse=True)
        return found[:limit]

    def dead_letters(
        self, where: DeadFilter, *, after: tuple[float, str] | None = None, limit: int = 100
    ) -> Sequence[TaskView]:
        """List dead letters with their records, oldest first; ``after`` is ``(ended, id)`` of the last one seen."""
        ended, task_id = after or (-_FOREVER, "")
        since = -_FOREVER if where.since is None else where.since
        before = _FOREVER if where.before is None else where.before
        values = (where.archived, where.queue, where.reason, where.callable_name, since, before, ended, task_id, limit)

        async def action(connection: Connection) -> list[TaskView]:
            rows = await connection.fetch(SQL["dead_letters"], *values)
            records = await _records(connection, [row["id"] for row in rows])
            return [dead_view(row, records.get(row["id"], ())) for row in rows]

        return self.run(action)

    def find(self, task_id: str) -> TaskView | None:
        """One task in whatever state, with the records of its attempts; ended ones without a token."""

        async def action(connection: Connection) -> TaskView | None:
            records = (await _records(connection, [task_id])).get(task_id, [])
            condition = "WHERE job.dedupe_key = $1 AND job.status IN ('queued', 'picked')"
            jobs = await connection.fetch(f"{SQL['view_jobs']} {condition}", task_id)
            if jobs:
                return await _with_success(connection, (await _job_views(connection, jobs, records))[0])
            for view, show in (("view_dead", dead_view), ("view_ended", ended_view)):
                rows = await connection.fetch(f"{SQL[view]} WHERE id = $1", task_id)
                if rows:
                    return await _with_success(connection, show(rows[0], records))
            return None

        return self.run(action, again=True)


async def _fetch(connection: Connection, *, statement: str, values: Sequence[object]) -> Sequence[Mapping[str, Any]]:
    return await connection.fetch(statement, *values)


async def _list(connection: Connection, state: TaskState, queue: str | None, limit: int) -> list[TaskView]:
    if state in {TaskState.WAITING, TaskState.RUNNING}:
        status = "queued" if state is TaskState.WAITING else "picked"
        condition = f"WHERE job.status = '{status}' AND ($1::text IS NULL OR job.entrypoint IN ($1, $1 || '@later'))"
        statement = f"{SQL['view_jobs']} {condition} ORDER BY job.id DESC LIMIT $2"
        return await _job_views(connection, await connection.fetch(statement, queue, limit))
    if state is TaskState.DEAD:
        statement = f"{SQL['view_dead']} WHERE archived IS NULL AND ($1::text IS NULL OR queue = $1)"
        rows = await connection.fetch(f"{statement} ORDER BY ended DESC LIMIT $2", queue, limit)
        return [dead_view(row) for row in rows]
    statement = f"{SQL['view_ended']} WHERE state = $3 AND ($1::text IS NULL OR queue = $1)"
    rows = await connection.fetch(f"{statement} ORDER BY id DESC LIMIT $2", queue, limit, str(state))
    return [ended_view(row) for row in rows]


async def _job_views(
    connection: Connection, jobs: Sequence[Mapping[str, Any]], records: Sequence[AttemptRecord] = ()
) -> list[TaskView]:
    tasks = [read_task(job) for job in jobs]
    wanted = [task.blob_id for task in tasks if task.blob_id is not None]
    found = await connection.fetch(SQL["blobs_of"], wanted) if wanted else ()
    blobs = {(row["id"], row["task_id"]): bytes(row["data"]) for row in found}
    return [
        job_view(job, blobs.get((task.blob_id or "", task.id)), records) for job, task in zip(jobs, tasks, strict=True)
    ]


async def _records(connection: Connection, task_ids: Sequence[str]) -> dict[str, list[AttemptRecord]]:
    found: dict[str, list[AttemptRecord]] = {}
    for row in await connection.fetch(SQL["attempts_of"], task_ids):
        found.setdefault(row["task_id"], []).append(attempt_record(row))
    return {task_id: records[-operations.RECORDS_KEPT :] for task_id, records in found.items()}


async def _with_success(connection: Connection, view: TaskView) -> TaskView:
    """Return a task with the record of its success, which came before those that began after it."""
    success = await recorded_success(connection, audience=view.audience, task_id=view.id)
    if not success:
        return view
    ended = success[0].ended
    before = [record for record in view.records if record.started < ended]
    after = [record for record in view.records if record.started >= ended]
    return replace(view, records=[*before, *success, *after])


def _lost(lease: Lease) -> LeaseLost:
    return LeaseLost(f"the task {lease.task.id} is no longer ours; leave it to the dispatcher that has it now")


_queues: Final[weakref.WeakSet[PostgresQueue]] = weakref.WeakSet()
_inherited: Final[list[object]] = []


def _after_fork_in_child() -> None:
    for queue in list(_queues):
        queue.before_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)


@atexit.register
def _close_all() -> None:
    for queue in list(_queues):
        queue.close()
