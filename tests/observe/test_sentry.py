"""``examples/sentry``: Sentry gets a task's exception with its task, and nothing that the task was given."""

import importlib.util
import json
from pathlib import Path

import pytest
import sentry_sdk
from sentry_sdk.transport import Transport

from tests import sample_tasks
from tests.unit.apps import handle, make_app

PATH = Path(__file__).resolve().parents[2] / "examples/sentry/report.py"


class Collects(Transport):
    """Keeps what would be sent."""

    def __init__(self, options=None):
        super().__init__(options)
        self.events = []

    def capture_envelope(self, envelope):
        self.events += [event for item in envelope.items if (event := item.get_event()) is not None]


@pytest.fixture
def report():
    spec = importlib.util.spec_from_file_location("sentry_example", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sentry_sdk.get_client().close(timeout=0)
    sentry_sdk.get_global_scope().set_client(None)


@pytest.mark.parametrize("variables", [False, True])
def test_sentry_gets_the_exception_with_its_task_and_no_argument(report, variables):
    transport = Collects()
    more = {"include_local_variables": True} if variables else {}
    # Integrations would change the logging and threading of the other tests.
    report.init(dsn="https://key@sentry.invalid/1", transport=transport, default_integrations=False, **more)
    app = make_app(observers=[report.report])
    secret = "argument-4111"
    task = app.defer(sample_tasks.raises_without_saying_what, secret)
    handle(app, task.payload)
    handle(app, app.defer(sample_tasks.add, 1).payload)
    app.close()
    (event,) = transport.events
    assert event["contexts"]["task"] == {
        "id": task.id,
        "callable": "tests.sample_tasks:raises_without_saying_what",
        "queue": "default",
        "attempt": 1,
        "outcome": "retry",
    }
    assert event["exception"]["values"][-1]["type"] == "LookupError"
    assert event["tags"]["task.queue"] == "default"
    sent = json.dumps(event, default=repr)
    # With local variables both are sent: the test would see them.
    assert [text in sent for text in (secret, task.payload.decode())] == [variables, variables]
