from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from uuid import uuid4

import asyncpg
import psycopg
import pytest

from safedefer.dispatcher.loop import Dispatcher
from safedefer.dispatcher.transport import InProcessDelivery
from safedefer.errors import ConfigurationError, QueueUnavailable, TaskAlreadyExistsError
from safedefer.ledger import Admission, EndState
from safedefer.queues.base import AlreadyWaiting, DeadFilter, Settlement, TaskState, Verdict, task_digest
from safedefer.queues.postgres.leasing import manager_of
from safedefer.queues.postgres.migrations import MIGRATIONS, _queries, migrate
from safedefer.queues.postgres.pgqueuer import STATEMENTS, untested
from safedefer.queues.postgres.queue import PostgresQueue
from safedefer.queues.postgres.statements import SQL, joined, to_json
from safedefer.queues.rates import QueueLimits
from tests import sample_tasks
from tests.postgres.server import Server, fresh_database, shared_server
from tests.queues.clocked import CLOCK, CLOCKED_PATH, TABLES, Clocked
from tests.queues.contract import (
    DEAD,
    DONE,
    QUEUE_OPTIONS,
    QueueContract,
    execution_of,
    ids,
    make_task,
    oversize_task,
    record_of,
    rests,
)
from tests.queues.single import begin, finish, settle
from tests.unit.apps import JOSE, handle, make_app, until


@pytest.fixture(scope="session")
def server():
    return shared_server()


@pytest.fixture(scope="module")
def clocked_dsn(server):
    with fresh_database(server) as name:
        migrate(server.dsn(name))
        with psycopg.connect(server.dsn(name), autocommit=True) as connection:
            connection.execute(CLOCK)
        yield server.dsn(name)


class TestPostgresQueue(QueueContract):
    @pytest.fixture
    def queue(self, clocked_dsn, monkeypatch):
        monkeypatch.setattr("safedefer.queues.postgres.errors.SEARCH_PATH", CLOCKED_PATH)
        queue = Clocked(PostgresQueue(clocked_dsn, **QUEUE_OPTIONS), clocked_dsn)
        yield queue
        queue.close()
        with psycopg.connect(clocked_dsn, autocommit=True) as connection:
            # Whatever a test of the contract did, no blob, unique key or counter is left without its task.
            jobs = "SELECT dedupe_key FROM safedefer.pgqueuer WHERE status IN ('queued', 'picked')"
            for table in ("blobs", "uniques"):
                left = f"SELECT count(*) FROM safedefer.{table} WHERE task_id NOT IN ({jobs})"
                assert connection.execute(left).fetchone() == (0,), table
            left = "SELECT count(*) FROM safedefer.progress WHERE job_id NOT IN (SELECT id FROM safedefer.pgqueuer)"
            assert connection.execute(left).fetchone() == (0,)
            total = "SELECT coalesce(sum(bytes), 0) - (SELECT coalesce(sum(length), 0) FROM safedefer.blobs) FROM safedefer.blob_totals"
            assert connection.execute(total).fetchone() == (0,)
            connection.execute("TRUNCATE " + ", ".join(f"safedefer.{table}" for table in TABLES))


# --- A database of its own, by the real clock -----------------------------------------------------


@pytest.fixture
def dsn(server):
    with fresh_database(server) as name:
        yield server.dsn(name)


@pytest.fixture(scope="module")
def migrated(server):
    with fresh_database(server) as name:
        migrate(server.dsn(name))
        yield name


@pytest.fixture
def real_dsn(server, migrated):
    with fresh_database(server, template=migrated) as name:
        yield server.dsn(name)


@pytest.fixture
def queue(real_dsn):
    queue = PostgresQueue(real_dsn)
    yield queue
    queue.close()


def task_now(**changes):
    now = time.time()
    return make_task(**{"eta": now, "created": now, "expires": int(now) + 10_000, **changes})


def lease_now(queue, **more):
    return list(queue.lease(owner="dispatcher", limit=100, seconds=60.0, now=time.time(), **more))


def ask(dsn, statement, *values):
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(statement, values)
        return cursor.fetchall() if cursor.description else None


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, **environment},
    ).stdout.strip()  # fmt: skip


# --- Migrations -----------------------------------------------------------------------------------


def test_a_database_without_tables_is_told_from_one_that_does_not_answer(server, dsn):
    queue = PostgresQueue(dsn)
    with pytest.raises(ConfigurationError, match="run `safedefer migrate`"):
        queue.enqueue_many([task_now()])
    with pytest.raises(ConfigurationError, match="run `safedefer migrate`"):
        queue.lease(owner="d", limit=1, seconds=60.0, now=0.0)
    assert migrate(dsn)
    queue.enqueue_many([task_now()])
    assert len(lease_now(queue)) == 1
    queue.close()
    nowhere = PostgresQueue("postgresql://postgres:secret@127.0.0.1:1/nothing")
    with pytest.raises(QueueUnavailable, match="see that it runs") as caught:
        nowhere.enqueue_many([task_now()])
    assert "secret" not in str(caught.value) + repr(nowhere)
    nowhere.close()


def test_migrating_again_does_nothing_and_at_once_does_it_once(dsn):
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(migrate, [dsn] * 4))
    assert sorted(map(len, done)) == [0, 0, 0, 1 + len(MIGRATIONS)]
    assert migrate(dsn) == []


def test_the_clock_of_the_database_is_read(dsn):
    migrate(dsn)
    with contextlib.closing(PostgresQueue(dsn)) as queue:
        assert abs(queue.clock() - time.time()) < 60


def test_a_run_that_an_older_version_knew_begins_again_as_before(real_dsn):
    for column in ("not_before", "attempts", "losses", "first_loss"):
        ask(real_dsn, f"ALTER TABLE safedefer.ledger DROP COLUMN {column}")
    ask(real_dsn, "DROP TABLE safedefer.kept, safedefer.copies")
    ask(real_dsn, "UPDATE safedefer.settings SET version = 1")
    task = task_now()
    entry = (task.audience, task.id, task_digest(task), task.expires)
    insert = "INSERT INTO safedefer.ledger (audience, task_id, digest, state, expires, uncharged) VALUES (%s, %s, %s, 'retry', %s, false)"
    ask(real_dsn, insert, *entry)
    with contextlib.closing(PostgresQueue(real_dsn)) as queue, pytest.raises(ConfigurationError, match="of an older"):
        queue.enqueue_many([task])
    ask(real_dsn, "DROP TABLE safedefer.notices; DROP INDEX safedefer.attempts_ended")
    assert migrate(real_dsn) == [f"safedefer: migration_{step}" for step in (2, 3, 4, 5)]
    old = task_now()
    ask(real_dsn, insert, old.audience, old.id, task_digest(old), old.expires)  # a process that is connected goes on
    with contextlib.closing(PostgresQueue(real_dsn)) as queue:
        queue.enqueue_many([task])
        assert len(lease_now(queue)) == 1
        for known in (task, old):
            assert begin(queue.ledger, execution_of(known), now=0.0, lease=30.0) is Admission.RUN


