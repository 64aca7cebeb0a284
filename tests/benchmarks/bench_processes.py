"""What more worker processes gain: ``safedefer run --processes N`` over CPU-bound tasks, a SQLite queue each round.

    python -m tests.benchmarks.bench_processes [--processes 2] [--tasks 600] [--rounds 5]

The peer is ``--processes 1`` in the same run. Rounds are interleaved; a round's time is from the begin of its first task
to the end of its last one, as the tasks say, so that starting Python is left out. Prints the tasks a second of each
round, the medians, and their ratio. The machine needs as many idle cores as there are processes: so each round also
measures what bare processes without safedefer gain that call the same function, which is all that can be gained. Where
cores are not idle, compare the processor time of the busiest worker process: it is what a round takes on idle cores.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import safedefer

TASKS = """
import os, time

def burn(number, turns):
    begun, spent = time.time(), time.process_time()
    value = 0
    for turn in range(turns):
        value = (value * 31 + turn) % 1000003
    with open(os.environ["BENCH_RESULTS"], "a") as file:
        file.write(f"{number} {begun} {time.time()} {os.getpid()} {spent} {time.process_time()}\\n")
"""


def measure(processes, tasks, turns):
    """Return the tasks a second of one round, and the seconds of processor time of the busiest worker process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bench_tasks.py").write_text(TASKS)
        results = folder / "results"
        results.touch()
        settings = {
            "SAFEDEFER_KEYS": "bench:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8",
            "SAFEDEFER_POLICY": "bench_tasks",
            "SAFEDEFER_QUEUE": f"sqlite:///{folder}/tasks.db",
            "SAFEDEFER_ENVIRONMENT": "bench",
            "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "BENCH_RESULTS": str(results),
        }
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SAFEDEFER_")} | settings
        code = (
            "import bench_tasks, safedefer\n"
            "app = safedefer.App.from_settings()\n"
            f"app.defer_many((bench_tasks.burn, (number, {turns}), {{}}) for number in range({tasks}))\n"
            "app.close()\n"
        )
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        command = [sys.executable, "-m", "safedefer", "run", "--processes", str(processes)]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as run:
            try:
                deadline = time.monotonic() + 300
                while results.read_bytes().count(b"\n") < tasks:
                    if run.poll() is not None or time.monotonic() > deadline:
                        raise SystemExit(f"the tasks did not end: {run.stderr.read()}")
                    time.sleep(0.1)
            finally:
                run.terminate()
                run.wait(60)
        lines = [line.split() for line in results.read_text().splitlines()]
        assert len({line[0] for line in lines}) == tasks
        seconds = max(float(line[2]) for line in lines) - min(float(line[1]) for line in lines)
        spent = {}
        for *_, process, before, after in lines:
            known = spent.get(process, (float("inf"), 0.0))
            spent[process] = min(known[0], float(before)), max(known[1], float(after))
        return tasks / seconds, max(after - before for before, after in spent.values())


def bare(processes, tasks, turns):
    """Return the calls a second of processes that do nothing else."""
    with tempfile.TemporaryDirectory() as name:
        results = Path(name, "results")
        code = f"{TASKS}\nfor number in range({tasks // processes}): burn(number, {turns})\n"
        environment = {**os.environ, "BENCH_RESULTS": str(results)}
        for run in [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(processes)]:
            run.wait()
        times = [list(map(float, line.split()[1:3])) for line in results.read_text().splitlines()]
    return len(times) / (max(end for _, end in times) - min(begun for begun, _ in times))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=600)
    parser.add_argument("--turns", type=int, default=150_000, help="turns of a task's loop: 150,000 take about 10 ms")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(f"safedefer {safedefer.__version__}, {os.cpu_count()} cores, {given.tasks} tasks of {given.turns} turns")
    rates = {1: [], given.processes: []}
    possible, taken = [], {1: [], given.processes: []}
    for number in range(given.rounds):
        for processes, found in rates.items():
            rate, spent = measure(processes, given.tasks, given.turns)
            found.append(rate)
            taken[processes].append(spent)
        one, many = (bare(processes, given.tasks, given.turns) for processes in rates)
        possible.append(many / one)
        print(
            f"round {number + 1}: "
            + ", ".join(f"{count} processes {found[-1]:.1f}/s" for count, found in rates.items())
            + f" ({found[-1] / rates[1][-1]:.2f} times; bare {possible[-1]:.2f} times;"
            f" by processor time {taken[1][-1] / spent:.2f} times)"
        )
    one, many = (statistics.median(found) for found in rates.values())
    ratios = sorted(b / a for a, b in zip(*rates.values(), strict=True))
    print(f"medians {one:.1f}/s and {many:.1f}/s: {many / one:.2f} times (rounds: {ratios[0]:.2f} to {ratios[-1]:.2f})")
    by_time = statistics.median(a / b for a, b in zip(*taken.values(), strict=True))
    print(
        f"bare processes: {statistics.median(possible):.2f} times; by processor time of the busiest: {by_time:.2f} times"
    )


if __name__ == "__main__":
    main()
