"""Waiting for a task that any process enqueues.

SQLite does not notify other processes of a commit, so this polls. A poll is one ``stat`` of
the write-ahead log, and only when that has changed, or every so often, ``PRAGMA data_version``: the
first costs about a microsecond, the second takes locks.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Final

from safedefer.concurrency.forks import register_fork
from safedefer.queues.sqlite import operations
from safedefer.queues.sqlite.connection import Handle
from safedefer.queues.sqlite.repair import BadValue

INTERVAL: Final = 0.010
"""Seconds between two looks: what another process enqueues is noticed within about this time."""

_ALERT: Final = 0.2
"""Seconds of asking SQLite at every look after the log changed: the log is written before its commit
is visible, by the time that an fsync takes."""

_BACKSTOP: Final = 0.1
"""Seconds after which SQLite is asked although the log looks the same (clocks of file systems are coarse)."""


class FileWatch:
    """Knows the newest task, and wakes whoever waits for a newer one."""

    def __init__(self, path: str, *, busy_timeout: float) -> None:
        self._log_path = f"{path}-wal"
        self._handle = Handle(path, busy_timeout=busy_timeout)
        self._forget()
        register_fork(self)

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._bells: set[threading.Lock] = set()
        self._wakes = self._wakes_seen = 0
        self._newest = self._seen = 0
        self._log: tuple[int, int, int] | None = None
        self._version: int | None = None
        self._alert_until = 0.0
        self._next_look = 0.0

    def advance(self, newest: int) -> None:
        """Take note of a task that was enqueued, and end every wait for it."""
        with self._lock:
            if newest > self._newest:
                self._newest = newest
                self._ring()

    def seen(self, newest: int) -> None:
        """Take note that a lease has looked at the queue when ``newest`` was its newest task."""
        with self._lock:
            self._newest = max(self._newest, newest)
            self._seen = max(self._seen, newest)

    def wake(self) -> None:
        """End the waits of this process; if there is none, the next one."""
        with self._lock:
            self._wakes += 1
            self._ring()

    def wait(self, timeout: float) -> bool:
        """Block until there is a newer task than those seen, or for ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        bell = threading.Lock()
        bell.acquire()
        with self._lock:
            seen = (self._seen, self._wakes_seen)
            self._bells.add(bell)
        try:
            while True:
                self._look(time.monotonic())
                with self._lock:
                    if self._newest > seen[0] or self._wakes > seen[1]:
                        self._seen, self._wakes_seen = self._newest, self._wakes
                        return True
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                bell.acquire(timeout=min(left, INTERVAL))
        finally:
            with self._lock:
                self._bells.discard(bell)

    def close(self, *, wait: bool = True) -> None:
        """Close the connection; see ``Handle.close``."""
        self._handle.close(wait=wait)

    def _ring(self) -> None:
        while self._bells:
            self._bells.pop().release()

    def _look(self, now: float) -> None:
        log = self._stat_log()
        if log != self._log:
            self._log = log
            self._alert_until = now + _ALERT
        elif now >= self._alert_until and now < self._next_look:
            return
        self._next_look = now + _BACKSTOP
        with self._handle.use() as connection:
            version = connection.execute("PRAGMA data_version").get
            if version == self._version:
                return
            # First the version: what is committed between the two statements shows at the next look.
            self._version = version
            try:
                newest = operations.newest_seq(connection)
            except BadValue:  # it is mended by whoever enqueues or leases next
                return
        self.advance(newest)

    def _stat_log(self) -> tuple[int, int, int]:
        try:
            status = os.stat(self._log_path)  # noqa: PTH116 - 100 times a second, and Path costs twice as much
        except OSError:
            return (0, 0, 0)
        return status.st_ino, status.st_size, status.st_mtime_ns

    def before_fork(self) -> None:
        """Close the connection."""
        self._handle.before_fork()

    def after_fork_in_parent(self) -> None:
        """Go on; the new connection's data version says nothing about the old one's."""
        self._handle.after_fork_in_parent()
        self._version = None

    def after_fork_in_child(self) -> None:
        """Begin anew: no other thread waits here."""
        self._handle.after_fork_in_child()
        self._forget()
