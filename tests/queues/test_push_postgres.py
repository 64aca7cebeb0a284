"""A push engine whose store is a PostgreSQL database, by the database's own clock."""

from __future__ import annotations

import asyncio
import time

import pytest

from safedefer import TaskRetryOptions
from safedefer.ledger import Execution
from safedefer.queues.base import DeadFilter, QueuedTask, TaskState
from safedefer.queues.postgres.migrations import migrate
from safedefer.queues.postgres.queue import PostgresQueue
from safedefer.queues.postgres.rows import read_task
from tests import sample_tasks as tasks
from tests.postgres.server import fresh_database, shared_server
from tests.queues.pushing import PROOF, PROVEN, RETRIES, PushEngineInMemory
from tests.unit.apps import JOSE, make_app

FROM_ENGINE = {**JOSE, PROVEN: PROOF}


@pytest.fixture(scope="module")
def dsn():
    server = shared_server()
    with fresh_database(server) as name:
        migrate(server.dsn(name))
        yield server.dsn(name)


@pytest.fixture
def engine():
    return PushEngineInMemory(longest_wait=60.0)


@pytest.fixture
def app(dsn, engine):
    tasks.reset()
    app = make_app(queue=engine, store=PostgresQueue(dsn), lease_seconds=1.0)
    yield app
    app.close()


def post(app, token, headers=None):
    response = asyncio.run(app.handle(headers or FROM_ENGINE, token))
    return response.status, response.headers["Safedefer-Outcome"]


def test_a_task_is_tried_again_buried_and_re_run(app, engine):
    slow = TaskRetryOptions(task_retry_limit=1, min_backoff_seconds=30.0, max_backoff_seconds=30.0)
    task = app.options(retry_options=slow).defer(tasks.keywords, text="x" * 20_000)
    failing = app.options(retry_options=slow).defer(tasks.fail)
    assert post(app, engine.tasks[task.id].token) == (200, "succeeded")
    assert app.queue.blobs.get(engine.tasks[task.id].blob_id) is None
    assert post(app, failing.payload) == (500, "retry")
    assert post(app, failing.payload) == (425, "early")
    assert post(app, failing.payload, {**FROM_ENGINE, RETRIES: "1"}) == (425, "early")
    assert tasks.RAN.count("fail") == 1
    buried = app.defer(tasks.permanent)
    assert post(app, buried.payload) == (200, "failed")
    assert [letter.id for letter in app.queue.dead_letters(DeadFilter())] == [buried.id]
    engine.tasks.clear()
    again = app.retry(buried.id)
    assert list(engine.tasks) == [again.id]
    assert app.queue.find(again.id) is None
    assert post(app, engine.tasks[again.id].token) == (200, "failed")
    assert app.queue.drop_dead([again.id]) == 1


def test_a_long_retry_waits_in_the_store_and_a_cancelled_task_does_not_run(app, engine):
    slow = TaskRetryOptions(min_backoff_seconds=1_000.0, max_backoff_seconds=1_000.0)
    task = app.options(retry_options=slow).defer(tasks.fail)
    assert post(app, task.payload) == (202, "retry")
    assert app.queue.find(task.id).state is TaskState.WAITING
    assert post(app, task.payload)[0] in {425, 500}
    assert app.cancel(task.id)
    assert app.queue.find(task.id).state is TaskState.CANCELLED
    other = app.defer(tasks.add, 1)
    assert app.cancel(other.id)
    assert post(app, other.payload) == (200, "cancelled")
    assert tasks.RAN == ["fail"]


def test_a_lost_run_is_charged(app):
    once = TaskRetryOptions(task_retry_limit=0)
    task = app.options(retry_options=once).defer(tasks.fail)
    claims, verified = app.authenticate(task.payload), app.verify(task.payload)
    run = Execution(claims["aud"], claims["jti"], verified.digest, "killed", claims["exp"])
    app.queue.ledger.begin_many([run], now=0.0, lease=0.01)
    deadline = time.monotonic() + 60
    while not app.queue.ledger.lost_many([run], now=0.0)[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert post(app, task.payload) == (200, "failed")
    (letter,) = [each for each in app.queue.dead_letters(DeadFilter()) if each.id == task.id]
    assert (letter.attempts, [record.reason for record in letter.records]) == (2, ["lease-expired", "exception"])


def test_a_task_that_is_read_from_a_row_has_all_of_its_fields():
    job = {"id": 1, "dedupe_key": "a" * 32, "entrypoint": "default", "headers": None, "payload": b"token"}
    assert read_task(job) == QueuedTask._make(read_task(job))
    assert len(read_task(job)) == len(QueuedTask._fields)
