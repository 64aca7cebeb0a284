"""Another role of the user's PostgreSQL database: it may create schemas, tables, functions and operators.

It wants its code to run as the role of a producer or of the relay, the tasks of others in its own hands, or no tasks at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
import time

import asyncpg
import psycopg
import pytest
import sqlalchemy as sa

from safedefer.errors import BadTransactionStateError, TaskAlreadyExistsError
from safedefer.queues.memory.queue import MemoryQueue
from safedefer.queues.postgres.migrations import migrate
from safedefer.queues.postgres.queue import PostgresQueue
from safedefer.transactions.rows import to_text
from tests import sample_tasks as tasks
from tests.postgres.server import fresh_database, shared_server
from tests.queues.contract import DONE, make_task, take
from tests.unit.apps import make_app

_numbers = itertools.count(1)

OLD_COLUMNS = "id varchar(64) PRIMARY KEY, created double precision NOT NULL, task text NOT NULL"
COLUMNS = f"{OLD_COLUMNS}, environment varchar(100)"

#: Runs as whoever calls it: copies the private table, and lets everybody read it.
STEAL = """
    CREATE FUNCTION {schema}.steal() RETURNS boolean VOLATILE LANGUAGE plpgsql AS $$
    BEGIN
        IF has_table_privilege('public.private', 'SELECT') AND to_regclass('{schema}.loot') IS NULL THEN
            CREATE TABLE {schema}.loot AS SELECT * FROM public.private;
            GRANT SELECT ON public.private TO PUBLIC;
        END IF;
        RETURN true;
    END $$;
    CREATE FUNCTION {schema}.steal_row() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM {schema}.steal();
        IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
        RETURN NEW;
    END $$;
    CREATE FUNCTION {schema}.pure(integer) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS $$
    BEGIN
        RETURN {schema}.steal();
    END $$;
    GRANT ALL ON SCHEMA {schema} TO PUBLIC;
"""

#: Ways for a table to run code as whoever uses it.
TRAPS = {
    "trigger": "CREATE TRIGGER t BEFORE INSERT OR DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION {schema}.steal_row()",
    "statement trigger": (
        "CREATE TRIGGER t AFTER INSERT OR DELETE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION {schema}.steal_row()"
    ),
    "row policy": (
        "CREATE POLICY p ON {table} USING ({schema}.steal()); ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, "
        "FORCE ROW LEVEL SECURITY"
    ),
    "rule": "CREATE RULE r AS ON DELETE TO {table} DO ALSO SELECT {schema}.steal()",
    "index": "CREATE INDEX ON {table} (created) WHERE {schema}.pure(1)",
}


class World:
    """A database of ``shop``'s, in which ``mallory`` has a schema and may create in ``public``."""

    def __init__(self, dsn: str, suffix: str) -> None:
        self.dsn = dsn
        self.shop, self.mallory = f"shop_{suffix}", f"mallory_{suffix}"
        self.look = psycopg.connect(dsn, autocommit=True)

    def prepare(self) -> None:
        name = self.look.info.dbname
        for role in (self.shop, self.mallory):
            self.look.execute(f"CREATE ROLE {role} LOGIN")
        self.look.execute(f"ALTER DATABASE {name} OWNER TO {self.shop}")
        self.look.execute(f"GRANT CREATE ON DATABASE {name} TO {self.mallory}; GRANT ALL ON SCHEMA public TO PUBLIC")
        self.as_(self.shop, "CREATE TABLE orders (id int); CREATE TABLE private AS SELECT 'the secret' AS secret")

    def clean_up(self) -> None:
        for role in (self.shop, self.mallory):
            self.look.execute(f"REASSIGN OWNED BY {role} TO postgres; DROP OWNED BY {role} CASCADE")
        self.look.close()

    def url(self, role: str, **options: str) -> str:
        return psycopg.conninfo.make_conninfo(self.dsn, user=role, **options)

    def uri(self, role: str) -> str:
        return self.dsn.replace("postgresql://postgres@", f"postgresql://{role}@")

    def as_(self, role: str, statement: str) -> None:
        with psycopg.connect(self.url(role), autocommit=True) as connection:
            connection.execute(statement)

    def trap(self, schema: str, kind: str, columns: str = COLUMNS) -> str:
        """Let mallory make an outbox that runs code; returns its name."""
        table = f"{schema}.safedefer_outbox"
        if schema != "public":
            self.as_(self.mallory, f"CREATE SCHEMA {schema}")
        self.as_(self.mallory, STEAL.format(schema=schema).replace("GRANT ALL ON SCHEMA public TO PUBLIC;", ""))
        self.as_(self.mallory, f"CREATE TABLE {table} ({columns}); GRANT ALL ON {table} TO PUBLIC")
        with psycopg.connect(self.url(self.mallory)) as connection:
            row = make_task()
            connection.execute(f"INSERT INTO {table} VALUES (%s, 0, %s)", [row.id, to_text(row)])
        self.as_(self.mallory, TRAPS[kind].format(table=table, schema=schema))
        return table

    def is_robbed(self) -> bool:
        found = self.look.execute("SELECT 1 FROM pg_class WHERE relname = 'loot'").fetchone()
        may = self.look.execute("SELECT has_table_privilege(%s, 'public.private', 'SELECT')", [self.mallory]).fetchone()
        return found is not None or may == (True,)

    def count(self, table: str) -> int:
        return self.look.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


