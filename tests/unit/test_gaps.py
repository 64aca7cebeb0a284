"""What an engine cannot do is refused at ``defer()``, and nothing is stored."""

from dataclasses import fields
from datetime import UTC, datetime, timedelta

import pytest

from safedefer.errors import InvalidTaskError, TaskTooLargeError
from safedefer.options import TaskRetryOptions
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
    assert all(getattr(Capabilities(), field.name) for field in fields(Capabilities) if field.name not in helps)
