"""``app.asgi`` behind a real uvicorn and ``app.wsgi`` behind a real WSGI server, asked over real HTTP."""

import asyncio
import contextlib
import http.client
import io
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import pytest
import uvicorn

from safedefer.cli.surroundings import check_target
from safedefer.web.asgi import Asgi
from safedefer.web.body import warn_of_taken_body
from tests import sample_tasks as tasks
from tests.unit.apps import JOSE, make_app

URL = "/_ah/queue/deferred"


@contextlib.contextmanager
def by_uvicorn(app, root_path=""):
    server = uvicorn.Server(uvicorn.Config(app.asgi, port=0, log_level="error", root_path=root_path, lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


class Quiet(WSGIRequestHandler):
    def log_message(self, *args):
        pass


class Threading(ThreadingMixIn, WSGIServer):
    daemon_threads = True


@contextlib.contextmanager
def by_wsgi(app, root_path=""):
    served = app.wsgi

    def mounted(environ, start_response):
        environ["SCRIPT_NAME"], environ["PATH_INFO"] = root_path, environ["PATH_INFO"].removeprefix(root_path)
        return served(environ, start_response)

    with make_server("127.0.0.1", 0, mounted, Threading, Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join(60)


@pytest.fixture(params=[by_uvicorn, by_wsgi], ids=["asgi", "wsgi"])
def serve(request):
    return request.param


@pytest.fixture
def app(tmp_path):
    tasks.reset()
    app = make_app(queue=f"sqlite:///{tmp_path}/tasks.db")
    yield app
    tasks.GATE.set()
    app.close()


def post(port, data, headers=JOSE, *, path=URL, method="POST"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body=data, headers=headers)
        response = connection.getresponse()
        return response.status, response.getheader("Safedefer-Outcome"), response.read()


def test_a_task_runs_once_and_what_is_none_is_refused(app, serve):
    task = app.defer(tasks.add, 1)
    forged = task.payload[:-4] + b"AAAA"
    with serve(app) as port:
        assert post(port, task.payload) == (200, "succeeded", b"succeeded\n")
        assert post(port, task.payload) == (200, "duplicate", b"duplicate\n")
        assert post(port, forged)[:2] == (403, "refused")
        assert post(port, task.payload, path="/_ah/queue/mail")[:2] == (403, "refused")
        assert post(port, task.payload, path="/elsewhere") == (404, None, b"not found\n")
        assert post(port, task.payload, path=URL + "/x")[0] == 404
        assert post(port, None, method="GET")[:2] == (405, "refused")
        assert post(port, task.payload, {**JOSE, "Content-Encoding": "gzip"})[:2] == (415, "refused")
        assert post(port, task.payload, {"Content-Type": "text/plain"})[:2] == (415, "refused")
        assert post(port, task.payload, {**JOSE, "X-AppEngine-QueueName": "mail"})[:2] == (403, "refused")
    assert tasks.RAN == [("add", 1, 0, 1)]


def test_below_a_mount_a_token_need_not_name_it(app, serve):
    task = app.defer(tasks.add, 2)
    asked = "" if serve is by_uvicorn else "/api"  # uvicorn's root_path is what a proxy has taken away
    with serve(app, "/api") as port:
        assert post(port, task.payload, path=asked + URL)[:2] == (200, "succeeded")
        assert post(port, task.payload, path=asked + "/elsewhere")[0] == 404


def test_a_body_over_the_limit_is_refused_by_its_announced_length_and_not_read(app, serve):
    with serve(app) as port, socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        head = (
            f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/jose\r\nContent-Length: 99999999999\r\n\r\n"
        )
        client.sendall(head.encode() + b"x" * 1000)
        assert b" 413 " in client.recv(1000).split(b"\r\n")[0]


def test_a_chunked_body_over_the_limit_is_refused_while_it_arrives(app):
    with by_uvicorn(app) as port, socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/jose\r\n".encode())
        client.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):  # it may be closed before all is sent
            for _ in range(40):
                client.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        assert b" 413 " in client.recv(1000).split(b"\r\n")[0]
    assert app.delivery.budget.take(32 * 2**20), "all bytes were given back"


def test_requests_of_many_threads_are_all_answered_and_run_at_once(app, serve):
    batch = app.defer_many([(tasks.add, (number,), {}) for number in range(100)])
    with serve(app) as port, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda task: post(port, task.payload)[:2], batch))
    assert set(answers) <= {(200, "succeeded"), (503, "busy")}
    assert answers.count((200, "succeeded")) == len(tasks.RAN) > 50


