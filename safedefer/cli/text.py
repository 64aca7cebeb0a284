"""Texts for people: times, numbers, and untrusted text made harmless. Imports nothing of the application."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

_UNITS: Final = (("d", 86_400.0), ("h", 3_600.0), ("min", 60.0))
_MOST_DAYS: Final = 9_999


def time_text(seconds: float) -> str:
    """Return a time in ISO 8601, in UTC."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):  # a hint in the storage, which nobody signed
        return "impossible"


def plain(text: object) -> str:
    """Keep what storage or a user says from writing to the terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(text))


def span(seconds: float) -> str:
    """Return a length of time, rounded down: ``4 min``, ``2 h``."""
    if not abs(seconds) < _MOST_DAYS * 86_400.0:  # NaN and infinity too
        return "ages"
    for unit, size in _UNITS:
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(int(seconds), 0)} s"


def relative(seconds: float | None, now: float) -> str:
    """Return a time as people say it: ``in 4 min``, ``2 h ago``, ``now``; empty for None."""
    if seconds is None:
        return ""
    ahead = seconds - now
    if -1.0 < ahead < 1.0:
        return "now"
    return f"in {span(ahead)}" if ahead > 0 else f"{span(-ahead)} ago"


def many(count: int, noun: str) -> str:
    """Return a number of things: ``1 task``, ``2 tasks``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
