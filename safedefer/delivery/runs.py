"""The runs under way in a handler, each with its deadline: what stops them, and what becomes of those that go on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Coroutine
from threading import Lock
from typing import Any, Final, Protocol

from safedefer.concurrency.per_loop import PerLoop
from safedefer.concurrency.threads import Threads
from safedefer.execution.context import CURRENT
from safedefer.execution.deadline import GRACE, RunControl, Stop
from safedefer.execution.run import CoroutineCancelled, Outcome, Result, outcome_of
from safedefer.ledger import Execution

_log: Final = logging.getLogger("safedefer")


class Late(Protocol):
    """What is told of a run that returns after its request was answered."""

    def finish(self, outcome: Outcome, /) -> Awaitable[None]:
        """Store its end."""
        ...

    def detach(self) -> None:
        """Note that its event loop is being closed, and its thread goes on."""
        ...

    def finish_in_thread(self, outcome: Outcome, /) -> None:
        """Store its end after ``detach``, from its thread."""
        ...


class RequestCount:
    """Counts the requests under way in all event loops of a process."""

    def __init__(self) -> None:
        self.running: int = 0
        self.storing: int = 0
        """Those whose task's code has ended, and that hold no place while its end is stored."""
        self.runs: int = 0
        """Runs that have ended. Requests without one are not counted: anybody can send them."""
        self.abandoned: int = 0
        """Those that were cancelled."""
        self._lock = Lock()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    @property
    def places(self) -> int:
        """The places that are taken."""
        return self.running - self.storing

    def begin(self, most: int) -> bool:
        """Count a request in; False if ``most`` places are taken."""
        with self._lock:
            if self.places >= most:
                return False
            self.running += 1
            return True

    def begin_storing(self, most: int) -> bool:
        """Give the place of a request away whose task's code has ended; False if ``most`` have none."""
        with self._lock:
            if self.storing >= most:
                return False
            self.storing += 1
            return True

    def end(self, *, abandoned: bool, storing: bool = False) -> None:
        """Count a request out; ``storing`` says that it held no place."""
        with self._lock:
            self.running -= 1
            self.storing -= storing
            self.abandoned += abandoned
            if self.running or not self._waiting:
                return
            waiting, self._waiting = self._waiting, []
        for loop, idle in waiting:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(idle.set)

    def end_run(self) -> None:
        """Count a run that has ended, or is not waited for any more."""
        with self._lock:
            self.runs += 1

    async def wait_for_none(self) -> None:
        """Wait until no request is under way."""
        loop = asyncio.get_running_loop()
        while True:
            idle = asyncio.Event()
            with self._lock:
                if not self.running:
                    return
                self._waiting.append((loop, idle))
            await idle.wait()


