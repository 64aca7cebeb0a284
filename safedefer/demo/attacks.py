"""Four attacks on the demonstration's handler over HTTP; each looks for its effect."""

from __future__ import annotations

import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safedefer.app import App
from safedefer.keys import Key, Keyring
from safedefer.options import DEFAULT_URL
from safedefer.policy import Policy

#: Why a handler gives an answer.
_MEANS: Final = {
    "refused": "no key of ours signed these bytes",
    "duplicate": "the ledger knows that the task has run",
    "rejected": "the policy does not name it",
}


@dataclass(frozen=True)
class Attack:
    """An attack and its result."""

    tried: str
    """What was sent."""
    came: str
    """What came of it."""
    held: bool


def post(url: str, body: bytes) -> tuple[int, str]:
    """POST a token as anybody could; return the status and ``Safedefer-Outcome``."""
    request = urllib.request.Request(url + DEFAULT_URL, data=body, headers={"Content-Type": "application/jose"})  # noqa: S310  # our own
    try:
        with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310  # as above
            return response.status, response.headers["Safedefer-Outcome"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Safedefer-Outcome"]


def attack(url: str, keyring: Keyring, genuine: bytes, folder: Path, count: Callable[[], int]) -> list[Attack]:
    """Attack a handler.

    Args:
        url: Its address.
        keyring: The true keys; only the last attack has them, as a thief would.
        genuine: The token of a task that has run, captured from the wire.
        folder: Where a successful attack leaves its mark.
        count: Counts what tasks have written.
    """
    mark = folder / "attacked"
    before = count()
    command = f"touch '{mark}'"
    policy = Policy("os:system")
    kid = keyring.active.kid
    environment = "demo"
    forger = App(
        keyring=Keyring(Key(kid, secrets.token_bytes(32))), policy=policy, queue="memory://", environment=environment
    )
    thief = App(keyring=keyring, policy=policy, queue="memory://", environment=environment)
    header, payload, mac = genuine.split(b".")
    middle = len(payload) // 2
    flipped = b"A" if payload[middle : middle + 1] != b"A" else b"B"
    tampered = b".".join([header, payload[:middle] + flipped + payload[middle + 1 :], mac])
    tries = [
        ("os.system, signed with a key of the attacker's", forger.serialize(os.system, command), (403, "refused")),
        ("a genuine token with one character changed", tampered, (403, "refused")),
        ("a genuine token, captured and posted again", genuine, (200, "duplicate")),
        ("os.system, signed with the stolen key", thief.serialize(os.system, command), (500, "rejected")),
    ]  # fmt: skip
    found = []
    for tried, token, expected in tries:
        answer = post(url, token)
        effect = "a command ran" if mark.exists() else "a task ran again" if count() != before else "nothing ran"
        held = answer == expected and effect == "nothing ran"
        found.append(Attack(tried, f"{answer[0]} {answer[1]} ({_MEANS.get(answer[1], 'unexpected')}); {effect}", held))
    return found
