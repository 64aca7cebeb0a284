"""What moves tasks from the outboxes in users' databases to the queue, once their transactions are committed.

It enqueues first and deletes after: a crash in between repeats the enqueue, which the queue refuses because it
knows the task's id. Nothing is lost and nothing comes twice.

The outbox carries opaque bytes, like the queue: nothing here can decode, import or run a task.
"""

from __future__ import annotations

import atexit
import json
import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from safedefer.blobs import Blob
from safedefer.errors import Error, QueueError, QueueUnavailable, TaskAlreadyExistsError, TombstonedTaskError
from safedefer.queues.base import BlobsFull, Queue, QueuedTask, TaskView
from safedefer.transactions.databases import Opener, Source

_log: Final = logging.getLogger("safedefer.outbox")

_BATCH: Final = 100
#: Seconds between two looks at an outbox in which nothing is expected.
_SWEEP_SECONDS: Final = 2.0
#: The same in a process that has left nothing there for so long: another one may have died.
_IDLE_SECONDS: Final = 30.0
_IDLE_AFTER: Final = 600.0
#: Seconds between the first looks for what a transaction of the user's may have committed meanwhile.
_FIRST_LOOK: Final = 0.01
#: Seconds between two looks while transactions are open: a connection may begin another one at once.
_PACE: Final = 0.1

#: The outboxes of a database. In PostgreSQL each schema may have one: ``search_path`` decides where it is made.
_TABLES: Final = {
    "sqlite": "SELECT name FROM sqlite_master WHERE type = 'table' AND name = 'safedefer_outbox'",
    "postgresql": """
        SELECT quote_ident(n.nspname) || '.safedefer_outbox'
        FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relname = 'safedefer_outbox' AND c.relkind IN ('r', 'p') AND c.relpersistence <> 't'
        AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')
        AND has_table_privilege(c.oid, 'DELETE') ORDER BY 1
    """,
}
_NEXT: Final = """
    SELECT id, created, task FROM {table}
    WHERE created > :created OR (created = :created AND id > :id) ORDER BY created, id LIMIT :limit
"""
_DELETE: Final = "DELETE FROM {table} WHERE id = :id"


class RelayedTo(Queue, Protocol):
    """Where the tasks of an outbox go: a queue that can say whether it has a task."""

    def find(self, task_id: str) -> TaskView | None:
        """Return one task in whatever state; None if it is not known."""
        ...


async def relay(source: Source, queue: RelayedTo) -> int:
    """Move what is committed in a database's outboxes to the queue; returns how many tasks.

    Args:
        source: A connection without an open transaction.
        queue: Where the tasks go.

    Raises:
        QueueUnavailable: The queue takes nothing now; what is left stays in the outbox.
    """
    moved = 0
    for (table,) in await source.rows(_TABLES[source.dialect]):
        position: dict[str, object] = {"created": -1.0, "id": ""}
        while rows := await source.rows(_NEXT.format(table=table), {**position, "limit": _BATCH}):
            await _end_read(source)
            arrived, failure = _hand_over(queue, [(str(row[0]), str(row[2])) for row in rows])
            moved += await _delete(source, _DELETE.format(table=table), arrived)
            if failure is not None:
                raise failure
            position = {"created": float(rows[-1][1]), "id": str(rows[-1][0])}
    await _end_read(source)
    return moved


async def _delete(source: Source, statement: str, task_ids: list[str]) -> int:
    await source.begin()
    try:
        deleted = [await source.execute(statement, {"id": task_id}) for task_id in task_ids]
    except BaseException:
        await source.rollback()
        raise
    await source.commit()
    return sum(deleted)


async def _end_read(source: Source) -> None:
    # SQLAlchemy opens a transaction to read.
    if source.in_transaction():
        await source.rollback()


