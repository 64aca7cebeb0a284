"""A Celery worker acknowledges a message when the store has synced its end, and not before."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import pytest
from celery import Celery, bootsteps
from celery.worker import state
from kombu.asynchronous import Hub

from safedefer.errors import QueueUnavailable
from safedefer.queues.celery import acknowledging
from safedefer.queues.celery.acknowledging import Acknowledgements, Answered
from safedefer.queues.celery.engine import TASK_NAME, CeleryEngine
from safedefer.queues.celery.worker import _LastSync as LastSync
from safedefer.queues.celery.worker import _SyncedRequest as SyncedRequest

MARK = "of a server that did not crash"


class Syncs:
    """A store's sync, which returns when the test says so, or fails."""

    def __init__(self):
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.failures = 0
        self.number = 0
        self.mark = MARK

    def __call__(self):
        self.begun.release()
        assert self.go_on.acquire(timeout=60)
        self.number += 1
        if self.failures:
            self.failures -= 1
            raise QueueUnavailable("away")
        return self.mark


def answered(acknowledge, put_back=None, mark=MARK):
    return Answered(acknowledge, put_back, mark)


@pytest.fixture
def syncs():
    return Syncs()


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


def turn(hub, until):
    """Let the worker's event loop turn until a condition holds."""
    loop = hub.create_loop()
    hub.call_repeatedly(0.05, lambda: None)
    while not until():
        next(loop)


def test_a_message_is_acknowledged_after_a_sync_that_began_when_its_child_had_answered(hub, syncs):
    done = []
    acknowledgements = Acknowledgements(syncs)
    acknowledgements.listen(hub)
    acknowledgements.add(answered(lambda: done.append(1)))
    assert syncs.begun.acquire(timeout=60)
    # These two come while a sync is under way, which may not hold their ends: both get the next one.
    acknowledgements.add(answered(lambda: done.append(2)))
    acknowledgements.add(answered(lambda: done.append(3)))
    assert done == []
    syncs.go_on.release()
    turn(hub, lambda: done)
    assert syncs.begun.acquire(timeout=60)
    assert done == [1]
    syncs.go_on.release()
    turn(hub, lambda: len(done) == 3)
    assert (done, syncs.number) == ([1, 2, 3], 2)


def test_nothing_is_acknowledged_while_the_store_does_not_sync(hub, syncs, monkeypatch):
    monkeypatch.setattr(acknowledging, "_AGAIN_SECONDS", 0.0)
    done = []
    syncs.failures = 2
    acknowledgements = Acknowledgements(syncs)
    acknowledgements.listen(hub)
    acknowledgements.add(answered(lambda: done.append(1)))
    for _ in range(3):
        assert syncs.begun.acquire(timeout=60)
        assert done == []
        syncs.go_on.release()
    turn(hub, lambda: done)
    assert syncs.number == 3


def test_a_message_whose_connection_is_gone_keeps_no_other_from_being_acknowledged(hub, syncs):
    done = []

    def broken():
        raise ConnectionResetError

    acknowledgements = Acknowledgements(syncs)
    acknowledgements.listen(hub)
    for acknowledge in (broken, lambda: done.append(2)):
        syncs.go_on.release()
        acknowledgements.add(answered(acknowledge))
    turn(hub, lambda: done)


def test_a_worker_that_stops_acknowledges_what_waits_for_a_sync(hub, syncs):
    done = []
    acknowledgements = Acknowledgements(syncs)
    acknowledgements.listen(hub)
    acknowledgements.add(answered(lambda: done.append(1)))
    assert syncs.begun.acquire(timeout=60)
    syncs.go_on.release(2)
    acknowledgements.add(answered(lambda: done.append(2)), last=True)
    assert done == [1, 2]
    acknowledgements.end()
    assert done == [1, 2]
    syncs.go_on.release()
    acknowledgements.add(answered(lambda: done.append(3)))  # its pool ends after its event loop
    assert done == [1, 2, 3]


def test_a_worker_that_has_connected_again_acknowledges_in_its_event_loop(hub, syncs):
    done = []
    acknowledgements = Acknowledgements(syncs)
    acknowledgements.listen(hub)
    hub.reset()  # as Celery does when the connection is lost
    acknowledgements.listen(hub)
    acknowledgements.add(answered(lambda: done.append(1)))  # and does not wait for the store
    syncs.go_on.release()
    turn(hub, lambda: done)


def test_a_worker_that_stops_leaves_to_the_broker_what_cannot_be_synced(syncs, caplog):
    done, back = [], []
    syncs.failures = 1
    syncs.go_on.release(2)
    acknowledgements = Acknowledgements(syncs)
    acknowledgements.add(answered(lambda: done.append(1), lambda: back.append(1)), last=True)
    assert (done, back) == ([], [])
    assert "the broker delivers its tasks again" in caplog.text
    acknowledgements.add(answered(lambda: done.append(2)), last=True)
    assert done == [2]


