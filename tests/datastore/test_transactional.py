"""Transactional tasks with the real google-cloud-ndb: commit, rollback, contention, and what a dead process has left."""

import asyncio
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import grpc
import pytest
from google.api_core import exceptions as api
from google.auth.credentials import AnonymousCredentials
from google.cloud import ndb

from safedefer.errors import (
    BadTransactionStateError,
    ConfigurationError,
    QueueUnavailable,
    TaskTooLargeError,
)
from safedefer.queues.memory.queue import MemoryQueue
from safedefer.queues.sqlite.queue import SQLiteQueue
from safedefer.transactions.datastore import Address
from safedefer.transactions.outbox import Outbox
from tests import sample_tasks as tasks
from tests.datastore.helpers import KINDS, forget, quiet, rows, until, waiting
from tests.datastore.store import Refused
from tests.queues.contract import DONE, make_task, oversize_task, take, whole
from tests.queues.single import settle
from tests.unit.apps import make_app

ROOT = Path(__file__).parents[2]


class Order(ndb.Model):
    total = ndb.IntegerProperty(default=0)


@pytest.fixture
def app(context):
    app = make_app()
    yield app
    app.close()


# --- What commits, and what does not ---


def by_decorator(work):
    ndb.transactional()(work)()


def by_call(work):
    ndb.transaction(work)


def by_asynchronous_call(work):
    ndb.transaction_async(work).get_result()


def by_tasklet(work):
    @ndb.transactional_tasklet()
    def run():
        yield ndb.sleep(0)
        work()
        yield ndb.sleep(0)

    run().get_result()


WAYS = [by_decorator, by_call, by_asynchronous_call, by_tasklet]


@pytest.mark.parametrize("way", WAYS)
def test_inside_ndbs_own_transactions_a_task_goes_with_the_commit_without_more(app, server, way):
    sent = []

    def place():
        Order(id="a").put()
        sent.append(app.options(transactional=True).defer(tasks.add, 1))
        assert (app.queue.tasks(), rows(server)) == ([], 0)

    way(place)
    assert not sent[0].was_enqueued
    until(lambda: waiting(app.queue) == {sent[0].id})
    until(lambda: rows(server) == 0)
    assert Order.get_by_id("a") is not None


