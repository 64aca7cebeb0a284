"""One attempt: deliver a leased task to its handler, turn the answer into a settlement, and ask a busy handler again."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from safedefer.concurrency.threads import InThread
from safedefer.dispatcher.holds import TargetHolds
from safedefer.dispatcher.reports import Reports, name_of
from safedefer.dispatcher.request_headers import delivery_headers
from safedefer.dispatcher.retry_policy import judge_answer, wait_asked_for
from safedefer.dispatcher.shares import TargetShares
from safedefer.dispatcher.signed_route import StorageMismatch
from safedefer.dispatcher.transport import Deliver, Interrupted, Unreachable
from safedefer.dispatcher.unreachable import UnreachableTargets
from safedefer.errors import QueueError, RejectedTask
from safedefer.headers import OUTCOME_HEADER, Answer, read_answer
from safedefer.queues.base import Lease, QueuedTask, Settlement, Throttle, Verdict
from safedefer.queues.rules import UNREADABLE, judge_failure, judge_rejection, park, with_queues_options

_log: Final = logging.getLogger("safedefer.dispatcher")

#: Seconds of the first hold of a queue whose handler is at capacity; each such answer in a row doubles them.
_BUSY_SECONDS: Final = 0.02
#: Seconds until a task is tried again whose stored token could not be read.
_STORAGE_SECONDS: Final = 1.0
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
        if not lease.task.token:
            _log.error("task %a is buried: its token is empty, or larger than any of ours", lease.task.id)
            return park(lease, UNREADABLE, now=self._clock())
        try:
            if self.targets:
                settlement = self.targets.postpone(self._deliver.address(lease.task), now=self._clock())
                if settlement is not None:
                    return settlement
            if self._holds and (settlement := self._postpone_held(lease.task)) is not None:
                return settlement
            return await self._attempt(lease, jitter, ran)
        except StorageMismatch as error:
            _log.error(
                "task %a is parked: the %s that is stored is not what was signed; look who writes the storage, and run "
                "the task as it was signed with `safedefer tasks retry`",
                lease.task.id,
                error,
            )
            return park(lease, "storage-mismatch", now=self._clock())
        except RejectedTask as error:
            # As the handler would answer it: another process may have the key, or read such claims.
            outcome = "rejected" if error.authentic else "refused"
            own = self._with_options(lease, None)
            return judge_rejection(own, None, outcome, now=self._clock(), jitter=jitter, reason=error.slug)
        except QueueError as error:
            _log.error("the stored token of task %a cannot be read (%s); trying again", lease.task.id, error.slug)
            at = self._clock() + _STORAGE_SECONDS * (1 + jitter)
            return Settlement(verdict=Verdict.RETRY, at=at, charged=False, reason="busy")
        except Exception as error:  # noqa: BLE001  # see below
            # An attacker may have written the row into the storage. It counts as refused; other tasks go on.
            _log.error("task %a cannot be delivered (%s); look at what is stored of it", lease.task.id, name_of(error))
            return judge_rejection(self._with_options(lease, None), None, "refused", now=self._clock(), jitter=jitter)

    def _with_options(self, lease: Lease, signed: Mapping[str, float] | None) -> Lease:
        """Return a lease whose task has the retry options that count: those that were signed, else those that are stored.

        What it has not is its queue's.
        """
        if signed is not None:
            lease = lease._replace(task=lease.task._replace(retry_options=signed))
        queues_own = self._retry_options.get(lease.task.queue)
        return with_queues_options(lease, queues_own) if queues_own else lease

    def _postpone_held(self, task: QueuedTask) -> Settlement | None:
        return self._holds.postpone(task.queue, self._deliver.address(task), now=self._clock())

    async def _attempt(self, lease: Lease, jitter: float, ran: Callable[[], None] | None) -> Settlement:
        task, targets = lease.task, self.targets
        headers = delivery_headers(lease)
        headers.ran = ran
        probed = targets.probe(self._deliver.address(task)) if targets else None
        try:
            response = await self._deliver(task, headers)
        except Unreachable as error:
            if not targets.knows(error.address):
                self._reports.down(error.address, error)
            return targets.failed(error, now=self._clock(), jitter=jitter)
        except Interrupted:
            self._reached(task)
            own = self._with_options(lease, headers.retry)
            return judge_failure(own, None, now=self._clock(), jitter=jitter)
        finally:
            if probed is not None:
                probed.probing = False
        self._reached(task)
        if self._deliver.several:
            self.shares.answered(self._deliver.address(task))
        answer = read_answer(response)
        own = self._with_options(lease, headers.retry)
        settlement = judge_answer(own, answer, now=self._clock(), jitter=jitter)
        if self._busy or answer.status in _WAITING:
            await self._slow(task, answer)
        if answer.outcome is None and settlement.verdict is Verdict.DONE:
            self._warn(task, answer)
        return settlement

    def _reached(self, task: QueuedTask) -> None:
        if self.targets:
            address = self._deliver.address(task)
            self._reports.up(address, self.targets.reached(address), now=self._clock())

    def _warn(self, task: QueuedTask, answer: Answer) -> None:
        _log.warning(
            "%s answered %d without %s, which counts as done; if it is no handler, correct the address",
            self._deliver.address(task),
            answer.status,
            OUTCOME_HEADER,
        )

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
