"""A PostgreSQL server that crashes under a Celery worker: what it undoes is delivered again."""

from __future__ import annotations

import os
import signal

import psycopg
import pytest

from safedefer.errors import QueueUnavailable
from safedefer.queues.postgres.migrations import migrate
from safedefer.queues.postgres.queue import PostgresQueue
from tests.postgres.server import Server
from tests.queues import celery_app as tasks
from tests.queues.brokers import celery_worker, valkey, wait_for
from tests.queues.test_celery import ran


@pytest.fixture(scope="module")
def server():
    # It writes what is not synced as late as it can.
    server = Server(durable=True, settings=("wal_writer_delay=10s",)).start()
    migrate(server.dsn())
    yield server
    server.close()


def states(server):
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        return dict(connection.execute("SELECT task_id, state FROM safedefer.ledger").fetchall())


def test_a_sync_says_when_a_crash_may_have_undone_what_was_committed_before_it(server):
    store = PostgresQueue(server.dsn())
    first = store.sync()
    assert store.sync() == first
    session = psycopg.connect(server.dsn())
    os.kill(session.info.backend_pid, signal.SIGKILL)  # and the server begins anew, as the same process
    session.close()
    wait_for(lambda: marked(store) not in {None, first})
    second = store.sync()
    server.restart(immediate=True)
    wait_for(lambda: marked(store) not in {None, second})
    store.close()


def marked(store):
    try:
        return store.sync()
    except QueueUnavailable:
        return None


@pytest.mark.nightly  # by day: the mark, above, and what is done by it, in test_acknowledging
def test_a_message_whose_end_a_crash_of_the_server_has_undone_is_not_acknowledged(server, tmp_path):
    with valkey() as url:
        app = tasks.make_app(url, tmp_path, store=server.dsn())
        environment = {"TEST_BROKER": url, "TEST_FOLDER": str(tmp_path), "TEST_STORE": server.dsn()}
        with celery_worker("tests.queues.celery_app:celery", environment, "-c", "1") as worker:
            app.defer(tasks.add, 0)
            wait_for(lambda: "add 0" in ran(tmp_path))
            task = app.defer(tasks.add_slowly, 1)
            wait_for(lambda: "begin 1" in ran(tmp_path))
            os.kill(worker.pid, signal.SIGSTOP)  # its parent acknowledges nothing now
            wait_for(lambda: states(server).get(task.id) == "succeeded")
            server.restart(immediate=True)
            assert states(server).get(task.id) != "succeeded", "the crash undoes the end"
            os.kill(worker.pid, signal.SIGCONT)
            wait_for(lambda: states(server).get(task.id) == "succeeded")
        app.close()
