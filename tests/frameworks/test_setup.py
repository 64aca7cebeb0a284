"""``setup`` and ``init_app`` of aiohttp, FastAPI and Flask, in this process."""

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from fastapi import APIRouter, Depends, FastAPI, HTTPException
from fastapi.testclient import TestClient as FastApiClient
from flask import Flask

from safedefer import ConfigurationError, InvalidTaskError, NotDeferrable, Policy
from safedefer.frameworks import aiohttp as on_aiohttp
from safedefer.frameworks import fastapi as on_fastapi
from safedefer.frameworks import flask as on_flask
from safedefer.frameworks.fastapi import Tasks
from safedefer.queues.memory.queue import MemoryQueue
from safedefer.testing import TestApp
from safedefer.web.body import warn_of_taken_body
from tests import sample_tasks as sample
from tests.unit.apps import JOSE, make_app

URL = "/_ah/queue/deferred"


class FullQueue(MemoryQueue):
    """A queue that takes nothing."""

    def enqueue_many(self, tasks, /):
        from safedefer import QueueUnavailable

        raise QueueUnavailable("the disk is full; make room")


@pytest.fixture(autouse=True)
def clean():
    sample.reset()


@pytest.fixture
def app():
    app = make_app()
    yield app
    sample.GATE.set()
    app.close()


# --- aiohttp ---


async def test_aiohttp_serves_the_routes_and_knows_the_app(app):
    web_app = web.Application()
    on_aiohttp.setup(web_app, app)
    assert web_app[on_aiohttp.APP] is app
    async with TestClient(TestServer(web_app)) as client:
        answer = await client.post(URL, data=app.serialize(sample.add, 1), headers=JOSE)
        assert answer.headers["Safedefer-Outcome"] == "succeeded"


async def test_aiohttp_of_a_second_server_takes_tasks_after_the_first_has_ended(app):
    for _ in range(2):
        web_app = web.Application()
        on_aiohttp.setup(web_app, app)
        async with TestClient(TestServer(web_app)) as client:
            answer = await client.post(URL, data=app.serialize(sample.add, 1), headers=JOSE)
            assert answer.headers["Safedefer-Outcome"] == "succeeded"
        assert (await app.handle(JOSE, app.serialize(sample.add, 1))).status == 503


async def test_aiohttp_waits_for_a_task_that_runs_when_it_ends(app):
    web_app = web.Application()
    on_aiohttp.setup(web_app, app)
    async with TestClient(TestServer(web_app)) as client:
        running = asyncio.create_task(client.post(URL, data=app.serialize(sample.wait_for_gate), headers=JOSE))
        await asyncio.to_thread(sample.STARTED.wait, 60)
        ending = asyncio.create_task(client.server.runner.shutdown())
        while (await app.handle(JOSE, app.serialize(sample.add, 1))).status != 503:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert not running.done()
        sample.GATE.set()
        assert (await running).headers["Safedefer-Outcome"] == "succeeded"
        await ending


async def test_aiohttp_does_not_start_where_the_policy_cannot_be_loaded():
    web_app = web.Application()
    on_aiohttp.setup(web_app, make_app(policy=Policy("tests.no_such_module")))
    with pytest.raises(ConfigurationError, match="no_such_module"):
        await TestServer(web_app).start_server()


# --- FastAPI ---


def api_of(app, **settings):
    api = FastAPI(**settings)
    on_fastapi.setup(api, app)

    @api.post("/add/{number}")
    async def add(number: int, tasks: Tasks) -> str:
        task = tasks.add_task(sample.add, number)
        tasks.options(countdown=60, queue="mail").add_task(sample.add, a=number)
        if number == 1:
            raise HTTPException(409)
        if number == 2:
            raise ZeroDivisionError
        if number == 3:
            tasks.add_task(lambda: None)
        return task.id

    @api.post("/thread")
    def thread(tasks: Tasks) -> None:
        numbers = [1]
        tasks.add_task(sample.keywords, numbers=numbers)
        numbers.append(2)

    return api


def test_fastapi_tasks_are_stored_with_the_response(app):
    with TestApp(app) as kit, FastApiClient(api_of(app)) as client:
        task_id = client.post("/add/7").json()
        first, second = kit.deferred_tasks
        assert (first.id, first.args, first.queue) == (task_id, (7,), "default")
        assert (second.kwargs, second.queue, second.countdown) == ({"a": 7}, "mail", 60)
        assert client.post("/thread").status_code == 200
        assert kit.deferred_tasks[-1].kwargs == {"numbers": [1]}, "as they were when they were added"
        kit.run_due()
        assert ("add", 7, 0, 1) in sample.RAN


@pytest.mark.parametrize(("number", "error"), [(2, ZeroDivisionError), (3, NotDeferrable)])
def test_fastapi_stores_nothing_where_the_path_operation_raises(app, number, error):
    with TestApp(app) as kit, FastApiClient(api_of(app)) as client:
        with pytest.raises(error):
            client.post(f"/add/{number}")
        assert client.post("/add/1").status_code == 409
        assert kit.deferred_tasks == []


def test_fastapi_tasks_of_a_dependency_go_with_its_path_operation(app):
    def defers(tasks: Tasks) -> None:
        tasks.add_task(sample.add, 1)

    router = APIRouter()

    @router.post("/add", dependencies=[Depends(defers)])
    async def add(tasks: Tasks) -> None:
        tasks.add_task(sample.add, 2)

    api = FastAPI()
    on_fastapi.setup(api, app)
    api.include_router(router)
    with TestApp(app) as kit, FastApiClient(api) as client:
        assert client.post("/add").status_code == 200
        assert [task.args for task in kit.deferred_tasks] == [(1,), (2,)]


