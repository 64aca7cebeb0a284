"""Prefetch: how many tasks to lease, and the tasks that were leased ahead of free slots.

A dispatcher that leases only for free slots stands still while it waits for the storage. So it leases as many tasks
more as it delivers, at the rate of late, in the time that the next lease call takes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from safedefer.queues.base import Lease
from safedefer.queues.rules import must_be_alone

#: Work to have leased ahead, in seconds at the rate of late.
_AHEAD_SECONDS: Final = 0.02
#: The same, in lease calls of late: the slots have work while the next call is under way.
_AHEAD_LEASES: Final = 3.0
#: The most work to lease ahead, in seconds: of long tasks one process would hold what another one has slots for. Calls take
#: long where tasks hold the interpreter, and the slots are full of work then.
_MOST_AHEAD_SECONDS: Final = 0.1
#: The most tasks to lease ahead, as a multiple of the slots.
_AHEAD_SLOTS: Final = 4


class Prefetch:
    """The leases that wait for a slot, and the measurements that say how many more to take.

    Args:
        slots: The most deliveries at once.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self.ready: deque[Lease] = deque()
        """Leased ahead; a delivery starts when a slot is free."""
        self._ended: deque[float] = deque(maxlen=slots)
        """When the last deliveries ended (``time.monotonic``), one for each slot."""
        self._low = 0
        """The number of ready leases at which it is time to lease more."""
        self._lease_took = 0.0
        """Seconds that a lease call takes, of late."""
        self._dry = False
        """Whether the last lease call returned fewer tasks than it asked for."""

    def wanted(self, delivering: int) -> int:
        """Return how many tasks to lease now: for the free slots, and ahead of them if tasks are short."""
        free = self._slots - delivering
        ahead = 0 if self._dry else self._ahead()
        self._low = ahead // 2
        if self.ready or free <= 0:
            return 0 if len(self.ready) > self._low else ahead - len(self.ready)
        return free + ahead

    def _ahead(self) -> int:
        if len(self._ended) < self._slots:
            return 0
        rate = len(self._ended) / max(time.monotonic() - self._ended[0], 1e-6)
        seconds = min(_AHEAD_SECONDS + _AHEAD_LEASES * self._lease_took, _MOST_AHEAD_SECONDS)
        return min(_AHEAD_SLOTS * self._slots, int(rate * seconds))

    def leased(self, leases: Sequence[Lease], *, wanted: int, seconds: float) -> bool:
        """Add the result of a lease call that took ``seconds``. Return whether the queue may have more."""
        self._lease_took = (self._lease_took + seconds) / 2
        self._dry = len(leases) < wanted
        self.ready.extend(leases)
        return not self._dry

    def take_suspects(self) -> list[Lease]:
        """Remove the leases of tasks that must run alone, and return them: the one with the fewest losses first."""
        suspects = [lease for lease in self.ready if must_be_alone(lease.losses)]
        if suspects:
            self.ready = deque(lease for lease in self.ready if not must_be_alone(lease.losses))
        return sorted(suspects, key=_losses)

    def delivered(self) -> None:
        """Note that a delivery has ended."""
        self._ended.append(time.monotonic())

    @property
    def is_low(self) -> bool:
        """Whether it is time to lease more."""
        return len(self.ready) <= self._low


def _losses(lease: Lease) -> int:
    return lease.losses
