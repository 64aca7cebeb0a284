"""What a sweep of the outbox in Datastore does where the queue or Datastore gives less than all."""

import time

import grpc
import pytest
from google.cloud import ndb

from safedefer.errors import QueueUnavailable, TaskTooLargeError
from safedefer.queues.base import BlobsFull
from safedefer.queues.memory.queue import MemoryQueue
from safedefer.transactions.databases.sqlite import open_file
from safedefer.transactions.outbox import Outbox
from safedefer.transactions.transfer import TablesOutlet
from tests.datastore.helpers import Outages, PickyQueue, forget, quiet, rows, until, waiting
from tests.datastore.store import Refused
from tests.queues.contract import make_task, oversize_task


@pytest.fixture
def queue():
    return PickyQueue()


@pytest.fixture
def outbox(queue, context, monkeypatch):
    outbox = Outbox(lambda: queue, environment="test", clock=time.time)
    quiet(monkeypatch, outbox)
    yield outbox
    outbox.close()


def large_task(**changes):
    """Return a task of two entities."""
    task = oversize_task(**changes)
    return task._replace(blob=type(task.blob)(task.blob.id, b"x" * 1_500_000))


def commit(outbox, *tasks):
    with outbox.transaction(ndb):
        outbox.put(*tasks)


def outlet_of(outbox):
    (outlet,) = outbox._datastores.values()
    return outlet


def sweeping(queue):
    """Return the outbox of a process that has put nothing there itself."""
    return Outbox(lambda: queue, environment="test", urls=["datastore://p"], clock=time.time)


# --- Tasks that the queue does not take ---


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("make", [make_task, large_task])
def test_a_task_that_the_queue_cannot_store_stops_no_other_and_is_tried_again(
    outbox, queue, server, make, known, caplog
):
    odd, honest = make(id="0" * 32), [make_task() for _ in range(25)]
    queue.odd.add(odd.id)
    commit(outbox, odd, *honest[:13])
    commit(outbox, *honest[13:])
    if not known:
        forget(outbox)
    outbox.sweep()
    assert waiting(queue) == {task.id for task in honest}
    assert rows(server) == (2 if make is large_task else 1)
    assert "takes nothing" in caplog.text
    queue.odd.clear()
    assert outbox.sweep() == 1
    assert (odd.id in waiting(queue), rows(server)) == (True, 0)


def test_it_is_tried_again_by_the_relay_without_being_asked(outbox, queue, server):
    odd = make_task()
    queue.odd.add(odd.id)
    commit(outbox, odd)
    forget(outbox)
    outbox._relay.sweep()
    queue.odd.clear()
    until(lambda: outbox._relay.sweep() or rows(server) == 0)
    assert waiting(queue) == {odd.id}


@pytest.mark.parametrize("error", [QueueUnavailable("no"), BlobsFull("full"), TaskTooLargeError("no", size=2, limit=1)])
def test_what_the_queue_does_not_take_is_read_more_and_more_seldom(outbox, queue, server, monkeypatch, error):
    """Each reading of ten entities costs money: whoever can write one could have it read for ever."""
    now = [1_000.0]
    monkeypatch.setattr("safedefer.transactions.datastore.time.monotonic", lambda: now[0])
    queue.error = error
    odd = large_task()
    queue.odd.add(odd.id)
    commit(outbox, odd)
    forget(outbox)
    for _ in range(3_600):
        outbox._relay.sweep()
        now[0] += 1.0
    assert 5 <= queue.tried.count(odd.id) / 2 <= 15  # in its batch, and by itself
    assert server.calls["Lookup"] <= 2 * 15
    tried = queue.tried.count(odd.id)
    outbox.sweep()  # who asks for it is not put off
    assert queue.tried.count(odd.id) == tried + 2


def test_a_queue_that_is_away_is_asked_again_at_every_look(server, context, monkeypatch):
    queue = Outages()
    outbox = Outbox(lambda: queue, environment="test", clock=time.time)
    quiet(monkeypatch, outbox)
    commit(outbox, make_task(), large_task())
    forget(outbox)
    queue.away = True
    for _ in range(5):
        outbox._relay.sweep()
    queue.away = False
    assert outbox._relay.sweep() == 2
    outbox.close()


@pytest.mark.parametrize("make", [make_task, large_task])
def test_tasks_of_others_are_read_once(outbox, queue, server, make):
    """Another environment's by the audience, though the property names ours, and a queue's that this application lacks."""
    commit(outbox, make(audience="prod:default:default:/"), make(queue="other", audience="test:other:default:/"))
    narrow = Outbox(lambda: queue, environment="test", queues=["default"], urls=["datastore://p"], clock=time.time)
    assert narrow.sweep() == 0
    looked = server.calls["Lookup"]
    assert narrow.sweep() == 0
    assert (server.calls["Lookup"], narrow.count()) == (looked, 2)
    wide = sweeping(queue)
    assert wide.sweep() == 1
    for each in (narrow, wide):
        each.close()


# --- Answers of Datastore that are not all ---


