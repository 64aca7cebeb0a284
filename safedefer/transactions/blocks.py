"""Blocks in the transaction of a user's connection: ``app.transaction(...)`` and ``app.once(...)``, whose effects are remembered.

The steps of a block are written once, as coroutines; with a blocking connection they never suspend.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from safedefer.errors import BadTransactionStateError
from safedefer.queues.base import QueuedTask
from safedefer.transactions.ambient import running_transaction
from safedefer.transactions.databases import Opener, Source, run_now, source_of
from safedefer.transactions.rows import to_text
from safedefer.transactions.savepoints import Savepoint
from safedefer.transactions.tables import ONCE, OUTBOX, Table, provide

if TYPE_CHECKING:
    from safedefer.queues.base import EnqueueStatements, Queue

_T = TypeVar("_T")

_log: Final = logging.getLogger("safedefer.outbox")

#: An effect is remembered this many seconds: longer than any token lives.
_REMEMBERED: Final = 94 * 86_400

_INSERT: Final = "INSERT INTO {table} (id, created, task, environment) VALUES (:id, :created, :task, :environment)"
#: Into a table of an earlier release. The relay adds the column: in a user's transaction it would keep the table locked.
_INSERT_OLD: Final = "INSERT INTO {table} (id, created, task) VALUES (:id, :created, :task)"

_FIND_ONCE: Final = {
    "sqlite": "SELECT 1 FROM {table} WHERE effect = :effect",
    "postgresql": "SELECT 1 FROM {table} WHERE effect OPERATOR(pg_catalog.=) CAST(:effect AS pg_catalog.text)",
}
_INSERT_ONCE: Final = """
    INSERT INTO {table} (effect, expires) VALUES (:effect, :expires) ON CONFLICT (effect) DO NOTHING
"""
_FORGET_ONCE: Final = {
    "sqlite": "DELETE FROM {table} WHERE expires < :now",
    # Rows that another transaction is forgetting are not waited for.
    "postgresql": """
        DELETE FROM {table} WHERE effect OPERATOR(pg_catalog.=) ANY (ARRAY(
            SELECT effect FROM {table} WHERE expires OPERATOR(pg_catalog.<) CAST(:now AS pg_catalog.float8)
            LIMIT 100 FOR UPDATE SKIP LOCKED
        ))
    """,
}
#: The queue's functions look up operators by the path of the transaction: see ``tables``. The user's comes back after them.
_TAKE_PATH: Final = """
    WITH before AS MATERIALIZED (SELECT pg_catalog.current_setting('search_path'::pg_catalog.text) AS path)
    SELECT path, pg_catalog.set_config('search_path', 'safedefer', true) FROM before
"""
_SET_PATH: Final = "SELECT pg_catalog.set_config('search_path', CAST(:path AS pg_catalog.text), true)"


#: Why a transactional task is refused that has a name.
NO_NAMES: Final = (
    "a transactional task has no name and is not unique, except on a connection to the PostgreSQL database of "
    "the queue itself: elsewhere nobody knows before the commit whether a name is free; leave that out"
)


class Way(Enum):
    """How a task gets from a block to the queue."""

    OUTBOX = "outbox"
    FILE = "file"
    """An apsw connection to the queue's own file."""
    STATEMENTS = "statements"
    """A connection to the queue's own PostgreSQL database."""


class BlockOwner(Protocol):
    """The members of an outbox that its blocks use."""

    @property
    def environment(self) -> str:
        """The environment of the application."""
        ...

    @property
    def clock(self) -> Callable[[], float]:
        """Returns seconds since the epoch."""
        ...

    @property
    def queue(self) -> Callable[[], Queue]:
        """Returns the queue."""
        ...

    @property
    def reads_own(self) -> bool:
        """Whether tasks are read by the connection that has written them: then nobody else needs to know the database."""
        ...

    def check_source(self, source: Source) -> None:
        """Check that a connection may be used beside the queue. Raises ``BadTransactionStateError``."""
        ...

    async def way(self, source: Source) -> Way:
        """Return how tasks get from a connection's database to the queue."""
        ...

    def relay_after(self, source: Source, identity: str | None, opener: Opener | None, schema: str | None) -> None:
        """Relay the tasks that a block has written to a schema, now or when its transaction has ended."""
        ...