def test_an_index_that_ignores_the_queue_does_not_tempt_the_planner(dsn):
    migrate(dsn)
    indexes = [name for (name,) in ask(dsn, "SELECT indexname FROM pg_indexes WHERE tablename = 'pgqueuer'")]
    assert "pgqueuer_ep_prio_id_idx" in indexes
    assert "pgqueuer_priority_id_id1_idx" not in indexes
    ask(dsn, "UPDATE safedefer.settings SET pgqueuer = '1.6.0-before'")  # another release with the same tables
    with contextlib.closing(PostgresQueue(dsn)) as queue:
        queue.enqueue_many([task_now()])
    assert migrate(dsn) == []


def test_a_newer_schema_is_refused(real_dsn):
    ask(real_dsn, "UPDATE safedefer.settings SET version = 99")
    queue = PostgresQueue(real_dsn)
    with pytest.raises(ConfigurationError, match="version 99.*upgrade safedefer"):
        queue.enqueue_many([task_now()])
    queue.close()


def test_tables_of_another_pgqueuer_are_migrated_first(real_dsn):
    ask(real_dsn, "UPDATE safedefer.settings SET pgqueuer = '1.0.0'")
    queue = PostgresQueue(real_dsn)
    queue.enqueue_many([task_now()])  # nothing in them differs
    queue.close()
    ask(real_dsn, "DROP INDEX safedefer.pgqueuer_picked_slot_idx")
    queue = PostgresQueue(real_dsn)
    with pytest.raises(ConfigurationError, match="pgqueuer 1.0.0; run `safedefer migrate`"):
        queue.enqueue_many([task_now()])
    assert any("pgqueuer_picked_slot_idx" in step for step in migrate(real_dsn))
    queue.enqueue_many([task_now()])
    queue.close()


def test_the_environment_of_the_users_own_pgqueuer_changes_no_name(real_dsn):
    code = f"""
from safedefer.queues.postgres.queue import PostgresQueue
from tests.queues.test_postgres import task_now
queue = PostgresQueue({real_dsn!r})
queue.enqueue_many([task_now()])
queue.close()
"""
    run_python(code, PGQUEUER_PREFIX="mine_", PGQUEUER_SCHEMA="mine", PGQUEUER_QUEUE_TABLE="theirs", QUEUE_TABLE="jobs")
    assert ask(real_dsn, "SELECT count(*) FROM safedefer.pgqueuer") == [(1,)]


def test_the_command_migrates(dsn):
    code = "from safedefer.cli import main; main(['migrate'])"
    assert "safedefer: migration_1" in run_python(code, SAFEDEFER_QUEUE=dsn)
    assert run_python(code, SAFEDEFER_QUEUE=dsn) == "nothing to do"


# --- Clocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_the_eta_is_by_the_databases_clock(queue, real_dsn, skew):
    now = time.time() + skew
    later, due = task_now(created=now, eta=now + 4.5), task_now(created=now, eta=now)
    queue.enqueue_many([later, due])
    assert ids(lease_now(queue)) == [due.id]
    # The time passes here, and not for the test.
    ask(real_dsn, "UPDATE safedefer.pgqueuer SET execute_after = execute_after - interval '4.6 seconds'")
    assert ids(lease_now(queue)) == [later.id]


# --- Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["COMMIT", "ROLLBACK"])
def test_a_rival_for_a_name_waits_for_the_first_transaction(queue, real_dsn, how):
    first, second = task_now(name="n"), task_now(name="n")
    with psycopg.connect(real_dsn, autocommit=True) as connection, ThreadPoolExecutor(1) as pool:
        connection.execute("BEGIN")
        for statement, values in queue.enqueue_statements([first]):
            psycopg.RawCursor(connection).execute(statement.encode(), values)
        rival = pool.submit(queue.enqueue_many, [second])
        time.sleep(0.3)
        assert not rival.done()
        connection.execute(how)
        if how == "COMMIT":
            with pytest.raises(TaskAlreadyExistsError, match="choose another name"):
                rival.result(30.0)
        else:
            rival.result(30.0)
    assert ids(lease_now(queue)) == [first.id if how == "COMMIT" else second.id]


def test_two_batches_with_the_same_names_in_other_orders_do_not_lock_each_other_out(queue):
    names = [f"n{number}" for number in range(50)]

    def give(order):
        try:
            queue.enqueue_many([task_now(name=name) for name in order])
        except TaskAlreadyExistsError:
            return 0
        return 1

    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            given = list(pool.map(give, [names, names[::-1]]))
            assert sum(given) == 1
            for lease in lease_now(queue):
                settle(queue, lease, DONE, now=0.0)
            ask(queue._dsn, "TRUNCATE safedefer.names")


# --- Processes ------------------------------------------------------------------------------------


