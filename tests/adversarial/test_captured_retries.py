"""A captured token of a task that failed: it runs no earlier, and no more often, than the queue retries it."""

import asyncio
from collections import Counter

import pytest

from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions, InProcessDelivery
from safedefer.options import TaskRetryOptions
from safedefer.queues.base import TaskState
from tests.adversarial import victim
from tests.adversarial.forge import HEADERS, NOW, URL, Clock, make_app, mint, post


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(params=["memory", "sqlite"])
def app(request, tmp_path, clock):
    app = make_app(None if request.param == "memory" else tmp_path / "tasks.db", clock=clock)
    yield app
    app.close()


async def dispatch(app, clock):
    dispatcher = Dispatcher(
        app.queue, InProcessDelivery(app.handle), clock=clock, options=DispatcherOptions(poll_seconds=0.05)
    )
    await asyncio.wait_for(dispatcher.run_until_empty(), 60)


def deliver(app, clock):
    asyncio.run(dispatch(app, clock))


def defer(app, function=victim.stumble, **options):
    given = {"min_backoff_seconds": 60, "max_doublings": 0, **options}
    return app.options(retry_options=TaskRetryOptions(**given)).defer(function, 1)


def posted(app, task, times=50):
    """Return how many of so many posts were answered in each way."""

    async def flood():
        answers = [await app.handle(HEADERS, task.payload, path=URL) for _ in range(times)]
        return Counter((answer.status, answer.headers["Safedefer-Outcome"]) for answer in answers)

    return asyncio.run(flood())


def test_before_the_time_of_the_retry_it_does_not_run(app, clock, ran):
    task = defer(app)
    deliver(app, clock)
    before = app.queue.find(task.id).eta, app.queue.next_due(now=clock())
    for later in (0, 10, 29.9):  # the jitter takes off up to a half
        clock.now = NOW + later
        assert posted(app, task) == {(503, "early"): 50}
    assert len(ran) == 1
    status, headers, body = post(app, task.payload)
    assert (status, headers["Retry-After"], body) == (503, "1", b"early\n")
    view = app.queue.find(task.id)
    assert (view.attempts, len(view.records)) == (1, 1)
    assert (view.eta, app.queue.next_due(now=clock())) == before, "nothing of it reaches the queue"


def test_between_two_deliveries_it_runs_once_and_that_run_is_counted(app, clock, ran):
    task = defer(app, task_retry_limit=5)
    for attempts in range(1, 6):
        deliver(app, clock)
        assert app.queue.find(task.id).attempts == attempts
        clock.now += 60 * attempts
        before = len(ran)
        assert posted(app, task) == {(500, "retry"): 50}
        assert len(ran) == before + 1, "the first of them: the time of the retry had come"
    deliver(app, clock)
    assert app.queue.find(task.id).state is TaskState.DEAD
    assert posted(app, task) == {(200, "duplicate"): 50}
    assert len(ran) == 6, "the first and five retries, whoever posted them"


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_limit_of_retries_holds_for_whoever_posts_it_at_every_moment(app, clock, ran, limit):
    task = defer(app, task_retry_limit=limit, min_backoff_seconds=1)
    for _ in range(60):
        posted(app, task, 3)
        deliver(app, clock)
        posted(app, task, 3)
        clock.now += 0.5
    assert app.queue.find(task.id).state is TaskState.DEAD
    assert len(ran) == limit + 1


def test_a_pause_of_the_queue_lets_it_run_once(app, clock, ran):
    task = defer(app)
    app.queue.pause("default", paused=True, now=clock())
    for _ in range(3):
        assert posted(app, task) == {(500, "retry"): 50}
        clock.now += 1000
        deliver(app, clock)
    assert len(ran) == 1
    app.queue.pause("default", paused=False, now=clock())
    deliver(app, clock)
    assert (len(ran), app.queue.find(task.id).attempts) == (1, 1), "its delivery charges that run"
    clock.now += 60
    deliver(app, clock)
    assert (len(ran), app.queue.find(task.id).attempts) == (2, 2)


def test_a_flood_while_it_is_delivered_gains_nothing(app, clock, ran):
    task = defer(app)

    async def flood(over):
        while not over.is_set():
            await app.handle(HEADERS, task.payload, path=URL)

    async def attack():
        over = asyncio.Event()
        floods = [asyncio.create_task(flood(over)) for _ in range(4)]
        await dispatch(app, clock)
        over.set()
        await asyncio.gather(*floods)

    for deliveries in (1, 2, 3):
        asyncio.run(attack())
        clock.now += 60
        assert len(ran) <= deliveries + 1
    assert app.queue.find(task.id).attempts <= 3


@pytest.mark.parametrize("wrong", [-1.0, -0.2, 0.0, 1.0])
@pytest.mark.parametrize("wait", [0, 0.5])
def test_the_dispatchers_retry_is_not_hurt_by_a_handler_whose_clock_is_wrong(app, clock, ran, wrong, wait, monkeypatch):
    task = defer(app, min_backoff_seconds=wait, max_backoff_seconds=wait, task_retry_limit=1)
    dispatchers = Clock()
    clock.now = NOW + wrong
    monkeypatch.setattr(victim.stumble, "__code__", stumble_once.__code__)
    for _ in range(12):
        deliver(app, dispatchers)
        dispatchers.now += 0.5
        clock.now = dispatchers.now + wrong
    assert app.queue.find(task.id).state is TaskState.SUCCEEDED
    assert app.queue.find(task.id).attempts == 2, "what came too early was not charged, and no limit was reached"


def stumble_once(*args):
    RAN.append(("stumble", args))  # noqa: F821 - the victim's
    if len(RAN) == 1:  # noqa: F821
        raise ValueError(*args)


def test_a_retry_by_hand_runs_at_once(app, clock, ran):
    task = defer(app, task_retry_limit=1, min_backoff_seconds=3600)
    deliver(app, clock)
    clock.now += 3600
    deliver(app, clock)
    assert app.queue.find(task.id).state is TaskState.DEAD
    again = app.retry(task.id)
    deliver(app, clock)
    assert len(ran) == 3
    assert posted(app, task) == {(200, "duplicate"): 50}
    assert posted(app, again) == {(503, "early"): 50}
    assert len(ran) == 3


@pytest.mark.parametrize("name", ["X-CloudTasks-TaskName", "x-cloudtasks-taskname"])
def test_a_push_engine_is_not_told_that_the_handler_is_overloaded(app, clock, name):
    """503 would slow its whole queue, for the one task that came too early."""
    task = defer(app)
    deliver(app, clock)
    future = mint(nbf=int(NOW) + 100, exp=int(NOW) + 1000)
    for token in (task.payload, future):
        status, headers, _ = post(app, token, {name: "1"})
        assert (status, headers["Safedefer-Outcome"]) == (425, "early")
        assert int(headers["Retry-After"]) >= 1
        assert post(app, token)[0] == 503


@pytest.mark.parametrize("outcome", ["rejected", "expired"])
def test_neither_a_rejection_nor_expiry_lets_it_run(app, clock, ran, outcome):
    if outcome == "rejected":
        token = mint(call={"kind": "function", "module": victim.__name__, "qualname": "never_there"})
        expected = (500, "rejected")
    else:
        token, expected = mint(nbf=int(NOW) - 200, iat=int(NOW) - 200, exp=int(NOW) - 100), (200, "failed")
    for _ in range(50):
        status, headers, _ = post(app, token)
        assert (status, headers["Safedefer-Outcome"]) == expected
    assert ran == []
