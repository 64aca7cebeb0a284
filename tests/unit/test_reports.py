"""What a dispatcher tells its observer, and what the log says of it: handlers down, tasks given up, a queue that fails."""

import asyncio
import logging
import time

import pytest

from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions, Unreachable
from safedefer.dispatcher.reports import Reports
from safedefer.errors import QueueUnavailable
from safedefer.events import LogObserver, QueueTrouble, TargetDown, TargetUp, TaskDead, TaskRetried
from safedefer.queues.memory.queue import MemoryQueue
from tests.unit.apps import until
from tests.unit.delivering import Delivering
from tests.unit.test_dispatcher import answer, task_of
from tests.unit.test_outages import Away


class Told(list):
    """An observer that keeps events, and logs them as the default one does."""

    def __init__(self):
        self.log = LogObserver()

    def __call__(self, event):
        self.append(event)
        self.log(event)

    def of(self, kind):
        return [event for event in self if isinstance(event, kind)]


def dispatch(queue, deliver, told):
    options = DispatcherOptions(concurrency=1, poll_seconds=0.05)
    return Dispatcher(queue, Delivering(deliver), clock=time.time, options=options, observer=told)


async def test_a_handler_that_is_down_is_told_of_once_and_once_when_it_is_back(caplog):
    queue, told, tries = MemoryQueue(), Told(), []
    queue.enqueue_many([task_of(n, eta=0.0) for n in (1, 2)])

    async def deliver(task, headers):
        tries.append(task.id)
        if len(tries) < 3:
            raise Unreachable("ClientConnectorError", address="")
        return answer(200, "succeeded")

    dispatcher = dispatch(queue, deliver, told)
    running = asyncio.create_task(dispatcher.run())
    await until(lambda: not queue.tasks())
    dispatcher.stop()
    await running
    assert told.of(TargetDown) == [TargetDown(address="", reason="ClientConnectorError")]
    (back,) = told.of(TargetUp)
    assert 0.0 < back.seconds < 60.0
    assert back.waited >= 2
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 2
    assert "takes no connection (ClientConnectorError)" in lines[0]
    assert "takes connections again" in lines[1]
    retried = told.of(TaskRetried)
    assert {event.reason for event in retried} == {"unreachable"}
    assert all(event.attempts == 0 for event in retried)


async def test_a_task_that_is_given_up_is_an_error_in_the_log_with_reason_and_attempts(caplog):
    queue, told = MemoryQueue(), Told()
    queue.enqueue_many([task_of(eta=0.0, retry_options={"task_retry_limit": 1, "min_backoff_seconds": 0.0})])

    async def deliver(task, headers):
        return answer(500, "retry")

    await dispatch(queue, deliver, told).run_until_empty()
    (dead,) = told.of(TaskDead)
    assert (dead.task_id, dead.queue, dead.attempts) == (task_of().id, "default", 2)
    assert [event.status for event in told.of(TaskRetried)] == [500]
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "is dead (" in line
    assert "attempts: 2" in line


async def test_a_task_that_its_handler_gave_up_is_said_to_have_failed(caplog):
    queue, told = MemoryQueue(), Told()
    queue.enqueue_many([task_of(eta=0.0)])

    async def deliver(task, headers):
        return answer(200, "failed")

    await dispatch(queue, deliver, told).run_until_empty()
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "is dead (failed), attempts: 1" in line


async def test_a_queue_that_is_away_is_told_of_with_its_text_and_when_it_is_back(caplog):
    queue, told = Away(), Told()
    queue.away = True

    async def deliver(task, headers):
        return answer(200, "succeeded")

    dispatcher = dispatch(queue, deliver, told)
    running = asyncio.create_task(dispatcher.run())
    await until(lambda: len(queue.leased) >= 2)
    queue.away = False
    await until(lambda: len(told.of(QueueTrouble)) == 2)
    dispatcher.stop()
    await running
    first, over = told.of(QueueTrouble)
    assert (first.doing, first.reason, first.count) == ("leasing", "away", 1)
    assert (over.doing, over.count) == ("leasing", 0)
    lines = [record.getMessage() for record in caplog.records]
    assert "leasing failed: away; trying again" in lines
    assert any("leasing works again" in line for line in lines)


def test_failures_that_go_on_are_counted_and_told_once_a_minute():
    told, now = Told(), [0.0]
    reports = Reports(told, clock=time.time, ticks=lambda: now[0])
    for second in range(150):
        now[0] = float(second)
        reports.failed("settling", QueueUnavailable("the disk is full"))
    assert [(event.count, event.seconds) for event in told] == [(1, 0.0), (60, 60.0), (60, 120.0)]
    reports.worked("settling")
    reports.worked("settling")
    assert told[3:] == [QueueTrouble(doing="settling", reason="", count=0, seconds=149.0)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (QueueUnavailable("locked\nfake line \x1b[31m"), "locked\\nfake line \\x1b[31m"),
        (QueueUnavailable('the queue\'s user "shop" is unknown'), 'the queue\'s user "shop" is unknown'),
        (QueueUnavailable("x" * 10_000), "x" * 500),
        (ValueError("order 42 of Ann"), "ValueError"),
    ],
)
def test_no_text_of_foreign_errors_and_no_control_character_is_told(error, reason):
    told = Told()
    Reports(told, clock=time.time).failed("leasing", error)
    assert [event.reason for event in told] == [reason]


async def test_an_observer_that_raises_harms_no_task():
    queue = MemoryQueue()
    queue.enqueue_many([task_of(n, eta=0.0, retry_options={"task_retry_limit": 0}) for n in range(1, 6)])

    async def deliver(task, headers):
        return answer(500, "retry")

    def observer(event):
        raise ZeroDivisionError

    await dispatch(queue, deliver, observer).run_until_empty()
    assert len([view for view in queue.tasks() if view.state == "dead"]) == 5