def test_a_task_of_another_process_ends_a_wait_at_once(queue, real_dsn):
    code = f"""
import sys, time
from safedefer.queues.postgres.queue import PostgresQueue
from tests.queues.test_postgres import task_now
queue = PostgresQueue({real_dsn!r})
queue.stats(now=0.0)
print("ready", flush=True)
sys.stdin.readline()
started = time.time()
queue.enqueue_many([task_now()])
print(started)
queue.close()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "ready\n"
        lease_now(queue)
        assert rests(queue, 0.3)
        other.stdin.write("\n")
        other.stdin.flush()
        assert queue.wait(60.0) is True
        woken = time.time()
        assert woken - float(other.stdout.readline()) < 20.0
    assert len(lease_now(queue)) == 1


def test_a_fork_leaves_the_parents_connections_alone(queue):
    queue.enqueue_many([task_now()])
    (lease,) = lease_now(queue)
    of_child, of_parent = task_now(name="from-the-child"), task_now()
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            queue.enqueue_many([of_child])
            assert [view.name for view in queue.tasks(states=[TaskState.WAITING])] == ["from-the-child"]
            queue.close()
            status = 0
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    settle(queue, lease, DONE, now=time.time())
    assert [lease.task.name for lease in lease_now(queue)] == ["from-the-child"]
    queue.enqueue_many([of_parent])
    assert len(lease_now(queue)) == 1


def test_the_queue_goes_on_when_the_server_was_restarted():
    server = Server().start()
    try:
        migrate(server.dsn())
        queue = PostgresQueue(server.dsn())
        queue.enqueue_many([task_now() for _ in range(3)])
        first, second, _third = lease_now(queue)
        settle(queue, first, DONE, now=time.time())
        server.stop()
        with pytest.raises(QueueUnavailable, match="see that it runs"):
            queue.enqueue_many([task_now()])
        with pytest.raises(QueueUnavailable):
            lease_now(queue)
        server.start()
        queue.enqueue_many([task_now()])
        settle(queue, second, DONE, now=time.time())
        assert len(lease_now(queue)) == 1
        server.restart()
        # Pooled connections that the restart has broken cost a producer nothing.
        queue.enqueue_many([task_now()])
        deadline = time.monotonic() + 60.0
        while not queue.wait(1.0):
            assert time.monotonic() < deadline
        queue.close()
    finally:
        server.close()


@pytest.mark.parametrize("count", [1, 1000])
def test_a_try_that_was_committed_unheard_is_not_made_twice(queue, count):
    """The connection breaks between the commit and its answer: the second try finds its own tasks."""
    producers, calls = queue._store.open().producers, []
    store = producers._store

    def unheard(connection, made):
        done = store(connection, made)
        calls.append(made)
        if len(calls) == 1:
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        return done

    producers._store = unheard
    tasks = [task_now(name="n"), *(task_now() for _ in range(count - 1))]
    queue.enqueue_many(iter(tasks))
    assert queue.stats(now=0.0)[0].waiting == count
    with pytest.raises(TaskAlreadyExistsError):
        queue.enqueue_many([task_now(name="n")])


def test_a_stream_whose_connection_breaks_is_stored_whole(queue, real_dsn):
    def tasks():
        for number in range(1000):
            if number == 700:
                ask(
                    real_dsn,
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'safedefer'",
                )
            yield task_now()

    queue.enqueue_many(tasks())
    assert queue.stats(now=0.0)[0].waiting == 1000


@pytest.mark.parametrize("stop", [0, 100, 900])
def test_a_stream_that_fails_is_stored_not_at_all(queue, stop):
    def tasks():
        for _ in range(stop):
            yield task_now()
        raise LookupError("no more")

    with pytest.raises(LookupError):
        queue.enqueue_many(tasks())
    with pytest.raises(TaskAlreadyExistsError):
        queue.enqueue_many([*(task_now() for _ in range(stop)), task_now(name="n"), task_now(name="n")])
    assert list(queue.stats(now=0.0)) == []


def test_a_batch_is_signed_while_it_is_stored(real_dsn):
    app = make_app(queue=real_dsn)
    tasks = app.defer_many([(sample_tasks.add, (n, n), {}) for n in range(800)])
    assert len({task.id for task in tasks}) == 800
    assert all(task.was_enqueued for task in tasks)
    with pytest.raises(TypeError, match="does not take these arguments"):
        app.defer_many([*[(sample_tasks.add, (1, 2), {})] * 700, (sample_tasks.add, (), {})])
    assert app.queue.stats(now=0.0)[0].waiting == 800
    app.close()


# --- What others see, and what they may have written ----------------------------------------------


def read_with_pgqueuer(dsn, what):
    async def read():
        connection = await asyncpg.connect(dsn)
        try:
            return await what(_queries(connection))
        finally:
            await connection.close()

    return asyncio.run(read())


def test_pgqueuers_own_tools_read_our_jobs(queue, real_dsn):
    queue.enqueue_many([task_now(name=f"n{n}", headers={"a": "b"}) for n in range(4)])
    first, second, third, _ = lease_now(queue)
    settle(queue, first, DONE, now=time.time())
    settle(queue, second, DEAD, now=time.time())
    settle(queue, third, Settlement(verdict=Verdict.RETRY, at=time.time() + 50), now=time.time())

    async def look(queries):
        return (
            {(row.entrypoint, row.status): row.count for row in await queries.queue_size()},
            [(job.entrypoint, job.payload) for job in await queries.list_failed_jobs()],
            {row.status: row.count for row in await queries.log_statistics(None)},
            [job.headers for job in await queries.browse_queue()],
        )

    sizes, failed, statistics, headers = read_with_pgqueuer(real_dsn, look)
    assert sizes == {("default", "failed"): 1, ("default@later", "queued"): 1, ("default", "picked"): 1}
    assert failed == [("default", second.task.token)]
    assert statistics["successful"] == 1
    assert statistics["failed"] == 1
    assert all("send_receipt" in header["safedefer"] for header in headers)


def test_a_dead_letter_that_pgqueuers_dashboard_requeues_is_a_dead_letter_again(queue, real_dsn):
    task = task_now()
    queue.enqueue_many([task])
    (lease,) = lease_now(queue)
    settle(queue, lease, DEAD, now=time.time())
    job = ask(real_dsn, "SELECT id FROM safedefer.pgqueuer")[0][0]
    read_with_pgqueuer(real_dsn, lambda queries: queries.requeue_jobs([job]))
    (again,) = lease_now(queue)
    assert begin(queue.ledger, execution_of(task), now=time.time(), lease=60.0) is Admission.DUPLICATE
    settle(queue, again, Settlement(verdict=Verdict.DONE, charged=False), now=time.time())
    view = queue.find(task.id)
    assert (view.state, view.reason, view.token) == (TaskState.DEAD, "permanent-task-failure", task.token)
    assert queue.drop_dead([task.id]) == 1
    assert ask(real_dsn, "SELECT count(*) FROM safedefer.pgqueuer") == [(0,)]


@pytest.mark.parametrize("headers", [
    "null", '"text"', "[]", "7", '{"safedefer": null}', '{"safedefer": ""}', '{"safedefer": "x y z"}',
    '{"safedefer": "nan inf 99999999999999999999 %%% a b"}', '{"safedefer": "1 1 1 - a:b"}',
    '{"safedefer": "1e300 -1e300 -1 A a:b:c:d e"}',
    '{"safedefer": "1 1 1 - a:b:c:d e", "safedefer_more": []}',
    '{"safedefer": "1 1 1 - a:b:c:d e", "safedefer_more": {"name": 5, "headers": 7, "retry_options": "x", "blob_id": {}}}',
    '{"safedefer": "1 1 1 - a:b:c:d e", "safedefer_more": {"name": "other", "unique_key": "u", "blob_id": "b"}}',
])  # fmt: skip
def test_a_job_whose_hints_were_changed_ends_with_its_bytes_and_its_neighbours_run(queue, real_dsn, headers):
    poisoned, neighbour = task_now(), task_now()
    queue.enqueue_many([poisoned, neighbour])
    ask(real_dsn, "UPDATE safedefer.pgqueuer SET headers = %s WHERE dedupe_key = %s", headers, poisoned.id)
    leases = lease_now(queue)
    assert [lease.task.token for lease in leases] == [poisoned.token, neighbour.token]
    assert list(queue.settle_many([(leases[0], DEAD), (leases[1], DONE)], now=time.time())) == [True, True]
    assert queue.find(poisoned.id).token == poisoned.token
    assert queue.find(neighbour.id).state is TaskState.SUCCEEDED


@pytest.mark.parametrize("change", [
    "payload = NULL", "payload = ''", "dedupe_key = NULL", "dedupe_key = 'another'", "priority = 2147483647",
    "attempts = 2147483647", "entrypoint = 'mail'", "headers = NULL",
])  # fmt: skip
def test_a_job_whose_columns_were_changed_keeps_no_neighbour_from_running(queue, real_dsn, change):
    poisoned, neighbour = task_now(), task_now()
    queue.enqueue_many([poisoned, neighbour])
    ask(real_dsn, f"UPDATE safedefer.pgqueuer SET {change} WHERE dedupe_key = %s", poisoned.id)
    leases = lease_now(queue)
    assert neighbour.token in [lease.task.token for lease in leases]
    assert all(queue.settle_many([(lease, DEAD) for lease in leases], now=time.time()))
    assert ask(real_dsn, "SELECT count(*) FROM safedefer.pgqueuer WHERE status <> 'failed'") == [(0,)]
    assert len(queue.dead_letters(DeadFilter())) == len(leases)


def test_a_queue_of_our_own_runs_the_calls_that_were_deferred(real_dsn):
    async def work():
        app = make_app(queue=real_dsn)
        app.defer(sample_tasks.add, 1, 2)
        app.defer_many([(sample_tasks.add, (n, n), {}) for n in range(20)])
        app.defer(sample_tasks.add, "x" * 20_000, "y")
        dead = app.defer(sample_tasks.permanent)
        dispatcher = Dispatcher(app.queue, InProcessDelivery(app.handle), clock=time.time)
        await dispatcher.run_until_empty()
        assert {view.state for view in app.queue.tasks(states=list(TaskState))} == {TaskState.SUCCEEDED, TaskState.DEAD}
        assert len(app.queue.tasks(states=[TaskState.SUCCEEDED])) == 22
        view = app.queue.find(dead.id)
        assert (view.reason, [record.outcome for record in view.records]) == ("permanent-task-failure", ["failed"])
        assert app.retry(dead.id).id != dead.id
        app.close()

    asyncio.run(work())


def test_pgqueuers_own_commands_work_on_our_jobs(queue, real_dsn):
    queue.enqueue_many([task_now(), task_now(queue="mail")])
    (lease,) = lease_now(queue, queues=["default"])
    settle(queue, lease, DEAD, now=time.time())
    environment = {**os.environ, "PGQUEUER_SCHEMA": "safedefer", "PGDSN": real_dsn}

    def pgq(*arguments):
        command = [sys.executable, "-m", "pgqueuer", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment).stdout

    assert "present" in pgq("verify", "--expect", "present")
    assert "default" in pgq("failed")
    assert "mail" in pgq("backlog")


# --- Put aside until it is due --------------------------------------------------------------------


def entrypoints(dsn):
    return dict(ask(dsn, "SELECT entrypoint, count(*) FROM safedefer.pgqueuer GROUP BY 1 ORDER BY 1"))


def test_what_falls_due_later_is_put_aside_and_shown_in_its_queue(queue, real_dsn):
    now = time.time()
    far = [task_now(eta=now + 500, queue="mail", name=f"n{n}") for n in range(3)]
    queue.enqueue_many([*far, task_now(queue="mail"), task_now(eta=now + 3)])
    assert entrypoints(real_dsn) == {"default": 1, "mail": 1, "mail@later": 3}
    assert [(stats.queue, stats.waiting) for stats in queue.stats(now=now)] == [("default", 1), ("mail", 4)]
    assert queue.find(far[0].id).queue == "mail"
    assert len(queue.tasks(queue="mail")) == 4
    assert len(lease_now(queue)) == 1
    with pytest.raises(TaskAlreadyExistsError):
        queue.enqueue_many([task_now(queue="mail", name="n0")])
    assert queue.next_due(now=now, queues=["mail"]) < now + 61
    assert queue.cancel(far[0].id, now=now)
    assert queue.purge("mail", now=now) == 2
    assert entrypoints(real_dsn) == {"default": 1, "mail": 1}


def test_what_was_put_aside_comes_back_when_it_is_due(queue, real_dsn):
    now = time.time()
    queue.enqueue_many([task_now(created=now, eta=now + 50, queue=name) for name in ("mail", "default", "mail")])
    queue.enqueue_many([task_now(created=now, eta=now + 900, queue="mail")])
    assert queue.next_due(now=time.time()) == pytest.approx(now + 50, abs=20.0)
    assert lease_now(queue) == []
    ask(real_dsn, "UPDATE safedefer.pgqueuer SET execute_after = execute_after - interval '51 seconds'")
    assert [lease.task.queue for lease in lease_now(queue, queues=["default"])] == ["default"]
    assert entrypoints(real_dsn) == {"default": 1, "mail@later": 3}
    assert [lease.task.queue for lease in lease_now(queue)] == ["mail", "mail"]
    assert entrypoints(real_dsn) == {"default": 1, "mail": 2, "mail@later": 1}


def test_a_retry_that_is_far_off_is_put_aside(queue, real_dsn):
    queue.enqueue_many([task_now(), task_now()])
    near, far = lease_now(queue)
    now = time.time()
    settlements = [(near, now + 1.0), (far, now + 100.0)]
    assert all(
        queue.settle_many([(lease, Settlement(verdict=Verdict.RETRY, at=at)) for lease, at in settlements], now=now)
    )
    assert entrypoints(real_dsn) == {"default": 1, "default@later": 1}
    ask(real_dsn, "UPDATE safedefer.pgqueuer SET execute_after = now() - interval '1 second'")
    assert {lease.attempts for lease in lease_now(queue)} == {1}
    assert entrypoints(real_dsn) == {"default": 2}


@pytest.mark.parametrize("how", ["at once", "under control"])
def test_a_lease_is_not_slowed_by_what_waits_whatever_the_planner_believes(queue, real_dsn, how):
    """Ten thousand that were analysed as due much later, and as many that are due: no plan sorts or scans them all."""
    now = time.time()
    queue.enqueue_many(task_now(created=now, eta=now + 100_000) for _ in range(10_000))
    ask(real_dsn, "ANALYZE safedefer.pgqueuer")
    queue.enqueue_many(task_now(created=now, eta=now) for _ in range(10_000))
    dequeue = STATEMENTS._builder.build_dequeue_query(
        batch_size=100, entrypoints=["default"], concurrency_limits=[0], queue_manager_id=uuid4(),
        global_concurrency_limit=None, heartbeat_timeout=timedelta(seconds=60),
    )  # fmt: skip
    values = f"100, '{{default}}', '{uuid4()}', '60 seconds'"
    statement = STATEMENTS._pick_free if how == "at once" else dequeue.sql

    async def explain(connection):
        await connection.execute(f"PREPARE dequeue AS {statement}")
        rows = await connection.fetch(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE dequeue ({values})")
        return json.loads(rows[0]["QUERY PLAN"])[0]["Plan"]

    def nodes(plan):
        yield plan
        for child in plan.get("Plans", ()):
            yield from nodes(child)

    most = max(
        node["Actual Rows"] * node["Actual Loops"] for node in nodes(queue._store.run(explain, purpose="leases"))
    )
    assert most <= 400


def test_a_lease_is_one_statement_and_makes_no_plan_anew(queue):
    """A plan for the values of each call took longer to make than to run."""
    for _ in range(3):
        queue.enqueue_many([task_now()])
        assert len(lease_now(queue)) == 1

    async def planned(connection):
        return await connection.fetch(
            "SELECT generic_plans, custom_plans FROM pg_prepared_statements WHERE generic_plans + custom_plans = 3"
        )

    assert [tuple(row.values()) for row in queue._store.run(planned, purpose="leases")] == [(3, 0)]


@pytest.mark.parametrize("at", [0, 99, 100, 250, 349])
def test_a_stream_of_which_one_is_refused_is_stored_not_at_all(queue, at):
    tasks = [task_now() for _ in range(350)]
    queue.enqueue_many([task_now(name="taken")])
    tasks[at] = tasks[at]._replace(name="taken")
    with pytest.raises(TaskAlreadyExistsError, match="taken"):
        queue.enqueue_many(iter(tasks))
    assert [each.waiting for each in queue.stats(now=0.0)] == [1]
    queue.enqueue_many(iter(tasks[:at] + tasks[at + 1 :]))
    assert [each.waiting for each in queue.stats(now=0.0)] == [350]


# --- The record of a success is the ledger's row --------------------------------------------------


def ran(queue, *ends):
    """Run a task once for each end of a run, and return its records as ``find`` has them."""
    task = task_now()
    queue.enqueue_many([task])
    for number, (state, changes) in enumerate(ends):
        run = execution_of(task, owner=f"run-{number}")
        assert begin(queue.ledger, run, now=0.0, lease=60.0) is Admission.RUN
        assert finish(queue.ledger, run, state, record_of(task, **changes))
    return task, list(queue.find(task.id).records)


def stored_attempts(queue):
    async def action(connection):
        return (await connection.fetch("SELECT count(*) AS number FROM safedefer.attempts"))[0]["number"]

    return queue._store.run(action)


def test_a_success_has_no_row_of_its_own_and_stands_where_it_was(queue):
    failed = {"outcome": "rejected", "status": 500, "reason": "unresolvable", "started": 1.0, "ended": 2.0}
    before = stored_attempts(queue)
    task, records = ran(queue, (EndState.RETRY, failed), (EndState.SUCCEEDED, {"started": 3.0, "ended": 4.5}))
    assert records == [record_of(task, **failed), record_of(task, started=3.0, ended=4.5)]
    assert stored_attempts(queue) == before + 1
    refused = record_of(task, outcome="rejected", status=500, reason="policy-violation", started=9.0, ended=9.0)
    queue.ledger.record_many([refused])
    assert list(queue.find(task.id).records) == [*records, refused]
    (lease,) = lease_now(queue)
    settle(queue, lease, DONE, now=time.time())
    assert [record.outcome for record in queue.find(task.id).records] == ["rejected", "succeeded", "rejected"]


@pytest.mark.parametrize(
    "changes",
    [
        {"reason": "x"},
        {"status": 201},
        {"status": None},
        {"outcome": "done"},
        {"exception_type": "E"},
        {"traceback": "t"},
    ],
)
def test_a_success_of_which_more_is_to_be_said_has_a_row(queue, changes):
    before = stored_attempts(queue)
    task, records = ran(queue, (EndState.SUCCEEDED, changes))
    assert records == [record_of(task, **changes)]
    assert stored_attempts(queue) == before + 1


def test_a_success_that_is_told_twice_is_remembered_once_and_another_ones_as_well(queue):
    task, records = ran(queue, (EndState.SUCCEEDED, {}))
    again, other = execution_of(task, owner="run-0"), execution_of(task, owner="run-9")
    assert queue.ledger.finish_many([(again, EndState.SUCCEEDED, record_of(task))]) == [True]
    assert list(queue.find(task.id).records) == records == [record_of(task)]
    late = record_of(task, started=90.0, ended=95.0)
    assert queue.ledger.finish_many([(other, EndState.SUCCEEDED, late)]) == [False]
    assert list(queue.find(task.id).records) == [late, *records]
    failed = record_of(task, outcome="failed")
    assert queue.ledger.finish_many([(again, EndState.FAILED, failed)]) == [False]
    assert begin(queue.ledger, other, now=0.0, lease=60.0) is Admission.DUPLICATE


def test_named_tasks_of_clocks_of_two_types_are_stored_together(queue):
    now = time.time()
    queue.enqueue_many([task_now(name="a", created=now), task_now(name="b", created=int(now))])
    assert queue.stats(now=0.0)[0].waiting == 2


# --- On the caller's own loop ---------------------------------------------------------------------


def test_within_on_loop_the_loop_has_connections_of_its_own_and_none_after(queue):
    async def mine():
        with psycopg.connect(queue._dsn) as connection:
            return connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'safedefer'"
            ).fetchone()[0]

    async def work():
        assert queue.ledger.here is None
        before = await mine()
        async with queue.on_loop() as calls, queue.on_loop() as again:
            ledger = queue.ledger.here
            assert ledger._pools is calls._pools is again._pools
            now = time.time()
            (lease,) = await calls.lease(owner="o", limit=5, seconds=60.0, now=now)
            execution = execution_of(lease.task)
            assert await ledger.begin_many([execution], now=now, lease=60.0) == [Admission.RUN]
            end = execution, EndState.SUCCEEDED, record_of(lease.task, outcome="succeeded", status=200)
            assert await ledger.finish_many([end]) == [True]
            assert await calls.settle_many([(lease, DONE)], now=now) == [True]
            assert await mine() > before
        assert queue.ledger.here is None
        assert await mine() == before

    queue.enqueue_many([make_task(eta=0.0, created=0.0)])
    queue.stats(now=0.0)
    asyncio.run(work())
    assert [task.state for task in queue.tasks(states=[TaskState.SUCCEEDED])] == [TaskState.SUCCEEDED]


def test_a_call_after_another_acquires_no_connection_anew(queue, monkeypatch):
    """Giving one back to its pool and acquiring it again costs more than a statement."""
    acquired = []
    acquire = asyncpg.Pool.acquire
    monkeypatch.setattr(asyncpg.Pool, "acquire", lambda pool, **more: acquired.append(pool) or acquire(pool, **more))

    async def work():
        async with queue.on_loop() as calls:
            await calls.lease(owner="o", limit=1, seconds=60.0, now=time.time())
            assert acquired
            acquired.clear()
            await calls.lease(owner="o", limit=1, seconds=60.0, now=time.time())
            assert not acquired

    asyncio.run(work())


def test_a_connection_that_ended_between_two_calls_is_replaced(queue, real_dsn):
    end_the_others = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )

    async def work():
        async with queue.on_loop() as calls:
            await calls.lease(owner="o", limit=1, seconds=60.0, now=time.time())
            await asyncio.to_thread(ask, real_dsn, end_the_others)
            await asyncio.sleep(0.1)
            assert await calls.lease(owner="o", limit=1, seconds=60.0, now=time.time()) == []

    asyncio.run(work())


def test_of_two_that_share_a_loop_the_first_to_leave_takes_nothing_from_the_other(queue):
    async def work():
        async with queue.on_loop() as calls:
            async with queue.on_loop():
                pass
            assert queue.ledger.here._pools is calls._pools
            assert await calls.lease(owner="o", limit=5, seconds=60.0, now=time.time()) == []

    asyncio.run(work())


def test_a_queue_that_is_closed_says_so_on_every_loop(queue):
    async def work():
        async with queue.on_loop() as calls:
            await calls.lease(owner="o", limit=5, seconds=60.0, now=time.time())
            queue.close()
            with pytest.raises(QueueUnavailable, match="closed"):
                await calls.lease(owner="o", limit=5, seconds=60.0, now=time.time())

    asyncio.run(work())


def test_a_loop_can_be_there_before_the_database_is():
    queue = PostgresQueue("postgresql:///nowhere?host=/nonexistent")

    async def work():
        async with queue.on_loop() as calls:
            with pytest.raises(QueueUnavailable, match="failed"):
                await calls.lease(owner="o", limit=5, seconds=60.0, now=time.time())

    asyncio.run(work())
    queue.close()


@pytest.mark.parametrize("odd", ["lost", "named", "retried", "twice", "ended otherwise", "unknown to the ledger"])
def test_what_is_settled_together_ends_as_it_would_alone(queue, odd):
    """Tasks that succeeded at once are ended by one statement; one that is not like the others spoils none of them."""
    now = time.time()
    names = ["odd" if odd == "named" else None, None, None]
    for number, name in enumerate(names):
        queue.enqueue_many([make_task(eta=now, created=now, name=name)])
    leases = queue.lease(owner="o", limit=5, seconds=60.0, now=now)
    for number, lease in enumerate(leases):
        if number or odd != "unknown to the ledger":
            execution = execution_of(lease.task)
            assert begin(queue.ledger, execution, now=now, lease=60.0) is Admission.RUN
            state = EndState.FAILED if odd == "ended otherwise" and not number else EndState.SUCCEEDED
            finish(queue.ledger, execution, state, record_of(lease.task, outcome=str(state), status=200))
    settlements = [(lease, DONE) for lease in leases]
    if odd == "lost":
        with psycopg.connect(queue._dsn, autocommit=True) as connection:
            connection.execute(
                "UPDATE safedefer.pgqueuer SET updated = now() WHERE dedupe_key = %s", (leases[0].task.id,)
            )
    elif odd == "retried":
        settlements[0] = leases[0], Settlement(verdict=Verdict.RETRY, at=now + 60)
    elif odd == "twice":
        settlements.append(settlements[0])
    kept = queue.settle_many(settlements, now=now)
    assert kept == {"lost": [False, True, True], "twice": [True, True, True, False]}.get(odd, [True] * 3)
    state = {"lost": TaskState.RUNNING, "retried": TaskState.WAITING, "ended otherwise": TaskState.DEAD}.get(
        odd, TaskState.SUCCEEDED
    )
    assert [queue.find(lease.task.id).state for lease in leases] == [state, TaskState.SUCCEEDED, TaskState.SUCCEEDED]
    assert [queue.find(lease.task.id).attempts for lease in leases[1:]] == [1, 1]
    if odd == "named":
        assert queue.find(leases[0].task.id).name == "odd"


def test_pgqueuer_logs_the_end_of_a_job_the_same_whichever_statement_ends_it(queue):
    now = time.time()
    for number in range(2):
        queue.enqueue_many([make_task(eta=now, created=now)])
    leases = queue.lease(owner="o", limit=5, seconds=60.0, now=now)
    for lease in leases:
        begin(queue.ledger, execution_of(lease.task), now=now, lease=60.0)
        finish(
            queue.ledger,
            execution_of(lease.task),
            EndState.SUCCEEDED,
            record_of(lease.task, outcome="succeeded", status=200),
        )
    assert queue.settle_many([(leases[0], DONE)], now=now) == [True]
    assert queue.settle_many([(leases[1], replace(DONE, reason="by the long way"))], now=now) == [True]
    with psycopg.connect(queue._dsn) as connection:
        rows = connection.execute(
            "SELECT status, entrypoint, priority, traceback FROM safedefer.pgqueuer_log WHERE status NOT IN ('queued', 'picked')"
        ).fetchall()
        assert len(rows) == 2
        assert rows[0] == rows[1]
        assert connection.execute("SELECT count(*) FROM safedefer.pgqueuer").fetchone() == (0,)


def test_a_handler_calls_the_ledger_on_its_loop_while_that_has_connections_and_in_threads_then(queue, monkeypatch):
    app = make_app(queue=queue)
    tasks = [app.defer(sample_tasks.add, 1, number) for number in range(2)]
    threads = []
    begin = type(queue.ledger).begin_many
    monkeypatch.setattr(
        type(queue.ledger), "begin_many", lambda *args, **named: [threads.append(1), begin(*args, **named)][1]
    )

    async def work():
        headers = {"Content-Type": "application/jose"}
        async with queue.on_loop():
            assert (await app.handle(headers, tasks[0].payload))[1]["Safedefer-Outcome"] == "succeeded"
            assert threads == []
        assert (await app.handle(headers, tasks[1].payload))[1]["Safedefer-Outcome"] == "succeeded"
        assert threads == [1]

    asyncio.run(work())
    app.close()


def test_the_lease_that_dispatchers_have_is_known_to_who_looks_whatever_it_was_before(queue):
    for seconds in (30.0, 60.0, 30.0, 60.0):
        queue.lease(owner="o", limit=1, seconds=seconds, now=time.time())
        with psycopg.connect(queue._dsn) as connection:
            assert connection.execute("SELECT lease_seconds FROM safedefer.settings").fetchone() == (seconds,)


@pytest.mark.parametrize("text", ["", "\x1f", "a\x1fb\x1f", "NULL", "{a,b}", 'a"b\\', "ä\n€"])
def test_whatever_names_a_run_it_is_one_value(queue, text):
    """Columns travel as one text each, joined by a separator, which a value may have in it."""
    runs = [
        execution_of(make_task(), owner=f"{text}{number}", audience=f"{text}{number % 2}", task_id=f"{number}{text}")
        for number in range(4)
    ]
    begun = queue.ledger.begin_many(runs, now=0.0, lease=60.0)
    assert begun == [Admission.RUN] * 4
    records = [record_of(make_task(), task_id=run.task_id, audience=run.audience) for run in runs]
    ends = [(run, EndState.SUCCEEDED, record) for run, record in zip(runs, records, strict=True)]
    assert queue.ledger.finish_many(ends[:3]) == [True] * 3
    other = runs[3]._replace(owner="another")
    assert queue.ledger.finish_many([(other, EndState.RETRY, records[3])]) == [False]
    assert queue.ledger.begin_many(runs, now=0.0, lease=60.0) == [*[Admission.DUPLICATE] * 3, Admission.RUN]


def succeeded(queue, leases, *, now):
    runs = [execution_of(lease.task) for lease in leases]
    queue.ledger.begin_many(runs, now=now, lease=60.0)
    queue.ledger.finish_many(
        [(run, EndState.SUCCEEDED, record_of(lease.task)) for run, lease in zip(runs, leases, strict=True)]
    )


def test_what_is_settled_together_is_locked_in_one_order_whatever_becomes_of_it(queue):
    """Or else a batch that ends some and retries others waits for a purge that waits for it."""
    now = time.time()
    queue.enqueue_many([task_now() for _ in range(2)])
    first, last = lease_now(queue)
    succeeded(queue, [last], now=now)
    settlements = [(last, DONE), (first, Settlement(verdict=Verdict.RETRY, at=now))]
    jobs = "SELECT id FROM safedefer.pgqueuer ORDER BY id"
    with psycopg.connect(queue._dsn) as other, psycopg.connect(queue._dsn) as third, ThreadPoolExecutor(1) as pool:
        low, high = (row[0] for row in third.execute(jobs))
        third.rollback()
        other.execute("SELECT FROM safedefer.pgqueuer WHERE id = %s FOR UPDATE", (low,))
        settling = pool.submit(queue.settle_many, settlements, now=now)
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        deadline = time.monotonic() + 30.0
        while third.execute(waiting).fetchone() == (0,):
            assert time.monotonic() < deadline
            third.rollback()
            time.sleep(0.01)
        third.execute("SELECT FROM safedefer.pgqueuer WHERE id = %s FOR UPDATE NOWAIT", (high,))
        third.rollback()
        other.rollback()
        assert settling.result(30) == [True, True]


def test_a_task_that_somebody_else_ended_meanwhile_is_not_ours(queue):
    now = time.time()
    queue.enqueue_many([task_now() for _ in range(2)])
    leases = lease_now(queue)
    succeeded(queue, leases, now=now)
    with psycopg.connect(queue._dsn) as other, ThreadPoolExecutor(1) as pool:
        other.execute("DELETE FROM safedefer.pgqueuer WHERE dedupe_key = %s", (leases[1].task.id,))
        settling = pool.submit(queue.settle_many, [(lease, DONE) for lease in leases], now=now)
        time.sleep(0.3)
        other.commit()
        assert settling.result(30) == [True, False]


def test_of_a_lease_that_is_settled_twice_in_a_batch_the_first_counts(queue):
    now = time.time()
    queue.enqueue_many([task_now() for _ in range(2)])
    leases = lease_now(queue)
    succeeded(queue, leases, now=now)
    retry = Settlement(verdict=Verdict.RETRY, at=now)
    assert queue.settle_many([(leases[0], retry), (leases[0], DONE), (leases[1], DONE)], now=now) == [True, False, True]
    assert queue.find(leases[0].task.id).state is TaskState.WAITING


def test_jobs_are_ended_by_their_ids_whatever_the_planner_has_counted(queue):
    queue.enqueue_many([task_now() for _ in range(4000)])
    with psycopg.connect(queue._dsn, autocommit=True) as connection:
        connection.execute("ANALYZE safedefer.pgqueuer")
    for _ in range(3):
        leases = queue.lease(owner="d", limit=1000, seconds=60.0, now=time.time())
    values = joined(["1"] * 200, ["1"] * 200, ["a"] * 200, ["t"] * 200)

    async def explain(connection):
        rows = await connection.fetch(f"EXPLAIN {SQL['done']}", *values, manager_of("d"), 1.0)
        held = to_json(
            [{"id": 1, "manager": str(manager_of("d")), "updated": 1, "audience": "a", "task_id": "t"}] * 200
        )
        rows += await connection.fetch(f"EXPLAIN {SQL['held']}", held)
        return "\n".join(row[0] for row in rows)

    plan = queue._store.run(explain, purpose="relaxed")
    assert len(leases) == 1000
    assert plan.count("pgqueuer_pkey") == 3
    assert "picked" not in plan.replace("'picked'", "")


@pytest.mark.parametrize("end", ["succeeded", "cancelled", "by the long way"])
def test_history_keeps_nothing_that_came_with_the_token(queue, end):
    task = task_now(headers={"X-Api-Key": "s3cret"}, retry_options={"task_retry_limit": 7.0})
    queue.enqueue_many([task])
    if end == "cancelled":
        assert queue.cancel(task.id, now=time.time())
    else:
        (lease,) = lease_now(queue)
        succeeded(queue, [lease], now=time.time())
        settle(queue, lease, DONE if end == "succeeded" else replace(DONE, reason="odd"), now=time.time())
    with psycopg.connect(queue._dsn) as connection:
        ((kept,),) = connection.execute("SELECT headers::text FROM safedefer.ended").fetchall()
    assert "s3cret" not in kept
    assert "task_retry_limit" not in kept
    view = queue.find(task.id)
    assert (view.audience, view.url, view.expires, view.headers) == (task.audience, task.url, task.expires, {})


def test_a_task_that_blocks_the_loop_keeps_no_other_dispatcher_from_leasing(queue):
    """What takes several statements holds rows: under a control, a lease is not made on the caller's loop."""
    queue.configure([QueueLimits(queue="default", rate=1000.0, bucket_size=1000)], now=0.0)
    queue.enqueue_many([task_now() for _ in range(3)])
    other = PostgresQueue(queue._dsn)
    leased_meanwhile = []

    def lease_elsewhere():
        other.lease(owner="other", limit=1, seconds=60.0, now=time.time())

    async def work(turns):
        async with queue.on_loop() as calls:
            await calls.lease(owner="o", limit=0, seconds=60.0, now=time.time())
            leasing = asyncio.create_task(calls.lease(owner="o", limit=1, seconds=60.0, now=time.time()))
            for _ in range(turns):
                await asyncio.sleep(0.001)
            elsewhere = threading.Thread(target=lease_elsewhere)
            elsewhere.start()
            elsewhere.join(60.0)  # the loop is blocked, as by a task that blocks
            leased_meanwhile.append(not elsewhere.is_alive())
            await leasing
            elsewhere.join()

    other.lease(owner="other", limit=0, seconds=60.0, now=time.time())
    for turns in range(5):
        asyncio.run(work(turns))
    other.close()
    assert leased_meanwhile == [True] * 5