def test_an_empty_answer_that_is_not_the_last_is_no_end(outbox, queue, server):
    """[proto] QueryResultBatch.more_results: a batch may be empty, and the query not finished."""
    commit(outbox, *(make_task() for _ in range(3)))
    forget(outbox)
    empty = [4]

    def answer(_):
        server.batch = 0 if empty[0] > 0 else 1
        empty[0] -= 1

    server.before["RunQuery"] = answer
    assert outbox.sweep() == 3
    assert rows(server) == 0


def test_a_query_that_never_finishes_is_given_up_and_said(outbox, queue, server, caplog):
    commit(outbox, make_task())
    forget(outbox)
    server.batch = 0
    assert outbox.sweep() == 0
    assert server.calls["RunQuery"] <= 200
    assert "cannot be read now" in caplog.text
    assert outbox.look()[0][1].startswith("it cannot be read")
    server.batch = 300
    assert outbox.sweep() == 1


def test_keys_that_a_lookup_has_put_off_are_asked_for_again(outbox, queue, server, caplog):
    """[proto] LookupResponse.deferred: not looked up, because of constraints of the service; they are not missing."""
    tasks = [large_task(), *(make_task() for _ in range(5))]
    commit(outbox, *tasks)
    forget(outbox)
    server.looks_up = 2
    assert outbox.sweep() == 6
    assert (waiting(queue), rows(server), caplog.text) == ({task.id for task in tasks}, 0, "")


def test_a_piece_that_was_put_off_is_not_taken_for_a_missing_one(outbox, queue, server):
    commit(outbox, large_task())
    forget(outbox)
    looks = []

    def answer(request):
        looks.append(len(request.keys))
        server.looks_up = 0 if len(looks) == 2 else 1_000

    server.before["Lookup"] = answer
    assert outbox.sweep() == 1
    assert len(looks) == 3


# --- What was committed here, and fails half way ---


def test_what_was_committed_here_is_not_forgotten_where_a_page_of_it_fails(server, context, monkeypatch):
    queue = Outages()
    outbox = Outbox(lambda: queue, environment="test", clock=time.time)
    quiet(monkeypatch, outbox)
    monkeypatch.setattr("safedefer.transactions.datastore._REMEMBERED", 400)
    for _ in range(3):
        commit(outbox, *(make_task() for _ in range(100)))
    outlet_of(outbox)._next_look = float("inf")
    queue.takes = 1
    outbox._relay.sweep()
    assert rows(server) == 200
    queue.away, queue.takes = False, None
    server.calls.clear()
    assert outbox._relay.sweep() == 200
    assert (rows(server), server.calls["Lookup"]) == (0, 0)
    outbox.close()


def test_a_deletion_that_fails_is_done_at_the_next_sweep(outbox, queue, server):
    commit(outbox, make_task())
    outlet_of(outbox)._next_look = float("inf")

    def refuse(_):
        raise Refused(grpc.StatusCode.UNAVAILABLE, "no")

    server.before["Commit"] = refuse
    outbox._relay.sweep()
    assert (len(queue.tasks()), rows(server)) == (1, 1)
    server.before.clear()
    assert outbox._relay.sweep() == 1
    assert (len(queue.tasks()), rows(server)) == (1, 0)


def test_a_look_that_failed_is_done_again_at_once(outbox, queue, server):
    commit(outbox, make_task())
    forget(outbox)

    def refuse(_):
        raise Refused(grpc.StatusCode.UNAVAILABLE, "no")

    server.before["RunQuery"] = refuse
    outbox._relay.sweep()
    server.before.clear()
    assert outbox._relay.sweep() == 1


@pytest.mark.parametrize("sweeps", ["sweep", "sweep_apart", "finish"])
def test_the_end_of_the_process_looks_again_where_the_last_sweep_failed(server, context, monkeypatch, tmp_path, sweeps):
    queue = Outages()
    outbox = Outbox(lambda: queue, environment="test", clock=time.time)
    quiet(monkeypatch, outbox)
    outbox._relay.add("other", TablesOutlet(open_file(str(tmp_path / "no.db")), outbox._transfer))
    commit(outbox, make_task())
    outbox._relay._wanted += 1  # as the relay's own ``expect`` does
    queue.away = True
    getattr(outbox._relay, sweeps)()
    assert rows(server) == 1
    queue.away = False
    outbox._relay.finish()
    assert (len(queue.tasks()), rows(server)) == (1, 0)
    calls = server.calls.total()
    outbox._relay.finish()  # nothing is expected any more
    assert server.calls.total() == calls
    outbox.close()


def test_a_database_that_fails_keeps_no_other_from_being_done_with(server, context, monkeypatch, tmp_path):
    queue = MemoryQueue()
    urls = [f"sqlite:///{tmp_path}/shop.db", "datastore://p"]
    outbox = Outbox(lambda: queue, environment="test", urls=urls, clock=time.time)
    quiet(monkeypatch, outbox)
    (tmp_path / "shop.db").write_bytes(b"no database" * 1_000)
    commit(outbox, make_task())
    outbox._relay._wanted += 1
    assert outbox._relay.sweep() == 1
    server.calls.clear()
    outbox._relay.finish()
    assert server.calls.total() == 0
    outbox.close()
