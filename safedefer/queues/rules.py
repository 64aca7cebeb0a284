"""What every engine decides alike: ends, lost leases, backoff and limits of retries, poison. Pure functions.

An engine reads, asks these, and writes.

Engines whose counters change inside SQL keep their statements; ``tests/queues/contract.py`` runs the table of
``tests/queues/cases.py`` on each of them, and so proves that its SQL agrees with these functions.

Over 450 lines, since the rules refer to each other and are read side by side.

The handler judges by the same rules as the dispatcher: nothing here knows HTTP but its status codes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final, NamedTuple

from safedefer.errors import ExpiredTask, InvalidTaskRetryOptionsError, ReplayedTask
from safedefer.ledger import Admission, AttemptRecord, EndState, Execution, VerifiedLetter
from safedefer.options import TaskRetryOptions
from safedefer.queues.base import Lease, QueuedTask, Settlement, Verdict

#: Defaults of App Engine's retry parameters.
MIN_BACKOFF: Final = 0.1
MAX_BACKOFF: Final = 3_600.0
MAX_DOUBLINGS: Final = 16
#: Rejections (a bad deploy, a wrong key) after which a task is given up, if they span ``REJECT_SECONDS``.
REJECT_LIMIT: Final = 10
REJECT_SECONDS: Final = 3_600.0
#: The longest that a handler can put off a task, in seconds: its clock may be wrong, and be corrected. It is also the
#: longest backoff of a delivery that no handler took.
MAX_PUT_OFF: Final = 60.0
#: Seconds for which a task is put off that runs.
PUT_OFF: Final = 1.0
#: Seconds that a ledger entry is kept after its token expired.
LEDGER_LEEWAY: Final = 3_600
#: The newest attempt records that are kept of one task.
RECORDS_KEPT: Final = 100
#: Runs in a row that began and never ended, from which on a task is delivered alone in its process.
ALONE_FROM: Final = 2
#: The same, from which on it is a dead letter, if they span ``POISON_SECONDS``.
POISON_LOSSES: Final = 5
POISON_SECONDS: Final = 600.0
#: The reason of such a dead letter.
POISON: Final = "poison"
#: The outcome of a run that ended before the task's own code began.
_REJECTED: Final = "rejected"
#: The reason of a delivery that ended with its lease, and not with an answer.
LOST_LEASE: Final = "lease-expired"
#: The reason of a delivery whose request was sent, and not answered.
NO_RESPONSE: Final = "no-response"
#: The reason of a delivery whose run goes on past its deadline.
OUTLASTED: Final = "deadline-exceeded"
#: What the ledger calls a run that has not ended.
RUNNING: Final = "running"
#: A token, or what is stored beside it, is not fetched above this many bytes: no queue wrote it, since an App takes no larger
#: ``Limits.token_bytes``. Such a task has an empty token, and is not delivered. The SQL of the engines has the number too.
MOST_ROW_BYTES: Final = 2**21
#: JSON above this many characters is looked at before it is parsed: values take up to fifty times the memory of their text.
_LOOKED_AT: Final = 10_000
#: The most members of an object of ours, far above the headers of any request.
_MOST_MEMBERS: Final = 10_000
#: A text, also one that has no end: from each of its quotes on it would be looked through again. Or what opens a value.
_JSON_MARKS: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{:]', re.DOTALL)
#: The reason of a task whose token is empty or larger than that.
UNREADABLE: Final = "unreadable"
#: One more than this still fits into 32 bits: counters stop there, whatever somebody wrote into the storage.
MOST_COUNTED: Final = 2**31 - 2

_ENDED: Final = frozenset({EndState.SUCCEEDED, EndState.FAILED, EndState.CANCELLED})
#: A task that was replaced counts as cancelled.
_PAST_REPLACING: Final = frozenset({EndState.SUCCEEDED, EndState.CANCELLED})
#: Reasons of a dead letter that say less than the record of its last attempt.
_VAGUE: Final = frozenset({None, "rejected"})
#: Reasons of a task that is put off until the end of its run.
_PUT_OFF: Final = frozenset({NO_RESPONSE, OUTLASTED})
#: Reasons of ``gives_up``.
_GIVEN_UP: Final = frozenset({"retry-limit", "age-limit", "retry-and-age-limit"})
#: What a proxy answers, without ``Safedefer-Outcome``, for a handler that it does not reach or lets wait.
_PROXY_REASONS: Final = {429: "busy", 502: "unreachable", 503: "busy", 504: "unreachable"}
_STATES: Final = {Verdict.DONE: EndState.SUCCEEDED, Verdict.DEAD: EndState.FAILED}


# --- What is counted ------------------------------------------------------------------------------


class Counters(NamedTuple):
    """What is counted of a task, as it was before the delivery under way: fields of ``Lease``, in order."""

    attempts: int = 0
    retries: int = 0
    executions: int = 0
    first_attempt: float | None = None
    rejections: int = 0
    first_rejection: float | None = None
    previous_response: int | None = None
    retry_reason: str | None = None

    @classmethod
    def of(cls, lease: Lease) -> Counters:
        """Return the counters of a lease."""
        return cls._make(lease[3:-1])


class Known(NamedTuple):
    """What the ledger knows of a task, as far as it decides something."""

    state: str
    """``running``, or how the last run left it: an ``EndState``."""
    uncharged: bool = False
    """A run began, and its delivery is not settled."""
    alive: bool = False
    """The lease of the run lasts."""
    early: bool = False
    """The time of its retry has not come."""
    losses: int = 0
    """Deliveries in a row whose run began and never ended."""
    first_loss: float | None = None
    """When the first of them was counted."""

    @property
    def ended(self) -> bool:
        """Whether the task does not run again."""
        return self.state in _ENDED

    @property
    def running(self) -> bool:
        """Whether somebody runs it, whose lease lasts."""
        return self.state == RUNNING and self.alive


class LostDelivery(NamedTuple):
    """A delivery whose lease ran out before anybody settled it."""

    counters: Counters
    charged: bool
    """Its run had begun: the ledger's entry is charged now."""
    record: AttemptRecord | None
    losses: int = 0
    """As ``Known.losses``, with this one."""
    first_loss: float | None = None
    given_up: str | None = None
    """Why the task is tried no more by its retry options."""

    def end_reason(self, now: float) -> str | None:
        """Return why the task is a dead letter with this loss; None if it is tried again."""
        return POISON if self.is_poison(now) else self.given_up

    def is_poison(self, now: float) -> bool:
        """Whether the task is given up with this loss: it ended too many processes in a row, for long enough."""
        lost, since = self.record is not None, now if self.first_loss is None else self.first_loss
        return lost and self.losses >= POISON_LOSSES and now - since >= POISON_SECONDS


