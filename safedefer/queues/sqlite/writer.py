"""The one writer: concurrent operations share a transaction, and so one fsync (group commit).

A caller that nobody competes with runs its operation itself, which saves two changes of threads. Its thread must not
come back here before that ends: only this thread could end it. Signal handlers run at any point of the main thread, and
may defer. So where one is installed, the main thread leaves its operations to the writer's, and hands them over without a lock:
the writer would wait for one that the main thread holds further up its stack.

What must survive a power cut is synced. What need not be (a lease, a run that begins: the task is due
again, and the ledger of what ended is synced) waits for the next sync: the log is one, and keeps its order.
"""

from __future__ import annotations

import os
import signal
import threading

# As `signal.getsignal`, which takes fifty times as long to make a member of an enum of each answer.
from _signal import getsignal  # type: ignore[import-not-found]
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, TypeVar

from safedefer.concurrency.forks import register_fork
from safedefer.concurrency.per_loop import PerLoop
from safedefer.concurrency.plain_threads import PlainThread
from safedefer.concurrency.results import LoopResults
from safedefer.errors import QueueUnavailable
from safedefer.queues.sqlite.batch import Batch, Operation, Synced
from safedefer.queues.sqlite.connection import Handle, forked

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    import apsw

T = TypeVar("T")

#: The most operations in one transaction: bounds how long another process waits for the lock.
_BATCH: Final = 256
_CLOSED: Final = "the queue is closed; open a new one"

#: Handlers that run no code of the application.
_HARMLESS: Final = frozenset({None, signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler})
_SIGNALS: Final = tuple(map(int, signal.valid_signals()))


