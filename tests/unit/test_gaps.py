"""What an engine cannot do is refused at ``defer()``, and nothing is stored."""

import sqlite3
from contextlib import closing
from dataclasses import fields
from datetime import UTC, datetime, timedelta

import pytest

from safedefer.errors import InvalidTaskError, QueueUnavailable, TaskTooLargeError
from safedefer.options import TaskRetryOptions
from safedefer.queues.base import AlreadyWaiting
from safedefer.queues.capabilities import Capabilities
from safedefer.queues.memory.queue import MemoryQueue
from tests import sample_tasks
from tests.unit.apps import make_app

OPTIONS = {
    "names": {"name": "receipt-42"},
    "unique": {"unique": True},
    "eta": {"countdown": 1.0},
    "headers": {"headers": {"X-Shop": "1"}},
    "retry_options": {"retry_options": TaskRetryOptions(task_retry_limit=3)},
    "targets": {"target": "backend"},
}


class Poor(MemoryQueue):
    """A queue with one gap."""

    gap = ""

    @property
    def capabilities(self):
        return Capabilities(**{self.gap: False})


@pytest.fixture
def queue():
    queue = Poor()
    yield queue
    queue.close()


@pytest.mark.parametrize("gap", OPTIONS)
def test_an_option_that_the_engine_has_not_is_refused_before_anything_is_stored(queue, gap):
    queue.gap = gap
    app = make_app(queue=queue)
    with pytest.raises(InvalidTaskError, match="the engine of this queue has no .*use another engine"):
        app.options(**OPTIONS[gap]).defer(sample_tasks.add, 1, 2)
    with pytest.raises(InvalidTaskError, match="the engine of this queue has no"):
        app.options(**OPTIONS[gap] | {"unique": gap == "unique"}).defer(sample_tasks.add, 1, 2)
    assert list(queue.stats(now=0.0)) == []
    app.defer(sample_tasks.add, 1, 2)
    for other, options in OPTIONS.items():
        if other != gap:
            app.options(**options).defer(sample_tasks.add, 3, 4)


def test_all_gaps_are_told_at_once():
    class Poorer(MemoryQueue):
        capabilities = Capabilities(**dict.fromkeys(OPTIONS, False))

    app = make_app(queue=Poorer())
    options = {name: value for gap in OPTIONS for name, value in OPTIONS[gap].items() if gap != "unique"}
    with pytest.raises(InvalidTaskError) as caught:
        app.options(**options).defer(sample_tasks.add, 1)
    assert str(caught.value) == (
        "the engine of this queue has no names of tasks, eta and countdown, headers of tasks, retry options of tasks, targets; "
        "leave out _name, leave out _eta and _countdown, leave out _headers, declare _retry_options of the queue, leave out _target, or use another engine"
    )
    app.close()


def test_an_eta_that_has_passed_needs_no_eta(queue):
    queue.gap = "eta"
    make_app(queue=queue).options(eta=datetime.now(UTC) - timedelta(hours=1)).defer(sample_tasks.add, 1, 2)


def test_a_batch_with_a_gap_is_refused_whole(queue):
    queue.gap = "headers"
    with pytest.raises(InvalidTaskError, match="headers"):
        make_app(queue=queue).options(headers={"X-Shop": "1"}).defer_many([(sample_tasks.add, (1, 2), {})] * 3)
    assert list(queue.stats(now=0.0)) == []


def test_an_oversize_task_is_refused_where_there_are_no_blobs(queue):
    queue.gap = "oversize"
    app = make_app(queue=queue)
    with pytest.raises(TaskTooLargeError, match="keeps no blobs; store the data and pass its id"):
        app.defer(sample_tasks.add, "x" * 20_000, 2)
    assert list(queue.stats(now=0.0)) == []
    app.defer(sample_tasks.add, "x" * 2_000, 2)


def test_every_capability_is_on_unless_an_engine_says_otherwise():
    helps = {"streams"}  # nobody is refused anything without it
    bounds = {"longest_wait", "kept"}
    given = {field.name: getattr(Capabilities(), field.name) for field in fields(Capabilities)}
    assert all(value is None if name in bounds else value for name, value in given.items() if name not in helps)


CALLS = [(sample_tasks.add, (1, 2), {})] * 3


def test_a_batch_is_refused_by_an_engine_that_cannot_store_it_as_a_whole(queue):
    queue.gap = "batch_atomic"
    app = make_app(queue=queue)
    for defer_many in (app.defer_many, app.options(countdown=1).defer_many):
        with pytest.raises(InvalidTaskError, match="pass atomic=False"):
            defer_many(CALLS)
    assert list(queue.stats(now=0.0)) == []


def test_a_batch_may_be_stored_in_parts_where_the_caller_says_so(queue):
    queue.gap = "batch_atomic"
    app = make_app(queue=queue)
    assert len(app.defer_many(CALLS, atomic=False)) == 3
    assert len(app.options(countdown=1).defer_many(CALLS, atomic=False)) == 3
    assert queue.stats(now=0.0)[0].waiting == 6


def test_a_batch_that_goes_with_a_transaction_is_whole_on_every_engine(queue, tmp_path):
    queue.gap = "batch_atomic"
    app = make_app(queue=queue)
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection, app.transaction(connection):
        tasks = app.options(transactional=True).defer_many(CALLS)
    app.outbox.sweep()
    assert {view.id for view in queue.tasks()} == {task.id for task in tasks}
    app.close()


class Forgetful(MemoryQueue):
    """A queue that keeps the unique key of a task that it no longer has."""

    tries = 0

    def enqueue_many(self, tasks, /):
        tasks = list(tasks)
        if tasks[0].unique_key is not None and self.tries is not None:
            self.tries += 1
            raise AlreadyWaiting("0" * 32)
        super().enqueue_many(tasks)


def test_a_unique_key_that_outlived_its_task_ends_in_an_error_and_not_in_a_loop():
    queue = Forgetful()
    app = make_app(queue=queue)
    with pytest.raises(QueueUnavailable, match=f"for the task {'0' * 32}, which has ended.*defer it again"):
        app.options(unique=True).defer(sample_tasks.add, 1, 2)
    assert queue.tries == 5
    assert queue.tasks() == []
    app.defer(sample_tasks.add, 1, 2)
    app.close()


def test_a_unique_task_is_stored_when_the_one_before_it_ends_meanwhile():
    class Ending(Forgetful):
        def enqueue_many(self, tasks, /):
            if self.tries == 2:
                self.tries = None
            super().enqueue_many(tasks)

    app = make_app(queue=Ending())
    task = app.options(unique=True).defer(sample_tasks.add, 1, 2)
    assert [view.id for view in app.queue.tasks()] == [task.id]
    app.close()
