"""The SQLite queue: one file, whose every acknowledged task survives a crash and a power cut.

Over 450 lines, since it is the engine's whole side of the seam; what happens in a transaction is in ``operations``.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, cast

from safedefer.concurrency.forks import register_fork
from safedefer.errors import ConfigurationError, QueueUnavailable
from safedefer.queues.base import (
    HISTORY_SECONDS,
    AttemptTime,
    DeadFilter,
    EndCount,
    Lease,
    LeaseCalls,
    Notice,
    Position,
    QueuedTask,
    QueueStats,
    Settlement,
    TaskPage,
    TaskState,
    TaskView,
)
from safedefer.queues.capabilities import FULL, Capabilities
from safedefer.queues.sqlite import controls, copies, operations, pushed, views
from safedefer.queues.sqlite.connection import SQL, Handle
from safedefer.queues.sqlite.enqueuing import Enqueue
from safedefer.queues.sqlite.ledger import SQLiteBlobs, SQLiteLedger
from safedefer.queues.sqlite.ledger import prune as prune_ledger
from safedefer.queues.sqlite.log_sync import LogSync
from safedefer.queues.sqlite.repair import BadValue, mend, number
from safedefer.queues.sqlite.rows import attempt_record, first_row, task_view
from safedefer.queues.sqlite.settling import settle_all
from safedefer.queues.sqlite.watch import FileWatch
from safedefer.queues.sqlite.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractAsyncContextManager

    import apsw

    from safedefer.ledger import AttemptRecord, VerifiedLetter
    from safedefer.queues.rates import QueueControl, QueueLimits

T = TypeVar("T")

_PRUNE_EVERY: Final = 60.0
_PRUNE_AGAIN: Final = 0.2
_PRUNED_AT_ONCE: Final = 500
_PURGED_AT_ONCE: Final = 500
_EARLIEST: Final = float("-inf")
_DEFAULT_STATES: Final = (TaskState.WAITING, TaskState.RUNNING, TaskState.DEAD)

_VIEWS: Final = {
    TaskState.WAITING: ("view_tasks", "WHERE owner IS NULL"),
    # Few tasks run at a time; without the hint SQLite looks for them among all that wait.
    TaskState.RUNNING: ("view_tasks", "INDEXED BY safedefer_tasks_leased WHERE owner IS NOT NULL"),
    TaskState.DEAD: ("view_dead", "WHERE archived IS NULL"),
    TaskState.SUCCEEDED: ("view_ended", "WHERE state = 'succeeded'"),
    TaskState.CANCELLED: ("view_ended", "WHERE state = 'cancelled'"),
}


class SQLiteQueue:
    """A ``PullQueue`` in a SQLite file, for any number of threads and processes of one machine.

    ``path`` is the file, created with mode 0600 when first used. ``tombstone_seconds`` is how long
    the name of an ended task is not free (App Engine: 9 days). ``history_seconds`` is how long
    ``find`` and ``tasks`` know what succeeded or was cancelled. ``busy_timeout`` is the seconds to
    wait for the lock of another process. ``blob_limit`` is the bytes that all stored tokens of oversize
    tasks may take together. Dead letters older than ``dead_seconds``, and the oldest of more than
    ``dead_limit``, are archived. Nothing is opened before the first call.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        tombstone_seconds: float = 9 * 86400,
        history_seconds: float = HISTORY_SECONDS,
        busy_timeout: float = 30.0,
        blob_limit: int = 2**30,
        dead_seconds: float = 90 * 86400,
        dead_limit: int = 100_000,
    ) -> None:
        text = os.fspath(path)
        if not text or text == ":memory:" or "\0" in text:
            raise ConfigurationError(f"{text!r} is not the path of a file; for a queue without one use memory://")
        self._path = os.path.realpath(text)
        self.is_relative: bool = not os.path.isabs(text)  # noqa: PTH117
        """Whether the path was given as one of the current folder: a process in another folder uses another file."""
        if os.path.islink(text) and not os.path.exists(text):  # noqa: PTH110, PTH114 - a text, as everything here
            # A dangling link would let its owner choose the path of the new file.
            raise ConfigurationError(
                f"the queue's file {text!a} is a symbolic link to {self._path!a}, which does not exist; remove the link, "
                "or make the file that it leads to"
            )
        self._tombstone_seconds = tombstone_seconds
        self._history_seconds = history_seconds
        self._blob_limit = blob_limit
        self._dead_seconds = dead_seconds
        self._dead_limit = dead_limit
        self._next_prune = float("-inf")
        self._writer = Writer(self._path, busy_timeout=busy_timeout)
        make_file = self._writer.make_file
        self._reader = Handle(self._path, busy_timeout=busy_timeout, make_file=make_file)
        register_fork(self._reader)
        self._watch = FileWatch(self._path, busy_timeout=busy_timeout, make_file=make_file)
        self._sync_log = LogSync(self._path, self._writer, self._reader)
        self._ledger = SQLiteLedger(self._writer, self._reader, self._sync_log)
        self._blobs = SQLiteBlobs(self._writer, self._reader)
        self._keep = pushed.SQLiteKeep(self._writer, self._reader, blob_limit)
        self._copies = copies.SQLiteCopies(self._writer)
        self._pushed_calls = pushed.SQLitePushedCalls(self._writer)
        self._finalizer = weakref.finalize(self, _close, self._writer, self._reader, self._watch, wait=False)
        self._finalizer.atexit = False
        _open.add(self)

    def __repr__(self) -> str:
        """Show the path."""
        return f"{type(self).__name__}({getattr(self, '_path', '')!r})"

    @property
    def capabilities(self) -> Capabilities:
        """All of them."""
        return FULL

    @property
    def path(self) -> str:
        """The absolute path of the file."""
        return self._path

    @property
    def pushed_calls(self) -> pushed.SQLitePushedCalls:
        """What the handler calls under a push engine, on any event loop."""
        return self._pushed_calls

    def sync(self) -> None:
        """Return when what any process has committed so far survives a power cut. Raises ``QueueUnavailable``."""
        self._sync_log()

    @property
    def statements(self) -> None:
        """None: the library of an apsw connection to the file is the queue's own, so ``file`` serves."""
        return None

    @property
    def file(self) -> Self:
        """Itself."""
        return self

    @property
    def ledger(self) -> SQLiteLedger:
        """The ledger in the same file."""
        return self._ledger

    @property
    def blobs(self) -> SQLiteBlobs:
        """The blobs in the same file."""
        return self._blobs

    @property
    def keep(self) -> pushed.SQLiteKeep:
        """What the same file keeps of tasks that a push engine delivers."""
        return self._keep

    @property
    def copies(self) -> copies.SQLiteCopies:
        """Copies of tasks that a push engine may lose."""
        return self._copies

    def close(self) -> None:
        """Finish what was accepted and close the file. Later calls raise ``QueueUnavailable``."""
        if self._finalizer.detach() is not None:
            _close(self._writer, self._reader, self._watch, wait=True)

    # --- Enqueue ----------------------------------------------------------------------------------

    def enqueue_many(self, tasks: Iterable[QueuedTask], /) -> None:
        """Store all tasks or none, with their blobs, in one transaction."""
        self._watch.announce(self._writer.run(Enqueue(list(tasks), self._blob_limit)))

    def enqueue_on(self, connection: apsw.Connection, tasks: Sequence[QueuedTask], /) -> None:
        """Store tasks in the transaction of an apsw connection to the queue's own file.

        They are enqueued if and only if that transaction commits. Raises what ``enqueue_many`` raises,
        ``ConfigurationError`` for a connection to another file, and apsw's errors as they are.
        """
        if os.path.realpath(connection.filename) != self._path:
            raise ConfigurationError(f"the connection's file is not the queue's; connect to {self._path}")
        try:
            with connection:
                operations.take_write_lock(connection)
                operations.newest_seq(connection)
                for task in tasks:
                    operations.enqueue(connection, task, blob_limit=self._blob_limit)
        except BadValue:
            raise QueueUnavailable(
                f"the queue's file {self._path} holds a number that is none of its own; enqueue a task outside of a transaction, "
                "which repairs it, and try again"
            ) from None

    def cancel(self, task_id: str, *, now: float) -> bool:
        """Cancel a task that waits, is leased or runs; False if there is none, or it has ended."""
        seconds = self._tombstone_seconds
        return self._writer.run(
            lambda connection: (
                operations.cancel(connection, task_id, now=now, tombstone_seconds=seconds)
                or operations.stop(connection, task_id, now=now)
            )
        )

    def replace_dead(self, task_id: str, task: QueuedTask, letter: VerifiedLetter, *, now: float) -> bool:
        """Enqueue ``task`` and remove the dead letter, in one transaction; False if there is none."""

        def action(connection: apsw.Connection) -> tuple[bool, int]:
            replaced = operations.replace_dead(connection, task_id, task, letter, now=now, blob_limit=self._blob_limit)
            return replaced, operations.newest_seq(connection)

        replaced, newest = self._writer.run(action)
        self._watch.announce(newest)
        return replaced

    def drop_dead(self, task_ids: Sequence[str]) -> int:
        """Delete dead letters, archived ones too, in one transaction; returns how many there were."""
        return self._writer.run(lambda connection: operations.drop_dead(connection, task_ids))

    def bury(self, task: QueuedTask, *, reason: str | None, attempts: int, now: float, verified: bool) -> bool:
        """Make a dead letter of a task that the queue does not have."""
        action = partial(pushed.bury, task=task, reason=reason, attempts=attempts, now=now, verified=verified)
        return self._writer.run(action)

    def hand_over(self, leases: Sequence[Lease], *, now: float) -> Sequence[bool]:  # noqa: ARG002 - no tombstones
        """Forget tasks that a push engine has taken over, in one transaction; False for each lost lease."""
        return self._writer.run(partial(pushed.hand_over, leases=leases))

    # --- Rates, pauses, holds ---------------------------------------------------------------------

    def configure(self, limits: Sequence[QueueLimits], *, now: float) -> None:
        """Put the declared limits in force, for every dispatcher of the file."""
        self._writer.run(lambda connection: controls.configure(connection, limits, now=now))

    def controls(self, *, now: float) -> Sequence[QueueControl]:
        """Return the current limits, pauses and holds, sorted by queue."""
        return self._read(lambda connection: [control.refill(now) for control in controls.read(connection).values()])

    def pause(self, queue: str, *, paused: bool, now: float) -> None:
        """Lease nothing of a queue until it is resumed; what runs goes on."""
        self._writer.run(lambda connection: controls.pause(connection, queue, paused=paused, now=now))
        self.wake()

    def hold(self, queue: str, *, until: float, now: float) -> None:
        """Lease nothing of a queue before ``until``; an earlier time changes nothing."""
        self._writer.run(lambda connection: controls.hold(connection, queue, until=until, now=now), durable=False)

    def purge(self, queue: str, *, now: float) -> int:
        """Cancel all that waits in a queue at the time of the call, some hundreds in a transaction; returns how many."""
        newest = self._read(operations.newest_seq)
        total, position = 0, 0
        while True:

            def action(connection: apsw.Connection, after: int = position) -> tuple[int | None, int]:
                return operations.purge(
                    connection,
                    queue,
                    after=after,
                    newest=newest,
                    limit=_PURGED_AT_ONCE,
                    now=now,
                    tombstone_seconds=self._tombstone_seconds,
                )

            following, cancelled = self._writer.run(action)
            total += cancelled
            if following is None:
                return total
            position = following

    # --- Lease and settle -------------------------------------------------------------------------

    def lease(
        self, *, owner: str, limit: int, seconds: float, now: float, queues: Sequence[str] | None = None
    ) -> Sequence[Lease]:
        """Claim up to ``limit`` due tasks for ``seconds``, the one that fell due first before the others."""
        action = self._lease(owner=owner, limit=limit, seconds=seconds, now=now, queues=queues)
        return self._leased(self._writer.run(action, durable=False), now=now)

    def _lease(
        self, *, owner: str, limit: int, seconds: float, now: float, queues: Sequence[str] | None
    ) -> Callable[[apsw.Connection], tuple[list[Lease], int]]:
        def action(connection: apsw.Connection) -> tuple[list[Lease], int]:
            found = operations.lease(
                connection,
                owner=owner,
                limit=limit,
                seconds=seconds,
                now=now,
                queues=queues,
                tombstone_seconds=self._tombstone_seconds,
            )
            return found, operations.newest_seq(connection)

        return action

    def _leased(self, found: tuple[list[Lease], int], *, now: float) -> Sequence[Lease]:
        leases, newest = found
        self._watch.seen(newest, taken=len(leases))
        if now >= self._next_prune:
            # Not awaited: what is not deleted now is deleted at the next turn.
            self._next_prune = now + _PRUNE_EVERY
            self._writer.submit(lambda connection: self._prune(connection, now))
        return leases

    def extend_many(self, leases: Sequence[Lease], *, seconds: float, now: float) -> Sequence[bool]:
        """Extend leases; False for each lost one."""
        until = now + seconds
        return self._writer.run(
            lambda connection: [operations.extend(connection, lease, until=until) for lease in leases], durable=False
        )

    def release(self, owners: Sequence[str], *, now: float) -> int:
        """Let leases of dead dispatchers fall due whose run has not begun; returns how many."""
        released = self._writer.run(lambda connection: operations.release(connection, owners, now=now), durable=False)
        self.wake()
        return released

    def settle_many(self, settlements: Sequence[tuple[Lease, Settlement]], *, now: float) -> Sequence[bool]:
        """Settle deliveries in one transaction; False for each lost lease."""
        # What a power cut undoes, the next delivery finds in the ledger, which is synced.
        return self._writer.run(self._settle(settlements, now=now), durable=False)

    def _settle(
        self, settlements: Sequence[tuple[Lease, Settlement]], *, now: float
    ) -> Callable[[apsw.Connection], list[bool]]:
        return partial(settle_all, settlements=settlements, now=now, tombstone_seconds=self._tombstone_seconds)

    def next_due(self, *, now: float, queues: Sequence[str] | None = None) -> float | None:
        """When the next task or lease falls due, maybe in the past, or its queue lets it; None if there is none."""
        return self._read(lambda connection: _next_due(connection, now=now, queues=queues))

    def wait(self, timeout: float) -> bool:
        """Block until a task is enqueued (by any process) or ``timeout`` seconds pass.

        True if there may be a task that no ``lease`` or ``wait`` has seen yet, or after ``wake``.
        """
        return self._watch.wait(timeout)

    def wake(self) -> None:
        """End a ``wait`` of this process early."""
        self._watch.wake()

    def on_loop(self) -> AbstractAsyncContextManager[LeaseCalls]:
        """Give the calls of the running loop: the writer's thread answers them, and no other thread waits for it."""
        return contextlib.nullcontext(_OnLoop(self._writer, self._lease, self._leased, self._settle))

    def prune(self, *, now: float) -> int:
        """Delete what is too old: tombstones, history, stray records, ledger entries; returns how many.

        Does a bounded amount in one call. ``lease`` has it done about once a minute, and sooner if much is old.
        """
        return self._writer.run(lambda connection: self._prune(connection, now))

    def _prune(self, connection: apsw.Connection, now: float) -> int:
        removed = operations.prune(connection, now=now, history_seconds=self._history_seconds, limit=_PRUNED_AT_ONCE)
        removed += operations.archive(
            connection, now=now, dead_seconds=self._dead_seconds, dead_limit=self._dead_limit, limit=_PRUNED_AT_ONCE
        )
        removed += prune_ledger(connection, now=now, limit=_PRUNED_AT_ONCE)
        removed += pushed.prune(connection, now=now, limit=_PRUNED_AT_ONCE)
        if removed >= _PRUNED_AT_ONCE:  # there may be more, and more comes all the time
            self._next_prune = min(self._next_prune, now + _PRUNE_AGAIN)
        return removed

    # --- Views ------------------------------------------------------------------------------------

    def _read(self, look: Callable[[apsw.Connection], T]) -> T:
        """Read in one snapshot. Values that cannot be read are repaired first."""
        if self._reader.in_use_here:  # a signal handler that reads while its thread does
            return self._writer.run(look)
        try:
            return self._read_once(look)
        except (UnicodeDecodeError, BadValue):
            pass  # and its traceback goes, with the statement that holds on to that moment
        self._writer.run(mend)
        return self._read_once(look)

    def _read_once(self, look: Callable[[apsw.Connection], T]) -> T:
        with self._reader.use() as connection, connection:
            found = look(connection)
        return found  # noqa: RET504  # pyright: ignore[reportReturnType]  # to type checkers, `with` may swallow

    def stats(self, *, now: float) -> Sequence[QueueStats]:
        """Return the counts of every queue that has a task or a dead letter, sorted by name."""
        return self._read(lambda connection: _stats(connection, now=now))

    def tasks(
        self, *, states: Sequence[TaskState] = (), queue: str | None = None, limit: int = 100
    ) -> Sequence[TaskView]:
        """List tasks, newest first, without records; without ``states``: waiting, running and dead."""
        of_queue = "" if queue is None else " AND queue = :queue"

        def look(connection: apsw.Connection) -> list[TaskView]:
            found: list[TaskView] = []
            for state in dict.fromkeys(states or _DEFAULT_STATES):
                view, condition = _VIEWS[state]
                statement = f"{SQL[view]} {condition}{of_queue} ORDER BY seq DESC LIMIT :limit"
                found += map(task_view, connection.execute(statement, {"queue": queue, "limit": limit}))
            return found

        found = self._read(look)
        found.sort(key=lambda task: task.created, reverse=True)
        return found[:limit]

    def live_tasks(
        self, *, queue: str | None = None, after: int = 0, limit: int = 100
    ) -> Sequence[tuple[int, TaskView]]:
        """List waiting and running tasks with their places."""
        of_queue = "" if queue is None else " AND queue = :queue"
        statement = f"{SQL['view_tasks']} WHERE seq > :after{of_queue} ORDER BY seq LIMIT :limit"

        def look(connection: apsw.Connection) -> list[tuple[int, TaskView]]:
            rows = connection.execute(statement, {"queue": queue, "after": after, "limit": limit}).fetchall()
            return [(cast("int", row[-1]), task_view(row)) for row in rows]

        return self._read(look)

    def page(
        self, state: TaskState, *, queue: str | None = None, after: Position | None = None, look: int = 100
    ) -> TaskPage:
        """List tasks of one state, newest first, from the one behind ``after`` on."""
        return self._read(lambda connection: views.page(connection, state, queue=queue, after=after, look=look))

    def ends(self, *, since: float, step: float, most: int = 100_000) -> Sequence[EndCount]:
        """Count what ended since a time, in steps of ``step`` seconds."""
        return self._read(lambda connection: views.ends(connection, since=since, step=step, most=most))

    def attempt_times(self, *, since: float, most: int = 1_000) -> Sequence[AttemptTime]:
        """Return how long the newest ``most`` attempts took, of those that ended since a time."""
        return self._read(lambda connection: views.attempt_times(connection, since=since, most=most))

    def put_notice(self, process: str, text: str, *, now: float) -> None:
        """Store what a process says of itself; an empty text deletes that."""
        self._writer.run(partial(views.put_notice, process=process, text=text, now=now), durable=False)

    def notices(self, *, since: float) -> Sequence[Notice]:
        """Return the newest notices that were written since a time."""
        return self._read(partial(views.notices, since=since))

    def dead_letters(
        self, where: DeadFilter, *, after: tuple[float, str] | None = None, limit: int = 100
    ) -> Sequence[TaskView]:
        """List dead letters with their records, oldest first; ``after`` is ``(ended, id)`` of the last one seen."""
        ended, task_id = after or (_EARLIEST, "")
        values = {
            "archived": int(where.archived),
            "queue": where.queue,
            "reason": where.reason,
            "callable_name": where.callable_name,
            "since": _EARLIEST if where.since is None else where.since,
            "before": where.before,
            "after_ended": ended,
            "after_id": task_id,
            "limit": limit,
        }

        def look(connection: apsw.Connection) -> list[TaskView]:
            rows = connection.execute(SQL["dead_letters"], values).fetchall()
            return [task_view(row, _records(connection, str(row[0]))) for row in rows]

        return self._read(look)

    def find(self, task_id: str) -> TaskView | None:
        """Return one task in any state, with the records of its attempts; ended ones without a token."""

        def look(connection: apsw.Connection) -> TaskView | None:
            for view in ("view_tasks", "view_dead", "view_ended"):
                row = first_row(connection.execute(f"{SQL[view]} WHERE id = :id", {"id": task_id}))
                if row is not None:
                    return task_view(row, _records(connection, task_id))
            return None

        return self._read(look)