class Block(ABC, Generic[_T]):
    """A block in the transaction of a connection: ``with`` for one that blocks, ``async with`` for one that is awaited."""

    def __init__(self, outbox: BlockOwner, connection: object) -> None:
        self._outbox = outbox
        self._connection = connection
        self._entered: Source | None = None
        self._began = False
        """Whether the block opened the transaction, and so ends it."""

    @property
    def source(self) -> Source:
        """The source of the connection, within the block only."""
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
        # The first error is raised, not that of the rollback; a lost connection has rolled back.
        if self._began:
            with contextlib.suppress(Exception):
                await self.source.rollback()

    @abstractmethod
    async def _start(self) -> _T:
        """Run the first statements of the block, in the transaction."""

    async def _write_rest(self) -> None:
        """Write the tasks that are not written yet, at the end of the transaction."""

    def _end(self) -> None:
        """Note that the block is over."""

    def _after(self, source: Source) -> None:
        """Relay the tasks after the transaction, or after the block where the transaction goes on."""


class OpenBlock(ABC):
    """A block that transactional tasks are put into."""

    def __init__(self, owner: object) -> None:
        self.owner: object = owner
        """The outbox whose tasks it takes."""
        self.here: tuple[int, object] | None = None
        """The thread and the asyncio task that began it; None if it is not open."""
        self.ndb_transaction: bytes | None = None
        """The Datastore transaction in which it began: a task in another one goes with that."""

    @abstractmethod
    def check(self, *, named: bool, awaits: bool) -> None:
        """Check that a task may be put into it here and now. Raises ``BadTransactionStateError``."""

    @abstractmethod
    def add(self, tasks: Sequence[QueuedTask]) -> None:
        """Write tasks."""

    @abstractmethod
    async def add_async(self, tasks: Sequence[QueuedTask]) -> None:
        """Write tasks, where a connection is awaited."""

    def written(self, task_id: str) -> QueuedTask | None:  # noqa: ARG002 - of those that may be unique
        """Return a unique task of the block, which nobody else can see yet."""
        return None

    def begin_here(self) -> None:
        """Note that it is open, and is the innermost one."""
        self.here, self.ndb_transaction = here(), running_transaction()
        open_blocks.set((*open_blocks.get(), self))

    def end_here(self) -> None:
        """Note that it is over."""
        self.here = None
        # Not reset with a token: a generator of the user's may end the block in another context.
        open_blocks.set(tuple(block for block in open_blocks.get() if block is not self))

    def check_here(self) -> None:
        """Check that the code that runs is that of the block. Raises ``BadTransactionStateError``."""
        thread, task = here()
        if self.here is not None and self.here[0] != thread:
            raise BadTransactionStateError("the transaction is another thread's; defer in the thread that began it")
        if self.here is not None and self.here[1] is not task:
            raise BadTransactionStateError(
                "the transaction is another asyncio task's; defer in the task that began it, without gather() or wait_for()"
            )


