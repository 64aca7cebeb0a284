"""A server for all tests of this folder, emptied before each, and a client of it as the library makes one."""

import time

import pytest

from safedefer.queues.memory.queue import MemoryQueue
from safedefer.transactions.outbox import Outbox

try:
    from google.cloud import ndb
    from google.cloud.ndb import _retry
except ImportError:
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.datastore.kinds import use_kinds
    from tests.datastore.server import DatastoreServer
    from tests.datastore.store import Store


@pytest.fixture(scope="package")
def served():
    server = DatastoreServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATASTORE_EMULATOR_HOST", server.host)
        patch.setenv("GOOGLE_CLOUD_PROJECT", "p")
        # Seconds between two tries of a transaction.
        patch.setattr(_retry, "_DEFAULT_INITIAL_DELAY", 0.01)
        server.client = ndb.Client()
        yield server
        server.client.stub.grpc_channel.close()  # its threads would be in the way of tests that fork
    server.close()


@pytest.fixture
def server(served):
    served.store, served.batch, served.looks_up = Store(), 300, 1_000
    served.before, served.after = {}, {}
    served.calls.clear()
    return served


@pytest.fixture
def client(server):
    return server.client


@pytest.fixture
def context(client):
    with client.context() as context:
        yield context


@pytest.fixture(autouse=True)
def kinds(request, monkeypatch):
    use_kinds(monkeypatch, request.module)


@pytest.fixture
def queue():
    return MemoryQueue()


@pytest.fixture
def outbox(queue, context):
    outbox = Outbox(lambda: queue, environment="test", clock=time.time)
    yield outbox
    outbox.close()