class Ending(NamedTuple):
    """How a task ends."""

    state: EndState
    reason: str | None = None
    charged: bool = False
    """Whether the delivery counts as an attempt."""
    by_record: bool = False
    """Whether the reason of the task's newest record counts before ``reason``."""


def plus(count: int, more: int) -> int:
    """Return a counter after ``more``, which is 0 or 1."""
    return min(count, MOST_COUNTED) + more


def after_retry(before: Counters, settlement: Settlement, *, leased_at: float | None, now: float) -> Counters:
    """Return the counters after a delivery that is settled as RETRY."""
    first_attempt, first_rejection = before.first_attempt, before.first_rejection
    return Counters(
        attempts=plus(before.attempts, settlement.charged),
        retries=plus(before.retries, 1),
        executions=plus(before.executions, settlement.executed),
        first_attempt=leased_at if settlement.charged and first_attempt is None else first_attempt,
        rejections=plus(before.rejections, settlement.rejected),
        first_rejection=now if settlement.rejected and first_rejection is None else first_rejection,
        previous_response=settlement.status,
        retry_reason=settlement.reason,
    )


def retry_charges(settlement: Settlement, entry: Known | None) -> bool:
    """Whether a RETRY settles the run that the ledger holds uncharged.

    A run that another delivery began, and that goes on, stays to be charged.
    """
    return entry is not None and (settlement.charged or entry.state == EndState.RETRY)


def sets_time(settlement: Settlement) -> bool:
    """Whether no run may begin before the time of a RETRY.

    What no handler took says nothing of a failure. Were its time kept, a handler whose clock is late, and that answers
    ``early``, would meet a later time with each delivery.
    """
    return settlement.charged or settlement.rejected


