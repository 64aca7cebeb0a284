"""Operators' commands, and the processes, on rows that somebody with write access to the storage wrote, without a key."""

import contextlib
import json
import math
import secrets
import time
import tracemalloc

import apsw
import pytest
from click.testing import CliRunner

from safedefer.cli.root import main
from safedefer.queues.base import DeadFilter, Settlement, TaskState, Verdict
from safedefer.queues.postgres.rows import read_task
from safedefer.queues.rules import stored_mapping, unfolds
from safedefer.queues.sqlite.queue import SQLiteQueue
from tests import sample_tasks
from tests.unit.apps import handle, make_app

#: JSON that takes fifty times the memory of its text; 2 MiB of it are a row of the storage.
UNFOLDING = {
    "lists": '{"a":[' + ",".join(["{}"] * 690_000) + "]}",
    "objects": "{" + ",".join(f'"{n}":{{}}' for n in range(170_000)) + "}",
    "members": "{" + ",".join(f'"{n}":""' for n in range(170_000)) + "}",
    "deep": '{"a":' + "[" * 900 + "1" + ",1" * 1_000_000 + "]" * 900 + "}",
}


@pytest.fixture
def queue(tmp_path):
    with contextlib.closing(SQLiteQueue(str(tmp_path / "tasks.db"))) as queue:
        yield queue


@pytest.fixture
def app(queue, monkeypatch):
    app = make_app(queue=queue)
    for module in ("dead", "tasks", "queues"):
        monkeypatch.setattr(f"safedefer.cli.{module}.load_app_to_look", lambda _: app)
    return app


def write(queue, statement, *values):
    with contextlib.closing(apsw.Connection(queue.file.path)) as connection:
        connection.execute(statement, values)


def dead_letters(app, count):
    tasks = [app.defer(sample_tasks.add, 1, number) for number in range(count)]
    leases = app.queue.lease(owner="w", limit=count, seconds=60.0, now=time.time())
    app.queue.settle_many([(held, Settlement(verdict=Verdict.DEAD, reason="why")) for held in leases], now=time.time())
    return [task.id for task in tasks]


def run(*words):
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    return done.stdout


def refuse(name):
    raise AssertionError(f"{name} is no JSON")


def documents(text):
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# --- Rows that unfold to more than their text -------------------------------------------------------------------------


@pytest.mark.parametrize("text", UNFOLDING.values(), ids=UNFOLDING)
def test_a_small_text_of_many_values_does_not_fill_the_memory(text):
    headers = text, json.dumps(text), f'{{"safedefer_more":{{"headers":{text}}}}}'
    rows = [{"id": 1, "dedupe_key": "x", "entrypoint": "q", "payload": b"t", "headers": each} for each in headers]
    tracemalloc.start()
    found = stored_mapping(text)
    tasks = [read_task(row) for row in rows]
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found, [dict(task.headers) for task in tasks]) == ({}, [{}, {}, {}])
    assert kept < 100_000
    assert peak < 20 * len(text)  # orjson's own, for a text in a text


@pytest.mark.parametrize(
    "text", ['"' + '\\"' * 500_000, '{"' + '\\"' * 500_000 + "\\", '"' * 1_000_001], ids=["open", "cut", "quotes"]
)
def test_a_text_that_has_no_end_is_looked_through_once(text):
    assert not unfolds(text)


def test_many_and_long_headers_of_a_task_are_read_as_they_are():
    headers = {f"X-{number}": '{[:"\\' * 200 for number in range(1_000)}
    assert stored_mapping(json.dumps(headers)) == headers
    more = {"headers": headers, "retry_options": {"task_retry_limit": 3}}
    row = {
        "id": 1,
        "dedupe_key": "x",
        "entrypoint": "q",
        "payload": b"t",
        "headers": json.dumps({"safedefer_more": more}),
    }
    assert read_task(row).headers == headers


def test_a_letter_for_which_there_is_no_room_keeps_no_other_from_running_again(tmp_path):
    """Whoever may write the storage may claim that much; the run of all ended at the first large letter."""
    with contextlib.closing(SQLiteQueue(str(tmp_path / "tasks.db"), blob_limit=60_000)) as queue:
        app = make_app(queue=queue)
        tasks = [app.defer(sample_tasks.add, "x" * size, str(size)) for size in (1, 40_000, 2)]
        for held in queue.lease(owner="w", limit=3, seconds=60.0, now=time.time()):
            queue.settle_many([(held, Settlement(verdict=Verdict.DEAD, reason="why"))], now=time.time())
        app.defer(sample_tasks.add, "x" * 40_000, "waits")
        again, refused = app.retry_all(DeadFilter())
        assert len(again) == 2
        assert list(refused) == [tasks[1].id]
        assert queue.find(tasks[1].id).state is TaskState.DEAD


# --- What the commands print ------------------------------------------------------------------------------------------