@pytest.fixture
def world():
    server, suffix = shared_server(), f"{os.getpid()}_{next(_numbers)}"
    with fresh_database(server) as name:
        world = World(server.dsn(name), suffix)
        world.prepare()
        yield world
        world.clean_up()
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(f"DROP ROLE {world.shop}; DROP ROLE {world.mallory}")


@pytest.fixture
def app(world):
    app = make_app(queue=MemoryQueue(), outboxes=[world.uri(world.shop)])
    yield app
    app.close()


def until(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def defer(app, connection):
    with app.transaction(connection):
        return app.options(transactional=True).defer(tasks.add, 1)


def waiting(app) -> set[str]:
    return {view.id for view in app.queue.tasks()}


# --- The relay runs nobody's code ----------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAPS)
def test_nothing_of_another_roles_outbox_runs_as_the_relay(world, app, kind):
    table = world.trap("evil", kind)
    assert app.outbox.sweep() == 0
    assert not world.is_robbed()
    assert world.count(table) == 1


@pytest.mark.parametrize("kind", TRAPS)
def test_nothing_of_another_roles_outbox_on_the_search_path_runs_as_the_relay(world, kind, caplog):
    table = world.trap("evil", kind)
    world.look.execute(f"ALTER ROLE {world.shop} SET search_path = evil, public")
    app = make_app(queue=MemoryQueue(), outboxes=[world.uri(world.shop)])
    for _ in range(3):
        assert app.outbox.sweep() == 0
    assert not world.is_robbed()
    assert world.count(table) == 1
    said = [record.getMessage() for record in caplog.records if "belongs to" in record.getMessage()]
    assert len(said) == 1
    assert f"{world.mallory}" in said[0]
    assert "SAFEDEFER_OUTBOXES" in said[0]
    app.close()


def test_a_table_of_other_columns_in_a_schema_that_sorts_first_stops_no_task(world, app):
    world.as_(
        world.mallory,
        "CREATE SCHEMA aaa; CREATE TABLE aaa.safedefer_outbox (nonsense int); "
        "GRANT ALL ON SCHEMA aaa TO PUBLIC; GRANT ALL ON aaa.safedefer_outbox TO PUBLIC",
    )
    with psycopg.connect(world.url(world.shop)) as connection:
        task = defer(app, connection)
    until(lambda: waiting(app) == {task.id})


@pytest.mark.parametrize("kind", ["trigger", "statement trigger"])
def test_a_trigger_that_another_role_was_let_put_on_the_own_table_does_not_run(world, app, kind, caplog):
    with psycopg.connect(world.url(world.shop)) as connection:
        task = defer(app, connection)
    until(lambda: waiting(app) == {task.id} and world.count("safedefer_outbox") == 0)
    world.as_(world.shop, f"GRANT TRIGGER, INSERT ON safedefer_outbox TO {world.mallory}")
    world.as_(world.mallory, "CREATE SCHEMA evil")
    world.as_(world.mallory, STEAL.format(schema="evil"))
    world.as_(world.mallory, TRAPS[kind].format(table="public.safedefer_outbox", schema="evil"))
    world.as_(world.mallory, "INSERT INTO safedefer_outbox (id, created, task) VALUES ('x', 0, '{}')")
    assert app.outbox.sweep() == 0
    with psycopg.connect(world.url(world.shop)) as connection:
        with pytest.raises(BadTransactionStateError, match="trigger"):
            defer(app, connection)
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert not world.is_robbed()
    assert "trigger" in caplog.text


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
def test_a_trigger_that_comes_between_the_check_and_the_use_is_seen(world, app, level):
    """By a superuser, whom nobody refuses: what counts is that the lock is waited for, and the table judged after it."""
    app.outbox._relay.expect = lambda *_: None  # no thread: the sweep is below
    world.look.execute(f"ALTER ROLE {world.shop} SET default_transaction_isolation = '{level}'")
    with psycopg.connect(world.url(world.shop)) as connection:
        defer(app, connection)
    with psycopg.connect(world.dsn) as other:
        other.execute(STEAL.format(schema="public"))
        other.execute(TRAPS["trigger"].format(table="safedefer_outbox", schema="public"))
        moved = []
        sweep = threading.Thread(target=lambda: moved.append(app.outbox.sweep()))
        sweep.start()
        until(lambda: world.look.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone())
        other.commit()
        sweep.join(120.0)
    assert moved == [0]
    assert world.count("safedefer_outbox") == 1
    assert not world.is_robbed()


def test_whoever_may_put_triggers_on_the_table_is_named_before_there_is_one(world, app):
    with psycopg.connect(world.url(world.shop)) as connection:
        defer(app, connection)
    world.as_(world.shop, f"GRANT ALL ON safedefer_outbox TO {world.mallory}")
    with psycopg.connect(world.url(world.shop)) as connection:
        with pytest.raises(BadTransactionStateError, match="REVOKE TRIGGER"):
            defer(app, connection)
    world.as_(world.shop, f"REVOKE TRIGGER ON safedefer_outbox FROM {world.mallory}")
    with psycopg.connect(world.url(world.shop)) as connection:
        task = defer(app, connection)
    until(lambda: task.id in waiting(app))


def test_a_schema_that_another_role_can_rename_is_not_used(world, app):
    """It could be renamed, and another put in its place, between the check and the use."""
    world.as_(world.mallory, "CREATE SCHEMA lent; GRANT ALL ON SCHEMA lent TO PUBLIC")
    with psycopg.connect(world.url(world.shop, options="-c search_path=lent")) as connection:
        with pytest.raises(BadTransactionStateError, match="schema"):
            defer(app, connection)
        assert connection.execute("SELECT 1").fetchone() == (1,)


#: Better fitting than those of pg_catalog, where the search path has public in it.
HIJACKERS = """
    CREATE FUNCTION public.quote_ident(name) RETURNS text LANGUAGE plpgsql AS
        $$ BEGIN PERFORM public.steal(); RETURN pg_catalog.quote_ident($1::text); END $$;
    CREATE FUNCTION public.hijack(varchar, text) RETURNS boolean LANGUAGE plpgsql AS
        $$ BEGIN PERFORM public.steal(); RETURN $1::text OPERATOR(pg_catalog.=) $2; END $$;
    CREATE FUNCTION public.hijack(varchar, varchar) RETURNS boolean LANGUAGE plpgsql AS
        $$ BEGIN PERFORM public.steal(); RETURN $1::text OPERATOR(pg_catalog.=) $2::text; END $$;
    CREATE OPERATOR public.= (LEFTARG = varchar, RIGHTARG = text, FUNCTION = public.hijack);
    CREATE OPERATOR public.= (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = public.hijack);
    CREATE OPERATOR public.> (LEFTARG = varchar, RIGHTARG = text, FUNCTION = public.hijack);
    CREATE OPERATOR public.> (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = public.hijack);
"""


@pytest.mark.parametrize("path", ['"$user", public', "public, pg_catalog"])
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg", "sqlalchemy"])
def test_functions_and_operators_of_another_role_are_not_called(world, driver, path):
    world.as_(world.mallory, STEAL.format(schema="public").replace("GRANT ALL ON SCHEMA public TO PUBLIC;", ""))
    world.as_(world.mallory, HIJACKERS)
    if "catalog" in path:  # there even the exact ones are the attacker's
        world.as_(world.mallory, """
            CREATE FUNCTION public.to_regclass(text) RETURNS regclass LANGUAGE plpgsql AS
                $$ BEGIN PERFORM public.steal(); RETURN pg_catalog.to_regclass($1); END $$;
            CREATE FUNCTION public.has_table_privilege(oid, text) RETURNS boolean LANGUAGE plpgsql AS
                $$ BEGIN PERFORM public.steal(); RETURN true; END $$;
            CREATE FUNCTION public.hijack(name, name) RETURNS boolean LANGUAGE plpgsql AS
                $$ BEGIN PERFORM public.steal(); RETURN pg_catalog.nameeq($1, $2); END $$;
            CREATE OPERATOR public.= (LEFTARG = name, RIGHTARG = name, FUNCTION = public.hijack);
            CREATE FUNCTION public.hijack(float8, float8) RETURNS boolean LANGUAGE plpgsql AS
                $$ BEGIN PERFORM public.steal(); RETURN pg_catalog.float8lt($1, $2); END $$;
            CREATE OPERATOR public.< (LEFTARG = float8, RIGHTARG = float8, FUNCTION = public.hijack);
        """)  # fmt: skip
    # Drivers have statements of their own, in which a path with pg_catalog at its end is the user's affair.
    app = make_app(queue=MemoryQueue())
    options = {"options": f"-c search_path={path.replace(' ', '')}"}

    def blocks(connection):
        for _ in range(2):
            with app.once(connection, "the effect"):
                pass
            defer(app, connection)

    async def awaited():
        connection = await asyncpg.connect(
            world.uri(world.shop), server_settings={"search_path": path}, statement_cache_size=0
        )
        for _ in range(2):
            async with app.once(connection, "the effect"):
                pass
            async with app.transaction(connection):
                await app.options(transactional=True).defer_async(tasks.add, 1)
        await connection.close()

    if driver == "psycopg":
        with psycopg.connect(world.url(world.shop, **options)) as connection:
            blocks(connection)
    elif driver == "asyncpg":
        asyncio.run(awaited())
    else:
        engine = sa.create_engine(
            world.uri(world.shop).replace("postgresql:", "postgresql+psycopg:"), connect_args=options
        )
        with engine.connect() as connection:
            blocks(connection)
        engine.dispose()
    until(lambda: len(waiting(app)) == 2)
    app.close()
    assert not world.is_robbed()
    assert world.count("safedefer_outbox") == 0


def test_a_column_of_any_name_in_a_table_of_another_role_stops_no_task(world, app):
    """The names of columns were joined by commas, and parted again."""
    world.as_(world.mallory, 'CREATE TABLE public.safedefer_outbox ("a,b" int)')
    world.as_(world.shop, f"CREATE SCHEMA AUTHORIZATION {world.shop}")
    with psycopg.connect(world.url(world.shop)) as connection:
        task = defer(app, connection)
    until(lambda: waiting(app) == {task.id})


def test_a_row_that_another_role_keeps_locked_keeps_no_other(world, app, monkeypatch):
    """Its batch was enqueued and not deleted, sweep for sweep, and what stands behind the batch was never read."""
    monkeypatch.setattr("safedefer.transactions.transfer._BATCH", 3)
    app.outbox._relay.expect = lambda *_: None  # no thread: the sweep is below
    with psycopg.connect(world.url(world.shop)) as connection:
        given = [defer(app, connection) for _ in range(9)]
    world.as_(world.shop, f"GRANT SELECT, UPDATE ON safedefer_outbox TO {world.mallory}")
    with psycopg.connect(world.url(world.mallory)) as held:
        held.execute("SELECT FROM safedefer_outbox WHERE id = %s FOR UPDATE", [given[1].id])
        assert app.outbox.sweep() == 8
        assert waiting(app) == {task.id for task in given}
        assert app.outbox.sweep() == 0
        assert world.count("safedefer_outbox") == 1
    app.outbox.sweep()
    assert world.count("safedefer_outbox") == 0
    assert len(waiting(app)) == 9


def test_a_reader_of_a_table_without_the_new_column_does_not_make_producers_wait(world, app, monkeypatch):
    """Who waits to alter a table keeps all who come after: two seconds of each sweep."""
    world.as_(world.shop, f"CREATE TABLE safedefer_outbox ({OLD_COLUMNS})")
    world.as_(world.shop, f"GRANT SELECT ON safedefer_outbox TO {world.mallory}")
    monkeypatch.setattr("safedefer.transactions.transfer._LOCK_MILLISECONDS", 3_600_000)
    moved = []
    with psycopg.connect(world.url(world.mallory)) as held:
        held.execute("SELECT FROM safedefer_outbox")
        sweep = threading.Thread(target=lambda: moved.append(app.outbox.sweep()))
        sweep.start()
        sweep.join(60.0)
        assert moved == [0]


# --- What a producer finds -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAPS)
@pytest.mark.parametrize("table", ["safedefer_outbox", "safedefer_once"])
def test_a_table_that_another_role_put_in_the_way_is_refused_and_the_transaction_goes_on(world, app, kind, table):
    columns = COLUMNS if table == "safedefer_outbox" else "effect varchar(720) PRIMARY KEY, expires double precision"
    if table == "safedefer_once":
        world.as_(world.mallory, STEAL.format(schema="public").replace("GRANT ALL ON SCHEMA public TO PUBLIC;", ""))
        world.as_(world.mallory, f"CREATE TABLE safedefer_once ({columns}); GRANT ALL ON safedefer_once TO PUBLIC")
        trap = TRAPS[kind].replace("(created)", "(expires)")
        world.as_(world.mallory, trap.format(table="safedefer_once", schema="public"))
    else:
        world.trap("public", kind)
    with psycopg.connect(world.url(world.shop)) as connection:
        connection.execute("INSERT INTO orders VALUES (1)")
        with pytest.raises(BadTransactionStateError, match=world.mallory):
            if table == "safedefer_outbox":
                defer(app, connection)
            else:
                with app.once(connection, "effect"):
                    pass
        connection.execute("INSERT INTO orders VALUES (2)")
    assert world.count("orders") == 2
    assert not world.is_robbed()


def test_a_table_in_another_schema_of_the_path_is_passed_over(world, app):
    world.trap("evil", "trigger")
    with psycopg.connect(world.url(world.shop)) as connection:
        task = defer(app, connection)
    until(lambda: task.id in waiting(app))
    with psycopg.connect(world.url(world.shop, options="-c search_path=evil,public")) as connection:
        task = defer(app, connection)
    until(lambda: task.id in waiting(app))
    assert not world.is_robbed()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("CREATE TABLE safedefer_outbox (nonsense int)", "columns"),
        (f"CREATE TABLE safedefer_outbox ({COLUMNS}, more int NOT NULL)", "columns"),
        ("CREATE TABLE safedefer_outbox (id text PRIMARY KEY, created int NOT NULL, task text NOT NULL)", "columns"),
        (f"CREATE TABLE safedefer_outbox ({COLUMNS}) PARTITION BY RANGE (id)", "ordinary table"),
        ("CREATE VIEW safedefer_outbox AS SELECT 'a' AS id, 0.0 AS created, '' AS task", "ordinary table"),
        (f"CREATE TABLE safedefer_outbox ({COLUMNS}); CREATE TABLE c () INHERITS (safedefer_outbox)", "ordinary table"),
        (f"CREATE TABLE safedefer_outbox ({COLUMNS}); ALTER TABLE safedefer_outbox ENABLE ROW LEVEL SECURITY", "row"),
        (f"CREATE TABLE safedefer_outbox ({COLUMNS}); CREATE RULE r AS ON INSERT TO safedefer_outbox DO INSTEAD NOTHING", "rule"),
    ],
)  # fmt: skip
def test_an_own_table_of_another_form_is_refused_with_its_reason(world, app, statement, message, caplog):
    world.as_(world.shop, statement)
    with psycopg.connect(world.url(world.shop)) as connection:
        connection.execute("INSERT INTO orders VALUES (1)")
        with pytest.raises(BadTransactionStateError, match=message):
            defer(app, connection)
    assert world.count("orders") == 1
    for _ in range(2):
        assert app.outbox.sweep() == 0
    assert len([record for record in caplog.records if message in record.getMessage()]) == 1


