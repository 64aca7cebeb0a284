"""The application of the tests of the Celery engine, as workers import it: ``celery -A tests.queues.celery_app:celery worker``."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from pathlib import Path

from kombu.transport.redis import QoS

from safedefer import App, Key, Keyring, KeyState, PermanentTaskFailure, Policy
from safedefer.queues import copies

FOLDER = Path(os.environ.get("TEST_FOLDER", "."))
SECRET = bytes(range(32))


def make_app(broker: str, folder: Path, store: str = "", **changes) -> App:
    return App(
        keyring=Keyring(Key("k1", SECRET, KeyState.ACTIVE)),
        policy=Policy("tests.queues.celery_app"),
        queue=f"celery+{broker}",
        store=store or f"sqlite:///{folder}/store.db",
        environment="test",
        lease_seconds=3.0,
        **changes,
    )


def note(text: str) -> None:
    with (FOLDER / "ran").open("a") as file:
        file.write(f"{text}\n")


def add(number: int) -> None:
    note(f"add {number}")


def add_slowly(number: int) -> None:
    note(f"begin {number}")
    time.sleep(1.0)


async def add_later(number: int) -> None:
    await asyncio.sleep(0)
    note(f"add_later {number} {os.getpid()} {id(asyncio.get_running_loop())}")


def fail_first(times: int) -> None:
    note("fail_first")
    if (FOLDER / "ran").read_text().count("fail_first") <= times:
        raise ValueError("not yet")


def fail() -> None:
    note("fail")
    raise ValueError("never")


def permanent() -> None:
    raise PermanentTaskFailure("never")


def hang_once() -> None:
    """Say which process runs it, and wait to be killed; the second time, return."""
    first = not (FOLDER / "hangs").exists()
    note(f"hang {os.getpid()}")
    # Whole at once, and last: whoever sees it may kill.
    (FOLDER / "hangs.new").write_text(str(os.getpid()))
    (FOLDER / "hangs.new").rename(FOLDER / "hangs")
    while first:
        time.sleep(0.05)


def note_threads() -> None:
    """Note the parent of this process, and its threads."""
    note(" ".join([str(os.getppid()), *(thread.name for thread in threading.enumerate())]))


def die_between_two_steps() -> None:
    """Have this process killed once where kombu's transport for Redis has taken a message, and has not noted that it has it."""
    append = QoS.append

    def dying(self, message, delivery_tag):
        killed = FOLDER / "killed"
        if not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, message, delivery_tag)

    QoS.append = dying


if "TEST_FIRST_LOOK" in os.environ:
    copies.FIRST_LOOK = float(os.environ["TEST_FIRST_LOOK"])
if "TEST_DIE" in os.environ:
    die_between_two_steps()
if "TEST_BROKER" in os.environ:
    app = make_app(os.environ["TEST_BROKER"], FOLDER, os.environ.get("TEST_STORE", ""))
    celery = app.push_queue.engine.celery
    celery.conf.update(json.loads(os.environ.get("TEST_CONF", "{}")))
