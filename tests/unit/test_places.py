"""Places: how much runs at once, and that a task holds none while its end is stored."""

import asyncio
import threading
import time

from safedefer import Policy
from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions, InProcessDelivery
from safedefer.queues.base import TaskState
from safedefer.queues.memory import MemoryQueue
from tests.unit.apps import JOSE, make_app, until

PLACES = 2
RUNNING, MOST, RAN = set(), [0], []


async def note(number):
    RUNNING.add(number)
    MOST[0] = max(MOST[0], len(RUNNING))
    await asyncio.sleep(0.001)
    RUNNING.discard(number)
    RAN.append(number)


class SlowEnds(MemoryQueue):
    """A queue that stores no end before ``open`` is set."""

    def __init__(self):
        super().__init__()
        self.open, finish = threading.Event(), self.ledger.finish_many

        def wait_and_finish(ends):
            assert self.open.wait(60)
            return finish(ends)

        self.ledger.finish_many = wait_and_finish


async def test_tasks_whose_ends_are_being_stored_let_others_run_but_not_without_bound():
    RUNNING.clear(), RAN.clear()
    MOST[0] = 0
    queue = SlowEnds()
    app = make_app(queue=queue, policy=Policy(__name__), concurrency=PLACES)
    tasks = [app.defer(note, number) for number in range(40)]
    options = DispatcherOptions(concurrency=PLACES, poll_seconds=0.05)
    dispatcher = Dispatcher(app.queue, InProcessDelivery(app.handle), clock=time.time, options=options)
    running = asyncio.create_task(dispatcher.run())
    # Four times the places wait for their ends to be stored; what runs after that keeps its place.
    await until(lambda: len(RAN) >= 5 * PLACES)
    await asyncio.sleep(0.2)
    assert (len(RAN), MOST[0]) == (5 * PLACES, PLACES)
    assert (await app.handle(JOSE, tasks[-1].payload)).headers["Safedefer-Outcome"] == "busy"
    assert {app.queue.find(task.id).state for task in tasks} <= {TaskState.WAITING, TaskState.RUNNING}
    queue.open.set()
    await until(lambda: {app.queue.find(task.id).state for task in tasks} == {TaskState.SUCCEEDED})
    dispatcher.stop()
    await running
    assert (sorted(RAN), MOST[0]) == ([*range(40)], PLACES)
    assert await app.delivery.drained(5.0)