def test_leaving_on_loop_ends_what_still_runs_and_what_comes_after_it_is_refused(queue):
    async def work():
        async with queue.on_loop() as calls:
            await calls.lease(owner="o", limit=1, seconds=60.0, now=time.time())
        with pytest.raises(QueueUnavailable, match="closed"):
            await calls.lease(owner="o", limit=1, seconds=60.0, now=time.time())

    asyncio.run(work())


@pytest.mark.parametrize("on_loop", [True, False])
def test_the_end_of_a_run_is_written_although_its_loop_is_taken_down(queue, on_loop):
    app = make_app(queue=queue)
    sent = [app.defer(sample_tasks.add, 1, number) for number in range(4)]
    assert handle(app, sent[0].payload).headers["Safedefer-Outcome"] == "succeeded"

    async def hold(held):
        async with queue.on_loop():
            held.set()
            await asyncio.sleep(60)

    async def leave(payload, turns):
        end, held = app.delivery._ledger_client.end, asyncio.Event()
        holding = asyncio.create_task(hold(held)) if on_loop else None
        if on_loop:
            await held.wait()
        before, running = end._gathered.here().running, asyncio.create_task(app.handle(JOSE, payload))
        while end._gathered.here().running is before and not end._gathered.here().pending:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        del holding, running

    for turns, task in enumerate(sent[1:]):
        asyncio.run(leave(task.payload, turns))
        for _ in range(1500):
            outcome = handle(app, task.payload).headers["Safedefer-Outcome"]
            if outcome != "running":
                break
            time.sleep(0.02)
        assert outcome == "duplicate"
    app.close()