def after_lost_lease(
    before: Counters, task: tuple[str, str], entry: Known | None, *, leased_at: float | None, now: float
) -> LostDelivery:
    """Count a delivery whose lease ran out: as an attempt if the ledger saw its run begin, and as a loss if it saw no end.

    Args:
        before: The counters before that delivery.
        task: Its audience and id.
        entry: What the ledger knows.
        leased_at: When the lease began.
        now: The time.
    """
    lost = before._replace(retries=plus(before.retries, 1), retry_reason=LOST_LEASE, previous_response=None)
    if entry is None:
        return LostDelivery(lost, charged=False, record=None)
    losses, first_loss = entry.losses, entry.first_loss
    if not entry.uncharged:
        return LostDelivery(lost, charged=False, record=None, losses=losses, first_loss=first_loss)
    started = now if leased_at is None else leased_at
    first = started if before.first_attempt is None else before.first_attempt
    lost = lost._replace(attempts=plus(before.attempts, 1), first_attempt=first)
    record = None
    if entry.state == RUNNING:  # a run that ended has left a record of its own
        record = AttemptRecord(task[1], task[0], started, now, str(EndState.RETRY), None, LOST_LEASE)
        losses, first_loss = plus(losses, 1), now if first_loss is None else first_loss
    return LostDelivery(lost, charged=True, record=record, losses=losses, first_loss=first_loss)


def has_lost_run(retry_reason: str | None, entry: Known | None) -> bool:
    """Whether a run's process is gone since its delivery was put off (``by_ledger``): it counts as with a lost lease.

    A run that was given back in a drain counts as little as with one.
    """
    lost = entry is not None and entry.state == RUNNING and entry.uncharged and not entry.alive
    return lost and retry_reason in _PUT_OFF


def waits_for_run(retry_reason: str | None, entry: Known | None) -> bool:
    """Whether a task that was put off for its run (``by_ledger``) is not to be delivered yet, as the run goes on.

    Were it delivered, its run could be lost before the handler asks to begin: that run would be charged to nobody.
    """
    return entry is not None and entry.running and entry.uncharged and retry_reason in _PUT_OFF


def after_lost_run(
    before: Counters,
    task: tuple[str, str],
    entry: Known | None,
    *,
    now: float,
    retry_options: Mapping[str, float],
    eta: float,
) -> LostDelivery:
    """Do what ``after_lost_lease`` does for a task that ``has_lost_run``, and whose deliveries are all counted.

    Its handler died while a dispatcher waited for the answer: a failed attempt, after which the retry options count.
    """
    counted = before._replace(retries=max(before.retries - 1, 0))
    lost = after_lost_lease(counted, task, entry, leased_at=None, now=now)
    try:
        options = TaskRetryOptions.from_given(retry_options)
    except InvalidTaskRetryOptionsError:  # somebody has written into the storage
        return lost
    return lost._replace(given_up=gives_up(options, attempts=lost.counters.attempts, age=now - eta))


def must_be_alone(losses: int) -> bool:
    """Whether a task runs only where nothing else does: it may end the process, and all that runs in it."""
    return losses >= ALONE_FROM


def stored_mapping(text: object) -> dict[str, Any]:
    """Read a mapping from stored JSON; empty where there is none. The token says signed what is only repeated there."""
    if text == "{}":  # nearly all of them
        return {}
    try:
        value = json.loads(text) if isinstance(text, str) and not unfolds(text) else None
    except (ValueError, RecursionError):  # one row that somebody wrote must not hide the others
        return {}
    return value if type(value) is dict else {}


def unfolds(text: str, *, objects: int = 1) -> bool:
    """Whether a long JSON text has more values than any of ours: lists, more ``objects``, or more members than headers.

    A text that is no JSON may be misjudged; parsing it fails.
    """
    if len(text) <= _LOOKED_AT:
        return False
    members = 0
    for mark in _JSON_MARKS.finditer(text):
        match text[mark.start()]:
            case "[":
                return True
            case "{":
                objects -= 1
            case ":":
                members += 1
        if objects < 0 or members > _MOST_MEMBERS:
            return True
    return False


# --- The ledger has the last word -----------------------------------------------------------------


