"""Tasks that go with a transaction of the user's: enqueued if it commits, and only then.

A transactional task is written to a table in the user's own database, the outbox, by the user's own
connection. Once that is committed a relay moves it to the queue (``relay``).

A connection to the queue's own database needs no outbox: its transaction is the queue's.

What a block does is written once, as coroutines: with a connection that blocks they never suspend.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from safedefer.errors import BadTransactionStateError, QueueError, QueueUnavailable
from safedefer.queues.base import QueuedTask
from safedefer.transactions.databases import Opener, Source, opener_of, run_now, source_of
from safedefer.transactions.databases.sqlite import ApswSource
from safedefer.transactions.relay import Relay, RelayedTo, is_open, relay, slug, to_text

if TYPE_CHECKING:
    from safedefer.queues.base import EnqueueStatements

_T = TypeVar("_T")

_log: Final = logging.getLogger("safedefer.outbox")

#: An effect is remembered this many seconds: longer than any token lives.
_REMEMBERED: Final = 94 * 86_400

_CREATE: Final = (
    """
    CREATE TABLE IF NOT EXISTS safedefer_outbox (
        id VARCHAR(64) NOT NULL PRIMARY KEY, created DOUBLE PRECISION NOT NULL, task TEXT NOT NULL
    )
    """,
)
_INSERT: Final = "INSERT INTO safedefer_outbox (id, created, task) VALUES (:id, :created, :task)"

_CREATE_ONCE: Final = (
    """
    CREATE TABLE IF NOT EXISTS safedefer_once (
        effect VARCHAR(720) NOT NULL PRIMARY KEY, expires DOUBLE PRECISION NOT NULL
    )
    """,
    "CREATE INDEX IF NOT EXISTS safedefer_once_expires ON safedefer_once (expires)",
)
_FIND_ONCE: Final = "SELECT 1 FROM safedefer_once WHERE effect = :effect"
_INSERT_ONCE: Final = """
    INSERT INTO safedefer_once (effect, expires) VALUES (:effect, :expires) ON CONFLICT (effect) DO NOTHING
"""
_FORGET_ONCE: Final = {
    "sqlite": "DELETE FROM safedefer_once WHERE expires < :now",
    # Rows that another transaction is forgetting are not waited for.
    "postgresql": """
        DELETE FROM safedefer_once WHERE effect IN (
            SELECT effect FROM safedefer_once WHERE expires < :now LIMIT 100 FOR UPDATE SKIP LOCKED
        )
    """,
}

# In PostgreSQL an error ends what can be done in a transaction, and CREATE ... IF NOT EXISTS is one where two
# create at once; on an index it locks the table, too. So we look first, and create one after the other.
_IS_THERE: Final = "SELECT to_regclass(:table) IS NOT NULL"
_ONE_AT_A_TIME: Final = "SELECT pg_advisory_xact_lock(7305812994)"

# The queue's own database has the mark of the queue. Read only if that can be no error.
_HAS_MARK: Final = """
    SELECT 1 FROM pg_catalog.pg_namespace n
    JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = 'settings' AND c.relkind IN ('r', 'v')
    JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attname = 'marker' AND NOT a.attisdropped
    WHERE n.nspname = 'safedefer' AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')
"""
_READ_MARK: Final = "SELECT marker FROM safedefer.settings"


class _Way(Enum):
    """How a task gets from a block to the queue."""

    OUTBOX = "outbox"
    FILE = "file"
    """An apsw connection to the queue's own file."""
    STATEMENTS = "statements"
    """A connection to the queue's own PostgreSQL database."""


# --- Blocks ---------------------------------------------------------------------------------------


