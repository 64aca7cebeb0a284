"""``log_tracebacks``: the line of a failed task has the exception's type always, and its traceback where it was asked for."""

import base64
import logging

import pytest

from safedefer import Key, Keyring, KeyState, Policy
from safedefer.app import App
from safedefer.settings import Settings
from tests.unit.apps import make_app

SECRET = bytes(range(100, 132))
ARGUMENT = "card-4111-1111"
POSTED: list[str] = []


def fails(argument):
    raise ValueError(f"refused\n2026-01-01 ERROR forged by {POSTED[0]}")


async def line_of_failure(caplog, **options):
    """Return the log line, and the token, of a task that raises with its own token in the text."""
    caplog.set_level(logging.INFO, "safedefer")
    app = make_app(keyring=Keyring(Key("k1", SECRET, KeyState.ACTIVE)), policy=Policy(__name__), **options)
    try:
        token = app.defer(fails, ARGUMENT).payload
        POSTED[:] = [token.decode()]
        await app.handle({"Content-Type": "application/jose"}, token)
    finally:
        app.close()
    (line,) = [record.getMessage() for record in caplog.records if "attempt" in record.getMessage()]
    return line, token.decode()


async def test_without_it_the_line_ends_with_the_type(caplog):
    line, _ = await line_of_failure(caplog)
    assert line.endswith("(exception): builtins.ValueError")
    assert "\n" not in line


async def test_with_it_the_line_has_the_frames_but_no_argument_key_or_token(caplog):
    line, token = await line_of_failure(caplog, log_tracebacks=True)
    assert "in fails" in line
    assert "ValueError: refused" in line
    assert "[token]" in line
    secrets = [ARGUMENT, token, *token.split("."), SECRET.hex(), base64.urlsafe_b64encode(SECRET).decode().rstrip("=")]
    assert not [secret for secret in secrets if secret in line]
    assert ARGUMENT not in caplog.text


async def test_no_line_of_an_exceptions_text_looks_like_a_line_of_the_log(caplog):
    line, _ = await line_of_failure(caplog, log_tracebacks=True)
    _, *more = line.splitlines()
    assert len(more) > 2
    assert not [text for text in more if not text.startswith("    ")]


@pytest.mark.parametrize("given", [False, True])
def test_it_is_a_setting(given, monkeypatch):
    monkeypatch.setenv("SAFEDEFER_KEYS", f"k1:{base64.urlsafe_b64encode(SECRET).decode().rstrip('=')}")
    monkeypatch.setenv("SAFEDEFER_POLICY", __name__)
    monkeypatch.setenv("SAFEDEFER_QUEUE", "memory://")
    monkeypatch.setenv("SAFEDEFER_LOG_TRACEBACKS", str(given).lower())
    app = App.from_settings(Settings.load())
    assert (app.observer._traceback_of is not None) is given
    app.close()
