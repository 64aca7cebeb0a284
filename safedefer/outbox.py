"""Tasks that go with a transaction of the user's: enqueued if it commits, and only then.

A transactional task is written to a table in the user's own database, the outbox, by the user's own
connection. Once that is committed a relay moves it to the queue: it enqueues first and deletes after, so a
crash in between repeats the enqueue, which the queue refuses because it knows the task's id. Nothing is
lost and nothing comes twice.

A connection to the queue's own file needs no outbox: its transaction is the queue's.

The outbox carries opaque bytes, like the queue: nothing here can decode, import or run a task.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

from safedefer.blobs import Blob
from safedefer.connections import ApswSource, Source, opener_of, source_of
from safedefer.errors import (
    BadTransactionStateError,
    DeferError,
    Error,
    QueueError,
    TaskAlreadyExistsError,
    TombstonedTaskError,
)
from safedefer.queues.base import QueuedTask

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from safedefer.queues.base import Queue

_log: Final = logging.getLogger("safedefer.outbox")

_BATCH: Final = 100
#: Seconds between two looks at an outbox in which nothing is expected.
_SWEEP_SECONDS: Final = 2.0
#: Seconds between the first looks for what a transaction of the user's may have committed meanwhile.
_FIRST_LOOK: Final = 0.01
#: An effect is remembered this many seconds: longer than any token lives.
_REMEMBERED: Final = 94 * 86_400

_CREATE: Final = """
    CREATE TABLE IF NOT EXISTS safedefer_outbox (
        id VARCHAR(64) NOT NULL PRIMARY KEY, created DOUBLE PRECISION NOT NULL, task TEXT NOT NULL
    )
"""
_INSERT: Final = "INSERT INTO safedefer_outbox (id, created, task) VALUES (:id, :created, :task)"
_NEXT: Final = """
    SELECT id, created, task FROM safedefer_outbox
    WHERE created > :created OR (created = :created AND id > :id) ORDER BY created, id LIMIT :limit
"""
_DELETE: Final = "DELETE FROM safedefer_outbox WHERE id = :id"

_CREATE_ONCE: Final = """
    CREATE TABLE IF NOT EXISTS safedefer_once (
        effect VARCHAR(700) NOT NULL PRIMARY KEY, expires DOUBLE PRECISION NOT NULL
    )
"""
_INDEX_ONCE: Final = "CREATE INDEX IF NOT EXISTS safedefer_once_expires ON safedefer_once (expires)"
_FORGET_ONCE: Final = "DELETE FROM safedefer_once WHERE expires < :now"
_FIND_ONCE: Final = "SELECT 1 FROM safedefer_once WHERE effect = :effect"
_INSERT_ONCE: Final = """
    INSERT INTO safedefer_once (effect, expires) VALUES (:effect, :expires) ON CONFLICT (effect) DO NOTHING
