"""A request without an answer, by real HTTP on every engine: the ledger says whether the task ran, runs, or never began."""

import asyncio
import contextlib
import time

import aiohttp
import pytest
from aiohttp import web

from safedefer import TaskRetryOptions
from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions, HttpDelivery
from safedefer.queues.base import TaskState
from safedefer.queues.postgres import migrate
from safedefer.web.server import serving
from tests import sample_tasks as tasks
from tests.postgres.server import fresh_database, shared_server
from tests.unit.apps import make_app

ONCE = TaskRetryOptions(task_retry_limit=0, min_backoff_seconds=0.05, max_backoff_seconds=0.05)


@pytest.fixture(params=["memory", "sqlite", "postgres"])
async def app(request, tmp_path):
    tasks.reset()
    with contextlib.ExitStack() as stack:
        url = {"memory": "memory://", "sqlite": f"sqlite:///{tmp_path}/q.db"}.get(request.param)
        if url is None:
            server = await asyncio.to_thread(shared_server)
            url = server.dsn(stack.enter_context(fresh_database(server)))
            await asyncio.to_thread(migrate, url)
        app = make_app(queue=url)
        yield app
        tasks.GATE.set()
        await asyncio.to_thread(app.close)


@contextlib.asynccontextmanager
async def proxy(address, *, breaks):
    """Pass requests on, but break the first connections before anything of them reached the handler."""
    seen = []

    async def forward(request):
        seen.append(await request.read())
        if len(seen) <= breaks:
            request.transport.abort()
            return web.Response(status=500)
        async with session.post(address + request.raw_path, data=seen[-1], headers=request.headers) as answer:
            return web.Response(
                status=answer.status, headers={"Safedefer-Outcome": answer.headers["Safedefer-Outcome"]}
            )

    web_app = web.Application()
    web_app.router.add_route("*", "/{path:.*}", forward)
    runner = web.AppRunner(web_app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    async with aiohttp.ClientSession() as session:
        yield runner.addresses[0][1], seen
    await runner.cleanup()


async def work(app, deliver, until_this):
    dispatcher = Dispatcher(app.queue, deliver, clock=time.time, options=DispatcherOptions(poll_seconds=0.1))
    running = asyncio.create_task(dispatcher.run())
    try:
        async with asyncio.timeout(60):
            while not await until_this():  # noqa: ASYNC110  # what is waited for has no event
                await asyncio.sleep(0.02)
    finally:
        dispatcher.stop()
        await running


def stands(app, task, *states):
    async def check():
        return (await asyncio.to_thread(app.queue.find, task.id)).state in states

    return check


async def test_a_last_attempt_that_never_reached_the_handler_is_made_again(app):
    task = app.options(retry_options=ONCE).defer(tasks.add, 1)
    async with serving(app, "127.0.0.1", 0) as url, proxy(url, breaks=2) as (port, seen):
        async with HttpDelivery(f"http://127.0.0.1:{port}") as deliver:
            await work(app, deliver, stands(app, task, TaskState.SUCCEEDED, TaskState.DEAD))
    view = app.queue.find(task.id)
    assert (view.state, view.attempts, len(seen)) == (TaskState.SUCCEEDED, 1, 3)
    assert [name for name, *_ in tasks.RAN] == ["add"]


async def test_a_task_that_outlasts_the_time_out_of_its_last_attempt_and_succeeds_is_no_dead_letter(app):
    task = app.options(retry_options=ONCE).defer(tasks.pass_gate)
    async with serving(app, "127.0.0.1", 0) as url, HttpDelivery(url, timeout=0.5) as http:

        async def put_off_and_ended():
            if tasks.STARTED.is_set() and (await stands(app, task, TaskState.WAITING)()):
                tasks.GATE.set()
            return await stands(app, task, TaskState.SUCCEEDED, TaskState.DEAD)()

        await work(app, http, put_off_and_ended)
    view = app.queue.find(task.id)
    assert (view.state, view.attempts) == (TaskState.SUCCEEDED, 1)
    assert tasks.RAN == ["gate"]
    assert app.retry(task.id) is None


async def test_a_task_that_outlasts_the_time_out_of_its_last_attempt_and_fails_is_one(app):
    task = app.options(retry_options=ONCE).defer(tasks.pass_gate, fails=True)
    async with serving(app, "127.0.0.1", 0) as url, HttpDelivery(url, timeout=0.5) as http:

        async def ended():
            if tasks.STARTED.is_set() and (await stands(app, task, TaskState.WAITING)()):
                tasks.GATE.set()
            return await stands(app, task, TaskState.SUCCEEDED, TaskState.DEAD)()

        await work(app, http, ended)
    view = app.queue.find(task.id)
    assert (view.state, view.attempts, tasks.RAN) == (TaskState.DEAD, 1, ["gate"])


async def test_a_thread_that_passes_the_deadline_of_its_last_attempt_and_succeeds_is_no_dead_letter(app):
    task = app.options(retry_options=ONCE, deadline=1).defer(tasks.pass_gate)
    async with serving(app, "127.0.0.1", 0) as url, HttpDelivery(url) as http:

        async def ended():
            if tasks.STARTED.is_set() and (await stands(app, task, TaskState.WAITING)()):
                tasks.GATE.set()
            return await stands(app, task, TaskState.SUCCEEDED, TaskState.DEAD)()

        await work(app, http, ended)
    view = app.queue.find(task.id)
    assert (view.state, view.attempts, tasks.RAN) == (TaskState.SUCCEEDED, 1, ["gate"])
