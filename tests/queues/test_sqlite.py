from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import apsw
import apsw.ext
import pytest

from safedefer.blobs import Blob
from safedefer.errors import ConfigurationError, QueueUnavailable, TaskAlreadyExistsError
from safedefer.ledger import Admission
from safedefer.queues import open_queue
from safedefer.queues.base import AlreadyWaiting, DeadFilter, task_digest
from safedefer.queues.memory.queue import MemoryQueue
from safedefer.queues.sqlite.connection import MIGRATIONS, SQL, unavailable
from safedefer.queues.sqlite.queue import SQLiteQueue
from tests.queues.contract import (
    DONE,
    QUEUE_OPTIONS,
    QueueContract,
    execution_of,
    ids,
    make_task,
    oversize_task,
    take,
    take_one,
)
from tests.queues.single import begin, settle


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tasks.db"


@pytest.fixture
def queue(path):
    queue = SQLiteQueue(path, **QUEUE_OPTIONS)
    yield queue
    queue.close()


class TestSQLiteQueue(QueueContract):
    @pytest.fixture
    def queue(self, queue):
        yield queue
        queue.close()
        # Whatever a test of the contract did, the file is whole and no blob is left without its task.
        connection = apsw.Connection(queue.path)
        assert connection.pragma("integrity_check") == "ok"
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        connection.close()


# --- The file -----------------------------------------------------------------------------------


def test_nothing_is_opened_before_the_first_call(path):
    SQLiteQueue(path).close()
    assert not path.exists()


def test_the_file_and_its_log_are_private(queue, path):
    previous = os.umask(0)
    try:
        queue.enqueue_many([make_task()])
    finally:
        os.umask(previous)
    for name in ("tasks.db", "tasks.db-wal", "tasks.db-shm"):
        assert stat.S_IMODE((path.parent / name).stat().st_mode) == 0o600, name


def test_every_commit_reaches_the_disk(queue, path):
    queue.enqueue_many([make_task()])
    with queue._writer._handle.use() as connection:
        assert connection.pragma("journal_mode") == "wal"
        assert connection.pragma("synchronous") == 2
        assert connection.pragma("foreign_keys") == 1


def test_a_lone_task_costs_three_statements_and_a_commit(queue):
    """Each is a step of SQLite, in which this thread lets go of the interpreter."""
    executed = []
    queue._writer.run(
        lambda connection: setattr(
            connection, "exec_trace", lambda _cursor, sql, _values: bool(executed.append(sql)) or True
        )
    )
    executed.clear()
    queue.enqueue_many([make_task()])
    assert executed == ["BEGIN IMMEDIATE", SQL["newest_seq"], SQL["id_taken"], SQL["task_insert"], "COMMIT"]


def test_tasks_survive_closing(queue, path):
    task = oversize_task()
    queue.enqueue_many([task])
    queue.close()
    again = SQLiteQueue(path)
    assert again.blobs.get(task.blob.id) == task.blob.data
    assert ids(take(again)) == [task.id]
    again.close()


def test_two_queues_of_one_process_share_the_file(queue, path):
    other = SQLiteQueue(path)
    task = make_task()
    queue.enqueue_many([task])
    assert other.wait(30.0) is True
    assert ids(take(other)) == [task.id]
    assert take(queue) == []
    other.close()


def test_a_closed_queue_does_not_open_the_file_again(queue):
    queue.enqueue_many([make_task()])
    queue.close()
    for call in (
        lambda: queue.find("x"),
        lambda: queue.stats(now=0.0),
        lambda: queue.wait(0.0),
        lambda: take(queue),
        lambda: queue.blobs.get("x"),
    ):
        with pytest.raises(QueueUnavailable, match="open a new one"):
            call()


def test_a_queue_that_nobody_refers_to_is_closed(path):
    queue = SQLiteQueue(path)
    writer = queue._writer
    writer.submit(lambda _connection: None).result(30)
    assert writer._serving.locked()
    del queue
    _until(lambda: not writer._serving.locked())
    assert not (path.parent / "tasks.db-wal").exists()


