"""A queue as the dashboard shows it, from which lag it counts as behind, and lengths of time for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from safedefer.queues.rates import QueueControl

MINUTES: Final = 15
"""Minutes that the dashboard looks back."""
LATE_SECONDS: Final = 60.0
"""Seconds of lag that are shown as wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueRow:
    """One queue."""

    name: str
    waiting: int = 0
    running: int = 0
    dead: int = 0
    lag: float = 0.0
    """Seconds."""
    succeeded: int = 0
    """In the last minutes, as ``died`` and ``cancelled``."""
    died: int = 0
    cancelled: int = 0
    control: QueueControl | None = None
    untaken: float = 0.0
    """For how long its next task has been due, and nobody has taken it."""

    @property
    def paused(self) -> bool:
        """Whether nothing of it is delivered until it is resumed."""
        return self.control is not None and (self.control.paused or self.control.limits.rate == 0)

    @property
    def is_late(self) -> bool:
        """Whether its oldest task waits too long."""
        return self.lag > LATE_SECONDS

    @property
    def is_limited(self) -> bool:
        """Whether a rate or a cap holds it back."""
        limits = None if self.control is None else self.control.limits
        return limits is not None and (limits.rate is not None or limits.max_concurrent is not None)


def duration(seconds: float) -> str:
    """Return a length of time for people: its two largest units."""
    if not seconds >= 1:  # NaN too: a hint in the storage, which nobody signed
        return "0 s"
    whole = int(min(seconds, 1e11))
    parts = []
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        number, whole = divmod(whole, size)
        if number:
            parts.append(f"{number} {unit}")
        elif parts:
            break
    return " ".join(parts[:2])