def test_bodies_that_are_announced_and_do_not_come_take_nothing_from_the_budget(app, serve):
    task = app.defer(tasks.add, 5)
    most = app.delivery.max_bytes  # 32 of them are the whole budget
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/jose\r\nContent-Length: {most}\r\n\r\n"
    with serve(app) as port, contextlib.ExitStack() as stack:
        for _ in range(40):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            client.sendall(head.encode())
        time.sleep(0.5)  # the server has begun to read them
        assert post(port, task.payload)[:2] == (200, "succeeded")


def test_a_client_that_leaves_in_the_middle_of_a_body_harms_nobody(app):
    task = app.defer(tasks.add, 3)
    with by_uvicorn(app) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall(f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/jose\r\n".encode())
            client.sendall(b"Content-Length: 1000\r\n\r\nabc")
        assert post(port, task.payload)[:2] == (200, "succeeded")


async def test_a_server_whose_application_cannot_start_is_told_why(app, monkeypatch):
    sent = []

    async def receive():
        return {"type": "lifespan.startup"}

    async def send(message):
        sent.append(message)

    monkeypatch.setattr(type(app), "delivery", property(lambda self: 1 / 0))
    await Asgi(app)({"type": "lifespan"}, receive, send)
    assert sent == [{"type": "lifespan.startup.failed", "message": "division by zero"}]


async def test_no_websocket_is_accepted(app):
    sent = []

    async def send(message):
        sent.append(message)

    await app.asgi({"type": "websocket", "path": URL}, asyncio.Event().wait, send)
    assert sent == [{"type": "websocket.close", "code": 1000}]


def test_a_wsgi_body_without_a_length_is_read_only_if_the_server_ends_it(app):
    import io

    task, answers = app.defer(tasks.add, 4), []
    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": URL, "CONTENT_TYPE": "application/jose"}

    def ask(body, **more):
        begun = []
        app.wsgi({**environ, "wsgi.input": io.BytesIO(body), **more}, lambda status, headers: begun.append(status))
        answers.append(begun[0])

    ask(task.payload)
    ask(b"x" * 2_000_000, **{"wsgi.input_terminated": True})
    ask(task.payload, CONTENT_LENGTH="2000")
    ask(task.payload, **{"wsgi.input_terminated": True})
    assert answers == [f"{status} {HTTPStatus(status).phrase}" for status in (403, 413, 503, 200)]


@pytest.mark.parametrize(("count", "told"), [(-1, "a middleware takes the bytes"), (5, "body-broken")])
def test_a_body_that_a_wsgi_middleware_has_read_charges_nothing_and_is_told(count, told, caplog):
    warn_of_taken_body.cache_clear()
    app = make_app()
    task = app.defer(tasks.keywords, text="x")
    environ = {
        "REQUEST_METHOD": "POST", "PATH_INFO": URL, "SCRIPT_NAME": "", "CONTENT_TYPE": "application/jose",
        "CONTENT_LENGTH": str(len(task.payload)), "wsgi.input": io.BytesIO(task.payload),
    }  # fmt: skip
    environ["wsgi.input"].read(count)
    begun = []
    app.wsgi(environ, lambda status, headers: begun.append((status, dict(headers)["Safedefer-Outcome"])))
    app.close()
    assert begun == [("503 Service Unavailable", "busy")]
    assert told in caplog.text


def test_doctor_does_not_say_of_another_server_that_it_inflates(serve, app):
    with serve(app) as port:
        (found,) = check_target(app, f"http://127.0.0.1:{port}")
    assert (found.status, "answers as a handler: 403 refused" in found.text) == ("ok", True)
