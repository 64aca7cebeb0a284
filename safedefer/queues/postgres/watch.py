"""Watch: a counter of changes that threads of one process wait for."""

from __future__ import annotations

import threading
import time


class Watch:
    """Counts changes after which a lease may find new tasks; ``wait`` blocks until one has come that no lease has seen."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._changes = 0
        self._seen = 0

    def changed(self) -> None:
        """Count a change and wake all waiting threads."""
        with self._condition:
            self._changes += 1
            self._condition.notify_all()

    def seen(self) -> None:
        """Mark all changes so far as seen. Called before a lease looks, so that a change during the look still counts."""
        with self._condition:
            self._seen = self._changes

    def wait(self, timeout: float) -> bool:
        """Block until there is an unseen change, or for ``timeout`` seconds; returns whether there was one."""
        deadline = time.monotonic() + timeout
        with self._condition:
            seen = self._seen
            while self._changes == seen:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._condition.wait(left)
            self._seen = self._changes
            return True