"""

_Opener = Callable[[], AbstractContextManager[Source]]


@dataclass(slots=True)
class _Transaction:
    """One ``with app.transaction(...)`` block."""

    outbox: Outbox
    source: Source
    began: bool
    """Whether the block opened the transaction, and so ends it."""
    thread: int = field(default_factory=threading.get_ident)
    closed: bool = False
    count: int = 0


_blocks: Final[ContextVar[tuple[_Transaction, ...]]] = ContextVar("safedefer_transactions", default=())


class Outbox:
    """Where transactional tasks of one application wait for their commit.

    Args:
        queue: Where they go; called in the thread of the block and of the relay.
        urls: Databases to sweep besides those that this process has used: what a process that died left there.
        clock: Seconds since the epoch.
    """

    def __init__(self, queue: Callable[[], Queue], *, urls: Sequence[str] = (), clock: Callable[[], float]) -> None:
        self._queue = queue
        self._clock = clock
        self._relay = _Relay(queue)
        for url in urls:
            self._relay.add(*opener_of(url))

    @contextlib.contextmanager
    def transaction(self, connection: object) -> Iterator[None]:
        """Make transactional tasks of this block go with the connection's transaction.

        If none is open, the block opens one, commits it at its end, and undoes it if the block raises. If one
        is open already, it stays the caller's to commit, and tasks are enqueued soon after that.

        Raises:
            BadTransactionStateError: The connection is of no known kind, or cannot be used for this.
        """
        source = source_of(connection)
        self._check(source)
        block = _Transaction(self, source, began=not source.in_transaction())
        (source.begin if block.began else source.check)()
        if not block.began and not self._is_queues_own(source) and source.reopen() is None:
            raise BadTransactionStateError(
                "nobody else can read a database in memory after your commit; let app.transaction() open the transaction"
            )
        token = _blocks.set((*_blocks.get(), block))
        try:
            with _ending(source, ours=block.began):
                yield
        finally:
            block.closed = True
            _blocks.reset(token)
        if block.count and not self._is_queues_own(source):
            self._after(block)

    def _after(self, block: _Transaction) -> None:
        source = block.source
        opener, identity = source.reopen(), source.identity
        if opener is None or identity is None:  # in memory, and so the block's own transaction, which is over
            try:
                relay(source, self._queue(), certain=True)
            except QueueError as error:  # committed is committed: the next block on this connection tries again
                _log.warning("the queue takes nothing from the outbox now (%s)", _name(error))
            return
        self._relay.add(identity, opener)
        # Through a connection of its own: reading with a session would open a transaction of the user's.
        if source.in_transaction():
            self._relay.expect(source)
        elif not self._relay.sweep_one(identity):
            self._relay.expect()

    def put(self, task: QueuedTask) -> None:
        """Write a task to the transaction of the innermost block.

        Raises:
            BadTransactionStateError: There is no block, its transaction is over, or the task has a name.
        """
        block = self.check(named=task.name is not None or task.unique_key is not None)
        queue = self._queue()
        if self._is_queues_own(block.source):
            queue.enqueue_on(block.source.connection, (task,))  # type: ignore[attr-defined]  # both have it, see above
        else:
            block.source.execute(_CREATE)
            block.source.execute(_INSERT, {"id": task.id, "created": task.created, "task": to_text(task)})
        block.count += 1

    def check(self, *, named: bool) -> _Transaction:
        """Return the block that a task may be put into.

        Raises:
            BadTransactionStateError: As ``put``.
        """
        block = next((block for block in reversed(_blocks.get()) if block.outbox is self), None)
        if block is None or block.closed:
            raise BadTransactionStateError(
                "a transactional task needs a transaction; defer it inside `with app.transaction(connection):`"
            )
        if named:
            raise BadTransactionStateError("a transactional task has no name and is not unique; leave that out")
        if block.thread != threading.get_ident():
            raise BadTransactionStateError("the transaction is another thread's; defer in the thread that began it")
        if not block.source.in_transaction():
            raise BadTransactionStateError("the transaction has ended already; defer before the commit")
        return block

    def _check(self, source: Source) -> None:
        path = getattr(self._queue(), "path", None)
        if path is not None and source.path == path and not isinstance(source, ApswSource):
            raise BadTransactionStateError(
                "two SQLite libraries in one process must not open one file, and the queue's is open with apsw; "
                "keep your tables in a file of their own, or use an apsw connection"
            )

    def _is_queues_own(self, source: Source) -> bool:
        path = getattr(self._queue(), "path", None)
        return isinstance(source, ApswSource) and path is not None and source.path == path

    @contextlib.contextmanager
    def once(self, connection: object, *, effect: str, also: str | None = None) -> Iterator[bool]:
        """Give True if ``effect`` has not been had in this database, and note it in the same transaction.

        The transaction is opened and ended as ``transaction`` does. ``also`` is an effect that counts as this one.
        """
        source = source_of(connection)
        self._check(source)
        ours = not source.in_transaction()
        (source.begin if ours else source.check)()
        with _ending(source, ours=ours):
            now = self._clock()
            source.execute(_CREATE_ONCE)
            source.execute(_INDEX_ONCE)
            source.execute(_FORGET_ONCE, {"now": now})
            earlier = also is not None and bool(source.rows(_FIND_ONCE, {"effect": also}))
            first = source.execute(_INSERT_ONCE, {"effect": effect, "expires": now + _REMEMBERED}) > 0
            yield first and not earlier

    def sweep(self) -> int:
        """Relay what waits in every known outbox; returns how many tasks."""
        return self._relay.sweep()

    def start(self) -> None:
        """Sweep now and then, from now on: for processes that dispatch."""
        self._relay.expect()

    def close(self) -> None:
        """End the relay."""
        self._relay.close()


@contextlib.contextmanager
def _ending(source: Source, *, ours: bool) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if ours and source.in_transaction():
            source.rollback()
        raise
    if ours and source.in_transaction():
        try:
            source.commit()
        except BaseException:
            if source.in_transaction():
                source.rollback()
            raise


def relay(source: Source, queue: Queue, *, certain: bool = False) -> int:
    """Move what is committed in an outbox to the queue; returns how many tasks.

    Args:
        source: A connection without an open transaction.
        queue: Where the tasks go.
        certain: Whether there is an outbox: then one that cannot be read is an error.

    Raises:
        QueueUnavailable: The queue takes nothing now; what is left stays in the outbox.
    """
    if not certain and not _has_table(source):
        return 0
    moved, position = 0, {"created": -1.0, "id": ""}
    while rows := source.rows(_NEXT, {**position, "limit": _BATCH}):
        _end_read(source)
        arrived = _hand_over(queue, [(str(row[0]), str(row[2])) for row in rows])
        source.begin()
        with _ending(source, ours=True):
            moved += sum(source.execute(_DELETE, {"id": task_id}) for task_id in arrived)
        position = {"created": float(rows[-1][1]), "id": str(rows[-1][0])}
    _end_read(source)
    return moved


def _has_table(source: Source) -> bool:
    try:
        source.rows("SELECT 1 FROM safedefer_outbox LIMIT 1")
    except Exception:  # noqa: BLE001  # each library has its own error for "no such table"
        return False
    finally:
        _end_read(source)
    return True


def _end_read(source: Source) -> None:
    # SQLAlchemy opens a transaction to read.
    if source.in_transaction():
        source.rollback()


def _hand_over(queue: Queue, rows: list[tuple[str, str]]) -> list[str]:
    """Enqueue tasks; return the ids of those that the queue has now."""
    tasks = []
    for task_id, text in rows:
        try:
            tasks.append(from_text(text))
        except (ValueError, TypeError, KeyError) as error:
            _log.error("the outbox has a row that is no task (%s): %a; look at it", _name(error), task_id)
    try:
        queue.enqueue_many(tasks)
    except DeferError:  # one of them is there already: one by one
        return [task.id for task in tasks if _enqueued(queue, task)]
    return [task.id for task in tasks]


def _enqueued(queue: Queue, task: QueuedTask) -> bool:
    try:
        queue.enqueue(task)
    except (TaskAlreadyExistsError, TombstonedTaskError):
        find: Callable[[str], object] | None = getattr(queue, "find", None)
        if find is None or find(task.id) is not None:
            return True
        _log.error("the queue refuses task %s of the outbox; look at it", task.id)
        return False
    return True


class _Relay:
    """A thread that sweeps outboxes: at once when something is expected, and every few seconds anyway."""

    def __init__(self, queue: Callable[[], Queue]) -> None:
        self._queue = queue
        self._openers: dict[str, _Opener] = {}
        self._begin()
        # Here: the registry of forks is with the queue's file.
        from safedefer.queues.sqlite_connection import register_fork  # noqa: PLC0415

        register_fork(self, early=True)

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._sweeping = threading.Lock()
        self._thread: threading.Thread | None = None
        self._expected = False
        self._closed = False
        self._open: list[Source] = []
        self._open_until = 0.0

    def add(self, identity: str, opener: _Opener) -> None:
        """Take note of a database."""
        with self._changed:
            self._openers.setdefault(identity, opener)

    def expect(self, source: Source | None = None) -> None:
        """Look soon, and then less and less often; but not while ``source`` is in its transaction, if that is short."""
        with self._changed:
            self._expected = True
            if source is not None:
                self._open.append(source)
                self._open_until = time.monotonic() + _SWEEP_SECONDS
            self._changed.notify()
            if self._thread is None and not self._closed:
                # The thread must not keep its owner alive.
                self._thread = threading.Thread(
                    target=_sweep_loop, args=(weakref.ref(self),), name="safedefer-outbox", daemon=True
                )
                self._thread.start()

    def rest(self, seconds: float) -> bool:
        """Wait; whether something is expected anew."""
        with self._changed:
            if not self._expected and not self._closed:
                self._changed.wait(seconds)
            expected, self._expected = self._expected, False
            return expected

    def too_early(self) -> bool:
        """Whether a transaction is open that something is expected of: reading now could be in its way."""
        with self._changed:
            patient = time.monotonic() < self._open_until
            self._open = [source for source in self._open if patient and _is_open(source)]
            return bool(self._open)

    @property
    def closed(self) -> bool:
        """Whether the thread should end."""
        return self._closed

    def sweep(self) -> int:
        """Relay every known outbox; returns how many tasks were moved."""
        return sum(self._sweep(identity) or 0 for identity in list(self._openers))

    def sweep_one(self, identity: str) -> bool:
        """Relay one outbox; whether it is empty now."""
        return self._sweep(identity, certain=True) is not None

    def _sweep(self, identity: str, *, certain: bool = False) -> int | None:
        # Open only while it is used: a connection must not be carried across a fork.
        with self._sweeping:
            try:
                with self._openers[identity]() as source:
                    return relay(source, self._queue(), certain=certain)
            except FileNotFoundError:  # nobody has made the database yet
                return 0
            except QueueError as error:
                _log.warning("the queue takes nothing from the outbox now (%s); trying again", _name(error))
            except Exception as error:  # noqa: BLE001  # the user's database, by whatever library
                _log.warning("the outbox in %a cannot be read now (%s); trying again", identity, _name(error))
        return None

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(10.0)

    def before_fork(self) -> None:
        """Let a sweep end first."""
        self._sweeping.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._sweeping.release()

    def after_fork_in_child(self) -> None:
        """Begin anew: the thread is the parent's."""
        closed = self._closed
        self._begin()
        self._closed = closed


