"""Notices: what a process writes into the store of what is wrong with it, and what it hears."""

import os
import threading
import time

import pytest

from safedefer.errors import QueueUnavailable
from safedefer.events import (
    LogObserver,
    Observers,
    QueueLate,
    QueueTrouble,
    RequestRefused,
    TargetDown,
    TargetUp,
    TaskHandled,
    hears_enqueued,
    is_heard,
)
from safedefer.observe.notices import LATE_SECONDS, Notices, ProcessRole
from safedefer.observe.troubles import ProcessReport, Troubles
from safedefer.queues.memory.queue import MemoryQueue
from tests import sample_tasks
from tests.unit.apps import Recorder, handle, make_app


def wait_until(condition):
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def read(queue):
    now = time.time()
    return [ProcessReport.read(each, now=now) for each in queue.notices(since=0.0)]


@pytest.fixture
def queue():
    return MemoryQueue()


def handled(outcome, reason=None):
    return TaskHandled(
        task_id="i",
        queue="mail",
        callable="m:f",
        kid="k",
        outcome=outcome,
        status=500,
        reason=reason,
        attempt=1,
        seconds=0.1,
    )


def test_what_is_wrong_is_remembered_until_it_is_over():
    now = [1_000.0]
    troubles = Troubles(lambda: now[0])
    troubles(TargetDown(address="http://user:password@shop:80", reason="refused"))
    troubles(QueueTrouble(doing="leasing", reason="the disk is full", count=1, seconds=2.0))
    troubles(QueueLate(queue="mail", seconds=5.0, waiting=3))
    for _ in range(3):
        troubles(RequestRefused(status=403, reason="revoked-key"))
    troubles(handled("rejected", "unresolvable-callable"))
    troubles(handled("succeeded"))
    report = troubles.report()
    assert report.down == (("http://shop:80", "refused", 1_000.0),)
    assert report.troubles == (("leasing", "the disk is full", 998.0),)
    assert report.late == (("mail", 995.0),)
    assert report.refused == (("revoked-key", 3, 1_000.0),)
    assert report.rejected == (("unresolvable-callable", "m:f", 1, 1_000.0),)
    troubles(TargetUp(address="http://user:password@shop:80", seconds=1.0, waited=0))
    troubles(QueueTrouble(doing="leasing", reason="", count=0, seconds=3.0))
    troubles(QueueLate(queue="", seconds=0.0, waiting=0))
    now[0] += 1_000.0
    assert troubles.report().is_empty


def test_a_flood_of_reasons_and_targets_is_bounded():
    troubles = Troubles(lambda: 1.0)
    for number in range(500):
        troubles(RequestRefused(status=403, reason=f"r{number}"))
        troubles(TargetDown(address=f"http://h{number}", reason="x"))
        troubles(handled("rejected", f"r{number}"))
    report = troubles.report()
    assert (len(report.refused), len(report.down), len(report.rejected)) == (50, 50, 50)


def test_no_event_of_a_task_that_runs_well_is_made_for_it():
    observers = Observers(LogObserver(), Troubles(lambda: 1.0))
    assert not hears_enqueued(observers)
    assert not is_heard(observers, "succeeded", None)
    assert is_heard(observers, "rejected", "unresolvable-callable")


def test_a_handler_writes_when_it_refuses_and_its_end_keeps_that():
    app = make_app()
    assert handle(app, b"no task").status == 403
    wait_until(lambda: app.queue.notices(since=0.0))
    (report,) = read(app.queue)
    assert [each.reason for each in report.refused] == ["malformed-token"]
    assert (report.command, report.beats, report.takes) == ("handler", False, False)
    assert f"handler {os.getpid()} on " in report.process
    queue, notices = app.queue, app.notices
    wait_until(lambda: notices._thread is None)  # nothing is left to say
    notices.close()
    notices._write()
    (report,) = read(queue)
    assert report.ended
    assert [each.reason for each in report.refused] == ["malformed-token"]
    app.close()


def test_a_process_that_takes_tasks_says_so_and_its_end_takes_that_back(queue):
    notices = Notices(lambda: queue, Observers(), time.time)
    notices.start(ProcessRole(command="dispatch", beats=True, takes=True, queues=("mail",)))
    wait_until(lambda: queue.notices(since=0.0))
    (report,) = read(queue)
    assert (report.takes, report.beats, report.queues, report.ended) == (True, True, ("mail",), False)
    notices.close()
    assert queue.notices(since=0.0) == []