def test_a_settings_table_of_another_role_does_not_make_a_database_the_queues_own(world):
    """Its rows, and the function that enqueues, would run as the producer."""

    class OwnQueue(MemoryQueue):
        marker = "the mark"

        def enqueue_statements(self, given):
            return [("SELECT safedefer.steal()", ())]

        def refusal(self, error):
            return None

    world.as_(world.mallory, "CREATE SCHEMA safedefer")
    world.as_(world.mallory, STEAL.format(schema="safedefer"))
    world.as_(
        world.mallory,
        "CREATE VIEW safedefer.settings AS SELECT 'the mark'::text AS marker WHERE safedefer.steal();"
        "GRANT SELECT ON safedefer.settings TO PUBLIC",
    )
    app = make_app(queue=OwnQueue())
    with psycopg.connect(world.url(world.shop)) as connection:
        task = defer(app, connection)
    until(lambda: waiting(app) == {task.id})
    world.as_(world.mallory, "DROP VIEW safedefer.settings; CREATE TABLE safedefer.settings AS SELECT 'the mark' AS marker;"
                             "GRANT SELECT ON safedefer.settings TO PUBLIC")  # fmt: skip
    app.outbox._marked.clear()
    with psycopg.connect(world.url(world.shop)) as connection:
        defer(app, connection)
    app.close()
    assert not world.is_robbed()


