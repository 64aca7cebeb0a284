"""One bad row stops no other: every column of every table of an engine, with every bad value that the table takes.

The attacker has the storage but no key, and writes what no queue wrote. Columns and types are read from the tables, so
that a column which is added is attacked too.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import time
import tracemalloc
from types import MappingProxyType
from unittest import mock

import apsw
import psycopg
import pytest
from click.testing import CliRunner

from safedefer.blobs import Blob
from safedefer.cli.common import summary
from safedefer.cli.root import main
from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions, InProcessDelivery
from safedefer.errors import ConfigurationError, QueueUnavailable
from safedefer.ledger import AttemptRecord, EndState, Execution
from safedefer.observe.troubles import ProcessReport
from safedefer.queues.base import DeadFilter, QueuedTask, Settlement, TaskState, Verdict, task_digest
from safedefer.queues.copies import load
from safedefer.queues.memory.queue import MemoryQueue
from safedefer.queues.postgres.migrations import migrate
from safedefer.queues.postgres.queue import PostgresQueue
from safedefer.queues.rates import QueueControl, QueueLimits
from safedefer.queues.rules import MOST_ROW_BYTES
from safedefer.queues.sqlite.queue import SQLiteQueue
from tests import sample_tasks
from tests.postgres.server import fresh_database, shared_server
from tests.queues.contract import DONE, make_task
from tests.queues.single import begin, finish
from tests.unit.apps import make_app

_numbers = itertools.count(1)
#: When the copies of tasks were made.
COPIED = 1_000.0
_DEEP = "[" * 100_000
TEXTS = [
    "",
    "{",
    "null",
    "[]",
    "NaN",
    '{"a": {}}',
    '{"a": 1e999}',
    '"\\u0000"',
    "\x1b[2J",
    "x" * 3_000_000,
    _DEEP,
    None,
]
WHOLE = [-(2**63), -(2**31), -1, 0, 2**31 - 1, 2**63 - 1, None]
HINTS = [
    *TEXTS[2:8], "1", '"x"', '{"safedefer": 1}', '{"safedefer": "nan inf -1 - a b", "safedefer_more": []}',
    '{"safedefer": "1e999 -1e999 99999999999999999999 ! a b"}', '{"safedefer": "x"}',
    json.dumps({"safedefer": f"1 1 1 - {'a:b:c:/' + 'z' * 5000} f"}),
    *(json.dumps({"safedefer_more": {name: value for name in ("url", "target", "name", "headers", "retry_options", "blob_id", "unique_key")}})
      for value in (1, "x" * 5000, {"a": []}, [], None)),
    json.dumps({"safedefer": "x" * 3_000_000}), None,
]  # fmt: skip


class Postgres:
    types = MappingProxyType({
        "text": TEXTS,
        "jsonb": HINTS,
        "bigint": WHOLE,
        "integer": WHOLE,
        "double precision": ["NaN", "Infinity", "-Infinity", "1e308", "-1e308", "0", None],
        "timestamp with time zone": ["infinity", "-infinity", "294276-12-31", "4713-01-01 BC", "0001-01-01", None],
        "interval": ["178000000 years", "-178000000 years", None],
        "bytea": [b"", b"\x00\xff", bytes(3_000_000), None],
        "boolean": [True, False, None],
        "uuid": ["00000000-0000-0000-0000-000000000000", None],
        "USER-DEFINED": ["queued", "picked", "failed", "deleted"],
    })  # fmt: skip
    #: Which row of a table is that of a task.
    rows = MappingProxyType({
        "pgqueuer": "dedupe_key = %s",
        "progress": "job_id = (SELECT id FROM safedefer.pgqueuer WHERE dedupe_key = %s)",
        "names": "name = (SELECT headers #>> '{safedefer_more,name}' FROM safedefer.pgqueuer WHERE dedupe_key = %s)",
        "controls": "queue = (SELECT split_part(entrypoint, '@', 1) FROM safedefer.pgqueuer WHERE dedupe_key = %s)",
        **dict.fromkeys(("uniques", "blobs", "ledger", "attempts", "copies"), "task_id = %s"),
        **dict.fromkeys(("dead", "ended"), "id = %s"),
        "notices": "process = %s",
        "kept": "key = 'k:' || %s",
    })  # fmt: skip
    #: No row of them is one task's. The log, the schedules and the statistics are written, and never read.
    others = frozenset({"settings", "blob_totals", "pgqueuer_log", "pgqueuer_schedules", "pgqueuer_statistics"})
    tasks = ("pgqueuer", "headers", "payload")

    def __init__(self, dsn):
        self.dsn = dsn
        self.connection = psycopg.connect(dsn, autocommit=True)

    def queue(self):
        return PostgresQueue(self.dsn)

    def columns(self):
        return self.connection.execute(
            "SELECT table_name, column_name, data_type FROM information_schema.columns WHERE table_schema = 'safedefer'"
            " AND is_generated = 'NEVER' AND is_identity = 'NO' ORDER BY 1, 2"
        ).fetchall()

    def write(self, table, column, task_id, value):
        with contextlib.suppress(psycopg.Error):  # the table does not take the value
            self.connection.execute(
                f"UPDATE safedefer.{table} SET {column} = %s WHERE {self.rows[table]}", (value, task_id)
            )

    def clear(self):
        tables = ", ".join(f"safedefer.{table}" for table in {*self.rows, "blob_totals", "pgqueuer_log"})
        self.connection.execute(f"TRUNCATE {tables}")

    def close(self):
        self.connection.close()


class SQLite:
    types = MappingProxyType({
        "TEXT": [*TEXTS, b"a\xff"],
        "INTEGER": [-(2**63), -1, 0, 2**63 - 1, None, b"x", "x", 1e300],
        "REAL": [float("inf"), float("-inf"), 1e308, -1e308, 0.0, None, b"x", "x", 2**63 - 1],
        "BLOB": [b"", b"\x00\xff", bytes(3_000_000), None, "x", 1, 1.5],
    })  # fmt: skip
    rows = MappingProxyType({
        "blobs": "task = (SELECT seq FROM safedefer_tasks WHERE id = ?)",
        "names": "name = (SELECT name FROM safedefer_tasks WHERE id = ?)",
        "controls": "queue = (SELECT queue FROM safedefer_tasks WHERE id = ?)",
        **dict.fromkeys(("ledger", "attempts", "copies"), "task_id = ?"),
        **dict.fromkeys(("tasks", "dead", "ended"), "id = ?"),
        "notices": "process = ?",
        "kept": "key = 'k:' || ?",
    })  # fmt: skip
    others = frozenset({"schema", "totals"})
    tasks = ("tasks", "headers", "token")

    def __init__(self, path):
        self.path = path

    def queue(self):
        return SQLiteQueue(self.path)

    def _connect(self):
        connection = apsw.Connection(str(self.path))
        connection.set_busy_timeout(5000)
        return connection

    def columns(self):
        connection = self._connect()
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE name LIKE 'safedefer#_%' ESCAPE '#' AND type = 'table'").fetchall()]  # fmt: skip
        found = [
            (table.removeprefix("safedefer_"), column[1], column[2])
            for table in tables
            for column in connection.execute(f"PRAGMA table_info({table})").fetchall()
            if column[1] != "seq"
        ]
        connection.close()
        return found

    def write(self, table, column, task_id, value):
        """Write a value of any storage class: who has the file is not held to STRICT."""
        connection, name = self._connect(), f"safedefer_{table}"
        connection.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 0)
        strict = connection.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (name,)).get
        change = "UPDATE sqlite_schema SET sql = ? WHERE name = ?"
        for sql, action in ((strict.replace("STRICT,", "").replace("STRICT", ""), True), (strict, False)):
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute(change, (sql, name))
            connection.execute("PRAGMA writable_schema = RESET")
            if action:
                bound = "CAST(? AS TEXT)" if value == b"a\xff" else "?"
                with contextlib.suppress(apsw.ConstraintError):  # the table does not take the value
                    connection.execute(
                        f"UPDATE {name} SET {column} = {bound} WHERE {self.rows[table]}", (value, task_id)
                    )
        connection.close()

    def write_one(self, table, column, value):
        """Write the value into the table's one row, whatever the columns take; "gone" deletes the row."""
        with contextlib.closing(self._connect()) as connection:
            name = f"safedefer_{table}"
            if value == "gone":
                connection.execute(f"DELETE FROM {name}")
                return
            connection.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 0)
            lax = connection.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (name,)).get
            for sql in (lax.replace("STRICT", "").replace("NOT NULL", ""), lax):
                connection.execute("PRAGMA writable_schema = ON")
                connection.execute("UPDATE sqlite_schema SET sql = ? WHERE name = ?", (sql, name))
                connection.execute("PRAGMA writable_schema = RESET")
                if sql is not lax:
                    connection.execute(f"UPDATE {name} SET {column} = ?", (value,))
                    if not connection.changes():
                        connection.execute(f"INSERT INTO {name} VALUES (?)", (value,))

    def clear(self):
        connection = self._connect()
        for table in self.rows:
            connection.execute(f"DELETE FROM safedefer_{table}")
        connection.close()


