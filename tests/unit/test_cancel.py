"""``app.cancel`` and running tasks: what stops, what is told, and how the task ends."""

import asyncio
import dataclasses
import time

import pytest

from safedefer.delivery import ledger_client
from safedefer.dispatcher.loop import Dispatcher, InProcessDelivery
from safedefer.errors import QueueUnavailable
from safedefer.execution.context import TaskContext
from safedefer.queues.base import TaskState
from safedefer.queues.config import QueueFile
from tests import sample_tasks as tasks
from tests.unit.apps import JOSE, make_app, until


@pytest.fixture
def make(tmp_path):
    tasks.reset()
    made = []

    def make(**changes):
        made.append(make_app(**{"queue": f"sqlite:///{tmp_path}/q.db", **changes}))
        return made[-1]

    yield make
    tasks.GATE.set()
    for app in made:
        app.close()


async def answer(app, token):
    status, headers, _ = await app.handle(JOSE, token)
    return status, headers["Safedefer-Outcome"]


def records(app, task):
    return [(record.outcome, record.status, record.reason) for record in app.queue.find(task.id).records]


#: Functions that run until they are cancelled, with what they leave.
RUNNING = [
    (tasks.sleep_long, (), ["begun", "over"]),
    (tasks.wait_for_cancellation, (), [("cancelled", True)]),
    (tasks.wait_for_cancellation, ("raise",), [("cancelled", True)]),
]


@pytest.mark.parametrize("where", ["here", "another process"])
@pytest.mark.parametrize(("function", "args", "left"), RUNNING)
async def test_a_running_task_is_cancelled(make, monkeypatch, function, args, left, where):
    monkeypatch.setattr(ledger_client, "_LOOK_SECONDS", 0.1)
    app = make()
    task = app.defer(function, *args)
    running = asyncio.create_task(answer(app, task.payload))
    await until(lambda: tasks.RAN or tasks.STARTED.is_set())
    began = time.monotonic()
    # Another process has another App on the same file; this one's handler hears of it by the ledger.
    assert await asyncio.to_thread((app if where == "here" else make()).cancel, task.id)
    assert await running == (200, "cancelled")
    assert time.monotonic() - began < 100
    assert tasks.RAN == left
    assert records(app, task) == [("cancelled", 200, "cancelled")]
    assert await answer(app, task.payload) == (200, "duplicate")
    assert not app.cancel(task.id)


async def test_a_coroutine_that_suppresses_it_ends_as_cancelled_too(make):
    app = make()
    task = app.defer(tasks.suppress_cancellation)
    running = asyncio.create_task(answer(app, task.payload))
    await until(lambda: tasks.RAN)
    assert app.cancel(task.id)
    await until(lambda: "suppressed" in tasks.RAN)
    tasks.GATE.set()
    assert await running == (200, "cancelled")


async def test_a_dispatched_task_ends_as_cancelled_in_the_queue(make):
    app = make()
    task = app.defer(tasks.sleep_long)
    dispatcher = Dispatcher(app.queue, InProcessDelivery(app.handle), clock=time.time)
    running = asyncio.create_task(dispatcher.run())
    await until(lambda: tasks.RAN)
    assert app.cancel(task.id)
    await until(lambda: app.queue.find(task.id).state is TaskState.CANCELLED)
    dispatcher.stop()
    await running
    assert app.queue.find(task.id).attempts == 1
    assert tasks.RAN == ["begun", "over"]


async def test_a_stuck_thread_is_told_and_does_not_run_again(make):
    app = make(queue_yaml=QueueFile.parse("queue:\n- name: default\n  attempt_deadline: 0.2\n"))
    task = app.defer(tasks.wait_for_cancellation)
    assert await answer(app, task.payload) == (500, "retry")
    assert app.cancel(task.id)
    await until(lambda: len(records(app, task)) == 2)
    assert tasks.RAN == [("cancelled", True)]
    assert await answer(app, task.payload) == (200, "duplicate")


async def test_a_ledger_that_cannot_be_asked_is_asked_again(make, monkeypatch, caplog):
    monkeypatch.setattr(ledger_client, "_LOOK_SECONDS", 0.1)
    app = make()
    ask, failures = app.queue.ledger.cancelled_many, iter(range(2))

    def fail_at_first(executions):
        if next(failures, None) is not None:
            raise QueueUnavailable("locked")
        return ask(executions)

    monkeypatch.setattr(app.queue.ledger, "cancelled_many", fail_at_first)
    task = app.defer(tasks.sleep_long)
    running = asyncio.create_task(answer(app, task.payload))
    await until(lambda: tasks.RAN)
    assert app.queue.cancel(task.id, now=time.time())
    assert await running == (200, "cancelled")
    assert caplog.text.count("the ledger cannot be asked for cancelled tasks (QueueUnavailable)") == 2


def test_a_context_stays_frozen():
    context = TaskContext(id="i" * 16, name=None, queue_name="default", url="/x", headers={})
    assert context.cancelled is False
    with pytest.raises((AttributeError, TypeError)):  # a TypeError of CPython's dataclasses with slots
        context.cancelled = True
    with pytest.raises(dataclasses.FrozenInstanceError):
        context.control = None
