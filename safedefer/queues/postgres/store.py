"""The connections of the PostgreSQL queue, below queue, ledger, blobs and calls: opened lazily, per process and per loop.

``PostgresStore`` belongs to one ``PostgresQueue`` and survives forks. ``Connections`` are those of one process: the
pools of an event loop in a thread of its own, psycopg connections for threads that enqueue, and a listener. Within
``on_loop`` a caller's event loop has pools too.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import time
import weakref
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from safedefer.concurrency.plain_threads import PlainThread
from safedefer.errors import QueueUnavailable
from safedefer.queues.addresses import place
from safedefer.queues.postgres.errors import BROKEN, CONNECT_SECONDS, closed
from safedefer.queues.postgres.listener import Listener
from safedefer.queues.postgres.migrations import check_schema
from safedefer.queues.postgres.pgqueuer import STATEMENTS
from safedefer.queues.postgres.pools import Pools, Purpose
from safedefer.queues.postgres.producers import AGAIN_SECONDS, Producers
from safedefer.queues.postgres.statements import SQL
from safedefer.queues.postgres.watch import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

    from safedefer.queues.postgres.connection import Connection

_T = TypeVar("_T")


class Connections:
    """The open connections of one process.

    Args:
        dsn: The database.
        producers: Connections at most for threads that enqueue.
        workers: Connections at most for each purpose of the own event loop.
        watch: Told of new tasks once ``listen`` was called.

    Raises:
        QueueUnavailable: The database does not answer.
        ConfigurationError: It was not migrated.

    Attributes:
        producers: For threads that enqueue.
        pools: Those of the own event loop, which runs in a thread.
        marker: Names the database.
        lease_seconds: The length of a lease as the database has it.
    """

    marker: str
    lease_seconds: float

    def __init__(self, dsn: str, producers: int, workers: int, *, watch: Watch) -> None:
        self._dsn = dsn
        self.pools: Pools = Pools(dsn, workers)
        self.listener: Listener = Listener(dsn, watch)
        self._listening = False
        self._listen_task: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        try:
            self._thread = PlainThread(self._loop.run_forever)
        except RuntimeError as error:
            self._loop.close()
            raise QueueUnavailable(
                f"no thread can be started for the queue's connections ({error}); allow the process more threads"
            ) from error
        self.producers: Producers = Producers(dsn, producers, STATEMENTS.enqueue, SQL["stored"], SQL["uniques_free"])
        self._lock = threading.RLock()  # reentrant: a signal handler may defer at any point
        self._closed = False
        try:
            self.marker, self.lease_seconds = self.wait_for(self._start())
        except BaseException:
            self.close()
            raise

    async def _start(self) -> tuple[str, float]:
        return await self.pools.run(check_schema, purpose="durable")

    def wait_for(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine on the own loop, block until it ends, and return its result."""
        with self._lock:
            if self._closed:
                coroutine.close()
                raise closed(self._dsn)
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise closed(self._dsn) from None

    def run(
        self,
        action: Callable[[Connection], Awaitable[_T]],
        *,
        purpose: Purpose,
        transaction: bool,
        idempotent: bool = False,
    ) -> _T:
        """Do what ``Pools.run`` does, on the own loop, and block until it is done."""
        return self.wait_for(self.pools.run(action, purpose=purpose, transaction=transaction, idempotent=idempotent))

    async def transact(self, action: Callable[[Connection], Awaitable[_T]], /, *, purpose: Purpose) -> _T:
        """Run an action in a transaction on the own loop, awaited on the caller's loop.

        A transaction of several statements holds row locks between them. On the own loop no task can block it.
        """
        with self._lock:
            if self._closed:
                raise closed(self._dsn)
            running = self.pools.run(action, purpose=purpose, transaction=True)
            future = asyncio.run_coroutine_threadsafe(running, self._loop)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if future.cancelled() and (current is None or not current.cancelling()):
                raise closed(self._dsn) from None
            raise

    def listen(self) -> None:
        """Start to listen for new tasks, if that was not done."""
        if not self._listening:
            self._listening = True
            self._loop.call_soon_threadsafe(self._start_to_listen)

    def _start_to_listen(self) -> None:
        self._listen_task = self._loop.create_task(self.listener.run())

    def close(self) -> None:
        """Wait a while for running statements, and disconnect."""
        with self._lock:
            self._closed = True
        self.producers.close()
        with contextlib.suppress(*BROKEN, RuntimeError):
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(CONNECT_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        if self._thread.join(CONNECT_SECONDS):
            self._loop.close()

    async def _stop(self) -> None:
        if self._listen_task is not None:
            self._listen_task.cancel()
            await asyncio.gather(self._listen_task, return_exceptions=True)
        await self.pools.close()
        # Threads block in wait_for until their coroutine ends: cancel those that remain.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


@dataclass(slots=True)
class _LoopPools:
    """The pools of a caller's event loop."""

    pools: Pools
    process: int
    """The id of the process that created them."""
    users: int = 0
    """Entered ``on_loop`` contexts."""


class PostgresStore:
    """The connections of one ``PostgresQueue``, in whatever process and on whatever event loop it is used.

    Args:
        dsn: ``postgresql://user@host/database``.
        producers: Connections at most through which this process enqueues.
        workers: Connections at most for each purpose of each event loop, and of the store's own.

    Attributes:
        watch: Tells this process of new tasks.
        noted_lease_seconds: The length of a lease that this process has written into the database; None: none yet.
    """

    watch: Watch

    def __init__(self, dsn: str, *, producers: int, workers: int) -> None:
        self.dsn = dsn
        self._sizes = (producers, workers)
        self.noted_lease_seconds: float | None = None
        self._closed = False
        self._reset()
        _stores.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()  # as above
        self._connections: Connections | None = None
        self._loops: dict[asyncio.AbstractEventLoop, _LoopPools] = {}
        self._failed: tuple[float, QueueUnavailable | None] = (0.0, None)
        """When the last attempt to connect failed, and its error."""
        self.watch = Watch()

    def reset_in_child(self) -> None:
        """Forget the parent's connections after a fork; a reference is kept, since collecting them would end the sessions."""
        if self._connections is not None:
            _inherited.append(self._connections)
        _inherited.append(self._loops)
        self._reset()

    def __repr__(self) -> str:
        """Show the address, without user and password."""
        return f"{type(self).__name__}({place(getattr(self, 'dsn', ''))!r})"

    # --- Open and close ---

    @property
    def is_open(self) -> bool:
        """Whether ``open`` returns without blocking."""
        return self._connections is not None

    def open(self) -> Connections:
        """Return the connections of this process; connects and checks the tables first, if that was not done.

        Raises:
            QueueUnavailable: The database does not answer, or the store was closed.
            ConfigurationError: The database was not migrated.
        """
        asked = time.monotonic()
        with self._lock:
            if self._closed:
                raise closed(self.dsn)
            if self._connections is not None:
                return self._connections
            since, error = self._failed
            if error is not None and since >= asked:  # an attempt failed while this thread waited for the lock
                raise QueueUnavailable(str(error)) from error
            try:
                made = Connections(self.dsn, *self._sizes, watch=self.watch)
            except QueueUnavailable as again:
                self._failed = time.monotonic(), again
                raise
            kept = self._keep(made)
            if kept is not made:  # a signal handler has connected meanwhile
                made.close()
            return kept

    def _keep(self, made: Connections) -> Connections:
        if self._connections is None:
            self._connections = made
        return self._connections

    def open_patiently(self, seconds: float) -> Connections:
        """Do what ``open`` does, and wait so many seconds for a server that restarts."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.open()
            except QueueUnavailable:
                if self._closed or time.monotonic() >= deadline:
                    raise
            time.sleep(AGAIN_SECONDS)

    async def open_async(self) -> Connections:
        """Do what ``open`` does, in a thread where it blocks."""
        return self.open() if self.is_open else await asyncio.to_thread(self.open)

    def close(self) -> None:
        """Wait a while for running statements, and disconnect. Later calls raise ``QueueUnavailable``."""
        with self._lock:
            self._closed = True
            connections, self._connections = self._connections, None
            loops, self._loops = self._loops, {}
        for loop, entry in loops.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(entry.pools.terminate)
        self.watch.changed()
        if connections is not None:
            connections.close()

    # --- Run ---

    def run(
        self,
        action: Callable[[Connection], Awaitable[_T]],
        /,
        *,
        purpose: Purpose = "durable",
        transaction: bool = False,
        idempotent: bool = False,
    ) -> _T:
        """Do what ``Pools.run`` does, on the store's own loop, and block until it is done."""
        return self.open().run(action, purpose=purpose, transaction=transaction, idempotent=idempotent)

    @contextlib.asynccontextmanager
    async def on_loop(self) -> AsyncIterator[Pools]:
        """Keep pools of the running loop while the context lasts. Contexts may nest: the last one to end closes them."""
        loop = asyncio.get_running_loop()
        for other in list(self._loops):  # other threads add theirs meanwhile
            if other.is_closed() and (left := self._loops.pop(other, None)) is not None:
                left.pools.terminate()
        entry = self._loops.get(loop)
        if entry is None:
            entry = self._loops[loop] = _LoopPools(Pools(self.dsn, self._sizes[1]), os.getpid())
        entry.users += 1
        try:
            yield entry.pools
        finally:
            entry.users -= 1
            if not entry.users and entry.process == os.getpid():  # in a forked child they are the parent's
                if self._loops.get(loop) is entry:
                    del self._loops[loop]
                await entry.pools.close()

    @property
    def here(self) -> Pools | None:
        """The pools of the running loop, within ``on_loop``; else None."""
        entry = self._loops.get(asyncio.get_running_loop())
        return None if entry is None else entry.pools


_stores: Final[weakref.WeakSet[PostgresStore]] = weakref.WeakSet()
#: Connections of the parent process, never used again.
_inherited: Final[list[object]] = []


def _after_fork_in_child() -> None:
    for store in list(_stores):
        store.reset_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)


@atexit.register
def _close_all() -> None:
    for store in list(_stores):
        store.close()
