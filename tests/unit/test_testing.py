"""``safedefer.testing``, as the users of safedefer would use it in their own tests."""

from datetime import UTC, datetime

import pytest

from safedefer import Policy, TaskRetryOptions, deferred
from safedefer.errors import ConfigurationError, NotDeferrable
from safedefer.testing import Clock, TaskFailed, TestApp
from tests import sample_tasks as tasks


@pytest.fixture
def app():
    tasks.reset()
    with TestApp("tests.sample_tasks") as app:
        yield app


def test_what_is_due_runs_and_is_reported(app):
    deferred.defer(tasks.add, 1, 2)
    deferred.defer(tasks.add_later, 3)
    ran = app.run_due()
    assert sorted((one.callable, one.outcome, one.status, one.reason) for one in ran) == [
        ("tests.sample_tasks:add", "succeeded", 200, None),
        ("tests.sample_tasks:add_later", "succeeded", 200, None),
    ]
    assert len(tasks.RAN) == 2
    assert app.run_due() == []


def test_the_clock_is_moved_by_hand(app):
    deferred.defer(tasks.add, 1, _countdown=3600)
    assert app.run_due() == []
    assert [view.callable_name for view in app.waiting()] == ["tests.sample_tasks:add"]
    app.clock.advance(3599)
    assert app.run_due() == []
    app.clock.advance(1)
    assert len(app.run_due()) == 1
    assert app.waiting() == []


def test_a_failure_raises_with_the_traceback(app):
    deferred.defer(tasks.fail, "the reason")
    with pytest.raises(
        TaskFailed, match=r"(?s)1 of 1 .*tests\.sample_tasks:fail: retry.*ValueError: the reason"
    ) as caught:
        app.run_due()
    assert [one.outcome for one in caught.value.ran] == ["retry"]


def test_a_failure_is_reported_if_asked_and_tried_again_later(app):
    deferred.defer(tasks.fail_once, _retry_options=TaskRetryOptions(min_backoff_seconds=60))
    assert [one.outcome for one in app.run_due(raises=False)] == ["retry"]
    app.clock.advance(60)
    assert [one.outcome for one in app.run_due()] == ["succeeded"]


def test_dead_letters_are_seen(app):
    deferred.defer(tasks.permanent)
    assert [one.outcome for one in app.run_due(raises=False)] == ["failed"]
    assert [view.reason for view in app.dead()] == ["permanent-task-failure"]


def test_tasks_that_tasks_defer_run_too(app):
    deferred.defer(tasks.defer_another, 3)
    assert len(app.run_due()) == 4
    assert tasks.RAN == [3, 2, 1, 0]


async def test_it_works_in_an_async_test_too(app):
    deferred.defer(tasks.add, 1)
    assert len(app.run_due()) == 1
    await deferred.defer_async(tasks.loop_thread_name)
    assert len(await app.run_due_async()) == 1
    with pytest.raises(TaskFailed):
        deferred.defer(tasks.fail)
        await app.run_due_async()


def test_what_production_refuses_is_refused(app):
    with pytest.raises(NotDeferrable):
        deferred.defer(lambda: None)
    with pytest.raises(TypeError):
        deferred.defer(tasks.add)
    with TestApp() as strict, pytest.raises(NotDeferrable):
        strict.defer(tasks.add, 1)


def test_the_app_from_before_is_used_again():
    with TestApp("tests.sample_tasks") as outer:
        with TestApp(Policy("tests.sample_tasks")) as inner:
            assert deferred.current_app() is inner
        assert deferred.current_app() is outer
    assert deferred.configured_app() is None


def test_a_clock_begins_where_it_is_told_and_goes_forwards():
    clock = Clock(datetime(2030, 1, 1, tzinfo=UTC))
    clock.advance(1.5)
    assert clock.now == datetime(2030, 1, 1, 0, 0, 1, 500_000, tzinfo=UTC)
    assert clock() == clock.now.timestamp()
    with pytest.raises(ValueError, match="forwards"):
        clock.advance(-1)


def test_patterns_and_a_policy_are_alternatives():
    with pytest.raises(ConfigurationError, match="either patterns or one Policy"):
        TestApp("tests.sample_tasks", Policy())
