"""The two applications that ``bench_celery`` compares: Celery alone, and safedefer on the same broker."""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery

from safedefer import App, Key, Keyring, KeyState, Policy

BROKER = os.environ.get("BENCH_BROKER", "")
STORE = os.environ.get("BENCH_STORE", "")
FOLDER = Path(os.environ.get("BENCH_FOLDER", "."))
SIDE = os.environ.get("BENCH_SIDE", "")
MILLISECONDS = float(os.environ.get("BENCH_MILLISECONDS", "0"))

alone = Celery("alone", broker=BROKER, set_as_current=False)
alone.conf.update(accept_content=["json"], task_ignore_result=True, broker_transport_options={"confirm_publish": True})


def work(number: int) -> None:
    """Take as long as a task, and leave the time."""
    if MILLISECONDS:
        time.sleep(MILLISECONDS / 1_000)
    with (FOLDER / f"{SIDE}-{os.getpid()}").open("a") as file:
        file.write(f"{time.time()!r}\n")


@alone.task(name="alone.work", acks_late=True, reject_on_worker_lost=True)
def celery_work(number: int) -> None:
    """Do the same as a task of Celery's own."""
    work(number)


if BROKER:
    app = App(
        keyring=Keyring(Key("bench", bytes(range(32)), KeyState.ACTIVE)),
        policy=Policy("tests.benchmarks.celery_tasks"),
        queue=Celery("ours", broker=BROKER, set_as_current=False),
        store=STORE,
        environment="bench",
    )
    ours = app.push_queue.engine.celery
    ours.conf.update(accept_content=["json"], task_default_queue="ours")
