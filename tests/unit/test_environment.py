"""An environment that nobody gave is said, once, by the commands that run tasks."""

import logging

import pytest

from safedefer import App
from safedefer.cli import processes
from safedefer.errors import ConfigurationError
from safedefer.settings import Settings
from tests.unit.apps import make_app

KEY = "a:" + "AbCdEfGhIjKlMnOpQrStUvWxYz0123456789-_AbCdE"


@pytest.mark.parametrize(("given", "name"), [(None, "default"), ("default", "default"), ("prod", "prod")])
def test_an_app_knows_whether_its_environment_was_given(given, name):
    app = make_app(environment=given)
    assert (app.environment, app.environment_given) == (name, given is not None)


def test_an_empty_environment_is_none_of_these():
    with pytest.raises(ConfigurationError):
        make_app(environment="")


@pytest.mark.parametrize("value", [None, "prod", "default"])
def test_settings_say_whether_it_was_given(monkeypatch, value):
    monkeypatch.setenv("SAFEDEFER_KEYS", KEY)
    monkeypatch.setenv("SAFEDEFER_POLICY", "tests.sample_tasks")
    monkeypatch.setenv("SAFEDEFER_QUEUE", "memory://")
    monkeypatch.delenv("SAFEDEFER_ENVIRONMENT", raising=False)
    if value is not None:
        monkeypatch.setenv("SAFEDEFER_ENVIRONMENT", value)
    app = App.from_settings(Settings.load())
    assert (app.environment, app.environment_given) == (value or "default", value is not None)


@pytest.mark.parametrize("command", ["serve", "dispatch", "run"])
@pytest.mark.parametrize("given", [None, "prod"])
def test_a_process_that_runs_tasks_says_so_once_and_what_to_do(monkeypatch, caplog, command, given):
    app = make_app(environment=given)
    monkeypatch.setattr(processes, "load_app", lambda spec: app)  # noqa: ARG005
    monkeypatch.setattr(processes, "_supervise", lambda *_, **__: None)
    monkeypatch.setattr(processes, "_run", lambda *_: None)
    more = ["--to", "http://127.0.0.1:1"] if command == "dispatch" else []
    with caplog.at_level(logging.WARNING, logger="safedefer"):
        getattr(processes, command).main(["some:app", *more], standalone_mode=False)
    said = [record.getMessage() for record in caplog.records if "environment" in record.getMessage()]
    assert len(said) == (given is None)
    assert all("SAFEDEFER_ENVIRONMENT" in text and "'default'" in text for text in said)


def test_the_budget_of_unverified_bytes_can_be_set(monkeypatch):
    assert make_app(unverified_bytes=5_000_000).delivery.budget.take(5_000_001) is False
    assert make_app(unverified_bytes=5_000_000).delivery.budget.take(5_000_000) is True
    monkeypatch.setenv("SAFEDEFER_KEYS", KEY)
    monkeypatch.setenv("SAFEDEFER_POLICY", "tests.sample_tasks")
    monkeypatch.setenv("SAFEDEFER_UNVERIFIED_BYTES", "6000000")
    assert App.from_settings(Settings.load()).delivery_options.unverified_bytes == 6_000_000


@pytest.mark.parametrize("wrong", [0, 1_048_575, 5e6, "32 MiB"])
def test_a_budget_below_one_body_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="unverified_bytes is a whole number"):
        make_app(unverified_bytes=wrong)
