"""The queue in a SQLite file."""

from __future__ import annotations

from safedefer.queues.sqlite.queue import (
    SQLiteQueue,
)

__all__ = [
    "SQLiteQueue",
]
