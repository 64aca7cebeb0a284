"""The dispatcher's requests go to the addresses that the operator listed, as POST of the token, and nowhere else."""

import asyncio
import contextlib

import pytest

from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions, HttpDelivery
from safedefer.dispatcher.signed_route import SignedRoute, difference
from safedefer.errors import ConfigurationError
from safedefer.queues.base import DeadFilter, QueuedTask, TaskState
from safedefer.queues.memory.queue import MemoryQueue
from tests.adversarial import victim
from tests.adversarial.forge import NOW, URL, Clock, make_app, mint
from tests.schema import vectors

TASK = QueuedTask(
    id="0123456789abcdef0123456789abcdef",
    queue="default",
    token=b"eyJ.token.mac",
    audience=f"test:default:default:{URL}",
    url=URL,
    target="default",
    eta=NOW,
    created=NOW,
    expires=NOW + 1000,
)


class Recorder:
    """A server that answers with what it is told, and writes down every request line and header."""

    def __init__(self, answer):
        self.answer = answer
        self.requests = []

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *exception):
        self.server.close()
        await self.server.wait_closed()

    async def serve(self, reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(head.decode("latin-1"))
            writer.write(self.answer.encode())
            await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


OK = "HTTP/1.1 200 OK\r\nSafedefer-Outcome: succeeded\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def redirect(status, to):
    return f"HTTP/1.1 {status} Moved\r\nLocation: {to}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


async def dispatch(task, delivery):
    queue = MemoryQueue()
    queue.enqueue_many([task])
    async with delivery as deliver:
        dispatcher = Dispatcher(queue, deliver, clock=lambda: NOW, options=DispatcherOptions(poll_seconds=0.05))
        await asyncio.wait_for(dispatcher.run_until_empty(), 60)
    queue.close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 300, 304])
@pytest.mark.parametrize("form", ["{url}/", "//127.0.0.1:{port}/x", "{url}/_ah/queue/deferred"])
async def test_no_redirect_is_followed(status, form):
    async with Recorder(OK) as elsewhere:
        answer = redirect(status, form.format(url=elsewhere.url, port=elsewhere.port))
        async with Recorder(answer) as handler:
            await dispatch(TASK, HttpDelivery(handler.url))
            assert len(handler.requests) == 1
        assert elsewhere.requests == []


HOSTILE_URLS = [
    "//127.0.0.1:{port}/", "http://127.0.0.1:{port}/", "@127.0.0.1:{port}/", ":{port}/", ".evil.example/", "\\\\127.0.0.1:{port}/", "/\\127.0.0.1:{port}/",
    "/x HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\nGET /", "/\r\nX-Evil: 1", "/?\nx", "/#@127.0.0.1:{port}/", "", " /", "\t/x", "?x", "/x?u=http://127.0.0.1:{port}/",
    "/%0d%0aX-Evil:%201", "/../../admin", "/a;@127.0.0.1:{port}/", "/http://127.0.0.1:{port}/", "file:///etc/passwd", "unix:///var/run/docker.sock", "/\0", "/é",
]  # fmt: skip


@pytest.mark.parametrize("url", HOSTILE_URLS)
async def test_no_stored_url_leads_elsewhere_or_writes_a_header(url):
    async with Recorder(OK) as elsewhere, Recorder(OK) as handler:
        await dispatch(TASK._replace(url=url.format(port=elsewhere.port)), HttpDelivery(handler.url))
        assert elsewhere.requests == []
        for head in handler.requests:
            lines = head.split("\r\n")
            assert lines[0].startswith("POST /")
            assert lines[0].endswith(" HTTP/1.1")
            assert f"Host: 127.0.0.1:{handler.port}" in lines
            assert not any(line.startswith("X-Evil") for line in lines)


