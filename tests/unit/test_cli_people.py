"""Commands for people: tables on a terminal, filters, what is asked before much is changed, and what is shown of a task."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import apsw
import click
import pytest
from click.testing import CliRunner

from safedefer.cli import terminal
from safedefer.cli.more import migrate
from safedefer.cli.root import COMMANDS, main
from safedefer.cli.terminal import Column, progress
from safedefer.cli.text import many, relative, span
from safedefer.cli.top import Looks
from safedefer.errors import QueueUnavailable
from safedefer.ledger import AttemptRecord
from safedefer.queues.base import DeadFilter, Settlement, TaskState, Verdict
from safedefer.queues.sqlite.queue import SQLiteQueue
from tests import sample_tasks
from tests.acceptance.processes import ROOT
from tests.unit.apps import make_app

MODULES = ("dead", "tasks", "queues", "check", "top")
HOSTILE = "a[bold red]x[/]\n\x1b]0;x\x07\x9b31m\u202e:smile:"


@pytest.fixture
def app(monkeypatch, tmp_path):
    with contextlib.closing(SQLiteQueue(str(tmp_path / "tasks.db"))) as queue:
        app = make_app(queue=queue)
        for module in MODULES:
            monkeypatch.setattr(f"safedefer.cli.{module}.load_app_to_look", lambda _: app)
        for module in ("keys", "explain", "more", "top"):
            monkeypatch.setattr(f"safedefer.cli.{module}.load_app", lambda _: app)
        yield app


@pytest.fixture
def at_a_terminal(monkeypatch):
    """Standard output, error and input are a terminal of 120 columns."""
    monkeypatch.setattr(terminal, "is_terminal", lambda _: True)
    for module in ("show", "options"):
        monkeypatch.setattr(f"safedefer.cli.{module}.is_terminal", lambda _: True)
    monkeypatch.setenv("COLUMNS", "120")


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self):
        return True


def run(*words, code=0, **more):
    done = CliRunner().invoke(main, words, **more)
    assert done.exit_code == code, done.output
    return done.output


def kill(app, count, reason="why"):
    """Make dead letters of tasks that wait."""
    leases = app.queue.lease(owner="w", limit=count, seconds=60.0, now=time.time())
    record = AttemptRecord("", "", 1.0, 2.0, "retry", 500, "exception", "ValueError", f"Traceback\n  {HOSTILE}")
    for held in leases:
        own = record._replace(task_id=held.task.id, audience=held.task.audience)
        settlement = Settlement(verdict=Verdict.DEAD, reason=reason, record=own)
        app.queue.settle_many([(held, settlement)], now=time.time())
    return [held.task.id for held in leases]


# --- The start --------------------------------------------------------------------------------------------------------


def test_the_help_imports_no_command_and_no_library_of_one():
    code = (
        "import sys; from safedefer.cli import main\n"
        "try: main(['--help'], prog_name='safedefer')\nexcept SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    bare = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=bare, capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    heavy = {"aiohttp", "apsw", "asyncio", "asyncpg", "cloudpickle", "pgqueuer", "pydantic", "rich", "safedefer.app"}
    assert not heavy & loaded
    assert "Call Python functions later" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_says_of_each_command_what_the_command_says_itself(name):
    command = main.get_command(click.Context(main), name)
    assert (command.name, command.help.replace("\n", " ").partition(". ")[0].rstrip(".") + ".") == (
        name,
        COMMANDS[name].help,
    )


def test_the_shell_completes_commands_options_and_states():
    def completed(*words):
        environment = {
            "_SAFEDEFER_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(("safedefer", *words)),
            "COMP_CWORD": str(len(words)),
        }
        done = CliRunner().invoke(main, [], prog_name="safedefer", env=environment)
        return [line.partition(",")[2] for line in done.output.splitlines()]

    assert completed("de") == ["dead", "demo"]
    assert completed("do") == ["doctor"]
    assert "--json" in completed("tasks", "list", "--j")
    assert completed("tasks", "list", "--state", "w") == ["waiting"]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in {"demo", "migrate"}])
def test_what_lists_or_shows_has_json(name):
    command = main.get_command(click.Context(main), name)
    parts = command.commands if isinstance(command, click.Group) else {name: command}
    for part, each in parts.items():
        if part in {"list", "show", "stats", "doctor", "explain", "check", "top", "inspect"}:
            assert "--json" in {option for parameter in each.params for option in parameter.opts}, part


def _named_commands():
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        parts = command.commands if isinstance(command, click.Group) else {"": command}
        yield from ((f"{name} {part}".rstrip(), each) for part, each in parts.items())


def test_no_message_and_no_page_names_an_option_that_its_command_does_not_have():
    files = [
        *(ROOT / "safedefer").rglob("*.py"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        ROOT / "README.md",
    ]
    texts = {str(file): file.read_text() for file in files}
    named, unknown = 0, []
    for words, command in _named_commands():
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        follows = re.compile(rf"(?<![\w-])(?<!gcloud ){words}((?: (?:[\w./:]+ )?--[a-z][a-z-]*(?:[ =][^\s`|)\"']+)?)+)")
        for file, text in texts.items():
            options = [option for found in follows.finditer(text) for option in re.findall("(?<= )--[a-z-]+", found[1])]
            named += len(options)
            unknown += [(file, words, option) for option in options if option not in {*known, "--help"}]
    assert unknown == []
    assert named > 50


# --- Texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "text"), [
    (0.0, "now"), (0.9, "now"), (240.0, "in 4 min"), (-7200.0, "2 h ago"), (-59.0, "59 s ago"), (200_000.0, "in 2 d"),
    (float("inf"), "in ages"), (-1e300, "ages ago"),
])  # fmt: skip
def test_times_are_said_as_people_say_them(seconds, text):
    assert relative(1000.0 + seconds, 1000.0) == text
    assert relative(None, 0.0) == ""


def test_numbers_and_lengths_are_said():
    assert (many(1, "task"), many(0, "task"), many(2, "task")) == ("1 task", "0 tasks", "2 tasks")
    assert (span(float("nan")), span(-3.0), span(61.0)) == ("ages", "0 s", "1 min")


# --- Tables -----------------------------------------------------------------------------------------------------------


def test_a_table_shows_hostile_text_as_it_is_and_writes_nothing_else(at_a_terminal, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert terminal.show_table([Column("ONE"), Column("[red]TWO[/]")], [(HOSTILE, 3)], f"1 row {HOSTILE}")
    shown = out.getvalue()
    assert shown.count("a[bold red]x[/]") == 2
    assert "[red]TWO[/]" in shown
    assert shown.count(":smile:") == 2
    assert all(line.isprintable() for line in shown.split("\n"))


def test_every_list_is_a_table_with_headers_and_totals_on_a_terminal(app, at_a_terminal):
    app.defer(sample_tasks.add, 1, 2)
    (dead,) = kill(app, 1)
    app.options(countdown=3600.5).defer(sample_tasks.add, 3, 4)
    tasks = run("tasks", "list")
    assert tasks.startswith("ID ")
    assert "due in 1 h" in tasks
    assert f"{dead}  dead now" in tasks
    assert "2 tasks: 1 waiting, 1 dead" in tasks
    assert "1 dead letter: 1 why" in run("dead", "list")
    assert "1 waiting, 0 running, 1 dead in 1 queue" in run("queues", "stats")
    assert "1 queue, 0 paused" in run("queues", "list")
    assert "1 key" in run("keys", "list")
    assert "the newest, --limit shows more" in run("tasks", "list", "--limit", "1")


def test_without_rich_a_terminal_has_the_lines_of_a_pipe(app, at_a_terminal, monkeypatch):
    task = app.defer(sample_tasks.add, 1, 2)
    monkeypatch.setattr(terminal, "find_spec", lambda _: None)
    assert run("tasks", "list").startswith(f"{task.id}  waiting  default  ")
    with progress("doing", 3) as advance:
        advance()


def test_progress_goes_to_a_terminal_on_standard_error_only(monkeypatch):
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress("doing", 3) as advance:
            advance()
        assert stream is None or stream.getvalue() == ""
    out = Screen()
    monkeypatch.setattr(sys, "stderr", out)
    with progress("doing", 3) as advance:
        advance()
    assert "doing" in out.getvalue()


# --- One task ---------------------------------------------------------------------------------------------------------


def test_a_person_sees_call_and_attempts_of_a_task_as_text(app, at_a_terminal):
    app.defer(sample_tasks.keywords, text="[red]ünï\x1b[2J", number=1.5)
    (dead,) = kill(app, 1)
    text = run("dead", "show", dead)
    assert f"id        {dead}\n" in text
    assert 'tests.sample_tasks:keywords(text="[red]ünï\\u001b[2J", number=1.5)' in text
    assert "took 1.000 s: retry, ValueError, HTTP 500" in text
    assert "    Traceback\n      a[bold red]x[/]\n" in text
    assert all(line.isprintable() for line in text.split("\n"))
    assert run("tasks", "show", dead) == text
    assert json.loads(run("dead", "show", dead, "--json"))["attempts"][0]["exception_type"] == "ValueError"


def test_what_a_program_reads_of_a_task_is_json_unless_it_asks_for_text(app):
    task = app.options(name="receipt", headers={"X-A": "b"}, countdown=3600).defer(sample_tasks.add, 1, 2)
    assert (
        json.loads(run("tasks", "show", task.id))["due"] == json.loads(run("tasks", "show", task.id, "--json"))["eta"]
    )
    text = run("tasks", "show", task.id, "--text")
    assert "state     waiting, due in 59 min" in text
    assert "name      receipt" in text
    assert "header    X-A: b" in text


def test_a_call_that_nobody_signed_is_not_shown_as_one(app):
    task = app.defer(sample_tasks.add, 1, 2)
    with contextlib.closing(apsw.Connection(app.queue.file.path)) as connection:
        connection.execute("UPDATE safedefer_tasks SET token = ?, callable_name = 'os:system'", (b"x.y.z",))
    text = run("tasks", "show", task.id, "--text")
    assert "os:system by the storage, which nobody signed; the token says nothing: malformed-token" in text


def test_pickled_arguments_and_long_calls_are_not_printed_whole(app):
    long = app.defer(sample_tasks.keywords, text="x" * 5_000)
    text = run("tasks", "show", long.id, "--text")
    assert "more characters; `safedefer inspect --json` prints them" in text
    assert max(map(len, text.splitlines())) < 2_200
    large = app.defer(sample_tasks.keywords, text="y" * 20_000)
    assert 'keywords(text="yyy' in run("tasks", "show", large.id, "--text")
    assert app.cancel(long.id)
    assert "its token is not kept" in run("tasks", "show", long.id, "--text")


# --- Ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    ("tasks", "show"), ("tasks", "cancel"), ("tasks", "retry"), ("dead", "show"), ("dead", "retry"), ("queues", "pause"),
    ("queues", "purge", "--yes"), ("tasks", "list", "--queue"), ("dead", "list", "--reason"), ("dead", "list", "--callable"),
    ("tasks", "cancel", "--name"), ("explain",), ("check", "--queue"), ("tasks", "list", "--app"),
])  # fmt: skip
@pytest.mark.parametrize("text", ["a\udcff", "a\0"], ids=["no UTF-8", "NUL"])
def test_a_text_that_no_storage_holds_is_refused_in_words(app, words, text):
    done = CliRunner().invoke(main, [*words, text])
    assert done.exit_code == 2
    assert "which no id or name has" in done.output


# --- Many at once -----------------------------------------------------------------------------------------------------


def test_tasks_are_cancelled_by_name_or_callable_after_a_count(app):
    for number in range(3):
        app.options(name=f"receipt-{number}").defer(sample_tasks.add, 1, number)
    other = app.defer(sample_tasks.keywords, text="x")
    dry = run("tasks", "cancel", "--name", "receipt-*", "--dry-run")
    assert dry.endswith("3 tasks (3 waiting, 0 running) would be cancelled\n")
    assert len(dry.splitlines()) == 4
    refused = run("tasks", "cancel", "--name", "receipt-*", code=1)
    assert "Cancel 3 tasks (3 waiting, 0 running)? Nobody can answer here" in refused
    assert len(app.queue.live_tasks()) == 4
    assert run("tasks", "cancel", "--name", "receipt-[01]", "--yes") == "cancelled 2 tasks\n"
    assert run("tasks", "cancel", "--callable", "tests.sample_tasks:a*", "--queue", "none", "--yes").startswith(
        "0 tasks"
    )
    assert run("tasks", "cancel", "--callable", "tests.sample_tasks:a*", "--yes") == "cancelled 1 task\n"
    assert [view.id for _, view in app.queue.live_tasks()] == [other.id]
    for words in (
        ("tasks", "cancel"),
        ("tasks", "cancel", other.id, "--name", "x"),
        ("tasks", "cancel", "x", "--dry-run"),
    ):
        run(*words, code=2)


def test_dead_letters_are_retried_by_name_or_callable_after_a_count(app, at_a_terminal):
    for number in range(3):
        app.defer(sample_tasks.add, 1, number)
    app.defer(sample_tasks.keywords, text="x")
    kill(app, 4)
    assert run("tasks", "retry", "--callable", "*:add", "--dry-run").endswith("3 dead letters would run again\n")
    assert "Run 3 dead letters again?" in run("tasks", "retry", "--callable", "*:add", input="n\n", code=1)
    assert len(app.queue.dead_letters(DeadFilter())) == 4
    assert "3 run again" in run("tasks", "retry", "--callable", "*:add", input="y\n")
    assert run("dead", "retry", "--callable", "tests.sample_tasks:keywords", "--yes").endswith("1 run again\n")
    assert len(app.queue.tasks(states=[TaskState.WAITING])) == 4
    for words in (
        ("tasks", "retry"),
        ("dead", "retry", "x", "--name", "y", "--all"),
        ("dead", "retry", "x", "--dry-run"),
    ):
        run(*words, code=2)


def test_what_deletes_says_how_many_and_a_pipe_must_say_yes(app, at_a_terminal, monkeypatch):
    app.defer(sample_tasks.add, 1, 2)
    kill(app, 1)
    app.defer(sample_tasks.add, 3, 4)
    assert run("dead", "purge", "--dry-run") == "1 dead letter would be deleted\n"
    assert run("queues", "purge", "default", "--dry-run") == "1 task of default would be cancelled\n"
    assert "Delete 1 dead letter for good? [y/N]" in run("dead", "purge", input="n\n", code=1)
    monkeypatch.setattr("safedefer.cli.options.is_terminal", lambda _: False)
    assert "add --yes to the command" in run("dead", "purge", code=1, input="y\n")
    assert "Cancel 1 waiting task of default?" in run("queues", "purge", "default", code=1, input="y\n")
    assert len(app.queue.tasks()) == 2
    assert run("dead", "purge", "--name", "other", "--yes").endswith("deleted 0 dead letters\n")
    assert run("dead", "purge", "--yes").endswith("deleted 1 dead letter\n")


def test_lists_have_one_object_a_line(app):
    app.defer(sample_tasks.add, 1, 2)
    kill(app, 1)
    assert json.loads(run("dead", "list", "--json"))["reason"] == "why"
    assert json.loads(run("queues", "list", "--json")) == {
        "queue": "default", "rate": None, "bucket_size": None, "max_concurrent": None, "paused": False, "held_until": None,
    }  # fmt: skip
    assert json.loads(run("keys", "list", "--json")) == {
        "kid": "k1", "state": "active", "queues": None, "patterns": None, "pickle": True,
    }  # fmt: skip
    assert run("keys", "list") == "k1  active  any  any  pickles\n"
    assert "k" * 20 not in run("keys", "list")


# --- top --------------------------------------------------------------------------------------------------------------


def test_consecutive_looks_give_tasks_a_second_and_new_dead_letters(app):
    now = time.time()
    for number in range(4):
        app.defer(sample_tasks.add, 1, number)
    looks = Looks(app.queue)
    (first,) = looks.look(now)
    assert (first.waiting, first.done_per_second, first.died) == (4, 0.0, 0)
    leases = app.queue.lease(owner="w", limit=3, seconds=600.0, now=now + 1)
    done, dead = Settlement(verdict=Verdict.DONE), Settlement(verdict=Verdict.DEAD, reason="why")
    app.queue.settle_many([(leases[0], done), (leases[1], dead)], now=now + 2)
    (second,) = looks.look(now + 4)
    assert (second.waiting, second.running, second.dead, second.died) == (1, 1, 1, 1)
    assert second.done_per_second == pytest.approx(1 / 4)
    assert second.lag == pytest.approx(4.0, abs=1.0)


def test_top_prints_once_where_the_output_is_no_terminal(app):
    assert run("top", "--every", "0.1") == "no tasks\n"
    app.defer(sample_tasks.add, 1, 2)
    assert run("top", "--every", "0.1").startswith("default  1 waiting  0 running  0 dead  lag ")
    assert json.loads(run("top", "--every", "0.1", "--json"))["waiting"] == 1


def test_top_draws_again_until_ctrl_c(app, at_a_terminal, monkeypatch):
    drawn = []

    def show(draw, wait):
        drawn.extend([draw(), wait()])
        if len(drawn) == 2:
            app.defer(sample_tasks.add, 1, 2)
        drawn.append(draw())
        raise KeyboardInterrupt

    slept = []
    monkeypatch.setattr("safedefer.cli.top.time", SimpleNamespace(time=time.time, sleep=slept.append))
    monkeypatch.setattr("safedefer.cli.top.keep_showing", show)
    assert run("top", "--every", "5") == ""
    (columns, nothing, absent), again, (_, rows, totals) = drawn
    assert (nothing, "tasks.db does not exist yet: " in absent) == ([], True)
    assert ([column.title for column in columns][:2], again, slept) == (["QUEUE", "WAITING"], True, [5.0])
    assert rows[0][:4] == ("default", 1, 0, 0)
    path = app.queue.file.path
    assert totals == f"{path}: 1 waiting, 0 running, 0 dead, 0.0 done a second; every 5 s, Ctrl-C ends"
    app.queue.close()
    monkeypatch.setattr(type(app.queue), "stats", unavailable)
    run("top", "--every", "5")
    assert drawn[3][1:] == ([], f"{path}: it is away")


def unavailable(*_, **__):
    raise QueueUnavailable("it is away")


def test_a_live_view_draws_hostile_text_as_it_is(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = Screen()
    monkeypatch.setattr(sys, "stdout", out)
    turns = [True, True, False]
    terminal.keep_showing(lambda: ([Column("QUEUE")], [(HOSTILE,)], "[b]totals"), lambda: turns.pop(0))
    assert turns == []
    shown = out.getvalue()
    assert "a[bold red]x[/]" in shown
    assert "[b]totals" in shown
    assert "\x1b]0;x" not in shown
    assert "\x9b" not in shown


def test_inspect_is_text_on_a_terminal_and_json_elsewhere(app, at_a_terminal, monkeypatch):
    task = app.options(queue="mail", deadline=30).defer(sample_tasks.keywords, note=HOSTILE, n=1)
    said = run("inspect", task.payload.decode())
    assert said.splitlines()[0] == f"id        {task.id}"
    assert "call      tests.sample_tasks:keywords(note=" in said
    assert "queue mail, target default" in said
    assert "\nsigned by k1, " in said
    assert "\ndeadline  30" in said
    assert not {char for char in said if not char.isprintable()} - {"\n"}
    as_json = run("inspect", "--json", task.payload.decode())
    assert json.loads(as_json)["kwargs"] == {"note": HOSTILE, "n": 1}
    monkeypatch.setattr("safedefer.cli.show.is_terminal", lambda _: False)
    assert run("inspect", task.payload.decode()) == as_json
    assert run("inspect", "--text", task.payload.decode()).startswith("id        ")


def test_inspect_of_a_pointer_whose_token_is_gone_says_so(app, at_a_terminal):
    task = app.defer(sample_tasks.keywords, note="x" * 20_000)
    assert "call      tests.sample_tasks:keywords(note=" in run("inspect", task.payload.decode())
    app.cancel(task.id)
    assert "bytes, which is not there" in run("inspect", task.payload.decode())


def test_migrate_shows_a_bar_on_a_terminal_only(at_a_terminal, monkeypatch, tmp_path):
    url = f"sqlite:///{tmp_path}/tasks.db"
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    migrate.callback(url=url, store=None)
    assert "migrating" in screen.getvalue()
    monkeypatch.setattr("safedefer.cli.terminal.is_terminal", lambda _: False)
    shown = screen.getvalue()
    migrate.callback(url=url, store=None)
    assert screen.getvalue() == shown
