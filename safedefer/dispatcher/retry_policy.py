"""Reads a handler's HTTP answer; ``safedefer.queues.rules`` says what becomes of the task.

An attempt is charged only when the handler took the request: one that is down, busy or running the
task already charges none.
"""

from __future__ import annotations

from safedefer.headers import Answer, Response, read_answer
from safedefer.queues.base import Lease, Settlement
from safedefer.queues.rates import MAX_HOLD
from safedefer.queues.rules import judge_outcome


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
    wait = None
    if answer.retry_after is not None:
        wait = _seconds(answer.retry_after) if answer.outcome else wait_asked_for(answer)
    return judge_outcome(lease, answer.status, answer.outcome, wait=wait, now=now, jitter=jitter)


def _seconds(text: str) -> float:
    """Read ``Retry-After`` in seconds; 1 if it is a date, or beyond what a number of seconds can be."""
    if not text.isascii() or not text.isdigit() or len(text) > 9:  # noqa: PLR2004  # a billion
        return 1.0
    return float(min(max(int(text), 1), 3_600))
