"""The queue in PostgreSQL, on pgqueuer."""

from __future__ import annotations

from safedefer.queues.postgres.queue import (
    PostgresQueue,
    migrate,
)

__all__ = [
    "PostgresQueue",
    "migrate",
]