class Block(ABC, Generic[_T]):
    """A block in the transaction of a connection: ``with`` for one that blocks, ``async with`` for one that is awaited."""

    def __init__(self, outbox: Outbox, connection: object) -> None:
        self._outbox = outbox
        self._connection = connection
        self._entered: Source | None = None
        self._began = False
        """Whether the block opened the transaction, and so ends it."""

    @property
    def source(self) -> Source:
        """What speaks to the connection. Only within the block."""
        assert self._entered is not None
        return self._entered

    def __enter__(self) -> _T:
        return run_now(self._enter(self._source(is_async=False)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        run_now(self._leave(error))

    async def __aenter__(self) -> _T:
        return await self._enter(self._source(is_async=True))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._leave(error)

    def _source(self, *, is_async: bool) -> Source:
        source = source_of(self._connection)
        if source.is_async != is_async:
            name = type(self._connection).__name__
            raise BadTransactionStateError(
                f"{name} is awaited; write `async with`" if source.is_async else f"{name} is not awaited; write `with`"
            )
        return source

    async def _enter(self, source: Source) -> _T:
        if self._entered is not None:
            raise BadTransactionStateError("this block is open already; call app.transaction() or app.once() again")
        self._outbox.check_source(source)
        began = not source.in_transaction()
        await (source.begin if began else source.check)()
        self._entered, self._began = source, began
        try:
            return await self._start()
        except BaseException:
            await self._undo()
            self._entered = None
            raise

    async def _leave(self, error: BaseException | None) -> None:
        try:
            if error is None:
                await self._finish()
            elif self._began:
                await self._undo()
            else:
                # The transaction is the caller's, and may be committed yet.
                try:
                    await self._write_rest()
                except Exception as failure:  # noqa: BLE001  # what went wrong before is what should be seen
                    error.add_note(
                        f"tasks that were deferred in this block were not written ({failure}); roll its transaction back"
                    )
                    _log.error("tasks of a block that ended with %s were not written", type(error).__name__)
        finally:
            source, self._entered = self.source, None
            self._end()
            if error is None or not self._began:
                self._after(source)  # a commit that failed, too: it may have been done, and its answer lost

    async def _finish(self) -> None:
        try:
            await self._write_rest()
            if self._began:
                await self.source.commit()
        except BaseException:
            await self._undo()
            raise

    async def _undo(self) -> None:
        # What went wrong before is what should be seen; and a connection that is lost has undone it.
        if self._began:
            with contextlib.suppress(Exception):
                await self.source.rollback()

    @abstractmethod
    async def _start(self) -> _T:
        """Do what comes first in the transaction."""

    async def _write_rest(self) -> None:
        """Do what comes last in the transaction."""

    def _end(self) -> None:
        """Note that the block is over."""

    def _after(self, source: Source) -> None:
        """Do what comes after the transaction, or after the block where the transaction goes on."""


class TransactionBlock(Block[None]):
    """One ``app.transaction(...)``."""

    def __init__(self, outbox: Outbox, connection: object) -> None:
        super().__init__(outbox, connection)
        self.way = _Way.OUTBOX
        self.here: tuple[int, object] | None = None
        """The thread and the asyncio task that began it."""
        self._later: list[QueuedTask] = []
        self._count = 0
        self._has_table = False
        self._unique: dict[str, QueuedTask] = {}
        self._again: tuple[str | None, Opener | None] = (None, None)

    async def _start(self) -> None:
        source = self.source
        self._later, self._count, self._has_table, self._unique = [], 0, False, {}
        self.way = await self._outbox.way(source)
        self._again = source.identity, source.reopen()  # now: a connection that is closed does not say
        if self.way is _Way.OUTBOX and None in self._again and (source.is_async or not self._began):
            raise BadTransactionStateError(
                "nobody else can read a database in memory after your commit; let app.transaction() open the transaction"
                if source.dialect == "sqlite" and not source.is_async
                else "how to connect to this database again is not known, so nobody could move your task to the queue"
            )
        self.here = _here()
        _blocks.set((*_blocks.get(), self))

    def _end(self) -> None:
        self.here = None
        # Not reset with a token: a generator of the user's may end the block in another context.
        _blocks.set(tuple(block for block in _blocks.get() if block is not self))

    def add(self, tasks: Sequence[QueuedTask]) -> None:
        """Write tasks; at the block's end where the connection is awaited."""
        if self.source.is_async:
            self._later += tasks
        else:
            run_now(self._write(tasks))

    async def add_async(self, tasks: Sequence[QueuedTask]) -> None:
        """Write tasks, after those that are to be written later."""
        await self._write_rest()
        await self._write(tasks)

    async def _write_rest(self) -> None:
        if self._later:
            await self._write(self._later)
            self._later = []

    async def _write(self, tasks: Sequence[QueuedTask]) -> None:
        source, queue = self.source, self._outbox.queue()
        if self.way is _Way.FILE:
            assert queue.file is not None  # see Outbox.way, here and below
            queue.file.enqueue_on(source.connection, tasks)  # type: ignore[attr-defined]  # an ApswSource has it
        elif self.way is _Way.STATEMENTS:
            assert queue.statements is not None
            await _run_statements(source, queue.statements, tasks)
        else:
            if not self._has_table:
                # Remembered only if it was there: a savepoint may undo what creates it.
                self._has_table = await _provide(source, "safedefer_outbox", _CREATE)
            for task in tasks:
                await source.execute(_INSERT, {"id": task.id, "created": task.created, "task": to_text(task)})
        self._count += len(tasks)
        self._unique.update({task.id: task for task in tasks if task.unique_key is not None})

    def written(self, task_id: str) -> QueuedTask | None:
        """Return a unique task of the block, which nobody else can see yet."""
        return self._unique.get(task_id)

    def _after(self, source: Source) -> None:
        if self._count and self.way is _Way.OUTBOX:
            self._outbox.relay_after(source, *self._again)


class OnceBlock(Block[bool]):
    """One ``app.once(...)``: True if the effect has not been had in this database.

    Args:
        outbox: The outbox.
        connection: The connection.
        effect: Names the effect.
        also: An effect that counts as this one.
    """

    def __init__(self, outbox: Outbox, connection: object, *, effect: str, also: str | None = None) -> None:
        super().__init__(outbox, connection)
        self._effect = effect
        self._also = also

    async def _start(self) -> bool:
        source, now = self.source, self._outbox.clock()
        await _provide(source, "safedefer_once", _CREATE_ONCE)
        await source.execute(_FORGET_ONCE[source.dialect], {"now": now})
        earlier = self._also is not None and bool(await source.rows(_FIND_ONCE, {"effect": self._also}))
        first = await source.execute(_INSERT_ONCE, {"effect": self._effect, "expires": now + _REMEMBERED}) > 0
        return first and not earlier


_blocks: Final[ContextVar[tuple[TransactionBlock, ...]]] = ContextVar("safedefer_transactions", default=())


def _here() -> tuple[int, object]:
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), task


async def _provide(source: Source, table: str, statements: Sequence[str]) -> bool:
    """Create a table of ours where it is missing; whether it was there.

    Raises:
        BadTransactionStateError: It cannot be created; the transaction can go on.
    """
    if source.dialect == "sqlite":
        for statement in statements:
            await source.execute(statement)
        return False
    if (await source.rows(_IS_THERE, {"table": table}))[0][0]:
        return True
    try:
        async with _Savepoint(source):
            await source.rows(_ONE_AT_A_TIME)
            if not (await source.rows(_IS_THERE, {"table": table}))[0][0]:
                for statement in statements:
                    await source.execute(statement)
    except Exception as error:
        raise BadTransactionStateError(
            f"the table {table} is missing and cannot be created here ({type(error).__name__}); create it by hand, see "
            "docs/how-to/transactions.md, or let this user create tables"
        ) from error
    return False


async def _run_statements(source: Source, queue: EnqueueStatements, tasks: Sequence[QueuedTask]) -> None:
    """Enqueue tasks by the queue's own statements, in a savepoint: what is refused leaves the transaction as it was."""
    statements = queue.enqueue_statements(tasks)
    try:
        async with _Savepoint(source):
            for statement, values in statements:
                await source.run(statement, values)
    except Exception as error:
        refusal = queue.refusal(error)
        if refusal is None:
            raise
        raise refusal from error


class _Savepoint:
    """A savepoint of PostgreSQL's, by statements: each driver has its own way, and they do not mix."""

    def __init__(self, source: Source) -> None:
        self._source = source

    async def __aenter__(self) -> None:
        await self._source.execute("SAVEPOINT safedefer")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self._source.execute("RELEASE SAVEPOINT safedefer")
            return
        with contextlib.suppress(Exception):  # a lost connection
            await self._source.execute("ROLLBACK TO SAVEPOINT safedefer")
            await self._source.execute("RELEASE SAVEPOINT safedefer")


# --- The outbox -----------------------------------------------------------------------------------


class Outbox:
    """Where transactional tasks of one application wait for their commit.

    Args:
        queue: Where they go; called in the thread of the block and of the relay.
        urls: Databases to sweep besides those that this process has used: what a process that died left there.
        clock: Seconds since the epoch.
    """

    def __init__(self, queue: Callable[[], RelayedTo], *, urls: Sequence[str] = (), clock: Callable[[], float]) -> None:
        self.queue = queue
        self.clock = clock
        self._relay = Relay(queue)
        self._marked: dict[str, bool] = {}
        """Whether a database is the queue's own, by its identity."""
        for url in urls:
            self._relay.add(*opener_of(url))

    def transaction(self, connection: object) -> TransactionBlock:
        """Make transactional tasks of a block go with the connection's transaction.

        If none is open, the block opens one, commits it at its end, and undoes it if the block raises. If one
        is open already, it stays the caller's to commit, and tasks are enqueued soon after that.

        Entering the block raises ``BadTransactionStateError`` for a connection of no known kind, or one that cannot
        be used for this.
        """
        return TransactionBlock(self, connection)

    def once(self, connection: object, *, effect: str, also: str | None = None) -> OnceBlock:
        """Give True if ``effect`` has not been had in this database, and note it in the same transaction.

        The transaction is opened and ended as ``transaction`` does. ``also`` is an effect that counts as this one.
        """
        return OnceBlock(self, connection, effect=effect, also=also)

    def put(self, *tasks: QueuedTask) -> None:
        """Write tasks to the transaction of the innermost block; at its end, if its connection is awaited.

        Raises:
            BadTransactionStateError: There is no block, its transaction is over, or a task has a name.
            TaskAlreadyExistsError: A name is taken, where tasks may have one: in the queue's own database.
        """
        self.check(named=_are_named(tasks)).add(tasks)

    async def put_async(self, *tasks: QueuedTask) -> None:
        """Do what ``put`` does, at once."""
        await self.check(named=_are_named(tasks), awaits=True).add_async(tasks)

    def written(self, task_id: str) -> QueuedTask | None:
        """Return a unique task of the innermost block, which nobody else can see yet."""
        return self.check(named=False).written(task_id)

    def check(self, *, named: bool, awaits: bool = False) -> TransactionBlock:
        """Return the block that a task may be put into.

        Raises:
            BadTransactionStateError: As ``put``.
        """
        block = next((block for block in reversed(_blocks.get()) if block._outbox is self), None)  # noqa: SLF001
        if block is None or block.here is None:
            raise BadTransactionStateError(
                "a transactional task needs a transaction; defer it inside `with app.transaction(connection):` "
                "(`async with`, where the connection is awaited)"
            )
        if named:
            _check_may_be_named(block, awaits=awaits)
        thread, task = _here()
        if block.here[0] != thread:
            raise BadTransactionStateError("the transaction is another thread's; defer in the thread that began it")
        if block.here[1] is not task:
            raise BadTransactionStateError(
                "the transaction is another asyncio task's; defer in the task that began it, without gather() or wait_for()"
            )
        if not block.source.in_transaction():
            raise BadTransactionStateError("the transaction has ended already; defer before the commit")
        return block

    def check_source(self, source: Source) -> None:
        """Check that a connection may be used beside the queue.

        Raises:
            BadTransactionStateError: It is to the queue's file, by another library.
        """
        file = self.queue().file
        if file is not None and source.path == file.path and not isinstance(source, ApswSource):
            raise BadTransactionStateError(
                "two SQLite libraries in one process must not open one file, and the queue's is open with apsw; "
                "keep your tables in a file of their own, or use an apsw connection"
            )

    async def way(self, source: Source) -> _Way:
        """Return how tasks get from a connection's database to the queue."""
        queue = self.queue()
        if queue.file is not None and isinstance(source, ApswSource) and source.path == queue.file.path:
            return _Way.FILE
        if not source.native or queue.statements is None:
            return _Way.OUTBOX
        known = None if source.identity is None else self._marked.get(source.identity)
        if known is None:
            try:
                known = await _is_marked(source, queue.statements)
            except QueueUnavailable:  # the outbox serves until the queue is back
                return _Way.OUTBOX
            if source.identity is not None:
                self._marked[source.identity] = known
        return _Way.STATEMENTS if known else _Way.OUTBOX

    def relay_after(self, source: Source, identity: str | None, opener: Opener | None) -> None:
        """Move what a block has written, now or when its transaction has ended."""
        if opener is None or identity is None:  # in memory, and so the block's own transaction, which is over
            try:
                run_now(relay(source, self.queue()))
            except QueueError as error:  # committed is committed: the next block on this connection tries again
                _log.warning("the queue takes nothing from the outbox now (%s)", slug(error))
            return
        self._relay.add(identity, opener)
        if is_open(source):
            self._relay.expect(source)
        # Through a connection of its own: reading with a session would open a transaction of the user's. It takes
        # long to connect to a server, and one sweep serves many blocks.
        elif source.is_async or opener.is_async or source.dialect != "sqlite" or not self._relay.sweep_one(identity):
            self._relay.expect()

    def sweep(self) -> int:
        """Relay what waits in every known outbox; returns how many tasks."""
        return self._relay.sweep()

    def start(self) -> None:
        """Sweep now and then, from now on: for processes that dispatch."""
        self._relay.tireless = True
        self._relay.expect()

    def close(self) -> None:
        """End the relay."""
        self._relay.close()


def _are_named(tasks: Sequence[QueuedTask]) -> bool:
    return any(task.name is not None or task.unique_key is not None for task in tasks)


def _check_may_be_named(block: TransactionBlock, *, awaits: bool) -> None:
    if block.way is not _Way.STATEMENTS:
        raise BadTransactionStateError(
            "a transactional task has no name and is not unique, except on a connection to the PostgreSQL database of "
            "the queue itself: elsewhere nobody knows before the commit whether a name is free; leave that out"
        )
    if block.source.is_async and not awaits:
        raise BadTransactionStateError(
            "defer() cannot wait for the database to say whether the name is free; await defer_async()"
        )


async def _is_marked(source: Source, queue: EnqueueStatements) -> bool:
    """Whether a database is the queue's own."""
    if not await source.rows(_HAS_MARK):
        return False
    # Read once, from the queue's database.
    marker = await asyncio.to_thread(lambda: queue.marker) if source.is_async else queue.marker
    return [row[0] for row in await source.rows(_READ_MARK)] == [marker]
