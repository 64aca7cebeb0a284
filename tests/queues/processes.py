"""Programs that the tests of several processes run, each in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).absolute().parents[2]

_PRELUDE = """
import os, sys, threading, time
from safedefer.errors import *
from safedefer.queues.base import *
from safedefer.queues.sqlite.queue import SQLiteQueue
from tests.queues.contract import DONE, ids, make_task, take
queue = SQLiteQueue(sys.argv[1])
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a program that finds a ``queue`` on the file of its first argument."""
    command = [sys.executable, "-W", "error", "-c", _PRELUDE + textwrap.dedent(program), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(program: str, *arguments: object) -> str:
    """Run a program to its end, and return what it printed; it must print no error."""
    process = start(program, *arguments)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, ""), errors
    return output