def test_a_lock_that_another_role_holds_does_not_stop_the_first_task(world, app):
    with psycopg.connect(world.url(world.mallory)) as held, psycopg.connect(world.url(world.shop)) as connection:
        held.execute("SELECT pg_advisory_lock(7305812994)")
        connection.execute("SET lock_timeout = '2s'")
        connection.commit()
        task = defer(app, connection)
    until(lambda: task.id in waiting(app))


# --- One table stops no other --------------------------------------------------------------------


def test_a_table_that_another_role_keeps_locked_stops_no_other(world, app, tmp_path):
    import sqlite3

    with psycopg.connect(world.url(world.shop)) as connection:
        first = defer(app, connection)
    until(lambda: waiting(app) == {first.id})
    world.as_(world.shop, f"GRANT DELETE ON safedefer_outbox TO {world.mallory}")
    with psycopg.connect(world.url(world.mallory)) as held:
        held.execute("LOCK TABLE safedefer_outbox IN ACCESS EXCLUSIVE MODE")
        sweep = threading.Thread(target=app.outbox.sweep)
        sweep.start()
        with contextlib.closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
            second = defer(app, connection)
        until(lambda: second.id in waiting(app))
        sweep.join(120.0)
        assert not sweep.is_alive()


def test_an_outbox_of_which_the_relay_is_not_the_owner_is_said_once_with_the_remedy(world, caplog):
    """A producer may write to it; somebody else has to empty it."""
    world.as_(world.shop, f"CREATE TABLE safedefer_outbox ({COLUMNS}); GRANT INSERT ON safedefer_outbox TO PUBLIC")
    world.look.execute(f"CREATE ROLE clerk_{world.shop} LOGIN")
    clerk = f"clerk_{world.shop}"
    app = make_app(queue=MemoryQueue())
    with psycopg.connect(world.url(clerk)) as connection:
        task = defer(app, connection)
    until(lambda: "SAFEDEFER_OUTBOXES" in caplog.text)
    for _ in range(3):
        assert app.outbox.sweep() == 0
    assert len([record for record in caplog.records if "SAFEDEFER_OUTBOXES" in record.getMessage()]) == 1
    assert world.count("safedefer_outbox") == 1
    app.close()
    owners = make_app(queue=MemoryQueue(), outboxes=[world.uri(world.shop)])
    assert owners.outbox.sweep() == 1
    assert waiting(owners) == {task.id}
    owners.close()
    world.look.execute(f"DROP OWNED BY {clerk}; DROP ROLE {clerk}")


