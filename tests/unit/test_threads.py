"""Threads for what blocks, and the renewal of what runs in them."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager
from itertools import pairwise

import pytest

from safedefer.concurrency import threads as module
from safedefer.concurrency.threads import Threads
from safedefer.delivery.ledger_client import RunRenewal
from safedefer.errors import QueueUnavailable
from safedefer.ledger import Execution
from tests.unit.apps import until


@contextmanager
def open_threads(most):
    found = Threads(most, "test")
    yield found
    found.close(wait=True)


async def test_calls_return_and_raise_what_they_do():
    def fail(error):
        raise error

    with open_threads(2) as threads:
        assert await threads(lambda: 5) == 5
        for error in (ValueError("no"), SystemExit(3), KeyboardInterrupt()):
            with pytest.raises(type(error)) as caught:
                await threads(lambda error=error: fail(error))
            assert caught.value is error
        with pytest.raises(RuntimeError, match="StopIteration"):
            await threads(lambda: fail(StopIteration()))


async def test_calls_that_block_run_side_by_side_up_to_the_most():
    gate, running, most = threading.Barrier(4), set(), []

    def meet():
        running.add(threading.get_ident())
        most.append(len(running))
        gate.wait(30)
        running.discard(threading.get_ident())

    with open_threads(4) as threads:
        await asyncio.gather(*(threads(meet) for _ in range(12)))
    assert max(most) == 4


async def test_a_call_that_blocks_keeps_no_other_waiting():
    gate = threading.Event()
    with open_threads(3) as threads:
        blocked = [threads(lambda: gate.wait(30)) for _ in range(2)]
        assert await asyncio.wait_for(asyncio.gather(*(threads(lambda n=n: n) for n in range(50))), 60) == [*range(50)]
        assert not any(future.done() for future in blocked)
        gate.set()
        assert await asyncio.gather(*blocked) == [True, True]


async def after_brief_calls(threads):
    """Make so many brief calls that the next ones wait for each other."""
    while not threads._is_brief:
        await asyncio.gather(*(threads(int) for _ in range(16)))


async def test_brief_calls_wait_for_one_thread(monkeypatch):
    monkeypatch.setattr(module, "_BRIEF", 10.0)
    monkeypatch.setattr(module, "_LOOK", 10.0)
    monkeypatch.setattr(module, "_LOOK_ASIDE", 10.0)  # the machine may stand still for longer than that
    with open_threads(4) as threads:
        await after_brief_calls(threads)
        await until(lambda: threads._awake == threads._idle)  # one that is not idle yet takes calls too
        idents = await asyncio.gather(*(threads(lambda: time.sleep(0.001) or threading.get_ident()) for _ in range(50)))
        assert len(set(idents)) == 1


async def test_among_brief_calls_one_that_blocks_keeps_no_other_waiting_and_no_result_back():
    gate = threading.Event()
    with open_threads(3) as threads:
        await after_brief_calls(threads)
        before, blocked = threads(int), threads(gate.wait)
        assert await asyncio.wait_for(before, 30) == 0
        assert await asyncio.wait_for(asyncio.gather(*(threads(int) for _ in range(10))), 30) == [0] * 10
        assert not blocked.done()
        results = threads._results.here()
        await until(lambda: not results.watched)  # while calls last, nothing looks
        gate.set()
        await blocked


async def test_a_call_behind_one_that_blocks_begins_although_the_loop_is_blocked_too():
    blocked, ran = threading.Event(), threading.Event()
    with open_threads(2) as threads:
        await asyncio.gather(*(threads(int) for _ in range(200)))  # they are brief
        assert threads._is_brief
        calls = [threads(lambda: blocked.wait(30.0)), threads(ran.set)]
        assert ran.wait(20.0)  # as a coroutine that should not
        blocked.set()
        assert await asyncio.gather(*calls) == [True, None]


async def test_the_thread_that_looks_for_blocked_loops_ends_and_comes_back(monkeypatch):
    monkeypatch.setattr(module, "_LOOK_ASIDE", 0.001)
    with open_threads(2) as threads:
        for _ in range(2):
            await asyncio.gather(*(threads(int) for _ in range(200)))
            await until(lambda: not threads._looks_aside)


async def test_calls_come_in_their_order_where_there_is_one_thread():
    seen = []
    with open_threads(1) as threads:
        await asyncio.gather(*(threads(lambda n=n: seen.append(n)) for n in range(100)))
    assert seen == [*range(100)]


async def test_what_was_cancelled_before_it_began_never_runs():
    gate, ran = threading.Event(), []
    with open_threads(1) as threads:
        first = threads(lambda: gate.wait(30))
        second = threads(lambda: ran.append(2))
        second.cancel()
        gate.set()
        await first
        assert await threads(lambda: ran) == []


async def test_what_is_cancelled_later_goes_on():
    begun, gate, ran = threading.Event(), threading.Event(), []

    def work():
        begun.set()
        gate.wait(30)
        ran.append(1)

    with open_threads(1) as threads:
        future = threads(work)
        await asyncio.to_thread(begun.wait, 30)
        future.cancel()
        gate.set()
        await threads(lambda: None)
    assert ran == [1]


async def test_threads_go_when_there_is_nothing_to_do_and_come_back(monkeypatch):
    monkeypatch.setattr(module, "_LINGER", 0.01)
    with open_threads(3) as threads:
        for _ in range(3):
            await asyncio.gather(*(threads(lambda: time.sleep(0.001)) for _ in range(6)))
            await until(lambda: (threads._awake, threads._idle) == (0, 0))


async def test_threads_stay_with_what_code_keeps_for_them(monkeypatch):
    """As connections of Django do: after a pause no new one is made."""
    monkeypatch.setattr(module, "_LINGER", 0.01)
    with open_threads(1) as threads:
        seen = set()
        for _ in range(5):
            seen.add(await threads(threading.current_thread))
            await until(lambda: threads._awake == 0)
        assert len(seen) == 1


class SlowLock:
    """After whose release a thread of the tests stays away for a moment."""

    def __init__(self):
        self._lock = threading.Lock()

    def __enter__(self):
        self._lock.acquire()

    def __exit__(self, *_):
        self._lock.release()
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.02)


async def test_a_thread_that_is_about_to_rest_is_not_replaced(monkeypatch):
    """Each one that is would stay for good, with a connection of its own."""
    monkeypatch.setattr(module, "_LINGER", 0.001)
    with open_threads(1) as threads:
        threads._lock = SlowLock()
        seen = set()
        for _ in range(10):
            seen.add(await threads(threading.current_thread))
            while threads._awake:  # noqa: ASYNC110  # without a pause: the next call comes at once
                await asyncio.sleep(0)
        assert len(seen) == 1


async def test_threads_have_names_of_their_own():
    meet = threading.Barrier(3)
    with open_threads(3) as threads:
        calls = [threads(lambda: [meet.wait(30), threading.current_thread().name][1]) for _ in range(3)]
        names = await asyncio.gather(*calls)
    assert len(set(names)) == 3
    assert all(name.startswith("test-") for name in names)


async def test_nobody_is_lost_where_threads_fall_asleep_while_calls_come(monkeypatch):
    monkeypatch.setattr(module, "_LINGER", 0.0005)
    with open_threads(4) as threads:
        for number in range(400):
            calls = [threads(lambda: None) for _ in range(number % 5 + 1)]
            await asyncio.wait_for(asyncio.gather(*calls), 60)
            await asyncio.sleep(0.0005 * (number % 3))


def test_the_threads_of_a_loop_that_was_left_serve_the_next():
    with open_threads(1) as threads:

        async def leave():
            future = threads(lambda: time.sleep(0.05))
            await asyncio.sleep(0)
            future.cancel()

        async def use():
            return await asyncio.wait_for(threads(lambda: 2), 60)

        asyncio.run(leave())
        assert asyncio.run(use()) == 2


async def test_closing_finishes_what_was_taken_or_cancels_it():
    for cancel in (False, True):
        threads, begun, gate = Threads(1, "test"), threading.Event(), threading.Event()
        first, second = threads(lambda: [begun.set(), gate.wait(30)][1]), threads(lambda: 2)
        await until(begun.is_set)
        threads.close(wait=False, cancel=cancel)
        gate.set()
        assert await first is True
        if cancel:
            with pytest.raises(asyncio.CancelledError):
                await second
        else:
            assert await second == 2
        with pytest.raises(RuntimeError, match="let go"):
            threads(lambda: 3)


async def test_closing_waits_for_calls_that_begin_meanwhile():
    """The last thread that is awake would wake others for them."""
    threads, begun, gate, ended = Threads(3, "test"), threading.Event(), threading.Event(), []

    def end():
        time.sleep(0.02)
        ended.append(threading.get_ident())

    calls = [threads(lambda: [begun.set(), gate.wait(30)])]
    await until(begun.is_set)
    with threads._lock:
        threads._most = 1  # only now the others may begin
    calls += [threads(end) for _ in range(12)]
    with threads._lock:
        threads._most = 3
    asyncio.get_running_loop().call_later(0.05, gate.set)
    await asyncio.to_thread(threads.close, wait=True)
    assert len(ended) == 12
    assert threads._awake == 0
    await asyncio.gather(*calls)


async def test_a_result_is_kept_by_nobody(monkeypatch):
    class Large:
        pass

    monkeypatch.setattr(module, "_LINGER", 60.0)  # the thread waits for the next call, and keeps nothing meanwhile
    with open_threads(1) as threads:
        large = await threads(Large)
        there = weakref.ref(large)
        del large
        await asyncio.sleep(0)  # what resumed this coroutine had it
        await until(lambda: threads._idle)
        gc.collect()
        assert there() is None


def test_an_interpreter_that_forgets_to_close_ends():
    code = """
