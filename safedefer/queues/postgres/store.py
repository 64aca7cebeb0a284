"""PostgreSQL's drivers and pgqueuer, for the queue: connections, statements, and the tables.

Workers speak asyncpg, on an event loop in a thread of its own. This is the only module that imports it, or pgqueuer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import threading
import time
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar

import asyncpg
from pgqueuer._version import version as pgqueuer_version
from pgqueuer.adapters.persistence.qb import QueryBuilderEnvironment, QueryQueueBuilder, QuerySchedulerBuilder
from pgqueuer.db import AsyncpgDriver
from pgqueuer.domain.settings import DBSettings, Durability
from pgqueuer.queries import Queries
from pgqueuer.types import Channel, QueueEntrypoint, QueueManagerId

from safedefer.errors import ConfigurationError, QueueUnavailable
from safedefer.queues.postgres import producers
from safedefer.queues.postgres.errors import REMEDY_MIGRATE, closed, failure, is_gone, place, refusal
from safedefer.queues.postgres.operations import SQL, ago
from safedefer.queues.postgres.producers import Producers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
    from uuid import UUID

    from safedefer.queues.postgres.operations import Connection

_T = TypeVar("_T")
_log: Final = logging.getLogger("safedefer.postgres")

SCHEMA: Final = "safedefer"
MIGRATIONS: Final = ("migration_1",)
"""Step n brings our tables from version n - 1 to n. Steps are added, never changed."""

_MIGRATION_LOCK: Final = 0x5AFE_DEFE
_CONNECT_SECONDS: Final = 10
_STATEMENT_SECONDS: Final = 60.0
#: A plan that was made while a table was empty goes through all of it when it is not. So plans are made anew now and then.
_PLANNED_SECONDS: Final = 5
#: What a connection is for. The begin of a run, its end, and what is enqueued survive a crash of the server; a settlement
#: or a lease that does not is made up for by the next delivery. To lease, jobs are gone through in the order of their
#: index: to sort those that are due would take seconds where a million are.
Purpose: TypeAlias = Literal["durable", "relaxed", "leases"]
_SETTINGS: Final[Mapping[Purpose, Mapping[str, str]]] = {
    "durable": {},
    "relaxed": {"synchronous_commit": "off"},
    "leases": {"synchronous_commit": "off", "enable_sort": "off"},
}
#: Every statement looks up some rows by index, whatever the planner believes of tables that come and go by the thousand.
_BY_INDEX: Final = {"jit": "off", "enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"}
#: A machine that is gone, or stands still, holds rows that others wait for: the server lets go of them.
_MISSED: Final = {
    "idle_in_transaction_session_timeout": "20s",
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
}
_ALIVE_SECONDS: Final = 15.0
_RECONNECT_SECONDS: Final = 0.5

#: What is named is set: the environment's PGQUEUER_* is for the user's own pgqueuer.
_NAMES: Final = DBSettings(
    prefix="",
    db_schema=SCHEMA,
    channel=Channel("ch_pgqueuer"),
    function="fn_pgqueuer_changed",
    statistics_table="pgqueuer_statistics",
    queue_status_type="pgqueuer_status",
    queue_table="pgqueuer",
    queue_table_log="pgqueuer_log",
    trigger="tg_pgqueuer_changed",
    schedules_table="pgqueuer_schedules",
    durability=Durability.durable,
    widen_id=True,
)
#: It tempts the planner: see the statement that drops it.
_UNWANTED_INDEX: Final = f"{_NAMES.queue_table}_priority_id_id1_idx"
_SLOT_INDEX: Final = f"{_NAMES.queue_table}_picked_slot_idx"

#: What these statements raise when the connection, or the server behind it, is not there.
BROKEN: Final = (
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    # A connection that ends at a bad moment is said to be in an impossible state.
    asyncpg.InternalClientError,
    asyncio.TimeoutError,
    TimeoutError,
)


#: Where pgqueuer's insertion takes the entrypoints: there the admission is asked, and hands them on.
_ENTRYPOINTS: Final = "$2::text[]"
#: What its statement that picks jobs gives back, and what is needed of it.
_PICKED: Final = "SELECT * FROM claimed"
_NEEDED: Final = "SELECT id, dedupe_key, entrypoint, headers, payload, attempts, updated FROM claimed"


class Statements:
    """The statements of pgqueuer, for its tables in our schema."""

    def __init__(self) -> None:
        self._builder = QueryQueueBuilder(settings=_NAMES)
        self.retry = self._builder.build_retry_job_query()
        self.log = self._builder.build_log_job_query()
        # One statement is one transaction, and the database is asked once.
        self.enqueue = _with_ours(self._builder.build_enqueue_query(), {_ENTRYPOINTS: SQL["admit"]})

    async def dequeue(
        self, connection: Connection, queues: Mapping[str, int], *, limit: int, seconds: float, manager: UUID
    ) -> Sequence[Mapping[str, Any]]:
        """Pick jobs of queues, each with its cap on concurrency (0 is none)."""
        query = self._builder.build_dequeue_query(
            batch_size=limit,
            entrypoints=[QueueEntrypoint(queue) for queue in queues],
            concurrency_limits=list(queues.values()),
            queue_manager_id=QueueManagerId(manager),
            global_concurrency_limit=None,
            heartbeat_timeout=ago(seconds),
        )
        statement = _with_ours(query.sql, {_PICKED: _NEEDED})
        if not any(queues.values()):
            return await connection.fetch(statement, *query.args)
        try:
            async with connection.transaction():
                return await connection.fetch(statement, *query.args)
        except asyncpg.UniqueViolationError as error:
            if getattr(error, "constraint_name", None) != _SLOT_INDEX:
                raise
        except asyncpg.DeadlockDetectedError:
            pass
        return ()  # another dispatcher took the last place: as good as nothing due


def _with_ours(statement: str, parts: Mapping[str, str]) -> str:
    """Return a statement of pgqueuer's with parts of ours in it."""
    for theirs, ours in parts.items():
        if statement.count(theirs) != 1:
            raise ConfigurationError(
                f"pgqueuer {pgqueuer_version} has statements that are not known here; install an older one"
            )
        statement = statement.replace(theirs, ours)
    return statement


