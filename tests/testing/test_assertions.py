"""``assert_deferred``, ``refute_deferred``, ``deferred_tasks``."""

from datetime import UTC, datetime, timedelta
from unittest.mock import ANY

import pytest

from safedefer import Policy, TaskRetryOptions
from safedefer.testing import Clock, TestApp
from tests.testing import shop


@pytest.fixture
def tasks():
    shop.DONE.clear()
    with TestApp(shop.app, policy=Policy("tests.testing.shop", "builtins:len", "builtins:list.append")) as tasks:
        yield tasks


def defer(tasks, *args, **kwargs):
    return tasks.app.defer(shop.send_receipt, *args, **kwargs)


def test_arguments_are_compared_by_parameter_with_defaults(tasks):
    defer(tasks, 1)
    for args, kwargs in (((1,), {}), ((), {"order_id": 1}), ((1,), {"copy_to": None}), ((ANY,), {})):
        tasks.assert_deferred(shop.send_receipt, *args, **kwargs)
    for args, kwargs in (((2,), {}), ((1,), {"copy_to": "a"})):
        tasks.refute_deferred(shop.send_receipt, *args, **kwargs)
        with pytest.raises(AssertionError, match="not deferred"):
            tasks.assert_deferred(shop.send_receipt, *args, **kwargs)


def test_without_arguments_any_will_do_and_empty_kwargs_ask_for_none(tasks):
    tasks.app.defer(shop.where)
    defer(tasks, 1)
    tasks.assert_deferred(shop.send_receipt)
    tasks.assert_deferred(shop.where, kwargs={})
    with pytest.raises(AssertionError, match=r"deferred, 1 times: .*send_receipt\(\.\.\.\)\n.*send_receipt\(1\)"):
        tasks.refute_deferred(shop.send_receipt)
    tasks.refute_deferred(shop.keep)


def test_a_call_that_could_never_be_is_an_error_of_the_assertion(tasks):
    for assertion in (tasks.assert_deferred, tasks.refute_deferred):
        with pytest.raises(TypeError, match="correct the assertion"):
            assertion(shop.send_receipt, 1, 2)
        with pytest.raises(TypeError, match="correct the assertion"):
            assertion(shop.send_receipt, order=1)
        with pytest.raises(TypeError, match="correct the assertion"):
            assertion(shop.send_receipt, kwargs={})


@pytest.mark.parametrize(
    ("option", "right", "wrong"),
    [
        ("queue", "mail", "default"),
        ("name", "r-1", None),
        ("countdown", 90, 91),
        ("countdown", 90.0, None),
        ("eta", datetime(2030, 1, 1, 0, 1, 30, tzinfo=UTC), datetime(2030, 1, 1, tzinfo=UTC)),
    ],
)
def test_options_are_compared(option, right, wrong):
    with TestApp(shop.app, clock=Clock(datetime(2030, 1, 1, tzinfo=UTC))) as tasks:
        shop.app.options(queue="mail", name="r-1", countdown=90).defer(shop.send_receipt, 1)
        tasks.assert_deferred(shop.send_receipt, 1, **{option: right})
        tasks.refute_deferred(shop.send_receipt, 1, **{option: wrong})
        with pytest.raises(AssertionError, match=rf"{option}=.*\n.*queue='mail', name='r-1', countdown=90"):
            tasks.assert_deferred(shop.send_receipt, **{option: wrong})


def test_none_is_no_name_and_no_countdown(tasks):
    defer(tasks, 1)
    tasks.assert_deferred(shop.send_receipt, 1, name=None, countdown=None, queue="default")
    tasks.refute_deferred(shop.send_receipt, 1, name="a")


def test_keywords_of_the_task_that_are_named_like_options(tasks):
    tasks.app.options(queue="mail").defer(shop.enqueue, "fax", name="n", countdown=3)
    tasks.assert_deferred(shop.enqueue, queue="mail", kwargs={"queue": "fax", "name": "n", "countdown": 3})
    tasks.assert_deferred(shop.enqueue, "fax", kwargs={"name": "n", "countdown": 3})
    tasks.refute_deferred(shop.enqueue, queue="fax")
    tasks.refute_deferred(shop.enqueue, kwargs={"queue": "mail", "name": "n", "countdown": 3})


