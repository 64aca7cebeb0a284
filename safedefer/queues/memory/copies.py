"""Copies of tasks that a push engine has taken and may lose, in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safedefer.queues import copies
from safedefer.queues.base import Copy

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence

    from safedefer.queues.base import QueuedTask
    from safedefer.queues.memory.ledger import MemoryLedger


class MemoryCopies:
    """``Copies`` in memory, under the lock of its queue."""

    def __init__(self, lock: threading.Condition, ledger: MemoryLedger) -> None:
        self._lock = lock
        self._ledger = ledger
        self._copies: dict[tuple[str, str], tuple[float, int, str]] = {}
        """When each is due, the looks at it, and its task."""

    def put_many(self, tasks: Sequence[QueuedTask], /) -> None:
        """Store copies."""
        with self._lock:
            for task in tasks:
                self._copies[task.audience, task.id] = copies.first_look(task), 0, copies.dump(task)

    def look(self, *, now: float, limit: int) -> tuple[int, Sequence[Copy]]:
        """Look at copies that are due."""
        found = []
        with self._lock:
            due = sorted((each[0], key) for key, each in self._copies.items() if each[0] <= now)[:limit]
            for _, key in due:
                _, looks, task = self._copies[key]
                known = self._ledger.known(key, now)
                if known is not None and known.ended:
                    del self._copies[key]
                    continue
                self._copies[key] = now + copies.wait(looks), looks + 1, task
                if known is None or not known.running:
                    found.append(Copy(*key, looks, task))
        return len(due), found

    def put_off(self, keys: Sequence[tuple[str, str]], /, *, until: float) -> None:
        """Look at copies again at a time."""
        with self._lock:
            for key in keys:
                if key in self._copies:
                    self._copies[key] = until, *self._copies[key][1:]

    def delete(self, keys: Sequence[tuple[str, str]], /) -> None:
        """Delete copies."""
        with self._lock:
            for key in keys:
                self._copies.pop(key, None)