class TransactionBlock(Block[None], OpenBlock):
    """One ``app.transaction(...)``."""

    def __init__(self, outbox: BlockOwner, connection: object) -> None:
        super().__init__(outbox, connection)
        OpenBlock.__init__(self, outbox)
        self.way: Way = Way.OUTBOX
        self._later: list[QueuedTask] = []
        self._count = 0
        self._table: Table | None = None
        self._schema: str | None = None
        """Where the tasks were written."""
        self._unique: dict[str, QueuedTask] = {}
        self._again: tuple[str | None, Opener | None] = (None, None)

    async def _start(self) -> None:
        source = self.source
        self._later, self._count, self._table, self._unique = [], 0, None, {}
        self.way = await self._outbox.way(source)
        self._again = source.identity, source.reopen()  # now: a connection that is closed does not say
        unknown = self.way is Way.OUTBOX and None in self._again and not self._outbox.reads_own
        if unknown and (source.is_async or not self._began):
            raise BadTransactionStateError(
                "nobody else can read a database in memory after your commit; let app.transaction() open the transaction"
                if source.dialect == "sqlite" and not source.is_async
                else "how to connect to this database again is not known, so nobody could move your task to the queue"
            )
        self.begin_here()

    def _end(self) -> None:
        self.end_here()

    def check(self, *, named: bool, awaits: bool) -> None:
        """Check that a task may be put into it here and now.

        Raises:
            BadTransactionStateError: It may not have a name, another thread or asyncio task runs, or the transaction is over.
        """
        if named and self.way is not Way.STATEMENTS:
            raise BadTransactionStateError(NO_NAMES)
        if named and self.source.is_async and not awaits:
            raise BadTransactionStateError(
                "defer() cannot wait for the database to say whether the name is free; await defer_async()"
            )
        self.check_here()
        if not self.source.in_transaction():
            raise BadTransactionStateError("the transaction has ended already; defer before the commit")

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
        if self.way is Way.FILE:
            assert queue.file is not None  # see Outbox.way, here and below
            queue.file.enqueue_on(source.connection, tasks)  # type: ignore[attr-defined]  # an ApswSource has it
        elif self.way is Way.STATEMENTS:
            assert queue.statements is not None
            await _run_statements(source, queue.statements, tasks)
        else:
            await self._insert(tasks)
        self._count += len(tasks)
        self._unique.update({task.id: task for task in tasks if task.unique_key is not None})

    async def _insert(self, tasks: Sequence[QueuedTask]) -> None:
        table = self._table
        if table is None:
            table, was_there = await provide(self.source, OUTBOX)
            # Remembered only if it was there: a savepoint may undo what creates it.
            self._table = table if was_there else None
        self._schema = table.schema
        statement = (_INSERT if "environment" in table.columns else _INSERT_OLD).format(table=table.name)
        more = {"environment": self._outbox.environment} if "environment" in table.columns else {}
        for task in tasks:
            values = {"id": task.id, "created": task.created, "task": to_text(task), **more}
            await self.source.execute(statement, values)

    def written(self, task_id: str) -> QueuedTask | None:
        """Return a unique task of the block, which nobody else can see yet."""
        return self._unique.get(task_id)

    def _after(self, source: Source) -> None:
        if self._count and self.way is Way.OUTBOX:
            self._outbox.relay_after(source, *self._again, self._schema)


class OnceBlock(Block[bool]):
    """One ``app.once(...)``: True if the effect has not been had in this database.

    Args:
        outbox: The outbox.
        connection: The connection.
        effect: Names the effect.
        also: An effect that counts as this one.
    """

    def __init__(self, outbox: BlockOwner, connection: object, *, effect: str, also: str | None = None) -> None:
        super().__init__(outbox, connection)
        self._effect = effect
        self._also = also

    async def _start(self) -> bool:
        source, now = self.source, self._outbox.clock()
        table = (await provide(source, ONCE))[0].name
        await source.execute(_FORGET_ONCE[source.dialect].format(table=table), {"now": now})
        find = _FIND_ONCE[source.dialect].format(table=table)
        earlier = self._also is not None and bool(await source.rows(find, {"effect": self._also}))
        values = {"effect": self._effect, "expires": now + _REMEMBERED}
        first = await source.execute(_INSERT_ONCE.format(table=table), values) > 0
        return first and not earlier


open_blocks: Final[ContextVar[tuple[OpenBlock, ...]]] = ContextVar("safedefer_transactions", default=())


def here() -> tuple[int, object]:
    """Return the thread and the asyncio task that run."""
    import asyncio  # noqa: PLC0415  # importing safedefer must not load it

    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), task


async def _run_statements(source: Source, queue: EnqueueStatements, tasks: Sequence[QueuedTask]) -> None:
    """Enqueue tasks by the queue's own statements, in a savepoint: what is refused leaves the transaction as it was."""
    statements = queue.enqueue_statements(tasks)
    try:
        async with Savepoint(source):
            # An error undoes the path with the savepoint.
            path = str((await source.rows(_TAKE_PATH))[0][0])
            for statement, values in statements:
                await source.run(statement, values)
            await source.rows(_SET_PATH, {"path": path})
    except Exception as error:
        refusal = queue.refusal(error)
        if refusal is None:
            raise
        raise refusal from error