@pytest.mark.parametrize(
    "target", ["other", "127.0.0.1", "http://127.0.0.1", "", "../x", "localhost:80", "default\r\nX-Evil: 1"]
)
async def test_a_stored_target_chooses_among_the_listed_addresses_only(target):
    async with Recorder(OK) as elsewhere, Recorder(OK) as handler, Recorder(OK) as mail:
        await dispatch(TASK._replace(target=target), HttpDelivery(handler.url, targets={"mail": mail.url}))
        assert elsewhere.requests == mail.requests == []
        assert len(handler.requests) <= 1
        await dispatch(TASK._replace(target="mail"), HttpDelivery(handler.url, targets={"mail": mail.url}))
        assert len(mail.requests) == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"}, {"host": "evil.example"}, {"X": "1\r\nX-Evil: 1"}, {"X\r\nX-Evil": "1"}, {"X-AppEngine-QueueName": "mail"},
        {"Transfer-Encoding": "chunked"}, {"Content-Length": "0"}, {"Content-Encoding": "gzip"}, {"Connection": "upgrade"}, {"Upgrade": "h2c"},
        {"Proxy-Authorization": "Basic x"}, {"Content-Type": "text/plain"}, {"Safedefer-Outcome": "succeeded"}, {"X": 1}, {1: "x"}, {"X": "é"}, {"": "x"},
        {"traceparent": "1\r\nX-Evil: 1"}, {"Expect": "100-continue"},
    ],
    ids=str,
)  # fmt: skip
async def test_no_stored_header_changes_where_or_how_a_request_arrives(headers):
    async with Recorder(OK) as handler:
        await dispatch(TASK._replace(headers=headers), HttpDelivery(handler.url))
        assert handler.requests == []


async def test_a_proxy_in_the_environment_is_not_asked(monkeypatch):
    async with Recorder(OK) as proxy, Recorder(OK) as handler:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        await dispatch(TASK, HttpDelivery(handler.url))
        assert proxy.requests == []
        assert len(handler.requests) == 1


async def test_an_answer_that_never_ends_is_not_read(monkeypatch):
    """Headers count; the body is left alone, however long it says it is."""
    endless = "HTTP/1.1 200 OK\r\nSafedefer-Outcome: succeeded\r\nContent-Length: 99999999999\r\n\r\n" + "A" * 100_000
    async with Recorder(endless) as handler:
        await dispatch(TASK, HttpDelivery(handler.url))
        assert len(handler.requests) == 1


async def test_no_cookie_comes_back():
    answer = OK.replace("Content-Length", "Set-Cookie: sid=1; Path=/\r\nContent-Length")
    async with Recorder(answer) as handler:
        queue = MemoryQueue()
        async with HttpDelivery(handler.url) as deliver:
            for number in range(2):
                await deliver(TASK._replace(id=f"{number:032x}"), {})
        queue.close()
        assert len(handler.requests) == 2
        assert not any("sid=1" in head for head in handler.requests)


# --- What nobody signed is not sent, to the listed hosts either ---------------------------------------