@pytest.fixture(scope="module")
def postgres():
    server = shared_server()
    with fresh_database(server) as name:
        migrate(server.dsn(name))
        with contextlib.closing(Postgres(server.dsn(name))) as storage:
            yield storage


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory):
    storage = SQLite(tmp_path_factory.mktemp("poisoned") / "tasks.db")
    queue = storage.queue()
    queue.stats(now=0.0)
    queue.close()
    return storage


@pytest.fixture(params=["sqlite", "postgres"])
def storage(request):
    storage = request.getfixturevalue(request.param)
    storage.clear()
    return storage


@pytest.fixture
def app(storage):
    queues = [f"q{number}" for number in range(30)]
    app = make_app(queue=storage.queue(), queues=queues)
    yield app
    app.close()


def copied(task_id):
    """Return a task of which the queue has a copy, as for a push engine."""
    return QueuedTask(
        id=task_id, queue="q", token=b"a.b.c", audience="copied", url="/", target="default", eta=COPIED, created=COPIED,
        expires=int(COPIED) + 60,
    )  # fmt: skip


class World:
    """A neighbour before, one task for each bad value, and a neighbour after, each in a queue of its own."""

    def __init__(self, app, count):
        self.app, self.queue = app, app.queue
        # A cap gives every queue a row of its own among the controls.
        self.queue.configure([QueueLimits(queue=f"q{n}", max_concurrent=5) for n in range(count + 2)], now=time.time())
        self.tasks = []
        for number in range(count + 2):
            options = app.options(queue=f"q{number}", name=f"n{next(_numbers)}")
            # Every other one is oversize, and has a blob.
            self.tasks.append(options.defer(sample_tasks.add, "x" if number % 2 else "x" * 12_000, str(number)))

        for task in self.tasks:
            self.queue.put_notice(task.id, ProcessReport(command="run").text(), now=time.time())
            self.queue.keep.put(f"k:{task.id}", b"kept", expires=int(time.time()) + 60)
        self.queue.copies.put_many([copied(task.id) for task in self.tasks])

    @property
    def bad(self):
        return [task.id for task in self.tasks[1:-1]]

    @property
    def good(self):
        return {self.tasks[0].id, self.tasks[-1].id}

    def lease(self):
        return list(self.queue.lease(owner="w", limit=100, seconds=60.0, now=time.time()))

    def settle(self, leases, verdict, state):
        """Run, end the runs in the ledger, and settle the deliveries in one batch; return whose settlement counted."""
        now = time.time()
        for held in leases:
            task = held.task
            run = Execution(task.audience, task.id, task_digest(task), "w", task.expires)
            begin(self.queue.ledger, run, now=now, lease=60.0)
            finish(self.queue.ledger, run, state, AttemptRecord(task.id, task.audience, now, now, str(state), 500))
        kept = self.queue.settle_many(
            [(held, Settlement(verdict=verdict, at=now, reason="why")) for held in leases], now=now
        )
        return {held.task.id for held, ours in zip(leases, kept, strict=True) if ours}

    def look(self):
        """Everything that there is to see, as the commands print it, in pages of three."""
        views = [*self.queue.tasks(states=list(TaskState), limit=1000)]
        letters, after = [], None
        while page := self.queue.dead_letters(DeadFilter(), after=after, limit=3):
            letters += page
            after = (0.0 if page[-1].ended is None else page[-1].ended, page[-1].id)
            assert len(letters) < 100, "the pages have no end"
        views += letters
        listed = set()
        for state in TaskState:
            position, pages = None, 0
            while True:
                part = self.queue.page(state, after=position, look=3)
                listed |= {each.view.id for each in part.tasks}
                position, pages = part.after, pages + 1
                assert pages < 100, "the pages of a state have no end"
                if position is None:
                    break
        # What is listed at once, and is no archived letter, is on a page too.
        letter_ids = {view.id for view in letters}
        assert {view.id for view in views} - letter_ids <= listed, "a page hides what the list shows"
        self.queue.ends(since=time.time() - 900.0, step=60.0)
        self.queue.attempt_times(since=time.time() - 900.0)
        for notice in self.queue.notices(since=0.0):
            ProcessReport.read(notice, now=time.time())
        values = self.queue.keep.get_many([f"k:{task.id}" for task in self.tasks])
        assert {type(value) for value in values.values()} <= {bytes}
        assert {values[f"k:{task_id}"] for task_id in self.good} == {b"kept"}
        looked, copied_tasks = self.queue.copies.look(now=COPIED + 10.0, limit=1000)
        assert self.good <= {copy.task_id for copy in copied_tasks} and looked >= len(copied_tasks)
        for copy in copied_tasks:
            load(copy)
        self.queue.copies.put_off([(copy.audience, copy.task_id) for copy in copied_tasks], until=COPIED)
        for view in views:
            json.dumps(summary(view))
        self.queue.stats(now=time.time())
        self.queue.next_due(now=time.time())
        return {view.id for view in letters}, {view.id for view in views}


