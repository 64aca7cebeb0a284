"""Tasks a second of a queue, by hand: ``python -m tests.benchmarks.bench_queue [URL] [--pending N]``.

Without a URL: a SQLite file in a new directory of ``TMPDIR``. Put that on the disk to be measured.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safedefer.queues import open_queue
from safedefer.queues.base import PullQueue, QueuedTask, Settlement, Verdict
from tests.queues.single import settle

_numbers = itertools.count()
DONE = Settlement(verdict=Verdict.DONE)


def make_task(eta: float = 0.0) -> QueuedTask:
    """Return a task with a token of a usual size."""
    return QueuedTask(
        id=f"{next(_numbers):032x}",
        queue="default",
        token=b"x" * 600,
        audience="bench:default:default:/_ah/queue/deferred",
        url="/_ah/queue/deferred",
        target="default",
        eta=eta,
        created=0.0,
        expires=10_000_000,
        digest=b"d" * 32,
        callable_name="shop.tasks:send_receipt",
    )


def enqueue_rate(queue: PullQueue, threads: int, seconds: float) -> float:
    """Tasks a second that ``threads`` threads enqueue one by one."""
    end = time.perf_counter() + seconds

    def give() -> int:
        count = 0
        while time.perf_counter() < end:
            queue.enqueue_many([make_task()])
            count += 1
        return count

    with ThreadPoolExecutor(threads) as pool:
        return sum(run.result() for run in [pool.submit(give) for _ in range(threads)]) / seconds


def delivery_rate(queue: PullQueue, batch: int, seconds: float) -> float:
    """Tasks a second that are leased and settled in batches, with nothing in between."""
    started = time.perf_counter()
    count = 0
    while time.perf_counter() - started < seconds:
        leases = queue.lease(owner="bench", limit=batch, seconds=60.0, now=1.0)
        if not leases:
            break
        queue.settle_many([(lease, DONE) for lease in leases], now=1.0)
        count += len(leases)
    return count / (time.perf_counter() - started)


def lease_milliseconds(queue: PullQueue) -> float:
    """Median time to lease one task and settle it."""
    times = []
    for _ in range(101):
        started = time.perf_counter()
        (lease,) = queue.lease(owner="bench", limit=1, seconds=60.0, now=1.0)
        settle(queue, lease, DONE, now=1.0)
        times.append(time.perf_counter() - started)
    return sorted(times)[50] * 1000


def fill(queue: PullQueue, count: int) -> None:
    """Enqueue ``count`` due tasks."""
    for done in range(0, count, 1000):
        queue.enqueue_many([make_task() for _ in range(min(1000, count - done))])


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?")
    parser.add_argument("--pending", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        queue = open_queue(options.url or f"sqlite:///{Path(folder, 'bench.db')}")
        print(
            f"{'pending':>9} {'enqueue/s':>10} {'8 threads':>10} {'batch 1':>9} {'batch 10':>9} {'batch 100':>9} {'1 task':>9}"
        )
        for pending in (0, options.pending):
            fill(queue, pending)
            one, eight = enqueue_rate(queue, 1, options.seconds), enqueue_rate(queue, 8, options.seconds)
            rates = [delivery_rate(queue, batch, options.seconds / 3) for batch in (1, 10, 100)]
            fill(queue, 200)
            latency = lease_milliseconds(queue)
            row = " ".join(f"{rate:>9.0f}" for rate in rates)
            print(f"{pending:>9} {one:>10.0f} {eight:>10.0f} {row} {latency:>6.2f} ms")
            while delivery_rate(queue, 1000, 1.0) and not pending:
                pass
        queue.close()


if __name__ == "__main__":
    main()