@pytest.mark.parametrize("on_loop", [True, False])
def test_more_calls_at_once_than_there_are_connections_wait_for_each_other_and_end(real_dsn, on_loop):
    queue = PostgresQueue(real_dsn, workers=1)
    queue.configure([QueueLimits(queue="default", rate=1e6, bucket_size=10**6)], now=0.0)
    queue.enqueue_many([task_now(name=f"n{number}") for number in range(40)])
    now = time.time()

    async def work():
        async with queue.on_loop() as calls:

            async def once():
                leases = await calls.lease(owner="o", limit=4, seconds=60.0, now=now)
                return await calls.settle_many([(lease, DONE) for lease in leases], now=now)

            async with asyncio.timeout(60):
                return await asyncio.gather(*(once() for _ in range(10)))

    def once(_):
        leases = queue.lease(owner="o", limit=4, seconds=60.0, now=now)
        return queue.settle_many([(lease, DONE) for lease in leases], now=now)

    if on_loop:
        kept = asyncio.run(work())
    else:
        with ThreadPoolExecutor(10) as pool:
            kept = list(pool.map(once, range(10)))
    assert [ours for each in kept for ours in each] == [True] * 40
    queue.close()


@pytest.mark.filterwarnings("ignore")  # sockets of a closed loop are closed by nobody but the collector
def test_connections_of_a_loop_that_was_closed_in_the_middle_go_with_the_next_one(queue):
    async def enter():
        context = queue.on_loop()
        calls = await context.__aenter__()
        await calls.lease(owner="o", limit=1, seconds=60.0, now=time.time())
        return context

    left = []
    for _ in range(3):
        loop = asyncio.new_event_loop()
        left.append(loop.run_until_complete(enter()))
        loop.close()
    assert len(queue._store._loops) == 1

    async def use():
        async with queue.on_loop():
            assert len(queue._store._loops) == 1

    asyncio.run(use())
    assert queue._store._loops == {}
    del left, loop
    gc.collect()