def by_ledger(lease: Lease, settlement: Settlement, entry: Known | None, *, now: float) -> Settlement:
    """Return what becomes of a task whose run may go on, or of whose delivery there was no answer.

    A dead letter of a task that goes on to succeed would say that it failed, and its re-run would run it twice. So a task
    that runs is put off until its end is known, and one whose run never began is tried again as a rejected one is:
    uncharged, up to ``REJECT_LIMIT`` deliveries over ``REJECT_SECONDS``.
    """
    if settlement.answered and not (settlement.verdict is Verdict.DEAD and settlement.reason in _GIVEN_UP):
        waits = settlement.verdict is Verdict.RETRY and not (settlement.charged or settlement.rejected)
        if (
            waits
            and lease.retry_reason in _PUT_OFF
            and entry is not None
            and entry.state == RUNNING
            and entry.uncharged
        ):
            return replace(settlement, reason=lease.retry_reason)  # it waits for the same run still
        return settlement
    if entry is not None and entry.running:
        reason = OUTLASTED if settlement.answered else NO_RESPONSE
        put_off = Settlement(verdict=Verdict.RETRY, at=now + PUT_OFF, charged=False, reason=reason)
        return replace(put_off, status=settlement.status, record=settlement.record)
    if settlement.answered:
        return settlement
    if entry is not None and entry.ended:
        return Settlement(verdict=Verdict.DONE, executed=True)
    if entry is not None and entry.uncharged:  # it began, and either its handler died or its end is a failure
        return settlement
    options = options_that_count(lease.task.retry_options, None)
    rejection = _judge_rejection(lease, options, None, NO_RESPONSE, now=now, jitter=0.0)
    return replace(rejection, record=settlement.record)


def end_of(settlement: Settlement, entry: Known | None) -> Ending:
    """Return how a task ends that is settled as DONE or DEAD.

    The ledger has the last word: it knows how the run ended, also when the dispatcher that saw it died, and the
    next one got no more than "duplicate".
    """
    state, reason, charged = _STATES[settlement.verdict], settlement.reason, settlement.charged
    if entry is not None and entry.ended:
        # What is not uncharged was charged when its lease ran out, and this delivery found it ended.
        charged = charged and entry.uncharged
        if entry.state != state:
            state, reason = EndState(entry.state), None
    return Ending(state, reason, charged, state is EndState.FAILED and reason in _VAGUE)


def may_cancel(entry: Known | None) -> bool:
    """Whether a task that nobody has leased can be cancelled: by the ledger it neither runs now nor has ended."""
    return entry is None or not (entry.ended or entry.running)


def check_replacement(letter: VerifiedLetter, *, digest: bytes | None, entry: Known | None) -> None:
    """Check that a dead letter may be replaced by a new task.

    Args:
        letter: What its token says.
        digest: That of the ledger's entry; None if there is none.
        entry: What the ledger knows of it.

    Raises:
        ReplayedTask: It runs, has succeeded, or was cancelled or replaced, or is another task.
        ExpiredTask: Its time is over, and the ledger does not know that it died.
    """
    if entry is None and letter.expired:
        raise ExpiredTask("the task's time is over, and the ledger does not know that it died; defer it anew")
    if entry is None:
        return
    if digest != letter.digest:
        raise ReplayedTask("the ledger knows another task of this id; defer the task anew")
    if entry.running:
        raise ReplayedTask("the task runs now; wait for its end, or defer it anew")
    if entry.state in _PAST_REPLACING:
        raise ReplayedTask("the task has succeeded, or was cancelled or re-run; defer it anew if it is wanted again")
    if letter.expired and entry.state != EndState.FAILED:
        raise ExpiredTask("the task's time is over, and by the ledger it did not die; defer it anew")


def may_stop(entry: Known | None) -> bool:
    """Whether a task that somebody has leased or runs can be cancelled: by the ledger it has not ended."""
    return entry is None or not entry.ended


def admit(execution: Execution, *, digest: bytes, owner: str | None, entry: Known) -> Admission:
    """Say whether a task may run that the ledger knows; one that it does not know may."""
    if digest != execution.digest:
        return Admission.CONFLICT
    if entry.ended:
        return Admission.DUPLICATE
    if entry.running:
        return Admission.RUN if owner == execution.owner else Admission.RUNNING
    if entry.state == EndState.RETRY and entry.uncharged:
        # Whoever posts the token would run it as often as they like, until the delivery is settled.
        return Admission.UNSETTLED
    return Admission.EARLY if entry.early else Admission.RUN


def is_lost(entry: Known) -> bool:
    """Whether a run began that neither ended nor is extended any more: its process is gone."""
    return entry.state == RUNNING and entry.uncharged and not entry.alive


