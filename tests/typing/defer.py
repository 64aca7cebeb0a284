"""What type checkers say of ``defer``: run by mypy and pyright, never executed.

Every ``type: ignore`` is an error that must be found: ``warn_unused_ignores`` fails when it is not.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from datetime import UTC, datetime
from typing import assert_type

import psycopg
from psycopg.rows import TupleRow
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from safedefer import App, Deferral, Task, TaskContext, TaskRetryOptions, current_task, deferrable, deferred
from safedefer.delivery.handler import Response
from safedefer.testing import DeferredTask, Ran, TestApp


def send(order: int, *, copy: bool = False) -> str:
    return f"{order} {copy}"


async def send_later(order: int) -> None: ...


class Mailer:
    def __init__(self, host: str) -> None:
        self.host = host

    def __call__(self, order: int) -> None: ...

    def send(self, order: int, subject: str = "") -> None: ...

    @classmethod
    def make(cls, host: str) -> Mailer:
        return cls(host)


def the_arguments_are_those_of_the_callable(app: App) -> None:
    assert_type(app.defer(send, 1), Task)
    assert_type(app.defer(send, order=1, copy=True), Task)
    app.defer(send_later, 1)
    app.defer(Mailer, "host")
    app.defer(Mailer("host"), 1)
    app.defer(Mailer("host").send, 1, subject="x")
    app.defer(Mailer.make, "host")
    app.defer(len, [1])


def wrong_arguments_are_found(app: App) -> None:
    app.defer(send, "1")  # type: ignore[arg-type]
    app.defer(send)  # type: ignore[call-arg]
    app.defer(send_later, 1, 2)  # type: ignore[call-arg]
    app.defer(send, 1, copies=True)  # type: ignore[call-arg]
    app.defer(send, 1, _countdown=60)  # type: ignore[call-arg]
    app.defer(send_later, None)  # type: ignore[arg-type]
    app.defer(Mailer("host").send, 1, subject=2)  # type: ignore[arg-type]
    app.defer(5)  # type: ignore[arg-type]


def options_are_checked_too(app: App) -> None:
    deferral = app.options(
        countdown=1.5, headers={"X": "1"}, name="n", queue="mail", retry_options=TaskRetryOptions(task_retry_limit=1)
    )
    assert_type(deferral, Deferral)
    assert_type(deferral.defer(send, 1), Task)
    assert_type(app.options(eta=datetime.now(UTC), url=None).defer_many([(send, (1,), {})]), list[Task])
    deferral.defer(send, "1")  # type: ignore[arg-type]
    app.options(countdwon=1)  # type: ignore[call-arg]
    app.options(countdown="1")  # type: ignore[arg-type]
    app.options(retry_options={"task_retry_limit": 1})  # type: ignore[arg-type]
    app.options(60)  # type: ignore[call-arg]
    assert_type(app.options(queue="mail").defer_many([], atomic=False), list[Task])


async def the_async_forms_are_the_same(app: App) -> None:
    assert_type(await app.defer_async(send, 1), Task)
    assert_type(await app.options(queue="mail").defer_async(send_later, 1), Task)
    await app.defer_async(send, "1")  # type: ignore[arg-type]
    assert_type(await app.handle({}, b""), Response)


def a_block_is_of_the_kind_of_its_connection(
    app: App, lite: sqlite3.Connection, pg: psycopg.Connection[TupleRow], session: Session
) -> None:
    assert_type(app.transaction(lite), AbstractContextManager[None])
    assert_type(app.transaction(pg), AbstractContextManager[None])
    with app.transaction(session), app.once(session, "charge-42") as first:
        assert_type(first, bool)
    app.once(pg, 42)  # type: ignore[call-overload]


async def a_block_is_awaited_where_its_connection_is(
    app: App, pg: psycopg.AsyncConnection[TupleRow], session: AsyncSession
) -> None:
    assert_type(app.transaction(pg), AbstractAsyncContextManager[None])
    async with app.transaction(session), app.once(session) as first:
        assert_type(first, bool)
    with app.transaction(session):  # type: ignore[attr-defined]
        pass


def the_drop_in_module_takes_what_the_original_took() -> None:
    assert_type(deferred.defer(send, 1, _countdown=60, _queue="mail", copy=True), Task)
    assert_type(deferred.serialize(send, 1), bytes)
    assert_type(deferred.run(b""), object)
    deferred.defer(send, 1, _countdown="60")  # type: ignore[arg-type]
    deferred.defer(5)  # type: ignore[arg-type]


async def the_async_form_takes_the_same() -> None:
    assert_type(await deferred.defer_async(send, 1, _countdown=60, _queue="mail", copy=True), Task)
    await deferred.defer_async(send, 1, _countdown="60")  # type: ignore[arg-type]
    await deferred.defer_async(5)  # type: ignore[arg-type]


def a_task_says_what_it_is(task: Task) -> None:
    assert_type(task.name, str | None)
    assert_type(task.headers, Mapping[str, str])
    assert_type(task.eta, datetime)
    assert_type(task.size, int)
    task.name = "other"  # type: ignore[misc]


def a_mark_keeps_the_type() -> None:
    assert_type(deferrable(send)(1, copy=True), str)
    assert_type(current_task(), TaskContext | None)


def the_handler_can_be_subclassed() -> None:
    class Mine(deferred.TaskHandler):
        pass

    assert issubclass(Mine, deferred.TaskHandler)


def the_test_app_is_an_app() -> None:
    with TestApp("shop.tasks") as app:
        assert_type(app, TestApp)
        assert_type(app.run_due(), list[Ran])
        assert_type(app.assert_deferred(send, 1, queue="mail", countdown=None), DeferredTask)
        assert_type(app.deferred_tasks, list[DeferredTask])
        app.refute_deferred(send, eta=datetime.now(UTC), kwargs={"queue": "mail"})
        app.fail_next(send, ValueError("no"), times=2)
        app.fail_next(send, ValueError)
        app.assert_deferred(send, countdown="soon")  # type: ignore[arg-type]
        app.defer(send, "1")  # type: ignore[arg-type]
