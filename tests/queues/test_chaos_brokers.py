"""The death of a Celery broker, of its worker, and of a child of that; ``python -m tests.chaos brokers redelivery`` is the long form."""

from __future__ import annotations

import contextlib

import pytest
from kombu import Connection

from tests.chaos import brokers
from tests.queues import celery_app as tasks
from tests.queues.brokers import RABBITMQ, RabbitMQ, Valkey

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


@pytest.mark.nightly  # by day: that with Valkey, above
@pytest.mark.skipif(not RABBITMQ.exists(), reason="RabbitMQ is not installed")
def test_what_defer_returned_is_with_a_rabbitmq_that_was_killed(tmp_path):
    deferred, found = survivors(RabbitMQ(), tmp_path)
    assert sorted(found) == sorted(deferred)


@pytest.mark.nightly  # by day: the death of a child, in test_celery, and that of the broker without a worker, above
@pytest.mark.parametrize("kind", KINDS)
def test_sigkill_of_broker_worker_and_child_loses_none_that_a_worker_has_received(kind):
    brokers.kills(kind, seed=5, tasks=100, least=4)


@pytest.mark.nightly  # as above
@pytest.mark.parametrize("what", ["child", "parent", "worker", "broker"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_task_whose_run_was_cut_off_runs_again(kind, what):
    brokers.redelivery(kind, what)