def end_counts(end: EndState, entry: Known, *, ours: bool) -> bool:
    """Say whether the end of a run changes the ledger's entry, which has the run's digest.

    The first end that is final counts, also of an owner whose lease has lapsed: the task has run, and another run of it
    would be one too many. RETRY counts only from the current owner, who else would make room for a third.
    """
    return not entry.ended and (end in _ENDED or (ours and entry.state == RUNNING))


def leaves_charge(end: EndState, record: AttemptRecord) -> bool:
    """Whether a run that ended is still to be charged, and does not begin again before it is.

    One that was rejected is not: none of the task's own code ran, and it may be tried again after a deploy.
    """
    return end is not EndState.RETRY or record.outcome != _REJECTED


# --- Which limits count ---------------------------------------------------------------------------


def options_that_count(own: Mapping[str, float], queues_own: Mapping[str, float] | None) -> TaskRetryOptions:
    """Return a task's retry options, and those of its queue where it has none of its own."""
    try:
        return TaskRetryOptions.from_given({**queues_own, **own} if queues_own else own)
    except InvalidTaskRetryOptionsError:  # queue.yaml has changed since, or the hint in the storage is none of ours
        return options_that_count(own, None) if queues_own else TaskRetryOptions()


def backoff(options: TaskRetryOptions, n: int, *, jitter: float = 0.0) -> float:
    """Seconds to wait before retry ``n``, counted from 1 (App Engine task queue backoff).

    The interval doubles ``max_doublings`` times and then grows linearly, up to the maximum.

    Args:
        options: The task's or queue's own values.
        n: Which retry.
        jitter: From 0 to 1: the part of the interval that is taken off.
    """
    low = MIN_BACKOFF if options.min_backoff_seconds is None else options.min_backoff_seconds
    high = MAX_BACKOFF if options.max_backoff_seconds is None else options.max_backoff_seconds
    doublings = MAX_DOUBLINGS if options.max_doublings is None else options.max_doublings
    exponent = min(n - 1, doublings)
    # 2**63 times the least float is over any maximum; larger powers would only overflow.
    interval = min(max(high, low), low * 2.0 ** min(exponent, 63) * max(n - exponent, 1))
    return interval * (1 - jitter)


def gives_up(options: TaskRetryOptions, *, attempts: int, age: float) -> str | None:
    """Say whether a failed task is tried no more, and why: a slug, or None.

    With a limit of retries and one of age, it is given up when both are exceeded (App Engine).
    """
    retries_over = options.task_retry_limit is not None and attempts > options.task_retry_limit
    age_over = options.task_age_limit is not None and age > options.task_age_limit
    if options.task_retry_limit is not None and options.task_age_limit is not None:
        return "retry-and-age-limit" if retries_over and age_over else None
    return "retry-limit" if retries_over else "age-limit" if age_over else None


# --- Judging an attempt ---------------------------------------------------------------------------


class DeliveryResult(NamedTuple):
    """What came of a delivery."""

    status: int | None = None
    """The HTTP status; None: there was no answer."""
    outcome: str | None = None
    """The ``Safedefer-Outcome``, or what the dispatcher found itself; None if something else answered, or nobody."""
    wait: float | None = None
    """Seconds that the answer asks to wait; None if it does not."""
    reason: str | None = None
    """The slug, where the dispatcher found it: no handler could record it."""
    parked: bool = False
    """Whether the dispatcher found that no later delivery could change it. No answer says so."""


def judge(
    lease: Lease,
    found: DeliveryResult,
    *,
    signed: Mapping[str, float] | None = None,
    queues_own: Mapping[str, float] | None = None,
    now: float,
    jitter: float,
) -> Settlement:
    """Return the settlement of a delivery.

    The retry options that count are those that were signed, else those that are stored; what these leave out is the queue's.

    Args:
        lease: The delivery.
        found: What came of it.
        signed: The retry options that were signed with the task; None if none were, or nobody has read them.
        queues_own: Those of its queue.
        now: The time.
        jitter: From 0 to 1.
    """
    status, outcome, wait, reason, parked = found
    if parked and reason is not None:
        return _park(lease.task, reason, now=now)
    if status is not None and 200 <= status <= 299:  # noqa: PLR2004  # the range of success
        # Any 2xx is success, as on App Engine: a handler of the user's own may call run() and say no more.
        return _done(status) if outcome != "failed" else _failed(status)
    if outcome in {"early", "busy", "running"}:
        seconds = min(PUT_OFF if wait is None else wait, MAX_PUT_OFF) * (1 + jitter)
        return Settlement(verdict=Verdict.RETRY, at=now + seconds, charged=False, status=status, reason=outcome)
    if not outcome and wait is not None:  # whoever it is has not taken the request
        at = now + wait * (1 + jitter)
        return Settlement(verdict=Verdict.RETRY, at=at, charged=False, status=status, reason="busy")
    options = options_that_count(lease.task.retry_options if signed is None else signed, queues_own)
    if outcome in {"rejected", "refused"}:
        return _judge_rejection(lease, options, status, outcome, now=now, jitter=jitter, reason=reason)
    if not outcome and status is not None and status in _PROXY_REASONS:
        return _not_taken(lease, options, status, now=now, jitter=jitter)
    return _judge_failure(lease, options, status, now=now, jitter=jitter)


