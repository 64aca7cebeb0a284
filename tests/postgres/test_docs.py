"""The examples of ``docs/how-to/transactions.md``, run as they stand."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import re
from pathlib import Path

import psycopg
import pytest
from django.db import connections

from safedefer.queues.memory.queue import MemoryQueue
from safedefer.queues.postgres import PostgresQueue, migrate
from safedefer.queues.postgres.migrations import MIGRATIONS
from tests.postgres.server import fresh_database, shared_server
from tests.postgres.users import configure_django
from tests.sample_tasks import add as send_receipt
from tests.unit.apps import make_app

PAGE = (Path(__file__).absolute().parents[2] / "docs" / "how-to" / "transactions.md").read_text()
SQL = re.findall(r"^```sql\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
#: Names are for the queue's own database.
CASES = [
    (number, queue)
    for number, example in enumerate(EXAMPLES)
    for queue in ("own database", "outbox")
    if queue != "outbox" or "name=" not in example
]


@pytest.fixture(scope="module")
def dsn():
    server = shared_server()
    with fresh_database(server) as name:
        migrate(server.dsn(name))
        with psycopg.connect(server.dsn(name)) as connection:
            connection.execute("CREATE TABLE orders (id int); CREATE TABLE accounts (balance int)")
            connection.execute(SQL[0])  # as a migration would
        yield server.dsn(name)


def run(example, names):
    code = compile(example, "transactions.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(eval(code, names))
    else:
        exec(code, names)


@contextlib.contextmanager
def datastore_for(example):
    """A Datastore server where one is needed."""
    if "ndb" not in example:
        yield
        return
    from tests.datastore.server import DatastoreServer

    server = DatastoreServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATASTORE_EMULATOR_HOST", server.host)
        patch.setenv("GOOGLE_CLOUD_PROJECT", "p")
        yield
    server.close()


@pytest.mark.parametrize(("number", "queue"), CASES)
def test_an_example_does_what_it_says(number, queue, dsn):
    example = EXAMPLES[number]
    app = make_app(queue=MemoryQueue() if queue == "outbox" else PostgresQueue(dsn))
    configure_django(dsn)
    before = len(app.queue.tasks(limit=1000))
    with psycopg.connect(dsn) as connection, datastore_for(example):
        names = {
            "app": app,
            "connection": connection,
            "order_id": 42,
            "send_receipt": send_receipt,
            "DSN": dsn,
            "SQLALCHEMY_URL": dsn.replace("postgresql:", "postgresql+psycopg:"),
            "SQLALCHEMY_ASYNC_URL": dsn.replace("postgresql:", "postgresql+asyncpg:"),
        }
        run(example, names)
        app.outbox.sweep()
    connections.close_all()
    expected = 0 if "no number" in example or "once(" in example else 1
    assert len(app.queue.tasks(limit=1000)) - before == expected
    app.close()


def test_the_example_with_a_name_goes_on_when_the_task_has_ended(dsn):
    (example,) = (each for each in EXAMPLES if "name=" in each)
    app = make_app(queue=PostgresQueue(dsn))
    app.cancel(app.options(name="receipt-43").defer(send_receipt, 43).id)
    run(example, {"app": app, "order_id": 43, "send_receipt": send_receipt, "DSN": dsn})
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT count(*) FROM orders WHERE id = 43").fetchone() == (1,)
    app.close()


def test_the_page_about_the_queue_shows_what_migrate_prints():
    page = (Path(__file__).absolute().parents[2] / "docs" / "how-to" / "postgres.md").read_text()
    assert tuple(re.findall(r"^safedefer: (\w+)$", page, re.MULTILINE)) == MIGRATIONS
