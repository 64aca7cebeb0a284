"""The clock of a test."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta


class Clock:
    """A clock that stands still until it is moved: seconds since the epoch, when called.

    Args:
        now: Where it begins; the present by default.
    """

    def __init__(self, now: float | datetime | None = None) -> None:
        self._now = time.time() if now is None else now.timestamp() if isinstance(now, datetime) else float(now)

    def __call__(self) -> float:
        """Return the time, in seconds since the epoch."""
        return self._now

    @property
    def now(self) -> datetime:
        """The time, aware, in UTC."""
        return datetime.fromtimestamp(self._now, UTC)

    def advance(self, seconds: float | timedelta) -> None:
        """Let time pass.

        Raises:
            ValueError: Backwards: ``jump`` does that.
        """
        seconds = _seconds(seconds)
        if seconds < 0:
            raise ValueError("time goes forwards; jump(seconds) sets a clock back")
        self._now += seconds

    def jump(self, seconds: float | timedelta) -> None:
        """Correct the clock by some seconds, also backwards, as a time server corrects that of a machine."""
        self._now += _seconds(seconds)


def _seconds(given: float | timedelta) -> float:
    return given.total_seconds() if isinstance(given, timedelta) else given
