"""The queue in memory, for tests."""

from __future__ import annotations

from safedefer.queues.memory.queue import (
    MemoryQueue,
)

__all__ = [
    "MemoryQueue",
]
