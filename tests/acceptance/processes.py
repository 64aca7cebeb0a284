"""Real processes of the command line, on a project of their own in a temporary folder."""

import base64
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TASKS = """
import asyncio, os, sqlite3, sys, time
from pathlib import Path
from safedefer import PermanentTaskFailure

FOLDER = Path(os.environ["RESULTS"])

def write(number):
    with sqlite3.connect(FOLDER / "results.db", timeout=30) as connection:
        connection.execute("INSERT INTO results VALUES (?)", (number,))

def work(number):
    time.sleep(0.005)
    write(number)

async def work_async(number):
    await asyncio.sleep(0.005)
    await asyncio.to_thread(write, number)

def slow(number, seconds):
    (FOLDER / f"started-{number}").touch()
    time.sleep(seconds)
    write(number)

def held(number):
    (FOLDER / f"started-{number}").touch()
    for _ in range(20_000):
        if (FOLDER / "let-go").exists():
            break
        time.sleep(0.01)
    write(number)

def measure(text):
    return len(text)

def permanent():
    raise PermanentTaskFailure("never")
"""


class Forker:
    """The client of ``tests.acceptance.forker``, which is started when it is first asked."""

    def __init__(self):
        self._process = None

    def order(self, folder, environment, *, data=None, **what):
        """Run a command or code to its end."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.acceptance.forker"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        order = {"folder": str(folder), "environment": environment, "data": base64.b64encode(data or b"").decode()}
        self._process.stdin.write(json.dumps(order | what).encode() + b"\n")
        self._process.stdin.flush()
        status, *said = json.loads(self._process.stdout.readline())
        return subprocess.CompletedProcess(what, status, *map(base64.b64decode, said))

    def close(self):
        if self._process is not None:
            self._process.communicate()


class Project:
    """A folder with a module of tasks, and the settings of an App."""

    def __init__(self, folder, keys, forker):
        self.folder = folder
        self.forker = forker
        (folder / "shop_tasks.py").write_text(TASKS)
        with contextlib.closing(sqlite3.connect(folder / "results.db")) as connection:
            connection.execute("PRAGMA journal_mode = wal")
            connection.execute("CREATE TABLE results (number INTEGER)")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SAFEDEFER_")}
        self.environment |= {
            "PYTHONPATH": str(ROOT),
            "RESULTS": str(folder),
            "SAFEDEFER_ENVIRONMENT": "test",
            "SAFEDEFER_POLICY": "shop_tasks",
            "SAFEDEFER_QUEUE": f"sqlite:///{folder}/tasks.db",
        } | keys
        self.processes = []

    def run(self, *arguments, data=None, check=True, **environment):
        """Run ``safedefer`` to its end."""
        encoded = [base64.b64encode(os.fsencode(argument)).decode() for argument in arguments]
        done = self.forker.order(self.folder, {**self.environment, **environment}, data=data, arguments=encoded)
        if check:
            assert done.returncode == 0, done.stderr.decode()
        return done

    def start(self, *arguments, wait_for_line=True):
        """Start ``safedefer``, and return the process and its first line."""
        process = subprocess.Popen(
            [sys.executable, "-m", "safedefer", *arguments], cwd=self.folder, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.processes.append(process)
        return process, process.stdout.readline().strip() if wait_for_line else ""

    def python(self, code):
        """Run Python code in the project."""
        done = self.forker.order(self.folder, self.environment, code=code)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()

    def defer(self, call):
        """Defer a call in a process of its own; returns the task's id."""
        return self.python(f"import shop_tasks as t; from safedefer import defer; print(defer({call}).id)")

    def results(self):
        with contextlib.closing(sqlite3.connect(self.folder / "results.db")) as connection:
            return [number for (number,) in connection.execute("SELECT number FROM results ORDER BY number")]

    def until(self, condition, seconds=120.0):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.02)

    def let_go(self):
        """Let the tasks end that are held."""
        (self.folder / "let-go").touch()

    def terminate(self, process, *, number=signal.SIGTERM, holds=False):
        """Send a signal; return the exit status and what was said. With ``holds`` it waits for a task until we let go."""
        process.send_signal(number)
        if holds:
            time.sleep(0.3)
            assert process.poll() is None, "it waits for the task"
            self.let_go()
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def kill_all(self):
        self.let_go()
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            with contextlib.suppress(ValueError):
                process.communicate(timeout=60)