def test_an_own_table_from_which_the_right_to_delete_was_taken_is_said_once(world, app, caplog):
    world.as_(
        world.shop, f"CREATE TABLE safedefer_outbox ({COLUMNS}); REVOKE DELETE ON safedefer_outbox FROM {world.shop}"
    )
    for _ in range(3):
        assert app.outbox.sweep() == 0
    assert len([record for record in caplog.records if "GRANT" in record.getMessage()]) == 1


def test_a_schema_that_is_not_on_the_path_is_swept_if_it_is_named(world, caplog):
    world.as_(world.shop, "CREATE SCHEMA elsewhere")
    producer = make_app(queue=MemoryQueue())
    with psycopg.connect(world.url(world.shop), autocommit=True) as connection:
        connection.execute("SET search_path TO elsewhere")
        with producer.transaction(connection):
            task = producer.options(transactional=True).defer(tasks.add, 1)
    until(lambda: waiting(producer) == {task.id})
    with psycopg.connect(world.url(world.shop)) as connection:
        text = '{"no": "task"}'
        connection.execute("INSERT INTO elsewhere.safedefer_outbox VALUES ('odd', 0, %s, 'test')", [text])
    producer.close()
    caplog.clear()
    unnamed = make_app(queue=MemoryQueue(), outboxes=[world.uri(world.shop)])
    for _ in range(2):
        assert unnamed.outbox.sweep() == 0
    unnamed.close()
    assert "?schema=elsewhere" in caplog.text
    assert "no task" not in caplog.text
    named = make_app(queue=MemoryQueue(), outboxes=[f"{world.uri(world.shop)}&schema=elsewhere"])
    named.outbox.sweep()
    named.close()
    assert "no task" in caplog.text


