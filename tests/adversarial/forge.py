"""What an attacker with a key does: tokens of any content, by the keys of the test vectors."""

import asyncio
import json
from functools import cache

from safedefer.app import App
from safedefer.keys import Keyring
from safedefer.policy import Policy
from tests.adversarial import victim
from tests.schema import vectors

NOW = vectors.NOW
URL = vectors.URL
DAY = vectors.DAY
VICTIM = victim.__name__
HEADERS = {"Content-Type": "application/jose"}


class Clock:
    def __init__(self, now=NOW):
        self.now = float(now)

    def __call__(self):
        return self.now


@cache  # a keyring does not change, and thousands of tests ask for this one
def keyring():
    return Keyring.from_jwks(json.dumps(vectors.jwks()))


def make_app(path=None, *, policy=None, **options):
    """An application with the keys, queues and URL of the vectors, whose tasks are those of ``victim``."""
    options = {"clock": Clock(), "targets": {}, **options}
    return App(
        keyring=keyring(),
        policy=policy or Policy(VICTIM, "tests.schema.tasks"),
        queue="memory://" if path is None else f"sqlite:///{path}",
        environment="test",
        queues=["mail"],
        **options,
    )


def call(name="note", **more):
    return {"kind": "function", "module": VICTIM, "qualname": name, **more}


def mint(*, kid="now", **changes):
    """A token that says whatever its forger wants."""
    return vectors.mint(vectors.claims(**{"call": call(), **changes}), kid=kid).encode()


def post(app, token, headers=None, path=URL):
    return asyncio.run(app.handle({**HEADERS, **(headers or {})}, token, path=path))
