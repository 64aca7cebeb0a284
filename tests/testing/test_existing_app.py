"""An application of README.md in test mode: ``TestApp(app)``."""

import asyncio
import contextvars
import io
import operator
import sqlite3
import threading
import time
from contextlib import closing

import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import create_async_engine

from safedefer import App, Key, Keyring, PermanentTaskFailure, Policy, TaskRetryOptions, deferred
from safedefer.dispatcher.loop import Dispatcher, InProcessDelivery
from safedefer.errors import (
    BadTransactionStateError,
    ConfigurationError,
    InvalidArguments,
    NotDeferrable,
    UnencodableArgument,
    UnknownQueueError,
)
from safedefer.events import TaskEnqueued
from safedefer.testing import Clock, TaskFailed, TestApp
from tests.testing import shop
from tests.unit.apps import JOSE, Recorder, make_app


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Run in an empty folder, which stays empty: nothing is written into the file of the developer."""
    monkeypatch.chdir(tmp_path)
    shop.DONE.clear()
    yield
    assert list(tmp_path.glob("tasks.db*")) == []
    assert deferred.configured_app() is None


@pytest.fixture
def tasks():
    with TestApp(shop.app) as tasks:
        yield tasks


# --- The README's own form ---


def test_three_lines_test_the_application_of_the_readme():
    with TestApp(shop.app) as tasks:
        shop.pay(42)
        tasks.assert_deferred(shop.send_receipt, 42)


def test_its_tasks_run_and_it_is_what_it_was_afterwards():
    before = dict(vars(shop.app))
    with TestApp(shop.app) as tasks:
        shop.pay(42)
        assert [(ran.callable, ran.outcome) for ran in tasks.run_due()] == [
            ("tests.testing.shop:send_receipt", "succeeded")
        ]
        assert shop.DONE == [(42, None)]
    assert vars(shop.app) == before


def test_a_deferral_that_a_module_keeps_obeys_the_test(tasks):
    shop.mail.defer(shop.send_receipt, 1)
    tasks.assert_deferred(shop.send_receipt, 1, queue="mail", countdown=60)
    shop.mail.defer_many([(shop.send_receipt, (2,), {})])
    asyncio.run(shop.mail.defer_async(shop.send_receipt, 3))
    assert [task.args for task in tasks.deferred_tasks] == [(1,), (2,), (3,)]


def test_the_functions_of_deferred_use_it_too(tasks):
    deferred.defer(shop.send_receipt, 7, _countdown=5)
    tasks.assert_deferred(shop.send_receipt, 7, countdown=5)
    assert deferred.current_app() is shop.app


def test_an_app_that_was_configured_stays_that_of_deferred():
    other = make_app()
    deferred.configure(other)
    try:
        with TestApp(shop.app):
            assert deferred.current_app() is other
            with TestApp(other), TestApp(shop.app):
                assert deferred.current_app() is shop.app
            with pytest.raises(ConfigurationError, match="not in test mode"):
                deferred.defer(len, [])
    finally:
        deferred.configure(None)


# --- What a test with the kit catches ---


def test_it_catches_a_lambda(tasks):
    with pytest.raises(NotDeferrable, match="lambda"):
        shop.app.defer(lambda: None)


@pytest.mark.parametrize("call", [((), {}), ((1, 2), {}), ((1,), {"copy": "a"})])
def test_it_catches_a_wrong_argument(tasks, call):
    with pytest.raises(TypeError, match="does not take these arguments"):
        shop.app.defer(shop.send_receipt, *call[0], **call[1])
    assert tasks.deferred_tasks == []


def test_it_catches_an_argument_of_another_value(tasks):
    shop.pay("42")
    with pytest.raises(AssertionError, match=r"not deferred: .*send_receipt\(42\); deferred:\n.*send_receipt\('42'\)"):
        tasks.assert_deferred(shop.send_receipt, 42)


def test_it_catches_an_argument_that_cannot_travel(tasks):
    with pytest.raises(UnencodableArgument) as caught:
        shop.app.defer(shop.keep, {"lock": [threading.Lock()]})
    assert caught.value.path == "$.args[0].lock[0]"


def test_it_catches_an_argument_that_does_not_survive(tasks):
    shop.app.defer(shop.keep, shop.Fragile())
    with pytest.raises(InvalidArguments):
        assert tasks.deferred_tasks
    with pytest.raises(TaskFailed, match="broken on the way"):
        tasks.run_due()


def test_it_catches_a_policy_that_does_not_name_the_task(tasks):
    with pytest.raises(NotDeferrable, match="operator:add"):
        shop.app.defer(operator.add, 1, 2)
    for assertion in (tasks.assert_deferred, tasks.refute_deferred):
        with pytest.raises(NotDeferrable):
            assertion(operator.add, 1, 2)


def test_it_catches_the_mutation_of_an_argument_after_the_call(tasks):
    basket = ["bread"]
    shop.app.defer(shop.keep, basket)
    basket.append("wine")
    (task,) = tasks.deferred_tasks
    assert task.args == (["bread"],)


# --- Nothing goes elsewhere ---


def enqueuing_ways(app):
    def with_transaction():
        with closing(sqlite3.connect(":memory:")) as connection, app.transaction(connection):
            app.options(transactional=True).defer(len, [])

    return {
        "defer": lambda: app.defer(len, []),
        "async": lambda: asyncio.run(app.defer_async(len, [])),
        "many": lambda: app.defer_many([(len, ([],), {})]),
        "none": lambda: app.defer_many([]),
        "options": lambda: app.options(queue="a").defer(len, []),
        "unique": lambda: app.options(unique=True).defer(len, []),
        "transaction": with_transaction,
        "deferral": lambda: KEPT[0].defer(len, []),
    }


KEPT = []


@pytest.mark.parametrize("way", sorted(enqueuing_ways(None)))
@pytest.mark.parametrize("mode", ["of another", "of patterns"])
def test_an_app_that_enqueues_for_real_is_refused(way, mode):
    real = make_app(queue="sqlite:///tasks.db")
    KEPT[:] = [real.options(countdown=1)]
    with (
        TestApp(shop.app) if mode == "of another" else TestApp("tests.sample_tasks"),
        pytest.raises(ConfigurationError, match=r"not in test mode.*TestApp\(app\)"),
    ):
        enqueuing_ways(real)[way]()


@pytest.mark.parametrize("way", sorted({*enqueuing_ways(None), "retry"} - {"none"}))
def test_an_app_with_an_open_queue_is_refused_too_and_serves_again_afterwards(way):
    real = make_app(policy=Policy("tests.testing.shop", "builtins:len"))
    dead = real.options(retry_options=TaskRetryOptions(task_retry_limit=0)).defer(shop.fails, "x")
    KEPT[:] = [real.options(countdown=1)]
    ways = {**enqueuing_ways(real), "retry": lambda: real.retry(dead.id)}
    asyncio.run(Dispatcher(real.queue, InProcessDelivery(real.handle), clock=time.time).run_until_empty())
    with TestApp(shop.app) as tasks:
        with pytest.raises(ConfigurationError, match="not in test mode"):
            ways[way]()
        assert tasks.deferred_tasks == []
        assert [view.state for view in real.queue.tasks()] == ["dead"]
    ways[way]()
    real.outbox.sweep()
    assert [view.state for view in real.queue.tasks()].count("waiting") == 1
    real.close()


def test_tokens_of_a_test_are_worth_nothing_elsewhere(tasks):
    token = shop.app.serialize(shop.keep, 1)
    assert tasks.run(token) is None
    with TestApp(shop.app) as inner, pytest.raises(Exception, match="key|signature|MAC"):
        inner.run(token)


def test_the_limits_of_its_keys_stay(tasks):
    assert [(key.kid, str(key.state), key.queues) for key in tasks.keyring.keys] == [
        ("k1", "active", None),
        ("old", "verify_only", frozenset({"mail"})),
    ]


def test_two_apps_may_be_in_test_mode():
    other = make_app(queue="sqlite:///tasks.db")
    with TestApp(shop.app) as mine, TestApp(other) as theirs:
        shop.pay(1)
        other.defer(len, [])
        assert [len(each.deferred_tasks) for each in (mine, theirs)] == [1, 1]


def test_a_test_mode_inside_another_has_its_own_tasks(tasks):
    shop.pay(1)
    with TestApp(shop.app) as inner:
        shop.pay(2)
        assert [task.args for task in inner.deferred_tasks] == [(2,)]
        with pytest.raises(ConfigurationError, match="active already"):
            inner.__enter__()
    shop.pay(3)
    assert [task.args for task in tasks.deferred_tasks] == [(1,), (3,)]


def test_what_its_relay_has_to_move_waits_until_the_test_is_over(tmp_path):
    """The relay asks the App for its queue: it must not put a real task into the queue of a test."""
    real = make_app()
    connection = sqlite3.connect(tmp_path / "shop.db")
    connection.execute("BEGIN")
    with real.transaction(connection):
        real.options(transactional=True).defer(len, [])
    outbox = real.outbox
    with TestApp(real) as tasks:
        connection.commit()
        assert outbox.sweep() == 0
        assert tasks.deferred_tasks == []
        with TestApp(real):
            assert outbox.sweep() == 0
        assert outbox.sweep() == 0
    outbox.sweep()
    assert [view.callable_name for view in real.queue.tasks()] == ["builtins:len"]
    connection.close()
    real.close()


def test_an_app_that_closes_itself_can_be_looked_at(tasks):
    shop.pay(1)
    shop.app.close()
    tasks.assert_deferred(shop.send_receipt, 1)
    assert len(tasks.run_due()) == 1


def test_one_app_or_patterns():
    with pytest.raises(ConfigurationError, match="one App, or patterns"):
        TestApp(shop.app, "tests.sample_tasks")


# --- As in production ---


def test_its_queue_yaml_holds(tmp_path):
    yaml = tmp_path / "queue.yaml"
    yaml.write_text(
        "queue:\n- name: mail\n  rate: 1/s\n  bucket_size: 2\n  retry_parameters:\n    task_retry_limit: 0\n"
        "  attempt_deadline: 7\n"
    )
    app = make_app(queue="sqlite:///tasks.db", queue_yaml=yaml, policy=Policy("tests.testing.shop"))
    with TestApp(app) as tasks:
        for number in range(5):
            app.options(queue="mail").defer(shop.keep, number)
        assert len(tasks.run_due()) == 2
        assert tasks.run_due() == []
        tasks.clock.advance(1)
        assert len(tasks.run_due()) == 1
        tasks.clock.advance(60)
        assert len(tasks.run_due()) == 2
        assert shop.DONE == [0, 1, 2, 3, 4]
        app.options(queue="mail").defer(shop.fails, "once")
        tasks.clock.advance(1)
        tasks.run_due(raises=False)
        assert [view.reason for view in tasks.dead()] == ["retry-limit"]
        with pytest.raises(UnknownQueueError):
            app.options(queue="fax").defer(shop.keep, 1)
        assert tasks.delivery_options.deadlines == {"mail": 7.0}


def test_its_handler_answers_in_the_test(tasks):
    task = shop.pay(1)
    status, headers, _ = asyncio.run(shop.app.handle(JOSE, task.payload))
    assert (status, headers["Safedefer-Outcome"]) == (200, "succeeded")
    assert [ran.outcome for ran in tasks.run_due()] == ["duplicate"]
    assert shop.DONE == [(1, None)]


def test_its_own_observer_and_what_is_around_a_run_are_there():
    entered = []
    recorder = Recorder()

    class Session:
        def __enter__(self):
            entered.append("in")

        def __exit__(self, *_):
            entered.append("out")

    app = make_app(observer=recorder, around=[Session], policy=Policy("tests.testing.shop"))
    with TestApp(app) as tasks:
        app.defer(shop.keep, 1)
        tasks.run_due()
        app.set_log_level(10)
    assert entered == ["in", "out"]
    assert [type(event).__name__ for event in recorder.events] == ["TaskEnqueued", "TaskStarted", "TaskHandled"]
    assert isinstance(recorder.events[0], TaskEnqueued)


def test_an_oversize_task_and_its_arguments(tasks):
    shop.app.defer(shop.keep, "x" * 20_000)
    tasks.assert_deferred(shop.keep, "x" * 20_000)
    tasks.run_due()
    assert shop.DONE == ["x" * 20_000]
    tasks.assert_deferred(shop.keep, "x" * 20_000)


def test_a_large_task_that_has_expired_is_refused(tasks):
    shop.app.defer(shop.keep, "x" * 100_000)
    tasks.clock.advance(32 * 86_400)
    assert [(ran.outcome, ran.reason) for ran in tasks.run_due(raises=False)] == [("failed", "expired-task")]
    assert shop.DONE == []


def test_a_handler_that_is_down_charges_nothing(tasks):
    shop.pay(1)
    shop.pay(2)
    with tasks.handler_down():
        assert tasks.run_due() == []
        assert [(view.attempts, view.reason) for view in tasks.waiting()] == [(0, "unreachable")] * 2
    assert tasks.run_due() == []
    tasks.clock.advance(1)
    assert [ran.outcome for ran in tasks.run_due()] == ["succeeded"] * 2


def test_the_next_attempts_fail_as_they_are_told(tasks):
    tasks.fail_next(shop.keep, ConnectionError("the mail server"), times=2)
    shop.app.options(retry_options=TaskRetryOptions(min_backoff_seconds=10)).defer(shop.keep, 1)
    shop.pay(1)
    with pytest.raises(TaskFailed, match="1 of 2 .*failed") as caught:
        tasks.run_due()
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert shop.DONE == [(1, None)]
    tasks.clock.advance(9.9)
    assert tasks.run_due() == []
    tasks.clock.advance(0.1)
    (again,) = tasks.run_due(raises=False)
    assert (again.outcome, again.reason, again.failed) == ("retry", "exception", True)
    assert "the mail server" in again.traceback
    tasks.clock.advance(20)
    assert [ran.outcome for ran in tasks.run_due()] == ["succeeded"]


def test_a_permanent_failure_makes_a_dead_letter(tasks):
    tasks.fail_next(shop.pay_later, PermanentTaskFailure)
    shop.app.defer(shop.pay_later, 1)
    assert [ran.outcome for ran in tasks.run_due(raises=False)] == ["failed"]
    assert [view.reason for view in tasks.dead()] == ["permanent-task-failure"]
    with pytest.raises(NotDeferrable):
        tasks.fail_next(len)


def test_a_clock_that_jumps(tasks):
    shop.app.options(countdown=60).defer(shop.keep, 1)
    shop.app.defer(shop.keep, 2)
    tasks.clock.jump(-3600)
    assert tasks.run_due() == []
    (refused,) = [view for view in tasks.waiting() if view.eta <= tasks.clock() + 3600]
    answer = asyncio.run(shop.app.handle(JOSE, refused.token))
    assert (answer.status, answer.headers["Safedefer-Outcome"]) == (503, "early")
    tasks.clock.jump(3700)
    assert len(tasks.run_due()) == 2


# --- Where it runs ---


def test_plain_callables_run_in_this_thread_outside_any_loop(tasks):
    shop.app.defer(shop.where)
    shop.app.defer(shop.nested_loop)
    tasks.run_due()
    assert shop.DONE == [threading.get_ident(), "a loop of its own"]


def test_coroutines_run_in_this_thread_too(tasks):
    connection = sqlite3.connect(":memory:")  # of this thread alone
    shop.DONE.append(connection)
    shop.app.defer(shop.pay_later, 3)
    shop.app.defer(shop.loop_of)
    assert [ran.outcome for ran in tasks.run_due()] == ["succeeded"] * 3
    assert shop.DONE[1:2] != []
    connection.close()


def test_tasks_run_in_an_empty_context(tasks):
    secret = contextvars.ContextVar("secret", default=None)
    SEEN.clear()
    PROBE[:] = [lambda: SEEN.append(secret.get())]
    secret.set("of the test")
    with TestApp("tests.testing.test_existing_app") as mine:
        mine.defer(probe)
        mine.run_due()
    assert SEEN == [None]


SEEN, PROBE = [], []


def probe():
    PROBE[0]()


async def test_inside_a_loop_it_runs_in_another_thread(tasks):
    await shop.app.defer_async(shop.where)
    tasks.run_due()
    assert shop.DONE != [threading.get_ident()]
    assert len(shop.DONE) == 1


async def test_coroutines_share_the_loop_of_the_test(tasks):
    await shop.app.defer_async(shop.loop_of)
    await shop.app.defer_async(shop.where)
    await tasks.run_due_async()
    assert shop.DONE[0] is asyncio.get_running_loop()
    assert shop.DONE[1] != threading.get_ident()


def test_tasks_run_in_the_order_in_which_they_are_due(tasks):
    for number, countdown in ((1, 30), (2, 10), (3, 20), (4, 10)):
        shop.app.options(countdown=countdown).defer(shop.keep, number)
    tasks.clock.advance(30)
    tasks.run_due()
    assert shop.DONE == [2, 4, 3, 1]


def test_a_task_that_is_to_be_retried_at_once_is_tried_once(tasks):
    shop.app.options(retry_options=TaskRetryOptions(min_backoff_seconds=0, max_backoff_seconds=0)).defer(
        shop.waits_for_ever, "again"
    )
    assert [ran.reason for ran in tasks.run_due(raises=False)] == ["singular-task-failure"]
    assert [ran.reason for ran in tasks.run_due(raises=False)] == ["singular-task-failure"]
    assert shop.DONE == ["again", "again"]


def test_a_task_may_not_run_the_others(tasks):
    shop.TESTS[:] = [tasks]
    shop.app.defer(shop.runs_due)
    with pytest.raises(TaskFailed, match="RuntimeError: tasks run already"):
        tasks.run_due()


def test_the_interrupt_of_the_developer_ends_the_test(tasks):
    shop.app.defer(shop.interrupted)
    with pytest.raises(KeyboardInterrupt):
        tasks.run_due()


def test_a_frozen_clock_of_the_process_stops_nothing(tasks):
    freezegun = pytest.importorskip("freezegun")
    with freezegun.freeze_time("2030-01-01"), TestApp(shop.app) as frozen:
        shop.app.defer(shop.loop_of)
        shop.app.defer(shop.keep, 1)
        assert len(frozen.run_due()) == 2
        assert frozen.clock.now.year == 2030


# --- Inline ---


def test_inline_runs_at_once_by_the_token():
    with TestApp(shop.app, inline=True) as tasks:
        shop.app.defer(shop.keep, [1, (2,)])
        assert shop.DONE == [[1, (2,)]]
        shop.app.defer_many([(shop.keep, (3,), {}), (shop.keep, (4,), {})])
        asyncio.run(shop.app.defer_async(shop.keep, 5))
        assert shop.DONE[1:] == [3, 4, 5]
        shop.app.defer(shop.keep, [value := []])
        assert shop.DONE[-1] == [[]]
        assert shop.DONE[-1][0] is not value
        with pytest.raises(UnencodableArgument):
            shop.app.defer(shop.keep, threading.Lock())
        assert len(tasks.deferred_tasks) == 5


def test_inline_raises_what_failed_and_waits_for_what_is_not_due():
    with TestApp(shop.app, inline=True) as tasks:
        with pytest.raises(TaskFailed, match="ValueError: no"):
            shop.app.defer(shop.fails, "no")
        shop.mail.defer(shop.keep, 1)
        assert shop.DONE == ["no"]
        tasks.clock.advance(60)
        assert len(tasks.run_due(raises=False)) == 2


def test_inline_tasks_of_tasks_run_after_them():
    with TestApp(shop.app, inline=True):
        shop.app.defer(shop.pay_again, 30)
    assert shop.DONE == list(range(30, -1, -1))


async def test_inline_works_inside_a_loop():
    with TestApp(shop.app, inline=True):
        shop.app.defer(shop.keep, 1)
        await shop.app.defer_async(shop.pay_later, 2)
        assert shop.DONE == [1, (2, None)]


def test_inline_leaves_the_tasks_of_a_transaction_until_it_is_committed():
    with closing(sqlite3.connect(":memory:")) as connection, TestApp(shop.app, inline=True) as tasks:
        with shop.app.transaction(connection):
            shop.app.options(transactional=True).defer(shop.keep, 1)
            shop.app.options(transactional=True).defer_many([(shop.keep, (2,), {})])
            assert shop.DONE == []
        tasks.run_due()
        assert sorted(shop.DONE) == [1, 2]


# --- Transactions ---


def test_a_transaction_in_memory_that_the_test_commits(tasks):
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE orders (id INTEGER)")
    connection.execute("INSERT INTO orders VALUES (1)")  # begins a transaction
    with shop.app.transaction(connection):
        shop.app.options(transactional=True).defer(shop.keep, 1)
    tasks.refute_deferred(shop.keep)
    connection.commit()
    tasks.assert_deferred(shop.keep, 1)
    connection.execute("INSERT INTO orders VALUES (1)")
    with shop.app.transaction(connection):
        shop.app.options(transactional=True).defer(shop.keep, 2)
    connection.rollback()
    tasks.refute_deferred(shop.keep, 2)
    with pytest.raises(BadTransactionStateError):
        shop.app.options(transactional=True).defer(shop.keep, 3)
    connection.close()


def test_a_connection_in_memory_may_be_closed_after_its_block(tasks):
    connection = sqlite3.connect(":memory:")
    with shop.app.transaction(connection):
        shop.app.options(transactional=True).defer(shop.keep, 1)
    connection.close()
    tasks.assert_deferred(shop.keep, 1)


def test_one_that_is_closed_before_its_commit_was_seen_is_an_error(tasks):
    connection = sqlite3.connect(":memory:")
    connection.execute("BEGIN")
    with shop.app.transaction(connection):
        shop.app.options(transactional=True).defer(shop.keep, 1)
    connection.commit()
    connection.close()
    with pytest.raises(BadTransactionStateError, match="close a connection to a database in memory after"):
        tasks.run_due()


def test_a_task_that_defers_with_a_transaction_of_its_own(tasks):
    shop.app.defer(shop.pay_with_transaction, 3)
    assert [ran.callable for ran in tasks.run_due()] == [
        "tests.testing.shop:pay_with_transaction", "tests.testing.shop:keep",
    ]  # fmt: skip
    assert shop.DONE == [3]


async def test_it_does_so_inside_a_loop_too(tasks):
    await shop.app.defer_async(shop.pay_with_transaction, 3)
    assert len(await tasks.run_due_async()) == 2


def test_a_transaction_of_a_file(tasks, tmp_path):
    connection = sqlite3.connect(tmp_path / "shop.db")
    with shop.app.transaction(connection):
        shop.app.options(transactional=True).defer(shop.keep, 1)
    assert [ran.outcome for ran in tasks.run_due()] == ["succeeded"]
    connection.close()


def test_a_session_of_sqlalchemy_in_memory(tasks):
    engine = sqlalchemy.create_engine("sqlite://", poolclass=sqlalchemy.StaticPool)
    with sqlalchemy.orm.Session(engine) as session:
        session.execute(sqlalchemy.text("SELECT 1"))  # begins a transaction
        with shop.app.transaction(session):
            shop.app.options(transactional=True).defer(shop.keep, 1)
        tasks.refute_deferred(shop.keep)
        session.commit()
        assert len(tasks.run_due()) == 1
    engine.dispose()


async def test_an_awaited_connection_in_memory(tasks):
    pytest.importorskip("aiosqlite")  # of the extra "test"
    engine = create_async_engine("sqlite+aiosqlite://", poolclass=sqlalchemy.StaticPool)
    async with engine.connect() as connection:
        async with shop.app.transaction(connection):
            await shop.app.options(transactional=True).defer_async(shop.keep, 1)
        assert len(await tasks.run_due_async()) == 1
    await engine.dispose()


# --- The rest ---


def test_a_subclass_keeps_what_is_its_own():
    class Own(App):
        def __init__(self):
            super().__init__(
                keyring=Keyring(Key("k", bytes(range(40)))),
                policy=Policy("tests.testing.shop"),
                queue="sqlite:///tasks.db",
            )
            self.clock = "its own"

    own = Own()
    with TestApp(own) as tasks:
        own.defer(shop.keep, 1)
        own.count = 3
        assert len(tasks.run_due()) == 1
        assert own.clock == "its own"
    assert own.count == 3


def test_settings_of_the_test_count_before_the_apps():
    with TestApp(shop.app, environment="ci", clock=Clock(1_900_000_000)) as tasks:
        assert shop.app.environment == "ci"
        assert shop.pay(1).eta.timestamp() == tasks.clock()
    assert shop.app.environment == "prod"


def test_the_wsgi_application_of_a_test_ends_with_it():
    def loops():
        return {thread for thread in threading.enumerate() if thread.name == "safedefer-wsgi"}

    before = loops()
    with TestApp(shop.app) as tasks:
        wsgi = shop.app.wsgi
        body = shop.pay(1).payload
        environ = {
            "REQUEST_METHOD": "POST", "PATH_INFO": "/_ah/queue/deferred", "SCRIPT_NAME": "", "CONTENT_LENGTH": str(len(body)),
            "CONTENT_TYPE": "application/jose", "wsgi.input": io.BytesIO(body),
        }  # fmt: skip
        answers = []
        assert b"".join(wsgi(environ, lambda status, headers: answers.append(status))) == b"succeeded\n"
        assert answers == ["200 OK"]
        assert len(loops() - before) == 1
        assert [ran.outcome for ran in tasks.run_due()] == ["duplicate"]
    assert loops() == before
    assert vars(shop.app).get("_wsgi") is None