def _hand_over(queue: RelayedTo, rows: list[tuple[str, str]]) -> tuple[list[str], QueueUnavailable | None]:
    """Enqueue tasks; return the ids of those that the queue has now, and why it takes no more, if it does not."""
    tasks = []
    for task_id, text in rows:
        try:
            task = from_text(text)
            if task.id != task_id:
                raise ValueError("another task's id")  # noqa: TRY301  # it is as unreadable as the others
        except Exception as error:  # noqa: BLE001  # whatever somebody has written there
            _log.error("the outbox has a row that is no task (%s): %a; look at it", slug(error), task_id)
        else:
            tasks.append(task)
    try:
        queue.enqueue_many(tasks)
    except QueueUnavailable as error:
        if not isinstance(error, BlobsFull):
            return [], error
    except Exception as error:  # noqa: BLE001  # one of them is there already, or is of a kind that no queue takes
        _log.debug("the outbox is emptied one by one (%s)", slug(error))
    else:
        return [task.id for task in tasks], None
    return _one_by_one(queue, tasks)


def _one_by_one(queue: RelayedTo, tasks: list[QueuedTask]) -> tuple[list[str], QueueUnavailable | None]:
    """Enqueue tasks of which one is refused: it stays where it is, and the others go on."""
    arrived = []
    for task in tasks:
        try:
            if _enqueued(queue, task):
                arrived.append(task.id)
        except BlobsFull as error:
            _log.warning("task %s stays in the outbox: %s", task.id, error)
        except QueueUnavailable as error:
            return arrived, error
        except Exception as error:  # noqa: BLE001  # see above
            _log.error("the queue does not take task %a of the outbox (%s); look at it", task.id, slug(error))
    return arrived, None


def _enqueued(queue: RelayedTo, task: QueuedTask) -> bool:
    try:
        queue.enqueue_many((task,))
    except (TaskAlreadyExistsError, TombstonedTaskError):
        if queue.find(task.id) is not None:
            return True
        _log.error("the queue refuses task %s of the outbox; look at it", task.id)
        return False
    return True


