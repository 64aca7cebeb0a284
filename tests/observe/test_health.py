"""Health: the pages of a process, those of a supervisor and its workers, and the server of both."""

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time

import aiohttp
import pytest

from safedefer.cli.fleet import Fleet
from safedefer.cli.service import health_address, health_listener
from safedefer.cli.worker import Worker
from safedefer.dispatcher.loop import Dispatcher, InProcessDelivery
from safedefer.errors import ConfigurationError, QueueUnavailable
from safedefer.observe import health as health_module
from safedefer.observe.counts import Counts
from safedefer.observe.health import DRAINING, LEASING, STARTING, STORE, Health, Subject
from safedefer.web.health import serving_pages
from tests import sample_tasks
from tests.observe.test_counts import handled, samples
from tests.unit.apps import make_app, until


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A busy machine answers late."""
    monkeypatch.setattr(health_module, "STORE_SECONDS", 60.0)
    monkeypatch.setattr("safedefer.cli.fleet._ANSWER_SECONDS", 60.0)


@pytest.fixture
def app():
    app = make_app()
    yield app
    app.close()


@pytest.fixture
def health(app):
    counts = Counts()
    app.observers.add(counts)
    health = Health(Subject(queue=lambda: app.queue, outbox=app.outbox), counts)
    health.started = True
    yield health
    health.close()


@contextlib.asynccontextmanager
async def served(pages):
    with health_listener("0") as listener:
        port = listener.getsockname()[1]
        async with serving_pages(pages, listener), aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            yield session


async def get(session, path, method="GET", **more):
    async with session.request(method, path, **more) as answer:
        return answer.status, await answer.text(), answer.headers


async def test_a_process_that_takes_tasks_is_alive_and_ready(health):
    async with served(health) as session:
        assert (await get(session, "/healthz"))[:2] == (200, "alive\n")
        assert (await get(session, "/readyz"))[:2] == (200, "ready\n")


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
async def test_pages_take_get_and_head_and_nothing_else(health, path):
    async with served(health) as session:
        status, text, headers = await get(session, path)
        head = await get(session, path, "HEAD")
        assert (status, head[0], head[1]) == (200, 200, "")
        assert text
        assert headers["Cache-Control"] == "no-store"
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
            assert (await get(session, path, method))[0] == 405
        assert (await get(session, "/other"))[0] == 404


async def test_a_long_request_is_refused(health):
    async with served(health) as session:
        assert (await get(session, "/healthz?" + "x" * 4_000))[0] == 400
        assert (await get(session, "/healthz", headers={"X": "y" * 4_000}))[0] == 400


async def test_before_its_start_and_at_its_end_a_process_is_not_ready(health):
    health.started = False
    assert await health.reasons() == [STARTING]
    health.started, health.draining = True, True
    page = await health.ready()
    assert (page.status, page.text) == (503, f"not ready: {DRAINING}\n".encode())


async def test_a_store_that_fails_is_not_ready_and_its_error_is_not_shown(app, health, monkeypatch):
    def away(**_):
        raise QueueUnavailable("postgresql://user:word@db is away")

    monkeypatch.setattr(app.queue, "next_due", away)
    monkeypatch.setattr(app.queue, "stats", away)
    async with served(health) as session:
        assert (await get(session, "/readyz"))[:2] == (503, f"not ready: {STORE}\n")
        status, text, _ = await get(session, "/metrics")
        assert (status, samples(text.encode())["safedefer_store_up",]) == (200, 0)
        assert "word" not in text
        assert (await get(session, "/healthz"))[0] == 200


async def test_a_store_that_hangs_is_asked_once_and_said_after_a_while(app, health, monkeypatch):
    asked, go = [], threading.Event()

    def hang(**_):
        asked.append(time.monotonic())
        go.wait(60)

    monkeypatch.setattr(app.queue, "next_due", hang)
    monkeypatch.setattr(health_module, "STORE_SECONDS", 0.05)
    for _ in range(3):
        assert await health.reasons() == [STORE]
    await until(lambda: asked)
    assert len(asked) == 1
    go.set()


async def test_a_flood_of_requests_asks_the_store_once(app, health, monkeypatch):
    asked, real = [], app.queue.stats

    def stats(*, now):
        asked.append(now)
        return real(now=now)

    monkeypatch.setattr(app.queue, "stats", stats)
    monkeypatch.setattr(health_module, "_KEEP_SECONDS", 3_600.0)
    await asyncio.gather(*(health.reading() for _ in range(100)))
    assert len(asked) == 1
    monkeypatch.setattr(health_module, "_KEEP_SECONDS", -1.0)
    await health.reading()
    assert len(asked) == 2


async def test_a_dispatcher_that_has_not_looked_at_the_queue_for_a_minute_is_not_ready(app, health):
    dispatcher = Dispatcher(app.queue, InProcessDelivery(app.handle), clock=time.time)
    health.leased_at = lambda: dispatcher.leased_at
    assert await health.reasons() == []  # it has a minute to begin
    await dispatcher.run_until_empty()
    assert await health.reasons() == []
    dispatcher.leased_at -= 61
    assert await health.reasons() == [LEASING]


async def test_a_dispatcher_whose_queue_fails_does_not_look_at_it(app, health, monkeypatch):
    failed = threading.Event()

    def fail(**_):
        failed.set()
        raise QueueUnavailable("away")

    monkeypatch.setattr(app.queue, "lease", fail)
    dispatcher = Dispatcher(app.queue, InProcessDelivery(app.handle), clock=time.time)
    running = asyncio.create_task(dispatcher.run())
    await until(failed.is_set)
    dispatcher.stop()
    await running
    assert dispatcher.leased_at is None


async def test_metrics_count_and_show_no_argument_key_or_token(app, health):
    task = app.defer(sample_tasks.add, 73_501, scale=90_210)
    status, _, _ = await app.handle({"Content-Type": "application/jose"}, task.payload)
    assert status == 200
    async with served(health) as session:
        pages = [await get(session, path) for path in ("/metrics", "/readyz", "/healthz")]
    text = "".join(f"{page[1]}{page[2]}" for page in pages)
    assert samples(pages[0][1].encode())["safedefer_attempts_total", "succeeded", "default", ""] == 1
    assert pages[0][2]["Content-Type"].startswith("text/plain; version=0.0.4")
    for secret in ("73501", "90210", task.id, task.payload.decode(), "k1"):
        assert secret not in text


async def test_without_the_extra_metrics_are_not_found_and_the_page_says_what_to_install(health, monkeypatch):
    monkeypatch.delitem(sys.modules, "safedefer.observe.metrics")
    monkeypatch.delattr("safedefer.observe.metrics")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    async with served(health) as session:
        status, text, _ = await get(session, "/metrics")
        assert (status, text) == (
            404,
            "metrics for Prometheus needs an optional dependency: pip install 'safedefer[metrics]'\n",
        )
        assert (await get(session, "/readyz"))[0] == 200


# --- The address ---


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9090", ("127.0.0.1", 9090)),
        (":9090", ("127.0.0.1", 9090)),
        ("0.0.0.0:9090", ("0.0.0.0", 9090)),
        ("[::1]:9090", ("::1", 9090)),
        ("host.example:0", ("host.example", 0)),
    ],
)
def test_a_port_alone_is_on_the_loopback_address(text, address):
    assert health_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "host", "host:", "1:2:3", "::1:9090", "65536", "http://host:1", "a b:1", "-1", "９０９０"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ConfigurationError, match="--health .* is no address"):
        health_address(text)


# --- A supervisor and its workers ---


class Beatless(Worker):
    """Its beats would go on for as long as this process."""

    def _beat(self):
        pass


@contextlib.asynccontextmanager
async def worker_of(fleet, health, counts):
    """A worker in this process, and its end of the line in the fleet, as the supervisor reads it."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    listener = socket.socket()
    worker = Beatless(theirs, listener, 3_600.0, "owner", [])
    orphaned = threading.Event()
    worker.count(counts, health)
    key, rest = object(), bytearray()

    def hear():
        rest.extend(ours.recv(65_536))
        *lines, last = bytes(rest).split(b"\n")
        rest[:] = last
        for line in lines:
            word, _, argument = line.partition(b" ")
            fleet.heard(key, word, argument)

    loop = asyncio.get_running_loop()
    loop.add_reader(ours, hear)
    fleet.joined(key, ours)
    stop = asyncio.Event()
    try:
        async with worker.watched(stop, recycle=lambda: False):
            worker._stop = orphaned.set
            yield worker
    finally:
        loop.remove_reader(ours)
        fleet.left(key)
        ours.close()
        assert orphaned.wait(60)
        theirs.close()
        listener.close()


