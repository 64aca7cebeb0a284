"""A pytest plugin: collects once, then forks for every mutant and runs the tests that reach it, quickest to fail first.

A mutant costs a fork and the tests until one fails, not the start of pytest. What module-level code of the tests makes
(a policy, a keyring) was made before the fork, by unchanged code, so that a mutant may survive here that a fresh process
would notice. A row says whether its function was reached so ``early``: ``tests.mutation`` gives those a fresh process.
"""

import gc
import json
import os
import select
import signal
import time
from collections import Counter
from pathlib import Path

from _pytest.runner import runtestprotocol
from mutmut.state import state

#: Seconds that the tests of one mutant may take longer than they took without it.
PATIENCE = 30


def pytest_addoption(parser):
    parser.addoption("--mutants", help="file with a mutant on each line, and maybe the most tests to run for it")
    parser.addoption("--verdicts", help="file that gets a line of JSON for each mutant")


def pytest_sessionstart():
    os.environ |= {"MUTANT_UNDER_TEST": "stats", "MUTMUT_DEPENDENCY_DEPTH": "-1"}


def pytest_collection_finish():
    os.environ["MUTANT_UNDER_TEST"] = ""


def _fails(item, following):
    return any(report.failed for report in runtestprotocol(item, log=False, nextitem=following))


def _in_child(work):
    """Run ``work`` in a fork and return its process; its return value is the exit status."""
    child = os.fork()
    if child:
        return child
    status = 3
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        status = work()
    finally:
        os._exit(status)


def _observe(items, path):
    """Which functions each test reaches and how long it takes, measured in a fork of its own."""

    def work():
        os.environ["MUTANT_UNDER_TEST"] = "stats"
        seen = {}
        for index, item in enumerate(items):
            state()._stats.clear()
            start = time.perf_counter()
            if _fails(item, items[index + 1] if index + 1 < len(items) else None):
                path.write_text(json.dumps({"failed": item.nodeid}))
                return 1
            seen[item.nodeid] = [time.perf_counter() - start, sorted(state()._stats)]
        path.write_text(json.dumps(seen))
        return 0

    _, status = os.waitpid(_in_child(work), 0)
    seen = json.loads(path.read_text())
    if status:
        raise SystemExit(f"a test fails without any mutant: {seen['failed']}")
    return seen


def _judge(mutant, tests, seconds):
    """Run the tests until one fails, and return its number, ``timeout`` or None."""
    reader, writer = os.pipe()

    def work():
        os.environ["MUTANT_UNDER_TEST"] = mutant
        for number, item in enumerate(tests):
            if _fails(item, tests[number + 1] if number + 1 < len(tests) else None):
                os.write(writer, str(number).encode())
                return 1
        return 0

    child = _in_child(work)
    os.close(writer)
    handle = os.pidfd_open(child)
    ended, _, _ = select.select([handle], [], [], seconds)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    text = os.read(reader, 20)
    os.close(reader)
    os.close(handle)
    if not ended:
        return "timeout"
    if text:
        return int(text)
    return None if status == 0 else "died"


def pytest_runtestloop(session):
    option = session.config.getoption
    items = {item.nodeid: item for item in session.items}
    verdicts = Path(option("--verdicts"))
    early = sorted(state()._stats)
    gc.collect()
    gc.freeze()
    seen = _observe(list(items.values()), verdicts.with_suffix(".seen"))
    reached, kills = {}, {}
    for test, (_, functions) in seen.items():
        for function in functions:
            reached.setdefault(function, []).append(test)
    with verdicts.open("w") as out:
        for line in Path(option("--mutants")).read_text().splitlines():
            mutant, _, most = line.partition(" ")
            function = mutant.rpartition("__mutmut")[0]
            known = kills.setdefault(function, Counter())
            tests = sorted(reached.get(function, ()), key=lambda test: (-known[test], seen[test][0]))
            tests = tests[: int(most)] if most else tests
            start = time.perf_counter()
            found = _judge(mutant, [items[test] for test in tests], PATIENCE + 5 * sum(seen[test][0] for test in tests))
            by = tests[found] if isinstance(found, int) else found
            if isinstance(found, int):
                known[by] += 1
            row = {
                "mutant": mutant,
                "by": by,
                "tests": len(tests),
                "early": function in early,
                "seconds": round(time.perf_counter() - start, 3),
            }
            print(json.dumps(row), file=out, flush=True)
    return True
