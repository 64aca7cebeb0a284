"""Scenarios in which the file, the disk or the number of tasks is against us."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw

from safedefer.delivery.handler import Response
from safedefer.dispatcher.loop import Dispatcher
from safedefer.queues.base import Settlement, Verdict
from safedefer.queues.sqlite.queue import SQLiteQueue
from tests.chaos.cast import Cast, Failed
from tests.queues.contract import make_task
from tests.unit.delivering import Delivering


@contextlib.contextmanager
def small_disk(megabytes: int):
    """Give a folder on a small tmpfs, and a function that makes it larger; needs root."""
    with tempfile.TemporaryDirectory() as name:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", name]
        subprocess.run(mount, check=True, capture_output=True)
        try:
            yield Path(name), lambda: subprocess.run(["mount", "-o", "remount,size=256m", name], check=True)
        finally:
            subprocess.run(["umount", "--lazy", name], check=True)


def full(*, tasks: int = 3_000, megabytes: int = 6) -> str:
    """The disk is full for a while: ``defer()`` raises, and what was acknowledged is there when there is space."""
    with small_disk(megabytes) as (folder, enlarge), Cast(lease=5.0, folder=folder) as cast:
        producer = cast.producer(0, tasks)
        cast.until(lambda: "refused" in (cast.folder / "log").read_text(), 60, "the disk never was full")
        dispatcher, handler = cast.dispatcher(), cast.handler()  # they start on a full disk
        time.sleep(3.0)
        refused = (cast.folder / "log").read_text().count("refused")
        if producer.poll() is not None:
            raise Failed("the producer ended on a full disk")
        enlarge()
        producer.wait(120)
        cast.drained()
        if dispatcher.poll() is not None or handler.poll() is not None:
            raise Failed(f"a process ended: {cast.output()[-1000:]}")
        account = cast.account()
        # A run whose end could not be written down, for longer than its lease, comes again.
        account.check(explained=False)
        cast.check_store()
        return f"{account.line()} refused={refused}"


def limited(*, tasks: int = 400, kilobytes: int = 400) -> str:
    """As ``full``, by a limit on the size of files, which needs no rights: for the producer only."""
    with Cast(lease=5.0) as cast:
        producer = cast.producer(0, tasks, file_limit=kilobytes * 1024)
        cast.until(lambda: "refused" in (cast.folder / "log").read_text(), 120, "the limit was never reached")
        time.sleep(0.5)
        resource.prlimit(producer.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if producer.wait(120):
            raise Failed(f"the producer failed: {cast.output()[-1000:]}")
        cast.handler()
        cast.dispatcher()
        cast.drained()
        account = cast.account()
        account.check(duplicates=False)
        cast.check_store()
        return f"{account.line()} refused={(cast.folder / 'log').read_text().count('refused')}"


def locked(*, tasks: int = 3_000, seconds: float = 15.0) -> str:
    """Another connection keeps the database locked."""
    with Cast(lease=30.0) as cast:
        processes = [cast.handler(), cast.dispatcher()]
        cast.ready()
        producer = cast.producer(0, tasks, 600.0)
        cast.until(lambda: len(cast.account().ok) > 50, 120, "nothing runs")
        connection = apsw.Connection(str(cast.store.path))
        connection.set_busy_timeout(30_000)
        connection.execute("BEGIN IMMEDIATE")
        before = len(cast.account().acknowledged)
        time.sleep(seconds)
        during = len(cast.account().acknowledged) - before
        connection.execute("ROLLBACK")
        connection.close()
        producer.wait(120)
        cast.drained()
        if any(process.poll() is not None for process in processes):
            raise Failed(f"a process ended: {cast.output()[-1000:]}")
        account, attempts = cast.account(), cast.attempts()
        account.check(duplicates=False)
        if attempts != {1: tasks}:
            raise Failed(f"attempts {dict(attempts)}")
        return f"{account.line()} locked_seconds={seconds:g} acknowledged_while_locked={during}"


def cut(*, tasks: int = 3_000, offsets: int = 500, seed: int = 1) -> str:
    """Database and log copied in the middle of the work, the log cut anywhere: what is left opens and is whole.

    Cut anywhere that a power cut can cut: SQLite syncs the log before it copies pages of it into the database, so
    what has been copied is in the log for good.
    """
    rng = random.Random(seed)
    with Cast(lease=30.0) as cast, tempfile.TemporaryDirectory() as copies:
        processes = [cast.handler(), cast.dispatcher()]
        cast.ready()
        processes.append(cast.producer(0, tasks, 600.0))
        cast.until(lambda: len(cast.account().ok) > tasks // 4, 60, "nothing runs")
        database, log = Path(copies, "whole.db"), Path(copies, "whole.db-wal")
        for _ in range(50):
            with _frozen(processes):
                first, last = _log_range(Path(f"{cast.store.path}-shm"))
                shutil.copy(cast.store.path, database)
                shutil.copy(f"{cast.store.path}-wal", log)
            whole = log.read_bytes()
            # Its ends tell what lies between: after a checkpoint, or between two commits, that may be nothing.
            states = {_check_cut(database, whole[:end]) for end in (first, last)}
            if len(states) > 1:
                break
            done = len(cast.account().ok)
            processes.append(cast.producer(tasks, tasks + 50, 600.0))
            tasks += 50
            cast.until(lambda done=done: len(cast.account().ok) > done, 60, "nothing runs")
        else:
            raise Failed("the log never held anything that a checkpoint had not copied")
        states |= {_check_cut(database, whole[: rng.randint(first, last)]) for _ in range(offsets)}
        cast.drained()
        account = cast.account()
        account.check()
        return f"offsets={offsets} of {last - first} bytes states_seen={len(states)} impossible=0 {account.line()}"


@contextlib.contextmanager
def _frozen(processes: list[Any]) -> Iterator[None]:
    """Stop the processes in the middle of what they do, and let them go on at the end."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(0.1)
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


