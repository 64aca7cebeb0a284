"""A program: a signal handler defers at every line that a call executes. Ends with 0 unless one hangs or a task is lost.

Its arguments are the URL of a queue, what is interrupted, and how many lines lie between two interrupts. A trace function
stands for the signal: Python calls both in the main thread, between two of its steps.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import safedefer
from safedefer import App, Key, Keyring, Policy, QueueUnavailable
from safedefer.events import RequestRefused
from safedefer.observe.counts import Counts
from tests import sample_tasks as tasks

_OURS = (str(Path(safedefer.__file__).parent), threading.__file__)


class Interrupt:
    """Calls ``handler`` once, at the given line of those that safedefer executes."""

    def __init__(self, handler: Callable[[], object], line: int) -> None:
        self._handler = handler
        self._left = line
        self.came = False

    def __enter__(self) -> Interrupt:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(_OURS):
            return None
        if event == "line":
            self._left -= 1
            if self._left == 0:
                self.came = True
                sys.settrace(None)
                self._handler()
                return None
        return self._trace


def app_of(url: str, *, observers: bool = True) -> App:
    """Return an App; ``observers``: all that safedefer has hear of every task."""

    async def observe(event: object) -> None:
        pass

    app = App(
        keyring=Keyring(Key("one", bytes(range(32)))), policy=Policy("tests.sample_tasks"), queue=url, observer=observe
    )
    if observers:
        app.observers.add(Counts())
        assert app.notices.troubles  # it observes from now on
        app.observers(RequestRefused(status=400, reason="malformed"))  # whose number is logged with a later event
    return app


def waiting(app: App) -> int:
    """Return how many tasks the queue has."""
    return sum(stats.waiting for stats in app.queue.stats(now=0.0))


def interrupted(app: App, call: Callable[[App], object], line: int, *, may_refuse: bool) -> tuple[bool, int]:
    """Return whether the line was reached, and how many tasks the handler deferred."""
    stored = 0

    def handler() -> None:
        nonlocal stored
        try:
            app.defer(tasks.add, 1, 2)
        except QueueUnavailable:
            if not may_refuse:
                raise
        else:
            stored += 1

    with Interrupt(handler, line) as interrupt:
        call(app)
    return interrupt.came, stored


def main(url: str, what: str, step: str = "1") -> int:
    """Interrupt each line in turn, or each ``step``-th; return how many lines there were."""
    app, call, fresh = app_of(url), CALLS[what], what.startswith("first")
    line = total = 0
    while True:
        line += int(step)
        if fresh:
            app.close()
            app = app_of(url.replace("tasks.db", f"{line}.db"), observers=False)
            before = total if url.startswith("postgresql") else 0
        else:
            before = waiting(app)
        came, stored = interrupted(app, call, line, may_refuse=fresh or what == "fork")
        if what.endswith("defer") and waiting(app) != before + 1 + stored:
            raise SystemExit(f"line {line}: {waiting(app)} tasks, and {before} before")
        total += 1 + stored
        if not came:
            app.close()
            return line


def _fork(_app: App) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


CALLS: dict[str, Callable[[App], object]] = {
    "defer": lambda app: app.defer(tasks.add, 1, 2),
    "first defer": lambda app: app.defer(tasks.add, 1, 2),
    "stats": waiting,
    "first stats": waiting,
    "fork": _fork,
}

if __name__ == "__main__":
    faulthandler.dump_traceback_later(140, exit=True)
    signal.signal(signal.SIGUSR1, lambda *_: None)  # never comes; where there is none, threads commit for themselves
    print(main(*sys.argv[1:]))