def test_a_queue_that_is_collected_while_its_connection_is_in_use_is_closed_by_the_user(path):
    queue = SQLiteQueue(path)
    queue.enqueue_many([make_task()])
    reader = queue._reader
    with reader.use() as connection:
        del queue
        assert connection.execute("SELECT count(*) FROM safedefer_tasks").get == 1
    with pytest.raises(apsw.ConnectionClosedError):
        connection.execute("SELECT 1")


def test_a_queue_that_is_collected_during_a_fork_holds_nobody_up(path):
    # As if the garbage collector ran in a thread that the fork waits for, when the fork has the locks already.
    queue = SQLiteQueue(path)
    queue.enqueue_many([make_task()])
    queue.stats(now=0.0)
    members = [queue._writer, queue._reader, queue._watch]
    for member in members:
        member.before_fork()
    collector = threading.Thread(target=queue._finalizer)
    collector.start()
    collector.join(30)
    assert not collector.is_alive()
    for member in members:
        member.after_fork_in_parent()
    with pytest.raises(QueueUnavailable, match="closed"):
        queue.stats(now=0.0)


def test_a_process_that_forgets_to_close_ends_and_has_stored_its_task(path):
    program = (
        "import sys; from safedefer.queues.sqlite.queue import SQLiteQueue; from tests.queues.contract import make_task\n"
        "queue = SQLiteQueue(sys.argv[1]); queue.enqueue_many([make_task()]); print('stored')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, timeout=120, check=True
    )
    assert (done.stdout, done.stderr) == ("stored\n", "")
    queue = SQLiteQueue(path)
    assert len(take(queue)) == 1
    queue.close()


# --- The schema ---------------------------------------------------------------------------------


def test_a_file_of_a_newer_version_is_refused_and_left_alone(queue, path):
    queue.enqueue_many([make_task()])
    queue.close()
    connection = apsw.Connection(str(path))
    connection.execute("INSERT INTO safedefer_schema (version) VALUES (?)", (len(MIGRATIONS) + 1,))
    newer = SQLiteQueue(path)
    with pytest.raises(QueueUnavailable, match="upgrade safedefer"):
        take(newer)
    with pytest.raises(QueueUnavailable, match="upgrade safedefer"):
        newer.stats(now=0.0)
    assert connection.execute("SELECT count(*) FROM safedefer_tasks").get == 1
    newer.close()
    connection.close()


def test_a_file_of_an_older_version_is_migrated_with_all_that_is_in_it(path):
    connection = apsw.Connection(str(path))
    connection.execute(SQL["schema_table"])
    connection.execute(SQL["migration_1"])
    connection.execute(SQL["schema_set_version"], {"version": 1})
    old = """
        INSERT INTO safedefer_tasks (id, queue, callable_name, url, target, audience, headers, retry_options, eta,
            created, expires, digest, blob_id, due, token) VALUES (:id, 'default', 'shop.tasks:f', '/u', 'default',
            'test:default:default:/u', '{}', '{}', 100.0, 100.0, 1000000, x'00', :blob, 100.0, x'01')
    """
    connection.execute(old, {"id": "waiting-0123456789", "blob": None})
    connection.execute(old, {"id": "oversize-012345678", "blob": "blob-0123456789"})
    connection.execute("INSERT INTO safedefer_blobs VALUES ('blob-0123456789', 2, zeroblob(700000))")
    connection.execute(
        SQL["task_to_dead"].replace("seq = :seq", "TRUE LIMIT 1"), {"charged": 1, "reason": "gave-up", "now": 5.0}
    )
    connection.execute("UPDATE safedefer_dead SET id = 'dead-0123456789'")
    connection.close()
    with contextlib.closing(SQLiteQueue(path, **QUEUE_OPTIONS)) as queue:
        assert [view.id for view in queue.dead_letters(DeadFilter())] == ["dead-0123456789"]
        with pytest.raises(QueueUnavailable, match="blob_limit"):  # what was there before is counted
            queue.enqueue_many([make_task(blob=Blob("new-blob-0123456789", bytes(400_000)))])
        queue.pause("mail", paused=True, now=100.0)
        assert ids(take(queue)) == ["waiting-0123456789", "oversize-012345678"]
    connection = apsw.Connection(str(path))
    assert connection.execute(SQL["schema_version"]).get == len(MIGRATIONS)
    assert connection.pragma("integrity_check") == "ok"
    connection.close()