async def test_a_supervisor_shows_what_all_workers_counted_and_asks_one_for_the_store(app, health):
    counts, other = Counts(), Counts()
    app.defer(sample_tasks.add, 1)
    fleet = Fleet(2)
    async with worker_of(fleet, health, counts) as first, worker_of(fleet, health, other) as second:
        for each in (counts, counts, other):
            each(handled())
        first.say_counts()
        second.say_counts()
        name = ("safedefer_attempts_total", "succeeded", "default", "")
        await until(lambda: fleet._sums.totals.get((name[0], "default", "succeeded", "")) == 3)
        async with served(fleet) as session:
            found = samples((await get(session, "/metrics"))[1].encode())
            assert (await get(session, "/readyz"))[:2] == (200, "ready\n2 of 2 worker processes take tasks\n")
        assert found[name] == 3
        assert found["safedefer_queue_tasks", "default", "waiting"] == 1
        assert found["safedefer_worker_processes", "ready"] == 2
    # What was counted stays when they are gone, and the store cannot be asked.
    found = samples((await fleet.metrics()).text)
    assert found[name] == 3
    assert found["safedefer_store_up",] == 0
    page = await fleet.ready()
    assert (page.status, page.text) == (503, f"not ready: {STARTING}\n0 of 2 worker processes take tasks\n".encode())


