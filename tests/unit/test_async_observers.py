"""Async observers: in order, each beside the others and beside the tasks, bounded, and fork-safe."""

import asyncio
import functools
import os
import threading

import pytest

from safedefer.concurrency.aside import Aside
from safedefer.events import Observers, TaskEnqueued
from tests.unit.apps import make_app

LONG = 60.0


def event(number=0):
    return TaskEnqueued(task_id=str(number), queue="default", callable="m:f", size=1)


def ids(events):
    return [int(each.task_id) for each in events]


@pytest.fixture
def observers():
    made = []

    def make(*several):
        made.append(Observers(*several))
        return made[-1]

    yield make
    for each in made:
        each.close(0.0)


class Waits:
    """An async observer that ends when it is told."""

    def __init__(self):
        self.began = threading.Event()
        self.seen = []
        self.free = False

    async def __call__(self, event):
        self.began.set()
        while not self.free:  # noqa: ASYNC110  # it is told from another thread
            await asyncio.sleep(0.001)
        self.seen.append(event)


def test_async_observers_of_all_kinds_get_all_events_in_order(observers):
    seen = {"function": [], "partial": [], "object": [], "lambda": [], "plain": []}

    async def keep(name, event):
        await asyncio.sleep(0)
        seen[name].append(event)

    async def function(event):
        await keep("function", event)

    class Callable:
        async def __call__(self, event):
            await keep("object", event)

    several = observers(
        function,
        functools.partial(keep, "partial"),
        Callable(),
        lambda event: keep("lambda", event),
        seen["plain"].append,
    )
    for number in range(100):
        several(event(number))
    assert several.flush(LONG)
    assert {name: ids(events) for name, events in seen.items()} == {name: list(range(100)) for name in seen}


def test_an_async_observer_that_raises_gets_the_next_event_and_hurts_no_other(observers, caplog):
    seen, other = [], []

    async def raises(event):
        seen.append(event)
        raise (SystemExit, ValueError, asyncio.CancelledError)[int(event.task_id) % 3]

    async def fine(event):
        other.append(event)

    several = observers(raises, fine)
    for number in range(6):
        several(event(number))
    assert several.flush(LONG)
    assert ids(seen) == ids(other) == list(range(6))
    assert [record.getMessage() for record in caplog.records] == ["an observer failed; mend it"] * 6


def test_an_observer_that_never_ends_loses_events_and_hurts_no_other(observers, caplog):
    waits, other = Waits(), []

    async def fine(event):
        other.append(event)

    several = observers(waits, fine)
    several(event(0))
    assert waits.began.wait(LONG)
    for start in range(1, 1301, 100):
        for number in range(start, start + 100):
            several(event(number))
        several._asides[1].flush(LONG)
    assert ids(other) == list(range(1301))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "an observer is too slow: 1000 events wait for it, and 1 were dropped"
    assert several._asides[0].dropped == 300
    assert not several.flush(0.0)
    waits.free = True
    assert several.flush(LONG)
    assert ids(waits.seen) == list(range(1001))


def test_drops_are_logged_once_a_minute_with_their_number(caplog):
    now = [0.0]
    waits, discarded = Waits(), []
    aside = Aside(waits, discard=discarded.append, most=1, clock=lambda: now[0])
    try:
        aside.put(event(0))
        assert waits.began.wait(LONG)
        for number in range(1, 5):
            aside.put(event(number))
        now[0] = 60.0
        aside.put(event(5))
        lines = [record.getMessage().rpartition(", and ")[2] for record in caplog.records]
        assert lines == ["1 were dropped", "3 were dropped"]
        assert ids(discarded) == [2, 3, 4, 5]
    finally:
        aside.close(0.0)


def test_the_end_waits_for_an_observer_a_bounded_time_and_ends_it(caplog):
    waits = Waits()
    several = Observers(waits)
    several(event(0))
    several(event(1))
    assert waits.began.wait(LONG)
    thread = several._asides[0]._thread
    several.close(0.0)
    thread.join(LONG)
    assert not thread.is_alive()
    assert "an observer did not end in time; it lost 1 events that waited" in caplog.text
    several(event(2))
    assert waits.seen == []


def test_events_of_several_loops_and_threads_meet_in_one_loop_each_in_order(observers):
    seen, loops = [], set()

    async def observer(event):
        loops.add(asyncio.get_running_loop())
        seen.append(event)

    several = observers(observer)

    async def tell(start):
        for number in range(start, start + 50):
            several(event(number))
            await asyncio.sleep(0)

    threads = [threading.Thread(target=asyncio.run, args=(tell(start),)) for start in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert several.flush(LONG)
    assert len(loops) == 1
    for start in (0, 100, 200):
        assert [number for number in ids(seen) if start <= number < start + 50] == list(range(start, start + 50))


def test_a_future_is_left_to_its_loop(observers, caplog):
    seen = []

    async def keep(event):
        seen.append(event)

    async def main():
        tasks = []
        several = observers(lambda event: tasks.append(asyncio.ensure_future(keep(event))) or tasks[-1])
        several(event(1))
        await tasks[0]
        assert not several.has_async

    asyncio.run(main())
    assert ids(seen) == [1]
    assert not caplog.records


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_has_a_thread_of_its_own_and_none_of_the_parents_events(observers):
    reading, writing = os.pipe()
    waits = Waits()
    several = observers(waits)
    several(event(1))
    several(event(2))
    assert waits.began.wait(LONG)
    child = os.fork()
    if child == 0:
        try:
            waits.free = True
            several(event(3))
            flushed = several.flush(LONG)
            os.write(writing, f"{flushed} {ids(waits.seen)}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        assert answer.read() == "True [3]"
    os.waitpid(child, 0)
    waits.free = True
    assert several.flush(LONG)
    assert ids(waits.seen) == [1, 2]


async def test_an_app_awaits_its_observers_before_on_loop_and_close_return():
    seen = []

    async def slow(event):
        await asyncio.sleep(0.001)
        seen.append(event)

    app = make_app(observers=[slow])
    for name in ("flush", "close"):  # a busy machine may need more than 2 s
        setattr(app.observers, name, functools.partial(getattr(app.observers, name), LONG))
    async with app.on_loop():
        app.observers(event(1))
    assert ids(seen) == [1]
    app.observers(event(2))
    app.close()
    assert ids(seen) == [1, 2]


def test_no_thread_starts_before_the_first_event():
    async def observer(event):
        raise AssertionError

    several = Observers(observer)
    assert several._asides[0]._thread is None
    assert several.flush(0.0)
    several.close()