OLD_ENTRY = "INSERT INTO safedefer_ledger (audience, task_id, digest, state, owner, until, expires, uncharged) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"


def test_runs_that_an_older_version_knew_begin_and_are_lost_as_before(path):
    connection = apsw.Connection(str(path))
    connection.execute(SQL["schema_table"])
    for version in (1, 2):
        connection.execute(SQL[f"migration_{version}"])
        connection.execute(SQL["schema_set_version"], {"version": version})
    again, lost = make_task(), make_task()
    for task, state, until, uncharged in ((again, "retry", 0.0, 0), (lost, "running", 130.0, 1)):
        row = (
            task.audience,
            task.id,
            task_digest(task),
            state,
            "old" if until else None,
            until,
            task.expires,
            uncharged,
        )
        connection.execute(OLD_ENTRY, row)
    connection.close()
    with contextlib.closing(SQLiteQueue(path, **QUEUE_OPTIONS)) as queue:
        queue.enqueue_many([again, lost])
        assert len(take(queue)) == 2
        assert begin(queue.ledger, execution_of(again), now=101.0, lease=30.0) is Admission.RUN
        assert begin(queue.ledger, execution_of(lost), now=101.0, lease=30.0) is Admission.RUNNING
        assert {lease.losses for lease in take(queue, now=161.0)} == {1}
        # A process of the older version goes on with the migrated file.
        connection = apsw.Connection(str(path))
        connection.set_busy_timeout(30_000)  # the writer may be at work on what is not awaited
        old = make_task()
        connection.execute(OLD_ENTRY, (old.audience, old.id, task_digest(old), "retry", None, 0.0, old.expires, 0))
        connection.close()
        assert begin(queue.ledger, execution_of(old), now=162.0, lease=30.0) is Admission.RUN


def test_many_threads_may_open_a_new_file_at_once(path):
    queues = [SQLiteQueue(path) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda queue: queue.enqueue_many([make_task()]), queues))
    assert len(take(queues[0])) == 6
    for queue in queues:
        queue.close()


def test_an_applications_own_tables_may_live_in_the_file(queue, path):
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE tasks (id); CREATE TABLE orders (id); PRAGMA user_version = 77")
    queue.enqueue_many([make_task()])
    assert len(take(queue)) == 1
    assert connection.pragma("user_version") == 77
    connection.close()


PAGED = {"waiting": "view_tasks", "running": "view_tasks", "dead": "view_dead", "ended": "view_ended"}


def test_every_statement_is_one_that_sqlite_understands(queue, path):
    queue.enqueue_many([make_task()])
    connection = apsw.Connection(str(path))
    for name, text in SQL.items():
        statement = text
        if name.startswith("page_"):  # the end of a statement
            statement = f"{SQL[PAGED[name.split('_')[1]]]} {text}"
        if not name.startswith(("migration", "schema_table")):
            names = _parameters(connection, statement)
            values = dict.fromkeys(names) if all(names) else [None] * len(names)  # the values of rows have no names
            connection.execute(f"EXPLAIN {statement}", values).fetchall()
    connection.close()


