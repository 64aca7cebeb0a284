"""Transactions of the user's own PostgreSQL connection, by every driver: through the outbox, and in the queue's own database."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import asyncpg
import psycopg
import pytest
import sqlalchemy

from safedefer.dispatcher.loop import Dispatcher, InProcessDelivery
from safedefer.errors import (
    BadTransactionStateError,
    ConfigurationError,
    InvalidTaskError,
    QueueUnavailable,
    TaskAlreadyExistsError,
)
from safedefer.queues.memory.queue import MemoryQueue
from safedefer.queues.postgres import PostgresQueue, migrate
from safedefer.queues.sqlite.queue import SQLiteQueue
from safedefer.transactions.databases import opener_of, source_of
from safedefer.transactions.outbox import Outbox
from tests import sample_tasks as tasks
from tests.postgres.server import fresh_database, shared_server
from tests.postgres.users import (
    USERS,
    AlchemyAsyncpgSession,
    Asyncpg,
    Django,
    Psycopg,
)
from tests.queues.contract import make_task, oversize_task
from tests.unit.apps import make_app

ROOT = Path(__file__).absolute().parents[2]


class Database:
    """A database, and somebody who looks at it."""

    def __init__(self, dsn):
        self.dsn = dsn
        self._look = psycopg.connect(dsn, autocommit=True)

    def clean(self):
        self._look.execute(
            "DROP TABLE IF EXISTS orders, safedefer_outbox, safedefer_once; CREATE TABLE orders (id int)"
        )
        self._look.execute("DROP SCHEMA IF EXISTS safedefer CASCADE")

    def sql(self, statement):
        return self._look.execute(statement)

    def count(self, table):
        if not self._look.execute("SELECT to_regclass(%s)", [table]).fetchone()[0]:
            return 0
        return self._look.execute(f"SELECT count(*) FROM {table}").fetchone()[0]

    def close(self):
        self._look.close()


class OwnQueue(MemoryQueue):
    """A queue that takes tasks by statements in its own database, as the PostgreSQL queue does."""

    marker = "the mark"

    @property
    def statements(self):
        return self

    def install(self, database):
        database.sql("CREATE SCHEMA safedefer")
        database.sql("CREATE TABLE safedefer.settings (marker text)")
        database.sql(f"INSERT INTO safedefer.settings VALUES ('{self.marker}')")
        database.sql("CREATE TABLE safedefer.tasks (id text PRIMARY KEY, name text UNIQUE, token bytea)")
        return self

    def enqueue_statements(self, given):
        statement = "INSERT INTO safedefer.tasks SELECT * FROM unnest($1::text[], $2::text[], $3::bytea[])"
        return [
            ("INSERT INTO public.orders SELECT 1000 WHERE $1", (False,)),
            (statement, ([t.id for t in given], [t.name for t in given], [t.token for t in given])),
        ]

    def refusal(self, error):
        constraint = getattr(error, "constraint_name", None) or getattr(
            getattr(error, "diag", None), "constraint_name", None
        )
        return TaskAlreadyExistsError("the name is taken") if constraint == "tasks_name_key" else None


@pytest.fixture(scope="module")
def dsn():
    server = shared_server()
    with fresh_database(server) as name:
        yield server.dsn(name)


@pytest.fixture
def database(dsn):
    database = Database(dsn)
    database.clean()
    yield database
    database.close()


@pytest.fixture
def queue():
    return MemoryQueue()


@pytest.fixture
def outbox(queue):
    outbox = Outbox(lambda: queue, environment="test", clock=time.time)
    yield outbox
    outbox.close()


@pytest.fixture(params=USERS, ids=lambda kind: kind.__name__)
def user(request, database):
    user = request.param(database.dsn).start()
    yield user
    user.stop()


def some_user(kind):
    """Run a test with one driver."""
    return pytest.mark.parametrize("user", [kind], indirect=True, ids=lambda kind: kind.__name__)


def waiting(queue) -> set[str]:
    return {view.id for view in queue.tasks(limit=1000)}


def until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


async def put(user, outbox, *given) -> None:
    if user.is_async:
        await outbox.put_async(*given)
    else:
        outbox.put(*given)


# --- Through the outbox -------------------------------------------------------------------------


def test_a_commit_enqueues_with_the_users_change(user, database, outbox, queue):
    given = [make_task(headers={"X-Shop": "é"}, token=bytes(range(256))), oversize_task()]

    async def scenario():
        async with user.within(outbox.transaction(user.connection)):
            await user.sql("INSERT INTO orders VALUES (1)")
            await put(user, outbox, given[0])
            await put(user, outbox, given[1])
            assert (queue.tasks(), database.count("orders")) == ([], 0)
        assert database.count("orders") == 1  # committed by the block

    user.run(scenario())
    until(lambda: waiting(queue) == {task.id for task in given})
    assert queue.blobs.get(given[1].blob.id) == given[1].blob.data
    until(lambda: database.count("safedefer_outbox") == 0)


def test_what_raises_is_undone_and_enqueues_nothing(user, database, outbox, queue):
    async def scenario():
        with pytest.raises(ZeroDivisionError):
            async with user.within(outbox.transaction(user.connection)):
                await user.sql("INSERT INTO orders VALUES (1)")
                await put(user, outbox, oversize_task())
                raise ZeroDivisionError
        async with user.within(outbox.transaction(user.connection)):  # the connection works as before
            await user.sql("INSERT INTO orders VALUES (2)")

    user.run(scenario())
    assert (outbox.sweep(), queue.tasks(), database.count("orders")) == (0, [], 1)


def test_a_transaction_of_the_users_own_is_theirs_to_end(user, database, outbox, queue):
    task, undone = make_task(), make_task()

    async def scenario():
        async with user.own():
            async with user.within(outbox.transaction(user.connection)):
                await put(user, outbox, task)
            await user.sql("INSERT INTO orders VALUES (1)")
            assert (outbox.sweep(), queue.tasks()) == (0, [])
        with pytest.raises(ZeroDivisionError):
            async with user.own():
                async with user.within(outbox.transaction(user.connection)):
                    await put(user, outbox, undone)
                raise ZeroDivisionError

    user.run(scenario())
    until(lambda: waiting(queue) == {task.id})
    assert (outbox.sweep(), waiting(queue), database.count("orders")) == (0, {task.id}, 1)


def test_a_savepoint_that_is_undone_takes_its_tasks_with_it(user, database, outbox, queue):
    kept, undone, later = make_task(), make_task(), make_task()

    async def scenario():
        async with user.within(outbox.transaction(user.connection)):
            with pytest.raises(ZeroDivisionError):
                async with user.savepoint():  # the table is created in here, and goes with it
                    await put(user, outbox, undone)
                    raise ZeroDivisionError
            await put(user, outbox, later)
            async with user.savepoint():
                await put(user, outbox, kept)

    user.run(scenario())
    until(lambda: waiting(queue) == {kept.id, later.id})


def test_a_block_that_raises_within_the_users_own_transaction_does_not_undo_it(user, database, outbox, queue):
    task = make_task()

    async def scenario():
        async with user.own():
            with contextlib.suppress(ZeroDivisionError):
                async with user.within(outbox.transaction(user.connection)):
                    outbox.put(task)
                    raise ZeroDivisionError

    user.run(scenario())
    until(lambda: waiting(queue) == {task.id})


def test_a_transaction_in_which_a_statement_failed_is_not_said_to_be_committed(user, database, outbox, queue):
    async def scenario():
        with pytest.raises(BadTransactionStateError, match="has failed"):
            async with user.within(outbox.transaction(user.connection)):
                await put(user, outbox, make_task())
                with contextlib.suppress(Exception):
                    await user.sql("SELECT 1 / 0")
        async with user.within(outbox.transaction(user.connection)):
            await user.sql("INSERT INTO orders VALUES (2)")

    user.run(scenario())
    assert (outbox.sweep(), queue.tasks(), database.count("orders")) == (0, [], 1)


def test_a_task_has_no_name_outside_of_a_block_or_through_the_outbox(user, outbox):
    async def scenario():
        with pytest.raises(BadTransactionStateError, match="needs a transaction"):
            await put(user, outbox, make_task())
        async with user.within(outbox.transaction(user.connection)):
            for task in (make_task(name="n"), make_task(unique_key="k")):
                with pytest.raises(BadTransactionStateError, match="no name"):
                    await put(user, outbox, task)

    user.run(scenario())


def test_the_wrong_kind_of_block_is_refused(user, outbox):
    async def scenario():
        for block in (outbox.transaction(user.connection), outbox.once(user.connection, effect="e")):
            if user.is_async:
                with pytest.raises(BadTransactionStateError, match="async with"), block:
                    pass
            else:
                with pytest.raises(BadTransactionStateError, match="write `with`"):
                    async with block:
                        pass

    user.run(scenario())


# --- An effect that is had once -----------------------------------------------------------------


def test_an_effect_is_had_once_and_again_if_it_was_undone(user, database, outbox):
    async def scenario():
        with pytest.raises(ZeroDivisionError):
            async with user.within(outbox.once(user.connection, effect="task-1")) as first:
                assert first
                raise ZeroDivisionError
        for expected in (True, False):
            async with user.within(outbox.once(user.connection, effect="task-1")) as first:
                assert first is expected
                await user.sql("INSERT INTO orders VALUES (1)")
        async with user.within(outbox.once(user.connection, effect="task-2", also="task-1")) as first:
            assert not first

    user.run(scenario())
    assert database.count("orders") == 2


@pytest.mark.parametrize("table", ["missing", "there"])
def test_of_two_connections_at_once_one_has_the_effect(user, database, outbox, table):
    """The other one is psycopg's; it waits for the end of this transaction, and then knows."""
    results = []

    def other():
        with psycopg.connect(database.dsn) as connection, outbox.once(connection, effect="task-1") as first:
            results.append(first)

    async def scenario():
        if table == "there":
            async with user.within(outbox.once(user.connection, effect="task-0")):
                pass
        thread = threading.Thread(target=other)
        async with user.within(outbox.once(user.connection, effect="task-1")) as first:
            results.append(first)
            thread.start()
            until(lambda: database.sql("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone())
        thread.join()

    user.run(scenario())
    assert results == [True, False]


def test_many_at_once_have_an_effect_once_and_none_of_them_fails(database, outbox):
    async def one():
        connection = await asyncpg.connect(database.dsn)
        try:
            async with outbox.once(connection, effect="task-1") as first:
                await asyncio.sleep(0.01)
            return first
        finally:
            await connection.close()

    async def scenario():
        return await asyncio.gather(*(one() for _ in range(12)))

    assert sorted(asyncio.run(scenario())) == [False] * 11 + [True]


def test_what_another_transaction_is_forgetting_is_not_waited_for(database, outbox):
    outbox.clock = lambda: 1000.0
    with psycopg.connect(database.dsn) as one, psycopg.connect(database.dsn) as two:
        with outbox.once(one, effect="old"):
            pass
        outbox.clock = time.time
        with outbox.once(one, effect="task-1"), outbox.once(two, effect="task-2"):
            pass
        assert database.sql("SELECT effect FROM safedefer_once ORDER BY 1").fetchall() == [("task-1",), ("task-2",)]


# --- In the queue's own database ----------------------------------------------------------------


@pytest.fixture
def own(database):
    queue = OwnQueue().install(database)
    outbox = Outbox(lambda: queue, environment="test", clock=time.time)
    yield outbox
    outbox.close()


def test_in_the_queues_own_database_tasks_are_stored_by_the_transaction_itself(user, database, own):
    named, plain, undone = make_task(name="n"), make_task(), make_task()

    async def scenario():
        async with user.within(own.transaction(user.connection)):
            await put(user, own, named)
            own.put(plain)
            assert database.count("safedefer.tasks") == 0
        with pytest.raises(ZeroDivisionError):
            async with user.within(own.transaction(user.connection)):
                await put(user, own, undone)
                raise ZeroDivisionError
        async with user.own():
            async with user.within(own.transaction(user.connection)):
                with pytest.raises(ZeroDivisionError):
                    async with user.savepoint():
                        await put(user, own, undone)
                        raise ZeroDivisionError

    user.run(scenario())
    rows = database.sql("SELECT id, name, token FROM safedefer.tasks ORDER BY id").fetchall()
    assert rows == [(named.id, "n", named.token), (plain.id, None, plain.token)]
    assert database.count("safedefer_outbox") == 0


def test_a_name_that_is_taken_is_refused_and_the_transaction_goes_on(user, database, own):
    async def scenario():
        async with user.within(own.transaction(user.connection)):
            await put(user, own, make_task(name="n"))
            with pytest.raises(TaskAlreadyExistsError):
                await put(user, own, make_task(name="n"))
            await put(user, own, make_task(name="m"))
            await user.sql("INSERT INTO orders VALUES (1)")

    user.run(scenario())
    assert database.sql("SELECT name FROM safedefer.tasks ORDER BY id").fetchall() == [("n",), ("m",)]
    assert database.count("orders") == 1


def test_another_error_of_the_queues_statements_is_the_drivers(user, database, own):
    task = make_task()

    async def scenario():
        async with user.within(own.transaction(user.connection)):
            await put(user, own, task)
            with pytest.raises((psycopg.errors.UniqueViolation, asyncpg.UniqueViolationError)):
                await put(user, own, task)

    user.run(scenario())
    assert database.count("safedefer.tasks") == 1


@pytest.mark.parametrize("kind", [Psycopg, Asyncpg])
def test_names_need_to_be_awaited_where_the_connection_is(database, own, kind):
    user = kind(database.dsn).start()

    async def scenario():
        async with user.within(own.transaction(user.connection)):
            if not user.is_async:
                own.put(make_task(name="n"))
                return
            with pytest.raises(BadTransactionStateError, match="await defer_async"):
                own.put(make_task(name="n"))

    user.run(scenario())
    user.stop()


def test_another_database_of_the_same_shape_is_not_the_queues_own(database):
    queue = OwnQueue().install(database)
    database.sql("UPDATE safedefer.settings SET marker = 'another mark'")
    outbox, task = Outbox(lambda: queue, environment="test", clock=time.time), make_task()
    with psycopg.connect(database.dsn) as connection:
        with outbox.transaction(connection):
            outbox.put(task)
            with pytest.raises(BadTransactionStateError, match="no name"):
                outbox.put(make_task(name="n"))
    until(lambda: waiting(queue) == {task.id})
    assert database.count("safedefer.tasks") == 0
    outbox.close()


def test_who_may_not_read_the_queues_tables_goes_through_the_outbox(database):
    queue = OwnQueue().install(database)
    outbox, task = Outbox(lambda: queue, environment="test", clock=time.time), make_task()
    database.sql("DROP ROLE IF EXISTS clerk; CREATE ROLE clerk LOGIN; GRANT ALL ON SCHEMA public TO clerk")
    with psycopg.connect(database.dsn, user="clerk") as connection:
        with outbox.transaction(connection):
            outbox.put(task)
    until(lambda: waiting(queue) == {task.id})
    outbox.close()
    database.sql("DROP TABLE safedefer_outbox; REVOKE ALL ON SCHEMA public FROM clerk")
    with psycopg.connect(database.dsn, user="clerk") as connection, outbox.transaction(connection):
        with pytest.raises(BadTransactionStateError, match="create it by hand"):
            outbox.put(task)
        assert connection.execute("SELECT 1").fetchone() == (1,)  # the transaction can go on
    outbox.close()
    database.sql("DROP OWNED BY clerk; DROP ROLE clerk")


# --- The PostgreSQL queue -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def migrated_dsn():
    server = shared_server()
    with fresh_database(server) as name:
        migrate(server.dsn(name))
        with psycopg.connect(server.dsn(name)) as connection:
            connection.execute("CREATE TABLE orders (id int)")
        yield server.dsn(name)


@pytest.fixture
def shop(migrated_dsn):
    """An App whose queue is in the database of the orders."""
    app = make_app(queue=PostgresQueue(migrated_dsn))
    app.dsn = migrated_dsn
    yield app
    app.close()
    with psycopg.connect(migrated_dsn) as connection:
        kept = "orders", *(f"safedefer.{name}" for name in ("pgqueuer", "names", "uniques", "blobs", "blob_totals"))
        connection.execute(f"TRUNCATE {', '.join(kept)}")
        assert connection.execute("SELECT to_regclass('safedefer_outbox')").fetchone() == (None,)


@pytest.fixture(params=USERS, ids=lambda kind: kind.__name__)
def clerk(request, migrated_dsn):
    user = request.param(migrated_dsn).start()
    yield user
    user.stop()


def test_in_the_database_of_the_queue_everything_goes_with_the_transaction(clerk, shop):
    """Names, unique tasks, oversize ones; what is refused leaves the transaction as it was."""
    tasks.reset()
    inside = shop.options(transactional=True)

    async def defer(*args, options=inside, **kwargs):
        if clerk.is_async:
            return await options.defer_async(*args, **kwargs)
        return options.defer(*args, **kwargs)

    async def scenario():
        with pytest.raises(ZeroDivisionError):
            async with clerk.within(shop.transaction(clerk.connection)):
                await defer(tasks.keywords, text="y" * 20_000, options=named)
                raise ZeroDivisionError
        async with clerk.within(shop.transaction(clerk.connection)):
            await clerk.sql("INSERT INTO orders VALUES (1)")
            first = await defer(tasks.add, 1, options=named)
            with pytest.raises(TaskAlreadyExistsError, match="receipt-1"):
                await defer(tasks.add, 2, options=named)
            with pytest.raises(ZeroDivisionError):
                async with clerk.savepoint():
                    await defer(tasks.keywords, text="z" * 20_000)
                    raise ZeroDivisionError
            large = await defer(tasks.keywords, text="x" * 20_000)
            waits = await defer(tasks.add, 3, options=unique)
            assert (await defer(tasks.add, 3, options=unique)).id == waits.id
            inside.defer_many([(tasks.add, (4,), {}), (tasks.add, (5,), {})])
            assert (await defer(tasks.add, 6, options=unique)).id != waits.id
            assert shop.queue.tasks() == []
        async with clerk.within(shop.transaction(clerk.connection)):
            assert (await defer(tasks.add, 3, options=unique)).id == waits.id
        return first, large, waits

    named = shop.options(transactional=True, name="receipt-1")
    unique = shop.options(transactional=True, unique=True)
    made = clerk.run(scenario())
    found = {view.id: view for view in shop.queue.tasks()}
    assert len(found) == 6
    assert {task.id for task in made} <= set(found)
    assert (found[made[0].id].name, len(found[made[1].id].token) > 20_000) == ("receipt-1", True)
    asyncio.run(Dispatcher(shop.queue, InProcessDelivery(shop.handle), clock=time.time).run_until_empty())
    assert len(tasks.RAN) == 6
    with psycopg.connect(shop.dsn) as connection:
        assert connection.execute("SELECT count(*) FROM orders").fetchone() == (1,)
        assert connection.execute("SELECT count(*) FROM safedefer.blobs").fetchone() == (0,)


def test_two_transactions_that_want_one_name_wait_for_each_other(shop):
    results = []

    def other():
        with psycopg.connect(shop.dsn) as connection, shop.transaction(connection):
            try:
                shop.options(transactional=True, name="n").defer(tasks.add, 2)
            except TaskAlreadyExistsError:
                results.append("refused")

    with psycopg.connect(shop.dsn) as connection, psycopg.connect(shop.dsn, autocommit=True) as look:
        thread = threading.Thread(target=other)
        with shop.transaction(connection):
            shop.options(transactional=True, name="n").defer(tasks.add, 1)
            thread.start()
            until(lambda: look.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone())
        thread.join()
    assert results == ["refused"]
    assert len(shop.queue.tasks()) == 1


def test_another_database_of_the_same_server_goes_through_its_outbox(shop, database):
    with psycopg.connect(database.dsn) as connection, shop.transaction(connection):
        connection.execute("INSERT INTO orders VALUES (1)")
        task = shop.options(transactional=True).defer(tasks.keywords, text="x" * 20_000)
    until(lambda: waiting(shop.queue) == {task.id})
    until(lambda: database.count("safedefer_outbox") == 0)


def test_a_queue_that_is_away_gets_later_what_was_committed(database):
    """Its mark cannot be read, so the outbox takes what is deferred."""

    class Away(OwnQueue):
        away = True

        @property
        def marker(self):
            if self.away:
                raise QueueUnavailable("the database does not answer; wait")
            return "the mark"

        def enqueue_many(self, given):
            assert self.marker
            super().enqueue_many(given)

    database.sql("CREATE SCHEMA safedefer; CREATE TABLE safedefer.settings (marker text)")
    queue = Away()
    outbox, task = Outbox(lambda: queue, environment="test", clock=time.time), make_task()
    with psycopg.connect(database.dsn) as connection:
        with outbox.transaction(connection):
            outbox.put(task)
        assert database.count("safedefer_outbox") == 1
        queue.away = False
        until(lambda: waiting(queue) == {task.id})
    outbox.close()


# --- Blocks that are awaited --------------------------------------------------------------------


@pytest.fixture
def app():
    app = make_app(queue=MemoryQueue())
    yield app
    app.close()


async def test_a_plain_defer_in_an_awaited_block_is_written_at_its_end(app, database):
    connection = await asyncpg.connect(database.dsn)
    async with app.transaction(connection):
        first = app.options(transactional=True).defer(tasks.add, 1)
        many = app.options(transactional=True).defer_many([(tasks.add, (2,), {}), (tasks.add, (3,), {})])
        assert await connection.fetchval("SELECT to_regclass('safedefer_outbox')") is None
    await connection.close()
    assert not first.was_enqueued
    until(lambda: waiting(app.queue) == {first.id, *(task.id for task in many)})


async def test_the_loop_runs_on_while_the_queue_is_given_the_tasks(app, database):
    connection = await asyncpg.connect(database.dsn)
    async with app.transaction(connection):
        task = await app.options(transactional=True).defer_async(tasks.keywords, text="x" * 20_000)
        plain = await app.defer_async(tasks.add, 1)  # what is not transactional does not wait
        assert waiting(app.queue) == {plain.id}
    await connection.close()
    until(lambda: waiting(app.queue) == {task.id, plain.id})


async def test_blocks_are_of_their_own_task_and_thread(app, database):
    one, two = await asyncpg.connect(database.dsn), await psycopg.AsyncConnection.connect(database.dsn)
    transactional = app.options(transactional=True)

    async def in_a_block(connection, number):
        async with app.transaction(connection):
            await asyncio.sleep(0)
            return await transactional.defer_async(tasks.add, number)

    async with app.transaction(one):
        with pytest.raises(BadTransactionStateError, match="another asyncio task"):
            await asyncio.gather(transactional.defer_async(tasks.add, 1))
        context = contextvars.copy_context()
        with pytest.raises(BadTransactionStateError, match="another thread"):
            await asyncio.to_thread(context.run, transactional.defer, tasks.add, 1)
        nested = await in_a_block(two, 2)
    both = await asyncio.gather(in_a_block(one, 3), in_a_block(two, 4))
    with pytest.raises(BadTransactionStateError, match="async with"):
        await transactional.defer_async(tasks.add, 5)
    await one.close()
    await two.close()
    until(lambda: waiting(app.queue) == {nested.id, *(task.id for task in both)})


async def test_a_cancelled_block_is_undone(app, database):
    connection = await asyncpg.connect(database.dsn)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as timeout:
            async with app.transaction(connection):
                await app.options(transactional=True).defer_async(tasks.add, 1)
                timeout.reschedule(asyncio.get_running_loop().time() + 0.05)
                await connection.execute("SELECT pg_sleep(10)")
    assert not connection.is_in_transaction()
    await connection.close()
    assert await asyncio.to_thread(app.outbox.sweep) == 0


async def test_the_effect_of_a_task_that_is_a_coroutine(app, database):
    connection = await asyncpg.connect(database.dsn)
    for expected in (True, False):
        async with app.once(connection, "charge-42") as first:
            assert first is expected
    await connection.close()


async def test_the_drop_in_function_is_awaited_in_the_transaction(app, database):
    import safedefer
    from safedefer import deferred

    safedefer.configure(app)
    connection = await asyncpg.connect(database.dsn)
    async with app.transaction(connection):
        task = await deferred.defer_async(tasks.add, 1, _transactional=True, _queue="mail", scale=2)
        other = deferred.defer(tasks.add, 2, _transactional=True)
        with pytest.raises(TypeError, match="_quue"):
            await deferred.defer_async(tasks.add, 1, _transactional=True, _quue="mail")
    await connection.close()
    safedefer.configure(None)
    until(lambda: waiting(app.queue) == {task.id, other.id})
    assert app.queue.find(task.id).queue == "mail"


async def test_a_sync_session_within_an_async_one_goes_through_the_relay(app, database):
    user = AlchemyAsyncpgSession(database.dsn)
    await user.open()

    def work(session):
        with app.transaction(session):
            return app.options(transactional=True).defer(tasks.add, 1)

    task = await user.connection.run_sync(work)
    await user.close()
    user._runner.close()
    until(lambda: waiting(app.queue) == {task.id})


async def test_a_test_app_runs_what_was_committed(database):
    from safedefer.testing import TestApp

    with TestApp("tests.sample_tasks") as app:
        connection = await asyncpg.connect(database.dsn)
        async with app.transaction(connection):
            await app.options(transactional=True).defer_async(tasks.add, 1)
        await connection.close()
        assert len(app.waiting()) == 1
        assert [ran.outcome for ran in app.run_due()] == ["succeeded"]


@pytest.mark.parametrize("effect", ["", "x" * 701, "a\0b", "\ud800", 5])
def test_an_effect_has_a_name_that_every_database_takes(app, effect):
    with pytest.raises(InvalidTaskError, match="effect"):
        app.once(None, effect)


# --- What is refused ----------------------------------------------------------------------------


def test_a_pipeline_is_refused(database, outbox):
    with psycopg.connect(database.dsn) as connection, connection.pipeline():
        with pytest.raises(BadTransactionStateError, match="pipeline"), outbox.transaction(connection):
            pass


def test_psycopg2_is_told_what_to_do_instead(outbox):
    connection = type("connection", (), {"__module__": "psycopg2.extensions"})()
    with pytest.raises(BadTransactionStateError, match="use psycopg 3"), outbox.transaction(connection):
        pass


def test_a_lost_connection_is_not_said_to_be_committed(database, outbox):
    connection = psycopg.connect(database.dsn)
    with pytest.raises(BadTransactionStateError, match="was closed"), outbox.transaction(connection):
        connection.close()


def test_a_commit_that_was_done_and_never_answered_is_looked_for(database, outbox, queue, monkeypatch):
    with psycopg.connect(database.dsn) as connection:
        kind = type(source_of(connection))
        commit = kind.commit

        async def unheard(source):
            monkeypatch.setattr(kind, "commit", commit)
            await commit(source)
            raise psycopg.OperationalError("server closed the connection unexpectedly")

        monkeypatch.setattr(kind, "commit", unheard)
        task = make_task()
        with pytest.raises(psycopg.OperationalError), outbox.transaction(connection):
            outbox.put(task)
        until(lambda: waiting(queue) == {task.id})


async def test_a_block_that_cannot_write_its_tasks_says_so_with_the_error_that_ended_it(app, database, caplog):
    connection = await asyncpg.connect(database.dsn)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("INSERT INTO orders VALUES (1)")
    with pytest.raises(LookupError) as ended:
        async with app.transaction(connection):
            app.options(transactional=True).defer(tasks.add, 1)
            with contextlib.suppress(asyncpg.PostgresError):
                await connection.execute("SELECT 1 / 0")  # and the transaction takes nothing more
            raise LookupError("the user's own")
    assert "not written" in ended.value.__notes__[0]
    assert "tasks of a block that ended with LookupError were not written" in caplog.text
    await transaction.rollback()
    await connection.close()


def test_a_block_is_entered_once_at_a_time(database, outbox):
    with psycopg.connect(database.dsn) as connection:
        block = outbox.transaction(connection)
        with block, pytest.raises(BadTransactionStateError, match="open already"), block:
            pass
        with block:
            outbox.put(make_task())


async def test_a_sqlalchemy_connection_that_is_not_connected_is_refused(database, outbox):
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(database.dsn.replace("postgresql://", "postgresql+asyncpg://"))
    with pytest.raises(BadTransactionStateError, match="not connected"):
        async with outbox.transaction(engine.connect()):
            pass
    await engine.dispose()


def test_a_connection_of_django_that_is_not_this_threads_is_refused(database, outbox):
    user = Django(database.dsn).start()
    with pytest.raises(BadTransactionStateError, match="this thread"), outbox.transaction(user.connection.copy()):
        pass
    user.stop()


def test_the_proxy_of_django_and_its_sqlite_are_known(database, outbox, queue, tmp_path):
    from django.db import connection, connections, transaction

    user = Django(database.dsn).start()
    one, two, undone = make_task(), make_task(), make_task()
    with outbox.transaction(connection):
        outbox.put(one)
    connections.settings["lite"] = {"ENGINE": "django.db.backends.sqlite3", "NAME": tmp_path / "lite.db"}
    connections.configure_settings(connections.settings)
    lite = connections["lite"]
    with outbox.transaction(lite):
        outbox.put(two)
    until(lambda: waiting(queue) == {one.id, two.id})
    with transaction.atomic(using="lite"), outbox.transaction(lite):
        with contextlib.suppress(ZeroDivisionError), transaction.atomic(using="lite"):
            outbox.put(undone)
            raise ZeroDivisionError
    with outbox.once(lite, effect="e") as first:
        assert first
    assert (outbox.sweep(), waiting(queue)) == (0, {one.id, two.id})
    lite.close()
    user.stop()


@pytest.mark.parametrize("url", ["postgresql:///x?nonsense=1", "postgresql+nonsense:///x", "sqlite+aiosqlite://"])
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ConfigurationError, match="outbox"):
        opener_of(url)


def test_without_psycopg_a_url_is_opened_by_asyncpg(database, queue, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    _, opener = opener_of(database.dsn)
    assert opener.is_async
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(ConfigurationError, match="safedefer\\[postgres\\]"):
        opener_of(database.dsn)


# --- The relay ----------------------------------------------------------------------------------


PRODUCER = """
    import os, signal, sys, time
    import psycopg
    from safedefer.transactions.outbox import Outbox
    from safedefer.queues.memory.queue import MemoryQueue
    from tests.queues.contract import make_task

    class Never(MemoryQueue):
        def enqueue_many(self, tasks):
            os.kill(os.getpid(), signal.SIGKILL)

    queue = Never()
    outbox = Outbox(lambda: queue, environment="test", clock=time.time)
    with psycopg.connect(sys.argv[1]) as connection:
        connection.execute(sys.argv[2])
        with outbox.transaction(connection):
            outbox.put(make_task(id="dies-after-the-commit"))
        connection.commit()
        time.sleep(30)
"""


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg", "postgresql+asyncpg", "asyncpg"])
def test_what_a_process_that_died_has_left_is_relayed_once(database, queue, scheme, monkeypatch):
    database.sql("CREATE SCHEMA IF NOT EXISTS elsewhere; DROP TABLE IF EXISTS elsewhere.safedefer_outbox")
    # The producer's own search_path decides in which schema the outbox is.
    command = [sys.executable, "-c", textwrap.dedent(PRODUCER), database.dsn, "SET search_path TO elsewhere"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (process.returncode, process.stderr) == (-signal.SIGKILL, "")
    if scheme == "asyncpg":
        monkeypatch.setitem(sys.modules, "psycopg", None)
    url = database.dsn.replace("postgresql://", f"{scheme}://" if "+" in scheme else "postgresql://")
    outbox = Outbox(lambda: queue, environment="test", urls=[f"{url}&schema=elsewhere"], clock=time.time)
    outbox.start()
    until(lambda: waiting(queue) == {"dies-after-the-commit"})
    until(lambda: database.count("elsewhere.safedefer_outbox") == 0)
    outbox.close()


SHORT = """
    import asyncio, sys
    import asyncpg
    from safedefer import Policy
    from tests.sample_tasks import add
    from tests.unit.apps import make_app

    app = make_app(queue=f"sqlite:///{sys.argv[2]}")

    async def main():
        connection = await asyncpg.connect(sys.argv[1])
        async with app.transaction(connection):
            await app.options(transactional=True).defer_async(add, 1)
        await connection.close()

    asyncio.run(main())
    if sys.argv[3] == "close":
        app.close()
"""


@pytest.mark.parametrize("end", ["close", "exit"])
def test_a_short_program_leaves_nothing_behind(database, tmp_path, end):
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(SHORT), database.dsn, str(tmp_path / "q.db"), end]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    queue = SQLiteQueue(tmp_path / "q.db")
    assert len(queue.tasks()) == 1
    queue.close()
    assert database.count("safedefer_outbox") == 0


def test_what_was_committed_by_a_connection_that_was_closed_in_the_block_is_relayed(database, outbox, queue):
    connection, task = psycopg.connect(database.dsn), make_task()
    connection.execute("SELECT 1")
    with outbox.transaction(connection):
        outbox.put(task)
        connection.commit()
        connection.close()
    until(lambda: waiting(queue) == {task.id})


async def test_a_sweep_within_a_running_loop_opens_what_is_awaited_in_a_thread(database, outbox, queue, monkeypatch):
    task = make_task()
    monkeypatch.setattr(outbox._relay, "expect", lambda *given: None)
    connection = await asyncpg.connect(database.dsn)
    async with outbox.transaction(connection):
        await outbox.put_async(task)
    await connection.close()
    assert outbox.count() == 1
    assert (outbox.sweep(), waiting(queue)) == (1, {task.id})
    assert outbox.count() == 0


async def test_registries_of_sessions_give_the_session_of_this_context(database, outbox, queue):
    from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker, create_async_engine
    from sqlalchemy.orm import scoped_session, sessionmaker

    one, two = make_task(), make_task()
    engine = sqlalchemy.create_engine(database.dsn.replace("postgresql:", "postgresql+psycopg:"))
    sessions = scoped_session(sessionmaker(engine))
    with outbox.transaction(sessions):
        outbox.put(one)
    sessions.remove()
    engine.dispose()
    engine = create_async_engine(database.dsn.replace("postgresql:", "postgresql+asyncpg:"))
    sessions = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
    async with outbox.transaction(sessions):
        await outbox.put_async(two)
    await sessions.remove()
    await engine.dispose()
    until(lambda: waiting(queue) == {one.id, two.id})


def test_what_was_enqueued_and_not_deleted_is_not_enqueued_again(database, outbox, queue):
    waits, new = make_task(), make_task()
    queue.enqueue_many([waits])
    with psycopg.connect(database.dsn) as connection, outbox.transaction(connection):
        outbox.put(waits, new)
    until(lambda: waiting(queue) == {waits.id, new.id})
    until(lambda: database.count("safedefer_outbox") == 0)


def test_a_process_that_has_left_nothing_for_long_looks_less_often(outbox, monkeypatch):
    assert outbox._relay.longest_pause == 2.0
    monkeypatch.setattr("safedefer.transactions.relay._IDLE_AFTER", -1.0)
    outbox._relay.expect()
    assert outbox._relay.longest_pause == 30.0
    outbox.start()
    assert outbox._relay.longest_pause == 2.0


def test_a_pool_that_has_no_connection_left_is_not_waited_for(database, outbox, queue):
    engine = sqlalchemy.create_engine(
        database.dsn.replace("postgresql:", "postgresql+psycopg:"), pool_size=1, max_overflow=0, pool_timeout=60
    )
    with engine.connect() as connection:
        for _ in range(3):
            with outbox.transaction(connection):
                outbox.put(make_task())
    until(lambda: len(queue.tasks()) == 3)
    engine.dispose()


def test_two_relays_at_once_enqueue_every_task_once(database, queue):
    given = [make_task() for _ in range(250)]
    late = Outbox(lambda: queue, environment="test", clock=time.time)
    late._relay.expect = lambda: None
    with psycopg.connect(database.dsn) as connection, late.transaction(connection):
        late.put(*given)
    relays = [Outbox(lambda: queue, environment="test", urls=[database.dsn], clock=time.time) for _ in range(3)]
    moved = []
    threads = [threading.Thread(target=lambda relay=relay: moved.append(relay.sweep())) for relay in relays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sum(moved), waiting(queue)) == (250, {task.id for task in given})
    for relay in (late, *relays):
        relay.close()


def test_transactions_that_overlap_without_end_do_not_keep_the_relay_away(database, outbox, queue, monkeypatch):
    # After so long no transaction is waited for any more.
    monkeypatch.setattr("safedefer.transactions.relay._SWEEP_SECONDS", 600.0)
    stop, done = threading.Event(), []

    def busy():
        with psycopg.connect(database.dsn) as connection:
            while not stop.is_set():
                with connection.transaction():
                    with outbox.transaction(connection):
                        task = make_task()
                        outbox.put(task)
                    time.sleep(0.02)
                done.append(task.id)

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(done) > 10)
        seen = set(done)
        until(lambda: seen <= waiting(queue))
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_the_table_is_created_by_one_of_many_and_none_of_them_fails(database, outbox, queue):
    barrier, errors = threading.Barrier(8), []

    def work():
        try:
            with psycopg.connect(database.dsn) as connection:
                barrier.wait()
                with outbox.transaction(connection):
                    outbox.put(make_task())
                    time.sleep(0.005)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    until(lambda: len(queue.tasks()) == 8)


def test_a_database_is_the_same_by_every_driver_and_reopened(user, database):
    async def scenario():
        source = source_of(user.connection)
        assert source.identity == source_of(user.connection).identity
        return source.identity, source.reopen()

    identity, opener = user.run(scenario())

    async def look(source):
        return (await source.rows("SELECT current_database()"))[0][0]

    assert opener.use(look) in identity
