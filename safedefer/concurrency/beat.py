"""A thread that extends leases at intervals, and passes over event loops that do not turn.

A timer of the loop would not fire while a task blocks the loop. A thread that did not look at the loop would keep the
tasks of a process that hangs for ever.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Container
from typing import Final

_log: Final = logging.getLogger("safedefer")

#: Seconds without a turn of the event loop after which a process is taken for hanging.
HANG_SECONDS: Final = 60.0
#: Turns that are noted in that time.
_TURNS: Final = 8
_LONGEST: Final = 1.0


class Beat:
    """Calls a function at intervals from a thread of its own, while any of the event loops turns that use it.

    Args:
        call: The function; gets the loops that turn, and returns the seconds to its next call. It raises nothing.
        first: Seconds to the first call.
        name: The name of the thread.
        hang_seconds: Seconds without a turn after which a loop is left out, until it turns again.
        log: Whether to log that one is left out.
    """

    def __init__(
        self,
        call: Callable[[Container[asyncio.AbstractEventLoop]], float],
        *,
        first: float,
        name: str,
        hang_seconds: float,
        log: bool = True,
    ) -> None:
        self.hang_seconds = hang_seconds
        self._call = call
        self._first = first
        self._name = name
        self._log = log
        self._lock = threading.Lock()
        self._turns: dict[asyncio.AbstractEventLoop, _Turn] = {}
        self._held = 0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Call from now on, while the event loop turns, which runs in this thread."""
        if loop in self._turns and self._thread is not None:
            return
        with self._lock:
            self._turns[loop] = turn = _Turn(time.monotonic())
            self._start_thread()
        self._note(loop, turn)

    def hold(self) -> None:
        """Call from now on also while no loop turns, until ``release``."""
        with self._lock:
            self._held += 1
            self._start_thread()

    def release(self) -> None:
        """Undo one ``hold``."""
        with self._lock:
            self._held -= 1

    def stop(self) -> None:
        """Call no more, until ``start``."""
        with self._lock:
            self._turns.clear()
            self._held = 0
            self._stopped.set()
            self._stopped, self._thread = threading.Event(), None

    def _start_thread(self) -> None:
        """Start the thread unless it lives; a forked child has none. Hold the lock."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._beat, args=(self._stopped,), name=self._name, daemon=True)
            self._thread.start()

    def _note(self, loop: asyncio.AbstractEventLoop, turn: _Turn) -> None:
        turn.at = time.monotonic()
        if self._turns.get(loop) is turn:
            loop.call_later(min(_LONGEST, self.hang_seconds / _TURNS), self._note, loop, turn)

    def _beat(self, stopped: threading.Event) -> None:
        pause = self._first
        while not stopped.wait(pause):
            with self._lock:
                for closed in [loop for loop in self._turns if loop.is_closed()]:
                    del self._turns[closed]
                if stopped.is_set() or not (self._turns or self._held):
                    if self._thread is threading.current_thread():
                        self._thread = None
                    return
                turns = list(self._turns.items())
            turning = self._turning(turns)
            if turning or self._held:
                pause = self._call(turning)

    def _turning(self, turns: list[tuple[asyncio.AbstractEventLoop, _Turn]]) -> set[asyncio.AbstractEventLoop]:
        """Return the loops that turn, and log which one began to hang."""
        turning = set()
        now = time.monotonic()
        for loop, turn in turns:
            stands = now - turn.at
            if stands < self.hang_seconds:
                turning.add(loop)
                turn.told = False
            elif self._log and not turn.told and loop.is_running():
                turn.told = True
                _log.error("the event loop stands for %.1f s; leases are not extended any more", stands)
        return turning


class _Turn:
    """The last turn of an event loop."""

    __slots__ = ("at", "told")

    def __init__(self, at: float) -> None:
        self.at = at
        """When it was, in seconds of the monotonic clock."""
        self.told = False
        """Whether it was logged that the loop hangs."""
