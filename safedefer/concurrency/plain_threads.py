"""Threads that a signal handler can wait for, wherever it has interrupted the main thread.

A ``threading.Thread`` takes a lock of its module when it begins. The main thread may hold that: it lists threads, or starts one.
"""

from __future__ import annotations

import sys
import threading
from _thread import start_new_thread
from collections.abc import Callable


class PlainThread:
    """Runs a function in a daemon thread, from now on.

    Raises:
        RuntimeError: The system gives the process no thread more.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._ended = threading.Lock()
        self._ended.acquire()
        start_new_thread(self._run, ())

    def _run(self) -> None:
        # As `threading.Thread` does: debuggers and coverage follow.
        sys.settrace(threading.gettrace())
        sys.setprofile(threading.getprofile())
        try:
            self._work()
        finally:
            self._ended.release()

    def join(self, seconds: float) -> bool:
        """Wait for its end, once; return whether it has ended."""
        return self._ended.acquire(timeout=seconds)
