"""The command line, in this process."""

import base64
import contextlib
import io
import os
import socket
import sys
import time
from pathlib import Path

import apsw
import click
import pytest
from click.testing import CliRunner

from safedefer import App, Key, Keyring, KeyState
from safedefer.cli.root import main
from safedefer.cli.supervisor import naming_the_address
from safedefer.queues.base import Settlement, Verdict
from tests import sample_tasks as tasks
from tests.unit.apps import make_app


@click.command()
def broken():
    raise BrokenPipeError(32, "Broken pipe")


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setitem(main.commands, "break-a-pipe", broken)
    return lambda: main.main(["break-a-pipe"], standalone_mode=False)


@pytest.mark.parametrize("output", [io.StringIO, lambda: Path(os.devnull).open("w")], ids=["no file", "a file"])
def test_a_connection_that_breaks_is_an_error_although_the_output_would_break_with_the_same(
    monkeypatch, command, output
):
    with output() as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(click.ClickException, match="Broken pipe; correct that and start again"):
            command()


def test_an_output_whose_reader_has_left_is_left_to_click_which_ends_without_a_word(monkeypatch, command):
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(click.ClickException):
            command()
        os.close(reader)
        with pytest.raises(SystemExit) as ended:
            command()
    assert ended.value.code == 1


LOOKING = {  # commands that only read, and whether they fail where there is nothing
    "tasks list": (["tasks", "list"], False),
    "tasks show": (["tasks", "show", "x"], True),
    "tasks cancel": (["tasks", "cancel", "x"], True),
    "tasks retry": (["tasks", "retry", "x"], True),
    "dead list": (["dead", "list"], False),
    "dead show": (["dead", "show", "x"], True),
    "queues list": (["queues", "list"], False),
    "queues stats": (["queues", "stats"], False),
    "doctor": (["doctor"], False),
}


@pytest.mark.parametrize("label", LOOKING)
def test_a_command_that_only_reads_makes_nothing_and_says_where_it_looked(label, tmp_path, monkeypatch):
    arguments, fails = LOOKING[label]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAFEDEFER_KEYS", "a:" + base64.urlsafe_b64encode(bytes(range(32))).rstrip(b"=").decode())
    monkeypatch.setenv("SAFEDEFER_POLICY", "tests.sample_tasks")
    monkeypatch.setenv("SAFEDEFER_ENVIRONMENT", "test")
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == (1 if fails else 0), done.output
    assert f"{tmp_path}/safedefer.db does not exist" in done.output
    assert list(tmp_path.iterdir()) == []


def test_doctor_tells_a_producer_and_a_worker_in_different_folders_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEDEFER_KEYS", "a:" + base64.urlsafe_b64encode(bytes(range(32))).rstrip(b"=").decode())
    monkeypatch.setenv("SAFEDEFER_POLICY", "tests.sample_tasks")
    said = {}
    for folder in ("web", "worker"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        app = App.from_settings()
        app.defer(tasks.add, 1)
        app.close()
        said[folder] = CliRunner().invoke(main, ["doctor"]).output
        assert f"here it is {tmp_path}/{folder}/safedefer.db" in said[folder]
        assert "does not exist" not in said[folder]
    monkeypatch.setenv("SAFEDEFER_QUEUE", f"sqlite:///{tmp_path}/web/safedefer.db")
    assert "relative" not in CliRunner().invoke(main, ["doctor"]).output


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAFEDEFER_KEYS", "a:" + base64.urlsafe_b64encode(bytes(range(32))).rstrip(b"=").decode())
    monkeypatch.setenv("SAFEDEFER_POLICY", "tests.sample_tasks")
    monkeypatch.setenv("SAFEDEFER_ENVIRONMENT", "test")


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("more", [[], ["--processes", "2"]], ids=["one process", "several"])
def test_a_port_that_is_taken_is_named(more):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(main, ["run", "--port", str(port), *more])
    assert done.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{port}: " in done.output
    assert "; stop what listens there, or give another port" in done.output


def test_a_name_that_does_not_resolve_keeps_its_error():
    with pytest.raises(socket.gaierror, match="not known"), naming_the_address("nowhere.example", 80):
        raise socket.gaierror(socket.EAI_NONAME, "not known")


@pytest.mark.usefixtures("settings")
def test_the_file_that_is_missing_may_be_that_of_an_application_which_nobody_named(monkeypatch):
    done = CliRunner().invoke(main, ["tasks", "list"])
    assert "name the application that they use (--app shop.tasks:app), or set SAFEDEFER_QUEUE" in done.output
    monkeypatch.setattr("tests.unit.test_cli.named", make_app(queue="sqlite:///named.db"), raising=False)
    done = CliRunner().invoke(main, ["tasks", "list", "--app", "tests.unit.test_cli:named"])
    assert "or give the application an absolute path (sqlite:////...)" in done.output


OF_A_QUEUE = [
    ["tasks", "list"], ["tasks", "list", "--json"], ["tasks", "cancel", "--callable", "*", "--yes"], ["check"], ["dead", "list"],
    ["dead", "retry", "--all"], ["dead", "purge", "--yes"], ["dead", "export"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", OF_A_QUEUE, ids=" ".join)
def test_a_queue_to_look_into_is_declared_or_holds_something(arguments, tmp_path, monkeypatch):
    queue = f"sqlite:///{tmp_path}/tasks.db"
    key = "a:" + base64.urlsafe_b64encode(bytes(range(32))).rstrip(b"=").decode()
    for name, value in {"KEYS": key, "POLICY": "tests.sample_tasks", "ENVIRONMENT": "test", "QUEUE": queue}.items():
        monkeypatch.setenv(f"SAFEDEFER_{name}", value)
    keyring = Keyring(Key("a", bytes(range(32)), KeyState.ACTIVE))
    before = make_app(queue=queue, keyring=keyring, queues=["default", "mail", "old", "archived", "ended"])
    before.cancel(before.options(queue="ended").defer(tasks.add, 1).id)
    before.options(queue="old").defer(tasks.add, 1)
    before.options(queue="archived").defer(tasks.add, 1)
    (lease,) = before.queue.lease(owner="w", limit=1, seconds=60.0, now=time.time(), queues=["archived"])
    before.queue.settle_many([(lease, Settlement(verdict=Verdict.DEAD, reason="why"))], now=time.time())
    before.close()
    with contextlib.closing(apsw.Connection(str(tmp_path / "tasks.db"))) as connection:
        connection.execute("UPDATE safedefer_dead SET archived = 1")
    monkeypatch.setenv("SAFEDEFER_QUEUES", "default,mail")
    for name in ("mail", "archived", "old", "ended"):
        done = CliRunner().invoke(main, [*arguments, "--queue", name])
        assert done.exit_code == 0, done.output
    done = CliRunner().invoke(main, [*arguments, "--queue", "maill"])
    assert done.exit_code == 1
    assert done.output.splitlines()[-1].startswith("Error: there is no queue maill; declare it, or use ")
