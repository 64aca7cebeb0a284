from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing

import apsw
import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from safedefer.errors import BadTransactionStateError, ConfigurationError, QueueUnavailable
from safedefer.queues.memory.queue import MemoryQueue
from safedefer.queues.sqlite.queue import SQLiteQueue
from safedefer.transactions.databases import opener_of, run_now, source_of
from safedefer.transactions.databases import sqlite as of_sqlite
from safedefer.transactions.outbox import Outbox
from safedefer.transactions.rows import from_text, to_text
from tests.queues.contract import DONE, make_task, oversize_task, take, whole
from tests.queues.processes import start
from tests.queues.single import settle

#: Holds the write lock of a file until its input ends, and commits then: in a rollback journal that waits for readers.
OTHER_WRITER = """
import sqlite3, sys
connection = sqlite3.connect({path!r}, isolation_level=None, timeout=20)
connection.execute("BEGIN IMMEDIATE")
connection.execute("CREATE TABLE IF NOT EXISTS others (id INTEGER)")
connection.execute("INSERT INTO others VALUES (1)")
print("locked", flush=True)
sys.stdin.read()
connection.execute("COMMIT")
"""
LIBRARIES = ["sqlite3", "sqlite3-autocommit", "sqlalchemy-connection", "sqlalchemy-session", "apsw", "apsw-own-file"]


class Users:
    """A user's database with one table, and the user's own way to write to it."""

    def __init__(self, library: str, path: str) -> None:
        self.library = library
        self._engine = None
        if library == "sqlite3":
            self.connection = sqlite3.connect(path)
        elif library == "sqlite3-autocommit":
            self.connection = sqlite3.connect(path, isolation_level=None)
        elif library.startswith("apsw"):
            self.connection = apsw.Connection(path)
            self.connection.set_busy_timeout(5000)
        else:
            self._engine = sa.create_engine(f"sqlite:///{path}")
            make = orm.Session if library == "sqlalchemy-session" else sa.Engine.connect
            self.connection = make(self._engine)
        self.execute("CREATE TABLE IF NOT EXISTS orders (id INTEGER)")
        self.commit()

    def execute(self, statement: str):
        return self.connection.execute(sa.text(statement) if self._engine else statement)

    def orders(self) -> int:
        count = self.execute("SELECT count(*) FROM orders").fetchone()[0]
        self.rollback()
        return count

    def begin(self) -> None:
        if self._engine:
            self.connection.begin()
        else:
            self.connection.execute("BEGIN")

    def commit(self) -> None:
        if source_of(self.connection).in_transaction():
            run_now(source_of(self.connection).commit())

    def rollback(self) -> None:
        if source_of(self.connection).in_transaction():
            run_now(source_of(self.connection).rollback())

    def outbox_rows(self) -> int:
        try:
            return self.execute("SELECT count(*) FROM safedefer_outbox").fetchone()[0]
        except (sqlite3.Error, sa.exc.SQLAlchemyError, apsw.Error):
            return 0
        finally:
            self.rollback()

    def close(self) -> None:
        self.connection.close()
        if self._engine:
            self._engine.dispose()


@pytest.fixture
def queue(tmp_path):
    queue = SQLiteQueue(tmp_path / "tasks.db")
    yield queue
    queue.close()


@pytest.fixture
def outbox(queue):
    outbox = Outbox(lambda: queue, environment="test", clock=time.time)
    yield outbox
    outbox.close()


@pytest.fixture(params=LIBRARIES)
def users(request, tmp_path, queue):
    queue.stats(now=0.0)
    users = Users(request.param, str(tmp_path / ("tasks.db" if request.param == "apsw-own-file" else "shop.db")))
    yield users
    users.close()


def waiting(queue) -> set[str]:
    return {view.id for view in queue.tasks()}


def until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_commit_enqueues_with_the_users_change(outbox, queue, users):
    tasks = [make_task(headers={"X-Shop": "é"}, token=bytes(range(256))), oversize_task()]
    with outbox.transaction(users.connection):
        users.execute("INSERT INTO orders VALUES (1)")
        for task in tasks:
            outbox.put(task)
        assert queue.tasks() == []
    assert waiting(queue) == {task.id for task in tasks}
    assert queue.blobs.get(tasks[1].blob.id) == tasks[1].blob.data
    assert whole(take(queue)[0].task) == tasks[0]
    assert (users.orders(), users.outbox_rows()) == (1, 0)


