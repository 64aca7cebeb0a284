"""Another role of the queue's PostgreSQL database: it wants its code to run as the role of the queue, or to stop the queue."""

from __future__ import annotations

import contextlib
import os
import time

import psycopg
import pytest

from safedefer.errors import ConfigurationError, QueueUnavailable
from safedefer.queues.postgres import migrations
from safedefer.queues.postgres.migrations import migrate
from safedefer.queues.postgres.queue import PostgresQueue
from tests.adversarial.test_outbox_neighbours import STEAL, World
from tests.postgres.server import fresh_database, shared_server
from tests.queues.contract import make_task, rests


@pytest.fixture
def world():
    server = shared_server()
    with fresh_database(server) as name:
        world = World(server.dsn(name), f"queue_{os.getpid()}_{name[-8:].lower()}")
        world.prepare()
        yield world
        world.clean_up()


def use(world):
    """Open the queue as the shop, and store a task; whatever fails, what counts is whose code has run."""
    with contextlib.closing(PostgresQueue(world.uri(world.shop))) as queue:
        queue.enqueue_many([make_task()])


def put_a_trap_into(world, role):
    """Let a role exchange the function that every enqueue calls; it copies what only the shop may read."""
    world.as_(world.mallory, "CREATE SCHEMA elsewhere")
    world.as_(world.mallory, STEAL.format(schema="elsewhere"))
    (definition, arguments) = world.look.execute(
        "SELECT pg_get_functiondef(oid), pg_get_function_identity_arguments(oid) FROM pg_proc "
        "WHERE pronamespace = 'safedefer'::regnamespace AND proname = 'admit'"
    ).fetchone()
    world.as_(role, f"DROP FUNCTION safedefer.admit({arguments})")
    world.as_(world.mallory, definition.replace("BEGIN\n", "BEGIN\n PERFORM elsewhere.steal();\n", 1))


def test_a_schema_that_another_role_made_first_is_not_migrated(world):
    world.as_(world.mallory, "CREATE SCHEMA safedefer; GRANT ALL ON SCHEMA safedefer TO PUBLIC")
    with pytest.raises(ConfigurationError, match=r"schema safedefer belongs to 'mallory.*REASSIGN OWNED BY"):
        migrate(world.uri(world.shop))
    assert world.look.execute("SELECT 1 FROM pg_class WHERE relname = 'pgqueuer'").fetchone() is None


def test_a_queue_that_another_role_made_is_not_used(world):
    migrate(world.uri(world.mallory))
    world.as_(
        world.mallory,
        "GRANT ALL ON SCHEMA safedefer TO PUBLIC; GRANT ALL ON ALL TABLES IN SCHEMA safedefer TO PUBLIC;"
        " GRANT ALL ON ALL SEQUENCES IN SCHEMA safedefer TO PUBLIC",
    )
    put_a_trap_into(world, world.mallory)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="belongs to 'mallory"):
            use(world)
    with pytest.raises(ConfigurationError, match="belongs to 'mallory"):
        migrate(world.uri(world.shop))
    assert not world.is_robbed()


@pytest.mark.parametrize("made", [
    "CREATE TABLE safedefer.more (id int)",
    "CREATE FUNCTION safedefer.more() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE DOMAIN safedefer.more AS int",
    "CREATE OPERATOR safedefer.= (LEFTARG = text, RIGHTARG = text, FUNCTION = pg_catalog.texteq)",
    "CREATE FUNCTION safedefer.to_regclass(text) RETURNS regclass LANGUAGE sql AS 'SELECT NULL::regclass'",
])  # fmt: skip
def test_nothing_of_another_role_is_among_the_queues_own(world, made):
    migrate(world.uri(world.shop))
    use(world)
    world.as_(world.shop, "GRANT ALL ON SCHEMA safedefer TO PUBLIC")
    world.as_(world.mallory, made)
    with pytest.raises(ConfigurationError, match=r"in the schema safedefer belongs to 'mallory"):
        use(world)


def test_the_function_of_the_queue_that_another_role_exchanged_is_not_called(world):
    migrate(world.uri(world.shop))
    world.as_(world.shop, "GRANT ALL ON SCHEMA safedefer TO PUBLIC")
    put_a_trap_into(world, world.shop)
    with pytest.raises(ConfigurationError, match="function 'admit' in the schema safedefer belongs to 'mallory"):
        use(world)
    assert not world.is_robbed()


@pytest.mark.parametrize("migrating", ["shop", "superuser"])
def test_a_queue_of_the_owner_or_of_a_superuser_is_used_by_others(world, migrating):
    migrate(world.uri(world.shop) if migrating == "shop" else world.dsn)
    world.look.execute(
        "GRANT USAGE ON SCHEMA safedefer TO PUBLIC; GRANT ALL ON ALL TABLES IN SCHEMA safedefer TO PUBLIC;"
        " GRANT USAGE ON ALL SEQUENCES IN SCHEMA safedefer TO PUBLIC"
    )
    with contextlib.closing(PostgresQueue(world.uri(world.mallory))) as queue:
        queue.enqueue_many([make_task()])
    use(world)


def test_a_lock_that_another_role_keeps_makes_migrate_fail_with_what_to_do(world, monkeypatch):
    monkeypatch.setattr(migrations, "_LOCK_SECONDS", 1)
    with psycopg.connect(world.url(world.mallory), autocommit=True) as connection:
        connection.execute("SELECT pg_advisory_lock(%s)", [0x5AFE_DEFE])
        start = time.monotonic()
        with pytest.raises(QueueUnavailable, match="a lock was not free for 1 s; see in pg_locks"):
            migrate(world.uri(world.shop))
        assert time.monotonic() < start + 60
    monkeypatch.setattr(migrations, "_LOCK_SECONDS", 60)  # the server takes a moment to notice who has gone
    assert migrate(world.uri(world.shop))


def test_a_schema_that_another_role_is_making_does_not_hold_migrate_up(world, monkeypatch):
    monkeypatch.setattr(migrations, "_LOCK_SECONDS", 1)
    with psycopg.connect(world.url(world.mallory)) as connection:
        connection.execute("CREATE SCHEMA safedefer")
        with pytest.raises(QueueUnavailable, match="a lock was not free"):
            migrate(world.uri(world.shop))


@pytest.mark.parametrize(
    "payload", ["[" * 7_900, '{"a":' * 1_500, "9" * 7_900, "null", "[]", '{"operation": {}}', "\\ud800", "x"]
)
def test_what_another_role_notifies_of_is_passed_over_without_a_word(world, payload, caplog):
    migrate(world.uri(world.shop))
    with contextlib.closing(PostgresQueue(world.uri(world.shop))) as queue:
        queue.wait(0.3)
        while queue.wait(0.3):
            pass
        with psycopg.connect(world.url(world.mallory), autocommit=True) as connection:
            connection.execute("SELECT pg_notify('ch_pgqueuer', %s)", [payload])
        assert rests(queue, 0.3)
        queue.enqueue_many([make_task()])
        assert queue.wait(60.0)
    assert caplog.records == []
