"""Moves the committed tasks in the outbox of one database to the queue, batch by batch.

It enqueues first and deletes after: a crash in between repeats the enqueue, which the queue refuses because it
knows the task's id. So no task is lost or enqueued twice.

The outbox carries opaque bytes, like the queue: nothing here can decode, import or run a task.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from safedefer.errors import QueueUnavailable
from safedefer.transactions.handover import ID_LENGTH, HandedOver, Judge, is_away, slug
from safedefer.transactions.tables import OUTBOX, Table, look

if TYPE_CHECKING:
    from safedefer.queues.base import Queue
    from safedefer.transactions.databases.base import Opener, Source

_log: Final = logging.getLogger("safedefer.outbox")

#: Rows, and bytes of tasks, that are read at once.
_BATCH: Final = 100
_BATCH_BYTES: Final = 32 * 2**20
#: Rows whose ids and sizes are read at once: no index has the order in which they came, so each time all rows are gone through.
_WINDOW: Final = 10_000
#: A longer row is no task: tokens are limited to 1 MiB, unless a limit was raised.
_ROW_BYTES: Final = 64 * 2**20
#: A longer row is larger than most tasks can be: its size is read first, and its text by itself. What is no task is put aside.
_LARGE_BYTES: Final = 4 * 2**20
#: Large rows that are put aside, and not read again. Where there are more, no large row is read.
_ASIDE: Final = 1_000
#: Milliseconds that a lock is waited for: another role may hold one.
_LOCK_MILLISECONDS: Final = 2_000
#: The same for the lock that keeps producers waiting while it is waited for.
_ALTER_MILLISECONDS: Final = 50

# Ids and tasks are bytes: a text that is not in the connection's encoding, or in none, must not fail the rows beside it.
_KEYS: Final = {
    "postgresql": """
        SELECT pg_catalog.convert_to(id, 'UTF8'::pg_catalog.name), created, pg_catalog.octet_length(task)
        FROM ONLY {table} WHERE task IS NOT NULL AND created IS NOT NULL
        AND pg_catalog.length(id) OPERATOR(pg_catalog.<=) :id_length AND {mine} AND {after} ORDER BY 2, 1 LIMIT :limit
    """,
    "sqlite": """
        SELECT CAST(id AS BLOB), CAST(created AS REAL), length(task) FROM {table}
        WHERE task IS NOT NULL AND created IS NOT NULL
        AND length(id) <= :id_length AND {mine} AND {after} ORDER BY 2, 1 LIMIT :limit
    """,
}
_TEXTS: Final = {
    "postgresql": """
        SELECT pg_catalog.convert_to(id, 'UTF8'::pg_catalog.name), pg_catalog.convert_to(task, 'UTF8'::pg_catalog.name)
        FROM ONLY {table} WHERE id OPERATOR(pg_catalog.=) ANY (ARRAY[{ids}])
        AND pg_catalog.octet_length(task) OPERATOR(pg_catalog.<=) :longest
    """,
    "sqlite": """
        SELECT CAST(id AS BLOB), CAST(task AS BLOB) FROM {table} WHERE id IN ({ids}) AND length(task) <= :longest
    """,
}
_ID: Final = {"postgresql": "CAST(:i{number} AS pg_catalog.text)", "sqlite": ":i{number}"}
_AFTER: Final = {
    "postgresql": """
        (created OPERATOR(pg_catalog.>) CAST(:created AS pg_catalog.float8)
        OR (created OPERATOR(pg_catalog.=) CAST(:created AS pg_catalog.float8)
            AND pg_catalog.convert_to(id, 'UTF8'::pg_catalog.name) OPERATOR(pg_catalog.>) CAST(:id AS pg_catalog.bytea)))
    """,
    "sqlite": """
        (CAST(created AS REAL) > :created OR (CAST(created AS REAL) = :created AND CAST(id AS BLOB) > :id))
    """,
}
_MINE: Final = {
    "postgresql": "(environment IS NULL OR environment OPERATOR(pg_catalog.=) CAST(:environment AS pg_catalog.text))",
    "sqlite": "(environment IS NULL OR environment = :environment)",
}
_COUNT: Final = {
    "postgresql": "SELECT pg_catalog.count(*) FROM ONLY {table} WHERE {mine}",
    "sqlite": "SELECT count(*) FROM {table} WHERE {mine}",
}
_DELETE: Final = {
    # A row that somebody keeps locked stays, and keeps no other: it is not enqueued twice.
    "postgresql": """
        DELETE FROM ONLY {table} WHERE ctid OPERATOR(pg_catalog.=) ANY (ARRAY(
            SELECT ctid FROM ONLY {table} WHERE id OPERATOR(pg_catalog.=) CAST(:id AS pg_catalog.text)
            FOR UPDATE SKIP LOCKED
        ))
    """,
    "sqlite": "DELETE FROM {table} WHERE id = :id",
}
_LOCK: Final = "LOCK TABLE ONLY {table} IN ROW EXCLUSIVE MODE"
_ADD_COLUMN: Final = "ALTER TABLE {table} ADD COLUMN environment VARCHAR(100)"


class OutboxChanged(Exception):
    """The table is not any more what it was when it was chosen."""


class _OutboxRow(NamedTuple):
    """A row as it was read."""

    raw_id: bytes
    created: float
    text: bytes | None
    """None if it is too long, or put aside."""
    size: int

    @property
    def text_id(self) -> str | None:
        """The id as a parameter of a statement; None if it is no text."""
        try:
            return self.raw_id.decode()
        except UnicodeDecodeError:
            return None


class Transfer(Judge):
    """Moves tasks of one application."""

    def __init__(self, *, environment: str, queues: Collection[str] | None = None) -> None:
        super().__init__(environment=environment, queues=queues)
        self._aside: set[tuple[str, bytes, int]] = set()
        """Large rows that are no tasks of this application: the table, the id, the size."""

    async def move(
        self, source: Source, queue: Queue, schemas: Iterable[str | None], *, until: float | None = None
    ) -> int | None:
        """Move the committed tasks to the queue; returns how many, or None if the time was over before the last one.

        Args:
            source: A connection without an open transaction.
            queue: Where the tasks go.
            schemas: Where the outboxes are; None is the first on the connection's search path that its role owns.
            until: The time of the monotonic clock after which no other page of rows is read.

        Raises:
            QueueUnavailable: The queue did not store a task, or any; what is left stays in the outbox.
            Exception: A table could not be read; the others were.
        """
        moved, failure, done = 0, None, set()
        is_over = False
        for schema in schemas:
            try:
                table = await self._find(source, schema)
                if table is None or table.schema in done:
                    continue
                done.add(table.schema)
                emptied = await self._empty(source, queue, table, until)
                moved, is_over = moved + (emptied or 0), is_over or emptied is None
            except Exception as error:  # noqa: BLE001  # the user's database, by whatever library
                failure = error
                if isinstance(error, QueueUnavailable) and is_away(queue):
                    break
        if failure is not None:
            raise failure
        return None if is_over else moved

    async def count(self, source: Source, schemas: Iterable[str | None]) -> int:
        """Return how many committed rows ``move`` would read.

        Raises:
            Exception: A table could not be read.
        """
        counted, done = 0, set()
        for schema in schemas:
            table = await self._find(source, schema)
            if table is not None and table.schema not in done:
                done.add(table.schema)
                counted += await self._count(source, table)
        return counted

    async def _count(self, source: Source, table: Table) -> int:
        has_environment = "environment" in table.columns
        statement = _COUNT[source.dialect].format(
            table=table.name, mine=_MINE[source.dialect] if has_environment else "true"
        )
        values = {"environment": self.environment} if has_environment else {}
        async with self._reading(source, table):
            return int(str((await source.rows(statement, values))[0][0]))

    # --- Which table ---

    async def _find(self, source: Source, schema: str | None) -> Table | None:
        async with _reading(source):
            found = await look(source, OUTBOX, schema)
        if schema is not None:
            candidates = [table for table in found if table.schema == schema]
        else:
            candidates = [table for table in found if table.on_path]
            for table in found:
                if not table.on_path and self.says_first("off path", table.name):
                    _log.warning(
                        "the outbox %a is not on the search_path, and not swept; name it: ?schema=%s at the end of the URL "
                        "in SAFEDEFER_OUTBOXES (&schema=%s after other parameters)",
                        table.name, table.schema, table.schema,
                    )  # fmt: skip
        chosen = next((table for table in candidates if table.is_own), next(iter(candidates), None))
        return chosen if chosen is not None and self._may_use(chosen) else None

    def _may_use(self, table: Table) -> bool:
        problem = table.flaw
        if not table.is_own:
            problem = (
                f"it belongs to {table.owner}, and only its owner empties it: {table.role} does not; connect as "
                f"{table.owner} (SAFEDEFER_OUTBOXES), or ALTER TABLE ... OWNER TO {table.role}"
            )
        elif problem is None and not table.may_empty:
            problem = f"{table.role} may not read and delete its rows; GRANT SELECT, UPDATE and DELETE to it"
        if problem is None:
            return True
        if self.says_first("unused", table.name, problem):
            _log.error("tasks stay in the outbox %a: %a", table.name, problem)
        return False

    @asynccontextmanager
    async def _locked(
        self, source: Source, table: Table, milliseconds: int = _LOCK_MILLISECONDS
    ) -> AsyncIterator[Table]:
        """A transaction in which the table is as it was judged: nobody can alter it or put a trigger on it."""
        await source.begin()
        try:
            if source.dialect == "postgresql":
                # Before the first snapshot: an older one would not see a trigger that the lock has waited for.
                await source.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
                await source.execute(f"SET LOCAL lock_timeout = {milliseconds}")
                await source.execute(_LOCK.format(table=table.name))
            found = [each for each in await look(source, OUTBOX, table.schema) if each.schema == table.schema]
            if [each.oid for each in found] != [table.oid] or not found[0].is_own or not self._may_use(found[0]):
                raise OutboxChanged(table.name)  # noqa: TRY301  # undone below, as any error
            yield found[0]
        except BaseException:
            await source.rollback()
            raise
        await source.commit()

    # --- What is in it ---

    async def _empty(self, source: Source, queue: Queue, table: Table, until: float | None) -> int | None:
        moved, position, failure, is_over = 0, None, None, False
        table = await self._brought_up_to_date(source, table)
        pending: deque[_OutboxRow] = deque()
        while pending or (keys := await self._keys(source, table, position)):
            if not pending:
                pending.extend(keys)
                position = keys[-1]
            done = self._hand_over(queue, table, await self._read(source, table, _page(pending)))
            if done.ids:
                moved += await self._delete(source, table, done.ids)
            failure = done.failure or failure
            is_over = until is not None and time.monotonic() > until
            if done.is_away or is_over:
                break
        if failure is not None:
            raise failure
        return None if is_over else moved

    async def _brought_up_to_date(self, source: Source, table: Table) -> Table:
        """Add the column that an earlier release did not make. Not in a user's transaction: it locks the table."""
        if "environment" in table.columns:
            return table
        try:
            async with self._locked(source, table, _ALTER_MILLISECONDS) as locked:
                if "environment" not in locked.columns:
                    await source.execute(_ADD_COLUMN.format(table=table.name))
        except Exception as error:  # noqa: BLE001  # somebody else holds a lock: the next time, then
            _log.debug("the outbox is used without its new column (%s)", slug(error))
            return table
        return table._replace(columns=table.columns | {"environment"})

    async def _keys(self, source: Source, table: Table, after: _OutboxRow | None) -> list[_OutboxRow]:
        """Return the next rows, in the order in which they came, without their texts."""
        has_environment = "environment" in table.columns
        statement = _KEYS[source.dialect].format(
            table=table.name,
            mine=_MINE[source.dialect] if has_environment else "true",
            after="true" if after is None else _AFTER[source.dialect],
        )
        values: dict[str, object] = {"limit": _WINDOW, "id_length": ID_LENGTH}
        if has_environment:
            values["environment"] = self.environment
        if after is not None:
            values |= {"created": after.created, "id": after.raw_id}
        async with self._reading(source, table):
            found = await source.rows(statement, values)
        return [_OutboxRow(bytes(raw_id), float(created), None, int(size)) for raw_id, created, size in found]

    async def _read(self, source: Source, table: Table, page: Sequence[_OutboxRow]) -> list[_OutboxRow]:
        """Return rows with their texts, but those that somebody has deleted meanwhile."""
        longest = min(_LARGE_BYTES, _ROW_BYTES)
        ids = [task_id for row in page if row.size <= longest and (task_id := row.text_id) is not None]
        rows = []
        async with self._reading(source, table):
            texts = await self._texts(source, table, ids, longest)
            for row in page:
                if row.text_id is None:
                    rows.append(row)
                elif row.size > longest:
                    rows.append(await self._with_text(source, table, row))
                elif row.raw_id in texts:
                    rows.append(row._replace(text=texts[row.raw_id]))
        return rows

    async def _texts(self, source: Source, table: Table, ids: Sequence[str], longest: int) -> Mapping[bytes, bytes]:
        if not ids:
            return {}
        # Always as many parameters: a statement of another text would be planned anew.
        padded = [*ids, *[ids[-1]] * (_BATCH - len(ids))]
        names = ", ".join(_ID[source.dialect].format(number=number) for number in range(len(padded)))
        values = {"longest": longest, **{f"i{number}": task_id for number, task_id in enumerate(padded)}}
        found = await source.rows(_TEXTS[source.dialect].format(table=table.name, ids=names), values)
        return {bytes(raw_id): bytes(text) for raw_id, text in found}

    def _reading(self, source: Source, table: Table) -> AbstractAsyncContextManager[object]:
        # SQLite without the write lock, which would keep others from the file: reading runs no trigger.
        return self._locked(source, table) if source.dialect == "postgresql" else _reading(source)

    async def _with_text(self, source: Source, table: Table, row: _OutboxRow) -> _OutboxRow:
        """Return a large row with its text, unless it is too large, or was read before and is no task."""
        key = (table.name, row.raw_id, row.size)
        if row.size > _ROW_BYTES or key in self._aside:
            return row
        if len(self._aside) >= _ASIDE:
            if self.says_first("many large", table.name):
                _log.error(
                    "the outbox %a has over %d large rows that are no tasks; no other large row is read before they are "
                    "deleted, and this process restarted",
                    table.name, _ASIDE,
                )  # fmt: skip
            return row
        texts = await self._texts(source, table, [row.raw_id.decode()], _ROW_BYTES)
        return row._replace(text=texts.get(row.raw_id))

    async def _delete(self, source: Source, table: Table, task_ids: Sequence[str]) -> int:
        statement = _DELETE[source.dialect].format(table=table.name)
        async with self._locked(source, table):
            deleted = [await source.execute(statement, {"id": task_id}) for task_id in task_ids]
        return sum(deleted)

    def _hand_over(self, queue: Queue, table: Table, rows: Sequence[_OutboxRow]) -> HandedOver:
        """Enqueue the tasks of some rows."""
        tasks = []
        for row in rows:
            task = self.read(table.name, row.raw_id, row.text)
            if task is not None and self.is_mine(table.name, task):
                tasks.append(task)
            elif row.size > _LARGE_BYTES and row.text is not None:
                self._aside.add((table.name, row.raw_id, row.size))
        return self.hand_over(queue, table.name, tasks)


