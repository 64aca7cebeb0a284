"""Tasks that go with a transaction of the user's: enqueued if it commits, and only then.

A transactional task is written to a table in the user's own database, the outbox, by the user's own
connection. Once that is committed a relay moves it to the queue (``relay``).

A connection to the queue's own database needs no outbox: its transaction is the queue's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Final

from safedefer.errors import BadTransactionStateError, QueueError, QueueUnavailable
from safedefer.queues.base import QueuedTask
from safedefer.transactions.ambient import is_ndb, running_transaction
from safedefer.transactions.blocks import OnceBlock, OpenBlock, TransactionBlock, Way, open_blocks
from safedefer.transactions.databases import Opener, Source, opener_of, run_now, split_schema
from safedefer.transactions.datastore import (
    Address,
    DatastoreBlock,
    DatastoreOutlet,
    import_entities,
    is_datastore,
    parse,
)
from safedefer.transactions.handover import slug
from safedefer.transactions.relay import Relay, is_open
from safedefer.transactions.tables import read_mark
from safedefer.transactions.transfer import TablesOutlet, Transfer

if TYPE_CHECKING:
    from safedefer.queues.base import EnqueueStatements, Queue

_log: Final = logging.getLogger("safedefer.outbox")


class Outbox:
    """Where transactional tasks of one application wait for their commit.

    Args:
        queue: Where they go; called in the thread of the block and of the relay.
        environment: Tasks of another one are left to its own application, which may sweep the same database.
        queues: The names of the application's queues; None is any.
        urls: Databases to sweep besides those that this process has used: what a process that died left there.
        clock: Seconds since the epoch.
    """

    reads_own = False
    """Tasks are read by a connection of the relay's own."""

    def __init__(
        self,
        queue: Callable[[], Queue],
        *,
        environment: str,
        queues: Collection[str] | None = None,
        urls: Sequence[str] = (),
        clock: Callable[[], float],
    ) -> None:
        self.queue = queue
        self.environment = environment
        self.clock = clock
        self._transfer = Transfer(environment=environment, queues=queues)
        self._relay = Relay(self._current_queue)
        self._datastores: dict[str, DatastoreOutlet] = {}
        self._marked: dict[str, bool] = {}
        """Whether a database is the queue's own, by its identity."""
        for url in urls:
            if is_datastore(url):
                self._outlet(parse(url), is_given=True)
                continue
            address, schema = split_schema(url)
            identity, opener = opener_of(address)
            self._relay.add(identity, TablesOutlet(opener, self._transfer), schema)

    def _current_queue(self) -> Queue:
        return self.queue()  # test mode keeps the relay from the queue

    def transaction(self, connection: object) -> TransactionBlock | DatastoreBlock:
        """Make transactional tasks of a block go with the connection's transaction.

        If none is open, the block opens one, commits it at its end, and undoes it if the block raises. If one
        is open already, it stays the caller's to commit, and tasks are enqueued soon after that.

        Entering the block raises ``BadTransactionStateError`` for a connection of no known kind, or one that cannot
        be used for this.
        """
        return DatastoreBlock(self) if is_ndb(connection) else TransactionBlock(self, connection)

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

    def check(self, *, named: bool, awaits: bool = False) -> OpenBlock:
        """Return the block that a task may be put into.

        Raises:
            BadTransactionStateError: As ``put``.
        """
        block = next((block for block in reversed(open_blocks.get()) if block.owner is self), None)
        running = running_transaction()
        if running is not None and (block is None or block.ndb_transaction != running):
            block = DatastoreBlock(self)  # in `@ndb.transactional()`, or a transaction that began inside the block
        elif block is None or block.here is None:
            raise BadTransactionStateError(
                "a transactional task needs a transaction; defer it inside `with app.transaction(connection):` "
                "(`async with`, where the connection is awaited)"
            )
        block.check(named=named, awaits=awaits)
        return block

    def check_source(self, source: Source) -> None:
        """Check that a connection may be used beside the queue.

        Raises:
            BadTransactionStateError: It is to the queue's file, by another library.
        """
        file = self.queue().file
        if file is not None and source.path == file.path and not source.is_apsw:
            raise BadTransactionStateError(
                "two SQLite libraries in one process must not open one file, and the queue's is open with apsw; "
                "keep your tables in a file of their own, or use an apsw connection"
            )

    async def way(self, source: Source) -> Way:
        """Return how tasks get from a connection's database to the queue."""
        queue = self.queue()
        if queue.file is not None and source.is_apsw and source.path == queue.file.path:
            return Way.FILE
        if not source.native or queue.statements is None:
            return Way.OUTBOX
        known = None if source.identity is None else self._marked.get(source.identity)
        if known is None:
            try:
                known = await _is_marked(source, queue.statements)
            except QueueUnavailable:  # the outbox serves until the queue is back
                return Way.OUTBOX
            if source.identity is not None:
                self._marked[source.identity] = known
        return Way.STATEMENTS if known else Way.OUTBOX

    def relay_after(self, source: Source, identity: str | None, opener: Opener | None, schema: str | None) -> None:
        """Relay the tasks that a block has written to a schema, now or when its transaction has ended."""
        if opener is None or identity is None:  # in memory, and so the block's own transaction, which is over
            try:
                run_now(self._transfer.move(source, self.queue(), (schema,)))
            except QueueError as error:  # the tasks are committed: the next block on this connection relays them
                _log.warning("the queue takes nothing from the outbox now (%s)", slug(error))
            return
        self._relay.add(identity, TablesOutlet(opener, self._transfer), schema)
        if is_open(source):
            self._relay.expect(source)
        # Through a connection of its own: reading with a session would open a transaction of the user's. It takes
        # long to connect to a server, and one sweep serves many blocks.
        elif source.is_async or opener.is_async or source.dialect != "sqlite" or not self._relay.sweep_one(identity):
            self._relay.expect()

    def write_entities(self, tasks: Sequence[QueuedTask]) -> None:
        """Write tasks to the Datastore transaction that runs here, and relay them when it has ended.

        Raises:
            TaskTooLargeError: A task is larger than a transaction may be.
        """
        entities = import_entities()
        client = entities.client_here()
        outlet = self._outlet(Address(client.project, client.database or ""))
        outlet.adopt(client)
        split = [entities.split(task) for task in tasks]
        for each in split:
            entities.put(each, self.environment)
        written = [(task, len(each.pieces)) for task, each in zip(tasks, split, strict=True)]

        def committed() -> None:
            outlet.expect(written)
            self._relay.expect()

        def ended(was_told: bool) -> None:
            if not was_told:  # undone, or committed and the answer lost, or a function of the user's has raised
                outlet.look_soon()
                self._relay.expect()

        entities.call_at_end(committed, ended)

    def _outlet(self, address: Address, *, is_given: bool = False) -> DatastoreOutlet:
        name = str(address)
        outlet = self._datastores.setdefault(name, DatastoreOutlet(address, self._transfer, is_given=is_given))
        self._relay.add(name, outlet)
        return outlet

    def sweep(self) -> int:
        """Relay the tasks of every known outbox; returns how many."""
        for outlet in list(self._datastores.values()):
            outlet.look_now()
        return self._relay.sweep()

    def databases(self) -> list[tuple[str, str | None]]:
        """Return the databases that are swept, and the schema of each outbox in them; None is that of the connection."""
        return self._relay.databases()

    def look(self) -> list[tuple[str, str | None]]:
        """Return why each outbox that is swept cannot be used; None if it can, or does not exist yet."""
        return self._relay.look()

    def count(self) -> int | None:
        """Return how many rows wait in the outboxes that are swept; None if one cannot be read now."""
        return self._relay.count()

    def start(self) -> None:
        """Start to sweep every few seconds: for processes that dispatch."""
        self._relay.tireless = True
        self._relay.expect()

    def close(self) -> None:
        """End the relay."""
        self._relay.close()


def _are_named(tasks: Sequence[QueuedTask]) -> bool:
    return any(task.name is not None or task.unique_key is not None for task in tasks)


async def _is_marked(source: Source, queue: EnqueueStatements) -> bool:
    """Whether a database is the queue's own."""
    mark = await read_mark(source)
    if mark is None:
        return False
    # Read once, from the queue's database.
    if not source.is_async:
        return mark == queue.marker
    import asyncio  # noqa: PLC0415  # loaded already, where there is a loop

    return mark == await asyncio.to_thread(lambda: queue.marker)
