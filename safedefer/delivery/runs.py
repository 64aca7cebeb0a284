"""The runs under way in a handler, each with its deadline: what stops them, and what becomes of those that go on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from safedefer.concurrency.threads import Threads
from safedefer.execution.context import CURRENT
from safedefer.execution.deadline import GRACE, RunControl, Stop
from safedefer.execution.run import CoroutineCancelled, Outcome, Result
from safedefer.ledger import Execution

_log: Final = logging.getLogger("safedefer")

Late = Callable[[Outcome], Awaitable[None]]
"""Called when a run returns after its request was answered."""


class Runs:
    """Awaits runs up to their deadlines, all with one timer.

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
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forget()

    def _forget(self) -> None:
        self._waiting: set[_Awaited] = set()
        """Runs whose requests wait for them."""
        self._timer: asyncio.TimerHandle | None = None
        self._fires = math.inf
        """When the timer fires, in the loop's time: no later than the first deadline of a run."""

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
            late: Awaited with the outcome of a run that goes on, when it returns.

        Raises:
            asyncio.CancelledError: The caller was cancelled; ``CoroutineCancelled`` if nothing of the task runs any more.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # a new event loop: drop the state of the old one
            self._loop = loop
            self._forget()
            if loop.get_task_factory() is None:
                loop.set_task_factory(_make_task)
        run = _Awaited(loop, attempt, control, execution, late)
        self._waiting.add(run)
        if seconds is not None:
            self._stop_at(run, loop, loop.time() + seconds)
        cancelled = False
        try:
            await run.answered
        except asyncio.CancelledError:
            cancelled = True
            run.task.cancel()
            await asyncio.wait({run.task})
        finally:
            self._waiting.discard(run)
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
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nothing runs in it
                self._loop.call_soon_threadsafe(self._cancel, task_id)

    def _cancel(self, task_id: str) -> None:
        for run in [run for run in (*self._waiting, *self._stuck) if run.execution.task_id == task_id]:
            if run.control.stop is None or run.stuck:
                run.control.stop = Stop.CANCELLED
                if run.control.withdraw():
                    run.task.cancel()

    # --- Deadlines ---

    def _stop_at(self, run: _Awaited, loop: asyncio.AbstractEventLoop, when: float) -> None:
        run.deadline = when
        if when < self._fires:
            if self._timer is not None:
                self._timer.cancel()
            self._fires = when
            self._timer = loop.call_at(when, self._fire, loop)

    def _fire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer, self._fires = None, math.inf
        now = loop.time()
        for run in [run for run in self._waiting if run.deadline <= now]:
            run.deadline = math.inf
            if run.stopped:
                self._answer_without(run)
            else:
                self._stop(run, loop, Stop.DEADLINE)
        first = min((run.deadline for run in self._waiting), default=math.inf)
        if first < self._fires:
            self._fires = first
            self._timer = loop.call_at(first, self._fire, loop)

    def _stop(self, run: _Awaited, loop: asyncio.AbstractEventLoop, why: Stop) -> None:
        """Stop a run: cancel its coroutine, and answer without it if that does not end it."""
        if run.control.stop is None:
            run.control.stop = why
        if run.control.withdraw():
            run.stopped = True
            run.task.cancel()
            self._stop_at(run, loop, loop.time() + GRACE)
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
        for task in run.control.spawned:
            task.add_done_callback(lambda _: self._spawned_ended(run))
        self._warn()

    def _spawned_ended(self, run: _Awaited) -> None:
        if all(task.done() for task in run.control.spawned):
            self._stuck.discard(run)

    def _warn(self) -> None:
        if self.stuck >= self.limit and not self._warned:
            self._warned = True
            _log.error(
                "%d tasks go on past their deadlines in this process; restart it (`safedefer run` does so by itself)",
                self.stuck,
            )

    def _returned_late(self, run: _Awaited, *, replaced: bool) -> None:
        self._stuck.discard(run)
        if replaced:
            self._threads.remove_one()
        if run.outcome is not None:  # it was not cancelled with the event loop
            ending = run.task.get_loop().create_task(_await(run.late(run.outcome)))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)


class _Awaited:
    """A run under way. ``execute`` has an asyncio task of its own, which the request need not outlast."""

    __slots__ = ("answered", "control", "deadline", "execution", "late", "outcome", "stopped", "stuck", "task")

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
