"""Whoever can write to an outbox, or to the SQLite file that it is in: their rows, views and triggers."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
import subprocess
import sys
import time
import tracemalloc

import apsw
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from safedefer.errors import BadTransactionStateError, QueueUnavailable
from safedefer.queues.memory.queue import MemoryQueue
from safedefer.queues.sqlite.queue import SQLiteQueue
from safedefer.transactions.databases import source_of, split_schema
from safedefer.transactions.databases.postgres import PsycopgSource
from safedefer.transactions.databases.sqlite import SQLite3Source
from safedefer.transactions.rows import to_text
from tests import sample_tasks as tasks
from tests.postgres.server import fresh_database, shared_server
from tests.queues.contract import make_task
from tests.unit.apps import make_app

CREATE = (
    "CREATE TABLE safedefer_outbox (id VARCHAR(64) NOT NULL PRIMARY KEY, created DOUBLE PRECISION NOT NULL, "
    "task TEXT NOT NULL, environment VARCHAR(100))"
)


@pytest.fixture(params=["sqlite", "postgresql"])
def given(request, tmp_path):
    """An App, and a connection that writes what it likes to the outbox that the App sweeps."""
    with contextlib.ExitStack() as stack:
        if request.param == "sqlite":
            connection = stack.enter_context(
                contextlib.closing(sqlite3.connect(tmp_path / "shop.db", isolation_level=None))
            )
            url = f"sqlite:///{tmp_path}/shop.db"
        else:
            server = shared_server()
            name = stack.enter_context(fresh_database(server))
            url = server.dsn(name)
            connection = stack.enter_context(psycopg.connect(url, autocommit=True))
            connection = _Question(connection)
        connection.execute(CREATE)
        app = make_app(queue=SQLiteQueue(tmp_path / "queue.db"), outboxes=[url])
        stack.callback(app.close)
        yield app, connection


class _Question:
    """A connection of psycopg with the placeholders of sqlite3."""

    def __init__(self, connection):
        self._connection = connection

    def execute(self, statement, values=()):
        return self._connection.execute(statement.replace("?", "%s"), values)


INSERT = "INSERT INTO safedefer_outbox (id, created, task, environment) VALUES (?, ?, ?, 'test')"


def write(connection, task, **changes):
    connection.execute(INSERT, (task.id, task.created, json.dumps({**json.loads(to_text(task)), **changes})))


def left(connection):
    return {row[0] for row in connection.execute("SELECT id FROM safedefer_outbox").fetchall()}


def check_that_others_go(app, connection, odd):
    """An odd row is older than two honest ones: they go, it stays."""
    honest = [make_task(created=200.0), make_task(created=300.0)]
    for task in honest:
        write(connection, task)
    with contextlib.suppress(QueueUnavailable):
        app.outbox.sweep()
    assert {view.id for view in app.queue.tasks()} == {task.id for task in honest}
    assert left(connection) == odd


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "receipt-42"}, {"unique_key": "k" * 64}, {"id": "another"}, {"eta": float("nan")}, {"eta": float("inf")},
        {"created": float("-inf")}, {"eta": 10**400}, {"expires": 2**63}, {"expires": True}, {"queue": "q" * 100_000},
        {"url": "/" + "u" * 100_000}, {"callable_name": "a\0b"}, {"audience": "test:a\ud800:b:/c"}, {"audience": "test"},
        {"headers": {"a": 1}}, {"headers": {"a": "\0"}}, {"retry_options": {"task_retry_limit": "x"}},
        {"retry_options": {"min_backoff_seconds": float("nan")}}, {"blob": ["b\0", "x"]}, {"blob": ["b"]}, {"more": 1},
        {"token": "☃"},
    ],
)  # fmt: skip
def test_a_row_that_is_no_transactional_task_stays_and_stops_no_other(given, changes, caplog):
    app, connection = given
    odd = make_task(created=100.0)
    write(connection, odd, **changes)
    check_that_others_go(app, connection, {odd.id})
    app.outbox.sweep()
    assert len([record for record in caplog.records if odd.id in record.getMessage()]) == 1


def test_a_row_does_not_take_the_name_of_a_task(given):
    app, connection = given
    write(connection, make_task(), name="receipt-42")
    app.outbox.sweep()
    assert app.options(name="receipt-42").defer(tasks.add, 1).was_enqueued


@pytest.mark.parametrize("created", [float("nan"), float("inf"), float("-inf"), -1e300, 1e300])
def test_rows_of_impossible_times_stop_no_other(given, created):
    app, connection = given
    if isinstance(connection, sqlite3.Connection) and math.isnan(created):
        created = 9e307  # SQLite has no NaN
    for number in range(150):
        connection.execute(INSERT, (f"odd-{number}", created, "{}"))
    check_that_others_go(app, connection, {f"odd-{number}" for number in range(150)})


def test_a_task_of_any_time_arrives(given):
    app, connection = given
    times = [-5.0, 0.0, 1e300] + ([float("nan")] if not isinstance(connection, sqlite3.Connection) else [])
    given_tasks = [make_task(created=1.0, id=f"{number:032x}") for number in range(len(times))]
    for task, created in zip(given_tasks, times, strict=True):
        connection.execute(INSERT, (task.id, created, to_text(task)))
    assert app.outbox.sweep() == len(times)
    assert left(connection) == set()


def test_an_id_forges_no_line_of_the_log_and_no_escape(given, caplog):
    app, connection = given
    odd = "x\r\nERROR forged line\x1b[31m"
    connection.execute(INSERT, (odd, 0, "{}"))
    app.outbox.sweep()
    (record,) = [record for record in caplog.records if "no task" in record.getMessage()]
    assert "\n" not in record.getMessage()
    assert "\r" not in record.getMessage()
    assert "\x1b" not in record.getMessage()
    assert len(record.getMessage()) < 500


def test_a_million_odd_rows_do_not_fill_the_log(given, caplog, monkeypatch):
    monkeypatch.setattr("safedefer.transactions.handover._COMPLAINTS", 10)
    app, connection = given
    for number in range(50):
        connection.execute(INSERT, (f"odd-{number}", 0, "{}"))
    for _ in range(3):
        app.outbox.sweep()
    assert len(caplog.records) == 10


def test_a_thousand_odd_rows_hide_no_other_trouble(given, caplog, monkeypatch):
    """After so many complaints none was logged any more, of whatever kind."""
    monkeypatch.setattr("safedefer.transactions.handover._COMPLAINTS", 10)
    app, connection = given
    for number in range(20):
        connection.execute(INSERT, (f"odd-{number}", 0, "{}"))
    app.outbox.sweep()
    connection.execute("ALTER TABLE safedefer_outbox ADD COLUMN more INTEGER")
    app.outbox.sweep()
    assert "tasks stay in the outbox" in caplog.text


def test_many_rows_are_gone_through_once_for_many_pages(given, monkeypatch):
    """All rows were sorted for each hundred: 100,000 of them took 41 s, at every sweep."""
    app, connection = given
    for number in range(450):
        connection.execute(INSERT, (f"odd-{number}", 7, "{}"))
    kind = SQLite3Source if isinstance(connection, sqlite3.Connection) else PsycopgSource
    rows, statements = kind.rows, []

    async def counted(self, statement, values={}, /):  # noqa: B006  # as the original
        statements.append(" ".join(statement.split()))
        return await rows(self, statement, values)

    monkeypatch.setattr(kind, "rows", counted)
    check_that_others_go(app, connection, {f"odd-{number}" for number in range(450)})
    assert sum("ORDER BY 2, 1" in statement for statement in statements) == 2
    assert sum(":i99" in statement for statement in statements) == 5


def test_rows_that_somebody_deletes_while_they_are_read_are_no_complaint(given, monkeypatch, caplog):
    """Another process sweeps the same table."""
    monkeypatch.setattr("safedefer.transactions.transfer._WINDOW", 7)
    app, connection = given
    given_tasks = [make_task(created=float(number // 9)) for number in range(40)]
    for task in given_tasks:
        write(connection, task)
    read = app.outbox._transfer._read

    async def late(source, table, page):
        connection.execute("DELETE FROM safedefer_outbox WHERE id = ?", (page[0].raw_id.decode(),))
        return await read(source, table, page)

    monkeypatch.setattr(app.outbox._transfer, "_read", late)
    assert app.outbox.sweep() == 34  # each of six windows lacks one
    assert left(connection) == set()
    assert caplog.records == []


def test_a_row_of_another_environment_than_its_token_is_left(given):
    app, connection = given
    odd = make_task(audience="prod:default:default:/_ah/queue/deferred")
    write(connection, odd)
    check_that_others_go(app, connection, {odd.id})


def test_large_rows_are_read_in_parts_and_one_that_is_too_large_stops_no_other(given, monkeypatch):
    monkeypatch.setattr("safedefer.transactions.transfer._BATCH_BYTES", 10_000)
    monkeypatch.setattr("safedefer.transactions.transfer._ROW_BYTES", 50_000)
    app, connection = given
    large = [make_task(token=b"t" * 9_000, created=float(number)) for number in range(5)]
    for task in large:
        write(connection, task)
    odd = make_task(token=b"t" * 60_000, created=0.5)
    write(connection, odd)
    assert app.outbox.sweep() == 5
    assert left(connection) == {odd.id}


def test_a_large_row_that_is_no_task_is_read_once(given, caplog):
    """64 MiB of it were copied at each sweep."""
    app, connection = given
    connection.execute(INSERT, ("odd", 0, "x" * 6_000_000))
    large = make_task(headers={"X-Large": "y" * 5_000_000})
    write(connection, large)
    assert app.outbox.sweep() == 1
    tracemalloc.start()
    try:
        app.outbox.sweep()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000
    assert caplog.text.count("the outbox has a row that is no task (JSONDecodeError): 'odd'; look at it") == 1
    connection.execute("DELETE FROM safedefer_outbox")
    again = make_task(id=large.id.replace("0", "f"), headers=large.headers)
    connection.execute(INSERT, ("odd", 0, "y" * 6_000_001))  # another text: it is read
    write(connection, again)
    assert app.outbox.sweep() == 1
    assert len(app.outbox._transfer._aside) == 2


def test_more_large_rows_than_are_remembered_are_not_read(given, monkeypatch, caplog):
    monkeypatch.setattr("safedefer.transactions.transfer._ASIDE", 2)
    monkeypatch.setattr("safedefer.transactions.transfer._LARGE_BYTES", 50_000)
    app, connection = given
    odd = {f"odd{number}" for number in range(4)}
    for number, name in enumerate(sorted(odd)):
        connection.execute(INSERT, (name, number, "x" * (60_000 + number)))
        app.outbox.sweep()
    check_that_others_go(app, connection, odd)
    assert "over 2 large rows that are no tasks" in caplog.text
    assert len(app.outbox._transfer._aside) == 2


def test_a_task_that_the_queue_cannot_store_stops_no_other_and_is_tried_again(given):
    app, connection = given
    odd, enqueue_many, works = make_task(created=1.0), app.queue.enqueue_many, []

    def refuse(given_tasks):
        given_tasks = list(given_tasks)
        if odd.id in {task.id for task in given_tasks} and not works:
            raise QueueUnavailable("the database does not take it")
        enqueue_many(given_tasks)

    app.queue.enqueue_many = refuse
    write(connection, odd)
    check_that_others_go(app, connection, {odd.id})
    works.append(True)
    assert app.outbox.sweep() == 1
    app.queue.enqueue_many = enqueue_many


@pytest.mark.parametrize("values", ["[],", "{},", "1.5,", '"",', "[[],"])
def test_a_row_of_millions_of_values_takes_neither_memory_nor_time(given, values, monkeypatch):
    app, connection = given
    count = 3_000_000
    text = json.dumps({"more": "?"}).replace('"?"', f"[{values * count}1{']' * (count * values.count('[['))}]")
    connection.execute(INSERT, ("odd", 0, text))
    del text
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text, **options: parsed.append(len(text)) or loads(text, **options))
    check_that_others_go(app, connection, {"odd"})
    assert max(parsed) < 100_000


def test_a_task_of_the_largest_token_and_many_headers_is_moved(given):
    app, connection = given
    task = make_task(token=b"t," * 50_000, headers={f"X-{number}": "[{,}]" * 20 for number in range(100)})
    write(connection, task)
    assert app.outbox.sweep() == 1
    assert left(connection) == set()


# --- A SQLite file ------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite3", "apsw", "sqlalchemy"])
def shop(request, tmp_path):
    """A connection to a file, in which somebody else has made something."""
    path = tmp_path / "shop.db"
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(contextlib.closing(sqlite3.connect(path, isolation_level=None)))
        if request.param == "sqlite3":
            connection = stack.enter_context(contextlib.closing(sqlite3.connect(path)))
        elif request.param == "apsw":
            connection = stack.enter_context(contextlib.closing(apsw.Connection(str(path))))
        else:
            engine = sa.create_engine(f"sqlite:///{path}")
            stack.callback(engine.dispose)
            connection = stack.enter_context(contextlib.closing(engine.connect()))
        yield connection, other


@pytest.fixture
def app(tmp_path):
    app = make_app(queue=MemoryQueue(), outboxes=[f"sqlite:///{tmp_path}/shop.db"])
    yield app
    app.close()


HOSTILE = {
    "a view that swallows": (
        "CREATE VIEW safedefer_outbox AS SELECT '' AS id, 0.0 AS created, '' AS task, '' AS environment;"
        "CREATE TRIGGER t INSTEAD OF INSERT ON safedefer_outbox BEGIN SELECT 1; END"
    ),
    "a view without end": (
        "CREATE VIEW safedefer_outbox AS WITH RECURSIVE n (id) AS (SELECT '1' UNION ALL SELECT id FROM n) "
        "SELECT id, 0.0 AS created, '' AS task, 'test' AS environment FROM n"
    ),
    "a trigger that swallows": (
        f"{CREATE}; CREATE TRIGGER t BEFORE INSERT ON safedefer_outbox BEGIN SELECT RAISE(IGNORE); END"
    ),
    "a trigger on delete": (
        f"{CREATE}; CREATE TABLE loot (id); CREATE TRIGGER t BEFORE DELETE ON safedefer_outbox "
        "BEGIN INSERT INTO loot VALUES (OLD.id); END"
    ),
    "a virtual table": "CREATE VIRTUAL TABLE safedefer_outbox USING fts5(id, created, task, environment)",
    "a generated column": (
        "CREATE TABLE safedefer_outbox (id TEXT, created REAL, task TEXT, "
        "environment TEXT GENERATED ALWAYS AS (hex(zeroblob(300000000))))"
    ),
    "an index of an expression": f"{CREATE}; CREATE INDEX i ON safedefer_outbox (hex(zeroblob(200000000)))",
    "an index with a condition": f"{CREATE}; CREATE INDEX i ON safedefer_outbox (id) WHERE id < hex(zeroblob(200000000))",
    "a check": CREATE[:-1] + ", CHECK (length(hex(zeroblob(200000000))) > 0))",
    "other columns": "CREATE TABLE safedefer_outbox (nonsense)",
    "other letters": "CREATE VIEW SAFEDEFER_Outbox AS SELECT 1",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_outbox_in_a_file_is_refused_and_swallows_nothing(shop, app, kind, caplog):
    connection, other = shop
    other.executescript(HOSTILE[kind])
    start = time.process_time()
    with pytest.raises(BadTransactionStateError, match="safedefer_outbox"), app.transaction(connection):
        app.options(transactional=True).defer(tasks.add, 1)
    for _ in range(2):
        assert app.outbox.sweep() == 0
    assert time.process_time() < start + 60
    assert len([record for record in caplog.records if "stay in the outbox" in record.getMessage()]) == 1


def test_what_is_no_table_of_effects_in_a_file_is_refused(shop, app):
    connection, other = shop
    other.executescript(
        "CREATE TABLE safedefer_once (effect TEXT PRIMARY KEY, expires REAL);"
        "CREATE TRIGGER t BEFORE INSERT ON safedefer_once BEGIN SELECT RAISE(IGNORE); END"
    )
    with pytest.raises(BadTransactionStateError, match="trigger"), app.once(connection, "effect"):
        pass


def test_a_temporary_table_does_not_stand_for_the_outbox(app, tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        connection.execute(CREATE.replace("CREATE TABLE", "CREATE TEMP TABLE"))
        connection.commit()
        with app.transaction(connection):
            task = app.options(transactional=True).defer(tasks.add, 1)
        assert {view.id for view in app.queue.tasks()} == {task.id}


def test_text_that_is_none_stops_no_other(app, tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "shop.db", isolation_level=None)) as connection:
        connection.execute(CREATE)
        for number, (key, created, text) in enumerate([
            ("CAST(x'ff' AS TEXT)", "0", "'{}'"), ("'a'", "0", "CAST(x'ff' AS TEXT)"), ("x'ff'", "0", "x'00'"),
            ("'b'", "'no time'", "'{}'"), ("'c'", "x'00'", "'{}'"), ("'d'", "9e999", "'{}'"), ("'e'", "0", "5"),
            (f"'{'f' * 100_000}'", "0", "'{}'"),
        ]):  # fmt: skip
            connection.execute(f"INSERT INTO safedefer_outbox VALUES ({key}, {created}, {text}, 'test') -- {number}")
        task = make_task()
        write(connection, task)
        assert app.outbox.sweep() == 1
        assert {view.id for view in app.queue.tasks()} == {task.id}


def test_a_file_from_before_there_were_environments_is_used_and_brought_up_to_date(shop, app):
    connection, other = shop
    other.execute("CREATE TABLE safedefer_outbox (id VARCHAR(64) PRIMARY KEY, created DOUBLE, task TEXT NOT NULL)")
    foreign = make_task(audience="prod:default:default:/_ah/queue/deferred")
    for task in (make_task(id="a" * 32), foreign):
        other.execute("INSERT INTO safedefer_outbox VALUES (?, ?, ?)", (task.id, task.created, to_text(task)))
    with app.transaction(connection):
        new = app.options(transactional=True).defer(tasks.add, 1)
    app.outbox.sweep()
    assert {view.id for view in app.queue.tasks()} == {"a" * 32, new.id}
    assert other.execute("SELECT id, environment FROM safedefer_outbox").fetchall() == [(foreign.id, None)]


@pytest.mark.parametrize("make", [sa.Engine.connect, orm.Session])
@pytest.mark.parametrize("pool", [None, sa.StaticPool])
def test_a_database_in_memory_below_sqlalchemy_loses_no_task(make, pool):
    """With the default pool each thread has a database of its own: the relay's has no outbox."""
    app = make_app(queue=MemoryQueue())
    engine = sa.create_engine("sqlite://", poolclass=pool)
    with make(engine) as connection:
        with app.transaction(connection):
            task = app.options(transactional=True).defer(tasks.add, 1)
        assert {view.id for view in app.queue.tasks()} == {task.id}
        connection.execute(sa.text("CREATE TABLE orders (id int)"))
        connection.commit()
        with connection.begin():
            connection.execute(sa.text("INSERT INTO orders VALUES (1)"))
            with pytest.raises(BadTransactionStateError, match="in memory"), app.transaction(connection):
                app.options(transactional=True).defer(tasks.add, 2)
        assert connection.execute(sa.text("SELECT count(*) FROM orders")).scalar() == 1
    engine.dispose()
    app.close()