@pytest.mark.parametrize("way", WAYS)
def test_what_is_undone_leaves_no_task_and_no_entity(app, server, way):
    def place():
        Order(id="a").put()
        app.options(transactional=True).defer(tasks.add, 1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        way(place)
    app.outbox.sweep()
    assert (app.queue.tasks(), len(server.store.entities)) == ([], 0)


def test_the_drop_in_keyword_goes_with_the_transaction_too(app, server):
    from safedefer import configure, deferred

    configure(app)
    try:

        @ndb.transactional()
        def place():
            deferred.defer(tasks.add, 1, _transactional=True)

        place()
        until(lambda: len(app.queue.tasks()) == 1)
    finally:
        configure(None)


def test_a_block_in_a_transaction_leaves_it_to_its_function(outbox, queue, server):
    task = make_task()

    @ndb.transactional()
    def place(fails):
        with outbox.transaction(ndb):
            outbox.put(task)
        if fails:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        place(fails=True)
    outbox.sweep()
    assert queue.tasks() == []
    place(fails=False)
    until(lambda: waiting(queue) == {task.id})


def test_a_block_without_a_transaction_opens_one_and_commits_it(outbox, queue, server):
    task = make_task(headers={"X-Shop": "é"}, token=bytes(range(256)))
    with outbox.transaction(ndb):
        assert ndb.in_transaction()
        key = Order(total=1).put()
        assert key.get().total == 1
        outbox.put(task)
        assert len(server.store.entities) == 0
    assert not ndb.in_transaction()
    until(lambda: waiting(queue) == {task.id})
    assert whole(take(queue)[0].task) == task
    assert key.get().total == 1
    until(lambda: rows(server) == 0)


def test_a_block_that_raises_undoes_its_transaction(outbox, queue, server):
    with pytest.raises(ZeroDivisionError), outbox.transaction(ndb):
        Order(id="a").put()
        outbox.put(make_task())
        raise ZeroDivisionError
    outbox.sweep()
    assert (queue.tasks(), len(server.store.entities), server.store.transactions) == ([], 0, {})
    assert not ndb.in_transaction()


def test_a_block_whose_commit_fails_raises_and_enqueues_nothing(outbox, queue, server):
    Order(id="a").put()
    with pytest.raises(api.Aborted), outbox.transaction(ndb):
        order = ndb.Key(Order, "a").get(use_cache=False)
        in_another_thread(server.client, lambda: Order(id="a", total=5).put())
        order.total += 1
        order.put()
        outbox.put(make_task())
    outbox.sweep()
    assert (queue.tasks(), rows(server)) == ([], 0)


def test_a_block_in_an_asyncio_program(server, client):
    app = make_app()

    async def main():
        with client.context(), app.transaction(ndb):
            await ndb_like(app)

    async def ndb_like(app):
        await app.options(transactional=True).defer_async(tasks.add, 1)
        assert app.queue.tasks() == []

    asyncio.run(main())
    until(lambda: len(app.queue.tasks()) == 1)
    app.close()


def in_another_thread(client, work):
    def run():
        with client.context():
            work()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def test_a_transaction_that_is_run_again_after_a_conflict_gives_one_task(app, server):
    Order(id="a").put()
    runs = []

    @ndb.transactional()
    def place():
        order = ndb.Key(Order, "a").get()
        if not runs:
            in_another_thread(server.client, lambda: Order(id="a", total=10).put())
        runs.append(app.options(transactional=True).defer(tasks.add, len(runs)).id)
        order.total += 1
        order.put()

    place()
    assert len(runs) == 2
    until(lambda: waiting(app.queue) == {runs[1]})
    app.outbox.sweep()
    assert (waiting(app.queue), rows(server)) == ({runs[1]}, 0)


def test_threads_that_contend_for_an_entity_give_as_many_tasks_as_commits(outbox, queue, server):
    Order(id="a").put()
    done = []

    @ndb.transactional(retries=2)
    def place():
        order = ndb.Key(Order, "a").get()
        order.total += 1
        order.put()
        outbox.put(make_task())

    def work():
        with server.client.context():
            for _ in range(4):
                try:
                    place()
                except api.RetryError:  # it has tried often enough
                    continue
                done.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ndb.Key(Order, "a").get(use_cache=False).total == len(done) > 0
    until(lambda: rows(server) == 0)
    assert len(queue.tasks()) == len(done)
    assert server.store.transactions == {}


def test_what_was_committed_though_the_answer_was_lost_is_swept(outbox, queue, server, monkeypatch):
    """The commit is done, but its answer says that it failed: ndb raises, and calls no function that waits for a commit."""
    quiet(monkeypatch, outbox)
    server.after["Commit"] = lambda request: lose() if len(request.mutations) > 1 else None

    def lose():
        raise Refused(grpc.StatusCode.DEADLINE_EXCEEDED, "late")

    task = make_task()
    with pytest.raises(api.DeadlineExceeded), outbox.transaction(ndb):
        Order(id="a").put()
        outbox.put(task)
    assert (queue.tasks(), rows(server)) == ([], 1)
    assert outbox.sweep() == 1
    assert (waiting(queue), rows(server)) == ({task.id}, 0)


def test_two_that_find_the_same_task_enqueue_it_once(outbox, queue, server, monkeypatch):
    quiet(monkeypatch, outbox)
    other = Outbox(lambda: queue, environment="test", urls=["datastore://p"], clock=time.time)
    task = make_task()
    with outbox.transaction(ndb):
        outbox.put(task)
    # The other one is killed, as it were, between the two steps: it has enqueued, and deletes nothing.
    monkeypatch.setattr("safedefer.transactions.databases.datastore.EntityReader.delete", lambda *_: None)
    assert other.sweep() == 1
    monkeypatch.undo()
    assert (len(queue.tasks()), rows(server)) == (1, 1)
    outbox.sweep()
    assert (len(queue.tasks()), rows(server)) == (1, 0)
    other.close()


def test_one_that_has_run_already_is_not_enqueued_again(queue, server, context, monkeypatch):
    outbox = Outbox(lambda: queue, environment="test", clock=time.time)
    quiet(monkeypatch, outbox)
    task = make_task()
    with outbox.transaction(ndb):
        outbox.put(task)
    queue.enqueue_many([task])
    (lease,) = take(queue)
    settle(queue, lease, DONE, now=101.0)
    outbox.sweep()
    assert take(queue) == []
    assert rows(server) == 0
    outbox.close()


def test_tasks_of_one_transaction_and_of_many_arrive(outbox, queue, server):
    many = [make_task() for _ in range(60)]
    with outbox.transaction(ndb):
        outbox.put(*many[:30])
    for task in many[30:]:
        with outbox.transaction(ndb):
            outbox.put(task)
    until(lambda: waiting(queue) == {task.id for task in many})
    until(lambda: rows(server) == 0)


def test_credentials_are_found_once_and_not_for_an_emulator(queue, server, monkeypatch):
    real, found, used = ndb.Client, [], []

    def default(**given):
        found.append(AnonymousCredentials())
        return found[-1], "p"

    def connect(*, credentials, **given):
        used.append(credentials)
        with monkeypatch.context() as patch:
            patch.setenv("DATASTORE_EMULATOR_HOST", server.host)
            return real(**given)

    connect.SCOPE = real.SCOPE
    monkeypatch.setattr("google.auth.default", default)
    monkeypatch.setattr(ndb, "Client", connect)
    outbox = Outbox(lambda: queue, environment="test", urls=["datastore://p"], clock=time.time)
    outbox.sweep()
    assert (found, used) == ([], [None])
    monkeypatch.delenv("DATASTORE_EMULATOR_HOST")
    outbox.sweep()
    outbox.sweep()
    assert (len(found), used[1:]) == (1, [found[0]] * 2)


def test_more_tasks_than_are_remembered_are_found(outbox, queue, server, monkeypatch):
    quiet(monkeypatch, outbox)
    monkeypatch.setattr("safedefer.transactions.datastore._REMEMBERED", 2)
    outlet = outbox._outlet(Address("p"))
    outlet._next_look = float("inf")
    with outbox.transaction(ndb):
        outbox.put(*(make_task() for _ in range(5)))
    assert outbox._relay.sweep() == 5
    assert rows(server) == 0


@pytest.mark.parametrize("swept", [False, True])
def test_an_oversize_task_goes_in_pieces(outbox, queue, server, monkeypatch, swept):
    if swept:
        quiet(monkeypatch, outbox)
    task = oversize_task()
    task = task._replace(blob=type(task.blob)(task.blob.id, bytes(range(256)) * 12_000))
    with outbox.transaction(ndb):
        outbox.put(task, make_task())
    if swept:
        assert [len(server.store.kind(kind)) for kind in KINDS] == [2, 3]
        forget(outbox)
        modes = []
        server.before["Commit"] = lambda request: modes.append(request.mode.name)
        assert outbox.sweep() == 2
        # Of the large one all entities, or none: what is left of it without its first one would be found by nobody.
        assert modes == ["TRANSACTIONAL", "NON_TRANSACTIONAL"]
    until(lambda: len(queue.tasks()) == 2)
    assert queue.blobs.get(task.blob.id) == task.blob.data
    until(lambda: rows(server) == 0)


def test_a_task_that_no_transaction_has_room_for_is_refused(outbox, queue, server):
    task = oversize_task()
    task = task._replace(blob=type(task.blob)(task.blob.id, b"x" * 10_000_001))
    with outbox.transaction(ndb):
        Order(id="a").put()
        with pytest.raises(TaskTooLargeError, match="10 MiB"):
            outbox.put(make_task(), task)
    outbox.sweep()
    assert queue.tasks() == []
    assert Order.get_by_id("a") is not None


def test_the_largest_task_fits(outbox, queue, server):
    task = oversize_task()
    task = task._replace(blob=type(task.blob)(task.blob.id, b"x" * 9_990_000))
    with outbox.transaction(ndb):
        outbox.put(task)
    until(lambda: waiting(queue) == {task.id})


# --- Where a task may not be put ---


def test_outside_of_a_transaction_a_task_is_refused(app):
    with pytest.raises(BadTransactionStateError, match="needs a transaction"):
        app.options(transactional=True).defer(tasks.add, 1)


def test_without_a_context_a_block_says_what_is_missing(queue, client):
    outbox = Outbox(lambda: queue, environment="test", clock=time.time)
    with pytest.raises(BadTransactionStateError, match="client.context"), outbox.transaction(ndb):
        pass


def test_another_module_of_that_name_is_no_datastore(outbox):
    with pytest.raises(BadTransactionStateError, match=r"the module google\.cloud\.ndb"), outbox.transaction(sys):
        pass


def test_in_a_paused_transaction_a_task_is_refused(outbox):
    @ndb.non_transactional()
    def paused():
        outbox.put(make_task())

    with outbox.transaction(ndb), pytest.raises(BadTransactionStateError, match="paused"):
        paused()


def test_a_task_with_a_name_or_a_unique_one_is_refused(outbox):
    for change in ({"name": "receipt"}, {"unique_key": "k"}):
        with outbox.transaction(ndb), pytest.raises(BadTransactionStateError, match="no name"):
            outbox.put(make_task(**change))


def test_a_block_is_entered_once_and_by_one_thread(outbox):
    block = outbox.transaction(ndb)
    with block:
        with pytest.raises(BadTransactionStateError, match="open already"), block:
            pass
        with pytest.raises(BadTransactionStateError, match="another thread's"):
            asyncio.run(asyncio.to_thread(outbox.put, make_task()))
    with block:
        pass


def test_a_task_goes_with_the_transaction_that_began_last(outbox, queue, server, tmp_path):
    """A block of another database around a function that is transactional in ndb, and the other way round."""
    import sqlite3

    shop = sqlite3.connect(tmp_path / "shop.db")
    mine, theirs = make_task(), make_task()

    @ndb.transactional()
    def place():
        outbox.put(theirs)

    with pytest.raises(ZeroDivisionError), outbox.transaction(shop):
        outbox.put(mine)
        place()
        raise ZeroDivisionError
    until(lambda: waiting(queue) == {theirs.id})

    @ndb.transactional()
    def place_both():
        with outbox.transaction(shop):
            outbox.put(mine)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        place_both()
    until(lambda: waiting(queue) == {theirs.id, mine.id})
    shop.close()


# --- The relay ---


def test_tasks_of_every_namespace_are_swept(queue, server, client, monkeypatch):
    outbox = Outbox(lambda: queue, environment="test", clock=time.time)
    quiet(monkeypatch, outbox)
    task = make_task()
    with client.context(namespace="tenant"), outbox.transaction(ndb):
        Order(id="a").put()
        outbox.put(task)
    other = Outbox(lambda: queue, environment="test", urls=["datastore://p"], clock=time.time)
    assert other.count() == 1
    assert other.look() == [("datastore://p", None)]
    assert other.sweep() == 1
    assert (waiting(queue), other.count()) == ({task.id}, 0)
    other.close()


def test_another_environments_tasks_and_queues_that_are_not_declared_stay(queue, server, context, monkeypatch):
    outbox = Outbox(lambda: queue, environment="test", clock=time.time)
    quiet(monkeypatch, outbox)
    with outbox.transaction(ndb):
        outbox.put(make_task(), make_task(queue="other", audience="test:other:default:/"))
    staging = Outbox(lambda: queue, environment="staging", urls=["datastore://p"], clock=time.time)
    assert (staging.count(), staging.sweep()) == (0, 0)
    narrow = Outbox(lambda: queue, environment="test", queues=["default"], urls=["datastore://p"], clock=time.time)
    assert (narrow.count(), narrow.sweep(), narrow.count()) == (2, 1, 1)
    for each in (staging, narrow):
        each.close()


def test_a_queue_that_is_away_loses_nothing(server, context, monkeypatch, caplog):
    class Away(MemoryQueue):
        away = True

        def enqueue_many(self, tasks):
            if self.away:
                raise QueueUnavailable("away")
            super().enqueue_many(tasks)

        def stats(self, **given):
            if self.away:
                raise QueueUnavailable("away")
            return super().stats(**given)

    queue = Away()
    outbox = Outbox(lambda: queue, environment="test", clock=time.time)
    quiet(monkeypatch, outbox)
    task = make_task()
    with outbox.transaction(ndb):
        outbox.put(task)
    assert (outbox.sweep(), rows(server)) == (0, 1)
    assert "takes nothing" in caplog.text
    queue.away = False
    # At the relay's next look: it does not wait until the next query is due.
    assert (outbox._relay.sweep(), rows(server), waiting(queue)) == (1, 0, {task.id})


def test_a_datastore_that_does_not_answer_keeps_nobody(server, context, outbox, queue, monkeypatch, caplog):
    quiet(monkeypatch, outbox)

    def refuse(_):
        raise Refused(grpc.StatusCode.PERMISSION_DENIED, "no")

    with outbox.transaction(ndb):
        outbox.put(make_task())
    forget(outbox)
    server.before.update(RunQuery=refuse, RunAggregationQuery=refuse)
    assert (outbox.sweep(), outbox.count()) == (0, None)
    assert outbox.look()[0][1].startswith("it cannot be read (PermissionDenied)")
    assert "PermissionDenied" in caplog.text
    server.before.clear()
    assert outbox.sweep() == 1


def test_answers_that_would_be_too_long_are_asked_for_in_parts(server, context, outbox, queue, monkeypatch):
    """Outside of an emulator, ndb's channel takes 4 MiB at once: some entities of 1 MiB are more."""
    quiet(monkeypatch, outbox)
    with outbox.transaction(ndb):
        outbox.put(*(make_task() for _ in range(9)))
    forget(outbox)

    def refuse(request):
        if len(request.keys) > 2:
            raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max")

    server.before["Lookup"] = refuse
    assert outbox.sweep() == 9


def test_a_commit_costs_no_query_for_what_others_have_left(server, context, outbox, queue, monkeypatch):
    quiet(monkeypatch, outbox)
    with outbox.transaction(ndb):
        outbox.put(make_task())
    (outlet,) = outbox._datastores.values()
    outlet._next_look = float("inf")
    assert outbox._relay.sweep() == 1
    assert (server.calls["Lookup"], server.calls["RunQuery"], rows(server)) == (0, 0, 0)


def test_a_forked_child_uses_no_channel_of_its_parents_and_hands_over_none_of_its_tasks(
    outbox, queue, server, monkeypatch
):
    quiet(monkeypatch, outbox)
    with outbox.transaction(ndb):
        outbox.put(make_task())
    server.calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr("safedefer.transactions.datastore.os.getpid", lambda: -1)
        assert (outbox.sweep(), outbox.count(), outbox.look()) == (0, 0, [("datastore://p", None)])
    assert (queue.tasks(), sum(server.calls.values())) == ([], 0)
    assert outbox.sweep() == 1


def test_a_relay_that_cannot_be_told_does_not_make_ndb_run_the_transaction_again(
    outbox, queue, server, monkeypatch, caplog
):
    def fail(*_):
        raise api.Aborted("an error that ndb would try again after")

    monkeypatch.setattr(outbox._relay, "expect", fail)
    monkeypatch.setattr("safedefer.transactions.datastore.DatastoreOutlet.expect", fail)
    runs = []

    @ndb.transactional()
    def place():
        runs.append(1)
        outbox.put(make_task())

    place()
    assert (len(runs), rows(server)) == (1, 1)
    assert "left to the next sweep" in caplog.text
    assert outbox.sweep() == 1


def test_a_sweep_that_has_no_more_time_says_so(outbox, queue, server, monkeypatch):
    quiet(monkeypatch, outbox)
    with outbox.transaction(ndb):
        outbox.put(*(make_task() for _ in range(30)))
    forget(outbox)
    (outlet,) = outbox._datastores.values()
    assert outlet.move(queue, (None,), time.monotonic() - 1) is None
    assert len(queue.tasks()) == 25
    assert outbox.sweep() == 5


def test_a_process_that_only_sweeps_is_given_a_project_and_maybe_a_database(queue):
    for url in ("datastore:", "datastore://", "datastore://p/d/x", "datastore://p?x=1"):
        with pytest.raises(ConfigurationError, match="datastore://PROJECT"):
            Outbox(lambda: queue, environment="test", urls=[url], clock=time.time)
    urls = ["datastore://p/d", "datastore://p/(default)"]
    outbox = Outbox(lambda: queue, environment="test", urls=urls, clock=time.time)
    assert outbox.databases() == [("datastore://p/d", None), ("datastore://p", None)]


# --- Processes ---

PROGRAM = """
import os, signal, sys, time
from google.cloud import ndb
from safedefer.queues.sqlite.queue import SQLiteQueue
from safedefer.transactions.outbox import Outbox
from tests.queues.contract import make_task

class Order(ndb.Model):
    pass

queue = SQLiteQueue(sys.argv[1])
outbox = Outbox(lambda: queue, environment="test", clock=time.time)

@ndb.transactional()
def place():
    Order(id="a").put()
    outbox.put(make_task(id="f" * 32))
    {before}

with ndb.Client().context():
    place()
    {after}
"""


def run(path, *, before="pass", after="pass"):
    program = textwrap.dedent(PROGRAM).format(before=before, after=after)
    return subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, timeout=280, capture_output=True, text=True, check=False
    )


def test_a_process_killed_between_commit_and_dispatch_leaves_the_task_to_the_sweep(server, tmp_path):
    path = tmp_path / "tasks.db"
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    # In ndb's own order the commit comes first: the function that is registered before ours kills the process.
    ended = run(path, before=f"ndb.get_context().on_commit_callbacks.insert(0, lambda: {kill})")
    assert ended.returncode == -9, ended.stderr
    assert [len(server.store.kind(kind)) for kind in ("Order", *KINDS)] == [1, 1, 0]
    queue = SQLiteQueue(path)
    assert queue.tasks() == []
    outbox = Outbox(lambda: queue, environment="test", urls=["datastore://p"], clock=time.time)
    assert outbox.sweep() == 1
    assert (waiting(queue), rows(server)) == ({"f" * 32}, 0)
    assert outbox.sweep() == 0
    outbox.close()
    queue.close()


def test_a_short_program_empties_its_outbox_before_it_ends(server, tmp_path):
    path = tmp_path / "tasks.db"
    ended = run(path)
    assert (ended.returncode, ended.stderr) == (0, "")
    queue = SQLiteQueue(path)
    assert (waiting(queue), rows(server)) == ({"f" * 32}, 0)
    queue.close()