import asyncio, time
from safedefer.concurrency.threads import Threads
async def main():
    threads = Threads(8, "test")
    await asyncio.gather(*(threads(lambda: time.sleep(0.01)) for _ in range(8)))
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_a_forked_child_starts_threads_of_its_own():
    """Idle ones, resting ones and a busy one are the parent's, and so are its calls."""
    code = """
import asyncio, os, sys, threading, time
from safedefer.concurrency.threads import Threads
threads = Threads(2, "test")
async def use():
    return await asyncio.wait_for(asyncio.gather(*(threads(lambda n=n: n) for n in range(3))), 30)
async def leave():
    threads(lambda: time.sleep(0.5))
    await asyncio.sleep(0.05)
for kind in ("idle", "resting", "busy"):
    asyncio.run(leave() if kind == "busy" else use())
    time.sleep(0.3 if kind == "resting" else 0.0)
    child = os.fork()
    assert asyncio.run(use()) == [0, 1, 2], kind
    if child == 0:
        sys.exit()  # as a process ends that joins its threads
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, kind
"""
    subprocess.run([sys.executable, "-c", code], timeout=100, check=True)


# --- The renewal of runs -----------------------------------------------------------------------------------


class Recorder:
    def __init__(self, *, fails=False):
        self.calls, self.moments = [], []
        self.fails = fails

    def cancelled_many(self, executions):
        return [False] * len(executions)

    def extend_many(self, executions, *, now, lease):
        self.calls += [execution.owner for execution in executions]
        self.moments.append(time.monotonic())
        if self.fails:
            self.fails = False
            raise QueueUnavailable("locked")
        return [True] * len(executions)


