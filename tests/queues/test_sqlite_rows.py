"""Rows that are read together, as JSON, are those that are read one by one: every value, and its type."""

import contextlib
import json
import math

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safedefer.queues.sqlite.connection import SQL, open_connection
from safedefer.queues.sqlite.queue import SQLiteQueue
from safedefer.queues.sqlite.rows import TaskRow, tasks_by_seq
from tests.queues.contract import make_task

_WHOLE = st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, 2**53 + 1, 2**63 - 1, -(2**63)]))
_VALUES = {
    "TEXT": st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])), st.text('\0\x01\x1f"\\/\u2028'), st.sampled_from(["é" * 2400, "x" * 5001])
    ),
    "REAL": st.one_of(
        st.floats(allow_nan=False), st.floats(1.6e9, 2e9), st.sampled_from([math.inf, -math.inf, 1e308, 5e-324, -0.0])
    ),
    "INTEGER": _WHOLE,
    "BLOB": st.one_of(st.binary(max_size=64), st.sampled_from([b"\xff" * 65_536, b"t" * 65_537])),
}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    with contextlib.closing(open_connection(str(tmp_path_factory.mktemp("rows") / "q.db"), busy_timeout=5.0)) as made:
        yield made


@given(data=st.data())
def test_rows_that_are_read_together_are_those_that_are_read_one_by_one(file, data):
    file.execute("DELETE FROM safedefer_tasks")
    columns = file.execute("PRAGMA table_info(safedefer_tasks)").fetchall()
    for number in range(data.draw(st.integers(1, 3))):
        drawn = {
            name: data.draw(_VALUES[kind] if needed else st.none() | _VALUES[kind])
            for _, name, kind, needed, *_ in columns
            if name != "seq"
        }
        drawn |= {name: f"{number}{drawn[name]}" for name in ("id", "queue")}  # no two rows take each other's place
        marks = ", ".join("?" * len(drawn))
        file.execute(f"INSERT INTO safedefer_tasks ({', '.join(drawn)}) VALUES ({marks})", tuple(drawn.values()))
    seqs = [seq for (seq,) in file.execute("SELECT seq FROM safedefer_tasks")]
    found = tasks_by_seq(file, seqs)
    alone = {row[0]: TaskRow._make(row) for row in file.execute(SQL["tasks_by_seq"], {"seqs": json.dumps(seqs)})}
    assert found == alone
    assert [[*map(type, row)] for row in found.values()] == [[*map(type, alone[seq])] for seq in found]


@pytest.mark.parametrize(("column", "size"), [("url", 5_001), ("audience", 6_000), ("unique_key", 60_000)])
def test_a_text_that_is_longer_than_ours_is_left_out_however_it_is_read(tmp_path, column, size):
    with contextlib.closing(SQLiteQueue(tmp_path / "q.db")) as queue:
        queue.enqueue_many([make_task()])
        with contextlib.closing(apsw.Connection(queue.path)) as other:
            other.execute(f"UPDATE safedefer_tasks SET {column} = ?", ("x" * size,))
        (held,) = queue.lease(owner="o", limit=1, seconds=60.0, now=1e12)
        assert getattr(held.task, column) == ""


def test_what_is_too_much_to_be_read_together_is_read_one_by_one(file):
    file.execute("DELETE FROM safedefer_tasks")
    blanks = dict.fromkeys(("eta", "created", "expires", "due"), 1) | dict.fromkeys(("digest", "token"), b"t" * 300)
    for number in range(3):
        texts = dict.fromkeys(("queue", "callable_name", "url", "target", "audience", "headers", "retry_options"), "x")
        values = {"seq": number + 1, "id": str(number), **texts, **blanks}
        file.execute(
            f"INSERT INTO safedefer_tasks ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",
            tuple(values.values()),
        )
    before = file.limit(apsw.SQLITE_LIMIT_LENGTH, 3_000)
    try:
        assert [*tasks_by_seq(file, [1, 2, 3])] == [1, 2, 3]
    finally:
        file.limit(apsw.SQLITE_LIMIT_LENGTH, before)