def test_methods_belong_to_equal_objects(tasks):
    tasks.app.defer(shop.Order(1).ship, "post")
    tasks.assert_deferred(shop.Order(1).ship, "post")
    tasks.refute_deferred(shop.Order(2).ship, "post")
    tasks.app.defer(shop.Ticket(1).close)
    tasks.assert_deferred(shop.Ticket(1).close)
    tasks.refute_deferred(shop.Ticket(2).close)
    tasks.app.defer(shop.Slotted(1))
    tasks.assert_deferred(shop.Slotted(1))
    tasks.refute_deferred(shop.Slotted(2))
    tasks.app.defer(shop.keep, shop.Ticket(3))
    tasks.assert_deferred(shop.keep, shop.Ticket(3))
    tasks.refute_deferred(shop.keep, shop.Ticket(4))
    tasks.refute_deferred(shop.keep, shop.Order(3))
    tasks.app.defer(shop.Order, 5)
    tasks.assert_deferred(shop.Order, 5)


def test_builtins(tasks):
    tasks.app.defer(len, [1])
    tasks.app.defer([2].append, 3)
    tasks.assert_deferred(len, [1])
    tasks.assert_deferred([2].append, 3)
    tasks.refute_deferred([3].append, 3)


def test_the_task_that_was_found_says_all_of_it(tasks):
    retry = TaskRetryOptions(task_retry_limit=3)
    options = tasks.app.options(
        queue="mail", countdown=5, retry_options=retry, headers={"X-Shop": "1"}, url="/tasks/x", target="worker"
    )
    sent = options.defer(shop.send_receipt, 1, copy_to="a")
    found = tasks.assert_deferred(shop.send_receipt, 1, copy_to="a")
    assert found.eta == tasks.clock.now + timedelta(seconds=5)
    assert (found.id, found.callable, found.function) == (
        sent.id, "tests.testing.shop:send_receipt", shop.send_receipt,
    )  # fmt: skip
    assert (found.args, found.kwargs, found.queue, found.name) == ((1,), {"copy_to": "a"}, "mail", None)
    assert (found.url, found.target, found.headers, found.retry_options) == (
        "/tasks/x", "worker", {"X-Shop": "1"}, retry,
    )  # fmt: skip
    assert str(found) == "tests.testing.shop:send_receipt(1, copy_to='a'), queue='mail', countdown=5.0"


def test_what_ran_was_deferred_and_so_was_what_is_not_due(tasks):
    defer(tasks, 1)
    shop.mail.defer(shop.send_receipt, 2)
    tasks.run_due()
    assert [(task.args, task.countdown) for task in tasks.deferred_tasks] == [((1,), 0), ((2,), pytest.approx(60))]
    tasks.clock.advance(timedelta(days=60))  # expired, and listed all the same
    assert len(tasks.deferred_tasks) == 2


def test_of_a_unique_task_one_is_listed(tasks):
    for _ in range(3):
        tasks.app.options(unique=True).defer(shop.keep, 1)
    assert len(tasks.deferred_tasks) == 1


def test_pickled_arguments_are_decoded():
    import secrets

    from safedefer import Key, Keyring
    from tests.unit.apps import make_app

    app = make_app(
        keyring=Keyring(Key("k", secrets.token_bytes(32), pickle=True)),
        policy=Policy("tests.testing.shop"),
        allow_pickle=True,
    )
    with TestApp(app) as tasks:
        app.options(pickle=True).defer(shop.keep, {1, 2})
        tasks.assert_deferred(shop.keep, {1, 2})


def test_nothing_was_deferred(tasks):
    with pytest.raises(AssertionError, match=r"keep\(1\), queue='a'; deferred: nothing$"):
        tasks.assert_deferred(shop.keep, 1, queue="a")


def test_a_clock_takes_timedeltas_and_jumps_both_ways():
    clock = Clock(1000)
    clock.advance(timedelta(minutes=1))
    clock.jump(timedelta(minutes=-2))
    assert clock() == 940
    with pytest.raises(ValueError, match="jump"):
        clock.advance(timedelta(seconds=-1))
