"""What a PostgreSQL queue does when its connections, its server or its neighbours fail it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import asyncpg
import psycopg
import pytest

from safedefer.errors import QueueUnavailable, TaskAlreadyExistsError
from safedefer.ledger import Admission
from safedefer.queues.base import Settlement, Verdict
from safedefer.queues.postgres import pools as postgres_pools
from safedefer.queues.postgres import producers as postgres_producers
from safedefer.queues.postgres import store as postgres_store
from safedefer.queues.postgres.migrations import migrate
from safedefer.queues.postgres.queue import PostgresQueue
from safedefer.queues.postgres.statements import SQL
from safedefer.queues.rates import QueueLimits
from tests.postgres.server import Server
from tests.queues.contract import DONE, execution_of, ids
from tests.queues.single import begin, settle
from tests.queues.test_postgres import ask, lease_now, task_now

OURS = "FROM pg_stat_activity WHERE application_name LIKE 'safedefer%%'"


@pytest.fixture(scope="module")
def server():
    server = Server(durable=True).start()
    migrate(server.dsn())
    yield server
    server.close()


@pytest.fixture
def dsn(server):
    ask(
        server.dsn(),
        "TRUNCATE safedefer.pgqueuer, safedefer.names, safedefer.ended, safedefer.dead, safedefer.ledger, safedefer.controls",
    )
    return server.dsn()


@pytest.fixture
def queue(dsn):
    queue = PostgresQueue(dsn)
    yield queue
    queue.close()


def wait_for_the_standby(dsn, connection):
    """Return once commits wait. The checkpointer says that they do, some time after a session shows the setting."""

    def commit():
        with psycopg.connect(dsn, application_name="probe", autocommit=True) as probe:
            for _ in range(3000):
                probe.execute("SELECT pg_logical_emit_message(true, 'probe', '')")
                time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        committing = pool.submit(commit)
        waiting = "FROM pg_stat_activity WHERE application_name = 'probe' AND wait_event = 'SyncRep'"
        while not connection.execute(f"SELECT pg_terminate_backend(pid) {waiting}").fetchall():
            assert not committing.done(), committing.result()
            time.sleep(0.01)
        assert isinstance(committing.exception(30.0), psycopg.OperationalError)


@contextlib.contextmanager
def broken_after_the_commit(dsn):
    """Commits wait for a standby that is not there, and their connections are ended: done, and never heard of."""
    over = threading.Event()

    def end(connection):
        ended = 0
        while not ended and not over.wait(0.01):
            ended += len(
                connection.execute(f"SELECT pg_terminate_backend(pid) {OURS} AND wait_event = 'SyncRep'").fetchall()
            )
        connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
        connection.execute("SELECT pg_reload_conf()")
        return ended

    with psycopg.connect(dsn, autocommit=True) as connection, ThreadPoolExecutor(1) as pool:
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        connection.execute("SELECT pg_reload_conf()")
        wait_for_the_standby(dsn, connection)
        ended = pool.submit(end, connection)
        try:
            yield
        finally:
            over.set()
            assert ended.result(30.0) == 1


# --- Answers that are lost ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 600])
def test_what_was_committed_and_never_answered_is_acknowledged_and_there_once(queue, dsn, count):
    tasks = [task_now(name="n"), *(task_now() for _ in range(count - 1))]
    queue.stats(now=0.0)
    with broken_after_the_commit(dsn):
        queue.enqueue_many(iter(tasks))
    assert queue.stats(now=0.0)[0].waiting == count


@contextlib.contextmanager
def broken_before_it_is_stored(dsn):
    """Whoever enqueues waits for a lock, and its connection is ended: nothing was stored, and nobody heard of that."""
    with (
        psycopg.connect(dsn) as locking,
        psycopg.connect(dsn, autocommit=True) as connection,
        ThreadPoolExecutor(1) as pool,
    ):
        locking.execute("LOCK TABLE safedefer.pgqueuer IN ACCESS EXCLUSIVE MODE")

        def end():
            for _ in range(3000):
                if connection.execute(
                    f"SELECT pg_terminate_backend(pid) {OURS} AND wait_event_type = 'Lock'"
                ).fetchall():
                    break
                time.sleep(0.01)
            locking.rollback()

        ended = pool.submit(end)
        try:
            yield
        finally:
            ended.result(60.0)


@pytest.mark.parametrize("count", [2, 100, 350])
@pytest.mark.parametrize("at", [0, -1])
def test_one_that_was_there_before_does_not_stand_for_those_that_were_never_stored(queue, dsn, count, at):
    known, tasks = task_now(), [task_now() for _ in range(count)]
    tasks[at] = known
    queue.enqueue_many([known])
    with broken_before_it_is_stored(dsn), pytest.raises(TaskAlreadyExistsError):
        queue.enqueue_many(iter(tasks))
    assert queue.stats(now=0.0)[0].waiting == 1


@pytest.mark.parametrize("ended", [True, False])
def test_what_was_never_answered_is_stored_also_if_some_of_it_has_ended_meanwhile(queue, dsn, ended):
    tasks = [task_now() for _ in range(3)]
    producers = queue._store.open().producers
    store = producers._store

    def unheard(connection, made):
        producers._store = store
        store(connection, made)
        for lease in lease_now(queue)[:2]:
            settlement = Settlement(verdict=Verdict.DONE if ended else Verdict.DEAD, charged=True)
            settle(queue, lease, settlement, now=time.time())
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    producers._store = unheard
    queue.enqueue_many(iter(tasks))
    assert [queue.find(task.id).state for task in tasks].count("running") == 1


def test_a_database_that_goes_while_it_is_asked_what_is_stored_leaves_it_in_doubt(queue, dsn, monkeypatch):
    producers, task = queue._store.open().producers, task_now()
    store = producers._store

    def unheard(connection, made):
        producers._store = store
        store(connection, made)
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    producers._store, producers._stored = unheard, b"SELECT 1 / 0"
    with pytest.raises(QueueUnavailable, match="whether the tasks were stored is not known"):
        queue.enqueue_many([task])


def test_a_run_whose_admission_was_never_answered_is_admitted_at_once(queue, dsn):
    run = execution_of(task_now())
    queue.stats(now=0.0)
    with broken_after_the_commit(dsn):
        assert begin(queue.ledger, run, now=0.0, lease=60.0) is Admission.RUN
    assert ask(dsn, "SELECT count(*) FROM safedefer.ledger WHERE state = 'running'") == [(1,)]


@pytest.mark.parametrize("changes", [{}, {"name": "n"}, {"unique_key": "u"}])
def test_a_try_that_is_still_being_committed_is_waited_for(queue, dsn, changes):
    """The connection breaks while the server still stores what came by it, as it may with a network between them."""
    producers, task = queue._store.open().producers, task_now(**changes)
    store, slow = producers._store, psycopg.connect(dsn)
    committing = threading.Timer(0.3, slow.commit)

    def first(connection, made):
        producers._store = store
        store(slow, made)
        committing.start()
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    producers._store = first
    queue.enqueue_many([task])
    committing.join()
    slow.close()
    assert ids(lease_now(queue)) == [task.id]


def test_an_answer_that_stays_lost_is_said_to_be_lost(queue, dsn, monkeypatch):
    monkeypatch.setattr(postgres_producers, "PATIENCE", 0.3)
    producers = queue._store.open().producers
    store = producers._store

    def unheard(connection, made):
        store(connection, made)
        producers._connect = refuse
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    def refuse():
        raise psycopg.OperationalError("connection refused")

    producers._store = unheard
    with pytest.raises(QueueUnavailable, match="whether the tasks were stored is not known"):
        queue.enqueue_many([task_now()])


def test_a_database_error_of_whoever_makes_the_tasks_is_theirs(queue):
    def tasks():
        for _ in range(600):
            yield task_now()
        raise psycopg.OperationalError("not of this database")

    with pytest.raises(psycopg.OperationalError, match="not of this database"):
        queue.enqueue_many(tasks())
    assert list(queue.stats(now=0.0)) == []


# --- Connections ----------------------------------------------------------------------------------


def test_connections_that_end_at_any_moment_are_an_unavailable_queue_and_nothing_else(queue, dsn):
    over, errors, done = threading.Event(), [], []

    def work():
        while not over.is_set():
            try:
                done.append(begin(queue.ledger, execution_of(task_now()), now=0.0, lease=60.0))
            except QueueUnavailable:
                continue
            except BaseException as error:
                errors.append(error)

    with ThreadPoolExecutor(6) as pool, psycopg.connect(dsn, autocommit=True) as connection:
        for _ in range(6):
            pool.submit(work)
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            connection.execute(f"SELECT pg_terminate_backend(pid) {OURS}")
            time.sleep(0.01)
        over.set()
    assert errors == []
    deadline = time.monotonic() + 60.0
    while True:  # a connection may still be about to end
        try:
            assert begin(queue.ledger, execution_of(task_now()), now=0.0, lease=60.0) is Admission.RUN
        except QueueUnavailable:
            assert time.monotonic() < deadline
        else:
            break


def test_producers_are_back_as_soon_as_the_server_is(server, queue, monkeypatch):
    monkeypatch.setattr(postgres_producers, "PATIENCE", 1.0)
    queue.enqueue_many([task_now()])
    server.stop(immediate=True)
    for _ in range(2):
        with pytest.raises(QueueUnavailable):
            queue.enqueue_many([task_now()])
    server.start()
    monkeypatch.setattr(postgres_producers, "PATIENCE", 60.0)
    began = time.monotonic()
    queue.enqueue_many([task_now()])
    assert time.monotonic() - began < 50.0


def test_a_restart_within_its_patience_is_nothing_to_a_producer(server, queue, monkeypatch):
    monkeypatch.setattr(postgres_producers, "PATIENCE", 60.0)
    queue.enqueue_many([task_now()])
    server.stop(immediate=True)
    with ThreadPoolExecutor(1) as pool:
        enqueued = pool.submit(queue.enqueue_many, [task_now()])
        time.sleep(0.5)
        server.start()
        enqueued.result(60.0)
    assert queue.stats(now=0.0)[0].waiting == 2


@pytest.mark.parametrize("call", ["enqueue_many", "marker"])
def test_a_restart_within_its_patience_is_nothing_to_the_first_call_of_a_producer(call, server, dsn, monkeypatch):
    monkeypatch.setattr(postgres_producers, "PATIENCE", 60.0)
    queue = PostgresQueue(dsn)
    calls = {"enqueue_many": lambda: queue.enqueue_many([task_now()]), "marker": lambda: queue.marker}
    server.stop(immediate=True)
    with ThreadPoolExecutor(1) as pool:
        began = pool.submit(calls[call])
        time.sleep(0.5)
        server.start()
        began.result(60.0)
    assert queue.marker
    queue.close()


def test_a_server_that_stays_away_ends_the_patience_of_the_first_call(monkeypatch):
    monkeypatch.setattr(postgres_producers, "PATIENCE", 0.5)
    queue = PostgresQueue("postgresql://postgres@127.0.0.1:1/nothing")
    began = time.monotonic()
    with pytest.raises(QueueUnavailable):
        queue.enqueue_many([task_now()])
    assert 0.5 <= time.monotonic() - began < 50.0
    monkeypatch.setattr(postgres_producers, "PATIENCE", 60.0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(queue.enqueue_many, [task_now()])
        time.sleep(0.3)
        queue.close()  # ends the wait
        with pytest.raises(QueueUnavailable, match="closed"):
            waiting.result(50.0)


def test_a_server_without_free_connections_is_unavailable_until_there_are_some(queue, dsn, monkeypatch):
    monkeypatch.setattr(postgres_producers, "PATIENCE", 0.3)
    with contextlib.ExitStack() as taken:
        with pytest.raises(psycopg.OperationalError):
            while True:
                taken.enter_context(psycopg.connect(dsn))
        with pytest.raises(QueueUnavailable):
            queue.enqueue_many([task_now()])
        with pytest.raises(QueueUnavailable):
            lease_now(queue)
    deadline = time.monotonic() + 30.0
    while True:  # the server takes a moment to notice who has gone
        try:
            queue.enqueue_many([task_now()])
        except QueueUnavailable:
            assert time.monotonic() < deadline
        else:
            break
    assert len(lease_now(queue)) == 1


def test_many_threads_share_few_connections(dsn):
    queue = PostgresQueue(dsn, producers=2)
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda _: queue.enqueue_many([task_now()]), range(200)))
    assert queue.stats(now=0.0)[0].waiting == 200
    assert ask(
        dsn,
        "SELECT count(*) <= 2 FROM pg_stat_activity WHERE application_name = 'safedefer' AND query ILIKE '%%insert%%'",
    )
    assert queue._store.open().producers._open <= 2
    queue.close()


def test_who_gets_no_connection_in_time_is_told_so(dsn, monkeypatch):
    monkeypatch.setattr(postgres_producers, "PATIENCE", 0.2)
    queue = PostgresQueue(dsn, producers=1)
    producers = queue._store.open().producers
    connection = producers._take(time.monotonic() + 5.0)
    with pytest.raises(QueueUnavailable, match="other threads have all 1 connections"):
        queue.enqueue_many([task_now()])
    producers._give(connection)
    queue.enqueue_many([task_now()])
    queue.close()
    with pytest.raises(QueueUnavailable, match="closed"):
        producers._take(time.monotonic() + 5.0)


def test_a_connection_that_nobody_has_needed_for_long_is_closed(queue, monkeypatch):
    producers = queue._store.open().producers
    first, second = (producers._take(time.monotonic() + 5.0) for _ in range(2))
    producers._give(first)
    monkeypatch.setattr(postgres_producers, "_IDLE_SECONDS", 0.0)
    producers._give(second)
    assert first.closed
    assert producers._open == 1


def test_threads_that_connect_first_at_once_wait_for_one_attempt(monkeypatch):
    monkeypatch.setattr(postgres_pools, "CONNECT_SECONDS", 1)
    monkeypatch.setattr(postgres_store, "CONNECT_SECONDS", 1)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(100)
        queue = PostgresQueue(f"postgresql://postgres@127.0.0.1:{deaf.getsockname()[1]}/nothing")

        def ask_for():
            with pytest.raises(QueueUnavailable):
                queue.stats(now=0.0)

        began = time.monotonic()
        with ThreadPoolExecutor(60) as pool:
            for asked in [pool.submit(ask_for) for _ in range(60)]:
                asked.result(120.0)
        assert time.monotonic() - began < 45.0  # one after the other they would take 60
        queue.close()


# --- Neighbours -----------------------------------------------------------------------------------


def test_a_machine_that_stands_still_within_a_transaction_keeps_nobody_waiting(dsn, monkeypatch):
    settings = {**postgres_pools._MISSED, "idle_in_transaction_session_timeout": "500ms"}
    monkeypatch.setattr(postgres_pools, "_MISSED", settings)
    still, other = PostgresQueue(dsn), PostgresQueue(dsn)
    other.enqueue_many([task_now()])
    other.configure([QueueLimits(queue="default", max_concurrent=5)], now=0.0)
    held, leased = threading.Event(), threading.Event()

    async def stand_still(connection):
        await connection.fetch("SELECT FROM safedefer.controls FOR UPDATE")
        held.set()
        stood_until_leased.append(await asyncio.to_thread(leased.wait, 30.0))
        await connection.fetch("SELECT 1")

    stood_until_leased = []
    with ThreadPoolExecutor(1) as pool:
        standing = pool.submit(still._store.run, stand_still, transaction=True)
        assert held.wait(30.0)
        assert len(lease_now(other)) == 1
        leased.set()
        with pytest.raises(QueueUnavailable):
            standing.result(30.0)
    assert stood_until_leased == [True]
    still.close()
    other.close()


# --- Leases and wake-ups --------------------------------------------------------------------------


def test_what_was_leased_is_leased_although_nothing_can_be_pruned(queue, monkeypatch):
    monkeypatch.setitem(SQL, "names_prune", "SELECT 1 / 0, $1::float, $2::integer")
    with pytest.raises(QueueUnavailable):
        queue.prune(now=0.0)
    task = task_now()
    queue.enqueue_many([task])
    assert ids(lease_now(queue)) == [task.id]


def test_a_settlement_that_is_made_twice_changes_nothing_the_second_time(queue):
    queue.enqueue_many([task_now()])
    (lease,) = lease_now(queue)
    assert list(queue.settle_many([(lease, DONE)], now=0.0)) == [True]
    assert list(queue.settle_many([(lease, DONE)], now=0.0)) == [False]


@pytest.mark.parametrize("error", [ValueError("odd"), asyncpg.InternalClientError("odd"), OSError("odd")])
def test_whatever_ends_the_connection_that_listens_it_is_made_anew(queue, error):
    listener, calls = queue._store.open().listener, []
    listen = listener._listen_once

    async def fail_first():
        calls.append(1)
        if len(calls) < 3:
            raise error
        await listen()

    listener._listen_once = fail_first
    lease_now(queue)
    deadline = time.monotonic() + 30.0
    while len(calls) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert queue.wait(30.0) is True  # what came meanwhile nobody has heard
    while queue.wait(0.2):
        pass
    other = PostgresQueue(queue._dsn)
    other.enqueue_many([task_now()])
    assert queue.wait(30.0) is True
    other.close()


# --- Closing --------------------------------------------------------------------------------------


def test_closing_keeps_nobody_waiting(dsn, monkeypatch):
    monkeypatch.setattr(postgres_pools, "CONNECT_SECONDS", 2)
    monkeypatch.setattr(postgres_store, "CONNECT_SECONDS", 2)
    queue = PostgresQueue(dsn, workers=1)
    connections = queue._store.open()

    def sleep():
        with pytest.raises(QueueUnavailable):
            queue._store.run(lambda connection: connection.fetch("SELECT pg_sleep(30)"))

    with ThreadPoolExecutor(3) as pool:
        asleep = [pool.submit(sleep) for _ in range(3)]
        time.sleep(0.5)
        queue.close()
        for one in asleep:
            one.result(29.0)  # before the statement would end by itself
    with pytest.raises(QueueUnavailable, match="closed"):
        connections.run(lambda connection: connection.fetch("SELECT 1"), purpose="durable", transaction=False)


class Freezing:
    """A server between the queue and PostgreSQL that passes the login on, and stands still at the first statement."""

    def __init__(self, dsn):
        self._place = f"{psycopg.conninfo.conninfo_to_dict(dsn)['host']}/.s.PGSQL.5432"
        self._serving = []

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"postgresql://postgres@127.0.0.1:{self._server.sockets[0].getsockname()[1]}/postgres"

    async def __aexit__(self, *_exception):
        self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving)

    async def _serve(self, reader, writer):
        self._serving.append(asyncio.current_task())
        answers, statements = await asyncio.open_unix_connection(self._place)

        async def ask():
            while data := await reader.read(65536):
                if data[:1] in (b"Q", b"P"):
                    await asyncio.Event().wait()
                statements.write(data)

        async def answer():
            while data := await answers.read(65536):
                writer.write(data)

        try:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(ask(), answer())
        finally:
            statements.transport.abort()
            writer.transport.abort()


def test_a_server_that_stands_still_after_the_login_holds_nobody_longer_than_a_connection_may_take(dsn, monkeypatch):
    """asyncpg would close the connection politely, and wait for the server once more: as long as a statement may take, or for ever."""
    monkeypatch.setattr(postgres_pools, "CONNECT_SECONDS", 1.0)
    monkeypatch.setattr(postgres_pools, "_STATEMENT_SECONDS", 3600.0)

    async def ask_once():
        async with Freezing(dsn) as url:
            pools = postgres_pools.Pools(url, 1)
            with pytest.raises(QueueUnavailable):
                await pools.run(lambda connection: connection.fetchval("SELECT 1"), purpose="durable")

    asyncio.run(asyncio.wait_for(ask_once(), 300.0))


def test_without_room_for_a_thread_the_queue_says_so_and_serves_later(server, monkeypatch):
    def no_room(work):
        raise RuntimeError("can't start new thread")  # CPython's words

    with contextlib.closing(PostgresQueue(server.dsn())) as queue:
        with monkeypatch.context() as patched:
            patched.setattr(postgres_store, "PlainThread", no_room)
            with pytest.raises(QueueUnavailable, match="allow the process more threads"):
                queue.stats(now=time.time())
        queue.enqueue_many([task_now()])


FULL = """
CREATE FUNCTION safedefer.no_room() RETURNS trigger LANGUAGE plpgsql
    AS $$ BEGIN RAISE EXCEPTION 'No space left on device' USING ERRCODE = 'disk_full'; END $$;
CREATE TRIGGER no_room BEFORE INSERT ON safedefer.notices EXECUTE FUNCTION safedefer.no_room();
"""


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        pytest.param(FULL, "DROP FUNCTION safedefer.no_room CASCADE", "its disk is full; free some space", id="full"),
        pytest.param(
            "ALTER ROLE postgres SET default_transaction_read_only = on",
            "ALTER ROLE postgres SET default_transaction_read_only = off",
            "it takes no writes; name the primary",
            id="read-only",
        ),
    ],
)
def test_a_server_that_takes_no_writes_is_said_with_its_cause(dsn, before, after, says):
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(before)
        queue = PostgresQueue(dsn)
        try:
            with pytest.raises(QueueUnavailable, match=says):
                queue.put_notice("run 7 on web-1", "{}", now=time.time())
        finally:
            queue.close()
            connection.execute(after)