@pytest.mark.parametrize("how", ["raise", "rollback"])
def test_a_rollback_enqueues_nothing_and_leaves_no_blob(outbox, queue, users, how):
    task = oversize_task()
    with contextlib.suppress(ZeroDivisionError), outbox.transaction(users.connection):
        users.execute("INSERT INTO orders VALUES (1)")
        outbox.put(task)
        if how == "raise":
            raise ZeroDivisionError
        users.rollback()
    outbox.sweep()
    assert queue.tasks() == []
    assert queue.blobs.get(task.blob.id) is None
    assert (users.orders(), users.outbox_rows()) == (0, 0)


def test_a_transaction_of_the_users_own_is_theirs_to_commit(outbox, queue, users):
    task, undone = make_task(), make_task()
    users.begin()
    with outbox.transaction(users.connection):
        users.execute("INSERT INTO orders VALUES (1)")
        outbox.put(task)
    time.sleep(0.05)
    outbox.sweep()
    assert queue.tasks() == []
    users.commit()
    until(lambda: waiting(queue) == {task.id})
    users.begin()
    with outbox.transaction(users.connection):
        outbox.put(undone)
    users.rollback()
    outbox.sweep()
    assert (waiting(queue), users.orders()) == ({task.id}, 1)


@pytest.mark.parametrize("what", ["first task", "later task", "once"])
def test_a_users_own_transaction_waits_for_another_writer(outbox, queue, users, tmp_path, what):
    def write():
        if what == "once":
            with outbox.once(users.connection, effect="paid"):
                pass
        else:
            with outbox.transaction(users.connection):
                outbox.put(make_task())

    if what == "later task":
        users.begin()
        write()
        users.commit()
        until(lambda: len(waiting(queue)) == 1)
    file = "tasks.db" if users.library == "apsw-own-file" else "shop.db"
    command = OTHER_WRITER.format(path=str(tmp_path / file))
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        users.begin()
        threading.Timer(0.2, other.stdin.close).start()
        write()
        users.execute("INSERT INTO orders VALUES (1)")
        users.commit()
        assert other.wait(30) == 0
    assert users.orders() == 1


def test_many_tasks_go_with_one_transaction(outbox, queue, users):
    tasks = [make_task(created=float(n % 7)) for n in range(250)]
    with outbox.transaction(users.connection):
        for task in tasks:
            outbox.put(task)
    # The block gives them a moment; what a busy machine does not move in it, the relay does.
    until = time.monotonic() + 60.0
    while users.outbox_rows() and time.monotonic() < until:
        time.sleep(0.01)
    assert {view.id for view in queue.tasks(limit=1000)} == {task.id for task in tasks}
    assert users.outbox_rows() == 0


def test_outside_a_transaction_it_is_an_error(outbox, queue, users):
    with pytest.raises(BadTransactionStateError, match="inside `with app"):
        outbox.put(make_task())
    with outbox.transaction(users.connection):
        pass
    with pytest.raises(BadTransactionStateError, match="inside `with app"):
        outbox.put(make_task())
    with outbox.transaction(users.connection):
        users.execute("INSERT INTO orders VALUES (1)")
        users.commit()
        with pytest.raises(BadTransactionStateError, match="ended already"):
            outbox.put(make_task())
    with outbox.transaction(users.connection):
        for task in (make_task(name="n"), make_task(unique_key="k")):
            with pytest.raises(BadTransactionStateError, match="no name"):
                outbox.put(task)
    assert queue.tasks() == []


def test_another_applications_block_does_not_count(outbox, users, queue):
    other = Outbox(lambda: queue, environment="test", clock=time.time)
    with outbox.transaction(users.connection), pytest.raises(BadTransactionStateError):
        other.put(make_task())
    other.close()


def test_another_thread_cannot_defer_in_the_transaction(outbox, users):
    import contextvars

    errors = []
    with outbox.transaction(users.connection):
        context = contextvars.copy_context()

        def put() -> None:
            try:
                context.run(outbox.put, make_task())
            except BadTransactionStateError as error:
                errors.append(str(error))

        thread = threading.Thread(target=put)
        thread.start()
        thread.join()
    assert "another thread" in errors[0]


def test_blocks_within_blocks_go_with_their_own_transactions(outbox, queue, tmp_path):
    inner, outer = make_task(), make_task()
    with closing(sqlite3.connect(tmp_path / "a.db")) as one, closing(sqlite3.connect(tmp_path / "b.db")) as two:
        with contextlib.suppress(ZeroDivisionError), outbox.transaction(one):
            with outbox.transaction(two):
                outbox.put(inner)
            outbox.put(outer)
            raise ZeroDivisionError
        assert waiting(queue) == {inner.id}


