"""The queue in PostgreSQL, on pgqueuer."""

from __future__ import annotations

from safedefer.queues.postgres.migrations import migrate
from safedefer.queues.postgres.queue import PostgresQueue

__all__ = ["PostgresQueue", "migrate"]