def _is_open(source: Source) -> bool:
    try:
        return source.in_transaction()
    except Exception:  # noqa: BLE001  # the connection was closed, by whatever library
        return False


def _sweep_loop(reference: weakref.ref[_Relay]) -> None:
    pause = _FIRST_LOOK
    while (this := reference()) is not None and not this.closed:
        if this.too_early():
            this.rest(_FIRST_LOOK)
        else:
            this.sweep()
            pause = _FIRST_LOOK if this.rest(pause) else min(pause * 2, _SWEEP_SECONDS)
        del this


def to_text(task: QueuedTask) -> str:
    """Return a task as JSON text; bytes as Latin-1, one character for each."""
    document: dict[str, Any] = {item.name: getattr(task, item.name) for item in fields(task)}
    document["token"] = task.token.decode("latin-1")
    document["digest"] = task.digest.decode("latin-1")
    document["headers"], document["retry_options"] = dict(task.headers), dict(task.retry_options)
    document["blob"] = None if task.blob is None else [task.blob.id, task.blob.data.decode("latin-1")]
    return json.dumps(document)


def from_text(text: str) -> QueuedTask:
    """Return the task that ``to_text`` wrote. Raises ``ValueError``, ``TypeError`` or ``KeyError``."""
    document: Mapping[str, Any] = json.loads(text)
    blob = document["blob"]
    return QueuedTask(
        **{
            **document,
            "token": document["token"].encode("latin-1"),
            "digest": document["digest"].encode("latin-1"),
            "blob": None if blob is None else Blob(blob[0], blob[1].encode("latin-1")),
        }
    )


def _name(error: BaseException) -> str:
    return error.slug if isinstance(error, Error) else type(error).__name__
