"""Settings from the environment: each wrong one is an error that names its variable, and shows no secret."""

import base64
import json

import pytest

from safedefer import App, KeyState
from safedefer import settings as settings_module
from safedefer.errors import ConfigurationError, WeakKey
from safedefer.settings import Settings

RAW = bytes(range(40, 80))
GOOD = base64.urlsafe_b64encode(RAW).rstrip(b"=").decode()


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith("SAFEDEFER_"):
            monkeypatch.delenv(name)


def load(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(f"SAFEDEFER_{name}", value)
    return Settings.load()


def test_everything_can_be_set(monkeypatch):
    settings = load(
        monkeypatch, KEYS=f"a:{GOOD}", POLICY="shop.tasks, shop.jobs.*\n operator:add", QUEUE="memory://",
        ENVIRONMENT="prod", URL="/tasks", PREFIX="/api", QUEUES="mail,images", TARGETS="big=http://10.0.0.2:80",
        ALLOW_PICKLE="true", CONCURRENCY="3", INLINE_LIMIT="2048", DEFERRABLE="1", TOKEN_BYTES="2000000",
    )  # fmt: skip
    assert settings.policy == ["shop.tasks", "shop.jobs.*", "operator:add"]
    assert settings.queues == ["mail", "images"]
    assert settings.targets == {"big": "http://10.0.0.2:80"}
    app = App.from_settings(settings.model_copy(update={"policy": ["tests.sample_tasks"]}))
    assert (app.environment, app.url, app.prefix) == ("prod", "/tasks", "/api")
    assert app.queues == {"default", "mail", "images"}
    assert app.targets == {"big": "http://10.0.0.2:80"}
    assert app.delivery.max_bytes == 2_000_000


def test_the_first_key_signs_and_the_others_verify(monkeypatch):
    other = base64.urlsafe_b64encode(RAW[::-1]).rstrip(b"=").decode()
    ring = load(monkeypatch, KEYS=f"new:{GOOD}, old:{other}").keyring()
    assert [(key.kid, key.state) for key in ring.keys] == [("new", KeyState.ACTIVE), ("old", KeyState.VERIFY_ONLY)]


def test_keys_come_from_a_file_too(monkeypatch, tmp_path):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [{"kty": "oct", "kid": "f", "k": GOOD, "safedefer_state": "active"}]}))
    path.chmod(0o600)
    assert load(monkeypatch, KEYS_FILE=str(path)).keyring().active.kid == "f"


WRONG_KEYS = [
    ({}, ConfigurationError, "safedefer keys new"),
    ({"KEYS": f"a:{GOOD}", "KEYS_FILE": "x"}, ConfigurationError, "either SAFEDEFER_KEYS or SAFEDEFER_KEYS_FILE"),
    ({"KEYS": ""}, ConfigurationError, "safedefer keys new"),
    ({"KEYS": " "}, ConfigurationError, "kid:base64url"),
    ({"KEYS": GOOD}, ConfigurationError, "kid:base64url"),
    ({"KEYS": "a:AAAA"}, WeakKey, "needs 32"),
    ({"KEYS": f"a:{GOOD}="}, ConfigurationError, "not base64url"),
    ({"KEYS": f"a:{GOOD},a:{GOOD}"}, ConfigurationError, "same kid"),
    ({"KEYS_FILE": "/nonexistent/keys"}, ConfigurationError, "SAFEDEFER_KEYS_FILE cannot be read"),
]


@pytest.mark.parametrize(("values", "error", "text"), WRONG_KEYS)
def test_wrong_keys_are_a_clear_error(monkeypatch, values, error, text):
    with pytest.raises(error, match=text) as caught:
        load(monkeypatch, **values).keyring()
    assert GOOD not in str(caught.value)


def test_no_policy_is_a_clear_error(monkeypatch):
    settings = load(monkeypatch, KEYS=f"a:{GOOD}")
    with pytest.raises(ConfigurationError, match=r"SAFEDEFER_POLICY.*safedefer keys new"):
        settings.load_policy()
    assert load(monkeypatch, DEFERRABLE="yes").load_policy() is not None


WRONG = [
    ("CONCURRENCY", "0"),
    ("CONCURRENCY", "many"),
    ("INLINE_LIMIT", "10"),
    ("TOKEN_BYTES", "10"),
    ("TOKEN_BYTES", "2097153"),
    ("TARGETS", "big"),
    ("TARGETS", "=http://x"),
    ("ALLOW_PICKLE", "perhaps"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_variable_is_named_and_not_quoted(monkeypatch, name, value):
    with pytest.raises(ConfigurationError, match=f"SAFEDEFER_{name}: ") as caught:
        load(monkeypatch, **{name: value})
    assert f"'{value}'" not in str(caught.value)


@pytest.mark.parametrize("name", [name.upper() for name in Settings.model_fields])
def test_an_empty_variable_is_not_set(monkeypatch, name):
    settings = load(monkeypatch, **{name: ""})
    assert settings == Settings()
    assert settings.model_fields_set == set()


UNKNOWN = [
    ("SAFEDEFER_CONCURENCY", "SAFEDEFER_CONCURRENCY"),
    ("SAFEDEFER_ENV", "SAFEDEFER_ENVIRONMENT"),
    ("SAFEDEFER_QUEUE_YML", "SAFEDEFER_QUEUE_YAML"),
    ("SAFEDEFER_POLICIES", "SAFEDEFER_POLICY"),
    ("SAFEDEFER_KEYFILE", "SAFEDEFER_KEYS_FILE"),
    ("safedefer_concurency", "SAFEDEFER_CONCURRENCY"),
]


@pytest.mark.parametrize(("name", "near"), UNKNOWN)
def test_a_variable_that_is_no_setting_is_warned_of_once_with_the_nearest_and_not_its_value(
    monkeypatch, caplog, name, near
):
    monkeypatch.setattr(settings_module, "_warned", set())
    monkeypatch.setenv(name, "s3cret")
    for _ in range(2):
        load(monkeypatch)
    assert [record.getMessage() for record in caplog.records] == [
        f"{name} is no setting, and changes nothing; did you mean {near}?"
    ]


def test_what_is_a_setting_or_none_of_ours_is_not_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(settings_module, "_warned", set())
    monkeypatch.setenv("safedefer_concurrency", "3")
    load(monkeypatch, CONCURRENCY="3", WORKER="3,4,60.0", TEST_POSTGRES="x")
    assert caplog.records == []


def test_settings_do_not_show_keys(monkeypatch):
    settings = load(monkeypatch, KEYS=f"a:{GOOD}")
    assert GOOD not in repr(settings)
    assert GOOD not in str(settings.model_dump())
    assert GOOD not in settings.model_dump_json()
