"""What a dispatcher does while its queue is away: it waits, keeps what it has, and says what it knows."""

import asyncio
import time
from itertools import pairwise

import pytest

from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions
from safedefer.errors import ConfigurationError, QueueUnavailable
from safedefer.ledger import AttemptRecord, EndState, Execution
from safedefer.queues.base import TaskState
from safedefer.queues.memory.queue import MemoryQueue
from tests.queues.single import begin, finish
from tests.unit.apps import until
from tests.unit.delivering import Delivering
from tests.unit.test_dispatcher import answer, task_of


class Away(MemoryQueue):
    """A queue that is away while ``away`` is set."""

    def __init__(self):
        super().__init__()
        self.away = False
        self.leased = []
        self.extended = []

    def _check_here(self):
        if self.away:
            raise QueueUnavailable("away")

    def lease(self, **arguments):
        self.leased.append(time.monotonic())
        self._check_here()
        return super().lease(**arguments)

    def next_due(self, **arguments):
        self._check_here()
        return super().next_due(**arguments)

    def settle_many(self, settlements, *, now):
        self._check_here()
        return super().settle_many(settlements, now=now)

    def extend_many(self, leases, **arguments):
        self.extended.append(time.monotonic())
        self._check_here()
        return super().extend_many(leases, **arguments)

    def find(self, task_id):
        self._check_here()
        return super().find(task_id)


def dispatch(queue, deliver, **options):
    return Dispatcher(queue, Delivering(deliver), clock=time.time, options=DispatcherOptions(**options))


async def test_a_queue_that_is_away_is_asked_about_once_a_second():
    queue, ended = Away(), []
    for number in range(4):
        queue.enqueue_many([task_of(number, eta=0.0)])

    async def deliver(task, headers):
        queue.away = True  # and now a place is free, which is no reason to ask at once
        await asyncio.sleep(0.05)
        ended.append(time.monotonic())
        return answer(200, "succeeded")

    dispatcher = dispatch(queue, deliver, concurrency=2)
    running = asyncio.create_task(dispatcher.run())

    def asked():
        return [when for when in queue.leased if len(ended) == 2 and when > max(ended)]

    await until(lambda: len(asked()) > 2)
    # The first is asked at once: a place has become free. A pause may be longer on a busy machine, and no shorter.
    assert all(later - earlier > 0.99 for earlier, later in pairwise(asked()[:3]))
    dispatcher.stop()
    queue.away = False
    await asyncio.wait_for(running, 30)


async def test_leases_are_prolonged_as_soon_as_that_is_possible_again():
    queue = Away()
    queue.enqueue_many([task_of(eta=0.0)])

    async def deliver(task, headers):
        queue.away = True
        await until(lambda: len(queue.extended) > 2)
        queue.away = False
        await until(lambda: len(queue.extended) > 3)
        return answer(200, "succeeded")

    await dispatch(queue, deliver, lease_seconds=9.0).run_until_empty()
    # After a second, not a third of the lease later; a busy machine may delay one of them.
    assert min(later - earlier for earlier, later in pairwise(queue.extended[:4])) < 2.9
    assert queue.find(task_of().id).state is TaskState.SUCCEEDED


async def test_a_failed_task_has_its_recorded_reason_although_the_queue_was_away_when_it_was_answered():
    queue = Away()
    queue.enqueue_many([task_of(eta=0.0)])

    async def deliver(task, headers):
        run = Execution(audience=task.audience, task_id=task.id, digest=task.digest, owner="run", expires=task.expires)
        record = AttemptRecord(
            task_id=task.id, audience=task.audience, started=0.0, ended=0.0, outcome="failed", status=200, reason="why"
        )
        begin(queue.ledger, run, now=time.time(), lease=60.0)
        finish(queue.ledger, run, EndState.FAILED, record)
        queue.away = True
        asyncio.get_running_loop().call_later(0.3, setattr, queue, "away", False)
        return answer(200, "failed")

    await dispatch(queue, deliver).run_until_empty()
    view = queue.find(task_of().id)
    assert (view.state, view.reason, [record.outcome for record in view.records]) == (TaskState.DEAD, "why", ["failed"])
    assert view.attempts == 1


@pytest.mark.parametrize("call", ["configure", "lease", "next_due"])
async def test_a_queue_that_cannot_be_used_as_it_is_ends_the_dispatcher_and_not_what_runs(call, monkeypatch):
    queue, ended = MemoryQueue(), []

    async def deliver(task, headers):
        def wrong(*_arguments, **_options):
            raise ConfigurationError("the queue's tables are not in this database")

        monkeypatch.setattr(queue, call, wrong)
        await asyncio.sleep(0.2)
        ended.append(task.id)
        return answer(200, "succeeded")

    queue.enqueue_many([task_of()])
    if call == "configure":
        monkeypatch.setattr(queue, call, lambda *_a, **_o: (_ for _ in ()).throw(ConfigurationError("no tables")))
    with pytest.raises(ConfigurationError, match="tables"):
        await asyncio.wait_for(dispatch(queue, deliver, limits=[], poll_seconds=0.05).run(), 60)
    assert len(ended) == (call != "configure")
    assert sum(stats.waiting + stats.running for stats in queue.stats(now=time.time())) == (call == "configure")
