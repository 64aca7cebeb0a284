"""A queue's SQLite file that somebody else owns, may write, or has put a trap into: nothing of it is used."""

import os
import sqlite3
import time

import apsw
import pytest

from safedefer.errors import ConfigurationError, QueueUnavailable
from safedefer.queues import open_queue
from safedefer.queues.sqlite.connection import open_connection
from safedefer.queues.sqlite.queue import SQLiteQueue

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "queue" / "tasks.db"
    made.parent.mkdir()
    use(made)
    return made


def use(path):
    queue = open_queue(f"sqlite:///{path}")
    try:
        return queue.stats(now=time.time())
    finally:
        queue.close()


def change(path, script):
    """Run statements on the file as somebody who may write it does, with another library and no scruples."""
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()


# --- Whose it is ----------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
def test_a_file_of_somebody_else_is_refused(path, suffix):
    planted = path.with_name(path.name + suffix)
    planted.touch()
    os.chown(planted, 12_345, -1)
    with pytest.raises(QueueUnavailable, match=r"belongs to the user 12345.*chown"):
        use(path)


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
def test_a_file_that_anybody_may_write_is_refused(path, suffix):
    planted = path.with_name(path.name + suffix)
    planted.touch()
    planted.chmod(0o666)
    with pytest.raises(QueueUnavailable, match=r"may be changed by anybody.*chmod o-w"):
        use(path)


def test_a_link_that_leads_nowhere_makes_no_file_where_it_points(tmp_path):
    target = tmp_path / "elsewhere"
    link = tmp_path / "tasks.db"
    link.symlink_to(target)
    with pytest.raises(ConfigurationError, match=r"symbolic link to .*elsewhere.*, which does not exist"):
        use(link)
    assert not target.exists()


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_a_link_beside_the_file_is_refused_and_not_followed(path, tmp_path, suffix):
    target = tmp_path / "elsewhere"
    target.write_bytes(b"precious")
    path.with_name(path.name + suffix).symlink_to(target)
    with pytest.raises(QueueUnavailable, match="is a symbolic link"):
        use(path)
    assert target.read_bytes() == b"precious"


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_a_hard_link_beside_the_file_is_not_written_over(path, tmp_path, suffix):
    target = tmp_path / "elsewhere"
    target.write_bytes(b"precious")
    path.with_name(path.name + suffix).hardlink_to(target)
    with pytest.raises(QueueUnavailable, match="is a hard link"):
        use(path)
    assert target.read_bytes() == b"precious"


def test_a_link_that_takes_the_place_of_the_file_is_refused(path):
    queue = SQLiteQueue(path)
    path.rename(path.with_name("moved.db"))
    path.symlink_to("moved.db")
    with pytest.raises(QueueUnavailable, match="is a symbolic link"):
        queue.stats(now=0)
    queue.close()


def test_a_link_to_a_file_is_followed(path, tmp_path):
    link = tmp_path / "link.db"
    link.symlink_to(path)
    assert use(link) == use(path)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o660])
def test_a_file_that_some_may_read_or_a_group_may_write_is_used(path, mode):
    path.chmod(mode)
    use(path)


# --- What is in it --------------------------------------------------------------------------------