# --- Two applications on one database ------------------------------------------------------------


def test_a_task_is_taken_by_an_application_of_its_environment_only(world):
    staging = make_app(queue=MemoryQueue(), environment="staging", outboxes=[world.uri(world.shop)])
    prod = make_app(queue=MemoryQueue(), environment="prod", outboxes=[world.uri(world.shop)])
    for app in (staging, prod):  # no thread of theirs: the other one is to look first
        app.outbox._relay.expect = lambda *_: None
    with psycopg.connect(world.url(world.shop)) as connection:
        theirs, ours = defer(staging, connection), defer(prod, connection)
    assert (prod.outbox.sweep(), waiting(prod)) == (1, {ours.id})
    assert (prod.outbox.sweep(), world.count("safedefer_outbox")) == (0, 1)
    assert (staging.outbox.sweep(), waiting(staging)) == (1, {theirs.id})
    for app in (staging, prod):
        app.close()


def test_a_task_is_taken_by_an_application_that_has_its_queue_only(world):
    mail = make_app(queue=MemoryQueue(), queues=["mail"], outboxes=[world.uri(world.shop)])
    bulk = make_app(queue=MemoryQueue(), queues=["bulk"], outboxes=[world.uri(world.shop)])
    for app in (mail, bulk):
        app.outbox._relay.expect = lambda *_: None
    with psycopg.connect(world.url(world.shop)) as connection, mail.transaction(connection):
        task = mail.options(transactional=True, queue="mail").defer(tasks.add, 1)
    assert (bulk.outbox.sweep(), waiting(bulk)) == (0, set())
    assert (mail.outbox.sweep(), waiting(mail)) == (1, {task.id})
    for app in (mail, bulk):
        app.close()