STATEMENTS: Final = Statements()


class Watch:
    """Whether tasks may have come that no lease has looked for."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._changes = 0
        self._seen = 0

    def changed(self) -> None:
        """Say that there may be a new task."""
        with self._condition:
            self._changes += 1
            self._condition.notify_all()

    wake = changed

    def seen(self) -> None:
        """Say that whatever has come by now will be seen."""
        with self._condition:
            self._seen = self._changes

    def wait(self, timeout: float) -> bool:
        """Block until something has changed that was not seen when this began, or for ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        with self._condition:
            seen = self._seen
            while self._changes == seen:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._condition.wait(left)
            self._seen = self._changes
            return True


# --- Connections ----------------------------------------------------------------------------------


async def _keep(_connection: object) -> None:
    """Reset nothing: only our own statements run on these connections."""


class Pools:
    """The connections of one event loop, by what they are for; made when they are needed.

    Args:
        dsn: The database.
        most: Connections at most for each purpose.
    """

    def __init__(self, dsn: str, most: int) -> None:
        self._dsn = dsn
        self._most = most
        self._pools: dict[Purpose, asyncpg.Pool] = {}
        self._closed = False

    async def _pool(self, purpose: Purpose) -> asyncpg.Pool:
        if self._closed:
            raise closed(self._dsn)
        pool = self._pools.get(purpose)
        if pool is None:  # within the loop, and not connected yet
            pool = self._pools[purpose] = await asyncpg.create_pool(
                self._dsn,
                min_size=0,
                max_size=self._most,
                command_timeout=_STATEMENT_SECONDS,
                timeout=_CONNECT_SECONDS,
                max_cached_statement_lifetime=_PLANNED_SECONDS,
                reset=_keep,
                server_settings={
                    "application_name": "safedefer",
                    "search_path": producers.SEARCH_PATH,
                    **_BY_INDEX,
                    **_MISSED,
                    **_SETTINGS[purpose],
                },
            )
        return pool

    async def run(
        self,
        action: Callable[[Connection], Awaitable[_T]],
        *,
        purpose: Purpose,
        transaction: bool = False,
        again: bool = False,
    ) -> _T:
        """Run an action on a connection and return what it returns.

        With ``again`` it may be done twice: it is, where the connection breaks.

        Raises:
            QueueUnavailable: The database failed, or a refusal.
        """
        try:
            return await self._run(action, purpose=purpose, transaction=transaction, again=again)
        except BROKEN as error:
            raise refusal(error) or failure(self._dsn, error) from error

    async def _run(
        self, action: Callable[[Any], Awaitable[_T]], *, purpose: Purpose, transaction: bool, again: bool
    ) -> _T:
        try:
            async with self._connection(await self._pool(purpose)) as connection:
                if not transaction:
                    return await action(connection)
                async with connection.transaction():
                    return await action(connection)
        except BROKEN as error:
            if not again or not is_gone(error):
                raise
        return await self._run(action, purpose=purpose, transaction=transaction, again=False)

    @contextlib.asynccontextmanager
    async def _connection(self, pool: asyncpg.Pool) -> AsyncIterator[Any]:
        """Give a connection of a pool, which gets back none that may be broken."""
        connection = await pool.acquire(timeout=_CONNECT_SECONDS)
        try:
            yield connection
        except BaseException as error:
            # What the server refuses leaves the connection as it was. After anything else nobody knows.
            if not isinstance(error, asyncpg.PostgresError) or is_gone(error):
                with contextlib.suppress(*BROKEN):  # it is out of the pool already
                    connection.terminate()
            raise
        finally:
            with contextlib.suppress(*BROKEN):  # what was done is done, also if the connection ends now
                await pool.release(connection)

    async def close(self) -> None:
        """Let what runs end, for a while, and disconnect."""
        self._closed = True
        pools = list(self._pools.values())
        try:
            async with asyncio.timeout(_CONNECT_SECONDS / 2):
                await asyncio.gather(*(pool.close() for pool in pools))
        except BaseException as error:
            self.terminate()
            if not isinstance(error, BROKEN):
                raise

    def terminate(self) -> None:
        """Disconnect at once."""
        self._closed = True
        for pool in self._pools.values():
            with contextlib.suppress(*BROKEN, RuntimeError):  # whose loop is closed, say
                pool.terminate()


