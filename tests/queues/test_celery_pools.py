"""Celery's pools other than prefork: the runs are in the process that acknowledges."""

from __future__ import annotations

import pytest

from safedefer import TaskRetryOptions
from safedefer.queues.base import DeadFilter
from tests.queues import celery_app as tasks
from tests.queues.brokers import celery_worker, valkey, wait_for


@pytest.fixture(scope="module")
def broker():
    with valkey() as url:
        yield url


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_a_worker_without_children_runs_retries_and_buries(broker, tmp_path, pool):
    def lines():
        file = tmp_path / "ran"
        return file.read_text().split("\n")[:-1] if file.exists() else []

    app = tasks.make_app(broker, tmp_path)
    numbers = range(10)
    app.defer_many([(tasks.add, (number,), {}) for number in numbers], atomic=False)
    app.defer_many([(tasks.add_later, (number,), {}) for number in numbers], atomic=False)
    soon = TaskRetryOptions(min_backoff_seconds=0.1, max_backoff_seconds=1.0, task_retry_limit=3)
    app.options(retry_options=soon).defer(tasks.fail_first, 2)
    buried = app.defer(tasks.permanent)
    environment = {"TEST_BROKER": broker, "TEST_FOLDER": str(tmp_path)}
    with celery_worker("tests.queues.celery_app:celery", environment, "-P", pool):
        wait_for(lambda: [letter.id for letter in app.queue.dead_letters(DeadFilter())] == [buried.id])
        wait_for(lambda: lines().count("fail_first") == 3)
        wait_for(lambda: len([line for line in lines() if line.startswith("add")]) == 2 * len(numbers))
    app.close()
    plain = sorted(line for line in lines() if line.startswith("add "))
    assert plain == sorted(f"add {number}" for number in numbers)
    assert len({line.split()[3] for line in lines() if line.startswith("add_later")}) == 1, "one event loop"
