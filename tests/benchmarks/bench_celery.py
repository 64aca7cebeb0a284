"""Celery alone beside safedefer on the same broker: how many tasks a second are enqueued, and run by two worker processes.

    python -m tests.benchmarks.bench_celery [--broker valkey|rabbitmq] [--store sqlite|postgres] [--milliseconds 10]
        [--tasks 100] [--rounds 10]

A worker of each runs all the time. In each round each of the two gets so many tasks while its worker is stopped; then it goes
on, and the time counts from the end of the first to that of the last: in turns, so that what else the machine does falls on both.
``--milliseconds`` is how long each task takes: tasks that do nothing compare the two at their worst. A sync of the disk is
measured beside them, since each end of a run is on the disk before its message is acknowledged.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.queues.brokers import celery_worker, rabbitmq, valkey, wait_for

_WARM_UP = 40
_WAIT_SECONDS = 240.0
_PRODUCER = """
import sys, time
from tests.benchmarks import celery_tasks as tasks
enqueue = {"alone": tasks.celery_work.delay, "ours": lambda n: tasks.app.defer(tasks.work, n)}
for line in sys.stdin:
    which, number = line.split()
    started = time.perf_counter()
    for each in range(int(number)):
        enqueue[which](each)
    print(time.perf_counter() - started, flush=True)
"""
_TICKS = os.sysconf("SC_CLK_TCK")


class Measured(NamedTuple):
    """One block of tasks; seconds for each of them."""

    enqueue: float
    run: float
    processor: float


class Side:
    """Celery alone, or safedefer: its worker, which is stopped while tasks are enqueued.

    Args:
        name: ``alone`` or ``ours``.
        worker: The parent of the worker, the leader of its session.
        producer: Enqueues what a line says, and answers with a line.
        folder: Where tasks leave the time.
    """

    def __init__(
        self, name: str, worker: subprocess.Popen[bytes], producer: subprocess.Popen[str], folder: Path
    ) -> None:
        self.name = name
        self._worker = worker
        self._producer = producer
        self._folder = folder

    def _ends(self) -> list[float]:
        files = self._folder.glob(f"{self.name}-*")
        return sorted(float(line) for file in files for line in file.read_text().splitlines())

    def _processor(self) -> float:
        """Return the seconds that the worker's processes have taken."""
        taken = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                values = stat.read_text().rpartition(")")[2].split()
                if int(values[3]) == self._worker.pid:
                    taken += int(values[11]) + int(values[12])
        return taken / _TICKS

    def run(self, number: int) -> Measured:
        """Let so many tasks run."""
        assert self._producer.stdin is not None
        assert self._producer.stdout is not None
        before, used = len(self._ends()), self._processor()
        os.killpg(self._worker.pid, signal.SIGSTOP)
        try:
            self._producer.stdin.write(f"{self.name} {number}\n")
            self._producer.stdin.flush()
            enqueued = float(self._producer.stdout.readline())
        finally:
            os.killpg(self._worker.pid, signal.SIGCONT)
        wait_for(lambda: len(self._ends()) == before + number, _WAIT_SECONDS)
        first, *_, last = self._ends()[before:]
        return Measured(enqueued / number, (last - first) / (number - 1), (self._processor() - used) / number)


@contextlib.contextmanager
def store_of(kind: str, folder: Path):
    """Give the URL of a store."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/store.db"
        return
    from safedefer.queues import migrate_queue  # noqa: PLC0415
    from tests.postgres.server import Server  # noqa: PLC0415

    url = Server(durable=True).start().dsn()
    migrate_queue(url)
    yield url


@contextlib.contextmanager
def both_sides(environment: dict[str, str], folder: Path):
    """Give Celery alone and safedefer, their workers ready."""
    module = "tests.benchmarks.celery_tasks"
    with (
        contextlib.redirect_stdout(io.StringIO()),  # the workers' logs
        celery_worker(
            f"{module}:alone", {**environment, "BENCH_SIDE": "alone"}, "-Q", "celery", "-n", "alone@%h"
        ) as alone,
        celery_worker(f"{module}:ours", {**environment, "BENCH_SIDE": "ours"}, "-Q", "ours", "-n", "ours@%h") as ours,
        subprocess.Popen(
            [sys.executable, "-c", _PRODUCER],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as producer,
    ):
        yield Side("alone", alone, producer, folder), Side("ours", ours, producer, folder)
        assert producer.stdin is not None
        producer.stdin.close()


def sync_seconds(folder: Path, number: int = 50) -> float:
    """Return the median time of a sync of the disk."""
    taken = []
    with (folder / "sync").open("wb") as file:
        for _ in range(number):
            file.write(bytes(4096))
            file.flush()
            started = time.perf_counter()
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def measure(
    broker: str, store: str, milliseconds: float, tasks: int, rounds: int
) -> tuple[dict[str, list[Measured]], float]:
    """Return the blocks of each side, by round, and the seconds of a sync."""
    found: dict[str, list[Measured]] = {"alone": [], "ours": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with {"valkey": valkey, "rabbitmq": rabbitmq}[broker]() as url, store_of(store, folder) as store_url:
            environment = {
                "BENCH_BROKER": url,
                "BENCH_STORE": store_url,
                "BENCH_FOLDER": name,
                "TEST_FOLDER": name,
                "BENCH_MILLISECONDS": str(milliseconds),
            }
            with both_sides(environment, folder) as sides:
                syncs = [sync_seconds(folder)]
                for side in sides:
                    side.run(_WARM_UP)
                for number in range(rounds):
                    for side in sides if number % 2 else reversed(sides):
                        found[side.name].append(side.run(tasks))
                syncs.append(sync_seconds(folder))
    return found, statistics.mean(syncs)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", choices=("valkey", "rabbitmq"), default="valkey")
    parser.add_argument("--store", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--milliseconds", type=float, default=10.0)
    given = parser.parse_args()
    found, sync = measure(given.broker, given.store, given.milliseconds, given.tasks, given.rounds)
    for which, blocks in found.items():
        enqueue, run, processor = (statistics.median(values) for values in zip(*blocks, strict=True))
        print(
            f"{which:6} {1 / enqueue:6.0f} enqueued/s {1 / run:6.0f} run/s {processor * 1e3:6.2f} ms of processor time"
        )
    ratios = sorted(ours.run / alone.run - 1 for alone, ours in zip(found["alone"], found["ours"], strict=True))
    print(
        f"{given.broker}, {given.store}, tasks of {given.milliseconds:g} ms, a sync takes {sync * 1e3:.1f} ms: a task takes "
        f"{statistics.median(ratios):+.0%} ({ratios[0]:+.0%} to {ratios[-1]:+.0%})"
    )


if __name__ == "__main__":
    main()