def columns_of(storage, *tables):
    found = [item for item in storage.columns() if not tables or item[0] in tables]
    assert found
    return [item for item in found if item[0] not in storage.others]


def poison(storage, world, table, column, kind):
    for task_id, value in zip(world.bad, storage.types[kind], strict=True):
        storage.write(table, column, task_id, value)


def by_day(start, step):
    """Some of the columns, but at night all of them: each takes a world of its own."""
    return slice(None) if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else slice(start, None, step)


def each_column(storage, app, *tables, part=slice(None)):
    """Yield for each column a world to poison in it; afterwards nothing is left of it."""
    for table, column, kind in columns_of(storage, *tables)[part]:
        storage.clear()
        yield World(app, len(storage.types[kind])), (table, column, kind)


def test_every_table_is_attacked(storage, app):
    app.queue.stats(now=0.0)
    assert {table for table, _, _ in storage.columns()} == {*storage.rows, *storage.others}
    assert {kind for _, _, kind in columns_of(storage)} <= set(storage.types)


def test_a_bad_row_that_waits_lets_its_neighbours_run_and_be_seen(storage, app):
    for world, where in each_column(storage, app, part=by_day(0, 5)):
        assert len(world.settle(world.lease(), Verdict.RETRY, EndState.RETRY)) == len(world.tasks)
        poison(storage, world, *where)
        assert world.good <= world.look()[1], where
        leases = world.lease()
        assert world.good <= {held.task.id for held in leases}, where
        assert world.good <= world.settle(leases, Verdict.DONE, EndState.SUCCEEDED), where
        assert world.good <= world.look()[1], where
        for task_id in world.good:
            assert app.queue.find(task_id).state is TaskState.SUCCEEDED, where


