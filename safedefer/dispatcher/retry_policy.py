"""Judges a task by what came of an attempt to deliver it: the answer, with its ``Retry-After``, or why there is none.

The decisions that the handler shares, and the spacing of retries, are in ``queues.rules``.

Only a handler that took the request charges an attempt: one that is unreachable, busy, or running the task
already charges none.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

from safedefer.dispatcher.signed_route import StorageMismatch
from safedefer.dispatcher.transport import Interrupted
from safedefer.errors import QueueError, RejectedTask
from safedefer.headers import Answer, Response, read_answer
from safedefer.queues import rules
from safedefer.queues.base import Lease, Settlement
from safedefer.queues.rates import MAX_HOLD
from safedefer.queues.rules import UNREADABLE, DeliveryResult

#: Seconds until a task is tried again whose stored token could not be read.
_STORAGE_SECONDS: Final = 1.0
#: The longest HTTP date, with room to spare.
_DATE_LENGTH: Final = 64


def asks_to_wait(response: Response, *, now: float) -> float | None:
    """Return the seconds for which an answer asks to send no more tasks of the queue; None if it does not.

    Such an answer is 429 or 503 with ``Retry-After``, from our handler or a proxy. One whose outcome is ``early``
    concerns its task only.
    """
    return wait_asked_for(read_answer(response), now=now)


def wait_asked_for(answer: Answer, *, now: float) -> float | None:
    """As ``asks_to_wait``, for an answer whose headers are read."""
    if answer.status not in {429, 503} or answer.retry_after is None or answer.outcome == "early":
        return None
    return _seconds(answer.retry_after, now)


class UnreadableToken(Exception):
    """The stored token is empty, or larger than any of ours."""


def judge_attempt(
    lease: Lease,
    found: Answer | Exception,
    signed: Mapping[str, float] | None,
    queue_options: Mapping[str, Mapping[str, float]],
    *,
    now: float,
    jitter: float,
) -> Settlement:
    """Return the settlement of a task by what came of an attempt.

    Args:
        lease: The delivery.
        found: The answer of the handler; or why there is none.
        signed: The retry options that were signed with the task; None if none were, or nobody has read them.
        queue_options: Retry options by queue, for what a task has no option of its own.
        now: The time.
        jitter: From 0 to 1.
    """
    finding = _answered(found, now) if isinstance(found, Answer) else _unanswered(found)
    queues_own = queue_options.get(lease.task.queue)
    return rules.judge(lease, finding, signed=signed, queues_own=queues_own, now=now, jitter=jitter)


def judge(lease: Lease, response: Response, *, now: float, jitter: float) -> Settlement:
    """Return the settlement of a task by the answer of its handler, and by the task's own retry options."""
    return judge_attempt(lease, read_answer(response), None, {}, now=now, jitter=jitter)


def _answered(answer: Answer, now: float) -> DeliveryResult:
    wait = None
    if answer.retry_after is not None:
        wait = _seconds(answer.retry_after, now) if answer.outcome else wait_asked_for(answer, now=now)
    return DeliveryResult(answer.status, answer.outcome, wait)


def _unanswered(why: Exception) -> DeliveryResult:
    if isinstance(why, Interrupted):
        return DeliveryResult()
    if isinstance(why, UnreadableToken):
        return DeliveryResult(reason=UNREADABLE, parked=True)
    if isinstance(why, StorageMismatch):
        return DeliveryResult(reason="storage-mismatch", parked=True)
    if isinstance(why, QueueError):
        return DeliveryResult(outcome="busy", wait=_STORAGE_SECONDS)
    if isinstance(why, RejectedTask):
        # As the handler would answer it: another process may have the key, or read such claims.
        return DeliveryResult(outcome="rejected" if why.authentic else "refused", reason=why.slug)
    return DeliveryResult(outcome="refused")


def _seconds(text: str, now: float) -> float:
    """Read ``Retry-After``, seconds or an HTTP date (RFC 9110, section 10.2.3): from 1 second to an hour; 1 if it is neither."""
    if text.isascii() and text.isdigit():
        # More digits are above any bound, or no number that somebody meant.
        return float(min(max(int(text), 1), MAX_HOLD)) if len(text) <= 9 else 1.0  # noqa: PLR2004  # a billion
    if not text.isascii() or len(text) > _DATE_LENGTH:
        return 1.0
    try:
        date = parsedate_to_datetime(text)
        until = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return 1.0
    return min(max(until - now, 1.0), MAX_HOLD)
