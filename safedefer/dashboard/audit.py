"""The audit log: who did what on the dashboard, in the log ``safedefer.audit`` and in a list that a page shows."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

_log: Final = logging.getLogger("safedefer.audit")
#: Entries that the page shows; the log has all.
_KEPT: Final = 200
_MOST_TEXT: Final = 200


class AuditEntry(NamedTuple):
    """Something that a person did, or was kept from doing."""

    at: float
    """Seconds since the epoch."""
    user: str
    action: str
    queue: str | None
    """None where the action belongs to no queue."""
    subject: str
    """The id of a task, the name of a queue, or a filter."""
    result: str
    allowed: bool


class AuditLog:
    """Writes down what people do. No argument, key or token is in it.

    Args:
        clock: Seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.entries: deque[AuditEntry] = deque(maxlen=_KEPT)
        """The newest entries of this process, the oldest first."""

    def add(
        self,
        user: str,
        action: str,
        *,
        subject: str = "",
        queue: str | None = None,
        result: str = "done",
        allowed: bool = True,
    ) -> None:
        """Write down one action."""
        user, subject, result = printable(user), printable(subject), printable(result)
        entry = AuditEntry(
            self._clock(), user, action, None if queue is None else printable(queue), subject, result, allowed
        )
        self.entries.append(entry)
        level = logging.INFO if allowed else logging.WARNING
        where = "" if entry.queue is None or entry.queue == subject else f" in {entry.queue}"
        _log.log(level, "%s: %s %s%s: %s", user, action, subject, where, result, extra={"audit": entry})


def printable(text: str) -> str:
    """Return a text on one line, cut off where it is long: names and ids may be those that somebody wrote into a storage."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text[:_MOST_TEXT])
