"""``examples/app-engine-port``: a deferred application on ndb runs to its end, its tasks deferring themselves."""

# ruff: noqa: E402 - what is skipped without ndb

import secrets
import sys
from importlib import import_module
from pathlib import Path

import pytest

ndb = pytest.importorskip("google.cloud.ndb")

from google.auth.credentials import AnonymousCredentials

import safedefer
from safedefer import Key, Keyring, KeyState, deferred
from safedefer.testing import TestApp
from tests.datastore.server import DatastoreServer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "app-engine-port"


@pytest.fixture
def store(monkeypatch):
    server = DatastoreServer()
    monkeypatch.setenv("DATASTORE_EMULATOR_HOST", server.host)
    yield server.store
    server.close()


@pytest.fixture
def example(monkeypatch, store):
    monkeypatch.syspath_prepend(EXAMPLE)
    client = ndb.Client(project="p", credentials=AnonymousCredentials())
    yield client, import_module("scores"), import_module("main")
    client.stub.grpc_channel.close()
    for name in ("scores", "main"):
        sys.modules.pop(name, None)


def test_the_app_of_the_example_opens_a_context_around_each_run(store, example):
    client, scores, main = example
    app = main.make_app(client, Keyring(Key("k1", secrets.token_bytes(32), KeyState.ACTIVE)), "memory://")
    try:
        with client.context():
            key = scores.Player(name="p", points=1).put()
            token = deferred.serialize(scores.give, [key], 5)
        app.run(token)
        with client.context():
            assert key.get().points == 6
    finally:
        safedefer.configure(None)
        app.close()


def test_the_moved_application_runs_to_its_end(store, example):
    client, scores, main = example
    with TestApp(main.POLICY, around=[client.context]) as tasks:
        with client.context():
            keys = ndb.put_multi([scores.Player(name=f"p{number}", points=10 * number) for number in range(45)])
            for key in keys[1:]:
                player = key.get()
                player.friends = [keys[0]]
                player.put()
            deferred.defer(scores.give, keys[:3], 200)
            deferred.defer(scores.remove, scores.Player, keys[44])
        assert len(tasks.run_due()) == 2
        with client.context():
            with pytest.raises(ValueError, match="not so many"):
                scores.award(keys[0], 5_000)
            scores.award(keys[0], 500)
            deferred.defer(scores.recompute)
        ran = tasks.run_due()
        while more := tasks.run_due():
            ran += more
    assert sum(each.callable == "scores:recompute" for each in ran) == 3
    with client.context():
        report = ndb.Key("Report", "latest").get()
        players = ndb.get_multi(keys[:44])
        letters = scores.Letter.query().fetch()
    assert (report.players, report.points) == (44, sum(player.points for player in players))
    assert [player.points for player in players[:4]] == [700, 210, 220, 30]
    assert [letter.text for letter in letters if letter.text.startswith("+")] == ["+500"]
    assert all(player.level == player.points // 100 for player in players)
    assert sorted(letter.text for letter in letters if not letter.text.startswith("+")) == sorted(
        f"{p.name}, level {p.level}!" for p in players if p.level
    )
    assert len(store.kind("Player")) == 44
