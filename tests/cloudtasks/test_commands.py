"""The command line of an application whose queue is Cloud Tasks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from google.cloud import tasks_v2

from safedefer import App
from safedefer.cli import main
from safedefer.settings import Settings
from tests import sample_tasks as tasks
from tests.cloudtasks.emulated import PARENT, QUEUE, Emulated

ROOT = Path(__file__).resolve().parents[2]
FILE = """\
queue:
- name: mail
  rate: 20/s
  max_concurrent_requests: 3
- name: reports
  rate: 0
"""


@pytest.fixture
def emulated(tmp_path, monkeypatch):
    made = Emulated()
    (tmp_path / "queue.yaml").write_text(FILE)
    url = f"cloudtasks://p-1/europe-west1?endpoint={made.url}&address={made.target_url}&service_account=t@p.example"
    for name, value in {
        "KEYS": "k1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8", "POLICY": "tests.sample_tasks", "QUEUE": url,
        "STORE": f"sqlite:///{tmp_path}/store.db", "QUEUE_YAML": str(tmp_path / "queue.yaml"),
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SAFEDEFER_{name}", value)
    yield made
    made.close()


def command(*arguments):
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_queues_are_made_listed_paused_counted_and_purged(emulated):
    assert command("queues", "update") == "3 queues have limits\n"
    queue = emulated.client.get_queue(name=QUEUE)
    assert (queue.rate_limits.max_dispatches_per_second, queue.rate_limits.max_concurrent_dispatches) == (20, 3)
    listed = {each["queue"]: each for each in map(json.loads, command("queues", "list", "--json").splitlines())}
    assert (listed["mail"]["rate"], listed["mail"]["max_concurrent"], listed["mail"]["paused"]) == (20.0, 3, False)
    assert listed["reports"]["paused"]
    command("queues", "pause", "mail")
    assert emulated.client.get_queue(name=QUEUE).state is tasks_v2.Queue.State.PAUSED
    app = App.from_settings(Settings.load())
    app.options(queue="mail").defer(tasks.add, 1)
    app.close()
    assert json.loads(command("queues", "stats", "--json"))["waiting"] == 1
    assert "cancelled 1 task of" in command("queues", "purge", "mail", "--yes")
    command("queues", "resume", "mail")
    assert emulated.client.get_queue(name=QUEUE).state is tasks_v2.Queue.State.RUNNING


def test_the_tables_are_the_stores(emulated, monkeypatch):
    assert command("migrate") == "nothing to do\n"
    monkeypatch.delenv("SAFEDEFER_STORE")
    done = CliRunner().invoke(main, ["migrate"])
    assert (done.exit_code, "--store" in done.output) == (2, True)


@pytest.mark.parametrize("arguments", [["dispatch", "--to", "http://127.0.0.1:1"], ["run", "--port", "0"]], ids=str)
def test_what_dispatches_ends_before_it_serves_since_there_is_nothing_to_dispatch(emulated, arguments, tmp_path):
    command = [sys.executable, "-m", "safedefer", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "safedefer serve" in done.stderr


def test_the_emulator_refuses_a_queue_whose_name_is_none():
    done = CliRunner().invoke(main, ["cloudtasks-emulator", "--port", "0", "--queue", "mail"])
    assert (done.exit_code, PARENT in done.output) == (2, False)
    assert "must be formatted" in done.output
