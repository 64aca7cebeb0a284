"""Deadlines of attempts: what ends at them, what goes on, and what the ledger says of it."""

import asyncio
import contextlib
import math
import time

import pytest

from safedefer.codecs.typed import TypedCodec
from safedefer.concurrency.threads import Threads
from safedefer.delivery import runs
from safedefer.delivery.handler import DeliveryOptions
from safedefer.dispatcher.loop import Dispatcher
from safedefer.dispatcher.transport import HttpDelivery, InProcessDelivery
from safedefer.errors import ConfigurationError, QueueUnavailable
from safedefer.execution.context import TaskContext
from safedefer.execution.deadline import RunControl, Stop, deadline_of, stuck_limit
from safedefer.execution.run import CoroutineCancelled, Result, execute
from safedefer.queues.base import TaskState
from safedefer.queues.config import QueueFile
from tests import sample_tasks as tasks
from tests.unit.apps import JOSE, make_app, until


def app_with(seconds, **changes):
    file = QueueFile.parse(f"queue:\n- name: default\n  rate: 100/s\n  attempt_deadline: {seconds}\n")
    return make_app(queue_yaml=file, **changes)


@pytest.fixture
def make(request):
    """Make apps whose default queue has a deadline, and close them."""
    tasks.reset()
    made = []

    def make(seconds, **changes):
        made.append(app_with(seconds, **changes))
        return made[-1]

    yield make
    tasks.GATE.set()
    for app in made:
        app.close()


async def answer(app, token):
    status, headers, _ = await app.handle(JOSE, token)
    return status, headers["Safedefer-Outcome"]


@contextlib.asynccontextmanager
async def dispatching(app):
    """Deliver and settle: a run that failed does not begin again before its delivery is settled."""
    dispatcher = Dispatcher(app.queue, InProcessDelivery(app.handle), clock=time.time)
    running = asyncio.create_task(dispatcher.run())
    yield
    dispatcher.stop()
    await running


def records(app, task):
    return [(record.outcome, record.status, record.reason) for record in app.queue.find(task.id).records]


EXCEEDED = ("retry", 500, "deadline-exceeded")


@pytest.mark.parametrize(
    ("own", "queues", "default", "expected"),
    [
        (None, None, 600.0, 600.0),
        (None, 5.0, 600.0, 5.0),
        (None, 0, 600.0, None),
        (None, None, 0, None),
        (7, 5.0, 600.0, 7),
        (7, 0, 0, 7),
    ],
)
def test_the_tasks_own_deadline_counts_before_its_queues_and_the_default(own, queues, default, expected):
    assert deadline_of(own, queues, default) == expected


@pytest.mark.parametrize(("concurrency", "limit"), [(1, 2), (8, 2), (12, 3), (16, 4), (100, 25)])
def test_a_process_bears_a_quarter_of_its_slots_stuck(concurrency, limit):
    assert stuck_limit(concurrency) == limit


def test_a_call_for_a_thread_is_claimed_once():
    control = RunControl()
    assert not control.claim(), "there is no call yet"
    control.hand_over()
    assert [control.claim(), control.claim(), control.withdraw()] == [True, False, False]
    control.hand_over()
    assert [control.withdraw(), control.claim(), control.withdraw()] == [True, False, True]


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf, 86_401, "5", True])
def test_a_deadline_is_a_number_of_seconds_up_to_a_day(seconds):
    with pytest.raises(ConfigurationError, match="deadline"):
        DeliveryOptions(deadline=seconds)
    with pytest.raises(ConfigurationError, match="deadline"):
        DeliveryOptions(deadlines={"mail": seconds})


@pytest.mark.parametrize("text", ["-1", ".nan", ".inf", "86401", "5s", "true"])
def test_a_wrong_attempt_deadline_is_refused_with_its_line(text):
    with pytest.raises(ConfigurationError, match="line 3, queue.attempt_deadline"):
        QueueFile.parse(f"queue:\n- name: default\n  attempt_deadline: {text}\n")


def test_a_queue_file_gives_the_deadlines_that_are_declared():
    file = QueueFile.parse("queue:\n- name: a\n  rate: 1/s\n  attempt_deadline: 0\n- name: b\n  rate: 1/s\n")
    assert file.deadlines == {"a": 0.0}