_VERDICTS = ((Verdict.RETRY, EndState.RETRY), (Verdict.DEAD, EndState.FAILED))


@pytest.mark.parametrize(
    ("verdict", "state", "part"), [(*pair, by_day(part, 8)) for pair, part in zip(_VERDICTS, (1, 4), strict=True)]
)
def test_a_row_that_goes_bad_while_it_runs_lets_its_neighbours_be_settled(storage, app, verdict, state, part):
    for world, where in each_column(storage, app, part=part):
        leases = world.lease()
        assert len(leases) == len(world.tasks), where
        poison(storage, world, *where)
        assert world.good <= world.settle(leases, verdict, state), where
        assert world.good <= world.look()[1], where


def test_a_bad_dead_letter_hides_no_other_and_lets_the_others_run_again(storage, app):
    for world, where in each_column(storage, app, "dead", "attempts", "ledger", "pgqueuer", "blobs", part=by_day(1, 4)):
        world.settle(world.lease(), Verdict.DEAD, EndState.FAILED)
        poison(storage, world, *where)
        letters, views = world.look()
        assert world.good <= letters & views, where
        if where[:2] not in {("dead", "archived"), ("dead", "id")}:
            assert len(letters) == len(world.tasks), where  # it is shown as what it is
        for task_id in world.good:
            assert app.queue.find(task_id).state is TaskState.DEAD, where
        time.sleep(0.001)
        again, refused = app.retry_all(DeadFilter())
        assert len(again) >= 2, where
        assert not world.good & set(refused), where
        assert all(error.slug for error in refused.values())


def test_a_bad_row_of_the_history_hides_no_other(storage, app):
    for world, where in each_column(storage, app, "ended", "attempts", "ledger", part=by_day(0, 3)):
        world.settle(world.lease(), Verdict.DONE, EndState.SUCCEEDED)
        poison(storage, world, *where)
        assert world.good <= world.look()[1], where
        app.queue.prune(now=time.time())


def too_large(storage, world, column):
    """Make the headers (1) or the token (2) of the bad task larger than any of ours; return their size."""
    table, name, size = storage.tasks[0], storage.tasks[column], 20 * MOST_ROW_BYTES
    kind = next(kind for where, found, kind in storage.columns() if (where, found) == (table, name))
    value = bytes(size) if kind in {"bytea", "BLOB"} else json.dumps({"safedefer": "x" * size})
    storage.write(table, name, world.bad[0], value)
    return size


