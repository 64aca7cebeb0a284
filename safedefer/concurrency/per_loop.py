"""State of event loops: one App may serve several at once, each in a thread of its own.

What belongs to a loop (futures, tasks, timers, batches) must not be used from another one: a wake-up is lost, or the
state that another loop waits for is dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from threading import RLock
from typing import Generic, TypeVar

_T = TypeVar("_T")


class PerLoop(Generic[_T]):
    """A state for each event loop that is not closed.

    Args:
        make: Makes the state of a loop that has none yet.
    """

    def __init__(self, make: Callable[[asyncio.AbstractEventLoop], _T]) -> None:
        self._make = make
        self._lock = RLock()
        self._states: dict[asyncio.AbstractEventLoop, _T] = {}

    def here(self) -> _T:
        """Return the state of the running loop."""
        loop = asyncio.get_running_loop()
        state = self._states.get(loop)
        return self._add(loop) if state is None else state

    def _add(self, loop: asyncio.AbstractEventLoop) -> _T:
        with self._lock:  # another loop may be added meanwhile, never this one
            for closed in [other for other in self._states if other.is_closed()]:
                del self._states[closed]
            state = self._states[loop] = self._make(loop)
        return state

    def all(self) -> list[tuple[asyncio.AbstractEventLoop, _T]]:
        """Return the loops, some of which may be closed since, and their states; from any thread."""
        with self._lock:
            return list(self._states.items())