def test_a_queue_that_is_late_is_told_once_and_when_it_is_over():
    app, told = make_app(), Recorder()
    app.defer(sample_tasks.add, 1)
    ahead = [0.0]
    notices = Notices(lambda: app.queue, Observers(told), lambda: time.time() + ahead[0])
    notices._role = ProcessRole(command="run", beats=True, takes=True)
    ahead[0] = 10.0
    for _ in range(2):
        notices._look_for_late()
    (late,) = told.events
    assert (late.queue, late.waiting) == ("default", 1)
    assert 9.0 < late.seconds < 300.0
    ahead[0] = -100.0
    notices._look_for_late()
    assert told.events[1:] == [QueueLate(queue="", seconds=0.0, waiting=0)]
    notices.close()
    app.close()


def test_tasks_that_a_handler_which_is_down_puts_off_are_late_until_it_is_back():
    app, told = make_app(), Recorder()
    app.defer(sample_tasks.add, 1)
    ahead = [0.0]
    notices = Notices(lambda: app.queue, Observers(told), lambda: time.time() + ahead[0])
    notices.troubles(TargetDown(address="http://127.0.0.1:1", reason="ClientConnectorError"))
    for ahead[0] in (10.0, -100.0, 10.0, -100.0):  # by turns it is due, and put off
        notices._look_for_late()
    (late,) = told.events
    assert late.queue == "default"
    notices.troubles(TargetUp(address="http://127.0.0.1:1", seconds=60.0, waited=4))
    notices._look_for_late()
    assert told.events[1:] == [QueueLate(queue="", seconds=0.0, waiting=0)]
    notices.close()
    app.close()


def test_a_store_that_takes_no_notice_is_told_once_and_when_it_takes_them_again(queue, monkeypatch):
    told = Recorder()
    notices = Notices(lambda: queue, Observers(told), time.time)
    notices._role = ProcessRole(command="run", beats=True)

    def fail(*_, **__):
        raise QueueUnavailable("the disk is full; free some space")

    with monkeypatch.context() as patched:
        patched.setattr(queue, "put_notice", fail)
        for _ in range(3):
            notices._write()
        assert notices.failure is not None
        assert notices.failure.text == "the disk is full; free some space"
    notices._write()
    assert notices.failure is None
    assert [(event.doing, event.count, event.reason) for event in told.events] == [
        ("writing", 1, "the disk is full; free some space"),
        ("writing", 0, ""),
    ]
    notices.close()


def test_a_write_that_does_not_end_is_told_of(queue):
    now = [1_000.0]
    notices = Notices(lambda: queue, Observers(), lambda: now[0])
    notices._began = 1_000.0
    assert notices.failure is None
    now[0] += 10.0
    assert notices.failure is not None
    assert "does not end" in notices.failure.text


def test_a_forked_child_has_troubles_and_a_thread_of_its_own(queue):
    notices = Notices(lambda: queue, Observers(), time.time)
    notices.troubles(RequestRefused(status=403, reason="revoked-key"))
    wait_until(lambda: queue.notices(since=0.0))
    notices.before_fork()
    notices.after_fork_in_parent()
    assert not notices.troubles.report().is_empty
    notices.before_fork()
    notices.after_fork_in_child()
    assert notices.troubles.report().is_empty
    notices.troubles(RequestRefused(status=403, reason="unknown-key"))
    wait_until(lambda: any(each.refused[0].reason == "unknown-key" for each in read(queue)))
    notices.close()
    wait_until(lambda: "safedefer-notices" not in {each.name for each in threading.enumerate()})


def test_a_process_that_has_just_started_does_not_call_late_what_waited_for_it():
    app, told = make_app(), Recorder()
    app.defer(sample_tasks.add, 1)
    started = float(int(time.time()) + 3600)
    now = [started]
    notices = Notices(lambda: app.queue, Observers(told), lambda: now[0])
    notices._role = ProcessRole(command="run", beats=True, takes=True)
    for now[0] in (started, started + LATE_SECONDS):
        notices._look_for_late()
    assert told.events == []
    now[0] = started + LATE_SECONDS + 0.1  # it had its time, and took nothing
    notices._look_for_late()
    (late,) = told.events
    assert late.seconds > 3000.0
    notices.close()
    app.close()