def _parameters(connection: apsw.Connection, statement: str) -> list[str]:
    names = apsw.ext.query_info(connection, statement).bindings_names
    return [name or "" for name in names]


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("due_of_all", "safedefer_tasks_due"),
        ("due_of_queue", "safedefer_tasks_queue"),
        ("next_due_of_all", "safedefer_tasks_due"),
        ("next_due_of_queue", "safedefer_tasks_queue"),
        ("stats_tasks", "safedefer_tasks_of_queue"),
        ("stats_running", "safedefer_tasks_leased"),
        ("stats_oldest", "safedefer_tasks_of_queue"),
        ("names_prune", "safedefer_names_until"),
        ("ended_prune", "safedefer_ended_ended"),
        ("attempts_of_ended_prune", "safedefer_attempts_task"),
        ("attempts_stray_prune", "safedefer_attempts_stray"),
        ("ledger_prune", "safedefer_ledger_expires"),
        ("queues_with_tasks", "safedefer_tasks_"),
        ("running_of_queue", "safedefer_tasks_leased"),
        ("purge_next", "safedefer_tasks_of_queue"),
        ("unique_taken", "safedefer_tasks_unique"),
        ("dead_letters", "safedefer_dead_ended"),
        ("dead_archive_old", "safedefer_dead_current"),
        ("dead_archive_excess", "safedefer_dead_current"),
    ],
)
def test_what_runs_often_uses_an_index_and_sorts_nothing(queue, path, name, index):
    queue.enqueue_many([make_task()])
    connection = apsw.Connection(str(path))
    values = {**dict.fromkeys(_parameters(connection, SQL[name])), "now": 0, "queue": "", "limit": 1, "before": 0}
    plan = " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {SQL[name]}", values))
    connection.close()
    assert index in plan
    assert "TEMP B-TREE" not in plan
    assert "SCAN safedefer_tasks " not in plan.replace("SCAN safedefer_tasks USING", "")


# --- Group commit -------------------------------------------------------------------------------


def test_threads_share_commits_and_one_failure_spoils_no_other(queue, path):
    queue.enqueue_many([make_task(name="taken")])
    watcher = apsw.Connection(str(path))
    commits = 0

    def count() -> None:
        nonlocal commits
        before = watcher.execute("PRAGMA data_version").get
        while not done.is_set():
            now = watcher.execute("PRAGMA data_version").get
            commits += now != before
            before = now

    done = threading.Event()
    blocker = apsw.Connection(str(path))
    blocker.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(21) as pool:
        # The first holds up the writer at its BEGIN; the others gather behind it.
        first = pool.submit(queue.enqueue_many, [make_task()])
        _until(queue._writer._handle._lock.locked)
        good = [pool.submit(queue.enqueue_many, [make_task()]) for _ in range(10)]
        bad = [pool.submit(queue.enqueue_many, [make_task(name="taken")]) for _ in range(9)]
        _until(lambda: queue._writer._pending.qsize() == 18)  # the writer's thread has one
        counter = threading.Thread(target=count)
        counter.start()
        blocker.execute("COMMIT")
        assert first.result(30.0) is None
        assert [run.result(30.0) for run in good] == [None] * 10
        for run in bad:
            with pytest.raises(TaskAlreadyExistsError):
                run.result(30.0)
        done.set()
        counter.join()
    assert len(take(queue)) == 12
    assert commits <= 2
    blocker.close()
    watcher.close()


def _until(condition) -> None:
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- When storage fails -------------------------------------------------------------------------


def test_a_lock_that_is_held_too_long_is_unavailable_and_passes(path):
    queue = SQLiteQueue(path, busy_timeout=0.05)
    task = make_task()
    queue.enqueue_many([task])
    other = apsw.Connection(str(path))
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(QueueUnavailable, match="long transaction") as caught:
        queue.enqueue_many([make_task()])
    assert isinstance(caught.value.__cause__, apsw.BusyError)
    assert queue.find(task.id) is not None
    other.execute("ROLLBACK")
    queue.enqueue_many([make_task()])
    assert len(take(queue)) == 2
    other.close()
    queue.close()


def test_a_full_disk_acknowledges_nothing_and_the_queue_works_again_after_it(queue):
    queue.enqueue_many([make_task()])
    with queue._writer._handle.use() as connection:
        connection.execute(f"PRAGMA max_page_count = {connection.pragma('page_count') + 8}")
    small = make_task()
    with pytest.raises(QueueUnavailable, match="free some space") as caught:
        queue.enqueue_many([small, make_task(token=b"x" * 200_000)])
    assert isinstance(caught.value.__cause__, apsw.FullError)
    assert queue.find(small.id) is None
    queue.enqueue_many([small])
    with queue._writer._handle.use() as connection:
        connection.execute("PRAGMA max_page_count = 100000")
    queue.enqueue_many([make_task(token=b"x" * 200_000)])
    assert len(take(queue)) == 3