async def test_one_worker_that_takes_tasks_is_enough(app, health):
    counts = Counts()
    stops = Health(Subject(queue=lambda: app.queue, outbox=app.outbox), counts)
    stops.started = stops.draining = True
    fleet = Fleet(2)
    async with worker_of(fleet, stops, counts):
        page = await fleet.ready()
        assert (page.status, page.text.splitlines()[0]) == (503, f"not ready: {DRAINING}".encode())
        async with worker_of(fleet, health, Counts()):
            page = await fleet.ready()
            assert (page.status, page.text) == (200, b"ready\n1 of 2 worker processes take tasks\n")
    fleet.draining = True
    assert (await fleet.ready()).status == 503
    stops.close()


async def test_a_worker_that_does_not_answer_is_passed_over(app, health, monkeypatch):
    monkeypatch.setattr("safedefer.cli.fleet._ANSWER_SECONDS", 0.05)
    fleet = Fleet(2)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    fleet.joined("silent", ours)
    page = await fleet.ready()
    assert (page.status, page.text.splitlines()[0]) == (503, b"not ready: a worker process does not answer")
    monkeypatch.setattr("safedefer.cli.fleet._ANSWER_SECONDS", 60.0)
    fleet.left("silent")
    async with worker_of(fleet, health, Counts()):
        theirs.close()
        fleet._lines = {"gone": ours, **fleet._lines}
        assert await fleet._reading() is not None
    ours.close()


@pytest.mark.parametrize(
    ("word", "argument"),
    [
        (b"counts", b"{"),
        (b"counts", b"[]"),
        (b"counts", b'{"totals": [["x", 1]], "histograms": [], "gauges": []}'),
        (b"counts", b'{"totals": [[]], "histograms": [], "gauges": []}'),
        (b"answer", b"x y"),
        (b"answer", b""),
    ],
)
def test_a_line_that_is_none_of_ours_ends_no_supervisor(word, argument, caplog):
    fleet = Fleet(1)
    assert fleet.heard("worker", word, argument)
    assert "no line of ours" in caplog.text
    assert fleet._sums.totals == {}


def test_lines_for_the_supervisor_are_left_to_it():
    assert not Fleet(1).heard("worker", b"beat", b"0.1")


def test_a_late_answer_is_dropped():
    assert Fleet(1).heard("worker", b"answer", json.dumps([]).join(["7 ", ""]).encode())
