"""Celery alone beside safedefer on the same broker: how many tasks a second are enqueued, and run by two worker processes.

    python -m tests.benchmarks.bench_celery [--broker valkey|rabbitmq] [--store sqlite|postgres] [--tasks 500] [--milliseconds 10]

``--milliseconds`` is how long each task takes: tasks that do nothing compare the two at their worst.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.queues.brokers import celery_worker, rabbitmq, valkey, wait_for

#: Of each the better round counts: noise only ever takes time.
_ROUNDS = 2
_ENQUEUE = """
import sys, time
from tests.benchmarks import celery_tasks as tasks
which, number = sys.argv[1], int(sys.argv[2])
enqueue = tasks.celery_work.delay if which == "alone" else lambda n: tasks.app.defer(tasks.work, n)
enqueue(-1)
started = time.perf_counter()
for each in range(number):
    enqueue(each)
print(time.perf_counter() - started)
"""


def times(folder: Path) -> list[float]:
    """Return when tasks ended."""
    return sorted(float(line) for file in folder.glob("ran-*") for line in file.read_text().splitlines())


def measure(which: str, number: int, environment: dict[str, str]) -> tuple[float, float]:
    """Return how many tasks a second are enqueued, and run."""
    folder = Path(environment["BENCH_FOLDER"])
    for file in folder.glob("ran-*"):
        file.unlink()
    command = [sys.executable, "-c", _ENQUEUE, which, str(number)]
    output = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    queue = "ours" if which == "ours" else "celery"
    with celery_worker(f"tests.benchmarks.celery_tasks:{which}", environment, "-Q", queue):
        wait_for(lambda: len(times(folder)) == number + 1, 240.0)
    ended = times(folder)
    return number / float(output.stdout), number / (ended[-1] - ended[0])


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


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--broker", choices=("valkey", "rabbitmq"), default="valkey")
    parser.add_argument("--store", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--milliseconds", type=float, default=0.0)
    given = parser.parse_args()
    broker = {"valkey": valkey, "rabbitmq": rabbitmq}[given.broker]
    with tempfile.TemporaryDirectory() as name, broker() as url, store_of(given.store, Path(name)) as store:
        environment = {
            "BENCH_BROKER": url,
            "BENCH_STORE": store,
            "BENCH_FOLDER": name,
            "TEST_FOLDER": name,
            "BENCH_MILLISECONDS": str(given.milliseconds),
        }
        found: dict[str, tuple[float, float]] = {}
        for which in ("alone", "ours") * _ROUNDS:
            with contextlib.redirect_stdout(io.StringIO()):  # the workers' logs
                measured = measure(which, given.tasks, environment)
            found[which] = max(found.get(which, measured), measured, key=lambda each: each[1])
    for which, (enqueued, run) in found.items():
        print(f"{which:6} {enqueued:8.0f} enqueued/s {run:8.0f} run/s")
    (_, alone), (_, ours) = found["alone"], found["ours"]
    print(f"a run takes {alone / ours - 1:+.0%} ({given.broker}, {given.store}, {given.milliseconds:g} ms)")


if __name__ == "__main__":
    main()
