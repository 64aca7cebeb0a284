"""What this process has seen: targets that are down, and requests that were refused. Other processes see their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from threading import Lock
from typing import Final, NamedTuple

from safedefer.events import Event, RequestRefused, TargetDown, TargetUp

#: Addresses and reasons that are remembered: both are few, and no request adds one of its own.
_MOST: Final = 100


class DownTarget(NamedTuple):
    """A target that does not answer."""

    address: str
    reason: str
    since: float
    """Seconds since the epoch."""

    @property
    def name(self) -> str:
        """The address, or a word where the handler is in the dispatcher's own process."""
        return self.address or "in this process"


class Signals:
    """An observer that remembers what the dashboard shows of this process.

    Args:
        clock: Seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = Lock()
        self._down: dict[str, DownTarget] = {}
        self._refused: Counter[str] = Counter()

    def __call__(self, event: Event) -> None:
        """Take in an event."""
        with self._lock:
            if isinstance(event, TargetDown) and len(self._down) < _MOST:
                self._down[event.address] = DownTarget(event.address, event.reason, self._clock())
            elif isinstance(event, TargetUp):
                self._down.pop(event.address, None)
            elif isinstance(event, RequestRefused) and (event.reason in self._refused or len(self._refused) < _MOST):
                self._refused[event.reason] += 1

    def down(self) -> list[DownTarget]:
        """Return the targets that are down, by address."""
        with self._lock:
            return sorted(self._down.values())

    def refused(self) -> list[tuple[str, int]]:
        """Return the number of refused requests by reason, the most frequent first."""
        with self._lock:
            return self._refused.most_common()
