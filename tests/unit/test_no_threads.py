"""A system that gives the process no thread more: an error for those who wait, and all goes on once there is room."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from contextlib import closing

import pytest
from kombu.asynchronous import Hub

from safedefer import Policy
from safedefer.concurrency.aside import Aside
from safedefer.concurrency.plain_threads import PlainThread
from safedefer.concurrency.threads import Threads
from safedefer.errors import QueueUnavailable
from safedefer.queues.base import TaskState
from safedefer.queues.celery.acknowledging import Acknowledgements, Answered
from safedefer.queues.sqlite import writer
from safedefer.transactions.relay import Relay
from tests import sample_tasks as tasks
from tests.unit.apps import handle, make_app, until


class Full:
    """Lets no thread start whose name begins with one of these."""

    def __init__(self, monkeypatch):
        self.names = ()
        self.refused = []
        start = threading.Thread.start

        def start_or_fail(thread):
            if self.names and thread.name.startswith(self.names):
                self.refused.append(thread.name)
                raise RuntimeError("can't start new thread")  # CPython's words
            start(thread)

        def start_writer(work):
            if "safedefer-writer" in self.names:
                self.refused.append("safedefer-writer")
                raise RuntimeError("can't start new thread")
            return PlainThread(work)

        monkeypatch.setattr(threading.Thread, "start", start_or_fail)
        monkeypatch.setattr(writer, "PlainThread", start_writer)


@pytest.fixture
def full(monkeypatch):
    return Full(monkeypatch)


@pytest.fixture
def app(tmp_path):
    tasks.reset()
    app = make_app(queue=f"sqlite:///{tmp_path}/tasks.db", policy=Policy("tests.sample_tasks"))
    yield app
    app.close()


async def test_a_call_without_a_thread_raises_and_never_runs(full):
    threads, ran = Threads(2, "test"), []
    full.names = ("test",)
    for number in range(3):
        with pytest.raises(RuntimeError, match="start new thread"):
            threads(lambda number=number: ran.append(number))
    full.names = ()
    await asyncio.gather(*(threads(lambda number=number: ran.append(number)) for number in range(3, 9)))
    assert sorted(ran) == [*range(3, 9)]
    threads.close(wait=True)


async def test_where_there_is_a_thread_it_takes_the_calls_of_those_that_are_missing(full):
    threads, begun, gate, ran = Threads(3, "test"), threading.Event(), threading.Event(), []

    def hold():
        begun.set()
        gate.wait(60)

    first = threads(hold)
    await until(begun.is_set)
    full.names = ("test",)
    others = [threads(lambda number=number: ran.append(number)) for number in range(3)]
    assert full.refused
    gate.set()
    await asyncio.wait_for(asyncio.gather(first, *others), 60)
    assert ran == [0, 1, 2]
    threads.close(wait=True)


async def test_what_was_refused_counts_for_no_thread(full):
    threads, meet = Threads(2, "test"), threading.Barrier(2)
    full.names = ("test",)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="start new thread"):
            threads(int)
    full.names = ()
    for _ in range(3):
        await asyncio.wait_for(asyncio.gather(*(threads(lambda: meet.wait(60)) for _ in range(2))), 60)
    assert threads._awake <= 2
    threads.close(wait=True)


def test_a_handler_without_a_writer_is_busy_and_then_runs_the_task(app, full):
    token = app.serialize(tasks.add, 1, 2)
    full.names = ("safedefer-writer",)
    assert handle(app, token).status == 503
    assert (full.refused, tasks.RAN) == (["safedefer-writer"], [])
    full.names = ()
    assert handle(app, token).status == 200
    assert tasks.RAN == [("add", 1, 2, 1)]


def test_a_task_without_a_thread_fails_and_does_not_run_beside_its_retry(app, full):
    token = app.defer(tasks.add, 1, 2).payload
    full.names = ("safedefer-task",)
    assert handle(app, token).status == 500
    full.names = ()
    assert handle(app, app.defer(tasks.keywords, a=1).payload).status == 200
    assert tasks.RAN == [{"a": 1}]


def test_what_waits_when_the_process_forks_gets_the_error(app, full):
    """The writer's thread ends before a fork and begins again after it; between the two another thread submits."""
    own = app.queue._writer
    own.submit(lambda connection: None).result(60)
    own.before_fork()
    waiting = own.submit(lambda connection: "done")
    full.names = ("safedefer-writer",)
    own.after_fork_in_parent()
    with pytest.raises(QueueUnavailable, match="no thread can be started"):
        waiting.result(60)
    full.names = ()
    assert own.submit(lambda connection: "done").result(60) == "done"


def test_a_real_fork_without_a_thread_leaves_the_queue_usable(app, full):
    app.queue._writer.submit(lambda connection: None).result(60)
    full.names = ("safedefer-writer",)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    full.names = ()
    assert app.queue.find(app.defer(tasks.add, 1, 2).id).state is TaskState.WAITING


def defer_in_an_open_transaction(app, connection):
    """The rest of the transaction is the user's: only a thread can look later whether it has ended."""
    connection.execute("BEGIN IMMEDIATE")
    with app.transaction(connection):
        task = app.options(transactional=True).defer(tasks.add, 1, 2)
    connection.commit()
    return task


def test_the_outbox_is_emptied_once_there_is_room(app, full, tmp_path, caplog):
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        full.names = ("safedefer-outbox",)
        first = defer_in_an_open_transaction(app, connection)
        assert "no thread can be started for the outbox" in caplog.text
        assert app.queue.find(first.id) is None
        full.names = ()
        second = defer_in_an_open_transaction(app, connection)
        asyncio.run(until(lambda: app.queue.find(first.id) and app.queue.find(second.id)))