def test_closing_the_queue_disconnects_every_loop(queue):
    async def work():
        async with queue.on_loop() as calls:
            await calls.lease(owner="o", limit=1, seconds=60.0, now=time.time())
            dsn = queue._dsn
            await asyncio.to_thread(queue.close)
            with psycopg.connect(dsn, autocommit=True) as connection:
                open_ = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'safedefer'"
                # The server takes a moment to notice who has gone.
                await until(lambda: connection.execute(open_).fetchone() == (0,))

    asyncio.run(work())


# --- What somebody deletes with other tools -------------------------------------------------------


def plant_key(dsn, task_id="a-task-of-long-ago"):
    ask(dsn, f"INSERT INTO safedefer.uniques VALUES ('default', 'k', '{task_id}')")


def test_a_key_that_outlived_its_task_is_taken_over(queue):
    plant_key(queue._dsn)
    tasks = [task_now(), task_now(unique_key="k"), task_now(unique_key="other")]
    queue.enqueue_many(iter(tasks))
    assert {lease.task.id for lease in lease_now(queue)} == {task.id for task in tasks}
    with pytest.raises(AlreadyWaiting) as caught:
        queue.enqueue_many([task_now(unique_key="k")])
    assert caught.value.task_id == tasks[1].id


def test_a_key_that_outlived_its_task_is_taken_over_in_a_transaction_of_the_users(queue):
    plant_key(queue._dsn)
    task = task_now(unique_key="k")

    async def enqueue():
        connection = await asyncpg.connect(queue._dsn)
        async with connection.transaction():
            for statement, values in queue.statements.enqueue_statements([task]):
                await connection.execute(statement, *values)
        await connection.close()

    asyncio.run(enqueue())
    assert [lease.task.id for lease in lease_now(queue)] == [task.id]


