"""The handler under a push engine: what a dispatcher does for a pull queue, it does itself.

It counts attempts, rejections and lost runs in the store, judges every delivery by ``safedefer.queues.rules``, buries what is
given up, and keeps the time of a retry. The engine hears one of two things: 2xx, and forgets the task; or not 2xx, and
delivers it again.

The order is the one in which a crash loses nothing:

- A dead letter is stored before the ledger says that the task failed. A crash in between runs the task again; if that succeeds,
  the ledger refuses a re-run of the letter.
- The counters and the time of the retry are stored before the ledger lets another run begin.

Of a token that no key of ours signed, nothing is believed, and its id least of all: it is buried only on the word of an
engine that proved to have sent it, never in the place of another letter, and without a word to the ledger.
"""

from __future__ import annotations

import contextlib
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import Any, Final

from safedefer.claims import MAX_LIFETIME, callable_name, split_audience
from safedefer.delivery.begin import PushedBegin, PushedRun
from safedefer.delivery.handler import RETRY_NOT_DUE, UNAUTHENTIC_REASONS, Delivery
from safedefer.delivery.request import HandlerRequest
from safedefer.errors import NotYetValid, RejectedTask, ReplayedTask, TaskAlreadyExistsError, TombstonedTaskError
from safedefer.events import TaskDead, TaskRetried, notify
from safedefer.execution.run import Outcome, Result
from safedefer.headers import Response
from safedefer.ledger import Admission, AttemptRecord, EndState, Execution
from safedefer.queues.base import BLOB_KEY, QueuedTask, Settlement, TaskState, Verdict
from safedefer.queues.poison_log import log_burial
from safedefer.queues.progress import NO_PROGRESS, Progress, engine_gives_up, lost_record
from safedefer.queues.push import PushQueue
from safedefer.queues.pushed import progress_key
from safedefer.queues.rules import LEDGER_LEEWAY, OUTLASTED, DeliveryResult, judge
from safedefer.task import VerifiedTask

#: The reason of a request whose sender did not prove to be the engine.
NOT_FROM_ENGINE: Final = "not-from-the-engine"
#: The reason of a task that the engine would delete before it is tried again.
RETENTION: Final = "engine-retention"
#: Seconds before the engine deletes a task in which it is buried: longer than the engine ever waits with a retry.
_LAST_SECONDS: Final = 86_400.0
_OUTCOMES: Final = {Result.FAILED: "failed", Result.REJECTED: "rejected", Result.RETRY: "retry"}
_OK: Final = 200
#: Seconds after its expiry for which the ledger is sure to know a task, whatever the clocks of those that prune it.
_LEDGER_KNOWS: Final = LEDGER_LEEWAY - 600
_TRACE_HEADER: Final = "traceparent"
_ID: Final = re.compile("[A-Za-z0-9_-]{16,64}")
#: The reasons of a burial that say less than the error of the last attempt.
_VAGUE: Final = frozenset({None, "rejected", "refused"})