def test_numbers_that_json_has_none_for_break_no_line_of_an_export(queue, app):
    ids = dead_letters(app, 3)
    write(
        queue,
        """UPDATE safedefer_dead SET headers = '{"a": NaN, "b": 1e999}', eta = ? WHERE id = ?""",
        math.inf,
        ids[0],
    )
    write(queue, "INSERT INTO safedefer_attempts (task_id, audience, started, ended, outcome, stray) VALUES (?, '', ?, ?, '', 0)",
          ids[1], math.inf, -math.inf)  # fmt: skip
    found = {each["id"]: each for each in documents(run("dead", "export"))}
    assert set(found) == set(ids)
    assert found[ids[0]]["headers"] == {"a": None, "b": None}
    assert (found[ids[1]]["attempts"][0]["started"], found[ids[1]]["attempts"][0]["ended"]) == (None, None)
    assert json.loads(run("dead", "show", ids[0]), parse_constant=refuse)["eta"] == "impossible"


def test_a_task_due_at_no_time_breaks_no_line_of_the_counts(queue, app):
    task = app.defer(sample_tasks.add, 1, 2)
    write(queue, "UPDATE safedefer_tasks SET eta = ?, headers = ?", -math.inf, '{"a": [[1]], "b": {"c": {"d": {}}}}')
    (counts,) = documents(run("queues", "stats", "--json"))
    assert (counts["waiting"], counts["oldest"]) == (1, None)
    assert documents(run("tasks", "list", "--json"))[0]["id"] == task.id
    assert json.loads(run("tasks", "show", task.id))["headers"] == {"a": [None], "b": {"c": None}}


def test_nested_values_do_not_grow_when_they_are_indented(queue, app):
    ids = dead_letters(app, 1)
    write(queue, "UPDATE safedefer_dead SET headers = ?", '{"a":' + "[" * 900 + "1" + ",1" * 4_000 + "]" * 900 + "}")
    assert len(run("dead", "show", ids[0])) < 10_000
    assert [view.state for view in queue.dead_letters(DeadFilter())] == [TaskState.DEAD]


def test_what_a_row_says_writes_nothing_to_the_terminal(queue, app):
    dead_letters(app, 1)
    waiting = app.defer(sample_tasks.add, 1, 2)
    bad = "a\n\x1b]0;x\x07\x9b31m\u202e"
    write(queue, "UPDATE safedefer_dead SET id = ?, queue = ?, name = ?, callable_name = ?, reason = ?", *[bad] * 5)
    write(
        queue, "UPDATE safedefer_tasks SET queue = ?, retry_reason = ?, headers = ?", bad, bad, json.dumps({bad: bad})
    )
    shown = ("dead", "list"), ("dead", "show", bad), ("tasks", "list"), ("tasks", "show", waiting.id), ("queues", "list"), ("queues", "stats"), ("queues", "stats", "--json"), ("dead", "export"), ("tasks", "list", "--json"), ("dead", "retry", bad), ("dead", "retry", "--all"), ("tasks", "cancel", bad)  # fmt: skip
    for words in shown:
        output = CliRunner().invoke(main, words).output
        assert len(output) > 5
        assert all(line.isprintable() for line in output.split("\n")), words


@pytest.mark.parametrize("command", [("dead", "list"), ("tasks", "show", "x"), ("doctor",)])
def test_the_name_of_a_broken_table_writes_nothing_to_the_terminal(tmp_path, monkeypatch, command):
    """SQLite quotes it in its error."""
    path = tmp_path / "tasks.db"
    with contextlib.closing(SQLiteQueue(str(path))) as queue:
        queue.stats(now=0.0)
        write(queue, "CREATE TABLE marked_marked (a)")
    path.write_bytes(
        path.read_bytes()
        .replace(b"marked_marked (a)", b"mar\n\x1b[2J\x9bmarked ,")
        .replace(b"marked_marked", b"mar\n\x1b[2J\x9barke")
    )
    monkeypatch.setenv("SAFEDEFER_QUEUE", f"sqlite:///{path}")
    monkeypatch.setenv("SAFEDEFER_KEYS", f"k1:{secrets.token_urlsafe(32)}")
    monkeypatch.setenv("SAFEDEFER_POLICY", "tests.sample_tasks")
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1
    assert "malformed" in done.output
    assert all(line.isprintable() for line in done.output.split("\n"))
    assert len(done.output.splitlines()) == 1 or command == ("doctor",)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e300", "-1"])
def test_what_is_no_number_of_days_or_seconds_is_refused(app, number):
    """SQLite takes NaN for NULL, and ``dead purge --days nan`` deleted all."""
    ids = dead_letters(app, 2)
    for words in [
        ("dead", "purge", "--yes", "--days", number),
        ("dead", "retry", ids[0], "--in", number),
        ("run", "--hang-seconds", number),
    ]:
        done = CliRunner().invoke(main, words)
        assert (done.exit_code, "Usage" in done.output) == (2, True), words
    assert {view.id for view in app.queue.dead_letters(DeadFilter())} == set(ids)


# --- Worker processes -------------------------------------------------------------------------------------------------


def test_requests_that_run_nothing_do_not_use_a_worker_process_up(app):
    """``--max-tasks`` counted each request: a thousand forgeries had a process drained and started anew."""
    task = app.defer(sample_tasks.add, 1, 2)
    for token in [b"x", task.payload[:-4] + b"AAAA", task.payload, task.payload, task.payload]:
        handle(app, token)
    assert app.delivery.handled == 1
