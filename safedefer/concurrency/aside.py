"""Coroutines beside the work: one thread with an event loop for each receiver, behind a bounded queue.

What is handed over comes from any thread and any event loop, and is awaited one after the other, in order. It is awaited in
no loop of the work: a coroutine that blocks would stand in the way of tasks, and several loops would lose the order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final, Generic, TypeVar

from safedefer.concurrency.forks import register_fork

_T = TypeVar("_T")

_log: Final = logging.getLogger("safedefer")

#: The most items that wait for one receiver.
MOST_WAITING: Final = 1000
#: Seconds between two log lines about items that were dropped.
_DROPS_EVERY: Final = 60.0
#: Seconds for which a receiver stays awake after its last item.
_REST_SECONDS: Final = 0.005
#: Seconds that a cancelled receiver has to end.
_CANCEL_SECONDS: Final = 0.5

_left_by_forks: Final[list[object]] = []
"""Loops of the parent. Closing one in the child would change the parent's, with which it shares its selector."""


class Aside(Generic[_T]):
    """Calls a receiver with items and awaits what it returns, in a daemon thread that starts with the first item.

    What the receiver raises is logged. A forked child has a thread of its own, and leaves what waits to its parent.

    Args:
        receive: The receiver.
        discard: Called with an item that is dropped.
        most: The most items that wait; another one is dropped, counted and logged, at most once a minute.
        clock: Returns seconds that only grow.
    """

    def __init__(
        self,
        receive: Callable[[_T], Awaitable[object]],
        *,
        discard: Callable[[_T], object] | None = None,
        most: int = MOST_WAITING,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._receive = receive
        self._discard = discard
        self._most = most
        self._clock = clock
        self.dropped: int = 0
        """How many items were dropped so far."""
        self._told: tuple[float, int] | None = None
        """When drops were logged last, and how many there were then."""
        self._closed = False
        self._begin_anew()
        register_fork(self)

    def _begin_anew(self) -> None:
        self._changed = threading.Condition()  # reentrant: a signal handler may hand something over at any point
        self._items: deque[_T] = deque()
        self._busy = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._task: asyncio.Task[Any] | None = None
        self._wake = asyncio.Event()
        self._woken = False

    def put(self, item: _T) -> None:
        """Hand an item over, from any thread. Never waits.

        Raises:
            RuntimeError: No thread can be started.
        """
        with self._changed:
            if taken := not self._closed and len(self._items) < self._most:
                if self._loop is None:
                    self._start()
                self._items.append(item)
                self._wake_up()
        if not taken:
            self._drop(item)

    def flush(self, seconds: float) -> bool:
        """Wait until everything was received, for ``seconds`` at most; return whether it was. Not from the receiver."""
        if self._thread is threading.current_thread():
            return False
        seconds = max(0.0, seconds)
        with self._changed:
            return self._changed.wait_for(lambda: not self._items and not self._busy, seconds)

    def close(self, seconds: float) -> None:
        """Flush for ``seconds`` at most, end the thread, and drop what comes later."""
        flushed = self.flush(seconds)
        with self._changed:
            self._closed = True
            lost, thread, loop, task = len(self._items), self._thread, self._loop, self._task
            left, self._items = list(self._items), deque()
            if loop is not None:
                self._wake_up()
        for item in left:
            if self._discard is not None:
                self._discard(item)
        if not flushed and thread is not None:
            _log.warning("an observer did not end in time; it lost %d events that waited", lost)
            if loop is not None and task is not None:
                with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                    loop.call_soon_threadsafe(task.cancel)
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CANCEL_SECONDS)

    def _start(self) -> None:
        """Start the thread. Hold the lock."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._run, args=(loop,), name="safedefer-observer", daemon=True)
        # First: Ctrl-C may come when it runs, and there must be one only.
        self._loop, self._thread = (loop, thread) if self._loop is None else (self._loop, self._thread)
        if self._loop is not loop:  # a signal handler has started one in between
            loop.close()
            return
        try:
            thread.start()
        except RuntimeError:
            self._loop = self._thread = None
            loop.close()
            raise

    def _wake_up(self) -> None:
        """Wake the loop, unless it is woken already. Hold the lock."""
        if not self._woken and self._loop is not None:
            self._woken = True
            self._loop.call_soon_threadsafe(self._wake.set)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:  # its end cancels what the receiver started
            try:
                runner.run(self._work())
            except asyncio.CancelledError:
                pass  # by close
            finally:
                with self._changed:
                    self._closed, self._loop, self._busy = True, None, False
                    self._changed.notify_all()

    async def _work(self) -> None:
        self._task = asyncio.current_task()
        rested = True
        while True:
            with self._changed:
                self._busy = bool(self._items)
                waiting = [self._items.popleft()] if self._items else []
                if not waiting:
                    self._changed.notify_all()
                    if self._closed:
                        return
                    if rested:
                        self._woken = False
                        self._wake.clear()
            if waiting:
                rested = False
                await self._hand_over(waiting.pop())
            elif rested:
                await self._wake.wait()
            else:
                # While it is awake nobody needs to wake it, which costs more than handing over.
                rested = True
                await asyncio.sleep(_REST_SECONDS)

    async def _hand_over(self, item: _T) -> None:
        try:
            await self._receive(item)
        except BaseException as error:  # the next item comes after any error of a receiver
            if isinstance(error, asyncio.CancelledError) and self._closed:
                raise
            _log.exception("an observer failed; mend it")

    def _drop(self, item: _T) -> None:
        if self._discard is not None:
            self._discard(item)
        now = self._clock()
        with self._changed:
            self.dropped += 1
            before = self._told
            if self._closed or (before is not None and now - before[0] < _DROPS_EVERY):
                return
            new = self.dropped - (0 if before is None else before[1])
            self._told = now, self.dropped
        _log.warning("an observer is too slow: %d events wait for it, and %d were dropped", self._most, new)

    def before_fork(self) -> None:
        """Let no item be half handed over."""
        self._changed.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._changed.release()

    def after_fork_in_child(self) -> None:
        """Begin anew, without thread and items."""
        left: tuple[Any, ...] = self._loop, self._task, self._items, self._thread
        _left_by_forks.append(left)
        self._begin_anew()


def of_awaitables() -> Aside[Awaitable[object]]:
    """Return what awaits the results of calls. A coroutine that is dropped is closed, else it warns that nobody awaited it."""
    return Aside(_await, discard=_discard)


async def _await(result: Awaitable[object]) -> None:
    await result


def _discard(result: Awaitable[object]) -> None:
    if asyncio.iscoroutine(result):
        result.close()