def test_a_worker_without_an_event_loop_gives_back_what_cannot_be_synced(syncs, caplog, monkeypatch):
    """It would keep the message else, up to the broker's limit, and take no more."""
    monkeypatch.setattr(acknowledging, "_AGAIN_SECONDS", 0.0)
    done, back = [], []
    syncs.failures = 1
    syncs.go_on.release(2)
    acknowledgements = Acknowledgements(syncs)
    acknowledgements.add(answered(lambda: done.append(1), lambda: back.append(1)))
    assert (done, back) == ([], [1])
    assert "the broker delivers its tasks again" in caplog.text
    acknowledgements.add(answered(lambda: done.append(2), lambda: back.append(2)))
    assert (done, back) == ([2], [1])


def test_a_message_goes_back_whose_store_has_crashed_since_it_was_received(hub, syncs):
    done = []
    acknowledgements = Acknowledgements(syncs)
    acknowledgements.listen(hub)
    syncs.go_on.release()
    acknowledgements.begin()
    assert acknowledgements.mark == MARK
    before = [
        answered(lambda: done.append("acknowledged"), lambda: done.append("back"), acknowledgements.mark)
        for _ in range(2)
    ]
    syncs.mark = "of a server that did"
    for each, last in zip(before, (False, True), strict=True):
        syncs.go_on.release()
        acknowledgements.add(each, last=last)
        turn(hub, lambda: len(done) == 1 + last)
    assert done == ["back", "back"]
    assert acknowledgements.mark == syncs.mark
    syncs.go_on.release()
    acknowledgements.add(answered(lambda: done.append("acknowledged"), None, acknowledgements.mark))
    turn(hub, lambda: done == ["back", "back", "acknowledged"])


def test_a_message_goes_back_that_was_received_before_the_store_could_be_asked(hub, syncs, monkeypatch):
    done = []
    acknowledgements = Acknowledgements(syncs)
    acknowledgements.listen(hub)
    monkeypatch.setattr(acknowledging, "_BEGIN_SECONDS", 0.0)
    acknowledgements.begin()  # and does not wait for ever
    acknowledgements.add(answered(None, lambda: done.append("back"), acknowledgements.mark))
    syncs.go_on.release(2)
    turn(hub, lambda: done == ["back"])


# --- The engine -----------------------------------------------------------------------------------


class Handler:
    def __init__(self, sync):
        self.sync = sync

    def syncs(self):
        return self.sync


@pytest.fixture
def engine():
    engine = CeleryEngine(Celery("test", broker="memory://", set_as_current=False))
    yield engine
    engine.close()


def test_only_a_child_of_the_worker_that_acknowledges_leaves_the_sync_to_it(engine, monkeypatch):
    engine._before_child()
    assert engine.acknowledgements is None, "no App uses it"
    engine.serve(Handler(None))
    engine._before_child()
    assert engine.acknowledgements is None, "its store syncs each change"
    engine.serve(Handler(lambda: None))
    assert engine.syncs_before_ack is False
    engine._before_child()
    first = engine.acknowledgements
    engine._before_child()
    assert engine.acknowledgements is first is not None
    engine._left_to = os.getpid()  # as a message says that this parent will acknowledge
    assert engine.syncs_before_ack is False, "the parent itself"
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert engine.syncs_before_ack is True
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert engine.syncs_before_ack is False, "an orphan, whose parent was killed"
    monkeypatch.setattr(os, "getppid", os.getpid)
    engine._left_to = 0
    assert engine.syncs_before_ack is False, "a message that Celery acknowledges by itself"


@pytest.mark.parametrize("stops", [True, False])
def test_celery_itself_acknowledges_through_the_engine(engine, monkeypatch, stops):
    monkeypatch.setattr(state, "should_stop", 0 if stops else None)
    task = engine.celery.tasks[TASK_NAME]
    acknowledged = []
    request = object.__new__(SyncedRequest)
    request._task = task
    request._on_ack = lambda *_: acknowledged.append("message")
    request._mark = "mark"
    request._connection_errors = ()
    assert task.Request.endswith(SyncedRequest.__name__)
    waiting = []
    engine.acknowledgements = Acknowledgements(lambda: waiting.append("synced") or "mark")
    request.acknowledge()
    assert (waiting, acknowledged, request.acknowledged) == (["synced"], ["message"], True)
    request.acknowledge()
    assert acknowledged == ["message"]


def test_the_last_sync_is_a_step_of_every_worker_of_the_application(engine):
    assert any(str(step).endswith(LastSync.__name__) for step in engine.celery.steps["consumer"])

    class Consumer:
        app = engine.celery
        hub = None
        blueprint = SimpleNamespace(state=bootsteps.CLOSE)

    step = LastSync(Consumer())
    step.start(Consumer())
    step.stop(Consumer())
    done = []
    engine.acknowledgements = Acknowledgements(lambda: done.append("synced") or "mark")
    step.start(Consumer())
    assert engine.acknowledgements.mark == "mark"
    engine.acknowledgements._waiting.append(answered(lambda: done.append("message"), mark="mark"))
    reconnects = Consumer()
    reconnects.blueprint = SimpleNamespace(state=bootsteps.RUN)
    step.start(reconnects)
    step.stop(reconnects)
    assert done == ["synced"], "a worker that connects again waits for no sync"
    step.stop(Consumer())
    assert done == ["synced", "synced", "message"]
