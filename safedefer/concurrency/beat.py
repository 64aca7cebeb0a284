"""A thread that extends leases at intervals, and stops when the event loop does not turn.

A timer of the loop would not fire while a task blocks the loop. A thread that did not look at the loop would keep the
tasks of a process that hangs for ever.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Final

_log: Final = logging.getLogger("safedefer")

#: Seconds without a turn of the event loop after which a process is taken for hanging.
HANG_SECONDS: Final = 60.0
#: Turns that are noted in that time.
_TURNS: Final = 8
_LONGEST: Final = 1.0


class Beat:
    """Calls a function at intervals from a thread of its own, while an event loop turns.

    Args:
        call: The function; returns the seconds to its next call. It raises nothing.
        first: Seconds to the first call.
        name: The name of the thread.
        hang_seconds: Seconds without a turn of the loop after which the calls stop, until it turns again.
        log: Whether to log that they stop.
    """

    def __init__(
        self, call: Callable[[], float], *, first: float, name: str, hang_seconds: float, log: bool = True
    ) -> None:
        self.hang_seconds = hang_seconds
        self._call = call
        self._first = first
        self._name = name
        self._log = log
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turned = 0.0
        self._stopped = threading.Event()

    def start(self) -> None:
        """Call from now on, while the running event loop turns. Another loop that was watched before is forgotten."""
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            return
        self._loop = loop
        self._stopped.set()  # the thread of another loop ends
        self._stopped = stopped = threading.Event()
        self._turn(loop, stopped)
        threading.Thread(target=self._beat, args=(loop, stopped), name=self._name, daemon=True).start()

    def stop(self) -> None:
        """Call no more."""
        self._loop = None
        self._stopped.set()

    def _turn(self, loop: asyncio.AbstractEventLoop, stopped: threading.Event) -> None:
        self._turned = time.monotonic()
        if not stopped.is_set():
            loop.call_later(min(_LONGEST, self.hang_seconds / _TURNS), self._turn, loop, stopped)

    def _beat(self, loop: asyncio.AbstractEventLoop, stopped: threading.Event) -> None:
        pause, told = self._first, False
        while not stopped.wait(pause):
            if loop.is_closed():
                return
            stands = time.monotonic() - self._turned
            if stands < self.hang_seconds:
                pause, told = self._call(), False
            elif self._log and not told:
                told = True
                _log.error("the event loop stands for %.1f s; leases are not extended any more", stands)
