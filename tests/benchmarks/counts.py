"""Calls a task, against the stored ones: ``python -m tests.benchmarks.counts [--renew]``.

What is counted are calls of functions, Python's and built-in ones (``sys.setprofile``), and SQL statements. They are the
same on every machine of one Python version, however busy it is, where times and even counts of instructions are not; and
what makes this code slower nearly always is one more call. Code that loops without a call is not seen.

    serialize, run         the halves of ``bench_path``, by workload
    verify, storage        the parts of ``bench_dispatch``; storage in batches of 64, on SQLite
    statements, commits    what storage asks of SQLite; a statement with several rows of values counts for each
    dispatch to handler    one delivery by HTTP, both ends in one loop and nothing stored: functions that this project
                           calls, and not those of asyncio, whose turns differ with the load, or of aiohttp, with its version

``--renew`` stores what was counted, for this version of Python. Do so after a change that is worth its calls.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import safedefer
from safedefer.dispatcher.loop import HttpDelivery
from safedefer.dispatcher.request_headers import delivery_headers
from safedefer.dispatcher.signed_route import SignedRoute
from safedefer.ledger import Admission, AttemptRecord, EndState, Execution
from safedefer.queues.base import Lease
from safedefer.web.server import serving
from tests.benchmarks.bench_codec import Customer, workloads
from tests.benchmarks.bench_dispatch import BATCH, DONE, Nothing, fill, make_app, noop

STORED = Path(__file__).with_name("counts.json")
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
#: By how much a count may exceed the stored one.
SLACK = 1.05
_TIMES = 2 * BATCH
_HERE = str(Path(safedefer.__file__).parent) + os.sep


def task(*args: object, **kwargs: object) -> None:
    """What every workload calls."""


def calls(action: Callable[[], object], *, within: str = "") -> int:
    """Return how many functions an action calls in this thread: those of, and called by, files whose paths begin so."""
    found = 0

    def count(frame: FrameType, event: str, _argument: object) -> None:
        nonlocal found
        found += event in {"call", "c_call"} and frame.f_code.co_filename.startswith(within)

    before = sys.getprofile()
    gc.collect()
    gc.disable()
    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(before)
        gc.enable()
    return found


def _of_tokens(found: dict[str, float]) -> None:
    from tests.benchmarks import counts  # and not __main__

    app = safedefer.App(
        keyring=safedefer.Keyring(safedefer.Key("bench", os.urandom(32))),
        policy=safedefer.Policy("tests.benchmarks.counts", "tests.benchmarks.bench_codec"),
        queue="memory://",
    )
    for name, (args, kwargs) in workloads(Customer).items():
        data = app.serialize(counts.task, *args, **kwargs)
        app.run(data)
        found[f"serialize {name}"] = _each(lambda args=args, kwargs=kwargs: app.serialize(counts.task, *args, **kwargs))
        found[f"run {name}"] = _each(lambda data=data: app.run(data))
    app.close()


def _each(action: Callable[[], object]) -> float:
    return calls(lambda: [action() for _ in range(_TIMES)]) / _TIMES


def _of_storage(found: dict[str, float], folder: str) -> None:
    app = make_app("sqlite", 16, folder)
    fill(app, noop, 3 * _TIMES)
    queue, now = app.queue, time.time()

    def deliver(times: int) -> None:
        for _ in range(times // BATCH):
            leases = queue.lease(owner="bench", limit=BATCH, seconds=60.0, now=now)
            assert len(leases) == BATCH
            tasks = [lease.task for lease in leases]
            runs = [Execution(task.audience, task.id, task.digest, f"run-{task.id}", task.expires) for task in tasks]
            queue.ledger.begin_many(runs, now=now, lease=60.0)
            records = [AttemptRecord(run.task_id, run.audience, now, now, "succeeded", 200) for run in runs]
            queue.ledger.finish_many(
                [(run, EndState.SUCCEEDED, record) for run, record in zip(runs, records, strict=True)]
            )
            assert all(queue.settle_many([(lease, DONE) for lease in leases], now=now))

    deliver(_TIMES)
    queue.prune(now=now)  # and wait for the one that the first lease began
    found["storage"] = calls(lambda: deliver(_TIMES)) / _TIMES
    executed: list[str] = []

    def note(_cursor: object, sql: str, _values: object) -> bool:
        executed.append(sql)
        return True

    queue._writer.run(lambda connection: setattr(connection, "exec_trace", note))
    deliver(_TIMES)
    found["statements"] = len(executed) / _TIMES
    found["commits"] = executed.count("COMMIT") / _TIMES
    app.close()


def _of_verify(found: dict[str, float], folder: str) -> None:
    app = make_app("memory", 16, folder)
    tokens = [task.payload for task in fill(app, noop, _TIMES)]
    app.verify(tokens[0])
    found["verify"] = calls(lambda: [app.verify(token) for token in tokens]) / _TIMES
    app.close()


class _Here(Nothing):
    """As ``Nothing``, with a ledger that answers in the loop that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.here = self._Ledger()

    class _Ledger:
        async def begin_many(self, executions: list[Execution], **_more: object) -> list[Admission]:
            return [Admission.RUN] * len(executions)

        async def finish_many(self, ends: list[object]) -> list[bool]:
            return [True] * len(ends)


