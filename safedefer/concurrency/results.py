"""Results of threads for an event loop: all that are ready go to it in one wake-up."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any


class LoopResults:
    """Hands results of threads over to one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._done: deque[tuple[asyncio.Future[Any], Any, BaseException | None]] = deque()
        self._told = False
        self.watched = False
        """Whether the loop looks by itself, within a millisecond, for what was added."""

    def put(self, future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
        """Hand over the result or error of a call, from any thread."""
        self.add(future, result, error)
        self.tell()

    def add(self, future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
        """Hand it over without waking the loop: the caller does so soon, or the loop looks by itself."""
        self._done.append((future, result, error))

    def tell(self) -> None:
        """Have the loop deliver what was added, from any thread."""
        if not self._told:
            self._told = True
            with contextlib.suppress(RuntimeError):  # the loop is closed, and no caller waits
                self.loop.call_soon_threadsafe(self.deliver)

    def deliver(self) -> None:
        """Complete the futures of what was added, in their loop."""
        # First: a result appended from now on is either taken below, or its thread schedules another delivery.
        self._told = False
        while self._done:
            future, result, error = self._done.popleft()
            if future.done():  # cancelled
                continue
            if error is None:
                future.set_result(result)
            elif isinstance(error, asyncio.CancelledError):
                future.cancel()
            elif isinstance(error, StopIteration):  # a future cannot carry it
                failure = RuntimeError("the call raised StopIteration")
                failure.__cause__ = error
                future.set_exception(failure)
            else:
                future.set_exception(error)