def test_a_queue_that_takes_nothing_now_gets_it_later(outbox, queue, tmp_path):
    first, second = make_task(), make_task()
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        enqueue_many = queue.enqueue_many
        calls = []

        def unavailable(tasks) -> None:
            calls.append(len(tasks))
            raise QueueUnavailable("locked; wait")

        queue.enqueue_many = unavailable
        with outbox.transaction(connection):
            outbox.put(first)
        until(lambda: len(calls) > 2)
        queue.enqueue_many = enqueue_many
        until(lambda: waiting(queue) == {first.id})
        with outbox.transaction(connection):
            outbox.put(second)
        assert waiting(queue) == {first.id, second.id}


def test_the_rows_of_all_outboxes_are_counted_and_those_of_other_environments_are_not(
    outbox, queue, tmp_path, monkeypatch
):
    def unavailable(tasks) -> None:
        raise QueueUnavailable("locked; wait")

    assert outbox.count() == 0
    monkeypatch.setattr(queue, "enqueue_many", unavailable)
    monkeypatch.setattr(outbox._relay, "expect", lambda *given: None)
    for name in ("shop.db", "other.db"):
        with closing(sqlite3.connect(tmp_path / name)) as connection:
            with outbox.transaction(connection):
                outbox.put(make_task())
                outbox.put(make_task())
            with connection:
                connection.execute(
                    "INSERT INTO safedefer_outbox (id, created, task, environment) VALUES ('x', 0, '{}', 'elsewhere')"
                )
    assert outbox.count() == 4
    (tmp_path / "other.db").write_bytes(b"no database, and nothing that a count could be made of" * 100)
    assert outbox.count() is None


def test_a_count_does_not_wait_for_a_long_sweep(outbox, queue, tmp_path, monkeypatch):
    monkeypatch.setattr("safedefer.transactions.relay._COUNT_SECONDS", 0.01)
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection, outbox.transaction(connection):
        outbox.put(make_task())
    with outbox._relay._sweeping[str(tmp_path / "shop.db")]:
        assert outbox.count() is None
    assert outbox.count() == 0


def test_an_outbox_that_cannot_be_read_right_after_the_commit_is_relayed_later(outbox, queue, tmp_path, monkeypatch):
    # Another process has the user's database to itself just after the commit; shorter patience makes a shorter test.
    monkeypatch.setattr("safedefer.transactions.databases.sqlite._PATIENCE", 0.05)
    task, path = make_task(), tmp_path / "shop.db"
    greedy = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    with closing(greedy), closing(sqlite3.connect(path)) as connection:
        after = outbox.relay_after

        def interrupted(*given) -> None:
            greedy.execute("BEGIN EXCLUSIVE")
            after(*given)

        outbox.relay_after = interrupted
        with outbox.transaction(connection):
            outbox.put(task)
        assert queue.tasks() == []
        greedy.execute("ROLLBACK")
        until(lambda: waiting(queue) == {task.id})


def test_a_database_that_somebody_keeps_locked_keeps_no_other_waiting(queue, tmp_path, monkeypatch):
    """Nor a producer, a fork or the end: a sweep of it held one lock for all, for half a minute each time."""
    monkeypatch.setattr("safedefer.transactions.databases.sqlite._PATIENCE", 3600.0)
    monkeypatch.setattr("safedefer.transactions.relay._FORK_SECONDS", 0.05)
    monkeypatch.setattr("safedefer.transactions.relay._APART_SECONDS", 0.05)
    monkeypatch.setattr("safedefer.transactions.relay._END_SECONDS", 0.05)
    paths = [tmp_path / "shop.db", tmp_path / "other.db"]
    outbox = Outbox(lambda: queue, environment="test", urls=[f"sqlite:///{path}" for path in paths], clock=time.time)
    first, second = make_task(), make_task()
    greedy = sqlite3.connect(paths[0], isolation_level=None, check_same_thread=False)
    with closing(greedy), closing(sqlite3.connect(paths[1])) as connection:
        greedy.execute("BEGIN EXCLUSIVE")
        outbox.start()
        until(lambda: outbox._relay._sweeping[str(paths[0])].locked())
        with outbox.transaction(connection):
            outbox.put(first)
        until(lambda: waiting(queue) == {first.id})
        connection.execute(
            "INSERT INTO safedefer_outbox VALUES (?, ?, ?, 'test')", (second.id, second.created, to_text(second))
        )
        connection.commit()
        until(lambda: waiting(queue) == {first.id, second.id})
        pid = os.fork()
        if not pid:
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        outbox.close()
        assert outbox._relay._sweeping[str(paths[0])].locked()
        greedy.execute("ROLLBACK")
        until(lambda: not outbox._relay._sweeping[str(paths[0])].locked())