def test_several_outboxes_are_swept_by_one_thread_where_there_is_no_other(app, full, tmp_path):
    with closing(sqlite3.connect(tmp_path / "a.db")) as a, closing(sqlite3.connect(tmp_path / "b.db")) as b:
        full.names = ("safedefer-outbox-one",)
        deferred = [defer_in_an_open_transaction(app, connection) for connection in (a, b, a, b)]
        asyncio.run(until(lambda: all(app.queue.find(task.id) for task in deferred)))
        assert full.refused


def test_a_celery_worker_without_a_thread_syncs_itself(full):
    done, hub = [], Hub()
    acknowledgements = Acknowledgements(lambda: "mark")
    full.names = ("safedefer-sync",)
    acknowledgements.listen(hub)
    acknowledgements.begin()
    assert acknowledgements.mark == "mark"
    acknowledgements.add(Answered(lambda: done.append(1), None, "mark"))
    assert done == [1]
    hub.close()


async def test_a_thread_is_asked_for_again_while_those_that_are_there_stay_busy(full):
    threads, begun, gate = Threads(2, "test"), threading.Event(), threading.Event()
    busy = threads(lambda: [begun.set(), gate.wait(60)])
    await until(begun.is_set)
    full.names = ("test",)
    waiting = [threads(lambda number=number: number) for number in range(3)]
    await until(lambda: len(full.refused) > 4)
    assert not any(future.done() for future in waiting)
    full.names = ()
    assert await asyncio.wait_for(asyncio.gather(*waiting), 30) == [0, 1, 2]
    gate.set()
    await busy
    threads.close(wait=True)


async def test_a_call_that_is_stuck_is_replaced_once_there_is_room(full):
    threads, begun, gate = Threads(1, "test"), threading.Event(), threading.Event()
    stuck = threads(lambda: [begun.set(), gate.wait(60)])
    await until(begun.is_set)
    waiting = threads(lambda: 5)
    full.names = ("test",)
    threads.add_one()
    full.names = ()
    assert await asyncio.wait_for(waiting, 30) == 5
    gate.set()
    await stuck
    threads.remove_one()
    threads.close(wait=True)


def interrupt(monkeypatch, name):
    """Have Ctrl-C come once, when a thread of this name was started and has not said yet that it runs."""
    start, come = threading.Thread.start, []

    def start_and_interrupt(thread):
        start(thread)
        if thread.name == name and not come:
            come.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start_and_interrupt)


def running(name):
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_a_start_that_is_interrupted_leaves_one_writer(app, monkeypatch):
    started = []

    def start_and_interrupt(work):
        started.append(PlainThread(work))
        if len(started) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(writer, "PlainThread", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        app.queue._writer.submit(lambda connection: None)
    ran_by = {app.queue._writer.submit(lambda connection: threading.get_ident()).result(60) for _ in range(20)}
    assert len(ran_by) == 1
    assert len(started) == 2


def test_a_start_that_is_interrupted_leaves_one_thread_for_outboxes(monkeypatch):
    before = {*running("safedefer-outbox")}
    interrupt(monkeypatch, "safedefer-outbox")
    relay = Relay(lambda: None)
    with pytest.raises(KeyboardInterrupt):
        relay.expect()
    relay.expect()
    assert len({*running("safedefer-outbox")} - before) == 1
    relay.close()


def test_a_start_that_is_interrupted_leaves_one_thread_that_syncs(monkeypatch):
    before = {*running("safedefer-sync")}
    interrupt(monkeypatch, "safedefer-sync")
    acknowledgements = Acknowledgements(lambda: "mark")
    with pytest.raises(KeyboardInterrupt):
        acknowledgements.begin()
    acknowledgements.begin()
    assert len({*running("safedefer-sync")} - before) == 1


def test_a_start_that_is_interrupted_leaves_one_thread_for_an_observer(monkeypatch):
    got = []

    async def receive(item):
        got.append(item)

    before = {*running("safedefer-observer")}
    interrupt(monkeypatch, "safedefer-observer")
    aside = Aside(receive)
    with pytest.raises(KeyboardInterrupt):
        aside.put(1)
    aside.put(2)
    assert len({*running("safedefer-observer")} - before) == 1
    aside.close(60)
    assert got == [2]


def test_a_start_that_is_interrupted_leaves_one_thread_for_notices(app, monkeypatch):
    before = {*running("safedefer-notices")}
    interrupt(monkeypatch, "safedefer-notices")
    with pytest.raises(KeyboardInterrupt):
        app.notices._wake()
    app.notices._wake()
    assert len({*running("safedefer-notices")} - before) <= 1


def test_each_caller_that_waits_in_a_fork_gets_an_error_of_its_own(app, full):
    own = app.queue._writer
    own.before_fork()
    waiting = [own.submit(lambda connection: "done") for _ in range(2)]
    full.names = ("safedefer-writer",)
    own.after_fork_in_parent()
    first, second = (future.exception(60) for future in waiting)
    assert str(first) == str(second)
    assert first is not second


def test_a_celery_worker_that_ends_acknowledges_what_was_synced_before_the_store_failed():
    done, fails, hub = [], threading.Event(), Hub()

    def sync():
        if fails.is_set():
            raise QueueUnavailable("gone")
        return "mark"

    acknowledgements = Acknowledgements(sync)
    acknowledgements.listen(hub)
    acknowledgements.begin()
    acknowledgements.add(Answered(lambda: done.append(1), lambda: done.append(-1), "mark"))
    asyncio.run(
        until(lambda: len(acknowledgements._synced) == 2)
    )  # that of `begin`, too; the loop takes up neither yet
    fails.set()
    acknowledgements.add(Answered(lambda: done.append(2), lambda: done.append(-2), "mark"), last=True)
    assert done == [1]
    hub.close()