@pytest.mark.parametrize("column", [1, 2])
def test_a_row_above_what_a_queue_writes_is_not_fetched(storage, app, column):
    world = World(app, 1)
    size = too_large(storage, world, column)
    tracemalloc.start()
    try:
        leases = world.lease()
        world.look()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 2
    assert {held.task.id for held in leases} == {*world.good, *world.bad}
    (lost,) = (held for held in leases if held.task.id in world.bad)
    assert lost.task.headers == {}
    assert (lost.task.token == b"") is (column == 2)


def test_a_task_whose_token_is_too_large_is_buried_and_its_neighbours_run(storage, app):
    world = World(app, 1)
    too_large(storage, world, 2)
    options = DispatcherOptions(poll_seconds=0.05)
    dispatcher = Dispatcher(app.queue, InProcessDelivery(app.handle), clock=time.time, options=options)
    asyncio.run(asyncio.wait_for(dispatcher.run_until_empty(), 60))
    for task_id in world.good:
        assert app.queue.find(task_id).state is TaskState.SUCCEEDED
    (letter,) = app.queue.dead_letters(DeadFilter())
    assert (letter.id, letter.reason, letter.token) == (world.bad[0], "unreadable", b"")
    again, refused = app.retry_all(DeadFilter())
    assert (again, list(refused)) == ([], world.bad)


@pytest.mark.parametrize("verdict", [Verdict.DONE, Verdict.DEAD])
def test_what_the_ledgers_index_does_not_take_lets_its_neighbours_be_settled(postgres, verdict, caplog):
    """An audience and an id that are too long together: only the end of the task finds out."""
    postgres.clear()
    app = make_app(queue=postgres.queue(), queues=["q0", "q1", "q2"])
    world = World(app, 1)
    audience = f"test:q1:default:/{secrets.token_hex(1200)}"
    hints = json.dumps({"safedefer": f"1 1 1 - {audience} f"})
    postgres.write("pgqueuer", "headers", world.bad[0], hints)
    postgres.write("pgqueuer", "dedupe_key", world.bad[0], secrets.token_hex(1200))
    leases = world.lease()
    assert len(leases) == 3
    now = time.time()
    settled = app.queue.settle_many([(held, Settlement(verdict=verdict, reason="why")) for held in leases], now=now)
    assert [held.task.id in world.good for held in leases] == list(settled)
    for task_id in world.good:
        found = app.queue.find(task_id).state
        assert found is (TaskState.SUCCEEDED if verdict is Verdict.DONE else TaskState.DEAD)
    assert "cannot be settled" in caplog.text
    app.close()


# --- Records of attempts ----------------------------------------------------------------------------------------------


def test_many_and_large_records_of_a_dead_letter_do_not_fill_the_memory(storage, app):
    task, neighbour = app.defer(sample_tasks.add, 1), app.defer(sample_tasks.add, 2)
    leases = app.queue.lease(owner="w", limit=2, seconds=60.0, now=time.time())
    records = [
        AttemptRecord(task.id, "a", float(n), float(n), "o", 500, str(n), None, "x" * (2_000_000 if n > 280 else 1_000))
        for n in range(300)
    ]
    for held in leases:
        app.queue.settle_many([(held, Settlement(verdict=Verdict.DEAD, reason="why"))], now=time.time())
    kept = "safedefer.queues.postgres.records.RECORDS_KEPT", "safedefer.queues.rules.RECORDS_KEPT"
    with contextlib.ExitStack() as stack:
        for name in kept:  # a writer of the storage trims nothing
            stack.enter_context(mock.patch(name, 10_000))
        app.queue.ledger.record_many(records)
    del records
    tracemalloc.start()
    letters = app.queue.dead_letters(DeadFilter())
    found = app.queue.find(task.id)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {view.id for view in letters} == {task.id, neighbour.id}
    assert [record.reason for record in found.records] == [str(n) for n in range(200, 300)]
    assert peak < 20_000_000


# --- The ledger while tasks run ---------------------------------------------------------------------------------------


def test_a_bad_entry_of_a_task_that_runs_hides_no_cancellation(storage, app):
    for table, column, kind in columns_of(storage, "ledger"):
        storage.clear()
        world = World(app, len(storage.types[kind]))
        runs = [
            Execution(held.task.audience, held.task.id, task_digest(held.task), "w", held.task.expires)
            for held in world.lease()
        ]
        for run in runs:
            begin(app.queue.ledger, run, now=time.time(), lease=60.0)
        poison(storage, world, table, column, kind)
        for task_id in world.good:
            assert app.queue.cancel(task_id, now=time.time()), column
        cancelled = dict(zip((run.task_id for run in runs), app.queue.ledger.cancelled_many(runs), strict=True))
        assert all(cancelled[task_id] for task_id in world.good), column
        assert not any(cancelled[task_id] for task_id in world.bad), column


