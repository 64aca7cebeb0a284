"""Apps for tests."""

import asyncio
import secrets

from safedefer import App, Key, Keyring, KeyState, Policy

SECRET = bytes(range(7, 39))


class Recorder:
    """An observer that keeps events."""

    def __init__(self):
        self.events = []

    def __call__(self, event):
        self.events.append(event)


def make_app(**changes):
    values = {
        "keyring": Keyring(Key("k1", secrets.token_bytes(32), KeyState.ACTIVE, pickle=True)),
        "policy": Policy("tests.sample_tasks", "tests.zoo.values", "_operator:add", "builtins:len"),
        "queue": "memory://",
        "environment": "test",
    }
    return App(**{**values, **changes})


async def until(condition, seconds=120.0):
    """Wait until a condition holds. It is to fail a test, not to measure: a busy machine takes a while."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.005)


JOSE = {"Content-Type": "application/jose"}


def handle(app, token, headers=None, **more):
    """Hand a token to the handler, in a loop of its own."""
    return asyncio.run(app.handle({**JOSE, **(headers or {})}, token, **more))
