"""What a store answers a push engine in one step, and what a crash of the server may undo until the store has synced."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from safedefer.errors import QueueUnavailable
from safedefer.ledger import Admission, AttemptRecord, EndState, Execution
from safedefer.queues.memory.queue import MemoryQueue
from safedefer.queues.postgres.migrations import migrate
from safedefer.queues.postgres.queue import PostgresQueue
from safedefer.queues.push import PushQueue
from safedefer.queues.sqlite.connection import Handle
from safedefer.queues.sqlite.log_sync import LogSync
from safedefer.queues.sqlite.queue import SQLiteQueue
from safedefer.queues.sqlite.writer import Writer
from tests.postgres.server import fresh_database, shared_server
from tests.queues.pushing import PushEngineInMemory

NOW = 1_800_000_000.0
EXPIRES = 4_000_000_000


@pytest.fixture(scope="module")
def dsn():
    server = shared_server()
    with fresh_database(server) as name:
        migrate(server.dsn(name))
        yield server.dsn(name)


def on_server(store, statement, *values):
    async def execute(connection):
        await connection.execute(statement, *values)

    store._store.run(execute)


@pytest.fixture(params=["sqlite", "postgres"])
def store(request, tmp_path):
    if request.param == "sqlite":
        made = SQLiteQueue(tmp_path / "store.db")
    else:
        made = PostgresQueue(request.getfixturevalue("dsn"))
        on_server(made, "DELETE FROM safedefer.ledger")
        on_server(made, "DELETE FROM safedefer.kept")
    yield made
    made.close()


def run(number=1, owner="me"):
    return Execution("prod:mail:default:/run", f"{number:032x}", bytes([number]) * 32, owner, EXPIRES)


def end(execution, state=EndState.SUCCEEDED, **changes):
    outcome = "succeeded" if state is EndState.SUCCEEDED else "retry"
    record = AttemptRecord(execution.task_id, execution.audience, NOW, NOW + 1, outcome, 200)
    return execution, state, record._replace(**changes)


def ask(store, asked):
    """Call what the running loop has of the store's calls."""

    async def on_loop():
        async with store.on_loop():
            return await asked(store.pushed_calls)

    return asyncio.run(on_loop())


def begin_first(store, executions, keys=None, *, synced=True):
    keys = [()] * len(executions) if keys is None else keys
    return ask(store, lambda calls: calls.begin_first(executions, keys, now=NOW, lease=60.0, synced=synced))


def finish(store, ends, *, synced=True):
    return list(ask(store, lambda calls: calls.finish_many(ends, synced=synced)))


@pytest.mark.parametrize("synced", [True, False])
def test_tasks_that_the_ledger_does_not_know_begin_with_what_is_kept_of_them(store, synced):
    store.keep.put("one", b"1", expires=EXPIRES)
    store.keep.put("two", b"2", expires=EXPIRES)
    found = begin_first(store, [run(2), run(1), run(3)], [("two", "none"), ("one", "two"), ()], synced=synced)
    assert found == [{"two": b"2"}, {"one": b"1", "two": b"2"}, {}]
    assert list(store.ledger.begin_many([run(1, "other")], now=NOW, lease=60.0)) == [Admission.RUNNING]
    assert list(store.ledger.begin_many([run(1)], now=NOW, lease=60.0)) == [Admission.RUN]
    assert finish(store, [end(run(1)), end(run(2))], synced=synced) == [True, True]
    assert list(store.ledger.begin_many([run(1, "other")], now=NOW, lease=60.0)) == [Admission.DUPLICATE]


def test_a_task_that_the_ledger_knows_is_not_admitted_and_not_changed(store):
    store.keep.put("one", b"1", expires=EXPIRES)
    assert begin_first(store, [run(1), run(2)]) == [{}, {}]
    assert finish(store, [end(run(2))]) == [True]
    assert begin_first(store, [run(1, "other"), run(2, "other"), run(3)], [("one",)] * 3) == [None, None, {"one": b"1"}]
    assert finish(store, [end(run(1))]) == [True]
    changed = run(3, "thief")._replace(digest=b"x" * 32)
    assert begin_first(store, [changed]) == [None]
    assert list(store.ledger.begin_many([changed], now=NOW, lease=60.0)) == [Admission.CONFLICT]


