"""The runs under way in a handler, each with its deadline: what stops them, and what becomes of those that go on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from safedefer.concurrency.threads import Threads
from safedefer.execution.deadline import GRACE, RunControl, Stop
from safedefer.execution.run import CoroutineCancelled, Outcome

_log: Final = logging.getLogger("safedefer")

Late = Callable[[Outcome], Awaitable[None]]
"""Called when a run returns after its request was answered."""


class Runs:
    """Awaits runs up to their deadlines.

    A run that cannot be stopped is *stuck*: it goes on without its request, and another thread takes the place of its.

    Args:
        threads: The threads that runs are in.
        limit: The number of stuck runs at which this process should be replaced, which is logged once.
    """

    def __init__(self, threads: Threads, *, limit: int) -> None:
        self.limit = limit
        self._threads = threads
        self._stuck: set[_Run] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._warned = False

    @property
    def stuck(self) -> int:
        """The number of runs that go on past their deadlines."""
        return len(self._stuck)

    async def run(
        self, attempt: Coroutine[Any, Any, Outcome], control: RunControl, *, seconds: float | None, late: Late
    ) -> Outcome | None:
        """Return the outcome of a run; None if it passed its deadline and goes on.

        Args:
            attempt: The run: ``execute(...)``.
            control: Its control.
            seconds: Its deadline; None is none.
            late: Awaited with the outcome of a run that goes on, when it returns.

        Raises:
            asyncio.CancelledError: The caller was cancelled; ``CoroutineCancelled`` if nothing of the task runs any more.
        """
        loop = asyncio.get_running_loop()
        run = _Run(loop, attempt, control, late)
        if seconds is not None:
            run.timer = loop.call_later(seconds, self._stop, run, Stop.DEADLINE)
        run.task.add_done_callback(lambda _: self._ended(run))
        try:
            await run.answered
        except asyncio.CancelledError:
            run.task.cancel()
            await asyncio.wait({run.task})
            if run.task.cancelled():
                raise
        finally:
            if run.timer is not None:
                run.timer.cancel()
        if run.stuck:  # also if it has returned since
            return None
        outcome = run.task.result()
        if outcome is None:
            raise CoroutineCancelled
        return outcome

    def _stop(self, run: _Run, why: Stop) -> None:
        """Stop a run: cancel its coroutine, and answer without it if that does not end it."""
        if run.task.done():
            return
        if run.control.stop is None:
            run.control.stop = why
        if not run.control.withdraw():
            self._answer_without(run)
            return
        run.timer = run.task.get_loop().call_later(GRACE, self._answer_without, run)
        run.task.cancel()

    def _answer_without(self, run: _Run) -> None:
        if run.task.done() or run.answered.done():
            return
        run.stuck = True
        self._stuck.add(run)
        if run.control.in_thread:
            run.replaced = True
            self._threads.add_one()
        run.answered.set_result(None)
        if self.stuck >= self.limit and not self._warned:
            self._warned = True
            _log.error(
                "%d tasks go on past their deadlines in this process; restart it (`safedefer run` does so by itself)",
                self.stuck,
            )

    def _ended(self, run: _Run) -> None:
        if run.replaced:
            self._threads.remove_one()
        if not run.stuck:
            if not run.answered.done():
                run.answered.set_result(None)
            return
        self._stuck.discard(run)
        outcome = None if run.task.cancelled() else run.task.result()
        if outcome is not None:
            ending = run.task.get_loop().create_task(_await(run.late(outcome)))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)


class _Run:
    """A run under way. ``execute`` has an asyncio task of its own, which the request need not outlast."""

    __slots__ = ("answered", "control", "late", "replaced", "stuck", "task", "timer")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        attempt: Coroutine[Any, Any, Outcome],
        control: RunControl,
        late: Late,
    ) -> None:
        self.task = loop.create_task(_outcome_of(attempt))
        self.control = control
        self.late = late
        self.answered: asyncio.Future[None] = loop.create_future()
        self.timer: asyncio.TimerHandle | None = None
        self.stuck = False
        """Whether its request was answered without it."""
        self.replaced = False
        """Whether another thread took the place of its."""


async def _outcome_of(attempt: Coroutine[Any, Any, Outcome]) -> Outcome | None:
    # A cancelled asyncio task does not keep the class of its cancellation: None says that the coroutine has ended.
    try:
        return await attempt
    except CoroutineCancelled:
        return None


async def _await(ending: Awaitable[None]) -> None:
    await ending
