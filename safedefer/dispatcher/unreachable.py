"""Places where no handler was found: who asks there again, and when.

A handler that is down is asked again soon, by one delivery; the other tasks for it are put off, so that
tasks for other places have theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from safedefer.dispatcher.transport import Unreachable
from safedefer.queues.base import Settlement, Verdict

#: Tasks for a place that is down are put off one after the other, by so many seconds each, up to a minute.
_SPREAD_SECONDS: Final = 0.01
_MAX_SPREAD: Final = 60.0


@dataclass(slots=True)
class Down:
    """A place where no handler was found."""

    failures: int = 0
    """Deliveries in a row that did not get there."""
    until: float = 0.0
    """When it is tried again."""
    everywhere: bool = False
    """Whether all tasks go there, so that nothing needs to be leased before ``until``."""
    probing: bool = False
    """Whether one delivery is trying; the others need not wait for a time-out with it."""
    put_off: int = 0


class Places:
    """The places that are down. False if there are none."""

    def __init__(self) -> None:
        self._down: dict[str, Down] = {}

    def __bool__(self) -> bool:
        return bool(self._down)

    def pause(self, *, now: float) -> float:
        """Return the seconds for which nothing needs to be leased; 0 if something does."""
        return max((down.until - now for down in self._down.values() if down.everywhere), default=0.0)

    def put_off(self, place: str, *, now: float) -> Settlement | None:
        """Say what becomes of a task for a place that is down; None if it is to try."""
        down = self._down.get(place)
        if down is None or (now >= down.until and not down.probing):
            return None
        down.put_off += 1
        at = max(down.until, now) + min(down.put_off * _SPREAD_SECONDS, _MAX_SPREAD)
        return Settlement(verdict=Verdict.RETRY, at=at, charged=False, reason="unreachable")

    def probe(self, place: str) -> Down | None:
        """Note that a delivery tries a place that is down; whose ``probing`` is to be unset when it is over."""
        down = self._down.get(place)
        if down is not None:
            down.probing = True
        return down

    def found(self, place: str) -> None:
        """Note that somebody was there."""
        self._down.pop(place, None)

    def missed(self, error: Unreachable, *, now: float, jitter: float) -> Settlement:
        """Note that nobody was there, and say what becomes of the task."""
        down = self._down.setdefault(error.place, Down())
        down.failures += 1
        down.everywhere = error.everywhere
        # A handler that is down is asked again soon, and the queue keeps its order meanwhile.
        down.until = max(down.until, now + min(0.1 * 2 ** min(down.failures, 6), 5.0) * (1 - jitter / 2))
        return Settlement(verdict=Verdict.RETRY, at=down.until, charged=False, reason="unreachable")