def test_a_block_does_not_wait_for_what_others_have_left(outbox, queue, tmp_path, monkeypatch):
    monkeypatch.setattr("safedefer.transactions.relay._BLOCK_SECONDS", 0.0)
    expected = []
    monkeypatch.setattr(outbox._relay, "expect", lambda *given: expected.append(given))
    tasks = [make_task(created=1.0) for _ in range(250)]
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection, outbox.transaction(connection):
        outbox.put(*tasks)
    assert len(waiting(queue)) == 100
    assert expected == [()]
    assert outbox.sweep() == 150


def test_what_was_enqueued_and_not_deleted_from_the_outbox_is_not_enqueued_again(outbox, queue, tmp_path):
    waits, ended, new = make_task(), make_task(), make_task()
    queue.enqueue_many([ended, waits])
    settle(queue, take(queue, limit=1)[0], DONE, now=101.0)
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection, outbox.transaction(connection):
        for task in (waits, ended, new):
            outbox.put(task)
    assert waiting(queue) == {waits.id, new.id}
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        assert connection.execute("SELECT count(*) FROM safedefer_outbox").fetchone() == (0,)


def test_a_row_that_is_no_task_is_left_and_the_others_go(outbox, queue, tmp_path, caplog):
    task = make_task()
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        with outbox.transaction(connection):
            outbox.put(task)
            connection.execute("INSERT INTO safedefer_outbox (id, created, task) VALUES ('odd', 0, '{}')")
        assert waiting(queue) == {task.id}
        assert connection.execute("SELECT id FROM safedefer_outbox").fetchall() == [("odd",)]
    assert "no task" in caplog.text


def test_a_process_that_dies_after_the_commit_has_lost_nothing(queue, tmp_path):
    program = """
        import sqlite3, signal
        from safedefer.transactions.outbox import Outbox
        def never(tasks): os.kill(os.getpid(), signal.SIGKILL)
        queue.enqueue_many = never
        outbox = Outbox(lambda: queue, environment="test", clock=time.time)
        connection = sqlite3.connect(sys.argv[2])
        with outbox.transaction(connection):
            outbox.put(make_task(id="dies-after-the-commit"))
    """
    process = start(program, queue.path, tmp_path / "shop.db")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert queue.tasks() == []
    outbox = Outbox(lambda: queue, environment="test", urls=[f"sqlite:///{tmp_path}/shop.db"], clock=time.time)
    outbox.start()
    until(lambda: waiting(queue) == {"dies-after-the-commit"})
    outbox.close()


def test_a_database_that_is_not_there_yet_is_no_trouble_and_is_not_made(queue, tmp_path, caplog):
    outbox = Outbox(lambda: queue, environment="test", urls=[f"sqlite:///{tmp_path}/shop.db"], clock=time.time)
    assert outbox.sweep() == 0
    sqlite3.connect(tmp_path / "shop.db").close()
    assert outbox.sweep() == 0
    assert caplog.records == []
    assert (tmp_path / "shop.db").read_bytes() == b""
    outbox.close()


def test_a_forked_child_relays_its_own(outbox, queue, tmp_path):
    path, parents = tmp_path / "shop.db", make_task()
    with closing(sqlite3.connect(path)) as connection, outbox.transaction(connection):
        outbox.put(parents)
    outbox.start()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            with closing(sqlite3.connect(path)) as connection:
                connection.execute("BEGIN")
                with outbox.transaction(connection):
                    outbox.put(make_task(id="from-the-child-0123"))
                connection.commit()
                until(lambda: "from-the-child-0123" in waiting(queue))
            queue.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert waiting(queue) == {parents.id, "from-the-child-0123"}


def test_a_fork_during_a_sweep_waits_for_it(outbox, queue, tmp_path):
    with closing(sqlite3.connect(tmp_path / "shop.db", timeout=60)) as connection:
        stop = threading.Event()

        def busy() -> None:
            while not stop.wait(0.001):  # a turn for the others
                outbox.sweep()

        with outbox.transaction(connection):
            outbox.put(make_task())
        thread = threading.Thread(target=busy)
        thread.start()
        try:
            for _ in range(30):
                with outbox.transaction(connection):
                    outbox.put(make_task())
                pid = os.fork()
                if not pid:
                    os._exit(0)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        finally:
            stop.set()
            thread.join()
    assert len(queue.tasks()) == 31


