"""One App in several event loops at once, as a WSGI server's threads with ``asyncio.run(app.handle(...))`` have them."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from safedefer import Policy
from safedefer.delivery.budget import ByteBudget
from safedefer.dispatcher import Dispatcher, DispatcherOptions
from safedefer.dispatcher.transport import InProcessDelivery
from safedefer.queues.memory import MemoryQueue
from tests import sample_tasks
from tests.unit.apps import JOSE, make_app, until

HERE = __name__
LONGEST = 60.0
GATES = {}
BEGUN = {}
ENDED = []


class Clock:
    now = 1_800_000_000.0

    def __call__(self):
        return self.now


async def hold(name):
    BEGUN[name].set()
    while not GATES[name].is_set():  # noqa: ASYNC110  # set from another thread
        await asyncio.sleep(0.01)
    ENDED.append(name)


def block(name):
    BEGUN[name].set()
    assert GATES[name].wait(LONGEST)
    ENDED.append(name)


def gate(name):
    GATES[name], BEGUN[name] = threading.Event(), threading.Event()
    return name


@pytest.fixture(autouse=True)
def ended():
    GATES.clear(), BEGUN.clear(), ENDED.clear(), sample_tasks.reset()
    yield ENDED
    for each in GATES.values():
        each.set()


class Watched(MemoryQueue):
    """A queue that counts the calls by which runs are extended."""

    def __init__(self):
        super().__init__()
        self.extended = threading.Condition()
        self.extensions = 0
        extend_many = self.ledger.extend_many

        def counting(executions, **more):
            result = extend_many(executions, **more)
            with self.extended:
                self.extensions += 1
                self.extended.notify_all()
            return result

        self.ledger.extend_many = counting

    def wait_for_extensions(self, number):
        """Wait until runs were extended that often from now on."""
        with self.extended:
            wanted = self.extensions + number
            assert self.extended.wait_for(lambda: self.extensions >= wanted, LONGEST), "nothing is extended any more"


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def queue():
    return Watched()


@pytest.fixture
def app(queue, clock):
    app = make_app(queue=queue, clock=clock, lease_seconds=0.6, policy=policy(), concurrency=20)
    yield app
    for each in GATES.values():
        each.set()
    app.close()


def policy():
    return Policy("tests.sample_tasks", HERE)


def post(app, token):
    """Answer one request in a loop of its own."""

    async def answer():
        return await asyncio.wait_for(app.handle(JOSE, token), LONGEST)

    return asyncio.run(answer())


def test_every_request_of_every_thread_is_answered_and_nothing_runs_twice(app, queue, clock):
    gate("long")
    long = app.serialize(hold, "long")
    quick = [[app.serialize(sample_tasks.add, 1000 * thread + n) for n in range(100)] for thread in range(8)]
    with ThreadPoolExecutor(10) as threads:
        running = threads.submit(post, app, long)
        assert BEGUN["long"].wait(LONGEST)
        answers = [threads.submit(lambda tokens=tokens: [post(app, token) for token in tokens]) for tokens in quick]
        statuses = [answer.status for found in answers for answer in found.result()]
        # The run began in a loop that is not the last one. Its lease is extended all the same.
        for _ in range(4):
            clock.now += 0.4
            queue.wait_for_extensions(2)
        again = post(app, long)
        GATES["long"].set()
        assert running.result().status == 200
    assert statuses == [200] * 800
    assert sorted(a for _, a, *_ in sample_tasks.RAN) == sorted(
        1000 * thread + n for thread in range(8) for n in range(100)
    )
    assert (again.status, again.headers["Safedefer-Outcome"]) == (409, "running")
    assert ENDED == ["long"]
    assert app.delivery.running == 0


def test_a_deadline_holds_in_a_loop_after_another_loop_called(app):
    gate("late")
    token = deferred_token(app.options(deadline=1), app, hold, "late")
    with ThreadPoolExecutor(1) as threads:
        late = threads.submit(post, app, token)
        assert BEGUN["late"].wait(LONGEST)
        assert post(app, app.serialize(sample_tasks.add, 1)).status == 200
        assert (late.result().status, late.result().headers["Safedefer-Outcome"]) == (500, "retry")
    assert ENDED == []


def test_a_cancellation_reaches_every_loop(app):
    tasks = [app.defer(hold, gate(name)) for name in ("first", "second", "third")]
    tokens = [app.queue.find(task.id).token for task in tasks]
    with ThreadPoolExecutor(3) as threads:
        running = [threads.submit(post, app, token) for token in tokens]
        for begun in BEGUN.values():
            assert begun.wait(LONGEST)
        for task in tasks[:2]:
            assert app.cancel(task.id)
        outcomes = [found.result().headers["Safedefer-Outcome"] for found in running[:2]]
        GATES["third"].set()
        assert running[2].result().headers["Safedefer-Outcome"] == "succeeded"
    assert outcomes == ["cancelled", "cancelled"]
    assert ENDED == ["third"]


def test_draining_waits_for_the_runs_of_every_loop(app):
    gate("last")
    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(post, app, app.serialize(hold, "last"))
        assert BEGUN["last"].wait(LONGEST)
        app.delivery.drain()
        assert post(app, app.serialize(sample_tasks.add, 1)).status == 503

        async def drain():
            waiting = asyncio.create_task(app.delivery.drained(LONGEST))
            await asyncio.sleep(0.02)
            assert not waiting.done()
            GATES["last"].set()
            return await waiting

        assert threads.submit(asyncio.run, drain()).result() is True
        assert running.result().status == 200


@pytest.mark.parametrize("fails", [False, True])
def test_a_thread_that_outlasts_its_loop_is_extended_and_its_success_counts(app, queue, clock, fails):
    """After the deadline the request is answered, and ``asyncio.run`` takes the loop down."""
    gate("thread")
    token = deferred_token(app.options(deadline=1), app, fail_late if fails else block, "thread")
    assert post(app, token).headers["Safedefer-Outcome"] == "retry"
    assert app.delivery.running == app.delivery.stuck == 1
    for _ in range(4):
        clock.now += 0.4
        queue.wait_for_extensions(2)
    assert post(app, token).headers["Safedefer-Outcome"] == "running"
    GATES["thread"].set()
    wait_until(lambda: not app.delivery.running)
    assert ENDED == ["thread"]
    assert post(app, token).headers["Safedefer-Outcome"] == ("retry" if fails else "duplicate")
    assert ENDED == ["thread"], "unsettled: the run is not charged yet"


def fail_late(name):
    block(name)
    raise ValueError("late")


def deferred_token(options, app, *call):
    return app.queue.find(options.defer(*call).id).token


def wait_until(condition):
    waited = threading.Event()
    for _ in range(int(LONGEST * 100)):
        if condition():
            return
        waited.wait(0.01)
    raise AssertionError("it did not happen")


def test_concurrency_bounds_the_runs_of_all_loops_together(queue, clock):
    app = make_app(queue=queue, clock=clock, policy=policy(), concurrency=2)
    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(post, app, app.serialize(hold, gate(name))) for name in ("one", "two")]
        for begun in BEGUN.values():
            assert begun.wait(LONGEST)
        assert post(app, app.serialize(sample_tasks.add, 1)).headers["Safedefer-Outcome"] == "busy"
        for each in GATES.values():
            each.set()
        assert [found.result().status for found in running] == [200, 200]
    app.close()


def test_a_dispatcher_serves_one_loop_after_another(app):
    options = DispatcherOptions(poll_seconds=0.05, concurrency=1)
    dispatcher = Dispatcher(app.queue, InProcessDelivery(app.handle), clock=app._clock, options=options)

    async def work_and_rest(name):
        app.defer(hold, gate(name))
        running = asyncio.create_task(dispatcher.run())
        await until(lambda: BEGUN[name].is_set() or running.done())
        await asyncio.sleep(0.02)  # it sleeps now, as its one slot is taken
        GATES[name].set()
        await until(lambda: not app.queue.stats(now=app._clock()))
        dispatcher.stop()
        await running

    for name in ("one", "two", "three"):
        asyncio.run(work_and_rest(name))
    assert ENDED == ["one", "two", "three"]


def test_a_budget_of_bytes_is_exact_in_several_threads():
    budget = ByteBudget(1000)

    def use():
        for _ in range(5000):
            if budget.take(400):
                budget.give_back(400)

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(use) for _ in range(8)]:
            done.result()
    assert budget.take(1000)
    assert not budget.take(1)