@pytest.mark.parametrize(
    ("folder", "code", "says"),
    [
        ("/proc", apsw.SQLITE_IOERR_SHMSIZE, "the disk is full; free some space"),
        ("/proc", apsw.SQLITE_IOERR_WRITE, "the disk is full; free some space"),
        ("/proc", apsw.SQLITE_IOERR_READ, "the disk did not read or write"),
        (None, apsw.SQLITE_IOERR_SHMSIZE, "the disk did not read or write"),
        ("/nowhere", apsw.SQLITE_IOERR_SHMSIZE, "the disk did not read or write"),
    ],
)
def test_an_io_error_of_a_write_on_a_disk_without_room_says_that_it_is_full(tmp_path, folder, code, says):
    """As SQLite's where a process opens the file on such a disk. ``/proc`` is a file system that has no room."""
    error = unavailable(f"{folder or tmp_path}/tasks.db", apsw.exception_for(code))
    assert says in str(error)


def test_a_full_device_fails_the_commit_for_everybody_and_passes(path):
    program = (
        "import resource, signal, sys\n"
        "from safedefer.errors import QueueUnavailable\n"
        "from safedefer.queues.sqlite.queue import SQLiteQueue\n"
        "from tests.queues.contract import make_task, take\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "queue = SQLiteQueue(sys.argv[1]); queue.enqueue_many([make_task()])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))\n"
        "try: queue.enqueue_many([make_task(token=b'x' * 600_000)])\n"
        "except QueueUnavailable as error: print(type(error.__cause__).__name__)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "queue.enqueue_many([make_task(token=b'x' * 600_000)]); print(len(take(queue)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=60, check=True)
    error, count = done.stdout.split()
    assert error in {"FullError", "IOError"}
    assert (count, done.stderr) == ("2", "")


@pytest.mark.parametrize("size", [100, 100_000])
def test_a_file_that_is_no_database_is_refused_and_left_alone(path, size):
    data = b"certainly not a database" * size
    path.write_bytes(data)
    queue = SQLiteQueue(path)
    with pytest.raises(QueueUnavailable, match="not a SQLite database"):
        queue.enqueue_many([make_task()])
    queue.close()
    assert path.read_bytes() == data


def test_a_directory_that_does_not_exist_is_unavailable(tmp_path):
    queue = SQLiteQueue(tmp_path / "nowhere" / "tasks.db")
    with pytest.raises(QueueUnavailable, match="nowhere"):
        queue.enqueue_many([make_task()])
    (tmp_path / "nowhere").mkdir()
    queue.enqueue_many([make_task()])
    assert len(take(queue)) == 1
    queue.close()


def test_a_damaged_file_is_unavailable(queue, path):
    queue.enqueue_many([make_task(token=b"x" * 5000) for _ in range(50)])
    queue.close()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    damaged = SQLiteQueue(path)
    with pytest.raises(QueueUnavailable, match="restore it from a backup"):
        take(damaged)
    damaged.close()


def test_a_file_that_was_deleted_while_open_takes_nothing_more(queue, path):
    queue.enqueue_many([make_task()])
    path.unlink()
    with pytest.raises(QueueUnavailable, match="moved, deleted or replaced"):
        queue.enqueue_many([make_task()])


def test_what_an_operation_raises_is_undone(queue):
    def action(connection: apsw.Connection) -> None:
        connection.execute("DELETE FROM safedefer_tasks")
        raise ZeroDivisionError

    queue.enqueue_many([make_task()])
    with pytest.raises(ZeroDivisionError):
        queue._writer.run(action)
    assert len(take(queue)) == 1


# --- In the user's transaction --------------------------------------------------------------------


def test_a_task_in_the_users_transaction_is_there_if_it_commits(queue, path):
    queue.enqueue_many([first := make_task()])
    take_one(queue)
    connection = apsw.Connection(str(path))
    connection.set_busy_timeout(5000)
    connection.execute("BEGIN IMMEDIATE; CREATE TABLE orders (id)")
    task = oversize_task()
    queue.enqueue_on(connection, [task])
    assert queue.find(task.id) is None
    connection.execute("ROLLBACK")
    assert queue.wait(0.05) is False
    connection.execute("BEGIN IMMEDIATE")
    queue.enqueue_on(connection, [task])
    with pytest.raises(TaskAlreadyExistsError):
        queue.enqueue_on(connection, [make_task(), first])
    connection.execute("COMMIT")
    assert queue.wait(30.0) is True
    assert ids(take(queue)) == [task.id]
    connection.close()


def test_a_connection_to_another_file_is_refused(queue, tmp_path):
    connection = apsw.Connection(str(tmp_path / "other.db"))
    with pytest.raises(ConfigurationError, match="not the queue's"):
        queue.enqueue_on(connection, [make_task()])
    connection.close()


# --- Speed that must not depend on what waits ---------------------------------------------------


def test_leasing_reads_no_more_pages_when_much_waits(queue):
    def pages() -> int:
        with queue._writer._handle.use() as connection:
            connection.execute("PRAGMA shrink_memory").fetchall()  # Begins with an empty cache.
            before = connection.status(apsw.SQLITE_DBSTATUS_CACHE_MISS)[0]
        (lease,) = take(queue, limit=1)
        settle(queue, lease, DONE, now=101.0)
        with queue._writer._handle.use() as connection:
            return connection.status(apsw.SQLITE_DBSTATUS_CACHE_MISS)[0] - before

    queue.enqueue_many([make_task() for _ in range(10)])
    few = pages()
    for _ in range(10):
        queue.enqueue_many([make_task(eta=100.0 + n % 7, token=b"x" * 300) for n in range(1000)])
    assert pages() <= few + 25


# --- URLs ---------------------------------------------------------------------------------------


def test_urls_name_queues(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_queue("memory://"), MemoryQueue)
    relative, absolute = open_queue("sqlite:///a%20b.db"), open_queue(f"sqlite:///{tmp_path}/sub.db")
    assert relative.path == str(tmp_path.resolve() / "a b.db")
    assert absolute.path == str(tmp_path.resolve() / "sub.db")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "tasks.db",
        "mysql://user:secret@host/db",
        "sqlite://tasks.db",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite:///tasks.db?mode=ro",
        "sqlite:///a#b",
        "memory://shared",
    ],
)
def test_other_urls_are_refused_with_what_exists(url):
    with pytest.raises(ConfigurationError, match="memory://") as caught:
        open_queue(url)
    assert "secret" not in str(caught.value)


def test_a_unique_key_is_gone_with_the_row_of_its_task(queue, path):
    queue.enqueue_many([first := make_task(unique_key="k")])
    with pytest.raises(AlreadyWaiting) as caught:
        queue.enqueue_many([make_task(unique_key="k")])
    assert queue.find(caught.value.task_id).id == first.id
    connection = apsw.Connection(str(path))
    connection.execute("DELETE FROM safedefer_tasks")
    connection.close()
    queue.enqueue_many([make_task(unique_key="k")])
    assert len(take(queue)) == 1


NO_PLACE = {  # what is in the way of the file, and the remedy
    "no folder": ("missing/q.db", "its folder does not exist; make it"),
    "a file for a folder": ("file/q.db", "its folder is a file"),
}


@pytest.mark.parametrize("label", NO_PLACE)
def test_a_file_that_cannot_be_made_says_what_to_do(label, tmp_path):
    name, remedy = NO_PLACE[label]
    (tmp_path / "file").touch()
    queue = SQLiteQueue(tmp_path / name)
    with pytest.raises(QueueUnavailable, match=remedy) as caught:
        queue.stats(now=0.0)
    assert "see the cause" not in str(caught.value)
    queue.close()
