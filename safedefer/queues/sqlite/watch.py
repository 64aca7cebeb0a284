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
from typing import TYPE_CHECKING, Final

from safedefer.concurrency.forks import register_fork
from safedefer.queues.sqlite import bell, operations
from safedefer.queues.sqlite.connection import Handle
from safedefer.queues.sqlite.repair import BadValue

if TYPE_CHECKING:
    from collections.abc import Callable

INTERVAL: Final = 0.010
"""Seconds between two looks of who cannot hear the bell: what another process enqueues is noticed within about this time."""

RELAXED: Final = 0.100
"""Seconds between two looks of who can."""

_UNRUNG: Final = 3.0
"""Seconds of frequent looks after one that found a task that nobody rang for."""

_FALSE_ALARMS: Final = 3
"""Rings in a row that brought this process no task, after which the bell is not listened to until the next frequent look. Somebody
rings without cause, or other processes take the tasks, or they are of other queues."""

_ALERT: Final = 0.2
"""Seconds of asking SQLite at every look after the log changed: the log is written before its commit
is visible, by the time that an fsync takes."""

_BACKSTOP: Final = 0.1
"""Seconds after which SQLite is asked although the log looks the same (clocks of file systems are coarse)."""

_RELAXED_BACKSTOP: Final = 0.5
"""The same, of who can hear the bell."""


class FileWatch:
    """Knows the newest task, and wakes whoever waits for a newer one."""

    def __init__(self, path: str, *, busy_timeout: float, make_file: Callable[[], None] | None = None) -> None:
        self._path = path
        self._log_path = f"{path}-wal"
        self._bell_path = bell.bell_path(path)
        self._handle = Handle(path, busy_timeout=busy_timeout, make_file=make_file)
        self._forget()
        register_fork(self)

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._ears: set[bell.Ear] = set()
        self._wakes = self._wakes_seen = 0
        self._newest = self._seen = self._rung = 0
        self._log: tuple[int, int, int] | None = None
        self._version: int | None = None
        self._alert_until = 0.0
        self._next_look = 0.0
        self._often_until = 0.0
        self._alarms = 0
        self._came_for_task = False
        """Whether the last wait was ended by a task, and no lease has said yet whether this process could take one."""

    def announce(self, newest: int) -> None:
        """Take note of a task that this process enqueued, and let others know: once for all of one transaction."""
        with self._lock:
            told, self._rung = newest == self._rung, newest
            self.advance(newest)
        if not told:
            bell.ring(self._bell_path)

    def advance(self, newest: int) -> None:
        """Take note of a task that was enqueued, and end every wait of this process for it."""
        with self._lock:
            if newest > self._newest:
                self._newest = newest
                self._ring()

    def seen(self, newest: int, *, taken: int) -> None:
        """Take note that a lease has looked at the queue when ``newest`` was its newest task, and took ``taken`` tasks."""
        with self._lock:
            if taken:
                self._alarms = 0
            elif self._came_for_task:
                self._alarms += 1
            self._came_for_task = False
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
        with self._lock:  # a fork waits for it: the child closes all that was opened here
            ear = bell.listen(self._bell_path, self._owner())
            self._ears.add(ear)
            seen = (self._seen, self._wakes_seen)
        try:
            ear.wait(0.0, others=True)  # what was rung until now, the look finds that follows
            return self._wait(ear, seen, deadline)
        finally:
            with self._lock:
                ear.close()
                self._ears.discard(ear)

    def _wait(self, ear: bell.Ear, seen: tuple[int, int], deadline: float) -> bool:
        if self._alarms >= _FALSE_ALARMS:
            self._rest(ear, deadline - time.monotonic())
        rung, first = True, True
        while True:
            now = time.monotonic()
            often = ear.is_deaf or now < self._often_until
            found = self._look(now, rung=rung, backstop=_BACKSTOP if often else _RELAXED_BACKSTOP)
            with self._lock:
                if found and not rung:
                    self._often_until = now + _UNRUNG
                if not found and not first:
                    self._alarms = self._alarms + 1 if rung else 0
                first = False
                if self._newest > seen[0] or self._wakes > seen[1]:
                    self._came_for_task = self._newest > seen[0]
                    self._seen, self._wakes_seen = self._newest, self._wakes
                    return True
            left = deadline - now
            if left <= 0:
                return False
            if self._alarms >= _FALSE_ALARMS:
                rung = False
                self._rest(ear, left)
            else:
                often = ear.is_deaf or now < self._often_until  # a task that nobody rang for was found
                rung = ear.wait(min(left, INTERVAL if often else RELAXED), others=True)

    def _rest(self, ear: bell.Ear, left: float) -> None:
        """Wait until the next frequent look, and hear this process alone. One more ring without a task, and it rests again."""
        ear.wait(max(min(left, INTERVAL), 0.0), others=False)
        self._alarms = _FALSE_ALARMS - 1

    def _owner(self) -> int:
        try:
            return os.stat(self._path).st_uid  # noqa: PTH116 - a text, as everything here
        except OSError:  # it is made by who looks first
            return os.geteuid()

    def close(self, *, wait: bool = True) -> None:
        """Close the connection; see ``Handle.close``."""
        self._handle.close(wait=wait)

    def _ring(self) -> None:
        for ear in tuple(self._ears):
            ear.wake()

    def _look(self, now: float, *, rung: bool, backstop: float) -> bool:
        """Look for new tasks; return whether there are some.

        Args:
            now: The time, of the monotonic clock.
            rung: Whether SQLite is asked in any case.
            backstop: Seconds after this look at which it is asked in any case.
        """
        log = self._stat_log()
        if log != self._log:
            self._log = log
            self._alert_until = now + _ALERT
        elif not rung and now >= self._alert_until and now < self._next_look:
            return False
        self._next_look = now + backstop
        with self._handle.use() as connection:
            # None if this fails: another connection counts its changes anew.
            known, self._version = self._version, None
            version = connection.execute("PRAGMA data_version").get
            # First the version: what is committed between the two statements shows at the next look.
            try:
                newest = None if version == known else operations.newest_seq(connection)
            except BadValue:  # it is mended by whoever enqueues or leases next
                newest = None
            self._version = version
        if newest is None:
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
        """Close the connection, and let no thread open or close what it waits with."""
        self._handle.before_fork()
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on; the new connection's data version says nothing about the old one's."""
        self._version = None
        self._lock.release()
        self._handle.after_fork_in_parent()

    def after_fork_in_child(self) -> None:
        """Begin anew: no other thread waits here."""
        for ear in self._ears:  # its copies of them, with which nobody waits
            ear.close()
        self._forget()
        self._handle.after_fork_in_child()
