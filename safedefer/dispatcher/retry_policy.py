"""Reads the HTTP answer of a handler, its ``Retry-After`` too; ``queues.rules`` judges the task by it, and spaces retries.

Only a handler that took the request charges an attempt: one that is unreachable, busy, or running the task
already charges none.
"""

from __future__ import annotations

from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

from safedefer.headers import Answer, Response, read_answer
from safedefer.queues.base import Lease, Settlement
from safedefer.queues.rates import MAX_HOLD
from safedefer.queues.rules import judge_outcome

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


def judge(lease: Lease, response: Response, *, now: float, jitter: float) -> Settlement:
    """Return the settlement of a task by the answer of its handler."""
    return judge_answer(lease, read_answer(response), now=now, jitter=jitter)


def judge_answer(lease: Lease, answer: Answer, *, now: float, jitter: float) -> Settlement:
    """As ``judge``, for an answer whose headers are read."""
    wait = None
    if answer.retry_after is not None:
        wait = _seconds(answer.retry_after, now) if answer.outcome else wait_asked_for(answer, now=now)
    return judge_outcome(lease, answer.status, answer.outcome, wait=wait, now=now, jitter=jitter)


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