def test_a_table_and_rows_from_before_there_were_environments_are_used_and_brought_up_to_date(world):
    world.as_(world.shop, f"CREATE TABLE safedefer_outbox ({OLD_COLUMNS})")
    staging = make_app(queue=MemoryQueue(), environment="staging", outboxes=[world.uri(world.shop)])
    prod = make_app(queue=MemoryQueue(), environment="prod", outboxes=[world.uri(world.shop)])
    for app in (staging, prod):
        app.outbox._relay.expect = lambda *_: None
    with psycopg.connect(world.url(world.shop)) as connection:
        theirs, ours = defer(staging, connection), defer(prod, connection)
    assert (prod.outbox.sweep(), waiting(prod)) == (1, {ours.id})
    query = "SELECT id, environment FROM safedefer_outbox"
    assert world.look.execute(query).fetchall() == [(theirs.id, None)]
    with psycopg.connect(world.url(world.shop)) as connection:
        later = defer(staging, connection)
    assert world.look.execute(f"{query} WHERE environment IS NOT NULL").fetchall() == [(later.id, "staging")]
    assert (staging.outbox.sweep(), waiting(staging)) == (2, {theirs.id, later.id})
    for app in (staging, prod):
        app.close()


def test_isolation_levels_of_the_user_do_not_matter(world, app):
    for level in psycopg.IsolationLevel:
        with psycopg.connect(world.url(world.shop)) as connection:
            connection.isolation_level = level
            task = defer(app, connection)
        until(lambda task=task: task.id in waiting(app))