def test_the_queues_file_by_another_library_is_refused(outbox, queue):
    queue.enqueue_many([make_task()])
    with closing(sqlite3.connect(queue.path)) as connection:
        with pytest.raises(BadTransactionStateError, match="two SQLite libraries"), outbox.transaction(connection):
            pass
        with pytest.raises(BadTransactionStateError, match="two SQLite libraries"), outbox.once(connection, effect="e"):
            pass
    engine = sa.create_engine(f"sqlite:///{queue.path}")
    with orm.Session(engine) as session, pytest.raises(BadTransactionStateError, match="two SQLite"):
        with outbox.transaction(session):
            pass
    engine.dispose()


@pytest.mark.parametrize("connection", [None, "shop.db", object()])
def test_what_is_no_connection_is_refused(outbox, connection):
    with pytest.raises(BadTransactionStateError, match="no connection"), outbox.transaction(connection):
        pass


@pytest.mark.parametrize("how", ["engine", "connection", "session"])
def test_a_connection_that_commits_every_statement_is_refused(outbox, queue, tmp_path, how):
    engine = sa.create_engine(
        f"sqlite:///{tmp_path}/a.db", **({"isolation_level": "AUTOCOMMIT"} if how == "engine" else {})
    )
    if how == "session":
        connection = orm.Session(engine.execution_options(isolation_level="AUTOCOMMIT"))
    else:
        connection = engine.connect()
    if how == "connection":
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
    with connection:
        for block in (outbox.transaction(connection), outbox.once(connection, effect="e")):
            with pytest.raises(BadTransactionStateError, match="AUTOCOMMIT"), block:
                outbox.put(make_task())
            connection.rollback()
    engine.dispose()
    assert queue.tasks() == []


def test_a_database_whose_ddl_commits_is_refused(outbox):
    engine = sa.create_mock_engine("mysql://", lambda *_: None)
    session = orm.Session()
    session.bind = engine
    with pytest.raises(BadTransactionStateError, match="mysql"), outbox.transaction(session):
        pass


def test_a_database_in_memory_works_within_the_block_only():
    queue = MemoryQueue()
    outbox = Outbox(lambda: queue, environment="test", clock=time.time)
    task = make_task()
    with closing(sqlite3.connect(":memory:")) as connection:
        with outbox.transaction(connection):
            outbox.put(task)
        assert waiting(queue) == {task.id}
        connection.execute("BEGIN")
        with pytest.raises(BadTransactionStateError, match="in memory"), outbox.transaction(connection):
            pass
    outbox.close()


def test_row_factories_and_traces_of_the_user_do_not_matter(outbox, queue, tmp_path):
    one, two = make_task(), make_task()
    with closing(sqlite3.connect(tmp_path / "a.db")) as connection:
        connection.row_factory = lambda cursor, row: {"not": "a row"}
        with outbox.transaction(connection):
            outbox.put(one)
        with outbox.once(connection, effect="e") as first:
            assert first
    with closing(apsw.Connection(str(tmp_path / "b.db"))) as connection:
        connection.row_trace = lambda cursor, row: None
        with outbox.transaction(connection):
            outbox.put(two)
    assert waiting(queue) == {one.id, two.id}


@pytest.mark.parametrize("url", ["nonsense", "mongodb://x", ""])
def test_a_url_that_names_no_database_is_refused(url):
    with pytest.raises(ConfigurationError, match="outbox"):
        opener_of(url)


def test_a_task_survives_its_text():
    for task in (make_task(token=bytes(range(256)), name="n", headers={"a": "é"}, unique_key="k"), oversize_task()):
        assert from_text(to_text(task)) == task


# --- An effect that is had once -----------------------------------------------------------------


def test_an_effect_is_had_once(outbox, users):
    for expected in (True, False, False):
        with outbox.once(users.connection, effect="task-1") as first:
            assert first is expected
            if first:
                users.execute("INSERT INTO orders VALUES (1)")
    with outbox.once(users.connection, effect="task-2") as first:
        assert first
    assert users.orders() == 1


def test_an_effect_that_was_undone_is_had_again(outbox, users):
    with pytest.raises(ZeroDivisionError), outbox.once(users.connection, effect="task-1") as first:
        assert first
        users.execute("INSERT INTO orders VALUES (1)")
        raise ZeroDivisionError
    assert users.orders() == 0
    with outbox.once(users.connection, effect="task-1") as first:
        assert first