class _OnLoop:
    """``LeaseCalls`` that the writer's thread answers."""

    def __init__(
        self,
        writer: Writer,
        lease: Callable[..., Callable[[apsw.Connection], tuple[list[Lease], int]]],
        leased: Callable[..., Sequence[Lease]],
        settle: Callable[..., Callable[[apsw.Connection], list[bool]]],
    ) -> None:
        self._writer = writer
        self._lease, self._leased, self._settle = lease, leased, settle

    async def lease(
        self, *, owner: str, limit: int, seconds: float, now: float, queues: Sequence[str] | None = None
    ) -> Sequence[Lease]:
        """Do what ``SQLiteQueue.lease`` does."""
        action = self._lease(owner=owner, limit=limit, seconds=seconds, now=now, queues=queues)
        return self._leased(await self._writer.call(action, durable=False), now=now)

    async def settle_many(self, settlements: Sequence[tuple[Lease, Settlement]], *, now: float) -> Sequence[bool]:
        """Do what ``SQLiteQueue.settle_many`` does."""
        return await self._writer.call(self._settle(settlements, now=now), durable=False)


def _next_due(connection: apsw.Connection, *, now: float, queues: Sequence[str] | None) -> float | None:
    controlled = controls.in_force(connection, now=now, queues=queues)
    if controlled:
        return controls.next_due(connection, controlled, now=now, queues=queues)
    if queues is None:
        return number(connection.execute(SQL["next_due_of_all"]).get)
    found = (number(connection.execute(SQL["next_due_of_queue"], (queue,)).get) for queue in queues)
    return min((due for due in found if due is not None), default=None)