class PushedDelivery(Delivery):
    """A handler that a push engine posts to.

    Args:
        queue: The engine and its store.
        retry_options: Those of queues, for what a task has no option of its own.
        rng: The source of jitter.
        parts: As ``Delivery``.
    """

    def __init__(
        self,
        *,
        queue: Callable[[], PushQueue],
        retry_options: Mapping[str, Mapping[str, float]],
        rng: random.Random | None = None,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        self._queue = queue
        self._retry_options = retry_options
        self._rng = rng or random.Random()  # noqa: S311  # jitter is no secret
        client = self._ledger_client
        self._begin = PushedBegin(
            queue, self._storage, clock=self._clock, seconds=self._options.lease_seconds, give_back=client.give_back
        )

    # --- Before the run ---

    async def _admit(self, request: HandlerRequest, execution: Execution) -> Response | None:
        request.pushed = True
        found = await self._begin(PushedRun(execution, request.headers))
        request.progress = found.progress
        request.retries, request.attempt = found.progress.counters.retries, found.progress.counters.attempts + 1
        if found.admission is None:
            return self._refuse(403, NOT_FROM_ENGINE)
        if found.admission is Admission.CONFLICT:
            return await self._refused(request, ReplayedTask("the id is known with another token; defer the task anew"))
        if found.admission is not Admission.RUN:
            return self._not_admitted(request, found.admission)
        if found.cancelled:
            await self._finish(request, execution, Outcome(result=Result.CANCELLED, reason="cancelled"), 200)
            await self._forget(request, execution)
            return self._answer(request, 200, "cancelled", None)
        return await self._admit_counted(request, execution, lost=found.lost)

    async def _admit_counted(self, request: HandlerRequest, execution: Execution, *, lost: bool) -> Response | None:
        """Count a run that was lost, and give up or put off by what is counted."""
        now = self._clock()
        if request.progress.not_before > now:  # another run has failed since this request was looked at
            record = request.record("rejected", None, RETRY_NOT_DUE, None, ended=now)
            await self._ledger_client.finish((execution, EndState.RETRY, record))
            return self._early(request, RETRY_NOT_DUE, 1)
        task = self._task(request)
        reason = request.progress.given_up(task, self._retry_options.get(task.queue), now=now)
        if lost:
            request.progress, delivery = request.progress.after_loss(execution.audience, execution.task_id, now=now)
            await self._storage(partial(self._store_loss, execution, request.progress, lost_record(delivery)))
            if delivery.is_poison(now):
                reason = delivery.end_reason(now)
                log_burial(execution.task_id, str(reason), delivery)
        if reason is None:
            return None
        record = request.record("retry", None, reason, None, ended=now)
        return await self._bury(request, execution, record, reason, request.progress.counters.attempts)

    def _store_loss(self, execution: Execution, progress: Progress, records: Sequence[AttemptRecord]) -> None:
        self._keep_progress(execution, progress)
        if records:
            self._queue().ledger.record_many(records)

    def _keep_progress(self, execution: Execution, progress: Progress) -> None:
        key = progress_key(execution.audience, execution.task_id)
        self._queue().keep.put(key, progress.dump(), expires=execution.expires)

    # --- The end of the run ---

    async def _end_run(
        self, request: HandlerRequest, execution: Execution, outcome: Outcome, status: int
    ) -> Response | None:
        if outcome.result in {Result.SUCCEEDED, Result.CANCELLED}:
            await self._finish(request, execution, outcome, status)
            await self._forget(request, execution)
            return None
        _, state, record = self._end_of(request, execution, outcome, status)
        if outcome.reason in UNAUTHENTIC_REASONS:
            answer = await self._judge(request, execution, state, record, "refused", 403, outcome.error)
            return self._refuse(403, str(outcome.reason)) if answer.status != _OK else answer
        return await self._judge(request, execution, state, record, _OUTCOMES[outcome.result], status, outcome.error)

    async def _judge(
        self,
        request: HandlerRequest,
        execution: Execution,
        state: EndState,
        record: AttemptRecord,
        outcome: str,
        status: int,
        error: BaseException | None,
    ) -> Response:
        """Store what becomes of a delivery that did not end the task well, and return the answer."""
        now = self._clock()
        lease = request.progress.lease(self._task(request))
        settlement = judge(
            lease,
            DeliveryResult(status, outcome),
            queues_own=self._retry_options.get(lease.task.queue),
            now=now,
            jitter=self._rng.random(),
        )
        if settlement.verdict is not Verdict.RETRY or state is EndState.FAILED:
            reason = record.reason if settlement.reason in _VAGUE else settlement.reason
            attempts = lease.attempts + settlement.charged
            return await self._bury(request, execution, record, reason, attempts, error=error)
        if self._is_last(request, lease.task, now if settlement.at is None else settlement.at):
            return await self._bury(
                request, execution, record, RETENTION, lease.attempts + settlement.charged, error=error
            )
        progress = request.progress.after(settlement, started=request.started, now=now)
        # Before the ledger lets another run begin: it must find the time of the retry.
        await self._storage(partial(self._keep_progress, execution, progress))
        await self._ledger_client.finish((execution, state, record))
        self._tell_retry(lease.task, settlement, progress, now)
        seconds = 0.0 if settlement.at is None else settlement.at - now
        longest = self._queue().engine.capabilities.longest_wait
        if longest is not None and seconds > longest:
            waiting = lease.task._replace(token=request.body, eta=now + seconds, retry_options={})
            await self._storage(partial(self._put_into_store, waiting))
            return self._answer(request, 202, outcome, record.reason, error=error)
        wait = {"Retry-After": str(max(1, math.ceil(seconds)))}
        return self._answer(request, status, outcome, record.reason, wait, error=error)

    def _is_last(self, request: HandlerRequest, task: QueuedTask, at: float) -> bool:
        """Whether the engine may have deleted a task before a retry at that time is delivered.

        The engine had it after it was signed: no header makes that earlier.
        """
        engine = self._queue().engine
        kept = engine.capabilities.kept
        if kept is None:
            return False
        sent = engine.attempt(request.headers).sent
        return at + _LAST_SECONDS > max(task.created, sent or 0.0) + kept

    def _put_into_store(self, task: QueuedTask) -> None:
        """Let a task wait in the store for its retry: the engine would not hold it for so long, and forgets it now."""
        # If the store has it already, another message of the same task failed at the same time.
        with contextlib.suppress(TaskAlreadyExistsError, TombstonedTaskError):
            self._queue().store.enqueue_many((task,))

    def _tell_retry(self, task: QueuedTask, settlement: Settlement, progress: Progress, now: float) -> None:
        seconds = max(0.0, (now if settlement.at is None else settlement.at) - now)
        event = TaskRetried(
            task_id=task.id,
            queue=task.queue,
            callable=task.callable_name,
            reason=settlement.reason,
            status=settlement.status,
            attempts=progress.counters.attempts,
            seconds=seconds,
        )
        notify(self._observer, event)

    async def _bury(
        self,
        request: HandlerRequest,
        execution: Execution,
        record: AttemptRecord,
        reason: str | None,
        attempts: int,
        *,
        error: BaseException | None = None,
    ) -> Response:
        """Make a dead letter, let the ledger say that the task failed, and answer 200: the engine forgets it."""
        task, now = self._task(request), self._clock()
        bury = partial(self._queue().bury, task, reason=reason, attempts=attempts, now=now, verified=True)
        await self._storage(bury)
        await self._ledger_client.finish((execution, EndState.FAILED, record))
        await self._forget(request, execution)
        dead = TaskDead(
            task_id=task.id, queue=task.queue, callable=task.callable_name, reason=reason, attempts=attempts
        )
        notify(self._observer, dead)
        return self._answer(request, 200, "failed", reason, error=error)

    async def _forget(self, request: HandlerRequest, execution: Execution) -> None:
        """Delete what the store keeps of a task that has ended. The rest it deletes when the task's time is over."""
        keys = []
        if request.progress != NO_PROGRESS:
            keys.append(progress_key(execution.audience, execution.task_id))
        if request.pointer is not None:
            keys.append(f"{BLOB_KEY}{request.pointer.blob['id']}")
        if keys:
            await self._storage(partial(self._queue().keep.delete, keys))

    async def _answer_for_stuck(self, request: HandlerRequest, task: VerifiedTask, seconds: float | None) -> Response:
        """Count the attempt of a run that goes on past its deadline. The next delivery after its end gives up, or runs."""
        assert request.execution is not None  # the run was admitted
        charged = Settlement(verdict=Verdict.RETRY, at=None, status=500, reason=OUTLASTED)
        now = self._clock()
        progress = request.progress.after(charged, started=request.started, now=now)
        await self._storage(partial(self._keep_progress, request.execution, progress))
        return await super()._answer_for_stuck(request, task, seconds)

    # --- What no run began of ---

    async def _rejected(self, request: HandlerRequest, error: RejectedTask) -> Response:
        request.pushed = True
        if isinstance(error, NotYetValid):
            return await super()._rejected(request, error)
        request.refused = error.identity or request.identity
        if not error.authentic or request.refused is None:
            return await self._refused(request, error)
        if request.execution is None:
            if request.pointer is None and request.task is None:
                request.claims = await self._storage(partial(self._verifier.authenticate, request.body))
            execution = request.ask(self._ledger_client.owner())
            if self._clock() > execution.expires + _LEDGER_KNOWS:
                return await self._bury_forgotten(request, error)
            if (answer := await self._admit(request, execution)) is not None:
                return answer
        assert request.execution is not None
        failed = error.is_final
        status, outcome = (200, "failed") if failed else (500, "rejected")
        record = request.record(outcome, status, error.slug, error, ended=self._clock())
        state = EndState.FAILED if failed else EndState.RETRY
        return await self._judge(request, request.execution, state, record, outcome, status, error)

    async def _bury_forgotten(self, request: HandlerRequest, error: RejectedTask) -> Response:
        """Bury a task that expired so long ago that the ledger may have forgotten how it ended.

        Its letter is no proof that it died, and is not run again: whoever captured the token of a task that succeeded would
        have it run a second time.
        """
        task, now = self._task(request), self._clock()
        bury = partial(self._bury_genuine, request.headers, task, error.slug, now)
        if not await self._storage(bury):
            return self._refuse(403, NOT_FROM_ENGINE)
        return self._answer(request, 200, "failed", error.slug, error=error)

    def _bury_genuine(self, headers: Mapping[str, str], task: QueuedTask, reason: str, now: float) -> bool:
        queue = self._queue()
        if not queue.engine.authenticate(headers):
            return False
        queue.bury(task, reason=reason, attempts=0, now=now, verified=False)
        return True

    async def _refused(self, request: HandlerRequest, error: RejectedTask) -> Response:
        """Refuse a token that no key of ours signed, and bury it when the engine has tried for long enough."""
        now = self._clock()
        attempt = self._queue().engine.attempt(request.headers)
        if not engine_gives_up(attempt.retries + 1, attempt.since, now=now):
            return self._refuse(403, error.slug)
        identity = error.identity
        letter = _letter(request.body, attempt.task_id if identity is None else identity.task_id, now)
        if not await self._storage(partial(self._bury_refused, request.headers, letter, error.slug, now)):
            return self._refuse(403, NOT_FROM_ENGINE)
        notify(self._observer, TaskDead(task_id=letter.id, queue="", callable="", reason=error.slug, attempts=0))
        return self._refuse(200, error.slug)

    def _bury_refused(self, headers: Mapping[str, str], letter: QueuedTask, slug: str, now: float) -> bool:
        queue = self._queue()
        if not queue.engine.authenticate(headers):
            return False
        record = AttemptRecord(letter.id, "", now, now, "refused", 403, slug)
        bury = partial(queue.bury, reason=slug, attempts=0, now=now, verified=False)
        if not bury(letter):
            found = queue.find(letter.id)
            if found is not None and found.state is TaskState.DEAD and found.token == letter.token:
                return True  # by another message of it
            # Another letter, or a task, has this id. Its hash is nobody's id: the same token is buried once.
            letter = letter._replace(id=sha256(letter.token).hexdigest()[:32])
            bury(letter)
        queue.ledger.record_many((record._replace(task_id=letter.id),))
        return True

    # --- Shared ---

    def _task(self, request: HandlerRequest) -> QueuedTask:
        """Return a task as the store knows tasks: what its verified token says, and nothing that the engine said."""
        execution, claims = request.execution, request.signed
        assert execution is not None  # the ledger admitted it
        assert claims is not None
        _, queue, target, url = split_audience(execution.audience)
        trace = claims.get("trace")
        return QueuedTask(
            id=execution.task_id,
            queue=queue,
            token=request.body if request.task is None else request.task.token,
            audience=execution.audience,
            url=url,
            target=target,
            eta=float(claims["nbf"]),
            created=float(claims["iat"]),
            expires=execution.expires,
            name=claims.get("name"),
            headers={**claims.get("headers", {}), **({} if trace is None else {_TRACE_HEADER: trace})},
            retry_options=request.retry or {},
            digest=execution.digest,
            callable_name=callable_name(claims["call"]) if "call" in claims else "",
        )


def _letter(token: bytes, task_id: str, now: float) -> QueuedTask:
    """Return what is known of a token that is not verified: itself, and maybe an id that nobody vouches for."""
    digest = sha256(token)
    return QueuedTask(
        id=task_id if _ID.fullmatch(task_id) else digest.hexdigest()[:32],
        queue="",
        token=token,
        audience="",
        url="",
        target="",
        eta=now,
        created=now,
        expires=int(now) + MAX_LIFETIME,
        digest=digest.digest(),
    )
