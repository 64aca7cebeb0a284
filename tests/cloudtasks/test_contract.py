"""Cloud Tasks, by the emulator, does what every push engine does."""

import pytest

from safedefer.queues.cloudtasks.engine import CloudTasks
from tests.cloudtasks.emulated import QUEUE, Emulated
from tests.queues.push_contract import PushContract

ACCOUNT = "service_account=t@p.example"
AWAY = f"cloudtasks://p-1/europe-west1?endpoint=http://127.0.0.1:1&address=http://127.0.0.1:1&{ACCOUNT}"


class TestCloudTasks(PushContract):
    @pytest.fixture
    def emulated(self):
        made = Emulated(queues=(QUEUE,))
        made.client.pause_queue(name=QUEUE)
        yield made
        made.close()

    @pytest.fixture
    def engine(self, emulated):
        url = f"cloudtasks://p-1/europe-west1?endpoint={emulated.url}&address={emulated.target_url}&{ACCOUNT}"
        made = CloudTasks(url, clock=emulated.clock)
        yield made
        made.close()

    @pytest.fixture
    def deliveries(self, emulated):
        def deliver(number):
            emulated.client.resume_queue(name=QUEUE)
            return [(headers, body) for _, _, headers, body in emulated.requests(number)]

        return deliver

    @pytest.fixture
    def stop(self, engine):
        def stop():
            engine.close()
            engine.address = CloudTasks(AWAY).address  # nobody listens there

        return stop