def test_a_huge_digest_or_owner_is_not_fetched(storage, app):
    huge = bytes(30_000_000), "x" * 30_000_000
    task = app.defer(sample_tasks.add, 1)
    (held,) = app.queue.lease(owner="w", limit=1, seconds=60.0, now=time.time())
    run = Execution(held.task.audience, held.task.id, task_digest(held.task), "w", held.task.expires)
    begin(app.queue.ledger, run, now=time.time(), lease=60.0)
    for column, value in zip(("digest", "owner"), huge, strict=True):
        storage.write("ledger", column, task.id, value)
        tracemalloc.start()
        begin(app.queue.ledger, run._replace(owner="other"), now=time.time(), lease=60.0)
        app.queue.ledger.cancelled_many([run])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10_000_000, column


# --- Numbers of rows in SQLite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    *(f"UPDATE safedefer_tasks SET seq = {number} WHERE callable_name = 'bad'; UPDATE safedefer_blobs SET task = {number}"
      for number in (2**63 - 1, 2**60, -(2**63), -1)),
    *(f"UPDATE sqlite_sequence SET seq = {value}" for value in (2**63 - 1, 2**60, "9e999", "-9e999", "'x'", "x'ff'", "1.5", "-5", "NULL")),
    "DELETE FROM sqlite_sequence", "INSERT INTO sqlite_sequence VALUES ('safedefer_tasks', 9e999)",
])  # fmt: skip
def test_no_number_of_a_row_stops_tasks_from_coming_and_going(sqlite, change):
    sqlite.clear()
    with contextlib.closing(sqlite.queue()) as queue:
        bad = make_task(callable_name="bad", blob=Blob("b" * 32, b"stored"))
        before, after, late = make_task(), make_task(), make_task()
        queue.enqueue_many([before, bad, after])
        seen = queue.lease(owner="w", limit=0, seconds=60.0, now=1e9)
        assert not seen
        connection = apsw.Connection(str(sqlite.path))
        connection.set_busy_timeout(5000)
        connection.execute(change)
        assert queue.wait(0.2) in {True, False}
        queue.purge("another", now=1e9)
        queue.enqueue_many([late])
        assert queue.wait(60.0), "nobody hears of the new task"
        leases = {held.task.id: held for held in queue.lease(owner="w", limit=10, seconds=60.0, now=1e9)}
        assert set(leases) == {before.id, bad.id, after.id, late.id}
        assert queue.blobs.get("b" * 32) == b"stored"
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        connection.close()
        assert all(queue.settle_many([(held, DONE) for held in leases.values()], now=1e9))
        queue.enqueue_many([make_task()])


@pytest.mark.parametrize("number", [2**53, 2**53 - 1, 2**53 - 2**32, 2**53 - 2**33])
def test_a_row_with_one_of_the_last_numbers_leaves_numbers_for_others(sqlite, number):
    """A repair numbers from the largest number on that may stay: no task was stored or leased any more."""
    sqlite.clear()
    with (
        contextlib.closing(sqlite.queue()) as queue,
        contextlib.closing(apsw.Connection(str(sqlite.path))) as connection,
    ):
        connection.set_busy_timeout(5000)
        bad = make_task(blob=Blob("b" * 32, b"stored"))
        queue.enqueue_many([bad])
        connection.execute(f"UPDATE safedefer_tasks SET seq = {number}; UPDATE safedefer_blobs SET task = {number}")
        others = [make_task() for _ in range(8)]
        for task in others:
            queue.enqueue_many([task])
            connection.execute("UPDATE sqlite_sequence SET seq = 'x'" if task is others[3] else "SELECT 1")
        leases = queue.lease(owner="w", limit=10, seconds=60.0, now=1e9)
        assert {held.task.id for held in leases} == {bad.id, *(task.id for task in others)}
        assert queue.blobs.get("b" * 32) == b"stored"


