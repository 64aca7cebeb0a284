"""The death of a Celery broker, of its worker, and of a child of that; ``python -m tests.chaos brokers redelivery`` is the long form."""

from __future__ import annotations

import contextlib
import sqlite3

import pytest
from kombu import Connection

from safedefer.queues import copies
from tests.chaos import brokers
from tests.queues import celery_app as tasks
from tests.queues.brokers import RABBITMQ, RabbitMQ, Valkey, celery_worker, wait_for

KINDS = [
    "valkey",
    pytest.param("rabbitmq", marks=pytest.mark.skipif(not RABBITMQ.exists(), reason="RabbitMQ is not installed")),
]


def survivors(broker, tmp_path):
    """Defer tasks, kill the broker, start it again, and return which of them it still has."""
    with contextlib.closing(broker):
        broker.start()
        app = tasks.make_app(broker.url, tmp_path)
        deferred = [app.defer(tasks.add, number).id for number in range(20)]
        app.close()
        broker.kill()
        broker.start()
        found = []
        with Connection(broker.url) as connection, contextlib.closing(connection.SimpleQueue("celery")) as queue:
            for _ in deferred:
                message = queue.get(timeout=60)
                found.append(message.headers["id"])
                message.ack()
        return deferred, found


def test_what_defer_returned_is_with_a_broker_that_was_killed_and_syncs_its_log(tmp_path):
    deferred, found = survivors(Valkey(appendonly="yes", appendfsync="always"), tmp_path)
    assert sorted(found) == sorted(deferred)


def ran(tmp_path):
    """Return what tasks have noted, sorted."""
    file = tmp_path / "ran"
    return sorted(file.read_text().splitlines()) if file.exists() else []


@pytest.fixture
def soon(tmp_path, monkeypatch):
    """Have what is lost handed over again after 2 s; return the environment of a worker."""
    monkeypatch.setattr(copies, "FIRST_LOOK", 0.25)
    return {"TEST_FIRST_LOOK": "0.25", "TEST_FOLDER": str(tmp_path)}


def test_a_worker_that_dies_between_the_two_steps_of_its_transport_loses_no_task(tmp_path, soon):
    """kombu takes a message out of its queue by one command, and notes that it has it by another one."""
    with contextlib.closing(Valkey(appendonly="yes", appendfsync="always")) as broker:
        broker.start()
        app = tasks.make_app(broker.url, tmp_path)
        soon["TEST_BROKER"] = broker.url
        with celery_worker("tests.queues.celery_app:celery", {**soon, "TEST_DIE": "1"}) as worker:
            app.defer(tasks.add, 1)
            wait_for(lambda: worker.poll() is not None)
        with Connection(broker.url) as connection:
            client = connection.default_channel.client
            assert not client.exists("celery", "unacked"), "no message is left"
        with celery_worker("tests.queues.celery_app:celery", soon):
            wait_for(lambda: ran(tmp_path) == ["add 1"])
        app.close()


def test_what_a_broker_without_a_disk_forgets_when_it_is_killed_runs(tmp_path, soon):
    with contextlib.closing(Valkey(save="")) as broker:
        broker.start()
        app = tasks.make_app(broker.url, tmp_path)
        for number in range(5):
            app.defer(tasks.add, number)
        broker.kill()
        broker.start()
        with Connection(broker.url) as connection:
            assert not connection.default_channel.client.keys("*")
        soon["TEST_BROKER"] = broker.url
        with celery_worker("tests.queues.celery_app:celery", soon):
            wait_for(lambda: ran(tmp_path) == [f"add {number}" for number in range(5)])
        app.close()


def test_the_copies_of_tasks_that_ended_go(tmp_path, soon):
    with contextlib.closing(Valkey()) as broker:
        broker.start()
        app = tasks.make_app(broker.url, tmp_path)
        soon["TEST_BROKER"] = broker.url
        with celery_worker("tests.queues.celery_app:celery", soon):
            for number in range(20):
                app.defer(tasks.add, number)
            wait_for(lambda: len(ran(tmp_path)) == 20)
            wait_for(lambda: count_of_copies(tmp_path) == 0)
        assert len(ran(tmp_path)) == 20
        app.close()


def count_of_copies(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "store.db")) as connection:
        return connection.execute("SELECT count(*) FROM safedefer_copies").fetchone()[0]


@pytest.mark.skipif(not RABBITMQ.exists(), reason="RabbitMQ is not installed")
def test_rabbitmq_keeps_its_messages_and_needs_no_copies(tmp_path):
    with contextlib.closing(RabbitMQ()) as broker:
        broker.start()
        app = tasks.make_app(broker.url, tmp_path)
        app.defer(tasks.add, 1)
        assert app.push_queue.engine.capabilities.lossless
        assert app.push_queue.store.copies.look(now=1e12, limit=1) == (0, [])
        app.close()


@pytest.mark.nightly  # by day: that with Valkey, above
@pytest.mark.skipif(not RABBITMQ.exists(), reason="RabbitMQ is not installed")
def test_what_defer_returned_is_with_a_rabbitmq_that_was_killed(tmp_path):
    deferred, found = survivors(RabbitMQ(), tmp_path)
    assert sorted(found) == sorted(deferred)


@pytest.mark.nightly  # by day: the death of a child, in test_celery, and that of the broker without a worker, above
@pytest.mark.parametrize("kind", KINDS)
def test_sigkill_of_broker_worker_and_child_loses_none(kind):
    brokers.kills(kind, seed=5, tasks=100, least=4)


@pytest.mark.nightly  # as above
@pytest.mark.parametrize("what", ["child", "parent", "worker", "broker"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_task_whose_run_was_cut_off_runs_again(kind, what):
    brokers.redelivery(kind, what)