class Runs:
    """Awaits runs up to their deadlines, those of an event loop with one timer.

    A run that cannot be stopped is *stuck*: it goes on without its request, and another thread takes the place of its. So is
    one that was stopped and left asyncio tasks that go on, such as those that it had shielded. They are counted, and not
    cancelled: a client that the run was the first to use may have made one, for every later run.

    Args:
        threads: The threads that runs are in.
        limit: The number of stuck runs at which this process should be replaced, which is logged once.
    """

    def __init__(self, threads: Threads, *, limit: int) -> None:
        self.limit = limit
        self._threads = threads
        self._stuck: set[_Awaited] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._warned = False
        self._loops: PerLoop[_LoopRuns] = PerLoop(_LoopRuns)

    @property
    def stuck(self) -> int:
        """The number of runs that go on past their deadlines, or whose asyncio tasks do."""
        return len(self._stuck)

    async def run(
        self,
        attempt: Coroutine[Any, Any, Outcome],
        control: RunControl,
        execution: Execution,
        *,
        seconds: float | None,
        late: Late,
    ) -> Outcome | None:
        """Return the outcome of a run; None if it passed its deadline and goes on.

        Args:
            attempt: The run: ``execute(...)``.
            control: Its control.
            execution: What the ledger admitted.
            seconds: Its deadline; None is none.
            late: Told of a run that goes on.

        Raises:
            asyncio.CancelledError: The caller was cancelled; ``CoroutineCancelled`` if nothing of the task runs any more.
        """
        here = self._loops.here()
        run = _Awaited(here.loop, attempt, control, execution, late)
        here.waiting.add(run)
        if seconds is not None:
            self._stop_at(run, here, here.loop.time() + seconds)
        cancelled = False
        try:
            await run.answered
        except asyncio.CancelledError:
            cancelled = True
            run.task.cancel()
            await asyncio.wait({run.task})
        finally:
            here.waiting.discard(run)
        if run.stuck:  # also if it has returned since
            return None
        if control.stop is not None and control.spawned:
            self._count_spawned(run)
        if control.cancelled_with_caller:
            if cancelled:
                raise CoroutineCancelled
            # The coroutine cancelled its own asyncio task, not its caller.
            return Outcome(result=Result.RETRY, reason="exception", error=asyncio.CancelledError())
        return run.outcome or run.task.result()  # without an outcome it was cancelled

    def cancel(self, task_id: str) -> None:
        """Stop the runs of a task that was cancelled, from any thread: a coroutine is cancelled, a thread is told."""
        for loop, here in self._loops.all():
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nothing runs in it
                loop.call_soon_threadsafe(self._cancel, here, task_id)
        for run in self._stuck.copy():
            if run.detached and run.execution.task_id == task_id:
                run.control.stop = Stop.CANCELLED

    def _cancel(self, here: _LoopRuns, task_id: str) -> None:
        stuck = [run for run in self._stuck.copy() if run.task.get_loop() is here.loop]
        for run in [run for run in (*here.waiting, *stuck) if run.execution.task_id == task_id]:
            if run.control.stop is None or run.stuck:
                run.control.stop = Stop.CANCELLED
                if run.control.withdraw():
                    run.task.cancel()

    # --- Deadlines ---

    def _stop_at(self, run: _Awaited, here: _LoopRuns, when: float) -> None:
        run.deadline = when
        if when < here.fires:
            if here.timer is not None:
                here.timer.cancel()
            here.fires = when
            here.timer = here.loop.call_at(when, self._fire, here)

    def _fire(self, here: _LoopRuns) -> None:
        here.timer, here.fires = None, math.inf
        now = here.loop.time()
        for run in [run for run in here.waiting if run.deadline <= now]:
            run.deadline = math.inf
            if run.stopped:
                self._answer_without(run)
            else:
                self._stop(run, here, Stop.DEADLINE)
        first = min((run.deadline for run in here.waiting), default=math.inf)
        if first < here.fires:
            here.fires = first
            here.timer = here.loop.call_at(first, self._fire, here)

    def _stop(self, run: _Awaited, here: _LoopRuns, why: Stop) -> None:
        """Stop a run: cancel its coroutine, and answer without it if that does not end it."""
        if run.control.stop is None:
            run.control.stop = why
        if run.control.withdraw():
            run.stopped = True
            run.task.cancel()
            self._stop_at(run, here, here.loop.time() + GRACE)
        else:
            self._answer_without(run)

    def _answer_without(self, run: _Awaited) -> None:
        if run.answered.done():
            return
        run.stuck = True
        self._stuck.add(run)
        if replaced := run.control.in_thread:
            self._threads.add_one()
        run.task.add_done_callback(lambda _: self._returned_late(run, replaced=replaced))
        run.answered.set_result(None)
        self._warn()

    def _count_spawned(self, run: _Awaited) -> None:
        """Count a run that was stopped as stuck while asyncio tasks that it made go on."""
        _log.error(
            "task %s was stopped, and %d asyncio tasks that it made go on beside its next attempt; await them, and shield none",
            run.execution.task_id,
            len(run.control.spawned),
        )
        self._stuck.add(run)
        self._await_spawned(run)
        self._warn()

    def _await_spawned(self, run: _Awaited) -> None:
        """Look again when one of them has ended: until then it may make others."""
        going_on = next((task for task in run.control.spawned if not task.done()), None)
        if going_on is None:
            self._stuck.discard(run)
        else:
            going_on.add_done_callback(lambda _: self._await_spawned(run))

    def _warn(self) -> None:
        if self.stuck >= self.limit and not self._warned:
            self._warned = True
            _log.error(
                "%d tasks go on past their deadlines in this process; restart it (`safedefer run` does so by itself)",
                self.stuck,
            )

    def _returned_late(self, run: _Awaited, *, replaced: bool) -> None:
        if run.outcome is None and replaced:  # cancelled with the event loop, as `asyncio.run` does; its thread goes on
            run.detached = True
            run.late.detach()
            run.control.when_returned(lambda returned: self._returned_detached(run, outcome_of(returned)))
            return
        self._stuck.discard(run)
        if replaced:
            self._threads.remove_one()
        if run.outcome is not None:
            ending = run.task.get_loop().create_task(_await(run.late.finish(run.outcome)))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    def _returned_detached(self, run: _Awaited, outcome: Outcome) -> None:
        try:
            run.late.finish_in_thread(outcome)
        finally:
            self._stuck.discard(run)
            self._threads.remove_one()


class _LoopRuns:
    """The runs of one event loop."""

    __slots__ = ("fires", "loop", "timer", "waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        if loop.get_task_factory() is None:
            loop.set_task_factory(_make_task)
        self.waiting: set[_Awaited] = set()
        """Runs whose requests wait for them."""
        self.timer: asyncio.TimerHandle | None = None
        self.fires = math.inf
        """When the timer fires, in the loop's time: no later than the first deadline of a run."""


class _Awaited:
    """A run under way. ``execute`` has an asyncio task of its own, which the request need not outlast."""

    __slots__ = (
        "answered",
        "control",
        "deadline",
        "detached",
        "execution",
        "late",
        "outcome",
        "stopped",
        "stuck",
        "task",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        attempt: Coroutine[Any, Any, Outcome],
        control: RunControl,
        execution: Execution,
        late: Late,
    ) -> None:
        self.task = loop.create_task(self._await(attempt))
        self.control = control
        self.execution = execution
        self.late = late
        self.answered: asyncio.Future[None] = loop.create_future()
        self.outcome: Outcome | None = None
        self.deadline = math.inf
        """When it is stopped, or answered without if it was, in the loop's time."""
        self.stopped = False
        """Whether its coroutine was cancelled."""
        self.stuck = False
        """Whether its request was answered without it."""
        self.detached = False
        """Whether its event loop is closed, and its thread goes on."""

    async def _await(self, attempt: Coroutine[Any, Any, Outcome]) -> None:
        try:
            self.outcome = await attempt
        finally:
            if not self.answered.done():  # here and not in a callback, which the loop would call a turn later
                self.answered.set_result(None)


async def _await(ending: Awaitable[None]) -> None:
    await ending


def _make_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    """Make an asyncio task as the event loop does, and note it in the run that it belongs to."""
    task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
    running = CURRENT.get()
    if running is not None:
        running.control.spawned.add(task)
        task.add_done_callback(running.control.spawned.discard)
    return task