def test_a_unique_task_is_deferred_anew_when_its_job_was_deleted(queue):
    app = make_app(queue=queue)
    first = app.options(unique=True).defer(sample_tasks.add, 1)
    assert app.options(unique=True).defer(sample_tasks.add, 1).id == first.id
    ask(queue._dsn, "DELETE FROM safedefer.pgqueuer")
    again = app.options(unique=True).defer(sample_tasks.add, 1)
    assert again.id != first.id
    assert queue.find(again.id).state is TaskState.WAITING


def test_a_user_who_may_not_delete_keys_is_told_which_row_is_in_the_way(real_dsn):
    queue = PostgresQueue(real_dsn)
    queue.enqueue_many([task_now()])
    plant_key(real_dsn)
    role = f"producer_{os.getpid()}"
    with psycopg.connect(real_dsn, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN")
        connection.execute(f"GRANT USAGE ON SCHEMA safedefer TO {role}")
        connection.execute(f"GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA safedefer TO {role}")
        connection.execute(f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA safedefer TO {role}")
    app = make_app(queue=PostgresQueue(real_dsn.replace("postgres@", f"{role}@", 1)))
    try:
        ask(real_dsn, "UPDATE safedefer.uniques SET unique_key = %s", unique_key_of(app, real_dsn))
        with pytest.raises(QueueUnavailable, match="a-task-of-long-ago, which has ended.*safedefer.uniques"):
            app.options(unique=True).defer(sample_tasks.add, 1)
    finally:
        app.close()
        queue.close()
        with psycopg.connect(real_dsn, autocommit=True) as connection:
            connection.execute(f"DROP OWNED BY {role}")
            connection.execute(f"DROP ROLE {role}")


def unique_key_of(app, dsn):
    """Return the key of the call that the tests defer."""
    first = app.options(unique=True).defer(sample_tasks.add, 1)
    ((key,),) = ask(dsn, "SELECT unique_key FROM safedefer.uniques WHERE task_id = %s", first.id)
    ask(dsn, "DELETE FROM safedefer.pgqueuer")
    ask(dsn, "DELETE FROM safedefer.uniques WHERE task_id = %s", first.id)
    return key


def test_a_blob_whose_job_was_deleted_is_pruned_and_no_other(queue):
    lost, kept = oversize_task(id="a" * 32), oversize_task(id="b" * 32)
    queue.enqueue_many([lost, kept])
    ask(queue._dsn, f"DELETE FROM safedefer.pgqueuer WHERE dedupe_key = '{lost.id}'")
    for _ in range(1_000):
        queue.prune(now=time.time())
        if queue.blobs.get(lost.blob.id) is None:
            break
    assert queue.blobs.get(lost.blob.id) is None
    assert queue.blobs.get(kept.blob.id) == kept.blob.data


@pytest.mark.parametrize(
    ("version", "warned"), [("1.6.0", False), ("1.6.12", False), ("1.7.0", True), ("1.10.dev3", True), ("2.0", True)]
)
def test_a_pgqueuer_that_is_newer_than_those_that_were_tested_is_warned_of(version, warned):
    warning = untested(version)
    assert (warning is not None and "pgqueuer<1.7" in warning) is warned


def test_the_warning_is_given_when_the_tables_are_checked(real_dsn, monkeypatch, caplog):
    monkeypatch.setattr("safedefer.queues.postgres.migrations.untested", lambda version: f"{version} is new")
    queue = PostgresQueue(real_dsn)
    queue.stats(now=0.0)
    queue.close()
    assert "is new" in caplog.text


# --- Durability -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("said_by", "value", "kept"), [
    ("database", "off", "on"), ("database", "remote_apply", "remote_apply"), ("database", "local", "local"), ("url", "off", "off"),
])  # fmt: skip
def test_commits_that_must_last_wait_for_the_disk_whatever_the_database_says(real_dsn, said_by, value, kept):
    """``ALTER DATABASE … SET synchronous_commit = off`` is for data that can be lost. Who writes it into the queue's URL means us."""
    if said_by == "database":
        name = psycopg.conninfo.conninfo_to_dict(real_dsn)["dbname"]
        ask(real_dsn, f"ALTER DATABASE {name} SET synchronous_commit = {value}")
        url = real_dsn
    else:
        url = f"{real_dsn}&options=-c%20synchronous_commit%3Doff"
    queue = PostgresQueue(url)
    try:
        queue.enqueue_many([task_now()])
        assert queue._store.run(lambda connection: connection.fetchval("SHOW synchronous_commit")) == kept
        producers = queue._store.open().producers
        connection = producers._take(time.monotonic() + 60.0)
        assert connection.execute("SHOW synchronous_commit").fetchone() == (kept,)
        producers._give(connection)
    finally:
        queue.close()