def test_an_effect_belongs_to_the_users_own_transaction(outbox, users):
    users.begin()
    with outbox.once(users.connection, effect="task-1") as first:
        assert first
    users.rollback()
    with outbox.once(users.connection, effect="task-1") as first:
        assert first


def test_an_effect_of_the_task_before_counts(outbox, users):
    with outbox.once(users.connection, effect="task-1"):
        pass
    with outbox.once(users.connection, effect="task-2", also="task-1") as first:
        assert not first
    with outbox.once(users.connection, effect="task-3", also="task-2") as first:
        assert not first


def test_two_that_run_at_once_have_an_effect_once(outbox, tmp_path):
    path, barrier, results = tmp_path / "shop.db", threading.Barrier(4), []

    def work() -> None:
        with closing(sqlite3.connect(path, timeout=30)) as connection:
            barrier.wait()
            with outbox.once(connection, effect="task-1") as first:
                time.sleep(0.02)
                results.append(first)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False, False, False, True]


def test_effects_are_forgotten_when_no_token_lives_any_more(queue, tmp_path):
    now = [1000.0]
    outbox = Outbox(lambda: queue, environment="test", clock=lambda: now[0])
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        with outbox.once(connection, effect="task-1"):
            pass
        now[0] += 93 * 86400
        with outbox.once(connection, effect="task-1") as first:
            assert not first
        now[0] += 3 * 86400
        with outbox.once(connection, effect="task-2"):
            pass
        assert connection.execute("SELECT effect FROM safedefer_once").fetchall() == [("task-2",)]
    outbox.close()


# --- A row that the queue does not take keeps no other -----------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"token": None}, {"token": 1}, {"eta": "x"}, {"queue": None}, {"id": None}, {"id": "another"}, {"blob": 3}, {"headers": 1},
        {"digest": None}, {"created": []}, {"expires": "soon"}, {"audience": None}, {"unknown": 1}, "[" * 100_000, "null", "3", '"x"', "{}",
    ],
)  # fmt: skip
def test_a_row_that_somebody_wrote_keeps_no_other_from_the_queue(outbox, queue, tmp_path, changes, caplog):
    poison = (
        changes if isinstance(changes, str) else json.dumps({**json.loads(to_text(make_task(id="p" * 16))), **changes})
    )
    tasks = [make_task(created=2.0 + number) for number in range(5)]
    with closing(sqlite3.connect(tmp_path / "shop.db", isolation_level=None)) as connection:
        with outbox.transaction(connection):
            outbox.put(make_task(created=0.0))
        connection.execute("INSERT INTO safedefer_outbox (id, created, task) VALUES (?, 1.0, ?)", ("p" * 16, poison))
        with outbox.transaction(connection):
            outbox.put(*tasks)
        outbox.sweep()
        assert all(queue.find(task.id) is not None for task in tasks)
        assert connection.execute("SELECT id FROM safedefer_outbox").fetchall() in ([("p" * 16,)], [])


def test_a_task_for_whose_token_there_is_no_room_waits_and_keeps_no_other(tmp_path, caplog):
    queue = SQLiteQueue(tmp_path / "queue.db", blob_limit=1_000)
    outbox = Outbox(lambda: queue, environment="test", clock=time.time)
    large, tasks = oversize_task(created=1.0), [make_task(created=2.0 + number) for number in range(5)]
    with closing(sqlite3.connect(tmp_path / "shop.db", isolation_level=None)) as connection:
        for some in ([large], tasks):
            with outbox.transaction(connection):
                outbox.put(*some)
        outbox.sweep()
        assert all(queue.find(task.id) is not None for task in tasks)
        assert connection.execute("SELECT id FROM safedefer_outbox").fetchall() == [(large.id,)]
    assert f"task {large.id} stays in the outbox" in caplog.text
    outbox.close()
    queue.close()


async def test_a_connection_that_looks_again_waits_for_others_by_itself(tmp_path):
    """apsw gives a connection no busy timeout, and that of the tests' own connections is none of the product's."""
    path = str(tmp_path / "shop.db")
    with closing(apsw.Connection(path)) as connection:
        connection.execute("CREATE TABLE orders (id)")
    async with of_sqlite._open_apsw(path).connect() as source:
        assert source.connection.execute("PRAGMA busy_timeout").get == of_sqlite._PATIENCE * 1000
