"""Threads for calls that may block, with few wake-ups.

A call has a thread to itself while it runs, as with any executor. The costly part is waking threads and event
loops. So a thread that is awake takes the next waiting call itself; it wakes a second thread when it begins a call
while others wait; and all results that are ready go back to the event loop in one wake-up.

While calls are brief, one thread makes those that wait one after the other, and wakes the loop after the last of them. The
loop looks every millisecond whether a call has ended meanwhile. If none has, it takes what results there are, and other threads
take the calls that wait, as they do while calls are longer. A loop that is blocked, maybe by what waits for one of these calls, does
not look: then a thread does so, some twenty times a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any, Final, Protocol, TypeVar

from safedefer.concurrency.forks import register_fork
from safedefer.concurrency.per_loop import PerLoop
from safedefer.concurrency.plain_threads import PlainThread
from safedefer.concurrency.results import LoopResults

_T = TypeVar("_T")

#: Seconds that an idle thread waits for a call before it ends.
_LINGER: Final = 0.1
#: Calls that take so many seconds of late, on average, are brief: one thread makes as many as an event loop can handle.
_BRIEF: Final = 0.00025
#: Seconds between two looks at brief calls: so long the others wait for one that lasts.
_LOOK: Final = 0.001
#: Seconds between two looks in place of a loop that is blocked, and how many of them without a call end the thread.
_LOOK_ASIDE: Final = 0.05
_LOOKS_ASIDE: Final = 20
#: One in so many: the weight of a call in the average.
_OF_LATE: Final = 16
#: Seconds after which a thread that could not be started is asked for again.
_AGAIN: Final = 0.1


class InThread(Protocol):
    """Runs calls that may block."""

    def __call__(self, call: Callable[[], _T], /) -> asyncio.Future[_T]:
        """Return a future of what the call returns or raises."""
        ...


class Threads:
    """Runs calls of event loops in threads.

    Args:
        most: The most threads.
        name: The prefix of their names.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._closed = False
        self._begin()
        register_fork(self)

    def _begin(self) -> None:
        # Of one thread each, which stays, with what the code of tasks keeps for it (Django's connections, say), and which the
        # interpreter ends. One of many threads would count them wrong for good where one does not start.
        self._executors: set[ThreadPoolExecutor] = set()
        self._resting: list[ThreadPoolExecutor] = []
        """Those whose thread has returned, or is about to."""
        self._lock = Lock()
        self._calls: deque[_Call] = deque()
        self._awake = 0
        """The number of threads that have not returned: busy, idle, or woken."""
        self._idle = 0
        """The number of them that wait and were not woken."""
        self._waking = False
        """Whether a woken thread has not taken a call yet."""
        self._alarm: SimpleQueue[None] = SimpleQueue()
        self._again_at = 0.0
        """When a thread that could not be started is asked for again, by the monotonic clock."""
        self._results: PerLoop[LoopResults] = PerLoop(LoopResults)
        self._takes = _LOOK
        """Seconds that a call takes, of late."""
        self._ended = 0
        """How many calls have ended."""
        self._looks_aside = False
        """Whether a thread looks in place of loops that are blocked."""

    def __call__(self, call: Callable[[], _T], /) -> asyncio.Future[_T]:
        """Return a future of the result of ``call``. Cancelling it cancels a call that has not begun.

        Raises:
            RuntimeError: ``close`` was called, or no thread can be started and none is there.
        """
        results = self._results.here()
        future: asyncio.Future[_T] = results.loop.create_future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the threads were let go of")
            self._calls.append((call, future, results))
            if self._is_brief and not results.watched:
                results.watched = True
                results.loop.call_later(_LOOK, self._look, results, self._ended)
            try:
                if self._is_brief and self._awake > self._idle:
                    self._begin_to_look_aside()
                else:
                    self._wake_one()
            except RuntimeError:
                self._calls.pop()  # its caller gets the error: it must not run later
                raise
        return future

    def before_fork(self) -> None:
        """Go on: the child takes nothing over."""

    def after_fork_in_parent(self) -> None:
        """Go on."""

    def after_fork_in_child(self) -> None:
        """Begin anew: the threads and the calls are the parent's."""
        self._begin()

    def add_one(self) -> None:
        """Allow one thread more: a call does not return, and its thread is replaced."""
        with self._lock:
            self._most += 1
            if self._calls:
                self._wake_one()

    def remove_one(self) -> None:
        """Allow one thread less: the call has returned after all. A thread too many ends before its next call."""
        with self._lock:
            self._most -= 1

    def close(self, *, wait: bool, cancel: bool = False) -> None:
        """Take no more calls. ``cancel``: cancel the ones that have not begun. ``wait``: wait for the others."""
        with self._lock:
            self._closed = True
            if cancel:
                for _, future, results in self._calls:
                    results.put(future, None, asyncio.CancelledError())
                self._calls.clear()
            for _ in range(self._idle):
                self._alarm.put(None)
            self._idle = 0
            executors = [*self._executors]
        for executor in executors:
            executor.shutdown(wait=wait)

    def _wake_one(self) -> None:
        """Wake or start a thread for the waiting calls, unless all are busy or one is woken already. Hold the lock.

        Where the system gives no thread more, those that are there take the calls, and another one is asked for a little later:
        they may be busy for hours.
        """
        if self._waking:
            return
        if self._idle:
            self._idle -= 1
            self._waking = True
            self._alarm.put(None)
        elif self._awake < self._most:
            if self._closed:
                return  # it may be waited for: those that are awake take the calls
            resting = self._resting
            executor = resting.pop() if resting else ThreadPoolExecutor(1, f"{self._name}-{len(self._executors)}")
            try:
                executor.submit(self._work, executor)
            except RuntimeError:
                if not self._awake:
                    raise
                self._ask_again()
                return
            self._executors.add(executor)
            self._awake += 1
            self._waking = True

    @property
    def _is_brief(self) -> bool:
        return self._takes < _BRIEF

    def _look(self, results: LoopResults, ended: int) -> None:
        """Look, in the event loop, whether any call has ended since ``ended`` was counted; else let none wait for another."""
        with self._lock:
            if self._ended == ended and self._awake > self._idle:
                self._let_none_wait()
            results.watched = self._is_brief and self._awake > self._idle
            ended = self._ended
        results.deliver()  # last: what a thread adds from now on, it tells of
        if results.watched:
            results.loop.call_later(_LOOK, self._look, results, ended)

    def _let_none_wait(self) -> None:
        """Have other threads take the calls that wait: the one under way lasts. Hold the lock."""
        self._takes = max(self._takes, _LOOK)
        if self._calls:
            self._wake_one()

    def _begin_to_look_aside(self) -> None:
        """Have a thread look too, from now on. Hold the lock."""
        if not self._looks_aside:
            with contextlib.suppress(RuntimeError):  # no thread can be started: the loop looks
                PlainThread(self._look_aside)
                self._looks_aside = True

    def _look_aside(self) -> None:
        ended, idle = -1, 0
        while idle < _LOOKS_ASIDE:
            time.sleep(_LOOK_ASIDE)
            with self._lock:
                if self._ended != ended:
                    ended, idle = self._ended, -1
                elif self._calls:
                    with contextlib.suppress(RuntimeError):  # at the interpreter's end no thread is started
                        self._let_none_wait()
                idle += 1
                if idle == _LOOKS_ASIDE:
                    self._looks_aside = False

    def _ask_again(self) -> None:
        now = time.monotonic()
        if now >= self._again_at:
            self._again_at = now + _AGAIN
            loop = self._calls[0][2].loop
            with contextlib.suppress(RuntimeError):  # the loop is closed: its calls need not run
                loop.call_soon_threadsafe(loop.call_later, _AGAIN, self._wake_again)

    def _wake_again(self) -> None:
        with self._lock:
            self._again_at = 0.0
            if self._calls:
                self._wake_one()

    def _rest(self, executor: ThreadPoolExecutor) -> None:
        """Count this thread out. Hold the lock: counted out and not resting, it would be replaced for good."""
        self._awake -= 1
        self._resting.append(executor)

    def _work(self, executor: ThreadPoolExecutor) -> None:
        arrived = True
        while (taken := self._take(executor, arrived=arrived)) is not None:
            arrived = False
            call, future, results = taken
            if not future.cancelled():
                began = time.monotonic()
                try:
                    results.add(future, call(), None)
                except BaseException as error:  # noqa: BLE001  # the caller gets any error
                    results.add(future, None, error)
                self._takes += (time.monotonic() - began - self._takes) / _OF_LATE
            self._ended += 1
            if not (self._is_brief and results.watched and self._calls):
                results.tell()
            del call, future, results, taken  # they may be large, and the thread may wait long for the next call

    def _take(self, executor: ThreadPoolExecutor, *, arrived: bool) -> _Call | None:
        """Return the next call, after a wait if needed; None if the thread is to end."""
        while True:
            with self._lock:
                if arrived:
                    self._waking = False
                if self._awake > self._most:
                    self._rest(executor)
                    if self._calls:
                        self._wake_one()
                    return None
                if self._calls:
                    taken = self._calls.popleft()
                    if self._calls and not (self._is_brief and taken[2].watched):
                        self._wake_one()
                    return taken
                if self._closed:
                    self._rest(executor)
                    return None
                self._idle += 1
            if not self._is_woken(executor):
                return None
            arrived = True

    def _is_woken(self, executor: ThreadPoolExecutor) -> bool:
        """Wait for a call. Return False, and count this thread out, if none came in time."""
        try:
            self._alarm.get(timeout=_LINGER)
        except Empty:
            with self._lock:
                if self._idle:
                    self._idle -= 1
                    self._rest(executor)
                    return False
            # All idle threads have been woken, this one too: its alarm is in the queue, or about to be.
            self._alarm.get()
        return True


_Call = tuple[Callable[[], Any], "asyncio.Future[Any]", LoopResults]
