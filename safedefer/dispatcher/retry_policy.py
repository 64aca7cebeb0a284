"""Verdicts: from a handler's answer to what becomes of a task. Functions of their arguments, and no more.

An attempt is charged only when the handler took the request: one that is down, busy or running the
task already charges none.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from safedefer.errors import InvalidTaskRetryOptionsError
from safedefer.headers import Answer, Response, read_answer
from safedefer.ledger import AttemptRecord
from safedefer.options import TaskRetryOptions
from safedefer.queues.base import Lease, Settlement, Verdict
from safedefer.queues.rates import MAX_HOLD

#: Defaults of App Engine's retry parameters.
MIN_BACKOFF: Final = 0.1
MAX_BACKOFF: Final = 3_600.0
MAX_DOUBLINGS: Final = 16
#: Rejections (a bad deploy, a wrong key) after which a task is given up, if they span ``REJECT_SECONDS``.
REJECT_LIMIT: Final = 10
REJECT_SECONDS: Final = 3_600.0

#: The longest that a handler can put off a task, in seconds: its clock may be wrong, and be corrected.
_MAX_PUT_OFF: Final = 60.0


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


def asks_to_wait(response: Response) -> float | None:
    """Return the seconds for which an answer asks to send nothing more; None if it does not.

    That is 429 or 503 with ``Retry-After``, of our handler or of whatever stands before it. A task that came
    too early says nothing of its queue.
    """
    return wait_asked_for(read_answer(response))


def wait_asked_for(answer: Answer) -> float | None:
    """Do what ``asks_to_wait`` does, with an answer that was read."""
    if answer.status not in {429, 503} or answer.retry_after is None or answer.outcome == "early":
        return None
    return min(_seconds(answer.retry_after), MAX_HOLD)


def judge(lease: Lease, response: Response, *, now: float, jitter: float) -> Settlement:
    """Turn a handler's answer into what becomes of the task."""
    return judge_answer(lease, read_answer(response), now=now, jitter=jitter)


def judge_answer(lease: Lease, answer: Answer, *, now: float, jitter: float) -> Settlement:
    """Do what ``judge`` does, with an answer that was read."""
    status, outcome = answer.status, answer.outcome or ""
    if 200 <= status <= 299:  # noqa: PLR2004  # the range of success
        if outcome == "failed":
            return Settlement(verdict=Verdict.DEAD, status=status, executed=True, reason=None)
        # Any 2xx is success, as on App Engine: a handler of the user's own may call run() and say no more.
        return _done(status)
    if outcome in {"early", "busy", "running"}:
        wait = min(_seconds(answer.retry_after), _MAX_PUT_OFF) * (1 + jitter)
        return Settlement(verdict=Verdict.RETRY, at=now + wait, charged=False, status=status, reason=outcome)
    if outcome in {"rejected", "refused"}:
        return judge_rejection(lease, status, outcome, now=now, jitter=jitter)
    if not outcome and (asked := wait_asked_for(answer)) is not None:  # whoever it is has not taken the request
        at = now + asked * (1 + jitter)
        return Settlement(verdict=Verdict.RETRY, at=at, charged=False, status=status, reason="busy")
    return judge_failure(lease, status, now=now, jitter=jitter)


@lru_cache(maxsize=100)
def _done(status: int) -> Settlement:
    return Settlement(verdict=Verdict.DONE, status=status, executed=True)


def judge_rejection(lease: Lease, status: int | None, outcome: str, *, now: float, jitter: float) -> Settlement:
    """Say what becomes of a task that no handler took for one of its own."""
    count = lease.rejections + 1
    since = now if lease.first_rejection is None else lease.first_rejection
    over = count >= REJECT_LIMIT and now - since >= REJECT_SECONDS
    return Settlement(
        verdict=Verdict.DEAD if over else Verdict.RETRY,
        at=None if over else now + backoff(_options(lease), count, jitter=jitter / 2),
        charged=False,
        rejected=True,
        status=status,
        reason=outcome,
        record=_record(lease, outcome, status, now) if outcome == "refused" else None,
    )


def judge_failure(lease: Lease, status: int | None, *, now: float, jitter: float, reason: str = "retry") -> Settlement:
    """Say what becomes of a task whose attempt failed; ``status`` is None if there was no answer."""
    options = _options(lease)
    attempts = lease.attempts + 1
    reason = "no-response" if status is None else reason
    # The handler could not write these down itself.
    record = None if reason == "retry" else _record(lease, reason, status, now)
    executed = status is not None and status < 500  # noqa: PLR2004  # as App Engine counts
    given_up = gives_up(options, attempts=attempts, age=now - lease.task.eta)
    if given_up is not None:
        return Settlement(verdict=Verdict.DEAD, executed=executed, status=status, reason=given_up, record=record)
    wait = backoff(options, attempts, jitter=jitter / 2)
    return Settlement(
        verdict=Verdict.RETRY, at=now + wait, executed=executed, status=status, reason=reason, record=record
    )


def give_back(lease: Lease, *, now: float) -> Settlement:
    """Return what leaves a task as it was before it was leased."""
    return Settlement(
        verdict=Verdict.RETRY, at=now, charged=False, status=lease.previous_response, reason=lease.retry_reason
    )


def _options(lease: Lease) -> TaskRetryOptions:
    try:
        return TaskRetryOptions.from_given(lease.task.retry_options)
    except InvalidTaskRetryOptionsError:  # a hint in the storage, which nobody signed: defaults will do
        return TaskRetryOptions()


def _record(lease: Lease, outcome: str, status: int | None, now: float) -> AttemptRecord:
    """Return the record of an attempt that the handler could not write."""
    task = lease.task
    return AttemptRecord(
        task_id=task.id, audience=task.audience, started=now, ended=now, outcome=outcome, status=status, reason=outcome
    )


def _seconds(text: str | None) -> float:
    """Read ``Retry-After`` in seconds; 1 if it is absent, a date, or beyond an hour."""
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 9:  # noqa: PLR2004  # a billion
        return 1.0
    return float(min(max(int(text), 1), 3_600))