_FRAME = 24 + 4096


def _log_range(shared: Path) -> tuple[int, int]:
    """Return where the part of the log begins and ends that no checkpoint has touched (SQLite, walformat.html)."""
    index = shared.read_bytes()
    newest, attempted = (int.from_bytes(index[place : place + 4], sys.byteorder) for place in (16, 128))
    return 32 + attempted * _FRAME, 32 + newest * _FRAME


def _check_cut(database: Path, log: bytes) -> tuple[int, ...]:
    """Open a copy of the database with this much of its log, and return the state that it is in."""
    with tempfile.TemporaryDirectory(dir=database.parent) as folder:
        path = Path(folder, "copy.db")
        shutil.copy(database, path)
        Path(f"{path}-wal").write_bytes(log)
        return _check_copy(path)


def _check_copy(path: Path) -> tuple[int, ...]:
    with contextlib.closing(SQLiteQueue(path)) as queue:
        queue.stats(now=0.0)
        queue.enqueue_many([make_task(id=f"after-the-cut-{os.getpid()}")])
    connection = apsw.Connection(str(path))
    try:
        for name, sql in _IMPOSSIBLE.items():
            rows = connection.execute(sql).fetchall()
            if rows:
                raise Failed(f"{name}: {rows[:3]}")
        if connection.pragma("integrity_check") != "ok":
            raise Failed("integrity")
        tables = ("tasks", "ended", "dead", "ledger", "blobs")
        return tuple(connection.execute(f"SELECT count(*) FROM safedefer_{table}").get for table in tables)
    finally:
        connection.close()