def test_a_task_that_is_asked_for_twice_at_once_begins_once(store):
    found = begin_first(store, [run(1, "a"), run(1, "b")])
    assert sorted(each is None for each in found) == [False, True]


def forget(store, execution):
    """Undo what a crash of the server undoes of a begin that was not synced."""
    on_server(store, "DELETE FROM safedefer.ledger WHERE task_id = $1", execution.task_id)


@pytest.mark.parametrize("store", ["postgres"], indirect=True)
def test_an_end_counts_whose_begin_a_crash_of_the_server_has_undone(store):
    assert begin_first(store, [run(1), run(2)], synced=False) == [{}, {}]
    forget(store, run(1))
    assert finish(store, [end(run(2)), end(run(1))], synced=False) == [True, True]
    assert list(store.ledger.begin_many([run(1, "other")], now=NOW, lease=60.0)) == [Admission.DUPLICATE]
    assert finish(store, [end(run(1))], synced=False) == [True], "finish is idempotent"


@pytest.mark.parametrize("store", ["postgres"], indirect=True)
def test_another_run_that_began_meanwhile_is_not_changed_by_an_end_that_only_tries_again(store):
    assert begin_first(store, [run(1)], synced=False) == [{}]
    forget(store, run(1))
    assert begin_first(store, [run(1, "other")]) == [{}]
    assert finish(store, [end(run(1), EndState.RETRY)], synced=False) == [False]
    assert list(store.ledger.begin_many([run(1, "third")], now=NOW, lease=60.0)) == [Admission.RUNNING]


def test_a_sync_returns_also_where_nothing_was_written(store):
    store.sync()
    begin_first(store, [run(1)], synced=False)
    store.sync()
    store.sync()


_LOCK = """
import apsw, sys
connection = apsw.Connection(sys.argv[1])
try:
    connection.execute("BEGIN IMMEDIATE")
except apsw.BusyError:
    print("busy")
else:
    print("free")
"""


def test_a_sync_of_the_log_ends_no_lock_of_this_process(tmp_path):
    path = tmp_path / "store.db"
    store = SQLiteQueue(path)
    begin_first(store, [run(1)])

    def is_locked():
        done = subprocess.run([sys.executable, "-c", _LOCK, str(path)], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def action(connection):
        store.sync()
        return is_locked()

    assert store._writer.run(action) == "busy"
    assert is_locked() == "free"
    store.close()


def test_a_log_that_cannot_be_synced_is_an_error_and_one_that_is_gone_is_none(tmp_path):
    log = tmp_path / "store.db-wal"
    path = str(tmp_path / "store.db")
    sync = LogSync(path, Writer(path, busy_timeout=1.0), Handle(path, busy_timeout=1.0))
    sync()
    log.symlink_to(log)  # as any file that cannot be opened
    with pytest.raises(QueueUnavailable):
        sync()


def test_the_ends_of_an_engine_that_syncs_before_it_acknowledges_are_not_synced_one_by_one(tmp_path):
    engine = PushEngineInMemory()
    store = SQLiteQueue(tmp_path / "store.db")
    queue = PushQueue(engine, store)

    async def end_one(number):
        await queue.ledger.here.begin_many([run(number)], now=NOW, lease=60.0)
        return await queue.ledger.here.finish_many([end(run(number))])

    committed = []
    call, sync = store._writer.call, store.ledger.here._sync_log
    store.ledger.here._sync_log = lambda: committed.append("sync") or sync()

    def note(action, *, durable=True, **more):
        committed.append(durable)
        return call(action, durable=durable, **more)

    store._writer.call = note
    assert list(asyncio.run(end_one(1))) == [True]
    assert (queue.synced, committed) == (True, [False, False, "sync"])
    engine.syncs_before_ack = True
    assert list(asyncio.run(end_one(2))) == [True]
    assert (queue.synced, committed[3:]) == (False, [False, False])
    queue.close()


def test_a_store_without_calls_of_its_own_for_push_engines_syncs_its_ends_itself():
    engine = PushEngineInMemory()
    engine.syncs_before_ack = True
    queue = PushQueue(engine, MemoryQueue())
    assert queue.pushed_calls is None
    assert queue.ledger.here is None
    queue.close()
