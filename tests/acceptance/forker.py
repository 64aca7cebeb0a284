"""Runs ``safedefer`` and Python code in forked children of one interpreter, which has imported it once.

Each command has a process, an environment, a folder and standard streams of its own, as a new interpreter would have;
what it does not have is the half second that the imports take. ``python -m tests.acceptance.forker`` reads one order
after the other, a line of JSON each, and answers with a line of JSON.
"""

from __future__ import annotations

import base64
import gc
import importlib
import json
import os
import sys
import tempfile
from typing import Any, NoReturn

#: By an App for its queue, and by click.
IMPORTED_LATER = ("safedefer.queues.sqlite.queue", "encodings.idna", "click._textwrap")


def _become(order: dict[str, Any], streams: list[Any]) -> NoReturn:
    """Be the process that was ordered, to its end."""
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    sys.path.insert(0, "")
    if "code" in order:
        sys.argv = ["-c"]
        exec(compile(order["code"], "<string>", "exec"), {"__name__": "__main__"})
        sys.exit(0)
    from safedefer.cli import main

    arguments = [os.fsdecode(base64.b64decode(argument)) for argument in order["arguments"]]
    sys.argv = ["safedefer", *arguments]
    main(prog_name="safedefer")
    sys.exit(0)


def _import_for_the_children() -> None:
    """Import what commands, an App and its queue import when they are used."""
    from safedefer.cli.root import COMMANDS

    for name in {f"safedefer.cli.{command.module}" for command in COMMANDS.values()}:
        importlib.import_module(name)
    for name in IMPORTED_LATER:
        importlib.import_module(name)


def serve() -> None:
    """Follow orders until there are no more."""
    _import_for_the_children()
    gc.freeze()  # no child's collector copies the pages
    while line := sys.stdin.readline():
        order = json.loads(line)
        with (
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as output,
            tempfile.TemporaryFile() as errors,
        ):
            given.write(base64.b64decode(order["data"]))
            given.seek(0)
            pid = os.fork()
            if not pid:
                _become(order, [given, output, errors])
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            said = []
            for stream in (output, errors):
                stream.seek(0)
                said.append(base64.b64encode(stream.read()).decode())
        print(json.dumps([status, *said]), flush=True)


if __name__ == "__main__":
    serve()