def _stats(connection: apsw.Connection, *, now: float) -> list[QueueStats]:
    tasks = _counts(connection.execute(SQL["stats_tasks"]))
    running = _counts(connection.execute(SQL["stats_running"], {"now": now}))
    dead = _counts(connection.execute(SQL["stats_dead"]))
    return [
        QueueStats(
            queue=queue,
            waiting=tasks.get(queue, 0) - running.get(queue, 0),
            running=running.get(queue, 0),
            dead=dead.get(queue, 0),
            oldest=number(connection.execute(SQL["stats_oldest"], {"queue": queue, "now": now}).get),
        )
        for queue in sorted({*tasks, *dead})
    ]


def _records(connection: apsw.Connection, task_id: str) -> list[AttemptRecord]:
    return [attempt_record(row) for row in connection.execute(SQL["attempts_of"], (task_id,))]


def _counts(rows: Iterable[tuple[Any, ...]]) -> dict[str, int]:
    return {queue: count for queue, count in rows}  # noqa: C416 - dict() would not do: a row has any length


def _close(writer: Writer, reader: Handle, watch: FileWatch, *, wait: bool) -> None:
    writer.close(wait=wait)
    reader.close(wait=wait)
    watch.close(wait=wait)


_open: Final[weakref.WeakSet[SQLiteQueue]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for queue in list(_open):
        queue.close()
