"""A writer of the storage, without a key, changes when a task is tried again: what was signed counts."""

import asyncio
import contextlib

import pytest

from safedefer.dispatcher import transport as transports
from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions, HttpDelivery, InProcessDelivery
from safedefer.dispatcher.signed_route import SignedRoute
from safedefer.options import TaskRetryOptions
from safedefer.queues.base import TaskState
from safedefer.web.server import serving
from tests.adversarial import victim
from tests.adversarial.forge import Clock, make_app

LIMITED = {"task_retry_limit": 2, "min_backoff_seconds": 10, "max_backoff_seconds": 10}


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def app(clock):
    app = make_app(clock=clock)
    yield app
    app.close()


async def deliver(app, clock, transport, queues=None):
    options = DispatcherOptions(poll_seconds=0.05, retry_options=queues or {})

    async def run(delivery):
        dispatcher = Dispatcher(app.queue, delivery, clock=clock, options=options)
        await asyncio.wait_for(dispatcher.run_until_empty(), 60)

    if transport == "in-process":
        await run(InProcessDelivery(app.handle))
        return
    async with serving(app, "127.0.0.1", 0) as url, HttpDelivery(url, verify=SignedRoute(app.authenticate)) as delivery:
        await run(delivery)


def write(app, task, **options):
    row = app.queue._state.rows[task.id]
    row.task = row.task._replace(retry_options=options)


@pytest.mark.parametrize("transport", ["in-process", "http"])
@pytest.mark.parametrize(
    "written",
    [{}, {"task_retry_limit": 0}, {"task_retry_limit": 1000, "min_backoff_seconds": 0}, {"task_age_limit": 0}],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 20_000], ids=["inline", "oversize"])
async def test_what_is_stored_of_the_retry_options_changes_nothing(app, clock, ran, transport, written, size):
    task = app.options(retry_options=TaskRetryOptions(**LIMITED)).defer(victim.stumble, "x" * size)
    write(app, task, **written)
    for attempts in (1, 2):
        await deliver(app, clock, transport)
        view = app.queue.find(task.id)
        assert (view.state, view.attempts) == (TaskState.WAITING, attempts)
        assert 5 <= app.queue.next_due(now=clock()) - clock() <= 10
        clock.now += 10
    await deliver(app, clock, transport)
    view = app.queue.find(task.id)
    assert (view.state, view.reason, len(ran)) == (TaskState.DEAD, "retry-limit", 3)


@pytest.mark.parametrize("transport", ["in-process", "http"])
async def test_what_the_task_does_not_say_its_queue_says(app, clock, ran, transport):
    own = TaskRetryOptions(min_backoff_seconds=20, max_backoff_seconds=20)
    task = app.options(retry_options=own).defer(victim.stumble, 1)
    write(app, task, task_retry_limit=1000, min_backoff_seconds=0)
    queues = {"default": {"task_retry_limit": 1, "min_backoff_seconds": 1}}
    await deliver(app, clock, transport, queues)
    assert 10 <= app.queue.next_due(now=clock()) - clock() <= 20
    clock.now += 20
    await deliver(app, clock, transport, queues)
    assert app.queue.find(task.id).reason == "retry-limit"
    assert len(ran) == 2


@pytest.mark.parametrize("transport", ["in-process", "http"])
async def test_a_token_without_retry_options_goes_by_what_is_stored(app, clock, ran, transport):
    """As tasks do that were stored before these were signed."""
    task = app.defer(victim.stumble, 1)
    write(app, task, task_retry_limit=0)
    await deliver(app, clock, transport)
    assert app.queue.find(task.id).reason == "retry-limit"


async def test_an_answer_that_does_not_come_is_judged_by_what_was_signed(app, clock):
    task = app.options(retry_options=TaskRetryOptions(**LIMITED)).defer(victim.stumble, 1)
    write(app, task, task_retry_limit=0)

    async def close(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(close, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with HttpDelivery(url, verify=SignedRoute(app.authenticate)) as delivery:
        options = DispatcherOptions(poll_seconds=0.05)
        dispatcher = Dispatcher(app.queue, delivery, clock=clock, options=options)
        await asyncio.wait_for(dispatcher.run_until_empty(), 60)
    server.close()
    view = app.queue.find(task.id)
    assert (view.state, view.reason) == (TaskState.WAITING, "no-response")


@pytest.mark.parametrize(
    ("own", "fixed", "comes"), [(1, None, False), (60, None, True), (None, None, True), (1, 60.0, True)]
)
async def test_the_http_transport_waits_by_the_deadline_that_was_signed(app, clock, monkeypatch, own, fixed, comes):
    monkeypatch.setattr(transports, "ANSWER_SECONDS", 0.1)
    task = app.options(deadline=own).defer(victim.note, 1)

    handled = []

    async def slow(reader, writer):
        handled.append(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError):  # it was hung up on before it had read all
            await reader.readuntil(task.payload)  # closed with bytes unread, the connection would be reset
        # Longer than the deadline that was signed where that is not what counts; where it is, until the other end hangs up.
        await (asyncio.sleep(1.5 if own == 1 else 0.1) if comes else reader.read())
        writer.write(b"HTTP/1.1 200 OK\r\nSafedefer-Outcome: succeeded\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(slow, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    verify = SignedRoute(app.authenticate)
    async with HttpDelivery(url, verify=verify, timeout=fixed, deadlines={"default": 500.0}) as delivery:
        dispatcher = Dispatcher(app.queue, delivery, clock=clock, options=DispatcherOptions(poll_seconds=0.05))
        await asyncio.wait_for(dispatcher.run_until_empty(), 60)
    await asyncio.gather(*handled)
    server.close()
    view = app.queue.find(task.id)
    assert (view.state is TaskState.SUCCEEDED, view.reason) == (comes, None if comes else "no-response")
