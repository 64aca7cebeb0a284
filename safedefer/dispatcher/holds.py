"""Targets that asked for a pause, where others of the same queue did not: their tasks are put off, one by one."""

from __future__ import annotations

from typing import Final

from safedefer.queues.base import Settlement, Verdict

#: Seconds between two tasks that are put off, so that they do not all come back at once.
_SPREAD_SECONDS: Final = 0.01
_MAX_SPREAD: Final = 60.0


class TargetHolds:
    """Until when nothing of a queue is sent to a target. False if there is no such target."""

    def __init__(self) -> None:
        self._until: dict[tuple[str, str], float] = {}
        self._postponed: dict[tuple[str, str], int] = {}

    def __bool__(self) -> bool:
        return bool(self._until)

    def hold(self, queue: str, address: str, *, until: float, now: float) -> None:
        """Send nothing of a queue to a target before ``until``; an earlier time changes nothing."""
        for over in [key for key, end in self._until.items() if end <= now]:
            self._release(over)
        self._until[queue, address] = max(until, self._until.get((queue, address), 0.0))

    def postpone(self, queue: str, address: str, *, now: float) -> Settlement | None:
        """Return the settlement of a task for a target that asked for a pause; None if the task is to be delivered."""
        key = queue, address
        until = self._until.get(key)
        if until is None:
            return None
        if until <= now:
            self._release(key)
            return None
        self._postponed[key] = count = self._postponed.get(key, 0) + 1
        at = until + min((count - 1) * _SPREAD_SECONDS, _MAX_SPREAD)
        return Settlement(verdict=Verdict.RETRY, at=at, charged=False, reason="busy")

    def _release(self, key: tuple[str, str]) -> None:
        self._until.pop(key, None)
        self._postponed.pop(key, None)
