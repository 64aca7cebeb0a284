"""Read the HTTP answer of a handler; ``safedefer.queues.rules`` judges the task by it.

Only a handler that took the request charges an attempt: one that is unreachable, busy, or running the task
already charges none.
"""

from __future__ import annotations

from safedefer.headers import Answer, Response, read_answer
from safedefer.queues.base import Lease, Settlement
from safedefer.queues.rates import MAX_HOLD
from safedefer.queues.rules import judge_outcome


def asks_to_wait(response: Response) -> float | None:
    """Return the seconds for which an answer asks to send no more tasks of the queue; None if it does not.

    Such an answer is 429 or 503 with ``Retry-After``, from our handler or a proxy. One whose outcome is ``early``
    concerns its task only.
    """
    return wait_asked_for(read_answer(response))


def wait_asked_for(answer: Answer) -> float | None:
    """As ``asks_to_wait``, for an answer whose headers are read."""
    if answer.status not in {429, 503} or answer.retry_after is None or answer.outcome == "early":
        return None
    return min(_seconds(answer.retry_after), MAX_HOLD)


def judge(lease: Lease, response: Response, *, now: float, jitter: float) -> Settlement:
    """Return the settlement of a task by the answer of its handler."""
    return judge_answer(lease, read_answer(response), now=now, jitter=jitter)


def judge_answer(lease: Lease, answer: Answer, *, now: float, jitter: float) -> Settlement:
    """As ``judge``, for an answer whose headers are read."""
    wait = None
    if answer.retry_after is not None:
        wait = _seconds(answer.retry_after) if answer.outcome else wait_asked_for(answer)
    return judge_outcome(lease, answer.status, answer.outcome, wait=wait, now=now, jitter=jitter)


def _seconds(text: str) -> float:
    """Read ``Retry-After`` in seconds; 1 if it is a date, or has more than 9 digits."""
    if not text.isascii() or not text.isdigit() or len(text) > 9:  # noqa: PLR2004  # a billion
        return 1.0
    return float(min(max(int(text), 1), 3_600))
