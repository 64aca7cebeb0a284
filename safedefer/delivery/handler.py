"""The handler without a framework: headers and body in; status, headers and body out, also of each refusal.

The aiohttp handler, in-process delivery by the dispatcher, and ``App.handle`` for other frameworks all call
``Delivery.handle``. It runs only tasks that it has verified in the same call.

Over 450 lines, since it is the whole way of a request, from its bytes to its answer, and is reviewed as one.

The answers are those of App Engine's push queues, made exact (status, ``Safedefer-Outcome``):

======================================================  ======  ===============
returned                                                200     ``succeeded``
ledger: ended already                                   200     ``duplicate``
ledger: running elsewhere                               409     ``running``
``SingularTaskFailure``                                 408     ``retry``
any other exception, or past the deadline               500     ``retry``
cancelled while it ran                                  200     ``cancelled``
``PermanentTaskFailure``, expired, arguments undecodable  200   ``failed``
unresolvable, refused by policy, claims unknown         500     ``rejected``
too early, or before the time of the retry              503     ``early``
the same, sent by a push engine                         425     ``early``
failed, and the delivery of that run is not settled     500     ``retry``
not authentic                                           403     ``refused``
not POST, too large, wrong type or any encoding         405, 413, 415  ``refused``
a body that breaks off, or does not come                400, 408  ``refused``
at capacity, shutting down                              503     ``busy``
======================================================  ======  ===============
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Container, Mapping
from functools import partial
from typing import Final

from safedefer.blobs import BlobStore
from safedefer.codecs.protocol import Codec
from safedefer.concurrency.threads import Threads
from safedefer.delivery.budget import ByteBudget
from safedefer.delivery.late import LateEnd
from safedefer.delivery.ledger_client import LedgerClient
from safedefer.delivery.options import DeliveryOptions
from safedefer.delivery.redaction import redacted_traceback
from safedefer.delivery.request import HandlerRequest
from safedefer.delivery.runs import RequestCount, Runs
from safedefer.errors import (
    InvalidClaims,
    NotYetValid,
    QueueUnavailable,
    RejectedTask,
    ReplayedTask,
    SingularTaskFailure,
)
from safedefer.events import Observer, RequestRefused, hears_started, is_heard, notify
from safedefer.execution.deadline import DEADLINE_EXCEEDED, deadline_of, stuck_limit
from safedefer.execution.run import CoroutineCancelled, Outcome, Result, execute
from safedefer.execution.tracing import traced
from safedefer.headers import (
    CONTENT_TYPE,
    CONTENT_TYPES,
    OUTCOME_HEADER,
    QUEUE_HEADER,
    RETRY_HEADER,
    AttemptHeaders,
    Hints,
    Response,
    read_hints,
)
from safedefer.ledger import Admission, EndState, Execution, Ledger, RunEnd
from safedefer.signing import Verifier
from safedefer.task import VerifiedPointer, VerifiedTask

__all__ = [
    "CONTENT_TYPES",
    "OUTCOME_HEADER",
    "QUEUE_HEADER",
    "RETRY_HEADER",
    "Delivery",
    "DeliveryOptions",
    "Response",
    "redacted_traceback",
]

_log: Final = logging.getLogger("safedefer")

#: Reasons of a token that is posted again after a failure: before the time of its retry, or before that is known.
RETRY_NOT_DUE: Final = "retry-not-due"
UNSETTLED: Final = "unsettled"
_REFUSED_BODY: Final = b"refused\n"
_STORAGE_THREADS: Final = 4
#: Tokens of more bytes are verified in a thread: one of a megabyte takes up to a second.
_LARGE: Final = 65_536


class Delivery:
    """Verifies, asks the ledger, runs, records, answers.

    Args:
        verifier: Turns bytes into verified tasks.
        codecs: Codecs by ``cty``.
        ledger: Returns the ledger, which admits runs.
        blobs: Returns the store of oversize tokens; called in a thread.
        clock: Returns seconds since the epoch.
        observer: Gets an event for every answer.
        options: Limits, and how tasks are run.
        threads: Run plain callables; ``options.concurrency`` threads by default.
    """

    def __init__(
        self,
        *,
        verifier: Verifier,
        codecs: Mapping[str, Codec],
        ledger: Callable[[], Ledger],
        blobs: Callable[[], BlobStore],
        clock: Callable[[], float],
        observer: Observer,
        options: DeliveryOptions,
        threads: Threads | None = None,
    ) -> None:
        self._verifier = verifier
        self._codecs = codecs
        self._blobs = blobs
        self._clock = clock
        self._observer = observer
        self._options = options
        self.budget: ByteBudget = ByteBudget(options.unverified_bytes)
        """Bytes for all bodies that are being read. A reader takes from it before each chunk."""
        self._requests = RequestCount()
        self._draining = False
        self._threads = Threads(options.concurrency, "safedefer-task") if threads is None else threads
        self._runs = Runs(self._threads, limit=stuck_limit(options.concurrency))
        # Storage has threads of its own: a task that blocks must not delay the ledger entries of others.
        self._storage = Threads(_STORAGE_THREADS, "safedefer-ledger")
        self._ledger_client = LedgerClient(
            ledger, self._storage, clock=clock, seconds=options.lease_seconds, cancel=self.cancel
        )

    @property
    def max_bytes(self) -> int:
        """The largest body, in bytes."""
        return self._options.max_bytes

    @property
    def handled(self) -> int:
        """The number of tasks that were run, since the start; requests that ran none are not counted."""
        return self._requests.runs

    @property
    def running(self) -> int:
        """The number of running tasks, including those whose request was cancelled or answered at the deadline."""
        return self._requests.running + self._requests.abandoned + self._runs.stuck

    @property
    def stuck(self) -> int:
        """The number of runs that were stopped and go on: threads, suppressed cancellations, asyncio tasks left behind."""
        return self._runs.stuck

    @property
    def is_clogged(self) -> bool:
        """Whether so many runs are stuck that the process should be replaced."""
        return self._runs.stuck >= self._runs.limit

    def cancel(self, task_id: str) -> None:
        """Stop a task that was cancelled, if it runs here; from any thread."""
        self._runs.cancel(task_id)

    def stop_renewal_after(self, hang_seconds: float) -> None:
        """Extend no lease while the event loop stands for so long: then the supervisor ends this process."""
        self._ledger_client.renewal.beat.hang_seconds = hang_seconds

    def drain(self) -> None:
        """Answer ``busy`` from now on. Running tasks go on."""
        self._draining = True

    def resume(self) -> None:
        """Take tasks again after ``drain``: another server of this process has begun."""
        self._draining = False

    async def drained(self, seconds: float) -> bool:
        """Wait up to ``seconds`` until no task runs. Return whether none does."""
        try:
            async with asyncio.timeout(seconds):
                await self._requests.wait_for_none()
        except TimeoutError:
            return False
        return not (self._requests.abandoned or self._runs.stuck)

    def check_request(self, method: str, headers: Mapping[str, str], length: int | None) -> Response | None:
        """Return the refusal of a request that needs no look at its body; None to go on and read the body."""
        return self._check(method, read_hints(headers), length)

    def _check(self, method: str, hints: Hints, length: int | None) -> Response | None:
        if method != "POST":
            return self._refuse(405, "method-not-allowed", {"Allow": "POST"})
        if hints.encoding is not None:
            return self._refuse(415, "content-encoding")
        if hints.type != CONTENT_TYPE:
            kind = (hints.type or "").partition(";")[0].strip().lower()
            if kind not in CONTENT_TYPES:
                return self._refuse(415, "content-type")
        if length is not None and length > self._options.max_bytes:
            return self.too_large()
        concurrency = self._options.concurrency
        # Each stuck thread was replaced: beyond as many again, memory counts more than this process's work.
        if (
            self._draining
            or self._requests.places >= concurrency
            or self._runs.stuck >= max(concurrency, self._runs.limit)
        ):
            return self.busy()
        return None

    def busy(self) -> Response:
        """Return the answer of a handler at capacity. The dispatcher tries again and charges no attempt."""
        return Response(503, {OUTCOME_HEADER: "busy", "Retry-After": "1"}, b"busy\n")

    def too_large(self) -> Response:
        """Return the answer to a body over the limit."""
        return self._refuse(413, "too-large")

    def timed_out(self) -> Response:
        """Return the answer to a body that did not arrive in time."""
        return self._refuse(408, "body-timeout")

    def broken(self) -> Response:
        """Return the answer to a body whose connection broke."""
        return self._refuse(400, "body-broken")

    async def handle(
        self, headers: Mapping[str, str], body: bytes, *, url: str | Container[str], method: str = "POST"
    ) -> Response:
        """Handle one request.

        Args:
            headers: The request's headers; names in any case.
            body: The raw body.
            url: The path of the request, which the token must name; or a container of such paths.
            method: The request's method.

        Returns:
            The answer. Only the cancellation of the caller is raised.
        """
        own = headers if type(headers) is AttemptHeaders else None
        hints = read_hints(headers) if own is None else own.hints
        early = self._check(method, hints, len(body))
        if early is not None:
            return early
        attempt = hints.attempt or hints.retries + 1
        request = HandlerRequest(
            self._clock(), hints.retries, attempt, pushed=hints.pushed, ran=None if own is None else own.ran
        )
        request.headers, request.body = headers, body
        if not self._requests.begin(self._options.concurrency):  # other event loops may have taken the last place since
            return self.busy()
        abandoned = False
        try:
            return await self._handle(request, hints, body, url)
        except QueueUnavailable:
            return self._answer(request, 503, "busy", QueueUnavailable.slug, {"Retry-After": "1"})
        except Exception as error:  # noqa: BLE001  # the sender needs an answer to any error
            _log.error("the handler failed (%s); report it", type(error).__name__)
            return self._answer(request, 500, "retry", "internal-error")
        except CoroutineCancelled:
            raise
        except asyncio.CancelledError:
            abandoned = True
            raise
        finally:
            if own is not None:
                own.retry = request.retry
            self._requests.end(abandoned=abandoned, storing=request.is_storing)

    async def _handle(self, request: HandlerRequest, hints: Hints, body: bytes, url: str | Container[str]) -> Response:
        try:
            verify = partial(self._verifier.verify, body, url=url, now=request.started, queue=hints.queue)
            verified = verify() if len(body) <= _LARGE else await self._threads(verify)
            if isinstance(verified, VerifiedPointer):
                task = await self._fetch(request, verified, url)
                if task is None:
                    return await self._missing_blob(request)
            else:
                task = verified
            request.task = task
            execution = request.ask(self._ledger_client.owner())
            if (answer := await self._admit(request, execution)) is not None:
                return answer
            return await self._run(request, task, execution)
        except RejectedTask as error:
            rejection = error
        try:
            return await self._rejected(request, rejection)
        finally:
            del rejection  # its traceback refers to this frame: only the garbage collector would free the two

    # --- Before the run ---

    async def _fetch(
        self, request: HandlerRequest, pointer: VerifiedPointer, url: str | Container[str]
    ) -> VerifiedTask | None:
        request.pointer = pointer
        data = await self._storage(partial(self._blobs().get, pointer.blob["id"]))
        if data is None:
            return None
        verify = partial(self._verifier.verify_stored, pointer, data, url=url, now=request.started)
        return verify() if len(data) <= _LARGE else await self._threads(verify)

    async def _missing_blob(self, request: HandlerRequest) -> Response:
        # A blob is deleted when its task has ended. Then the ledger has the end, and this is a duplicate.
        answer = await self._admit(request, request.ask(self._ledger_client.owner()))
        if answer is not None:
            return answer
        return await self._rejected(request, InvalidClaims("the stored token is gone; restore the blobs from a backup"))

    async def _admit(self, request: HandlerRequest, execution: Execution) -> Response | None:
        """Ask the ledger whether a task may run; return the answer of one that may not."""
        admission = await self._ledger_client.begin(execution)
        return None if admission is Admission.RUN else self._not_admitted(request, admission)

    def _not_admitted(self, request: HandlerRequest, admission: Admission) -> Response:
        if admission is Admission.DUPLICATE:
            return self._answer(request, 200, "duplicate", None)
        if admission is Admission.RUNNING:
            return self._answer(request, 409, "running", None)
        if admission is Admission.EARLY:
            return self._early(request, RETRY_NOT_DUE, 1)
        if admission is Admission.UNSETTLED:
            return self._answer(request, 500, "retry", UNSETTLED)
        return self._refuse(403, ReplayedTask.slug)

    def _early(self, request: HandlerRequest, reason: str, seconds: int) -> Response:
        # To a push engine 503 would say that this handler is overloaded: it would slow the whole queue.
        status = 425 if request.pushed else 503
        return self._answer(request, status, "early", reason, {"Retry-After": str(seconds)})

    # --- The run and its end ---

    async def _run(self, request: HandlerRequest, task: VerifiedTask, execution: Execution) -> Response:
        context = request.context(task)
        own = task.claims.get("deadline")
        seconds = deadline_of(own, self._options.deadlines.get(context.queue_name), self._options.deadline)
        goes_on = False
        if hears_started(self._observer):
            notify(self._observer, request.start_event(task.identity))
        self._ledger_client.renewal.add(execution)
        try:
            threads, options = self._threads, self._options
            run = execute(
                task, self._codecs, context, in_thread=threads, validate=options.validate, around=options.around
            )
            if options.tracing is not None:
                run = traced(options.tracing, context, run, attempt=request.attempt)
            late = LateEnd(self._ledger_client, self._end_of, request, execution)
            outcome = await self._runs.run(run, context.control, execution, seconds=seconds, late=late)
            if outcome is None:
                goes_on = True
                return await self._answer_for_stuck(request, task, seconds)
            if outcome.reason == DEADLINE_EXCEEDED:
                self._log_deadline(task, seconds, "was cancelled")
            status, outcome_name = _STATUS[outcome.result]
            if outcome.reason == SingularTaskFailure.slug:
                status = 408
            request.give_place_away(self._requests, places=self._options.concurrency)
            if (answer := await self._end_run(request, execution, outcome, status)) is not None:
                return answer
        except CoroutineCancelled:
            # The coroutine has ended with the process: the task may run again at once. (A thread goes on after a
            # cancellation: then the ledger keeps the run until its lease expires.)
            await self._finish(request, execution, Outcome(result=Result.RETRY, reason="cancelled"), None)
            raise
        finally:
            self._requests.end_run()
            # Only after the end is stored: until then no other handler may run the task.
            if not goes_on:
                self._ledger_client.renewal.remove(execution)
        if outcome.reason in UNAUTHENTIC_REASONS:
            return self._refuse(403, outcome.reason)
        return self._answer(request, status, outcome_name, outcome.reason, error=outcome.error)

    async def _end_run(
        self, request: HandlerRequest, execution: Execution, outcome: Outcome, status: int
    ) -> Response | None:
        """Store the end of a run; return None for the answer that says so."""
        await self._finish(request, execution, outcome, status)
        return None

    async def _answer_for_stuck(self, request: HandlerRequest, task: VerifiedTask, seconds: float | None) -> Response:
        """Answer for a run that goes on past its deadline. Its ledger entry stays ``running``."""
        self._log_deadline(task, seconds, "goes on, as it cannot be cancelled")
        record = request.record("retry", 500, DEADLINE_EXCEEDED, None, ended=self._clock())
        await self._ledger_client.record(record)
        return self._answer(request, 500, "retry", DEADLINE_EXCEEDED)

    def _log_deadline(self, task: VerifiedTask, seconds: float | None, what: str) -> None:
        _log.error(
            "task %s (%s) passed its deadline of %g s and %s; split it, or give it or its queue a longer deadline "
            "(attempt_deadline in queue.yaml)",
            task.identity.task_id,
            task.identity.callable_name,
            seconds,
            what,
        )

    def _finish(
        self, request: HandlerRequest, execution: Execution, outcome: Outcome, status: int | None
    ) -> Awaitable[None]:
        """Store the end of a run before the answer goes out, also if the sender closes the connection meanwhile."""
        end = self._end_of(request, execution, outcome, status)
        # A dispatcher in this process has given the slot away, too.
        return self._ledger_client.finish(end, patient=request.is_storing and request.ran is not None)

    def _end_of(self, request: HandlerRequest, execution: Execution, outcome: Outcome, status: int | None) -> RunEnd:
        record = request.record(_STATUS[outcome.result][1], status, outcome.reason, outcome.error, ended=self._clock())
        return execution, _END[outcome.result], record

    async def _rejected(self, request: HandlerRequest, error: RejectedTask) -> Response:
        if not error.authentic:
            return self._refuse(403, error.slug)
        request.refused = error.identity or request.identity
        if isinstance(error, NotYetValid):
            return self._early(request, error.slug, error.retry_after)
        failed = error.is_final
        status, outcome = (200, "failed") if failed else (500, "rejected")
        if request.execution is not None:
            end = EndState.FAILED if failed else EndState.RETRY
            record = request.record(outcome, status, error.slug, error, ended=self._clock())
            await self._ledger_client.end((request.execution, end, record))
        elif request.identity is not None:
            record = request.record(outcome, status, error.slug, error, ended=self._clock())
            await self._ledger_client.record(record)
        return self._answer(request, status, outcome, error.slug, error=error)

    # --- Answers ---

    def _answer(
        self,
        request: HandlerRequest,
        status: int,
        outcome: str,
        reason: str | None,
        headers: Mapping[str, str] | None = None,
        *,
        error: BaseException | None = None,
    ) -> Response:
        if is_heard(self._observer, outcome, reason) and (identity := request.identity) is not None:
            notify(self._observer, request.event(identity, status, outcome, reason, error, ended=self._clock()))
        named = {OUTCOME_HEADER: outcome}
        if headers is not None:
            named.update(headers)
        return Response(status, named, f"{outcome}\n".encode())

    def _refuse(self, status: int, reason: str, headers: Mapping[str, str] | None = None) -> Response:
        notify(self._observer, RequestRefused(status=status, reason=reason))
        return Response(status, {OUTCOME_HEADER: "refused", **(headers or {})}, _REFUSED_BODY)

    def close(self) -> None:
        """Close the threads."""
        self._ledger_client.renewal.close()
        self._threads.close(wait=False, cancel=True)
        self._storage.close(wait=True)


_STATUS: Final = {
    Result.SUCCEEDED: (200, "succeeded"),
    Result.RETRY: (500, "retry"),
    Result.FAILED: (200, "failed"),
    Result.REJECTED: (500, "rejected"),
    Result.CANCELLED: (200, "cancelled"),
}
_END: Final = {
    Result.SUCCEEDED: EndState.SUCCEEDED,
    Result.RETRY: EndState.RETRY,
    Result.FAILED: EndState.FAILED,
    Result.REJECTED: EndState.RETRY,
    Result.CANCELLED: EndState.CANCELLED,
}
#: Decoding the arguments found it, and it is answered like any token that is not authentic.
UNAUTHENTIC_REASONS: Final = frozenset({"capability-exceeded"})