def test_a_transaction_of_the_user_s_that_meets_such_a_number_says_what_to_do(sqlite):
    sqlite.clear()
    with (
        contextlib.closing(sqlite.queue()) as queue,
        contextlib.closing(apsw.Connection(str(sqlite.path))) as connection,
    ):
        connection.execute("UPDATE sqlite_sequence SET seq = 9223372036854775807")
        with pytest.raises(QueueUnavailable, match="outside of a transaction"):
            queue.enqueue_on(connection, [make_task()])
        queue.enqueue_many([make_task()])
        queue.enqueue_on(connection, [make_task()])


# --- Controls, settings and totals ------------------------------------------------------------------------------------


def test_a_lease_reads_no_controls_but_those_of_queues_that_have_tasks(storage, app):
    """200,000 rows of queues without tasks made each lease take 4.6 s."""
    now = time.time()
    app.queue.configure([QueueLimits(queue=f"other{n:04}", rate=1.0) for n in range(300)], now=now)
    app.queue.pause("q1", paused=True, now=now)
    tasks = [app.options(queue=f"q{n}").defer(sample_tasks.add, n) for n in range(3)]
    read, stored = [], QueueControl.stored

    def count(**values):
        read.append(values["queue"])
        return stored(**values)

    with mock.patch.object(QueueControl, "stored", count):
        for queues in (None, ["q0", "q1", "q2"]):
            assert app.queue.next_due(now=now, queues=queues) <= now + 1
            leases = app.queue.lease(owner="w", limit=1, seconds=60.0, now=time.time(), queues=queues)
            assert leases[0].task.id in {tasks[0].id, tasks[2].id}
        app.queue.hold("q2", until=now + 60, now=now)
        app.queue.pause("q0", paused=True, now=now)
    assert set(read) <= {"q0", "q1", "q2"}
    assert len(app.queue.controls(now=now)) == 303


def test_limits_of_many_queues_that_nobody_declares_end_in_one_statement(storage, app):
    now = time.time()
    app.queue.configure([QueueLimits(queue=f"other{n:04}", rate=1.0) for n in range(300)], now=now)
    app.queue.pause("other0007", paused=True, now=now)
    app.queue.hold("other0008", until=now + 3000, now=now)
    app.queue.configure([QueueLimits(queue="other0009", rate=1.0)], now=now)
    left = {control.queue: control for control in app.queue.controls(now=now)}
    assert sorted(left) == ["other0007", "other0008", "other0009"]
    assert left["other0007"].limits == QueueLimits(queue="other0007")
    assert left["other0008"].held_until > now + 2900
    assert left["other0009"].limits.rate == 1.0


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 2**62, -1, None, b"x", "x" * 100_000, "gone"])
def test_a_total_of_blobs_that_somebody_wrote_stops_no_oversize_task(sqlite, value):
    sqlite.clear()
    sqlite.write_one("totals", "blob_bytes", 0)
    with contextlib.closing(sqlite.queue()) as queue:
        kept, neighbour = make_task(blob=Blob("c" * 32, b"stored")), make_task()
        queue.enqueue_many([kept, neighbour])
        sqlite.write_one("totals", "blob_bytes", value)
        leases = queue.lease(owner="w", limit=10, seconds=60.0, now=1e9)
        assert queue.settle_many([(held, DONE) for held in leases], now=1e9) == [True, True]
        sqlite.write_one("totals", "blob_bytes", value)
        queue.enqueue_many([make_task(blob=Blob(secrets.token_hex(16), b"more"))])
    with contextlib.closing(sqlite._connect()) as connection:
        assert connection.execute("SELECT blob_bytes FROM safedefer_totals").fetchall() == [(4,)]
        connection.execute("DELETE FROM safedefer_totals; INSERT INTO safedefer_totals VALUES (0)")
        connection.execute("DELETE FROM safedefer_tasks")


@pytest.mark.parametrize("value", [2**63 - 1, -1, None, b"x", "x", 1.5, "gone"])
def test_a_version_of_the_file_that_somebody_wrote_is_refused_in_words(tmp_path, value):
    storage = SQLite(tmp_path / "tasks.db")
    with contextlib.closing(storage.queue()) as queue:
        queue.enqueue_many([make_task()])
    storage.write_one("schema", "version", value)
    with contextlib.closing(storage.queue()) as queue, pytest.raises(QueueUnavailable, match=r"tasks\.db"):
        queue.stats(now=0.0)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "-1", "0", "1e308"])
def test_a_lease_time_that_somebody_wrote_is_bounded(postgres, value):
    postgres.clear()
    postgres.connection.execute("UPDATE safedefer.settings SET lease_seconds = %s", (value,))
    with contextlib.closing(postgres.queue()) as queue:
        task = make_task()
        queue.enqueue_many([task])
        queue.stats(now=time.time())
        queue.next_due(now=time.time())
        assert queue.cancel(task.id, now=time.time())
    postgres.connection.execute("UPDATE safedefer.settings SET lease_seconds = 60")