class Connections:
    """What one process has open: a thread with an event loop for asyncpg's, and those of producers."""

    def __init__(self, dsn: str, producers: int, workers: int, *, watch: Watch) -> None:
        self._dsn = dsn
        self._watch = watch
        self.pools = Pools(dsn, workers)
        self._listener: asyncio.Task[None] | None = None
        self._listening = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="safedefer-postgres", daemon=True)
        self._thread.start()
        self.producers = Producers(dsn, producers, STATEMENTS.enqueue, SQL["stored"])
        self._lock = threading.Lock()
        self._closed = False
        try:
            self.marker, self.lease_seconds = self.wait_for(self._start())
        except BaseException:
            self.close()
            raise

    def wait_for(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine on the loop of the thread, and wait for what it returns."""
        with self._lock:
            if self._closed:
                coroutine.close()
                raise closed(self._dsn)
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise closed(self._dsn) from None

    async def apart(self, action: Callable[[Connection], Awaitable[_T]], /, *, purpose: Purpose) -> _T:
        """Do an action in a transaction on the loop of the thread, and await it on whatever loop.

        What takes several statements holds rows in between: it must not wait for a loop that some task blocks.
        """
        with self._lock:
            if self._closed:
                raise closed(self._dsn)
            running = self.pools.run(action, purpose=purpose, transaction=True)
            future = asyncio.run_coroutine_threadsafe(running, self._loop)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if future.cancelled() and (current is None or not current.cancelling()):
                raise closed(self._dsn) from None
            raise

    async def _start(self) -> tuple[str, float]:
        return await self.pools.run(_check_schema, purpose="durable")

    def run(
        self, action: Callable[[Connection], Awaitable[_T]], *, purpose: Purpose, transaction: bool, again: bool = False
    ) -> _T:
        """Do what ``Pools.run`` does, on the loop of the thread, and wait for it."""
        return self.wait_for(self.pools.run(action, purpose=purpose, transaction=transaction, again=again))

    def listen(self) -> None:
        """Hear of new tasks from now on."""
        if not self._listening:
            self._listening = True
            self._loop.call_soon_threadsafe(self._begin_to_listen)

    def _begin_to_listen(self) -> None:
        self._listener = self._loop.create_task(self._listen())

    async def _listen(self) -> None:
        told = False
        while True:
            try:
                await self._listen_once()
                told = False
            except Exception as error:  # noqa: BLE001  # whatever it is, without this nobody is ever told again
                if not told:
                    _log.warning("nobody tells of new tasks now (%s); trying again", type(error).__name__)
                told = True
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _listen_once(self) -> None:
        connection = await asyncpg.connect(
            self._dsn, timeout=_CONNECT_SECONDS, command_timeout=_ALIVE_SECONDS,
            server_settings={"application_name": "safedefer-listen", "search_path": producers.SEARCH_PATH},
        )  # fmt: skip
        try:
            gone = asyncio.Event()
            connection.add_termination_listener(lambda _: gone.set())
            await connection.add_listener(_NAMES.channel, self._hear)
            self._watch.changed()  # what came before nobody has heard
            while not gone.is_set():
                with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                    await asyncio.wait_for(gone.wait(), _ALIVE_SECONDS)
                    break
                await connection.execute("SELECT 1")
        finally:
            connection.terminate()

    def _hear(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        try:
            operation = json.loads(str(payload)).get("operation")
        except (ValueError, AttributeError):
            return
        if operation == "insert":
            self._watch.changed()

    def close(self) -> None:
        """Finish what runs and disconnect."""
        with self._lock:
            self._closed = True
        self.producers.close()
        with contextlib.suppress(*BROKEN, RuntimeError):
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(_CONNECT_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CONNECT_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()

    async def _stop(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
        await self.pools.close()
        # Whoever waits for one of these would wait for ever.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


# --- Migrations -----------------------------------------------------------------------------------


async def _check_schema(connection: Any) -> tuple[str, float]:
    """Return the marker and the lease seconds of a database.

    Raises:
        ConfigurationError: It was not migrated, or by another release.
    """
    if not (await connection.fetchrow(SQL["has_settings"]))["found"]:
        raise ConfigurationError(f"the queue's tables are not in this database; {REMEDY_MIGRATE}")
    settings = await connection.fetchrow(SQL["settings"])
    if settings is None or settings["version"] < len(MIGRATIONS):
        raise ConfigurationError(f"the queue's tables are of an older safedefer; {REMEDY_MIGRATE}")
    if settings["version"] > len(MIGRATIONS):
        raise ConfigurationError(
            f"the queue's tables have version {settings['version']}, and this safedefer knows versions up to "
            f"{len(MIGRATIONS)}; upgrade safedefer"
        )
    if settings["pgqueuer"] != pgqueuer_version:
        plan = await _queries(connection).plan_upgrade()
        if _wanted(plan.statements):
            raise ConfigurationError(f"the tables are of pgqueuer {settings['pgqueuer']}; {REMEDY_MIGRATE}")
    return settings["marker"], settings["lease_seconds"]


def _queries(connection: Any) -> Queries:
    return Queries(
        AsyncpgDriver(connection),
        qbe=QueryBuilderEnvironment(settings=_NAMES),
        qbq=QueryQueueBuilder(settings=_NAMES),
        qbs=QuerySchedulerBuilder(settings=_NAMES),
    )


def _wanted(statements: Iterable[str]) -> list[str]:
    """Return which statements of an upgrade of pgqueuer's tables are wanted: not the index that ``migrate`` drops."""
    return [statement for statement in statements if _UNWANTED_INDEX not in statement]


async def _migrate(dsn: str) -> list[str]:
    connection = await asyncpg.connect(
        dsn,
        timeout=_CONNECT_SECONDS,
        server_settings={"application_name": "safedefer", "search_path": producers.SEARCH_PATH},
    )
    done = []
    try:
        # Whoever migrates at the same time waits.
        await connection.execute("SELECT pg_advisory_lock($1)", _MIGRATION_LOCK)
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        queries = _queries(connection)
        if await queries.schema_is_installed():
            if wanted := _wanted((await queries.plan_upgrade()).statements):
                await queries.apply_upgrade()
            done += [f"pgqueuer: {statement}" for statement in wanted]
        else:
            await queries.install(create_schema=False)
            await queries.optimize_autovacuum()
            done.append(f"pgqueuer: installed {pgqueuer_version}")
        await connection.execute(SQL["drop_tempting_index"])
        settings = None
        if (await connection.fetchrow(SQL["has_settings"]))["found"]:
            settings = await connection.fetchrow(SQL["settings"])
        at = 0 if settings is None else settings["version"]
        for number, name in enumerate(MIGRATIONS[at:], start=at + 1):
            async with connection.transaction():
                await connection.execute(SQL[name])
                if number == 1:
                    await connection.execute(SQL["settings_insert"], secrets.token_hex(16))
                await connection.execute(SQL["settings_version"], number, pgqueuer_version)
            done.append(f"safedefer: {name}")
        await connection.execute(SQL["settings_version"], max(at, len(MIGRATIONS)), pgqueuer_version)
    finally:
        connection.terminate()
    return done


def migrate(dsn: str) -> list[str]:
    """Make the tables of a database, or bring them up to date; return what was done.

    Raises:
        QueueUnavailable: The database is not there, or its user may not make tables.
    """
    try:
        return asyncio.run(_migrate(dsn))
    except BROKEN as error:
        raise QueueUnavailable(
            f"the database at {place(dsn)} was not migrated ({type(error).__name__}: {error}); "
            "see that it runs, and that this user may create a schema in it"
        ) from error
