"""Batches: gather calls to storage and make them together, in one transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

from safedefer.concurrency.per_loop import PerLoop
from safedefer.errors import QueueUnavailable

_T = TypeVar("_T")
_R = TypeVar("_R")

#: The most items in one call. It bounds the time that the first item waits for the last.
_MOST: Final = 256
#: Patient items wait for others until this many are there, or until so many seconds after the last call began.
_ENOUGH: Final = 32
_PATIENCE: Final = 0.005


class Batches(Generic[_T, _R]):
    """Gathers items, and makes one call at a time with all that are pending in an event loop.

    Args:
        call: Takes a list of items, and whether one of their callers was cancelled meanwhile. Returns a future of one
            result for each item, or of an error for all.
        orphaned: Called with each item whose call failed and whose caller was cancelled meanwhile, and the error.
        unclaimed: Called with each item whose caller was cancelled meanwhile, and its result.
    """

    def __init__(
        self,
        call: Callable[[list[_T], bool], asyncio.Future[Sequence[_R]]],
        *,
        orphaned: Callable[[_T, BaseException], None] | None = None,
        unclaimed: Callable[[_T, _R], None] | None = None,
    ) -> None:
        self._call = call
        self._orphaned = orphaned
        self._unclaimed = unclaimed
        self._gathered: PerLoop[_Gathered[_T, _R]] = PerLoop(_Gathered)

    def __call__(self, item: _T, *, patient: bool = False) -> asyncio.Future[_R]:
        """Return a future of the result for ``item``, or of its call's error. Cancelling it leaves the item in.

        ``patient``: nothing waits for the result, and where calls follow each other the item may wait some milliseconds
        for others. One that comes alone does not wait.
        """
        gathered = self._gathered.here()
        future: asyncio.Future[_R] = gathered.loop.create_future()
        gathered.pending.append((item, future))
        gathered.patient = patient and gathered.patient
        if not gathered.under_way:
            gathered.under_way = True
            # At the end of this turn of the loop: the items that it adds go into the same call.
            gathered.loop.call_soon(self._start, gathered)
        elif not gathered.may_wait:
            self._hurry(gathered)
        return future

    def hurry(self) -> None:
        """Let no item wait for others any more in the running event loop: a caller was cancelled, and the loop may be closed."""
        gathered = self._gathered.here()
        gathered.patient = False
        self._hurry(gathered)

    def _hurry(self, gathered: _Gathered[_T, _R]) -> None:
        timer, gathered.timer = gathered.timer, None
        if (
            timer is not None
        ):  # else a call is under way, or begins in the next turn: whoever comes then puts it off no more
            timer.cancel()
            gathered.loop.call_soon(self._start, gathered)

    def _start(self, gathered: _Gathered[_T, _R]) -> None:
        gathered.timer = None
        if not gathered.pending:
            gathered.under_way = False
            return
        now = gathered.loop.time()
        if gathered.may_wait and now < gathered.began + _PATIENCE:
            gathered.timer = gathered.loop.call_at(gathered.began + _PATIENCE, self._start, gathered)
            return
        batch, gathered.pending = gathered.pending[:_MOST], gathered.pending[_MOST:]
        gathered.patient, gathered.began = True, now
        try:
            running = self._call([item for item, _ in batch], any(future.done() for _, future in batch))
        except Exception as error:  # noqa: BLE001  # the threads are closed, for example; all callers get the error
            gathered.under_way = False
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        gathered.running = running
        running.add_done_callback(lambda done: self._end(gathered, batch, done))

    def _end(
        self,
        gathered: _Gathered[_T, _R],
        batch: list[tuple[_T, asyncio.Future[_R]]],
        done: asyncio.Future[Sequence[_R]],
    ) -> None:
        # A cancellation concerns the caller that was cancelled. For the others the storage did not answer.
        failure = (
            QueueUnavailable("the event loop is being closed; try again") if done.cancelled() else done.exception()
        )
        results = done.result() if failure is None else ()
        for number, (item, future) in enumerate(batch):
            if future.done():  # its caller was cancelled
                if failure is None and self._unclaimed is not None:
                    self._unclaimed(item, results[number])
                elif failure is not None and self._orphaned is not None and not done.cancelled():
                    self._orphaned(item, failure)
            elif failure is None:
                future.set_result(results[number])
            else:
                future.set_exception(failure)
        self._start(gathered)


class _Gathered(Generic[_T, _R]):
    """What one event loop has gathered."""

    __slots__ = ("began", "loop", "patient", "pending", "running", "timer", "under_way")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.pending: list[tuple[_T, asyncio.Future[_R]]] = []
        self.patient = True
        """Whether all that is pending is."""
        self.under_way = False
        self.began = float("-inf")
        """When the last call began, in the loop's time."""
        self.timer: asyncio.TimerHandle | None = None
        """What begins the next call, while its items wait for others."""
        self.running: asyncio.Future[Sequence[_R]] | None = None
        """The call under way, which else nothing may refer to."""

    @property
    def may_wait(self) -> bool:
        """Whether the pending items may wait for others."""
        return self.patient and len(self.pending) < _ENOUGH