async def test_a_coroutine_is_cancelled_at_its_deadline_and_may_run_again(make, caplog):
    app = make(1.0)
    task = app.defer(tasks.sleep_long)
    began = time.monotonic()
    assert await answer(app, task.payload) == (500, "retry")
    assert time.monotonic() - began < 100
    assert tasks.RAN == ["begun", "over"]
    assert records(app, task) == [EXCEEDED]
    assert "sleep_long" in app.queue.find(task.id).records[0].traceback
    (error,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert f"task {task.id} (tests.sample_tasks:sleep_long) passed its deadline of 1 s" in error.message
    assert "attempt_deadline in queue.yaml" in error.message
    async with dispatching(app):
        await until(lambda: tasks.RAN == ["begun", "over"] * 2)
        await until(lambda: not app.delivery.running)
    assert (app.delivery.stuck, app.delivery.running) == (0, 0)


async def test_another_error_that_the_cancellation_became_is_the_deadline_too(make):
    app = make(1.0)
    task = app.defer(tasks.clean_up_badly)
    assert await answer(app, task.payload) == (500, "retry")
    assert records(app, task) == [EXCEEDED]
    assert app.queue.find(task.id).records[0].exception_type == "builtins.ValueError"


async def test_without_a_deadline_nothing_ends(make):
    app = make(0)
    waiting = asyncio.create_task(answer(app, app.serialize(tasks.wait_for_gate)))
    await asyncio.to_thread(tasks.STARTED.wait, 30)
    tasks.GATE.set()
    assert await waiting == (200, "succeeded")


@pytest.mark.parametrize(
    ("function", "again"),
    [(tasks.wait_for_gate, ["waited"]), (tasks.suppress_cancellation, ["begun", "suppressed", "over"])],
)
async def test_what_cannot_be_stopped_goes_on_and_its_success_counts(make, monkeypatch, function, again):
    monkeypatch.setattr(runs, "GRACE", 0.2)
    app = make(1.0, lease_seconds=6.0)
    task = app.defer(function)
    assert await answer(app, task.payload) == (500, "retry")
    assert records(app, task) == [EXCEEDED]
    assert (app.delivery.stuck, app.delivery.running) == (1, 1)
    assert not await app.delivery.drained(0.1)
    extended = []
    extend = app.queue.ledger.extend_many

    def extend_many(executions, **more):
        extended.extend(executions)
        return extend(executions, **more)

    monkeypatch.setattr(app.queue.ledger, "extend_many", extend_many)
    await until(lambda: extended)  # its lease goes on
    assert await answer(app, task.payload) == (409, "running")
    tasks.GATE.set()
    await until(lambda: len(records(app, task)) == 2)
    assert records(app, task)[1] == ("succeeded", None, None)
    assert await answer(app, task.payload) == (200, "duplicate")
    assert [entry for entry in tasks.RAN if entry in again] == again
    assert (app.delivery.stuck, app.delivery.running) == (0, 0)
    assert await app.delivery.drained(0.1)


async def test_what_fails_after_its_deadline_is_tried_again_even_if_it_says_for_good(make):
    app = make(1.0)
    task = app.defer(tasks.fail_at_gate)
    assert await answer(app, task.payload) == (500, "retry")
    tasks.GATE.set()
    await until(lambda: len(records(app, task)) == 2)
    assert records(app, task)[1] == ("retry", None, "permanent-task-failure")
    async with dispatching(app):
        await until(lambda: app.queue.find(task.id).state is TaskState.DEAD)
    assert tasks.RAN == ["failed"] * 2


async def test_a_late_success_that_cannot_be_stored_is_logged(make, monkeypatch, caplog):
    app = make(1.0, lease_seconds=0.3)
    task = app.defer(tasks.wait_for_gate)
    assert await answer(app, task.payload) == (500, "retry")

    def fail(ends):
        raise QueueUnavailable("the disk is full")

    monkeypatch.setattr(app.queue.ledger, "finish_many", fail)
    tasks.GATE.set()
    await until(lambda: f"the end of task {task.id} was not stored" in caplog.text)


async def test_a_regular_expression_that_holds_the_interpreter_succeeds_late_and_runs_once(make):
    app = make(0.05)
    task = app.defer(tasks.backtrack, 24)
    assert await answer(app, task.payload) in {(500, "retry"), (200, "succeeded")}
    await until(lambda: records(app, task)[-1][0] == "succeeded")
    assert await answer(app, task.payload) == (200, "duplicate")
    assert tasks.RAN == ["begun", "over"]


async def test_a_stuck_thread_is_replaced_and_too_many_are_told_once(make, caplog):
    app = make(1.0, concurrency=2)
    for number in range(1, 3):
        assert await answer(app, app.serialize(tasks.wait_for_gate)) == (500, "retry")
        assert app.delivery.stuck == number
        assert app.delivery.is_clogged == (number == 2)
    assert caplog.text.count("go on past their deadlines in this process; restart it") == 1
    # As many again as there are slots: more would take memory without end.
    assert await answer(app, app.serialize(tasks.add, 1)) == (503, "busy")
    tasks.GATE.set()
    await until(lambda: not app.delivery.stuck)
    assert not app.delivery.is_clogged
    assert await answer(app, app.serialize(tasks.add, 1)) == (200, "succeeded")


async def test_other_tasks_have_a_thread_while_one_is_stuck(make):
    app = make(60.0, concurrency=1)
    assert await answer(app, app.options(deadline=1).defer(tasks.wait_for_gate).payload) == (500, "retry")
    assert await answer(app, app.serialize(tasks.add, 1)) == (200, "succeeded")


async def test_a_call_that_no_thread_took_is_not_made_after_its_deadline(make):
    app = make(0.3)
    threads = app.delivery._threads
    threads._most = 0
    task = app.defer(tasks.add, 1)
    assert await answer(app, task.payload) == (500, "retry")
    assert records(app, task) == [EXCEEDED]
    assert app.delivery.stuck == 0
    threads._most = 1
    await threads(lambda: None)
    assert tasks.RAN == []


async def test_a_thread_does_not_make_a_call_that_its_handler_has_claimed(make):
    app = make(0)
    context, calls = TaskContext(id="i" * 16, name=None, queue_name="default", url="/x", headers={}), []

    def hold(call):
        calls.append(call)
        return asyncio.get_running_loop().create_future()

    running = asyncio.create_task(
        execute(app.verify(app.serialize(tasks.add, 1)), {"typed": TypedCodec()}, context, in_thread=hold)
    )
    await until(lambda: calls)
    running.cancel()
    with pytest.raises(CoroutineCancelled):
        await running
    assert isinstance(calls[0]().error, asyncio.CancelledError)
    assert tasks.RAN == []


@pytest.mark.parametrize("function", [tasks.add_later, tasks.returns_awaitable])
async def test_a_coroutine_does_not_begin_after_the_deadline(make, function):
    app = make(0)
    context = TaskContext(id="i" * 16, name=None, queue_name="default", url="/x", headers={})

    async def overdue(call):
        step = call()
        context.control.stop = Stop.DEADLINE
        return step

    task = app.verify(app.serialize(function, 1))
    # With annotations to check, a thread prepares also a coroutine function that is known.
    outcome = await execute(task, {"typed": TypedCodec()}, context, in_thread=overdue, validate="annotations")
    assert (outcome.result, outcome.reason) == (Result.RETRY, "deadline-exceeded")
    assert not any(entry[0] == "add_later" for entry in tasks.RAN)


async def test_the_http_transport_waits_for_the_deadline_and_thirty_seconds_more():
    def total(timeout=None, queue="default"):
        deadlines = {"slow": 3_600.0, "endless": 0}
        delivery = HttpDelivery("http://127.0.0.1:9", timeout=timeout, deadlines=deadlines)
        return delivery._timeouts.get(queue, delivery._timeout).total

    assert [total(), total(queue="slow"), total(queue="endless")] == [630.0, 3_630.0, None]
    assert [total(5.0), total(5.0, "slow"), total(5.0, "endless")] == [5.0] * 3


async def test_a_thread_too_many_ends_before_its_next_call():
    threads = Threads(1, "test")
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()
    blocked = threads(lambda: asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(30))
    threads.add_one()
    assert await threads(lambda: 5) == 5
    assert threads._awake == 2
    gate.set()
    await blocked
    threads.remove_one()
    assert [await threads(lambda number=number: number) for number in range(5)] == list(range(5))
    assert threads._awake == 1
    await asyncio.to_thread(threads.close, wait=True)
