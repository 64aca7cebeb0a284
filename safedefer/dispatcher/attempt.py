"""The courier: takes one leased task to its handler, and says what becomes of it."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from safedefer.concurrency.threads import InThread
from safedefer.dispatcher.leases import name_of
from safedefer.dispatcher.request_headers import delivery_headers
from safedefer.dispatcher.retry_policy import judge_answer, wait_asked_for
from safedefer.dispatcher.transport import Deliver, Interrupted, Unreachable
from safedefer.dispatcher.unreachable import Places
from safedefer.errors import QueueError
from safedefer.headers import OUTCOME_HEADER, Answer, read_answer
from safedefer.queues.base import Lease, PullQueue, QueuedTask, Settlement, Verdict
from safedefer.queues.rules import judge_failure, judge_rejection

_log: Final = logging.getLogger("safedefer.dispatcher")

#: The first hold of a queue whose handler is at capacity; it doubles with each such answer in a row.
_BUSY_SECONDS: Final = 0.02
#: With these a handler may ask for a pause.
_WAITING: Final = frozenset({429, 503})


class Courier:
    """Delivers tasks, and remembers who was not there and who asked to wait.

    Args:
        queue: Where queues are held, and where a handler's records are.
        deliver: How a task gets to a handler.
        in_thread: How the queue is called.
        clock: Seconds since the epoch.
        rng: Where jitter comes from.
    """

    def __init__(
        self,
        queue: PullQueue,
        deliver: Deliver,
        in_thread: InThread,
        *,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._queue = queue
        self._deliver = deliver
        self._in_thread = in_thread
        self._clock = clock
        self._random = rng
        self._busy: dict[str, int] = {}
        """Answers in a row that asked a queue to wait."""
        self.places = Places()

    async def settlement(self, lease: Lease) -> Settlement:
        """Deliver a task. Raises nothing but the cancellation of the caller."""
        jitter = self._random.random()
        try:
            places = self.places
            if places and (settlement := places.put_off(self._place(lease.task), now=self._clock())) is not None:
                return settlement
            return await self._attempt(lease, jitter)
        except Exception as error:  # noqa: BLE001  # see below
            # A row that somebody wrote into the storage, say: it counts as refused, and its neighbours go on.
            _log.error("task %a cannot be delivered (%s); look at what is stored of it", lease.task.id, name_of(error))
            return judge_rejection(lease, None, "refused", now=self._clock(), jitter=jitter)

    async def _attempt(self, lease: Lease, jitter: float) -> Settlement:
        task, places = lease.task, self.places
        down = places.probe(self._place(task)) if places else None
        try:
            response = await self._deliver(task, delivery_headers(lease))
        except Unreachable as error:
            return places.missed(error, now=self._clock(), jitter=jitter)
        except Interrupted:
            places.found(self._place(task))
            return judge_failure(lease, None, now=self._clock(), jitter=jitter)
        finally:
            if down is not None:
                down.probing = False
        if places:
            places.found(self._place(task))
        answer = read_answer(response)
        settlement = judge_answer(lease, answer, now=self._clock(), jitter=jitter)
        if self._busy or answer.status in _WAITING:
            await self._slow(task.queue, answer)
        if settlement.verdict is Verdict.DONE:
            if answer.outcome is None:
                self._warn(task, answer)
        elif settlement.verdict is Verdict.DEAD and settlement.reason in {None, "rejected"}:
            return replace(settlement, reason=await self._recorded_reason(task.id) or settlement.reason)
        return settlement

    def _warn(self, task: QueuedTask, answer: Answer) -> None:
        _log.warning(
            "%s answered %d without %s, which counts as done; if it is no handler, correct the address",
            self._place(task),
            answer.status,
            OUTCOME_HEADER,
        )

    async def _slow(self, queue: str, answer: Answer) -> None:
        """Hold a queue whose handler asks for it; our own at capacity, at first for a moment only."""
        seconds = wait_asked_for(answer)
        if seconds is None:
            if self._busy:
                self._busy.pop(queue, None)
            return
        times = self._busy[queue] = self._busy.get(queue, 0) + 1
        if answer.outcome == "busy":
            seconds = min(seconds, _BUSY_SECONDS * 2 ** min(times, 10))
        now = self._clock()
        try:
            await self._in_thread(partial(self._queue.hold, queue, until=now + seconds, now=now))
        except QueueError as error:
            _log.error("the queue %a cannot be held (%s)", queue, name_of(error))

    async def _recorded_reason(self, task_id: str) -> str | None:
        """Return what the handler wrote down of the attempt before it answered."""
        try:
            view = await self._in_thread(partial(self._queue.find, task_id))
        except QueueError as error:
            _log.error("why the task %a failed cannot be looked up (%s)", task_id, name_of(error))
            return None
        return view.records[-1].reason if view is not None and view.records else None

    def _place(self, task: QueuedTask) -> str:
        place: Callable[[QueuedTask], str] | None = getattr(self._deliver, "place", None)
        return "" if place is None else place(task)
