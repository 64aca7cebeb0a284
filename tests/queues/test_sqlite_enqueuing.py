"""Tasks that several callers, or one call, enqueue at once in SQLite: stored together, and as if one by one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from safedefer.errors import QueueUnavailable, TaskAlreadyExistsError, TombstonedTaskError
from safedefer.queues.base import AlreadyWaiting
from safedefer.queues.sqlite import bell
from safedefer.queues.sqlite.connection import SQL
from safedefer.queues.sqlite.queue import SQLiteQueue
from safedefer.queues.sqlite.repair import MOST_SEQ
from tests.queues.contract import ids, make_task, oversize_task, take
from tests.queues.test_sqlite_writer import until


@pytest.fixture
def queue(tmp_path):
    queue = SQLiteQueue(tmp_path / "tasks.db")
    yield queue
    queue.close()


def enqueue_at_once(queue, *batches):
    """Have a thread for each batch enqueue it in one transaction, in this order; return their outcomes."""
    begun, go_on, futures = threading.Event(), threading.Event(), []

    def hold(_connection) -> None:
        begun.set()
        go_on.wait(60.0)

    with ThreadPoolExecutor(len(batches) + 1) as pool:
        pool.submit(queue._writer.run, hold)
        assert begun.wait(60.0)
        for number, batch in enumerate(batches):
            futures.append(pool.submit(queue.enqueue_many, batch))
            until(lambda number=number: queue._writer._pending.qsize() >= number)  # its thread takes the first one
            until(lambda number=number: queue._writer._pending.qsize() + len(queue._writer._others) >= number + 1)
        go_on.set()
        return [future.exception(60.0) for future in futures]


def rows(queue) -> dict[str, tuple[object, ...]]:
    with queue._reader.use() as connection:
        return {row[1]: row[2:] for row in connection.execute("SELECT * FROM safedefer_tasks ORDER BY seq")}


def trace(queue) -> list[str]:
    """Have the statements noted that the writer executes from now on."""
    executed: list[str] = []
    queue._writer.run(
        lambda connection: setattr(
            connection, "exec_trace", lambda _cursor, sql, _values: bool(executed.append(sql)) or True
        )
    )
    executed.clear()
    return executed


def test_what_several_callers_enqueue_at_once_costs_one_statement(queue):
    tasks = [make_task() for _ in range(5)]
    executed = trace(queue)
    assert enqueue_at_once(queue, *([task] for task in tasks)) == [None] * 5
    of_batch = executed[executed.index(SQL["newest_seq"]) :]
    assert len(of_batch) == 4
    assert of_batch[1] == SQL["ids_taken"]
    assert of_batch[2].count("(?, ?, ") == 5
    assert ids(take(queue)) == [task.id for task in tasks]


@pytest.mark.parametrize("count", [2, 256, 257, 700])
def test_many_tasks_of_one_call_keep_their_order(queue, count):
    tasks = [make_task() for _ in range(count)]
    queue.enqueue_many(tasks)
    assert list(rows(queue)) == [task.id for task in tasks]
    assert ids(take(queue, limit=count)) == [task.id for task in tasks]


def test_a_row_that_was_stored_with_others_has_the_values_of_one_that_was_stored_alone(queue, tmp_path):
    tasks = [
        make_task(
            headers={"X-One": "1"}, retry_options={"task_retry_limit": 3}, queue="mail", eta=107.5, blob_id="kept"
        ),
        make_task(target="worker", url="/other", callable_name="shop:Cart.pay"),
    ]
    queue.enqueue_many(tasks)
    other = SQLiteQueue(tmp_path / "other.db")
    for task in tasks:
        other.enqueue_many([task])
    assert rows(queue) == rows(other)
    other.close()


def test_of_several_callers_the_one_whose_task_is_known_is_refused_and_the_others_are_not(queue):
    waiting, ended = make_task(), make_task()
    queue.enqueue_many([waiting, ended])
    assert queue.cancel(ended.id, now=101.0)
    first, last, new = make_task(), make_task(), make_task()
    outcomes = enqueue_at_once(queue, [first], [waiting], [new, ended], [last])
    assert [type(outcome) for outcome in outcomes] == [
        type(None), TaskAlreadyExistsError, TombstonedTaskError, type(None),
    ]  # fmt: skip
    assert list(rows(queue)) == [waiting.id, first.id, last.id]


def test_of_two_callers_with_one_task_the_second_is_refused(queue):
    task = make_task()
    outcomes = enqueue_at_once(queue, [make_task()], [task], [task])
    assert [type(outcome) for outcome in outcomes] == [type(None), type(None), TaskAlreadyExistsError]
    assert len(rows(queue)) == 2


def test_a_task_twice_in_one_call_stores_none(queue):
    task = make_task()
    with pytest.raises(TaskAlreadyExistsError):
        queue.enqueue_many([make_task(), task, task])
    assert rows(queue) == {}


def test_a_task_twice_in_one_call_of_many_stores_none(queue):
    tasks = [make_task() for _ in range(300)]
    with pytest.raises(TaskAlreadyExistsError, match=tasks[3].id):
        queue.enqueue_many([*tasks, tasks[3]])
    assert rows(queue) == {}


def test_the_last_of_many_is_refused_and_none_of_its_call_is_stored(queue):
    known = make_task()
    queue.enqueue_many([known])
    calls = [[make_task() for _ in range(70)] for _ in range(3)]
    outcomes = enqueue_at_once(queue, calls[0], [*calls[1], known], calls[2])
    assert [type(outcome) for outcome in outcomes] == [type(None), TaskAlreadyExistsError, type(None)]
    assert known.id in str(outcomes[1])
    assert list(rows(queue)) == [task.id for task in (known, *calls[0], *calls[2])]


def test_statements_of_many_sizes_take_little_memory(queue):
    """SQLite keeps each of them ready: those of 1 to 256 tasks took 24 MB."""
    executed = trace(queue)
    for count in (1, 63, 64, 65, 255, 256, 300):
        queue.enqueue_many([make_task() for _ in range(count)])
    assert max(sql.count("(?, ?, ") for sql in executed) == 64


def test_names_unique_keys_and_blobs_are_looked_up_one_by_one(queue):
    named, unique, large = make_task(name="daily"), make_task(unique_key="k"), oversize_task()
    plain = [make_task() for _ in range(3)]
    outcomes = enqueue_at_once(
        queue, [plain[0]], [named], [unique], [large], [plain[1], plain[2]], [make_task(name="daily")],
        [make_task(unique_key="k")],
    )  # fmt: skip
    assert [type(outcome) for outcome in outcomes[:5]] == [type(None)] * 5
    assert [type(outcome) for outcome in outcomes[5:]] == [TaskAlreadyExistsError, AlreadyWaiting]
    assert sorted(rows(queue)) == sorted(task.id for task in (*plain, named, unique, large))
    assert queue.blobs.get(large.blob.id) == large.blob.data


def test_one_call_with_a_name_among_others_keeps_its_order(queue):
    tasks = [make_task(name="first"), make_task(), make_task()]
    queue.enqueue_many(tasks)
    assert list(rows(queue)) == [task.id for task in tasks]


def test_several_callers_survive_a_number_that_somebody_wrote(queue):
    """The storage is not trusted: a number of rows that is used up is repaired, whoever comes."""
    queue.enqueue_many([make_task()])
    queue._writer.run(
        lambda connection: connection.execute("UPDATE sqlite_sequence SET seq = ?", (MOST_SEQ + 1,)).close()
    )
    assert enqueue_at_once(queue, *([make_task()] for _ in range(3))) == [None] * 3
    assert len(rows(queue)) == 4


def test_a_full_disk_refuses_all_and_stores_none(queue):
    queue.enqueue_many([make_task()])
    queue._writer.run(lambda connection: connection.execute("PRAGMA max_page_count = 1").get)
    big = [make_task(token=b"x" * 9_000) for _ in range(40)]
    outcomes = enqueue_at_once(queue, *([task] for task in big))
    assert {type(outcome) for outcome in outcomes} <= {type(None), QueueUnavailable}
    assert QueueUnavailable in {type(outcome) for outcome in outcomes}
    stored = {task.id for task, outcome in zip(big, outcomes, strict=True) if outcome is None}
    assert set(rows(queue)) - stored == {next(iter(rows(queue)))}


def test_one_ring_tells_of_what_was_stored_in_one_transaction(queue, monkeypatch):
    rings = []
    monkeypatch.setattr(bell, "ring", rings.append)
    queue.enqueue_many([make_task()])
    assert len(rings) == 1
    assert enqueue_at_once(queue, *([make_task()] for _ in range(6))) == [None] * 6
    assert len(rings) == 2
    queue.enqueue_many([make_task()])
    assert len(rings) == 3
