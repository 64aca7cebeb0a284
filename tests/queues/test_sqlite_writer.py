"""The writer of the SQLite engine: a lone caller commits in its own thread, others share transactions."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import apsw
import pytest

from safedefer.errors import QueueUnavailable
from safedefer.ledger import Admission, AttemptRecord, EndState
from safedefer.queues.sqlite import log_sync, operations
from safedefer.queues.sqlite.batch import Batch
from safedefer.queues.sqlite.queue import SQLiteQueue
from tests.queues.contract import execution_of, make_task, take


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tasks.db"


@pytest.fixture
def queue(path):
    queue = SQLiteQueue(path)
    yield queue
    queue.close()


def record_of(run) -> AttemptRecord:
    return AttemptRecord(run.task_id, run.audience, 100.0, 101.0, "succeeded", 200)


def state_of(queue, run) -> object:
    with queue._reader.use() as connection:
        return connection.execute("SELECT state FROM safedefer_ledger WHERE task_id = ?", (run.task_id,)).get


def until(condition) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_lone_caller_needs_no_other_thread_and_the_file_is_closed_all_the_same(path):
    queue = SQLiteQueue(path)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(queue.enqueue_many, [make_task()]).result(60.0)
    assert not queue._writer._serving.locked()
    assert path.with_name(f"{path.name}-wal").exists()
    queue.close()
    assert not path.with_name(f"{path.name}-wal").exists()


def test_callers_that_come_while_a_lone_caller_works_share_the_next_transaction(queue, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    batches, run_batch = [], Batch.run

    def count(batch) -> None:
        batches.append(len(batch._operations))
        run_batch(batch)

    def hold(_connection) -> None:
        begun.set()
        go_on.wait(60.0)

    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(queue._writer.run, hold)
        assert begun.wait(60.0)
        others = [pool.submit(queue.enqueue_many, [make_task()]) for _ in range(8)]
        until(lambda: queue._writer._pending.qsize() == 7)  # its thread has one
        monkeypatch.setattr(Batch, "run", count)
        go_on.set()
        for run in (first, *others):
            run.result(60.0)
    assert batches == [8]


@pytest.mark.parametrize("thread", ["its own", "the writer's"])
def test_an_operation_that_calls_the_queue_is_told_so_and_does_not_wait_for_itself(queue, thread):
    def action(_connection) -> None:
        with pytest.raises(QueueUnavailable, match="from within one of its own operations"):
            queue.enqueue_many([make_task()])

    run = queue._writer.run if thread == "its own" else lambda action: queue._writer.submit(action).result(60.0)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run, action).result(60.0)
    assert take(queue) == []


def test_an_interrupted_caller_gets_its_interrupt_and_undoes_what_it_did(queue):
    def interrupted(connection) -> None:
        operations.enqueue(connection, make_task(), blob_limit=1)
        raise KeyboardInterrupt

    def work() -> str:
        try:
            queue._writer.run(interrupted)
        except KeyboardInterrupt:
            queue.enqueue_many([make_task()])
            return "interrupted"
        return "not interrupted"

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result(60.0) == "interrupted"
    assert len(take(queue)) == 1


SIGNALS = """
import signal, sys
from safedefer.queues.sqlite import log_sync, operations
from safedefer.queues.sqlite.queue import SQLiteQueue
from tests.queues.contract import make_task, take
queue, stored = SQLiteQueue(sys.argv[1]), []
def handle(*_):
    queue.enqueue_many([make_task()])
    stored.append(True)
queue.enqueue_many([make_task()])
signal.signal(signal.SIGUSR1, handle)
def interrupted(connection):
    operations.enqueue(connection, make_task(), blob_limit=1)
    signal.raise_signal(signal.SIGUSR1)  # its handler runs in the main thread, wherever that is
for _ in range(20):
    queue._writer.run(interrupted)
assert len(stored) == 20
assert len(take(queue)) == 41
"""


def test_a_signal_handler_may_defer_while_its_thread_defers(path):
    subprocess.run([sys.executable, "-c", SIGNALS, path], timeout=60, check=True)


FORK = """
import os, sys, threading
from safedefer.queues.sqlite.queue import SQLiteQueue
from tests.queues.contract import make_task, take
queue = SQLiteQueue(sys.argv[1])
begun, go_on = threading.Event(), threading.Event()
def hold(connection):
    begun.set()
    go_on.wait(60)
caller = threading.Thread(target=queue._writer.run, args=(hold,))
caller.start()
begun.wait(60)
assert not queue._writer._serving.locked()
threading.Timer(0.05, go_on.set).start()
child = os.fork()
queue.enqueue_many([make_task(id=f"{child:032d}")])
if child == 0:
    queue.close()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
