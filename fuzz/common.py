"""What the targets share: the keys, clock, policy and application of the test vectors."""

import json

import safedefer
from fuzz.harness import VECTORS
from safedefer.codecs.registry import REGISTRY
from safedefer.keys import Keyring
from safedefer.policy import Policy
from tests.schema import tasks  # the module that the policy admits is loaded already

CONFIG = json.loads((VECTORS / "valid.json").read_text())
NOW: float = CONFIG["config"]["now"]
URL: str = CONFIG["config"]["url"]
KEYRING = Keyring.from_jwks(json.dumps(CONFIG["keys"]))
POLICY = Policy(*CONFIG["config"]["policy"], moved=CONFIG["config"]["moved"])
POLICY.load()
REGISTRY.discover()  # reads the metadata of installed packages, once

TASKS = tasks.__name__


def make_app(**options: object) -> safedefer.App:
    """Return an application of the vectors' configuration, with a queue in memory."""
    return safedefer.App(
        keyring=KEYRING,
        policy=POLICY,
        queue="memory://",
        environment="test",
        queues=["mail"],
        clock=lambda: NOW,
        observer=lambda _event: None,
        **options,
    )
