"""The PostgreSQL queue: for any number of machines, on pgqueuer.

pgqueuer stores, picks, retries and ends the jobs, and its dashboards show them. Tables beside its own hold names and
tombstones, unique keys, rates, counted deliveries, the ledger, blobs and dead letters. All of them are in the schema
``safedefer``, which ``safedefer migrate`` creates.
"""

from __future__ import annotations

import contextlib
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from safedefer.queues.addresses import check_url, place
from safedefer.queues.base import (
    HISTORY_SECONDS,
    AttemptTime,
    DeadFilter,
    EndCount,
    Lease,
    Notice,
    Position,
    QueuedTask,
    QueueStats,
    Settlement,
    StorageOptions,
    TaskPage,
    TaskState,
    TaskView,
)
from safedefer.queues.capabilities import Capabilities
from safedefer.queues.postgres import controls, copies, ends, leasing, producers, pushed, views
from safedefer.queues.postgres.blobs import PostgresBlobs
from safedefer.queues.postgres.calls import PostgresCalls
from safedefer.queues.postgres.enqueue import enqueue_values
from safedefer.queues.postgres.errors import refusal
from safedefer.queues.postgres.ledger import PostgresLedger
from safedefer.queues.postgres.pgqueuer import STATEMENTS
from safedefer.queues.postgres.pruning import Pruning
from safedefer.queues.postgres.statements import SQL
from safedefer.queues.postgres.store import PostgresStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence

    from safedefer.ledger import VerifiedLetter
    from safedefer.queues.postgres.connection import Connection
    from safedefer.queues.postgres.pools import Pools
    from safedefer.queues.rates import QueueControl, QueueLimits

_T = TypeVar("_T")

_CAPABILITIES: Final = Capabilities(streams=True, due_order=False, exact_wake=False)
_PURGED_AT_ONCE: Final = 500
_STORED_AT_ONCE: Final = 100


