"""What a task costs, and what many that wait cost: ``python -m tests.benchmarks.bench_scale [sqlite|postgres]``.

The figures of ``docs/explanation/scale.md``: rates with few and with many tasks waiting, and, for PostgreSQL, the
bytes, the write-ahead log and the processor time of one task. Durable: every acknowledged commit is synced.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from pathlib import Path

import psutil
import psycopg

from safedefer.app import App
from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions
from safedefer.dispatcher.transport import InProcessDelivery
from safedefer.keys import Key, Keyring
from safedefer.policy import Policy
from safedefer.queues import migrate_queue, open_queue
from safedefer.queues.base import PullQueue, QueuedTask, Settlement, Verdict
from tests.benchmarks.noop import noop
from tests.postgres.server import Server

DONE = Settlement(verdict=Verdict.DONE)
SECRET = bytes(range(7, 39))
_number = iter(range(1, 2**62))


def make_task(delay: float) -> QueuedTask:
    now = time.time()
    return QueuedTask(
        id=f"{next(_number):032x}",
        queue="default",
        token=b"x" * 450,
        audience="bench:default:default:/_ah/queue/deferred",
        url="/_ah/queue/deferred",
        target="default",
        eta=now + delay,
        created=now,
        expires=int(now) + 3_000_000,
        callable_name="tests.benchmarks.noop:noop",
    )


def fill(queue: PullQueue, count: int, delay: float = 0.0) -> float:
    """Tasks a second, in batches of 1,000."""
    started = time.perf_counter()
    for done in range(0, count, 1000):
        queue.enqueue_many([make_task(delay) for _ in range(min(1000, count - done))])
    return count / (time.perf_counter() - started)


def drain(queue: PullQueue, batches: int) -> float:
    """Tasks a second that are leased by the hundred and settled, with nothing in between."""
    started, count = time.perf_counter(), 0
    for _ in range(batches):
        leases = queue.lease(owner="bench", limit=100, seconds=60.0, now=time.time())
        queue.settle_many([(lease, DONE) for lease in leases], now=time.time())
        count += len(leases)
    return count / (time.perf_counter() - started)


def lease_nothing(queue: PullQueue) -> float:
    """Milliseconds of a lease that finds nothing due: the median."""
    times = []
    for _ in range(21):
        started = time.perf_counter()
        assert not queue.lease(owner="bench", limit=100, seconds=60.0, now=time.time())
        times.append(time.perf_counter() - started)
    return sorted(times)[10] * 1000


def rates(queue: PullQueue, pending: list[int]) -> None:
    """Print rates with more and more tasks that wait, due or not."""
    waiting = 0
    for size in pending:
        filled = fill(queue, size - waiting, delay=1_000_000.0) if size > waiting else 0.0
        waiting = size
        print(
            f"{size:>9} tasks wait, due later: a lease that finds nothing {lease_nothing(queue):7.2f} ms, filled at {filled:6.0f}/s"
        )
        given = fill(queue, 10_000)
        print(f"{'':>9} and 10,000 due: enqueue {given:7.0f}/s, lease and settle {drain(queue, 50):7.0f}/s", flush=True)
        while queue.settle_many(
            [(lease, DONE) for lease in queue.lease(owner="b", limit=1000, seconds=60.0, now=time.time())],
            now=time.time(),
        ):
            pass


def backlog(queue: PullQueue, size: int) -> None:
    """Print rates while very many are due."""
    print(f"{size:>9} tasks are due: filled at {fill(queue, size):.0f}/s", end=", ")
    print(f"lease and settle {drain(queue, 100):.0f}/s", flush=True)


def tree_seconds(pid: int) -> float:
    """Processor seconds of a process and its children, those that have ended included."""
    total = 0.0
    process = psutil.Process(pid)
    times = process.cpu_times()
    total += times.user + times.system + times.children_user + times.children_system
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system
    return total


def costs(server: Server, count: int) -> None:
    """Print what one task costs in PostgreSQL, from ``defer()`` to its end."""
    app = App(
        keyring=Keyring(Key("bench", SECRET)),
        policy=Policy("tests.benchmarks.noop"),
        queue=server.dsn(),
        concurrency=256,
    )
    connection = psycopg.connect(server.dsn(), autocommit=True)

    def size(*tables: str) -> int:
        sizes = [f"pg_total_relation_size('safedefer.{table}')" for table in tables]
        return int(connection.execute(f"SELECT {' + '.join(sizes)}").fetchone()[0])

    def now() -> tuple[float, float, int, float]:
        log = connection.execute("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn").fetchone()[0]
        return time.process_time(), tree_seconds(server.pid), int(log), time.perf_counter()

    async def run() -> None:
        options = DispatcherOptions(concurrency=100)
        await Dispatcher(app.queue, InProcessDelivery(app.handle), clock=time.time, options=options).run_until_empty()

    app.defer(noop, 0)
    asyncio.run(run())
    tables = ("pgqueuer", "pgqueuer_log", "ledger", "attempts", "ended")
    for what in ("defer", "run"):
        sizes, before = [size(table) for table in tables], now()
        if what == "defer":
            for _ in range(count // 1000):
                app.defer_many([(noop, (1,), {})] * 1000)
        else:
            asyncio.run(run())
        after = now()
        grown = {
            table: (size(table) - was) / count for table, was in zip(tables, sizes, strict=True) if size(table) != was
        }
        client, of_server, log, clock = (b - a for a, b in zip(before, after, strict=True))
        print(
            f"{what:>6}: {count / clock:7.0f}/s; a task takes {client / count * 1e6:5.0f} us here, "
            f"{of_server / count * 1e6:5.0f} us of the server, {log / count:5.0f} bytes of log; "
            + ", ".join(f"{table} {bytes_:.0f}" for table, bytes_ in grown.items())
            + " bytes",
            flush=True,
        )
    connection.close()
    app.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=["sqlite", "postgres"], nargs="?", default="postgres")
    parser.add_argument("--pending", type=int, nargs="*", default=[0, 100_000, 1_000_000])
    parser.add_argument("--tasks", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if options.engine == "sqlite":
            queue = open_queue(f"sqlite:///{Path(folder, 'bench.db')}")
        else:
            server = Server(durable=True, settings=("shared_buffers=512MB", "max_wal_size=4GB")).start()
            stack.callback(server.close)
            migrate_queue(server.dsn())
            costs(server, options.tasks)
            queue = open_queue(server.dsn())
        stack.callback(queue.close)
        rates(queue, options.pending)
        backlog(queue, max(options.pending))


if __name__ == "__main__":
    main()
