"""Calls a task, against the stored ones: ``python -m tests.benchmarks.counts [--renew]``.

What is counted are calls of functions, Python's and built-in ones (``sys.setprofile``), and SQL statements. They are the
same on every machine of one Python version, however busy it is, where times and even counts of instructions are not; and
what makes this code slower nearly always is one more call. Code that loops without a call is not seen.

    serialize, run         the halves of ``bench_path``, by workload
    verify, storage        the parts of ``bench_dispatch``; storage in batches of 64, on SQLite
    statements, commits    what storage asks of SQLite; a statement with several rows of values counts for each

``--renew`` stores what was counted, for this version of Python. Do so after a change that is worth its calls.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safedefer
from safedefer.ledger import AttemptRecord, EndState, Execution
from tests.benchmarks.bench_codec import Customer, workloads
from tests.benchmarks.bench_dispatch import BATCH, DONE, fill, make_app, noop

STORED = Path(__file__).with_name("counts.json")
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
#: By how much a count may exceed the stored one.
SLACK = 1.05
_TIMES = 2 * BATCH


def task(*args: object, **kwargs: object) -> None:
    """What every workload calls."""


def calls(action: Callable[[], object]) -> int:
    """Return how many functions an action calls in this thread."""
    found = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal found
        found += event in {"call", "c_call"}

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


def count() -> dict[str, float]:
    """Return the calls and statements of one task, by what is done."""
    found: dict[str, float] = {}

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            _of_tokens(found)
            _of_verify(found, folder)
            _of_storage(found, folder)

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
