from __future__ import annotations

import pytest

from safedefer.queues.memory import MemoryQueue
from tests.queues.contract import HISTORY, TOMBSTONE, QueueContract


class TestMemoryQueue(QueueContract):
    @pytest.fixture
    def queue(self):
        queue = MemoryQueue(tombstone_seconds=TOMBSTONE, history_seconds=HISTORY)
        yield queue
        queue.close()