class TablesOutlet:
    """The outboxes in the tables of one database, as the relay empties them.

    Args:
        opener: Connects to the database.
        transfer: Moves the tasks.
    """

    def __init__(self, opener: Opener, transfer: Transfer) -> None:
        self._opener = opener
        self._transfer = transfer

    def move(self, queue: Queue, schemas: Sequence[str | None], until: float | None) -> int | None:
        """Do what ``Transfer.move`` does, with a connection of its own."""
        # Open only while it is used: a connection must not be carried across a fork.
        return self._opener.use(lambda source: self._transfer.move(source, queue, schemas, until=until))

    def count(self, schemas: Sequence[str | None]) -> int:
        """Do what ``Transfer.count`` does, with a connection of its own."""
        return self._opener.use(lambda source: self._transfer.count(source, schemas))

    def refusal(self, schema: str | None) -> str | None:
        """Return why the outbox of a schema cannot be used; None if it can, or is not made yet."""
        tables = self._opener.use(lambda source: look(source, OUTBOX, schema))
        used = [table for table in tables if table.on_path or table.schema == schema]
        return next((table.refusal for table in used if table.refusal is not None), None)


def _page(pending: deque[_OutboxRow]) -> list[_OutboxRow]:
    """Take the next rows that are read at once; one of any size."""
    page: list[_OutboxRow] = []
    size = 0
    while pending and len(page) < _BATCH and (not page or size < _BATCH_BYTES):
        page.append(pending.popleft())
        size += page[-1].size
    return page


@asynccontextmanager
async def _reading(source: Source) -> AsyncIterator[None]:
    """Read; SQLAlchemy opens a transaction for that."""
    try:
        yield
    finally:
        if source.in_transaction():
            await source.rollback()
