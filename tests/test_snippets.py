"""Every snippet of README.md and docs/: Python runs, and commands are ones that the command line takes."""

import base64
import json
import os
import re
import shlex
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from safedefer.cli import main
from tests.snippets import ROOT, fences

COMMAND = re.compile(r"(?:^|[ (])(?:\.venv/bin/)?safedefer( [^#|>;&)]*)")


def commands():
    for page, _, text in fences("sh", "console"):
        for line in text.splitlines():
            if line.startswith((">>>", "safedefer.")) or "pip install" in line:
                continue
            for found in COMMAND.finditer(line.removeprefix("$ ")):
                yield page, found[1].strip()


COMMANDS = sorted(set(commands()))
#: A key of no application.
KEY = f"k1:{base64.urlsafe_b64encode(bytes(range(7, 39))).decode().rstrip('=')}"


def test_all_python_of_the_documentation_runs(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SAFEDEFER_")}
    settings = {"SAFEDEFER_KEYS": KEY, "SAFEDEFER_POLICY": "shop.tasks,tasks", "SAFEDEFER_QUEUE": "memory://"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.snippets"],
        cwd=tmp_path, env={**kept, **settings, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failures"] == [], "\n\n".join(found["failures"])
    assert found["pages"] > 8


@pytest.mark.parametrize(("page", "arguments"), COMMANDS)
def test_every_command_of_the_documentation_is_one(page, arguments):
    command, context = main, main.make_context("safedefer", shlex.split(arguments))
    with CliRunner().isolation(input="y\n"):  # purge asks
        while isinstance(command, click.Group) and (rest := [*context._protected_args, *context.args]):
            name, command, rest = command.resolve_command(context, rest)
            context = command.make_context(name, rest, parent=context)
    assert not isinstance(command, click.Group), f"{page}: {arguments} names no command"


def test_there_are_commands():
    assert len(COMMANDS) > 15
    with pytest.raises(click.UsageError):
        test_every_command_of_the_documentation_is_one("a page", "tasks list --no-such-option")
