"""Scenarios of a Celery broker: it dies, or its worker, or a child of that, in the middle of tasks."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.chaos.cast import Cast
from tests.chaos.tasks import hang, mark, note
from tests.chaos.workers import Watch, workers_of
from tests.queues.brokers import RabbitMQ, Valkey

#: Seconds after which Valkey delivers a message again that nobody has acknowledged; an hour where nobody says.
_VISIBILITY = 6.0
_SECONDS = 240.0
#: Synced before the producer is told: ``docs/how-to/on-celery.md``.
_SYNCED = {"appendonly": "yes", "appendfsync": "always"}


def now() -> float:
    return time.clock_gettime(time.CLOCK_MONOTONIC)


class Brokered:
    """A broker, a Celery worker of two processes, and what is killed of them."""

    def __init__(self, cast: Cast, broker: Valkey | RabbitMQ, watch: Watch) -> None:
        self.cast = cast
        self.broker = broker
        self.watch = watch
        self.worker: Any = None
        self.ended = 0
        """How often the worker ended by itself."""

    def until(self, condition: Callable[[], bool], complaint: str) -> None:
        """Wait, and start a worker that has ended, as an init system does: Celery's ends where Redis or Valkey dies."""

        def holds() -> bool:
            if self.worker.poll() is not None:
                self.ended += 1
                self.start_worker()
            return condition()

        self.cast.until(holds, _SECONDS, complaint)

    def start_worker(self) -> None:
        output = self.cast.folder / "output"
        output.touch()
        ready = self.cast.output().count(" ready.")
        self.worker = self.watch.supervisor = self.cast.start(
            "celery", "-A", "tests.chaos.celery_app:celery", "worker", "-c", "2", "--loglevel", "INFO", "-n", f"w{ready}@%h"
        )  # fmt: skip
        self.cast.until(lambda: self.cast.output().count(" ready.") > ready, _SECONDS, "no worker is ready")

    def kill_child(self, children: list[int]) -> None:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    def kill(self, what: str, rng: random.Random) -> None:
        """Kill a part, and start it again."""
        if what == "broker":
            self.broker.kill()
            time.sleep(rng.uniform(0.0, 1.0))
            self.broker.start()
        elif what == "child":
            self.kill_child(workers_of(self.worker)[:1])
        elif what == "parent":
            # Its children end with it, by a signal of the kernel where there is one (Linux).
            self.cast.kill(self.worker)
            self.start_worker()
        else:
            children = workers_of(self.worker)
            self.cast.kill(self.worker)
            self.kill_child(children)
            self.start_worker()


@contextlib.contextmanager
def brokered(kind: str) -> Iterator[Brokered]:
    """Give a broker with a worker that is ready."""
    broker = RabbitMQ() if kind == "rabbitmq" else Valkey(**_SYNCED)
    with contextlib.closing(broker):
        broker.start()
        settings = {"SAFEDEFER_QUEUE": f"celery+{broker.url}", "CHAOS_VISIBILITY": str(_VISIBILITY)}
        with Cast(lease=2.0, **settings) as cast, Watch(cast) as watch:
            cast.environment["SAFEDEFER_STORE"] = cast.store.url
            made = Brokered(cast, broker, watch)
            made.start_worker()
            yield made


def kills(
    kind: str,
    *,
    seed: int = 1,
    tasks: int = 1_000,
    least: int = 10,
    per_second: float = 30.0,
    victims: tuple[str, ...] = ("broker", "worker", "parent", "child"),
) -> str:
    """SIGKILL over the broker, the worker's parent, its child, and all of the worker."""
    rng = random.Random(seed)
    with brokered(kind) as made:
        cast = made.cast
        producer = cast.producer(0, tasks, per_second, "--once", "--slow-every", "10")
        killed = []
        spacing = tasks / per_second / (least + 1)
        while len(killed) < least or producer.poll() is None:
            until = now() + rng.uniform(0.3, 1.7) * spacing
            made.until(lambda until=until: now() > until, "time stands still")
            if len(killed) == least:
                continue
            if producer.poll() is not None:  # on a busy machine kills come late: there is more to do
                first = max(cast.account().attempted) + 1
                producer = cast.producer(first, first + 100, per_second, "--once", "--slow-every", "10")
            what = victims[len(killed) % len(victims)]
            killed.append(what)
            made.kill(what, rng)
        made.until(lambda: not cast.account().lost, "tasks are lost")
        account = cast.account()
        account.check()
        again = len(re.findall(r"may have lost (\d+)", cast.output()))
        return (
            f"{kind} seed={seed} kills={len(killed)} worker_ended={made.ended} refused={account.refused} {account.line()} "
            f"handed_over_again={again}"
        )


def redelivery(kind: str, what: str) -> str:
    """Kill a part while a task runs; say how long it takes until that task, or after the broker's death the next one, runs."""
    with brokered(kind) as made:
        cast = made.cast
        with _Deferring(cast) as defer:
            defer(mark, 1)
            made.until(lambda: 1 in cast.account().ok, "nothing runs")
            if what == "broker":
                defer(mark, 2, 3.0)
            else:
                defer(hang, 2)
            made.until(lambda: 2 in cast.account().runs, "the task does not begin")
            killed = now()
            if what == "child":
                made.kill_child([cast.account().runs[2][0][1]])
            else:
                made.kill(what, random.Random(1))
            back = now()
            defer(mark, 3)
            made.until(lambda: {2, 3} <= cast.account().ok, "a task does not run")
            account = cast.account()
            account.check(duplicates=what != "broker")
            (second, third), times = (account.runs[2], account.ends[3]), len(account.runs[2])
            again = f"runs again {second[-1][0] - killed:.1f} s after the kill" if times > 1 else "runs once"
            return (
                f"{kind} {what}: the task {again}; the next one ends {third[0][0] - back:.1f} s after all is there again; "
                f"the worker ended by itself {made.ended} times"
            )


class _Deferring:
    """Defers tasks by an App of this process."""

    def __init__(self, cast: Cast) -> None:
        self._cast = cast

    def __enter__(self) -> Callable[..., None]:
        from safedefer import App, Keyring, Policy
        from tests.chaos.cast import KEYS

        os.environ["CHAOS_LOG"] = self._cast.environment["CHAOS_LOG"]
        self._app = App(
            keyring=Keyring.from_text(KEYS),
            policy=Policy("tests.chaos.tasks"),
            queue=self._cast.environment["SAFEDEFER_QUEUE"],
            store=self._cast.store.url,
        )

        def defer(task: Callable[..., None], number: int, *values: object) -> None:
            note("try", number)
            self._app.defer(task, number, *values)
            note("ack", number)

        return defer

    def __exit__(self, *exception: object) -> None:
        self._app.close()
