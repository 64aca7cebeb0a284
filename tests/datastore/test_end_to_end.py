"""From ndb's transaction to the run: over Cloud Tasks, and by a dispatcher that is told of the Datastore."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from google.cloud import ndb

from safedefer import App
from safedefer.cli.doctor import check_outboxes
from safedefer.errors import MissingExtra
from safedefer.queues.memory.queue import MemoryQueue
from safedefer.settings import Settings
from safedefer.transactions.outbox import Outbox
from tests import sample_tasks as tasks
from tests.cloudtasks.emulated import wait_for
from tests.cloudtasks.killed_tasks import lines, note
from tests.cloudtasks.test_end_to_end import World

ROOT = Path(__file__).parents[2]


@pytest.fixture
def world(tmp_path):
    tasks.reset()
    made = World(tmp_path)
    yield made
    made.close()


def test_over_cloud_tasks_a_task_runs_once_though_it_is_enqueued_twice(world, server, context, monkeypatch):
    """The relay dies after enqueueing, as it were: the entity stays, and the task's name in Cloud Tasks is taken."""
    outbox = world.app.outbox
    monkeypatch.setattr(outbox._relay, "expect", lambda *_: None)

    @ndb.transactional()
    def place():
        world.app.options(transactional=True).defer(tasks.add, 1, b=2)

    world.pause()
    place()
    assert world.left() == []
    with monkeypatch.context() as patch:
        patch.setattr("safedefer.transactions.databases.datastore.EntityReader.delete", lambda *_: None)
        outbox.sweep()
    (before,) = world.left()
    outbox.sweep()
    assert [each.name for each in world.left()] == [before.name]
    assert len(server.store.entities) == 0
    world.tick(1)
    world.emptied()
    assert tasks.RAN == [("add", 1, 2, 1)]


def test_a_dispatcher_that_is_told_of_the_datastore_runs_what_a_dead_process_left(
    server, context, tmp_path, monkeypatch
):
    settings = {
        "KEYS": "k1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8", "POLICY": "tests.cloudtasks.killed_tasks",
        "QUEUE": f"sqlite:///{tmp_path}/tasks.db", "ENVIRONMENT": "test", "OUTBOXES": "sqlite:///no.db,datastore://p",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(f"SAFEDEFER_{name}", value)
    app = App.from_settings(Settings.load())
    monkeypatch.setattr(app.outbox._relay, "expect", lambda *_: None)
    with app.transaction(ndb):
        app.options(transactional=True).defer(note, str(tmp_path / "ran.txt"), 1)
    assert [(each.status, each.text) for each in check_outboxes(app)][1] == ("ok", "datastore://p")
    app.close()
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "safedefer", "run", "--port", "0"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_for(lambda: lines(tmp_path / "ran.txt") == ["begin 1", "end 1"], "the run", 120.0)
        wait_for(lambda: not server.store.entities, "the deletion of the entity")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    assert lines(tmp_path / "ran.txt") == ["begin 1", "end 1"]


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "safedefer.transactions.databases.datastore", raising=False)
    monkeypatch.setattr("safedefer.transactions.databases.datastore", None, raising=False)
    monkeypatch.delattr("safedefer.transactions.databases.datastore", raising=False)
    monkeypatch.setitem(sys.modules, "google.cloud.ndb", None)
    monkeypatch.delattr("google.cloud.ndb")
    with pytest.raises(MissingExtra, match=r"safedefer\[ndb\]"):
        Outbox(MemoryQueue, environment="test", urls=["datastore://p"], clock=time.time)