caller.join()
assert len(take(queue)) == 2
"""


def test_a_fork_waits_for_a_lone_caller_and_both_sides_go_on(path):
    subprocess.run([sys.executable, "-c", FORK, path], timeout=60, check=True)


def test_ends_are_committed_at_once_and_told_when_the_log_is_synced(queue):
    """A sync takes as long as many commits: the writer goes on meanwhile."""
    here, synced, task = queue.ledger.here, threading.Event(), make_task()
    sync, run = here._sync_log, execution_of(task)

    def wait_and_sync() -> None:
        assert synced.wait(60.0)
        sync()

    here._sync_log = wait_and_sync

    async def work() -> None:
        await here.begin_many([run], now=100.0, lease=60.0)
        ending = asyncio.ensure_future(here.finish_many([(run, EndState.SUCCEEDED, record_of(run))]))
        await asyncio.to_thread(until, lambda: state_of(queue, run) == "succeeded")
        assert list(await here.begin_many([run], now=100.0, lease=60.0)) == [Admission.DUPLICATE]
        assert not ending.done()
        synced.set()
        assert list(await ending) == [True]

    asyncio.run(work())


def test_an_end_whose_log_is_not_synced_is_not_stored(queue):
    here, run = queue.ledger.here, execution_of(make_task())

    def fail() -> None:
        raise QueueUnavailable("the disk does not sync")

    here._sync_log = fail
    with pytest.raises(QueueUnavailable, match="does not sync"):
        asyncio.run(here.finish_many([(run, EndState.SUCCEEDED, record_of(run))]))


def test_an_end_whose_sync_gets_no_thread_is_not_stored(queue, monkeypatch):
    here, run = queue.ledger.here, execution_of(make_task())

    def refuse(_call) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(here, "_threads", refuse)
    with pytest.raises(QueueUnavailable, match="more threads"):
        asyncio.run(here.finish_many([(run, EndState.SUCCEEDED, record_of(run))]))


def states_without_the_log(queue, folder) -> list[object]:
    """What the file alone has, as if the log had a hole before all that matters."""
    folder.mkdir()
    copied = folder / "tasks.db"
    # By another process: to close the file here would drop the locks of this one.
    subprocess.run(["cp", queue.path, copied], check=True)
    with contextlib.closing(apsw.Connection(str(copied))) as connection:
        return [state for (state,) in connection.execute("SELECT state FROM safedefer_ledger")]


@pytest.mark.parametrize("whose", ["the sync", "the writer"])
def test_after_an_error_of_the_disk_what_was_committed_before_is_not_left_to_the_log(
    queue, tmp_path, monkeypatch, whose
):
    """The system drops what it could not write, and says so once: the next sync succeeds, with a hole in the log."""
    here, runs = queue.ledger.here, [execution_of(make_task()) for _ in range(2)]

    async def end(run) -> None:
        await here.begin_many([run], now=100.0, lease=60.0)
        await here.finish_many([(run, EndState.SUCCEEDED, record_of(run))])

    asyncio.run(end(runs[0]))
    if whose == "the sync":
        sync = log_sync._sync

        def fail(_log) -> None:
            monkeypatch.setattr(log_sync, "_sync", sync)
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(log_sync, "_sync", fail)
        with pytest.raises(QueueUnavailable):
            asyncio.run(end(runs[1]))
    else:
        queue._read(lambda connection: connection.execute("SELECT 1").get)  # keeps the log

        def break_off(connection) -> None:
            connection.execute("ROLLBACK")  # as SQLite does
            raise apsw.IOError("disk I/O error")

        with pytest.raises(QueueUnavailable):
            queue._writer.run(break_off)
    asyncio.run(end(runs[1]))
    assert "succeeded" in states_without_the_log(queue, tmp_path / "copy")


def test_the_name_of_a_log_that_a_fork_has_made_anew_is_synced_too(queue, monkeypatch):
    """On many disks it gets the number of the log that was deleted."""
    synced, run, status_of = [], queue._writer.run, os.fstat

    def always_the_same(opened) -> os.stat_result:
        mode, _, _, *others = status_of(opened)
        return os.stat_result((mode, 1, 2, *others))

    monkeypatch.setattr(log_sync.os, "fstat", always_the_same)
    monkeypatch.setattr(log_sync.os, "fsync", synced.append)
    for _ in range(2):
        run(lambda _connection: None)
        queue.sync()
        queue.sync()
    assert len(synced) == 1
    pid = os.fork()
    if not pid:
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    with contextlib.closing(apsw.Connection(queue.path)) as other:
        other.execute("BEGIN")
        other.execute("SELECT * FROM safedefer_tasks").fetchall()  # as a backup, which nobody waits for
        run(lambda connection: connection.execute("INSERT INTO safedefer_names VALUES ('q', 'n', 1.0)").close())
        queue.sync()
    assert len(synced) == 2


def test_what_others_wait_for_goes_first_and_in_turn_with_the_rest(queue):
    order, gate = [], threading.Event()

    async def work() -> None:
        calls = [queue._writer.call(lambda _: gate.wait(60.0))]
        await asyncio.to_thread(until, lambda: queue._writer._handle.in_use)
        calls += [queue._writer.call(lambda _, number=number: order.append(number)) for number in range(2)]
        calls += [queue._writer.call(lambda _: order.append("urgent"), urgent=True)]
        gate.set()
        await calls[0]
        await asyncio.gather(*calls)

    asyncio.run(work())
    assert order == ["urgent", 0, 1]


def test_a_loop_may_call_for_itself_while_its_other_calls_are_under_way(queue):
    async def work() -> int:
        ledger = queue.ledger.here
        tasks = [make_task() for _ in range(50)]
        calls = []
        for task in tasks:
            calls.append(asyncio.create_task(ledger.begin_many([execution_of(task)], now=100.0, lease=60.0)))
            await asyncio.sleep(0)
            queue.enqueue_many([task])
        return sum([list(found) == [Admission.RUN] for found in await asyncio.gather(*calls)])

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(asyncio.run, work()).result(60.0) == 50
    assert len(take(queue)) == 50