# --- The PostgreSQL queue's own connections ------------------------------------------------------


def hijack_the_queue(world):
    """``mallory`` may enqueue: more is not needed to make operators that fit the queue's columns better."""
    migrate(world.uri(world.shop))
    world.as_(world.shop, f"GRANT USAGE ON SCHEMA safedefer TO {world.mallory}")
    world.as_(world.mallory, STEAL.format(schema="public").replace("GRANT ALL ON SCHEMA public TO PUBLIC;", ""))
    world.as_(world.mallory, HIJACKERS)
    world.as_(world.mallory, """
        CREATE FUNCTION public.hijack(safedefer.pgqueuer_status, safedefer.pgqueuer_status) RETURNS boolean
            LANGUAGE plpgsql AS $$ BEGIN PERFORM public.steal(); RETURN pg_catalog.enum_eq($1, $2); END $$;
        CREATE OPERATOR public.= (
            LEFTARG = safedefer.pgqueuer_status, RIGHTARG = safedefer.pgqueuer_status, FUNCTION = public.hijack
        );
        CREATE FUNCTION public.hijack(bigint, double precision) RETURNS boolean LANGUAGE plpgsql AS
            $$ BEGIN PERFORM public.steal(); RETURN $1::float8 OPERATOR(pg_catalog.<) $2; END $$;
        CREATE OPERATOR public.< (LEFTARG = bigint, RIGHTARG = double precision, FUNCTION = public.hijack);
    """)  # fmt: skip


def test_functions_and_operators_of_another_role_are_not_called_by_the_queue(world):
    hijack_the_queue(world)
    queue = PostgresQueue(world.uri(world.shop))
    now = time.time()
    for task in (make_task(), make_task(name="n")):
        queue.enqueue_many((task,))
    leases = take(queue, now=now + 1)
    for lease in leases:
        queue.settle_many([(lease, DONE)], now=now + 2)
    queue.stats(now=now)
    queue.close()
    assert not world.is_robbed()
    assert len(leases) == 2


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_functions_and_operators_of_another_role_are_not_called_in_a_transaction_of_the_queues_database(world, driver):
    """The path of the user's connection is what it was, after a task that was stored and after one that was refused."""
    hijack_the_queue(world)
    world.as_(
        world.mallory,
        "CREATE FUNCTION public.now() RETURNS timestamptz LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM public.steal(); RETURN pg_catalog.now(); END $$",
    )
    path = "public, pg_catalog"
    world.look.execute(f"ALTER ROLE {world.shop} SET search_path = {path}")
    app = make_app(queue=PostgresQueue(world.uri(world.shop)))
    named = app.options(transactional=True, name="n")

    def blocking():
        with psycopg.connect(world.uri(world.shop)) as connection:
            with app.transaction(connection):
                named.defer(tasks.add, 1)
                with pytest.raises(TaskAlreadyExistsError):
                    named.defer(tasks.add, 1)
                assert connection.execute("SHOW search_path").fetchone() == (path,)
            assert connection.execute("SHOW search_path").fetchone() == (path,)

    async def awaited():
        connection = await asyncpg.connect(world.uri(world.shop))
        async with app.transaction(connection):
            await named.defer_async(tasks.add, 1)
            with pytest.raises(TaskAlreadyExistsError):
                await named.defer_async(tasks.add, 1)
            assert await connection.fetchval("SHOW search_path") == path
        assert await connection.fetchval("SHOW search_path") == path
        await connection.close()

    if driver == "psycopg":
        blocking()
    else:
        asyncio.run(awaited())
    assert len(app.queue.tasks()) == 1
    app.close()
    assert not world.is_robbed()
