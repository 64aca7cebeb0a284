"""Transactions, unique tasks and effects that are had once, through the App and the drop-in module."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import closing
from typing import NamedTuple

import apsw
import pytest
from sqlalchemy import create_engine, orm, text

import safedefer
from safedefer import Policy, deferred
from safedefer.dispatcher.loop import Dispatcher, InProcessDelivery
from safedefer.errors import (
    BadTransactionStateError,
    InvalidTaskError,
    TaskAlreadyExistsError,
)
from safedefer.queues.base import TaskState
from tests import sample_tasks as tasks
from tests.unit import charging
from tests.unit.apps import make_app


@pytest.fixture(autouse=True)
def clean():
    tasks.reset()
    charging.RAN.clear()


@pytest.fixture
def app(tmp_path):
    app = make_app(queue=f"sqlite:///{tmp_path}/tasks.db", policy=Policy("tests.sample_tasks", "tests.unit.charging"))
    safedefer.configure(app)
    yield app
    safedefer.configure(None)
    app.close()


@pytest.fixture
def connection(tmp_path):
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        connection.execute("CREATE TABLE orders (id INTEGER)")
        connection.commit()
        yield connection


def work_off(app):
    asyncio.run(Dispatcher(app.queue, InProcessDelivery(app.handle), clock=time.time).run_until_empty())


def ids(app):
    return {view.id for view in app.queue.tasks()}


def test_the_drop_in_function_defers_in_the_transaction(app, connection):
    with app.transaction(connection):
        connection.execute("INSERT INTO orders VALUES (1)")
        task = deferred.defer(tasks.add, 1, 2, _transactional=True)
        large = deferred.defer(tasks.keywords, text="x" * 20_000, _transactional=True)
        assert (task.was_enqueued, ids(app)) == (False, set())
    assert ids(app) == {task.id, large.id}
    work_off(app)
    assert tasks.RAN == [("add", 1, 2, 1), {"text": "x" * 20_000}]


def test_what_is_undone_is_not_enqueued_and_leaves_no_blob(app, connection):
    with pytest.raises(ZeroDivisionError), app.transaction(connection):
        deferred.defer(tasks.keywords, text="x" * 20_000, _transactional=True)
        raise ZeroDivisionError
    app.outbox.sweep()
    assert ids(app) == set()
    with closing(apsw.Connection(app.queue.path)) as file:
        assert file.execute("SELECT count(*) FROM safedefer_blobs").get == 0


def test_a_session_commits_its_objects_and_tasks_together(app, tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path}/orm.db")
    with orm.Session(engine) as session:
        with app.transaction(session):
            session.execute(text("CREATE TABLE orders (id INTEGER)"))
            task = app.options(transactional=True).defer(tasks.add, 1)
        assert ids(app) == {task.id}
    engine.dispose()


def test_the_queues_own_file_commits_at_once(app, tmp_path):
    app.defer(tasks.add, 0)
    with closing(apsw.Connection(f"{tmp_path}/tasks.db")) as connection, app.transaction(connection):
        connection.execute("CREATE TABLE orders (id INTEGER)")
        app.options(transactional=True).defer_many([(tasks.add, (1,), {}), (tasks.add, (2,), {})])
    assert len(ids(app)) == 3


async def test_a_transactional_task_is_deferred_in_its_own_thread(app, connection):
    with app.transaction(connection):
        task = await app.options(transactional=True).defer_async(tasks.add, 1)
        other = await deferred.defer_async(tasks.add, 2, _transactional=True)
    assert ids(app) == {task.id, other.id}


def test_without_a_transaction_or_with_a_name_it_is_an_error(app, connection):
    with pytest.raises(BadTransactionStateError, match="with app"):
        deferred.defer(tasks.add, 1, _transactional=True)
    with app.transaction(connection):
        with pytest.raises(BadTransactionStateError, match="no name"):
            deferred.defer(tasks.add, 1, _transactional=True, _name="n")
        with pytest.raises(BadTransactionStateError, match="not unique"):
            app.options(transactional=True, unique=True).defer(tasks.add, 1)
        plain = deferred.defer(tasks.add, 2)
        assert ids(app) == {plain.id}  # what is not transactional does not wait
    assert ids(app) == {plain.id}


def test_closing_does_not_wait_for_a_relay_that_waits_for_the_app(app, connection):
    connection.execute("BEGIN")
    with app.transaction(connection):
        deferred.defer(tasks.add, 1, _transactional=True)
    connection.rollback()
    began = time.monotonic()
    app.close()
    assert time.monotonic() - began < 5.0


# --- Once ---------------------------------------------------------------------------------------


def test_an_effect_is_had_once_however_often_its_task_runs(app, connection, tmp_path):
    app.options(
        retry_options=safedefer.TaskRetryOptions(task_retry_limit=2, min_backoff_seconds=0.0, max_backoff_seconds=0.0)
    ).defer(charging.charge, str(tmp_path / "shop.db"))
    work_off(app)
    assert charging.RAN == [True, False, False]
    (dead,) = app.queue.tasks(states=[TaskState.DEAD])
    app.retry(dead.id)
    work_off(app)
    assert charging.RAN == [True] + [False] * 5
    assert connection.execute("SELECT count(*) FROM orders").fetchone() == (1,)


def test_a_named_effect_is_had_once_by_whoever_asks(app, connection):
    with app.once(connection, "charge-42") as first:
        assert first
    with app.once(connection, "charge-42") as first:
        assert not first
    with pytest.raises(BadTransactionStateError, match="name the effect"):
        app.once(connection)


# --- Unique -------------------------------------------------------------------------------------


def test_a_unique_task_that_waits_already_is_returned(app):
    unique = app.options(unique=True)
    first = unique.defer(tasks.add, 1, 2, scale=3)
    again = unique.defer(tasks.add, 1, 2, scale=3)
    assert (again.id, again.payload, again.eta, again.url) == (first.id, first.payload, first.eta, first.url)
    assert unique.defer(tasks.add, 1, 3, scale=3).id != first.id
    assert unique.defer(tasks.add_later, 1, 2).id != first.id
    assert app.options(unique=True, queue="mail").defer(tasks.add, 1, 2, scale=3).id != first.id
    assert app.defer(tasks.add, 1, 2, scale=3).id != first.id
    assert len(ids(app)) == 5


def test_many_and_nested_plain_arguments_are_compared_too(app):
    unique, rows = app.options(unique=True), [{"id": n, "tags": ["a"]} for n in range(40)]
    first = unique.defer(tasks.keywords, rows=rows, a=1)
    assert unique.defer(tasks.keywords, a=1, rows=[dict(row) for row in rows]).id == first.id
    assert unique.defer(tasks.keywords, a=1, rows=rows[1:]).id != first.id


def test_the_order_of_keywords_makes_no_other_call(app):
    unique = app.options(unique=True)
    assert unique.defer(tasks.keywords, a=1, b=2).id == unique.defer(tasks.keywords, b=2, a=1).id
    assert unique.defer(tasks.keywords, a=1, b=True).id != unique.defer(tasks.keywords, a=1, b=1).id


def test_how_a_call_is_delivered_makes_no_other_call(app):
    first = app.options(unique=True).defer(tasks.add, 1, 2)
    for options in (
        {"retry_options": safedefer.TaskRetryOptions(task_retry_limit=1)},
        {"deadline": 60},
        {"headers": {"X-Shop": "1"}},
        {"countdown": 60},
    ):
        assert app.options(unique=True, **options).defer(tasks.add, 1, 2).id == first.id
    assert app.options(unique=True, target="big").defer(tasks.add, 1, 2).id != first.id


class Call(NamedTuple):
    obj: object
    args: tuple
    kwargs: dict


def call(obj, *args, **kwargs):
    return Call(obj, args, kwargs)


# parameters, one call, another one, whether the second is the same task
SOME = [
    (("a",), call(tasks.add, 1, 2), call(tasks.add, 1, 3), True),
    (("a",), call(tasks.add, 1, 2), call(tasks.add, b=5, a=1), True),
    (("a",), call(tasks.add, 1), call(tasks.add, 2), False),
    (("a",), call(tasks.add, 1), call(tasks.add, True), False),
    (("a",), call(tasks.add, 1), call(tasks.add_later, 1), False),
    (("b", "a"), call(tasks.add, 1), call(tasks.add, 1, b=0, scale=9), True),
    (("a", "b"), call(tasks.add, 1), call(tasks.add, 1, 1), False),
    (("scale",), call(tasks.add, 1), call(tasks.add, 2, scale=1), True),
    (("order",), call(tasks.keywords, order=1, user=1), call(tasks.keywords, user=2, order=1), True),
    (("order",), call(tasks.keywords, order=[1]), call(tasks.keywords, order=[2]), False),
    (("order",), call(tasks.keywords, order={8, 0}), call(tasks.keywords, order={0, 8}), True),
    (("order",), call(tasks.keywords, order=(shared := [1]), a=shared), call(tasks.keywords, order=[1], a=[1]), True),
    (("amount",), call(tasks.Account(1).pay, 5, "x"), call(tasks.Account(1).pay, 5, "y"), True),
    (("amount",), call(tasks.Account(1).pay, 5, "x"), call(tasks.Account(2).pay, 5, "x"), False),
]


@pytest.mark.parametrize("until", ["end", "start"])
@pytest.mark.parametrize(("names", "first", "again", "same"), SOME)
def test_a_call_may_be_unique_by_some_of_its_arguments(app, names, first, again, same, until):
    unique = app.options(unique=names, unique_until=until)
    found = unique.defer(first.obj, *first.args, **first.kwargs)
    assert (unique.defer(again.obj, *again.args, **again.kwargs).id == found.id) is same
    whole = app.options(unique=True).defer(first.obj, *first.args, **first.kwargs)
    assert whole.id != found.id, "whole calls and some of their arguments are never the same"
    assert app.options(unique=True).defer(first.obj, *first.args, **first.kwargs).id == whole.id


@pytest.mark.parametrize(
    ("names", "wrong", "message"),
    [
        (("c",), call(tasks.add, 1), "no argument 'c'; it has a, b, scale"),
        (("values",), call(tasks.keywords, a=1), "no argument 'values'; it has a"),
        (("a",), call(tasks.keywords), "it has none"),
        (("self",), call(tasks.Account(1).pay, 5, "x"), "it has amount, note"),
    ],
)
def test_an_argument_that_the_call_has_not_makes_it_not_unique(app, names, wrong, message):
    with pytest.raises(InvalidTaskError, match=message):
        app.options(unique=names).defer(wrong.obj, *wrong.args, **wrong.kwargs)
    assert ids(app) == set()


def test_until_the_start_a_call_that_comes_while_its_task_runs_is_another_one(app):
    unique = app.options(unique=True, unique_until="start")
    first = unique.defer(tasks.add, 1)
    assert unique.defer(tasks.add, 1).id == first.id
    (lease,) = app.queue.lease(owner="test", limit=1, seconds=60.0, now=time.time() + 1)
    second = unique.defer(tasks.add, 1)
    assert second.id not in {first.id, lease.task.unique_key}
    assert unique.defer(tasks.add, 1).id == second.id


def test_a_unique_task_that_ended_may_come_again(app):
    unique = app.options(unique=True, countdown=0)
    first = unique.defer(tasks.keywords, text="x" * 20_000)
    work_off(app)
    second = unique.defer(tasks.keywords, text="x" * 20_000)
    assert second.id != first.id
    assert unique.defer(tasks.keywords, text="x" * 20_000).id == second.id
    work_off(app)
    assert len(tasks.RAN) == 2


def test_unique_has_no_name_and_comes_alone(app):
    with pytest.raises(InvalidTaskError, match="no name"):
        app.options(unique=True, name="n")
    with pytest.raises(InvalidTaskError, match="one by one"):
        app.options(unique=True).defer_many([(tasks.add, (1,), {})])
    with pytest.raises(TaskAlreadyExistsError):
        app.options(name="n").defer(tasks.add, 1)
        app.options(name="n").defer(tasks.add, 1)


def test_a_sqlite_connection_runs_no_statement_of_postgresqls():
    from safedefer.transactions.databases.base import run_now
    from safedefer.transactions.databases.sqlite import SQLite3Source

    with closing(sqlite3.connect(":memory:")) as connection:
        source = SQLite3Source(connection)
        assert source.native is False
        with pytest.raises(BadTransactionStateError, match="use the outbox"):
            run_now(source.run("SELECT $1", (1,)))