FORGET = "BEGIN DELETE FROM safedefer_ledger; END"
TRAPS = {
    "a trigger on the ledger": "CREATE TRIGGER evil AFTER INSERT ON safedefer_ledger BEGIN DELETE FROM safedefer_ledger WHERE task_id = NEW.task_id; END",
    "a trigger on tasks": f"CREATE TRIGGER evil AFTER UPDATE ON safedefer_tasks {FORGET}",
    "a trigger named as ours": f"DROP TRIGGER safedefer_blob_gone; CREATE TRIGGER safedefer_blob_gone AFTER DELETE ON safedefer_blobs {FORGET}",
    "a trigger named as a table of others": f'CREATE TRIGGER "orders" AFTER INSERT ON [SafeDefer_Ledger] {FORGET}',
    "a trigger of ours is gone": "DROP TRIGGER safedefer_blob_gone",
    "a trigger on the user's table that writes ours": f"CREATE TABLE orders (id); CREATE TRIGGER evil AFTER INSERT ON orders {FORGET}",
    "a view instead of the ledger": "DROP TABLE safedefer_ledger; CREATE VIEW safedefer_ledger AS SELECT 1 AS audience",
    "an instead-of trigger on a view of ours": f"CREATE VIEW seen AS SELECT * FROM safedefer_ledger; CREATE TRIGGER evil INSTEAD OF INSERT ON seen {FORGET}",
    "a column more": "ALTER TABLE safedefer_ledger ADD COLUMN more TEXT",
    "a generated column": "ALTER TABLE safedefer_ledger ADD COLUMN more INTEGER AS (abs(-9223372036854775807 - length(owner)))",
    "a column less": "DROP INDEX safedefer_ledger_expires; ALTER TABLE safedefer_ledger DROP COLUMN uncharged",
    "an index of an expression": "CREATE INDEX more ON safedefer_ledger (abs(until))",
    "a unique index": "CREATE UNIQUE INDEX more ON safedefer_ledger (digest)",
    "another index of the name": "DROP INDEX safedefer_tasks_due; CREATE INDEX safedefer_tasks_due ON safedefer_tasks (due DESC)",
    "an index less": "DROP INDEX safedefer_tasks_unique",
    "a table less": "DROP TABLE safedefer_attempts",
    "a foreign key that deletes": "CREATE TABLE evil (task REFERENCES safedefer_tasks (seq) ON DELETE CASCADE);"
    " CREATE TRIGGER e AFTER DELETE ON evil BEGIN SELECT 1; END",
    "a foreign key that forbids": 'CREATE TABLE evil (task REFERENCES "SAFEDEFER_tasks" (seq) ON DELETE RESTRICT)',
    "ON CONFLICT IGNORE": "DROP TABLE safedefer_ledger; CREATE TABLE safedefer_ledger (audience TEXT, task_id TEXT, digest BLOB, state TEXT,"
    " owner TEXT, until REAL, expires INTEGER, uncharged INTEGER, PRIMARY KEY (audience, task_id) ON CONFLICT IGNORE) STRICT, WITHOUT ROWID",
    # What the column says of a row's type and name is not what SQLite goes by: it runs the statement.
    "a trigger that says it is a table": "CREATE TABLE orders (id); PRAGMA writable_schema = ON;"
    " UPDATE sqlite_schema SET sql = 'CREATE /**/ TRIGGER orders AFTER INSERT ON safedefer_ledger"
    " BEGIN DELETE FROM safedefer_ledger; END', rootpage = 0 WHERE name = 'orders'",
    "a trigger that says it is a view": f"CREATE TABLE orders (id); CREATE TRIGGER evil AFTER INSERT ON safedefer_ledger {FORGET}; PRAGMA writable_schema = ON;"
    " UPDATE sqlite_schema SET type = 'view', tbl_name = 'evil' WHERE name = 'evil'",
    "a trigger that says it is on another table": f"CREATE TABLE orders (id); CREATE TRIGGER evil AFTER INSERT ON safedefer_ledger {FORGET};"
    " PRAGMA writable_schema = ON; UPDATE sqlite_schema SET tbl_name = 'orders' WHERE name = 'evil'",
    "a trigger that is no text": f"CREATE TRIGGER evil AFTER INSERT ON safedefer_ledger {FORGET};"
    " PRAGMA writable_schema = ON; UPDATE sqlite_schema SET sql = CAST(sql AS BLOB), tbl_name = 'orders' WHERE name = 'evil'",
    "a trigger that is no UTF-8": f"CREATE TRIGGER evil AFTER INSERT ON safedefer_ledger {FORGET};"
    " PRAGMA writable_schema = ON; UPDATE sqlite_schema SET sql = CAST(CAST(sql AS BLOB) || x'2d2dff' AS TEXT) WHERE name = 'evil'",
    "the ledger in the pages of the controls": "PRAGMA writable_schema = ON; UPDATE sqlite_schema SET rootpage ="
    " (SELECT rootpage FROM sqlite_schema WHERE name = 'safedefer_controls') WHERE name = 'safedefer_ledger'",
    "a table of others in the pages of the ledger": "CREATE TABLE orders (id, at, PRIMARY KEY (id, at)) WITHOUT ROWID; PRAGMA writable_schema = ON;"
    " UPDATE sqlite_schema SET rootpage = (SELECT rootpage FROM sqlite_schema WHERE name = 'safedefer_ledger') WHERE name = 'orders'",
    "a space that is a part of a name": "PRAGMA writable_schema = ON; UPDATE sqlite_schema SET"
    " sql = replace(sql, 'REFERENCES safedefer_tasks (', 'REFERENCES safedefer_tasks' || char(160) || '(') WHERE name = 'safedefer_blobs'",
}  # fmt: skip


@pytest.mark.parametrize("label", TRAPS)
def test_a_trap_in_the_file_is_refused_before_anything_is_read_or_written(path, label):
    change(path, TRAPS[label])
    with pytest.raises(QueueUnavailable, match=r"tasks\.db.*(DROP|restore|another file)"):
        use(path)


def test_the_refusal_says_what_to_drop(path):
    change(path, TRAPS["a trigger on the ledger"])
    with pytest.raises(QueueUnavailable, match='trigger "evil".*DROP TRIGGER "evil"'):
        use(path)
    change(path, "DROP TRIGGER evil")
    use(path)


NEIGHBOURS = """
CREATE TABLE orders (id INTEGER PRIMARY KEY, at TEXT, total AS (abs(id)) STORED);
CREATE INDEX orders_at ON orders (lower(at));
CREATE TABLE items (orders REFERENCES orders (id) ON DELETE CASCADE);
CREATE TRIGGER counted AFTER INSERT ON orders BEGIN DELETE FROM items WHERE orders = NEW.id; END;
CREATE VIEW waiting AS SELECT id, queue FROM safedefer_tasks;
CREATE TABLE my_safedefer_tasks (id, trigger TEXT);
CREATE TABLE safedefer_tasks_archive (id);
ANALYZE;
"""


def test_the_user_s_own_tables_may_be_in_the_file(path):
    change(path, NEIGHBOURS)
    use(path)


def test_a_connection_trusts_no_schema_and_is_on_the_defensive(path):
    connection = open_connection(str(path), busy_timeout=1)
    assert connection.pragma("trusted_schema") == 0
    assert connection.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, -1) == 1
    with pytest.raises(apsw.SQLError):
        connection.execute("PRAGMA writable_schema = ON; DELETE FROM sqlite_schema WHERE name = 'safedefer_blob_gone'")
    connection.close()
    use(path)
