"""One attempt: deliver a leased task to its handler, and ask a busy handler again. ``retry_policy`` judges what came of it."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, TypeAlias

from safedefer.concurrency.threads import InThread
from safedefer.dispatcher.holds import TargetHolds
from safedefer.dispatcher.reports import Reports, name_of
from safedefer.dispatcher.request_headers import delivery_headers
from safedefer.dispatcher.retry_policy import UnreadableToken, judge_attempt, wait_asked_for
from safedefer.dispatcher.shares import TargetShares
from safedefer.dispatcher.signed_route import StorageMismatch
from safedefer.dispatcher.transport import Deliver, Interrupted, Unreachable
from safedefer.dispatcher.unreachable import UnreachableTargets
from safedefer.errors import QueueError, RejectedTask
from safedefer.headers import OUTCOME_HEADER, Answer, AttemptHeaders, read_answer
from safedefer.queues.base import Lease, QueuedTask, Settlement, Throttle

#: What came of an attempt: an answer, why there is none, or what becomes of a task that no handler was asked for.
Found: TypeAlias = Answer | Settlement | Exception

_log: Final = logging.getLogger("safedefer.dispatcher")

#: Seconds of the first hold of a queue whose handler is at capacity; each such answer in a row doubles them.
_BUSY_SECONDS: Final = 0.02
#: The statuses with which a handler may ask for a pause.
_WAITING: Final = frozenset({429, 503})


class AttemptRunner:
    """Delivers tasks; remembers the targets that were unreachable, hang, or asked for a pause.

    Args:
        queue: Holds queues on request of their handlers.
        deliver: The transport.
        in_thread: Calls the queue in a thread.
        clock: Returns seconds since the epoch.
        rng: The source of jitter.
        slots: The most deliveries at once.
        retry_options: Those of queues, for what a task has no option of its own.
        reports: Tells of handlers that are down.
    """

    def __init__(
        self,
        queue: Throttle,
        deliver: Deliver,
        in_thread: InThread,
        *,
        clock: Callable[[], float],
        rng: random.Random,
        slots: int,
        retry_options: Mapping[str, Mapping[str, float]],
        reports: Reports,
    ) -> None:
        self._reports = reports
        self._queue = queue
        self._deliver = deliver
        self._in_thread = in_thread
        self._clock = clock
        self._random = rng
        self._retry_options = retry_options
        self._busy: dict[tuple[str, str], int] = {}
        """Queues and addresses, with the number of answers in a row that asked for a pause."""
        self._holds = TargetHolds()
        self.targets: UnreachableTargets = UnreachableTargets()
        self.shares: TargetShares = TargetShares(slots)

    async def run(self, lease: Lease, ran: Callable[[], None] | None = None) -> Settlement:
        """Deliver a task and return its settlement. Raises only the cancellation of the caller.

        Args:
            lease: The task.
            ran: Called when its code has ended and its end is still to be stored, by a handler in this process.
        """
        jitter = self._random.random()
        found, signed = await self._attempt(lease, ran, jitter)
        if isinstance(found, Settlement):
            return found
        try:
            return self._judge(lease, found, signed, jitter)
        except Exception as error:  # noqa: BLE001  # the answer is none of a handler, and says nothing of other tasks
            return self._judge(lease, error, None, jitter)

    def _judge(
        self, lease: Lease, found: Answer | Exception, signed: Mapping[str, float] | None, jitter: float
    ) -> Settlement:
        if not isinstance(found, Answer) or (found.outcome is None and 200 <= found.status <= 299):  # noqa: PLR2004
            self._log(lease.task, found)
        return judge_attempt(lease, found, signed, self._retry_options, now=self._clock(), jitter=jitter)

    async def _attempt(
        self, lease: Lease, ran: Callable[[], None] | None, jitter: float
    ) -> tuple[Found, Mapping[str, float] | None]:
        """Return what came of one attempt, and the retry options that were signed with the task."""
        task = lease.task
        try:
            if not task.token:
                return UnreadableToken(), None
            if (self.targets or self._holds) and (put_off := self._put_off(task)) is not None:
                return put_off, None
            headers = delivery_headers(lease)
            headers.ran = ran
            return await self._ask(task, headers, jitter), headers.retry
        except Exception as error:  # noqa: BLE001  # an attacker may have written the row into the storage; other tasks go on
            return error, None

    def _put_off(self, task: QueuedTask) -> Settlement | None:
        """Return the settlement of a task whose target is not to be asked now."""
        address, now = self._deliver.address(task), self._clock()
        return self.targets.postpone(address, now=now) or self._holds.postpone(task.queue, address, now=now)

    async def _ask(self, task: QueuedTask, headers: AttemptHeaders, jitter: float) -> Found:
        targets = self.targets
        probed = targets.probe(self._deliver.address(task)) if targets else None
        try:
            response = await self._deliver(task, headers)
        except Unreachable as error:
            if not targets.knows(error.address):
                self._reports.down(error.address, error)
            return targets.failed(error, now=self._clock(), jitter=jitter)
        except Interrupted as error:
            self._reached(task)
            return error
        finally:
            if probed is not None:
                probed.probing = False
        self._reached(task)
        if self._deliver.several:
            self.shares.answered(self._deliver.address(task))
        answer = read_answer(response)
        if self._busy or answer.status in _WAITING:
            await self._slow(task, answer)
        return answer

    def _log(self, task: QueuedTask, why: Answer | Exception) -> None:
        """Say why a task could not be delivered, where no handler said it, or that something else answered."""
        if isinstance(why, Answer):
            _log.warning(
                "%s answered %d without %s, which counts as done; if it is no handler, correct the address",
                self._deliver.address(task),
                why.status,
                OUTCOME_HEADER,
            )
        elif isinstance(why, UnreadableToken):
            _log.error("task %a is buried: its token is empty, or larger than any of ours", task.id)
        elif isinstance(why, StorageMismatch):
            _log.error(
                "task %a is parked: the %s that is stored is not what was signed; look who writes the storage, and run "
                "the task as it was signed with `safedefer tasks retry`",
                task.id,
                why,
            )
        elif isinstance(why, QueueError):
            _log.error("the stored token of task %a cannot be read (%s); trying again", task.id, why.slug)
        elif not isinstance(why, Interrupted | RejectedTask):
            _log.error("task %a cannot be delivered (%s); look at what is stored of it", task.id, name_of(why))

    def _reached(self, task: QueuedTask) -> None:
        if self.targets:
            address = self._deliver.address(task)
            self._reports.up(address, self.targets.reached(address), now=self._clock())

    async def _slow(self, task: QueuedTask, answer: Answer) -> None:
        """Hold a queue if its handler asks for it, or of a queue of several handlers what goes to this one.

        Our own handler at capacity is asked again soon at first.
        """
        queue, address = task.queue, self._deliver.address(task)
        now = self._clock()
        seconds = wait_asked_for(answer, now=now)
        if seconds is None:
            if self._busy:
                self._busy.pop((queue, address), None)
            return
        times = self._busy[queue, address] = self._busy.get((queue, address), 0) + 1
        if answer.outcome == "busy":
            seconds = min(seconds, _BUSY_SECONDS * 2 ** min(times, 10))
        if self._deliver.several:
            self._holds.hold(queue, address, until=now + seconds, now=now)
            return
        try:
            await self._in_thread(partial(self._queue.hold, queue, until=now + seconds, now=now))
        except QueueError as error:
            _log.error("the queue %a cannot be held (%s)", queue, name_of(error))