class Relay:
    """A thread that sweeps outboxes: at once when something is expected, and every few seconds anyway.

    Args:
        queue: Where the tasks go; called in any thread.
    """

    def __init__(self, queue: Callable[[], RelayedTo]) -> None:
        self._queue = queue
        self._openers: dict[str, Opener] = {}
        self.tireless = False
        """Whether looking after what others have left is this process's business."""
        self._begin()
        # Here: the registry of forks is with the queue's file.
        from safedefer.queues.sqlite.connection import register_fork  # noqa: PLC0415

        register_fork(self, early=True)

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._sweeping = threading.Lock()
        self._thread: threading.Thread | None = None
        self._expected = False
        self._closed = False
        self._open: list[tuple[Source, float]] = []
        self._patient_until: float | None = None
        self._last = time.monotonic()
        self._wanted = 0
        self._swept = 0
        """The value of ``_wanted`` when the last sweep that has ended began."""

    def add(self, identity: str, opener: Opener) -> None:
        """Take note of a database."""
        with self._changed:
            self._openers.setdefault(identity, opener)

    def expect(self, source: Source | None = None) -> None:
        """Look now, and then less and less often; if ``source`` is given, when its transaction has ended.

        The end of a transaction that lasts is not waited for.
        """
        with self._changed:
            if source is not None:
                self._open.append((source, time.monotonic() + _SWEEP_SECONDS))
            self._expected = self._expected or source is None or source.dialect == "sqlite"
            self._last = time.monotonic()
            self._wanted += 1
            self._changed.notify()
            _finish_at_exit(self)
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
        """Whether only open transactions are waited for, or one is open in whose way a reader could be; waits a moment."""
        with self._changed:
            now = time.monotonic()
            still = [(source, until) for source, until in self._open if now < until and is_open(source)]
            ended, self._open = len(still) < len(self._open), still
            in_the_way = any(source.dialect == "sqlite" for source, _ in still)
            if in_the_way or (still and not ended and not self._expected):
                patience = _SWEEP_SECONDS if in_the_way else _PACE
                self._patient_until = self._patient_until or now + patience
                if now < self._patient_until and not self._closed:
                    self._changed.wait(_FIRST_LOOK)
                    return True
            self._patient_until = None
            return False

    @property
    def longest_pause(self) -> float:
        """Seconds between two looks, at most: a look at a server is a connection."""
        idle = not self.tireless and time.monotonic() > self._last + _IDLE_AFTER
        return _IDLE_SECONDS if idle else _SWEEP_SECONDS

    @property
    def closed(self) -> bool:
        """Whether the thread should end."""
        return self._closed

    def sweep(self) -> int:
        """Relay every known outbox; returns how many tasks were moved."""
        wanted, still_open = self._wanted, bool(self._open)
        moved = sum(self._sweep(identity) or 0 for identity in list(self._openers))
        if not still_open:
            self._swept = wanted
        return moved

    def sweep_one(self, identity: str) -> bool:
        """Relay one outbox; whether it is empty now."""
        return self._sweep(identity) is not None

    def _sweep(self, identity: str) -> int | None:
        # Open only while it is used: a connection must not be carried across a fork.
        with self._sweeping:
            try:
                return self._openers[identity].use(lambda source: relay(source, self._queue()))
            except FileNotFoundError:  # nobody has made the database yet
                return 0
            except QueueError as error:
                _log.warning("the queue takes nothing from the outbox now (%s); trying again", slug(error))
            except Exception as error:  # noqa: BLE001  # the user's database, by whatever library
                _log.warning("the outbox in %a cannot be read now (%s); trying again", identity, slug(error))
        return None

    def close(self) -> None:
        """End the thread, and look once more if something is expected."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(10.0)
        self.finish()

    def finish(self) -> None:
        """Look once more if something is expected."""
        if self._swept != self._wanted:
            self.sweep()
            self._swept = self._wanted

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


#: Relays of which something is expected. A short program is to leave nothing behind.
_finishing: Final[weakref.WeakSet[Relay]] = weakref.WeakSet()


def _finish_at_exit(member: Relay) -> None:
    # Not at import: what is registered last is called first, and the queue must still be open.
    if not _finishing:
        atexit.unregister(_finish_all)
        atexit.register(_finish_all)
    _finishing.add(member)


def _finish_all() -> None:
    for member in list(_finishing):
        member.finish()


def is_open(source: Source) -> bool:
    """Whether a connection, which may be closed, has a transaction open."""
    try:
        return source.in_transaction()
    except Exception:  # noqa: BLE001  # the connection was closed, by whatever library
        return False


def _sweep_loop(reference: weakref.ref[Relay]) -> None:
    pause = _FIRST_LOOK
    while (this := reference()) is not None and not this.closed:
        if not this.too_early():
            this.sweep()
            pause = _FIRST_LOOK if this.rest(pause) else min(pause * 2, this.longest_pause)
        del this


def to_text(task: QueuedTask) -> str:
    """Return a task as JSON text; bytes as Latin-1, one character for each."""
    document: dict[str, Any] = task._asdict()
    document["token"] = task.token.decode("latin-1")
    document["digest"] = task.digest.decode("latin-1")
    document["headers"], document["retry_options"] = dict(task.headers), dict(task.retry_options)
    document["blob"] = None if task.blob is None else [task.blob.id, task.blob.data.decode("latin-1")]
    return json.dumps(document)


_TEXT: Final = (str,)
_TEXT_OR_NONE: Final = (str, type(None))
_NUMBER: Final = (int, float)
#: What the members of a row are: a queue would say of anything else that it is not there.
_KINDS: Final = {
    **dict.fromkeys(("id", "queue", "token", "audience", "url", "target", "digest", "callable_name"), _TEXT),
    **dict.fromkeys(("name", "blob_id", "unique_key"), _TEXT_OR_NONE),
    **dict.fromkeys(("headers", "retry_options"), (dict,)),
    "eta": _NUMBER,
    "created": _NUMBER,
    "expires": (int,),
}


def from_text(text: str) -> QueuedTask:
    """Return the task that ``to_text`` wrote. What it did not write raises, in whatever way."""
    document: Mapping[str, Any] = json.loads(text)
    for name, kinds in _KINDS.items():
        if type(document[name]) not in kinds:
            raise ValueError(name)
    blob = document["blob"]
    return QueuedTask(
        **{
            **document,
            "token": document["token"].encode("latin-1"),
            "digest": document["digest"].encode("latin-1"),
            "blob": None if blob is None else Blob(blob[0], blob[1].encode("latin-1")),
        }
    )


def slug(error: BaseException) -> str:
    """Return what a log says of an error: no text of a database's."""
    return error.slug if isinstance(error, Error) else type(error).__name__