def _of_http(found: dict[str, float]) -> None:
    app = safedefer.App(
        keyring=safedefer.Keyring(safedefer.Key("bench", os.urandom(32))),
        policy=safedefer.Policy("tests.benchmarks.bench_dispatch"),
        queue=_Here(),
    )
    fill(app, noop, 2 * _TIMES)
    leases = app.queue.lease(owner="bench", limit=2 * _TIMES, seconds=60.0, now=time.time())

    async def begin() -> HttpDelivery:
        url = await stack.enter_async_context(serving(app))
        return await stack.enter_async_context(HttpDelivery(url, verify=SignedRoute(app.authenticate)))

    async def deliver(some: Sequence[Lease]) -> None:
        for lease in some:
            answer = await delivery(lease.task, delivery_headers(lease))
            assert answer.headers["Safedefer-Outcome"] == "succeeded"

    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        delivery = runner.run(begin())
        runner.run(deliver(leases[:_TIMES]))
        number = calls(lambda: runner.run(deliver(leases[_TIMES:])), within=_HERE)
        runner.run(stack.aclose())
    found["dispatch to handler"] = number / _TIMES
    app.close()


def count() -> dict[str, float]:
    """Return the calls and statements of one task, by what is done."""
    found: dict[str, float] = {}

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            _of_tokens(found)
            _of_verify(found, folder)
            _of_storage(found, folder)
            _of_http(found)

    # In a thread no signal handler runs, and so a lone caller of the queue commits itself.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()
    return {name: round(number, 4) for name, number in found.items()}


def stored() -> dict[str, float] | None:
    """Return the stored counts of this version of Python; None if there are none."""
    found: dict[str, float] | None = json.loads(STORED.read_text()).get(VERSION)
    return found


def over(counted: dict[str, float], limits: dict[str, float]) -> dict[str, tuple[float, float | None]]:
    """Return what was counted of all that exceeds, or is not among, the stored counts, and what is stored."""
    return {
        name: (number, limits.get(name))
        for name, number in counted.items()
        if name not in limits or number > limits[name] * SLACK
    }


def main() -> None:
    """Count, and print or store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true")
    options = parser.parse_args()
    counted, before = count(), stored() or {}
    for name, number in counted.items():
        print(f"{name:20}{number:10.3f}{before.get(name, float('nan')):10.3f}")
    if options.renew:
        known = json.loads(STORED.read_text()) if STORED.exists() else {}
        STORED.write_text(json.dumps({**known, VERSION: counted}, indent=2, sort_keys=True) + "\n")
    elif over(counted, before):
        raise SystemExit(f"more calls than are stored: {over(counted, before)}")


if __name__ == "__main__":
    main()