class Body(Recorder):
    """A recorder that keeps what comes after the headers, too."""

    async def serve(self, reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            self.requests.append((head + await reader.readexactly(length)).decode("latin-1"))
            writer.write(self.answer.encode())
            await writer.drain()
        writer.close()


@pytest.fixture
def app():
    app = make_app(targets={"other": "http://127.0.0.1:9"}, clock=Clock(NOW))
    yield app
    app.close()


def route_of(app):
    return SignedRoute(app.authenticate)


def write(app, task, **changes):
    """What a writer of the storage does to a row."""
    row = app.queue._state.rows[task.id]
    row.task = row.task._replace(**changes)


async def deliver(app, **options):
    """Deliver what is due; return the requests that arrived."""
    async with Body(OK) as handler, Body(OK) as other:
        targets = {"other": other.url}
        async with HttpDelivery(handler.url, targets=targets, verify=route_of(app)) as delivery:
            dispatcher = Dispatcher(
                app.queue, delivery, clock=lambda: app._clock() + 1, options=DispatcherOptions(**options)
            )
            await asyncio.wait_for(dispatcher.run_until_empty(), 60)
        return [*handler.requests, *other.requests]


TRACE = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
SIGNED = {"X-Shop": "1"}

#: What a writer of the storage changes of a task, and what then differs.
WRITTEN = [
    ({"url": "/admin/users"}, "url"), ({"url": f"{URL}/"}, "url"), ({"url": "/_ah/queue/mail"}, "url"),
    ({"target": "other"}, "target"), ({"target": "unlisted"}, "target"),
    ({"name": "another"}, "name"), ({"headers": {"X-Shop": "2"}}, "headers"), ({"headers": {"x-shop": "1"}}, "headers"),
    ({"headers": {**SIGNED, "Authorization": "Bearer x"}}, "headers"), ({"headers": {**SIGNED, "Cookie": "sid=1"}}, "headers"),
    ({"headers": {**SIGNED, "X-HTTP-Method-Override": "DELETE"}}, "headers"), ({"headers": {**SIGNED, "traceparent": TRACE}}, "headers"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "what"), WRITTEN, ids=str)
@pytest.mark.parametrize("size", [1, 20_000], ids=["inline", "oversize"])
async def test_a_row_that_differs_from_what_was_signed_is_parked_and_nothing_of_it_is_sent(
    app, caplog, size, changes, what
):
    task = app.options(headers=SIGNED).defer(victim.note, "x" * size)
    good = app.options(headers=SIGNED).defer(victim.note, "good")
    write(app, task, **changes)
    (request,) = await deliver(app)
    assert request.endswith(good.payload.decode())
    (letter,) = app.queue.dead_letters(DeadFilter(reason="storage-mismatch"))
    assert (letter.token.decode() if size == 1 else task.payload.decode()) == task.payload.decode()
    assert f"the {what} that is stored is not what was signed" in caplog.text
    assert task.payload.decode() not in caplog.text
    assert "Bearer" not in caplog.text


def test_every_part_of_a_request_is_compared():
    claims = vectors.claims(name="n", headers=SIGNED, trace=TRACE)
    _, queue, target, url = claims["aud"].split(":")
    task = TASK._replace(
        id=claims["jti"], queue=queue, target=target, url=url, name="n", headers={**SIGNED, "traceparent": TRACE}
    )
    assert difference(task, claims) is None
    wrong = {"url": "/x", "queue": "mail", "target": "other", "id": "f" * 32, "name": None, "headers": {}}
    for part, value in wrong.items():
        assert difference(task._replace(**{part: value}), claims) == part
    for headers in (SIGNED, {**SIGNED, "traceparent": TRACE[:-1] + "0"}, {"traceparent": TRACE}):
        assert difference(task._replace(headers=headers), claims) == "headers"


async def test_a_header_that_was_signed_and_is_not_stored_parks_the_task(app):
    task = app.options(headers=SIGNED).defer(victim.note, "x")
    write(app, task, headers={})
    assert await deliver(app) == []
    assert app.queue.find(task.id).reason == "storage-mismatch"


async def test_a_parked_task_runs_again_as_it_was_signed(app):
    task = app.options(headers=SIGNED).defer(victim.note, "x")
    write(app, task, url="/admin/users", headers={"Authorization": "Bearer x"})
    assert await deliver(app) == []
    view = app.queue.find(task.id)
    assert (view.state, view.reason, view.attempts) == (TaskState.DEAD, "storage-mismatch", 0)
    assert [(record.outcome, record.reason) for record in view.records] == [("refused", "storage-mismatch")]
    again = app.retry(task.id)
    assert (again.url, again.headers) == (URL, SIGNED)
    (request,) = await deliver(app)
    assert request.endswith(again.payload.decode())
    assert "Authorization" not in request


#: What somebody wrote in place of a token, by the token that was there; and how it counts.
TOKENS = {
    "a form": (lambda token: b"user=admin&role=root", "refused", "malformed-token"),
    "a large one": (lambda token: b"x" * 100_000, "refused", "malformed-token"),
    "another mac": (lambda token: token[:-4] + b"AAAA", "refused", "bad-signature"),
    "an unknown key": (lambda token: mint(kid="nobody"), "refused", "unknown-key"),
    "a revoked key": (lambda token: mint(kid="stolen"), "refused", "revoked-key"),
    "a key of another queue": (lambda token: mint(kid="mail-only"), "refused", "capability-exceeded"),
    "a key without pickles": (lambda token: mint(cty="pickle"), "refused", "capability-exceeded"),
    "a version to come": (lambda token: mint(v=2), "rejected", "invalid-claims"),
}


async def test_an_empty_token_is_not_sent_and_buried_at_once(app):
    task = app.defer(victim.note, "x")
    write(app, task, token=b"")
    assert await deliver(app) == []
    view = app.queue.find(task.id)
    assert (view.state, view.attempts, view.reason) == (TaskState.DEAD, 0, "unreadable")


@pytest.mark.parametrize("what", TOKENS)
async def test_a_body_that_no_key_of_ours_signed_is_not_sent_and_counts_as_the_handler_would(app, what):
    make, outcome, reason = TOKENS[what]
    task = app.defer(victim.note, "x")
    token = make(task.payload)
    write(app, task, token=token)
    assert await deliver(app) == []
    view = app.queue.find(task.id)
    assert (view.state, view.attempts) == (TaskState.WAITING, 0)
    assert [(record.outcome, record.reason) for record in view.records] == [(outcome, reason)]
    for _ in range(9):
        app._clock.now += 3600
        assert await deliver(app) == []
    view = app.queue.find(task.id)
    assert (view.state, view.reason) == (TaskState.DEAD, reason if outcome == "rejected" else "refused")
    assert view.token == token


async def test_a_token_of_another_task_in_its_place_is_not_sent(app):
    first, second = app.defer(victim.note, 1), app.options(headers=SIGNED).defer(victim.note, 2)
    write(app, first, token=second.payload)
    (request,) = await deliver(app)
    assert request.endswith(second.payload.decode())
    assert app.queue.find(first.id).reason == "storage-mismatch"


async def test_what_was_signed_is_sent(app):
    made = [
        app.options(headers=SIGNED, name="n").defer(victim.note, 1),
        app.options(url="/tasks/mail", queue="mail", target="other").defer(victim.note, "x" * 20_000),
        app.options(headers=SIGNED).defer(victim.note, "x" * 20_000),
        app.defer(victim.note, "x" * 9_000),
    ]
    requests = await deliver(app)
    assert sorted(request.split("\r\n\r\n")[1] for request in requests) == sorted(
        task.payload.decode() for task in made
    )
    assert {task.id: app.queue.find(task.id).state for task in made} == {task.id: TaskState.SUCCEEDED for task in made}


async def test_policy_expiry_and_time_stay_the_handlers(app):
    """They are no matter of the storage: the handler records them, and moves what it refuses."""
    kept = app.defer(victim.note, "x")
    write(app, kept, token=mint(jti=kept.id, call={"kind": "function", "module": "os", "qualname": "system"}, nbf=NOW + 900, exp=NOW + 901,
        aud=f"test:default:default:{URL}"))  # fmt: skip
    assert len(await deliver(app)) == 1


async def test_a_trace_that_was_signed_is_sent(app):
    task = app.defer(victim.note, "x")
    token = mint(jti=task.id, aud=f"test:default:default:{URL}", trace=TRACE)
    write(app, task, token=token, headers={"traceparent": TRACE})
    (request,) = await deliver(app)
    assert f"traceparent: {TRACE}\r\n" in request


async def test_headers_of_an_oversize_task_are_those_of_its_pointer(app):
    task = app.options(headers=SIGNED).defer(victim.note, "x" * 20_000)
    write(app, task, headers={**SIGNED, "Cookie": "a=b"})
    assert await deliver(app) == []
    assert app.queue.find(task.id).reason == "storage-mismatch"


# --- Addresses --------------------------------------------------------------------------------------

IMPOSSIBLE = [
    "ftp://x", "evil.example", "//evil.example", "file:///etc/passwd", "", "HTTP://x", "http:/x", "http://", "https://", "http:///x", "http://?x",
    "http://127.0.0.1:99999", "http://127.0.0.1:0", "http://127.0.0.1:-1", "http://127.0.0.1:x", "http://127.0.0.1:", "http://:80",
    "http://[::1", "http://::1]", "http://[::1]x", "http://[::1]x:80", "http://x[::1]", "http://[]", "http://[1.2.3.4]", "http://[x]", "http://[::1]:99999", "http://::1",
    "http://1.2.3.4.5", "http://1.2.3", "http://1.2.3.256", "http://1.2.3.4.", "http://12345", "http://x.1", "http://01.2.3.4",
    "http://a..b", "http://.a", "http://-a", "http://a-.b", "http://a b", "http://a\tb", "http://a\r\nX-Evil: 1", "http://a\0", "http://\u00e9",
    "http://" + "a" * 64, "http://" + ".".join(["a" * 60] * 5), "http://a" + "/x" * 2000,
    "http://a/?x", "http://a/?", "http://a/#x", "http://a#", "http://a?x@b", "http://a\\b",
]  # fmt: skip


@pytest.mark.parametrize("address", IMPOSSIBLE)
def test_an_address_that_is_none_is_refused_when_it_is_configured(address):
    with pytest.raises(ConfigurationError, match="write "):
        make_app(targets={"mail": address})


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:8080", "https://shop.example", "http://shop.example./tasks/", "http://handler_1:80", "http://localhost:1/x/y",
     "http://[::1]:8080", "https://u@[::1]/x", "https://xn--bcher-kva.example", "http://1a", "http://user:word@shop.example:65535/"],
)  # fmt: skip
def test_an_address_that_a_request_can_go_to_is_taken(address):
    assert make_app(targets={"mail": address}).targets == {"mail": address}
