"""The push engine of the tests does what every push engine does."""

import time

import pytest

from tests.queues.push_contract import PushContract
from tests.queues.pushing import PushEngineInMemory


class TestInMemory(PushContract):
    @pytest.fixture
    def engine(self):
        return PushEngineInMemory()

    @pytest.fixture
    def deliveries(self, engine):
        def deliver(number):
            assert len(engine.tasks) == number
            return [(engine.headers(task, now=time.time()), task.token) for task in engine.tasks.values()]

        return deliver

    @pytest.fixture
    def stop(self, engine):
        def stop():
            engine.down = True

        return stop
