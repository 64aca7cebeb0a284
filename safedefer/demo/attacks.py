"""Four attacks on the demonstration's handler over HTTP; each looks for its effect."""

from __future__ import annotations

import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safedefer.app import App
from safedefer.keys import Key, Keyring
from safedefer.options import DEFAULT_URL
from safedefer.policy import Policy


@dataclass(frozen=True)
class Attack:
    """An attack and its result."""

    name: str
    answer: str
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
        ("forged: os.system signed with another key", forger.serialize(os.system, command), (403, "refused")),
        ("tampered: one character of a genuine token", tampered, (403, "refused")),
        ("replayed: a genuine token, captured and posted again", genuine, (200, "duplicate")),
        ("outside the policy: os.system signed with the stolen key", thief.serialize(os.system, command), (500, "rejected")),
    ]  # fmt: skip
    found = []
    for name, token, expected in tries:
        answer = post(url, token)
        held = answer == expected and not mark.exists() and count() == before
        found.append(Attack(name, f"{answer[0]} {answer[1]}", held))
    return found