# --- Libraries ----------------------------------------------------------------------------------


def test_a_library_is_imported_when_there_is_a_connection_of_it():
    code = (
        "import sys, safedefer.transactions.outbox\n"
        "base = 'safedefer.transactions.databases.'\n"
        "print(*(n for n in sys.modules if n.startswith(base) or n in {'sqlite3', 'psycopg', 'asyncpg', 'sqlalchemy'}))"
    )
    bare = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    run = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["safedefer.transactions.databases.base"]


def test_a_proxy_of_a_connection_is_known_as_its_connection(tmp_path):
    class Proxy:
        def __init__(self, below):
            self.below = below

        @property
        def __class__(self):
            return sqlite3.Connection

        def __getattr__(self, name):
            return getattr(self.below, name)

    with contextlib.closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        assert source_of(Proxy(connection)).path == str(tmp_path / "shop.db")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u@h/d", ("postgresql://u@h/d", None)),
        ("postgresql://u@h/d?schema=a%20b", ("postgresql://u@h/d", "a b")),
        ("postgresql://u@/d?host=/run&schema=a", ("postgresql://u@/d?host=/run", "a")),
        ("postgresql://u@/d?schema=a&host=/run", ("postgresql://u@/d?host=/run", "a")),
        ("postgresql+asyncpg://u@h/d?schema=", ("postgresql+asyncpg://u@h/d", None)),
        ("sqlite:///a?schema=b", ("sqlite:///a?schema=b", None)),
    ],
)
def test_the_schema_of_an_outbox_is_named_in_its_url(url, expected):
    assert split_schema(url) == expected