def test_fastapi_answers_with_an_error_where_the_queue_takes_nothing():
    client = FastApiClient(api_of(make_app(queue=FullQueue())), raise_server_exceptions=False)
    assert client.post("/add/7").status_code == 500


def test_fastapi_unique_tasks_and_inline_mode(app):
    api = FastAPI()
    on_fastapi.setup(api, app)

    @api.post("/")
    async def unique(tasks: Tasks) -> None:
        for number in (1, 1, 2):
            tasks.options(unique=True).add_task(sample.add, number)
        tasks.add_task(sample.add, 3)

    with TestApp(app) as kit, FastApiClient(api) as client:
        client.post("/")
        assert sorted(task.args for task in kit.deferred_tasks) == [(1,), (2,), (3,)]
    with TestApp(app, inline=True), FastApiClient(api) as client:
        client.post("/")
        assert sorted(ran[1] for ran in sample.RAN) == [1, 2, 3]


def test_fastapi_refuses_a_transactional_task(app):
    with pytest.raises(InvalidTaskError, match="inside the block"):
        on_fastapi.DurableTasks(app).options(transactional=True).add_task(sample.add, 1)


def test_fastapi_serves_tasks_within_its_own_lifespan_more_than_once(app):
    from contextlib import asynccontextmanager

    seen = []

    @asynccontextmanager
    async def lifespan(api):
        seen.append("begin")
        yield {"what": "state"}
        seen.append("end")

    api = api_of(app, lifespan=lifespan)
    for _ in range(2):
        with FastApiClient(api) as client:
            answer = client.post(URL, content=app.serialize(sample.add, 1), headers=JOSE)
            assert answer.headers["Safedefer-Outcome"] == "succeeded"
            assert client.get(URL).status_code == 405
    assert seen == ["begin", "end"] * 2
    assert URL not in api.openapi()["paths"]


def test_fastapi_below_a_mount(app):
    outer = FastAPI()
    outer.mount("/api", api_of(app))
    answer = FastApiClient(outer).post(f"/api{URL}", content=app.serialize(sample.add, 1), headers=JOSE)
    assert answer.headers["Safedefer-Outcome"] == "succeeded"


@pytest.mark.parametrize(
    ("how", "outcome"), [("kept", "succeeded"), ("all", "busy"), ("first", "busy"), ("chunked", "succeeded")]
)
def test_fastapi_with_a_middleware_that_reads_the_body(app, how, outcome, caplog):
    warn_of_taken_body.cache_clear()
    api = api_of(app)

    @api.middleware("http")
    async def reads(request, call_next):
        if how in {"kept", "chunked"}:
            await request.body()
        elif how == "all":
            async for _ in request.stream():
                pass
        return await call_next(request)

    async def without_the_first(scope, receive, send):
        async def rest():
            message = await receive()
            return {**message, "body": message["body"][5:]} if "body" in message else message

        await api(scope, rest, send)

    token = app.serialize(sample.add, 1)
    client = FastApiClient(without_the_first if how == "first" else api)
    answer = client.post(URL, content=iter([token]) if how == "chunked" else token, headers=JOSE)
    assert answer.headers["Safedefer-Outcome"] == outcome
    assert len(sample.RAN) == (outcome == "succeeded")
    assert ("a middleware takes the bytes" in caplog.text) == (how == "all")


def test_fastapi_is_set_up_once_and_needs_it(app):
    api = api_of(app)
    with pytest.raises(ConfigurationError, match="once"):
        on_fastapi.setup(api, app)
    bare = FastAPI()

    @bare.post("/")
    async def pay(tasks: Tasks) -> None: ...

    with pytest.raises(ConfigurationError, match="call safedefer.frameworks.fastapi.setup"):
        FastApiClient(bare).post("/")


# --- Flask ---


def flask_of(app):
    web_app = Flask("shop")
    on_flask.Safedefer(app, web_app)

    @web_app.before_request
    def nobody():
        return "log in first", 401

    return web_app


def test_flask_serves_tasks_past_the_hooks_of_the_application(app):
    client = flask_of(app).test_client()
    answer = client.post(URL, data=app.serialize(sample.add, 1), headers=JOSE)
    assert (answer.status_code, answer.headers["Safedefer-Outcome"]) == (200, "succeeded")
    assert client.post(URL, data=b"no token", headers=JOSE).status_code == 403
    assert client.post("/pay").status_code == 401
    assert client.post("/_ah/queue/deferred/more").status_code == 401


def test_flask_serves_an_application_that_a_factory_makes(app):
    extension = on_flask.Safedefer(app)
    first, second = Flask("first"), Flask("second")
    for web_app in (first, second):
        extension.init_app(web_app)
        assert web_app.extensions["safedefer"] is app
        with web_app.app_context():
            assert on_flask.current_safedefer() is app
    with pytest.raises(ConfigurationError, match="once"):
        extension.init_app(first)
    with Flask("bare").app_context(), pytest.raises(ConfigurationError, match="init_app"):
        on_flask.current_safedefer()


def test_flask_follows_the_app_into_test_mode(app):
    client = flask_of(app).test_client()
    with TestApp(app) as kit:
        task = app.defer(sample.add, 1)
        answer = client.post(task.url, data=task.payload, headers=JOSE)
        assert answer.headers["Safedefer-Outcome"] == "succeeded"
        assert kit.deferred_tasks[0].id == task.id
