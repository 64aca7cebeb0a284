"""The log: which task a line is of, and lines of JSON."""

import io
import json
import logging
import sys
from dataclasses import replace

import pytest

from safedefer.events import RequestRefused, TaskHandled
from safedefer.observe.logs import JsonFormatter, TaskFilter, configure_log, is_json
from tests import sample_tasks
from tests.unit.apps import handle, make_app

HANDLED = TaskHandled(
    task_id="i", queue="mail", callable="m:f", kid="k", outcome="retry", status=500, reason="exception", attempt=2, seconds=0.1,
    error_type="builtins.ValueError", error=ValueError("what the task was given"),
)  # fmt: skip


@pytest.fixture
def lines():
    """Lines of a logger of its own, in JSON."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(TaskFilter())
    log = logging.getLogger("shop.lines")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    log.removeHandler(handler)


@pytest.mark.parametrize("function", [sample_tasks.say, sample_tasks.say_async])
def test_a_line_of_a_task_names_it(lines, function):
    app = make_app()
    task = app.defer(function, "shop.lines", "working")
    assert handle(app, task.payload).status == 200
    (line,) = lines()
    assert (line["message"], line["task_id"], line["task_callable"]) == (
        "working", task.id, f"tests.sample_tasks:{function.__name__}",
    )  # fmt: skip
    app.close()


def test_a_line_outside_a_task_names_none(lines):
    logging.getLogger("shop.lines").warning("a %s", "line", extra={"order": 7, "what": object()})
    (line,) = lines()
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "WARNING", "logger": "shop.lines", "message": "a line", "order": 7}


def test_a_line_about_an_event_has_its_fields_and_not_the_exception(lines):
    logging.getLogger("shop.lines").warning("it failed", extra={"safedefer": HANDLED})
    (line,) = lines()
    assert line["event"] == "TaskHandled"
    assert (line["task_id"], line["task_callable"], line["queue"], line["attempt"]) == ("i", "m:f", "mail", 2)
    assert "what the task was given" not in json.dumps(line)


@pytest.mark.parametrize(("task_id", "shown"), [("i", "i m:f"), ("i\nERROR forged", " m:f")])
def test_a_line_about_an_event_names_its_task_in_a_text_too(task_id, shown):
    record = logging.makeLogRecord({"msg": "it failed", "safedefer": replace(HANDLED, task_id=task_id)})
    assert TaskFilter().filter(record)
    assert logging.Formatter("%(task_id)s %(task_callable)s").format(record) == shown


def test_no_event_changes_what_a_line_is(lines):
    """Its fields do not replace the level, the message or the time."""
    logging.getLogger("shop.lines").error(
        "first", extra={"safedefer": RequestRefused(status=403, reason="x"), "level": "low"}
    )
    (line,) = lines()
    assert (line["level"], line["message"]) == ("ERROR", "first")


def test_a_text_with_new_lines_is_one_line_and_an_exception_is_in_it():
    """Half a surrogate pair is in it too: it could not be written as it is."""
    record = logging.makeLogRecord({"msg": "one\ntwo\ud800", "levelno": logging.ERROR})
    try:
        raise ValueError("a\nb")
    except ValueError:
        record.exc_info = sys.exc_info()
    text = JsonFormatter().format(record)
    assert text.isascii()
    assert "\n" not in text
    line = json.loads(text)
    assert line["message"] == "one\ntwo\ud800"
    assert "ValueError: a\nb" in line["exception"]


def standard_error(monkeypatch):
    """Return what is written there from now on; the root logger has no handler yet. (Before a test pytest gives it some.)"""
    root = logging.RootLogger(logging.WARNING)
    monkeypatch.setattr(logging, "root", root)
    monkeypatch.setattr(logging.Logger, "root", root)
    monkeypatch.setattr(logging.Logger.manager, "root", root)
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    return stream


@pytest.mark.parametrize("as_json", [True, False])
def test_commands_log_lines_for_people_or_of_json(monkeypatch, as_json):
    stream = standard_error(monkeypatch)
    process = logging.getLogger("safedefer.process")
    before = process.level
    try:
        configure_log(verbose=False, as_json=as_json)
        assert is_json() is as_json
        assert process.level == (logging.INFO if as_json else before)
        logging.getLogger().warning("hello")
    finally:
        process.setLevel(before)
    text = stream.getvalue()
    assert (json.loads(text)["message"] == "hello") if as_json else text.endswith(" WARNING root: hello\n")


def test_a_line_of_a_task_names_it_in_the_text_of_commands_and_no_line_does_so_twice(monkeypatch):
    stream = standard_error(monkeypatch)
    configure_log(verbose=True, as_json=False)
    log, app = logging.getLogger("shop.text"), make_app()  # a new logger, so that it is below the root of this test
    task = app.defer(sample_tasks.say, "shop.text", "working")
    assert handle(app, task.payload).status == 200
    log.warning("outside")
    log.warning("it failed", extra={"safedefer": HANDLED})
    app.close()
    assert [line.split(" ", 3)[3] for line in stream.getvalue().splitlines()] == [
        f"shop.text [{task.id} tests.sample_tasks:say]: working", "shop.text: outside", "shop.text: it failed",
    ]  # fmt: skip