class PostgresQueue:
    """A ``PullQueue`` in a PostgreSQL database (14 or newer), for any number of machines.

    Args:
        dsn: ``postgresql://user@host/database``; libpq's parameters may follow after a ``?``.
        tombstone_seconds: How long the name of an ended task is not free (App Engine: 9 days).
        history_seconds: How long ``find`` and ``tasks`` know tasks that succeeded or were cancelled.
        blob_limit: Bytes that all stored tokens of oversize tasks may take together.
        dead_seconds: Older dead letters are archived.
        dead_limit: Of more dead letters the oldest are archived.
        producers: Connections at most through which this process enqueues.
        workers: Connections at most for each of leasing, settling and keeping the ledger, of each event loop within
            ``on_loop`` and of the store's own; one more listens.

    The first call connects. Every method may raise ``QueueUnavailable``, and the first ``ConfigurationError`` if the
    database was not migrated.
    """

    def __init__(
        self,
        dsn: str,
        *,
        tombstone_seconds: float = 9 * 86400,
        history_seconds: float = HISTORY_SECONDS,
        blob_limit: int = 2**30,
        dead_seconds: float = 90 * 86400,
        dead_limit: int = 100_000,
        producers: int = 8,
        workers: int = 4,
    ) -> None:
        self._dsn = dsn = check_url(dsn)
        self._options = StorageOptions(
            tombstone_seconds=tombstone_seconds,
            history_seconds=history_seconds,
            blob_limit=blob_limit,
            dead_seconds=dead_seconds,
            dead_limit=dead_limit,
        )
        self._store = PostgresStore(dsn, producers=producers, workers=workers)
        self._pruning = Pruning(self._options)
        self._ledger = PostgresLedger(self._store)
        self._blobs = PostgresBlobs(self._store)
        self._keep = pushed.PostgresKeep(self._store, blob_limit)
        self._copies = copies.PostgresCopies(self._store)

    def __repr__(self) -> str:
        """Show the address, without user and password."""
        return f"{type(self).__name__}({place(getattr(self, '_dsn', ''))!r})"

    @property
    def capabilities(self) -> Capabilities:
        """All but two: pgqueuer picks in the order of enqueueing, and ``wait`` may end for nothing."""
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
    def keep(self) -> pushed.PostgresKeep:
        """What the same database keeps of tasks that a push engine delivers."""
        return self._keep

    @property
    def copies(self) -> copies.PostgresCopies:
        """Copies of tasks that a push engine may lose."""
        return self._copies

    @property
    def pushed_calls(self) -> pushed.PostgresPushedCalls | None:
        """What the handler calls under a push engine, on connections of the running loop within ``on_loop``; else None."""
        pools = self._store.here
        return None if pools is None else pushed.PostgresPushedCalls(self._store, pools)

    def sync(self) -> str:
        """Return when what is committed now survives a crash of the server. Raises ``QueueUnavailable``.

        The text is another one after such a crash: it may have undone what was committed without a sync before it.
        """
        (row,) = self._store.run(lambda connection: connection.fetch(SQL["written"]), idempotent=True)
        return str(row["mark"])

    @property
    def statements(self) -> Self:
        """Itself: any connection to the database can enqueue."""
        return self

    @property
    def file(self) -> None:
        """None: it is in a database."""
        return None

    @property
    def marker(self) -> str:
        """The random text in the settings of the database that names it."""
        return self._store.open_patiently(producers.PATIENCE).marker

    def close(self) -> None:
        """Wait a while for running statements, and disconnect. Later calls raise ``QueueUnavailable``."""
        self._store.close()

    # --- Event loops ------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def on_loop(self) -> AsyncIterator[PostgresCalls]:
        """Keep connections of the running loop while the context lasts; the ledger's ``here`` uses them too.

        Up to ``workers`` for each of leasing, settling and keeping the ledger, connected when they are needed.
        """
        async with self._store.on_loop() as pools:
            yield self._calls(pools, own_loop=False)

    def _calls(self, pools: Pools, *, own_loop: bool) -> PostgresCalls:
        return PostgresCalls(
            self._store,
            pools,
            pruning=self._pruning,
            tombstone_seconds=self._options.tombstone_seconds,
            own_loop=own_loop,
        )

    def _wait_for(self, call: Callable[[PostgresCalls], Coroutine[Any, Any, _T]], /) -> _T:
        """Make a call on the store's own loop, and block until it is done."""
        connections = self._store.open()
        return connections.wait_for(call(self._calls(connections.pools, own_loop=True)))

    # --- Enqueue and cancel -----------------------------------------------------------------------

    def enqueue_many(self, tasks: Iterable[QueuedTask], /) -> None:
        """Store all tasks or none, in one transaction. Raises also what the iterator raises.

        Tasks are taken from the iterator and sent in batches of 100; the server stores one while the next is made.
        """
        parts = iter(tasks)
        batches = iter(lambda: list(islice(parts, _STORED_AT_ONCE)), [])
        limit = self._options.blob_limit
        values = ((enqueue_values(batch, blob_limit=limit), {task.id for task in batch}) for batch in batches)
        if self._store.open_patiently(producers.PATIENCE).producers.store(values):
            self._store.watch.changed()

    def enqueue_statements(self, tasks: Sequence[QueuedTask], /) -> list[tuple[str, tuple[object, ...]]]:
        """Return the statements that enqueue tasks, with ``$1`` placeholders, for a transaction of the user's.

        The tasks are enqueued if and only if that transaction commits. ``refusal`` translates errors of the statements.
        """
        enqueue = STATEMENTS.enqueue, enqueue_values(tasks, blob_limit=self._options.blob_limit)
        unique = [task for task in tasks if task.unique_key is not None]
        if not unique:
            return [enqueue]
        keys = [task.queue for task in unique], [task.unique_key for task in unique]
        return [(SQL["uniques_free"], keys), enqueue]

    def refusal(self, error: BaseException, /) -> Exception | None:
        """Return the error of safedefer for a database error of ``enqueue_statements``; None if it is no refusal."""
        return refusal(error)

    def cancel(self, task_id: str, *, now: float) -> bool:
        """Cancel a task that waits, is leased or runs; False if there is none, or it has ended."""
        if self._cancel([task_id], now=now):
            return True
        return self._store.run(partial(ends.stop, task_id=task_id), transaction=True)

    def _cancel(self, task_ids: Sequence[str], *, now: float) -> int:
        action = partial(
            ends.cancel,
            task_ids=task_ids,
            now=now,
            seconds=self._lease_seconds(),
            tombstone_seconds=self._options.tombstone_seconds,
        )
        return self._store.run(action, transaction=True)

    def purge(self, queue: str, *, now: float) -> int:
        """Cancel all tasks that wait in a queue at the time of the call, 500 in a transaction; returns how many."""
        newest = self._store.run(lambda connection: connection.fetch(SQL["newest_job"]))[0]["newest"]
        total = position = 0
        while True:
            rows = self._store.run(partial(_next_to_purge, queue=queue, after=position, newest=newest))
            if not rows:
                return total
            total += self._cancel([row["dedupe_key"] for row in rows], now=now)
            position = rows[-1]["id"]

    # --- Controls ---------------------------------------------------------------------------------

    def configure(self, limits: Sequence[QueueLimits], *, now: float) -> None:  # noqa: ARG002 - the database's clock
        """Put the declared limits in force, for every dispatcher of the database."""
        self._store.run(partial(controls.configure, limits=limits), transaction=True)

    def controls(self, *, now: float) -> Sequence[QueueControl]:  # noqa: ARG002 - the database's clock
        """Return the limits, pauses and holds of queues, sorted by name."""
        return self._store.run(controls.current_controls)

    def pause(self, queue: str, *, paused: bool, now: float) -> None:  # noqa: ARG002 - the database's clock
        """Lease nothing of a queue until it is resumed (``paused=False``); running tasks go on."""
        self._store.run(partial(controls.change_control, queue=queue, paused=paused), transaction=True)
        self.wake()

    def hold(self, queue: str, *, until: float, now: float) -> None:
        """Lease nothing of a queue before ``until``; a time before that of an earlier hold changes nothing."""
        action = partial(controls.change_control, queue=queue, hold_for=until - now)
        self._store.run(action, transaction=True, purpose="relaxed")

    # --- Lease and settle -------------------------------------------------------------------------

    def lease(
        self, *, owner: str, limit: int, seconds: float, now: float, queues: Sequence[str] | None = None
    ) -> Sequence[Lease]:
        """Claim up to ``limit`` due tasks, in the order in which they were enqueued.

        A lease ends ``seconds`` after its last heartbeat, by the ``seconds`` of the dispatcher that looks for lost ones:
        give all dispatchers of a database the same.
        """
        return self._wait_for(
            lambda calls: calls.lease(owner=owner, limit=limit, seconds=seconds, now=now, queues=queues)
        )

    def _lease_seconds(self) -> float:
        """Return the length of a lease: that of this process's leases, else that of the database."""
        noted = self._store.noted_lease_seconds
        return self._store.open().lease_seconds if noted is None else noted

    def extend_many(self, leases: Sequence[Lease], *, seconds: float, now: float) -> Sequence[bool]:  # noqa: ARG002 - the database's clock
        """Prolong leases by a heartbeat; False stands for a lost one."""
        action = partial(leasing.extend_many, leases=leases)
        return self._store.run(action, purpose="relaxed", idempotent=True)

    def release(self, owners: Sequence[str], *, now: float) -> int:  # noqa: ARG002 - the database's clock
        """Let the leases of dead dispatchers run out whose run has not begun; returns how many."""
        managers = [leasing.manager_of(owner) for owner in owners]
        action = partial(leasing.release, managers=managers, seconds=self._lease_seconds())
        released = self._store.run(action, transaction=True, idempotent=True)
        self.wake()
        return released

    def settle_many(self, settlements: Sequence[tuple[Lease, Settlement]], *, now: float) -> Sequence[bool]:
        """Apply the ends of deliveries in one transaction; False stands for a lost lease."""
        return self._wait_for(lambda calls: calls.settle_many(settlements, now=now))

    def next_due(self, *, now: float, queues: Sequence[str] | None = None) -> float | None:
        """Return when the next task or lease falls due and its queue may give it, maybe in the past; None: never."""
        action = partial(controls.next_due, seconds=self._lease_seconds(), now=now, queues=queues)
        return self._store.run(action, idempotent=True)

    def wait(self, timeout: float) -> bool:
        """Block until a task may have been enqueued (by any process), or for ``timeout`` seconds."""
        self._store.open().listen()
        return self._store.watch.wait(timeout)

    def wake(self) -> None:
        """End a ``wait`` of this process early."""
        self._store.watch.changed()

    def prune(self, *, now: float) -> int:
        """Delete old tombstones, history, stray records and ledger entries, archive dead letters; returns how many.

        Up to 500 of each kind in one call. ``lease`` prunes about once a minute, and sooner after a call that
        reached its limit.
        """
        return self._store.run(partial(self._pruning.prune, now=now), purpose="relaxed")

    # --- Views and dead letters -------------------------------------------------------------------

    def stats(self, *, now: float) -> Sequence[QueueStats]:  # noqa: ARG002 - the database's clock
        """Return counts of every queue that has a task or a dead letter, sorted by name."""
        return self._store.run(partial(views.stats, seconds=self._lease_seconds()))

    def clock(self) -> float:
        """Return the time by the database's clock, in seconds since the epoch."""

        async def ask(connection: Connection) -> float:
            rows = await connection.fetch("SELECT EXTRACT(EPOCH FROM pg_catalog.clock_timestamp())::float8 AS now")
            return float(rows[0]["now"])

        return self._store.run(ask, idempotent=True)

    def tasks(
        self, *, states: Sequence[TaskState] = (), queue: str | None = None, limit: int = 100
    ) -> Sequence[TaskView]:
        """List tasks, newest first, without records; without ``states``: waiting, running and dead."""
        return self._store.run(partial(views.tasks, states=states, queue=queue, limit=limit))

    def live_tasks(
        self, *, queue: str | None = None, after: int = 0, limit: int = 100
    ) -> Sequence[tuple[int, TaskView]]:
        """List waiting and running tasks with their places."""
        return self._store.run(partial(views.live_tasks, queue=queue, after=after, limit=limit))

    def page(
        self, state: TaskState, *, queue: str | None = None, after: Position | None = None, look: int = 100
    ) -> TaskPage:
        """List tasks of one state, newest first, from the one behind ``after`` on."""
        return self._store.run(partial(views.page, state=state, queue=queue, after=after, look=look))

    def ends(self, *, since: float, step: float, most: int = 100_000) -> Sequence[EndCount]:
        """Count what ended since a time, in steps of ``step`` seconds."""
        return self._store.run(partial(views.ends, since=since, step=step, most=most))

    def attempt_times(self, *, since: float, most: int = 1_000) -> Sequence[AttemptTime]:
        """Return how long the newest attempts took that ended since a time: ``most`` successes and ``most`` others."""
        return self._store.run(partial(views.attempt_times, since=since, most=most))

    def put_notice(self, process: str, text: str, *, now: float) -> None:
        """Store what a process says of itself; an empty text deletes that."""
        self._store.run(partial(views.put_notice, process=process, text=text, now=now), idempotent=True)

    def notices(self, *, since: float) -> Sequence[Notice]:
        """Return the newest notices that were written since a time."""
        return self._store.run(partial(views.notices, since=since), idempotent=True)

    def find(self, task_id: str) -> TaskView | None:
        """Return one task in whatever state, with the records of its attempts; an ended one without its token."""
        return self._store.run(partial(views.find, task_id=task_id), idempotent=True)

    def dead_letters(
        self, where: DeadFilter, *, after: tuple[float, str] | None = None, limit: int = 100
    ) -> Sequence[TaskView]:
        """List dead letters with their records, oldest first; ``after`` is ``(ended, id)`` of the last one seen."""
        return self._store.run(partial(views.dead_letters, where=where, after=after, limit=limit))

    def replace_dead(
        self,
        task_id: str,
        task: QueuedTask,
        letter: VerifiedLetter,
        *,
        now: float,  # noqa: ARG002 - the seam has it
    ) -> bool:
        """Enqueue ``task`` and delete the dead letter, in one transaction; False if there is none."""

        async def action(connection: Connection) -> bool:
            if not await ends.drop_dead(connection, [task_id]):
                return False
            await ends.note_replacement(connection, task_id, letter)
            for statement, values in self.enqueue_statements((task,)):
                await connection.execute(statement, *values)
            return True

        replaced = self._store.run(action, transaction=True)
        self._store.watch.changed()
        return replaced

    def bury(self, task: QueuedTask, *, reason: str | None, attempts: int, now: float, verified: bool) -> bool:
        """Make a dead letter of a task that the queue does not have."""
        action = partial(pushed.bury, task=task, reason=reason, attempts=attempts, now=now, verified=verified)
        return self._store.run(action, transaction=True)

    def hand_over(self, leases: Sequence[Lease], *, now: float) -> Sequence[bool]:  # noqa: ARG002 - no tombstones
        """Forget tasks that a push engine has taken over, in one transaction; False for each lost lease."""
        return self._store.run(partial(pushed.hand_over, leases=leases), transaction=True)

    def drop_dead(self, task_ids: Sequence[str]) -> int:
        """Delete dead letters, archived ones too, in one transaction; returns how many there were."""
        return self._store.run(partial(ends.drop_dead, task_ids=task_ids), transaction=True)


async def _next_to_purge(connection: Connection, *, queue: str, after: int, newest: int) -> Sequence[Mapping[str, Any]]:
    return await connection.fetch(SQL["purge_next"], queue, after, newest, _PURGED_AT_ONCE)