class Writer:
    """Runs operations on one connection: in the thread of a lone caller, else in one that is started when there is work."""

    def __init__(self, path: str, *, busy_timeout: float) -> None:
        self._handle = Handle(path, busy_timeout=busy_timeout)
        self._synced = Synced()
        self._results: PerLoop[LoopResults] = PerLoop(LoopResults)
        self._begin()
        register_fork(self)

    def _begin(self) -> None:
        self._pending: SimpleQueue[tuple[Operation, bool] | None] = SimpleQueue()
        """What is to be done, and whether it is urgent; None wakes the thread, which then sees that it is to end."""
        self._urgent: deque[Operation] = deque()
        """Those that others wait for, which the thread has taken."""
        self._others: deque[Operation] = deque()
        self._was_urgent = False
        """Whether the last transaction was of urgent ones."""
        self._serving = threading.Lock()
        """Held by the thread that does it, and by one that forks: of several that were started, one goes on."""
        self._server = 0
        self._forks = 0
        self._started = -1
        """The number of forks when the thread was started: each of them ends it."""
        self._pid = 0
        self._closed = False
        self._ended = False
        """Whether nothing is done any more: who hands something over after that has to take it back."""
        self._forker = 0
        """The thread that forks the process; 0: none."""

    def run(self, action: Callable[[apsw.Connection], T], *, durable: bool = True) -> T:
        """Run ``action`` in a transaction, and return its result once that is committed.

        Without ``durable`` a power cut (not a crash) may undo it, as long as nothing durable came after.

        Raises what ``action`` raised, its changes undone, or ``QueueUnavailable``.
        """
        answer = _Waiter()
        operation: Operation = (action, answer.take, durable)
        if self._is_free():
            Batch(self._handle, self._synced, [operation]).run_here()
        else:
            self._put(operation)
        result: T = answer.wait()
        return result

    @property
    def connections(self) -> int:
        """How many connections it has opened so far."""
        return self._handle.connections

    @property
    def failures(self) -> int:
        """How many of them the disk made unusable."""
        return self._handle.failures

    def make_file(self) -> None:
        """Make the file in the writer's thread, where a signal handler could interrupt this one: it would wait for what is half made."""
        if _is_interruptible() and self._handle.is_unmade:
            self.run(lambda _connection: None)

    def _is_free(self) -> bool:
        """Whether this thread can run an operation itself. Two that ask at once take turns at the connection."""
        if self._handle.in_use_here or self._forker == threading.get_ident():
            # A finalizer, a log handler or a signal handler, within an operation or a fork: it cannot be waited for.
            raise QueueUnavailable(
                "the queue was called from within one of its own operations, or a fork; call it later"
            )
        self._check()
        free = self._is_idle and not (self._forker or self._handle.in_use)
        return free and not _is_interruptible()

    def submit(self, action: Callable[[apsw.Connection], T], *, durable: bool = True) -> Future[T]:
        """Have ``action`` run, and return at once; the future is completed after the commit."""
        future: Future[T] = Future()
        self._put((action, partial(_complete, future), durable))
        return future

    def call(
        self, action: Callable[[apsw.Connection], T], *, durable: bool = True, urgent: bool = False
    ) -> asyncio.Future[T]:
        """As ``submit``, with a future of the running event loop. Cancelling it does not stop the action.

        ``urgent``: it goes before what is not, in a transaction of its own.
        """
        results = self._results.here()
        future: asyncio.Future[T] = results.loop.create_future()
        self._put((action, partial(results.put, future), durable), urgent=urgent)
        return future

    def _put(self, operation: Operation, *, urgent: bool = False) -> None:
        self._check()
        self._pending.put((operation, urgent))
        if self._ended:
            self._refuse(_CLOSED)
        elif self._started != self._forks:
            self._start()

    def _check(self) -> None:
        if self._closed:
            raise QueueUnavailable(_CLOSED)
        if self._pid not in {0, os.getpid()}:
            raise forked(self._handle.path)

    def close(self, *, wait: bool = True) -> None:
        """Finish what was submitted, then close the connection. Later operations are refused.

        Without ``wait``, the writer's own thread does so after this returned; see ``Handle.close``.
        """
        self._closed = True
        self._pending.put(None)
        is_within = self._handle.in_use_here or self._server == threading.get_ident()
        if wait and not is_within and self._pid in {0, os.getpid()}:
            self._work(wait=True)
        elif not self._serving.locked():
            self._handle.close(wait=False)

    def _start(self) -> None:
        """Start the thread. One too many ends at once: a signal handler may start one in the middle of this."""
        forks, self._pid = self._forks, os.getpid()
        try:
            # As a daemon: a process that forgets close() ends all the same, and what was acknowledged is stored.
            PlainThread(self._work)
        except RuntimeError as error:
            self._refuse(f"no thread can be started to write to the queue ({error}); allow the process more threads")
        else:
            self._started = forks

    def _work(self, *, wait: bool = False) -> None:
        serving = self._serving
        if not serving.acquire(blocking=wait):
            return
        self._server = threading.get_ident()
        try:
            while batch := self._next_batch():
                Batch(self._handle, self._synced, batch).run()
            if self._closed and not self._forker:
                self._ended = True
                self._refuse(_CLOSED)
                # Here and not in close(): the garbage collector may call that one within this thread.
                self._handle.close()
        finally:
            self._server = 0
            serving.release()

    @property
    def _is_idle(self) -> bool:
        return self._pending.empty() and not (self._urgent or self._others)

    def _next_batch(self) -> list[Operation]:
        """Return what is to be done next, after a wait if needed; nothing if the thread is to end."""
        while not self._forker and not (self._closed and self._is_idle):
            if not (self._urgent or self._others):
                self._sort(self._pending.get())
            self._handle.wait()  # for a lone caller: operations gather meanwhile
            self._sort_all()
            # In turn, where both come all the time.
            self._was_urgent = bool(self._urgent) and not (self._was_urgent and self._others)
            source = self._urgent if self._was_urgent else self._others
            if source:
                return [source.popleft() for _ in range(min(_BATCH, len(source)))]
        return []

    def _sort(self, taken: tuple[Operation, bool] | None) -> None:
        if taken is not None:
            operation, urgent = taken
            (self._urgent if urgent else self._others).append(operation)

    def _sort_all(self) -> None:
        with suppress(Empty):
            for _ in range(self._pending.qsize()):
                self._sort(self._pending.get_nowait())

    def _refuse(self, why: str) -> None:
        self._sort_all()
        for operations in (self._urgent, self._others):
            with suppress(IndexError):  # there are no more
                while True:
                    _, answer, _ = operations.popleft()
                    answer(None, QueueUnavailable(why))  # one for each caller: a traceback belongs to one thread

    def before_fork(self) -> None:
        """End the thread after its batch: the child has no copy of it."""
        self._forker = threading.get_ident()
        if self._server != self._forker:
            if self._serving.locked():
                self._pending.put(None)
            self._serving.acquire()
        self._handle.before_fork()

    def after_fork_in_parent(self) -> None:
        """Go on with what is pending."""
        self._handle.after_fork_in_parent()
        if self._server != self._forker:
            self._serving.release()
        self._forker, self._forks = (
            0,
            self._forks + 1,
        )  # in this order: who sees the new number starts a thread that stays
        if not self._ended and (self._closed or not self._is_idle):
            self._start()

    def after_fork_in_child(self) -> None:
        """Begin with nothing: what is pending is the parent's."""
        closed = self._closed
        self._begin()
        self._closed = closed
        self._handle.after_fork_in_child()


class _Waiter:
    """What one thread waits for. A signal handler may run meanwhile, and wait for an answer of its own."""

    __slots__ = ("_failure", "_result", "_there")

    def __init__(self) -> None:
        self._there = threading.Lock()
        self._there.acquire()
        self._result: Any = None
        self._failure: BaseException | None = None

    def take(self, result: object, failure: BaseException | None) -> None:
        """Let the thread go on."""
        self._result, self._failure = result, failure
        self._there.release()

    def wait(self) -> Any:
        """Wait for the result, and return or raise it."""
        self._there.acquire()
        failure, self._failure = self._failure, None
        if failure is None:
            return self._result
        try:
            raise failure
        finally:
            del failure  # its traceback refers to this frame: only the garbage collector would free the two


def _complete(future: Future[Any], result: object, failure: BaseException | None) -> None:
    if failure is None:
        future.set_result(result)
    else:
        future.set_exception(failure)


def _is_interruptible() -> bool:
    """Whether a signal handler of the application may run in this thread, between any two of its steps."""
    if threading.get_ident() != threading.main_thread().ident:
        return False
    try:
        return not _HARMLESS.issuperset(map(getsignal, _SIGNALS))
    except TypeError:  # a handler without a hash is none of these
        return True