def _not_taken(lease: Lease, options: TaskRetryOptions, status: int, *, now: float, jitter: float) -> Settlement:
    """Say when a task is tried again that a proxy answered for: the backoff of the deliveries that charged nothing."""
    n = max(lease.retries - lease.attempts, 0) + 1
    wait = min(backoff(options, n), MAX_PUT_OFF) * (1 - jitter / 2)
    reason = _PROXY_REASONS[status]
    return Settlement(verdict=Verdict.RETRY, at=now + wait, charged=False, status=status, reason=reason)


@lru_cache(maxsize=100)
def _done(status: int) -> Settlement:
    return Settlement(verdict=Verdict.DONE, status=status, executed=True)


@lru_cache(maxsize=100)
def _failed(status: int) -> Settlement:
    return Settlement(verdict=Verdict.DEAD, status=status, executed=True)


def _judge_rejection(
    lease: Lease,
    options: TaskRetryOptions,
    status: int | None,
    outcome: str,
    *,
    now: float,
    jitter: float,
    reason: str | None = None,
) -> Settlement:
    """Say what becomes of a task that no handler took for one of its own.

    ``reason`` is the slug, where the dispatcher itself found it: no handler could record it.
    """
    count = lease.rejections + 1
    since = now if lease.first_rejection is None else lease.first_rejection
    over = count >= REJECT_LIMIT and now - since >= REJECT_SECONDS
    return Settlement(
        verdict=Verdict.DEAD if over else Verdict.RETRY,
        at=None if over else now + backoff(options, count, jitter=jitter / 2),
        charged=False,
        rejected=True,
        status=status,
        reason=outcome,
        record=_record(lease.task, outcome, status, now, reason) if reason or outcome == "refused" else None,
    )


def _park(task: QueuedTask, reason: str, *, now: float) -> Settlement:
    """Make a dead letter at once of a task that no later delivery could change; it keeps its token."""
    record = _record(task, "refused", None, now, reason)
    return Settlement(verdict=Verdict.DEAD, charged=False, rejected=True, reason=reason, record=record)


def _judge_failure(
    lease: Lease, options: TaskRetryOptions, status: int | None, *, now: float, jitter: float
) -> Settlement:
    """Say what becomes of a task whose attempt failed; ``status`` is None if there was no answer."""
    attempts = lease.attempts + 1
    reason = NO_RESPONSE if status is None else "retry"
    # The handler could not write that there was none.
    record = _record(lease.task, reason, status, now) if status is None else None
    executed = status is not None and status < 500  # noqa: PLR2004  # as App Engine counts
    given_up = gives_up(options, attempts=attempts, age=now - lease.task.eta)
    if given_up is not None:
        return Settlement(
            verdict=Verdict.DEAD,
            executed=executed,
            status=status,
            reason=given_up,
            record=record,
            answered=status is not None,
        )
    wait = backoff(options, attempts, jitter=jitter / 2)
    return Settlement(
        verdict=Verdict.RETRY,
        at=now + wait,
        executed=executed,
        status=status,
        reason=reason,
        record=record,
        answered=status is not None,
    )


def give_back(lease: Lease, *, now: float) -> Settlement:
    """Return what leaves a task as it was before it was leased."""
    return Settlement(
        verdict=Verdict.RETRY, at=now, charged=False, status=lease.previous_response, reason=lease.retry_reason
    )


def _record(task: QueuedTask, outcome: str, status: int | None, now: float, reason: str | None = None) -> AttemptRecord:
    """Return the record of an attempt that the handler could not write."""
    return AttemptRecord(task.id, task.audience, now, now, outcome, status, reason or outcome)