def run_of(owner):
    return Execution(audience="a", task_id="i", digest=b"", owner=owner, expires=10**9)


@contextmanager
def renewal_of(ledger, seconds, **more):
    renewal = RunRenewal(lambda: ledger, clock=time.time, seconds=seconds, cancel=[].append, **more)
    yield renewal
    renewal.close()


async def test_runs_are_prolonged_in_time_while_they_last():
    ledger = Recorder(fails=True)
    with renewal_of(ledger, 3.0) as renewal:
        began = time.monotonic()
        for owner in ("other", "long", "short"):
            renewal.add(run_of(owner))
        renewal.remove(run_of("short"))
        await until(lambda: len(ledger.calls) > 5)
        renewal.remove(run_of("long"))
        renewal.remove(run_of("other"))
        count = len(ledger.calls)
        await asyncio.sleep(1.6)
        assert len(ledger.calls) <= count + 2, "but for the call under way"
    assert set(ledger.calls) == {"other", "long"}
    first, second = ledger.moments[:2]
    # Within a lease; a busy machine may delay one of them.
    assert min(later - earlier for earlier, later in pairwise([began, *ledger.moments])) < 3.0
    # At every second of the six beats in a lease, and no sooner.
    assert first - began > 0.99
    assert second - began > 1.99


def test_the_renewal_of_a_loop_that_was_left_serves_the_next():
    ledger = Recorder()
    with renewal_of(ledger, 0.12) as renewal:

        async def leave():
            renewal.add(run_of("left"))

        async def use():
            renewal.add(run_of("next"))
            await until(lambda: ledger.calls)

        asyncio.run(leave())
        asyncio.run(use())
    assert set(ledger.calls) == {"next"}


async def test_runs_are_extended_while_a_task_blocks_the_loop_and_not_while_it_hangs(caplog):
    ledger = Recorder()
    with renewal_of(ledger, 0.6, hang_seconds=2.0) as renewal:
        renewal.add(run_of("blocked"))
        await asyncio.sleep(0)
        began = time.monotonic()
        time.sleep(6.0)  # noqa: ASYNC251  # what a task should not do
        assert len(ledger.moments) >= 2, "the loop stood for less than hang_seconds"
        last = ledger.moments[-1] - began
        assert last < 5.0, "it hung"
        assert caplog.text.count("the event loop stands for") == 1
        count = len(ledger.moments)
        await until(lambda: len(ledger.moments) > count)


def test_a_closed_loop_extends_nothing():
    ledger = Recorder()
    others = set(threading.enumerate())  # of Apps that other tests have left
    with renewal_of(ledger, 0.12) as renewal:

        async def leave():
            renewal.add(run_of("left"))

        asyncio.run(leave())
        count = len(ledger.calls)
        time.sleep(0.5)
        assert len(ledger.calls) <= count + 1, "but for the call under way"
        ends = time.monotonic() + 30.0
        while any(thread.name == "safedefer-runs" for thread in set(threading.enumerate()) - others):
            assert time.monotonic() < ends, "its thread ends with it"
            time.sleep(0.01)
