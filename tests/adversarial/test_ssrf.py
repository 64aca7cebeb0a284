"""The dispatcher's requests go to the addresses that the operator listed, as POST of the token, and nowhere else."""

import asyncio
import contextlib

import pytest

from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions, HttpDelivery
from safedefer.errors import ConfigurationError
from safedefer.queues.base import QueuedTask
from safedefer.queues.memory.queue import MemoryQueue
from tests.adversarial.forge import NOW, URL, make_app

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
