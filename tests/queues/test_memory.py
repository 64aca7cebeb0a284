from __future__ import annotations

import pytest

from safedefer.queues.memory.queue import MemoryQueue
from tests.queues.contract import QUEUE_OPTIONS, QueueContract


class TestMemoryQueue(QueueContract):
    @pytest.fixture
    def queue(self):
        queue = MemoryQueue(**QUEUE_OPTIONS)
        yield queue
        queue.close()
