"""Unreachable targets: which ones, and when each is tried again.

One delivery probes a target that is unreachable, soon and then at growing intervals. Other tasks for it are
postponed, so that tasks for other targets have the slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from safedefer.dispatcher.transport import Unreachable
from safedefer.queues.base import Settlement, Verdict

#: Seconds between two tasks that are postponed for one target, so that they do not all come back at once.
_SPREAD_SECONDS: Final = 0.01
_MAX_SPREAD: Final = 60.0


@dataclass(slots=True)
class UnreachableTarget:
    """A target that did not take a connection."""

    since: float = 0.0
    """When it was first found unreachable, in seconds since the epoch."""
    failures: int = 0
    """Failed deliveries in a row."""
    until: float = 0.0
    """When it is tried again, in seconds since the epoch."""
    everywhere: bool = False
    """Whether all tasks go to this target, so that nothing needs to be leased before ``until``."""
    probing: bool = False
    """Whether a delivery tries it now: the others must not wait for a time-out with it."""
    postponed: int = 0
    """Tasks that were postponed since it was last reached."""


class UnreachableTargets:
    """The unreachable targets by address. False if there are none."""

    def __init__(self) -> None:
        self._targets: dict[str, UnreachableTarget] = {}

    def __bool__(self) -> bool:
        return bool(self._targets)

    def pause(self, *, now: float) -> float:
        """Return the seconds for which no task needs to be leased; 0 or less if one does."""
        return max((target.until - now for target in self._targets.values() if target.everywhere), default=0.0)

    def postpone(self, address: str, *, now: float) -> Settlement | None:
        """Return the settlement of a task for an unreachable target; None if the task is to be delivered."""
        target = self._targets.get(address)
        if target is None or (now >= target.until and not target.probing):
            return None
        target.postponed += 1
        at = max(target.until, now) + min(target.postponed * _SPREAD_SECONDS, _MAX_SPREAD)
        return Settlement(verdict=Verdict.RETRY, at=at, charged=False, reason="unreachable")

    def probe(self, address: str) -> UnreachableTarget | None:
        """Note that a delivery tries an unreachable target, and return it. The caller unsets ``probing`` afterwards."""
        target = self._targets.get(address)
        if target is not None:
            target.probing = True
        return target

    def reached(self, address: str) -> UnreachableTarget | None:
        """Note that a target took a connection, and return what it was until now, if it was unreachable."""
        return self._targets.pop(address, None)

    def knows(self, address: str) -> bool:
        """Whether a target is unreachable."""
        return address in self._targets

    def failed(self, error: Unreachable, *, now: float, jitter: float) -> Settlement:
        """Note that a target took no connection, and return the settlement of the task."""
        target = self._targets.setdefault(error.address, UnreachableTarget(since=now))
        target.failures += 1
        target.everywhere = error.everywhere
        # Soon and without a charge: the queue keeps its order while a handler restarts.
        target.until = max(target.until, now + min(0.1 * 2 ** min(target.failures, 6), 5.0) * (1 - jitter / 2))
        return Settlement(verdict=Verdict.RETRY, at=target.until, charged=False, reason="unreachable")
