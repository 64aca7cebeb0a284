"""What the guides for leaving App Engine, RQ, Celery and Huey say."""

import sys
from datetime import UTC, datetime, timedelta
from types import ModuleType

import huey
import pytest

from safedefer import Policy, TaskTooLargeError, deferred
from safedefer.testing import TestApp
from tests import sample_tasks as tasks

NAME = "tests.migrate.huey_tasks"


@pytest.fixture
def kit():
    with TestApp(Policy("tests.sample_tasks")) as kit:
        yield kit


@pytest.mark.parametrize(
    ("value", "fits"), [(b"x" * 580_000, True), ("x" * 780_000, True), (b"x" * 600_000, False), ("x" * 800_000, False)]
)
def test_the_sizes_of_the_guide_are_right(kit, value, fits):
    if fits:
        assert deferred.defer(tasks.keywords, x=value).size < 10_240
    else:
        with pytest.raises(TaskTooLargeError):
            deferred.defer(tasks.keywords, x=value)


def test_an_oversize_task_returns_what_it_returned(kit):
    task = deferred.defer(tasks.keywords, x="y" * 20_000)
    key = kit.verify(task.payload).blob["id"]
    assert deferred.run_from_datastore(key) == deferred.run(deferred.serialize(tasks.keywords, x="y" * 20_000))


def test_an_option_that_is_none_is_no_argument_of_the_callable(kit):
    with pytest.raises(TypeError, match="did you mean _queue"):
        deferred.defer(tasks.keywords, _quue="mail")
    assert kit.waiting() == []


def test_a_naive_time_is_refused_and_a_time_within_30_days_is_not(kit):
    with pytest.raises(deferred.InvalidEtaError):
        deferred.defer(tasks.add, 1, _eta=datetime.now())
    with pytest.raises(deferred.InvalidEtaError):
        deferred.defer(tasks.add, 1, _eta=datetime.now(UTC) + timedelta(days=31))
    assert deferred.defer(tasks.add, 1, _eta=datetime.now(UTC) + timedelta(days=29))


@pytest.fixture
def shop(monkeypatch):
    """Return a module of Huey's tasks."""
    module = ModuleType(NAME)
    module.huey = huey.MemoryHuey(immediate=True)
    module.DONE = []
    exec(
        "@huey.task(retries=2)\ndef scale(name, width=100):\n    DONE.append((name, width))\n"
        "def upload(name):\n    scale(name)\n    scale.schedule((name, 200), delay=0)\n",
        vars(module),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, NAME, module)
    return module


def test_a_small_application_on_huey_is_moved_as_its_guide_says(shop):
    shop.upload("cat")
    assert shop.DONE == [("cat", 100), ("cat", 200)]  # as it was
    shop.DONE.clear()
    exec(
        "from safedefer import deferred\ndef upload(name):\n    deferred.defer(scale, name)\n    deferred.defer(scale, name, 200, _countdown=0)\n",
        vars(shop),
    )
    with TestApp(Policy(NAME)) as kit:
        shop.upload("cat")
        assert shop.DONE == []
        kit.run_due()
    assert shop.DONE == [("cat", 100), ("cat", 200)]
