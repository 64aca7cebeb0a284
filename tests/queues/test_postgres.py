from __future__ import annotations

import psycopg
import pytest

from safedefer.queues.postgres import PostgresQueue, migrate
from tests.postgres.server import fresh_database, shared_server
from tests.queues.clocked import CLOCK, Clocked
from tests.queues.contract import QUEUE_OPTIONS, QueueContract

TABLES = (
    "pgqueuer", "pgqueuer_log", "controls", "names", "uniques", "blobs", "blob_totals", "progress", "dead", "ended",
    "ledger", "attempts",
)  # fmt: skip


@pytest.fixture(scope="session")
def server():
    return shared_server()


@pytest.fixture(scope="module")
def clocked_dsn(server):
    with fresh_database(server) as name:
        migrate(server.dsn(name))
        with psycopg.connect(server.dsn(name), autocommit=True) as connection:
            connection.execute(CLOCK)
        yield server.dsn(name)


class TestPostgresQueue(QueueContract):
    @pytest.fixture
    def queue(self, clocked_dsn):
        queue = Clocked(PostgresQueue(clocked_dsn, **QUEUE_OPTIONS), clocked_dsn)
        yield queue
        queue.close()
        with psycopg.connect(clocked_dsn, autocommit=True) as connection:
            # Whatever a test of the contract did, no blob, unique key or counter is left without its task.
            jobs = "SELECT dedupe_key FROM safedefer.pgqueuer WHERE status IN ('queued', 'picked')"
            for table in ("blobs", "uniques"):
                left = f"SELECT count(*) FROM safedefer.{table} WHERE task_id NOT IN ({jobs})"
                assert connection.execute(left).fetchone() == (0,), table
            left = "SELECT count(*) FROM safedefer.progress WHERE job_id NOT IN (SELECT id FROM safedefer.pgqueuer)"
            assert connection.execute(left).fetchone() == (0,)
            total = "SELECT coalesce(sum(bytes), 0) - (SELECT coalesce(sum(length), 0) FROM safedefer.blobs) FROM safedefer.blob_totals"
            assert connection.execute(total).fetchone() == (0,)
            connection.execute("TRUNCATE " + ", ".join(f"safedefer.{table}" for table in TABLES))
