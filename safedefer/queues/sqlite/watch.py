"""Waiting for a task that any process enqueues.

SQLite does not notify other processes of a commit. Whoever enqueues rings a bell (``bell``), and whoever waits looks into the file when
it hears that, and now and then in any case: often where the bell cannot be heard, or after a task that nobody rang for, such as
one in a transaction of the user's own. A look is one ``stat`` of the write-ahead log, and only when that has changed, or every
so often, ``PRAGMA data_version``: the first costs about a microsecond, the second takes locks.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Final

from safedefer.concurrency.forks import register_fork
from safedefer.queues.sqlite import bell, operations
from safedefer.queues.sqlite.connection import Handle
from safedefer.queues.sqlite.repair import BadValue

INTERVAL: Final = 0.010
"""Seconds between two looks of who cannot hear the bell: what another process enqueues is noticed within about this time."""

RELAXED: Final = 0.100
"""Seconds between two looks of who can."""

_UNRUNG: Final = 3.0
"""Seconds of frequent looks after one that found a task that nobody rang for."""

_FALSE_ALARMS: Final = 3
"""Rings in a row without a task, after which the bell is not listened to until the next frequent look."""

_ALERT: Final = 0.2
"""Seconds of asking SQLite at every look after the log changed: the log is written before its commit
is visible, by the time that an fsync takes."""

_BACKSTOP: Final = 0.1
"""Seconds after which SQLite is asked although the log looks the same (clocks of file systems are coarse)."""


class FileWatch:
    """Knows the newest task, and wakes whoever waits for a newer one."""

    def __init__(self, path: str, *, busy_timeout: float) -> None:
        self._log_path = f"{path}-wal"
        self._bell_path = bell.bell_path(path)
        self._handle = Handle(path, busy_timeout=busy_timeout)
        self._forget()
        register_fork(self)

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._ears: set[bell.Ear] = set()
        self._wakes = self._wakes_seen = 0
        self._newest = self._seen = 0
        self._log: tuple[int, int, int] | None = None
        self._version: int | None = None
        self._alert_until = 0.0
        self._next_look = 0.0
        self._often_until = 0.0

    def announce(self, newest: int) -> None:
        """Take note of a task that this process enqueued, and let others know."""
        self.advance(newest)
        bell.ring(self._bell_path)

    def advance(self, newest: int) -> None:
        """Take note of a task that was enqueued, and end every wait of this process for it."""
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
        ear = bell.listen(self._bell_path)
        with self._lock:
            seen = (self._seen, self._wakes_seen)
            self._ears.add(ear)
        try:
            ear.wait(0.0, others=True)  # what was rung until now, the look finds that follows
            return self._wait(ear, seen, deadline)
        finally:
            with self._lock:
                self._ears.discard(ear)
            ear.close()

    def _wait(self, ear: bell.Ear, seen: tuple[int, int], deadline: float) -> bool:
        rung, alarms, first = True, 0, True
        while True:
            now = time.monotonic()
            found = self._look(now, rung=rung)
            if found and not rung:
                self._often_until = now + _UNRUNG
            alarms = alarms + 1 if rung and not found and not first else 0
            first = False
            with self._lock:
                if self._newest > seen[0] or self._wakes > seen[1]:
                    self._seen, self._wakes_seen = self._newest, self._wakes
                    return True
            left = deadline - now
            if left <= 0:
                return False
            often = ear.is_deaf or now < self._often_until or alarms >= _FALSE_ALARMS
            rung = ear.wait(min(left, INTERVAL if often else RELAXED), others=alarms < _FALSE_ALARMS)

    def close(self, *, wait: bool = True) -> None:
        """Close the connection; see ``Handle.close``."""
        self._handle.close(wait=wait)

    def _ring(self) -> None:
        while self._ears:
            self._ears.pop().wake()

    def _look(self, now: float, *, rung: bool) -> bool:
        """Look for new tasks; return whether there are some. ``rung`` says that SQLite is asked in any case."""
        log = self._stat_log()
        if log != self._log:
            self._log = log
            self._alert_until = now + _ALERT
        elif not rung and now >= self._alert_until and now < self._next_look:
            return False
        self._next_look = now + _BACKSTOP
        with self._handle.use() as connection:
            version = connection.execute("PRAGMA data_version").get
            if version == self._version:
                return False
            # First the version: what is committed between the two statements shows at the next look.
            self._version = version
            try:
                newest = operations.newest_seq(connection)
            except BadValue:  # it is mended by whoever enqueues or leases next
                return False
        before = self._newest
        self.advance(newest)
        return newest > before

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
        for ear in self._ears:  # its copies of them, with which nobody waits
            ear.close()
        self._forget()