@pytest.mark.parametrize(("column", "value"), [
    ("version", 2**31 - 1), ("version", -1), ("pgqueuer", "x\n\x1b[2J" + "x" * 20_000_000), ("marker", "x" * 20_000_000), ("row", None),
])  # fmt: skip
def test_settings_that_somebody_wrote_are_refused_in_words_or_ignored(postgres, column, value):
    postgres.clear()
    postgres.connection.execute("CREATE TABLE pg_temp.kept AS SELECT * FROM safedefer.settings")
    change = "DELETE FROM safedefer.settings" if column == "row" else f"UPDATE safedefer.settings SET {column} = %s"
    postgres.connection.execute(change, () if column == "row" else (value,))
    try:
        with contextlib.closing(postgres.queue()) as queue:
            try:
                queue.stats(now=time.time())
            except ConfigurationError as error:
                assert str(error).isprintable()
                assert len(str(error)) < 1000
                assert column != "marker"
            assert column == "row" or len(queue.marker if column == "marker" else "") <= 1000
    finally:
        postgres.connection.execute("DELETE FROM safedefer.settings")
        postgres.connection.execute("INSERT INTO safedefer.settings SELECT * FROM pg_temp.kept")
        postgres.connection.execute("DROP TABLE pg_temp.kept")


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 2**60])
def test_a_total_of_blobs_in_the_database_is_counted_anew(postgres, value):
    postgres.clear()
    with contextlib.closing(postgres.queue()) as queue:
        queue.enqueue_many([make_task(blob=Blob("d" * 32, b"stored"))])
        postgres.connection.execute("UPDATE safedefer.blob_totals SET bytes = %s", (value,))
        queue.enqueue_many([make_task()])
        queue.prune(now=time.time())
        queue.enqueue_many([make_task(blob=Blob("e" * 32, b"more"))])
    assert postgres.connection.execute("SELECT sum(bytes) FROM safedefer.blob_totals").fetchone() == (10,)


# --- Purging dead letters ---------------------------------------------------------------------------------------------


class LettersThatStay(MemoryQueue):
    """Shows dead letters in pages, and deletes those of even numbers only."""

    pages, batches = (), ()

    def dead_letters(self, where, *, after=None, limit=100):
        page = super().dead_letters(where, after=after, limit=limit)
        self.pages = (*self.pages, len(page))
        assert len(self.pages) < 20, "the purge has no end"
        return page

    def drop_dead(self, task_ids):
        self.batches = (*self.batches, len(task_ids))
        return super().drop_dead([task_id for task_id in task_ids if int(task_id, 16) % 2 == 0])


def test_a_purge_of_dead_letters_goes_in_batches_and_has_an_end_if_some_stay(monkeypatch):
    queue = LettersThatStay()
    queue.enqueue_many([make_task(id=f"{n:032x}") for n in range(120)])
    leases = queue.lease(owner="w", limit=200, seconds=60.0, now=1e9)
    queue.settle_many([(held, Settlement(verdict=Verdict.DEAD, reason="why")) for held in leases], now=1e9)
    app = make_app(queue=queue)
    monkeypatch.setattr("safedefer.cli.dead.load_app_to_look", lambda _: app)
    done = CliRunner().invoke(main, ["dead", "purge", "--yes"])
    assert (done.exit_code, done.output) == (0, "deleted 60 dead letters\n")
    assert queue.batches == (50, 50, 20)
    app.close()


def test_a_bad_notice_hides_no_other_and_stops_none(storage, app):
    for world, where in each_column(storage, app, "notices"):
        poison(storage, world, *where)
        now = time.time()
        read = {each.process: ProcessReport.read(each, now=now) for each in app.queue.notices(since=0.0)}
        assert all(read[task_id] is not None for task_id in world.good), where
        app.queue.put_notice("another", "x", now=now)
        assert "another" in {each.process for each in app.queue.notices(since=0.0)}, where
        app.queue.put_notice("another", "", now=now)


def test_the_times_of_attempts_are_those_of_good_rows(storage, app):
    for world, where in each_column(storage, app, "attempts", "ledger", "ended", part=by_day(0, 3)):
        for task, lease in zip(world.tasks, world.lease(), strict=False):
            assert task is not None
            world.settle([lease], Verdict.DONE, EndState.SUCCEEDED)
        poison(storage, world, *where)
        assert all(0 <= each.seconds < 1e15 for each in app.queue.attempt_times(since=0.0)), where