_IMPOSSIBLE = {
    "both waiting and ended": "SELECT id FROM safedefer_tasks WHERE id IN (SELECT id FROM safedefer_ended)",
    "both waiting and dead": "SELECT id FROM safedefer_tasks WHERE id IN (SELECT id FROM safedefer_dead)",
    "both dead and ended": "SELECT id FROM safedefer_dead WHERE id IN (SELECT id FROM safedefer_ended)",
    "a blob without its task": "SELECT id FROM safedefer_blobs WHERE task NOT IN (SELECT seq FROM safedefer_tasks)",
    "an oversize task without its blob": """SELECT id FROM safedefer_tasks WHERE blob_id IS NOT NULL
        AND seq NOT IN (SELECT task FROM safedefer_blobs)""",
    "leased without a time": "SELECT id FROM safedefer_tasks WHERE (owner IS NULL) != (leased_at IS NULL)",
    "ended, and the ledger does not know": """SELECT id FROM safedefer_ended e WHERE NOT EXISTS (
        SELECT 1 FROM safedefer_ledger WHERE audience = e.audience AND task_id = e.id AND state = e.state)""",
    "the sum of the blobs": """SELECT blob_bytes FROM safedefer_totals
        WHERE blob_bytes != (SELECT coalesce(sum(length(data)), 0) FROM safedefer_blobs)""",
}


def million(*, pending: int = 1_000_000, sample: int = 1_500, bar: float = 0.7) -> str:
    """Much waits: enqueue and lease are as fast as on an empty queue, and memory does not grow with it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        bare = stack.enter_context(contextlib.closing(SQLiteQueue(Path(folder, "empty.db"))))
        queue = stack.enter_context(contextlib.closing(SQLiteQueue(Path(folder, "full.db"))))
        began = time.monotonic()
        for start in range(0, pending, 5_000):
            queue.enqueue_many(
                [make_task(eta=50.0, queue="default" if n % 2 else "other") for n in range(start, start + 5_000)]
            )
        seconds = time.monotonic() - began
        _rates(queue, sample)  # warms up
        _rates(bare, sample)
        before = _resident()
        # By turns, and the best of each: other work of the machine then counts for both.
        pairs = [(_rates(bare, sample), _rates(queue, sample)) for _ in range(5)]
        grown = _resident() - before
        dispatched, dispatcher_grown = asyncio.run(_dispatch(queue, 8 * sample))
        empty = tuple(map(max, *(pair[0] for pair in pairs)))
        best = tuple(map(max, *(pair[1] for pair in pairs)))
        began = time.monotonic()
        listed = len(queue.tasks(queue="other", limit=100))
        listing = time.monotonic() - began
        ratios = [ours / theirs for ours, theirs in zip(best, empty, strict=True)]
        if min(ratios) < bar or max(grown, dispatcher_grown) > 20 or listed != 100:
            raise Failed(f"ratios {ratios}, grown {grown} and {dispatcher_grown} MB")
        return (
            f"pending={pending} filled_in={seconds:.0f}s enqueue={best[0]:.0f}/s ({ratios[0]:.0%} of empty) "
            f"lease+settle={best[1]:.0f}/s ({ratios[1]:.0%}) "
            f"dispatched={dispatched} dispatcher_memory_grown={dispatcher_grown:.1f}MB list={listing * 1000:.1f}ms"
        )


def _rates(queue: SQLiteQueue, sample: int) -> tuple[float, float]:
    began = time.monotonic()
    for _ in range(sample):
        queue.enqueue_many([make_task(eta=60.0)])
    enqueued = time.monotonic()
    leased = 0
    while leased < sample:
        leases = queue.lease(owner="chaos", limit=20, seconds=600.0, now=100.0)
        queue.settle_many([(lease, Settlement(verdict=Verdict.DONE)) for lease in leases], now=100.0)
        leased += len(leases)
    return sample / (enqueued - began), sample / (time.monotonic() - enqueued)


async def _dispatch(queue: SQLiteQueue, count: int) -> tuple[int, float]:
    """Dispatch some of what waits to a handler that does nothing; how many, and by how much the memory grew."""
    done: list[float] = []
    enough = asyncio.Event()

    async def deliver(task: object, headers: object) -> Response:
        done.append(0.0)
        if len(done) == count // 4:  # by then everything is there that is needed
            done[0] = _resident()
        if len(done) >= count:
            enough.set()
        return Response(200, {"Safedefer-Outcome": "succeeded"}, b"")

    dispatcher = Dispatcher(queue, Delivering(deliver), clock=time.time)
    running = asyncio.create_task(dispatcher.run())
    await enough.wait()
    grown = _resident() - done[0]
    dispatcher.stop()
    await running
    return len(done), grown


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
