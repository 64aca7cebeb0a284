"""What becomes of a task by what came of an attempt to deliver it: an answer, or why there is none."""

import pytest

from safedefer.dispatcher.retry_policy import UnreadableToken, judge_attempt
from safedefer.dispatcher.signed_route import StorageMismatch
from safedefer.dispatcher.transport import Interrupted
from safedefer.errors import BadSignature, InvalidClaims, QueueUnavailable
from safedefer.headers import Answer
from safedefer.queues.base import Lease, Verdict
from tests.queues.contract import make_task

RETRY, DONE, DEAD = Verdict.RETRY, Verdict.DONE, Verdict.DEAD
# What came of it; the verdict, seconds until the next attempt, charged, rejected, the reason, and that of the record.
FOUND = [
    (Answer(200, "succeeded", None), DONE, None, True, False, None, None),
    (Answer(204, None, None), DONE, None, True, False, None, None),
    (Answer(200, "failed", None), DEAD, None, True, False, None, None),
    (Answer(500, "retry", None), RETRY, 0.1, True, False, "retry", None),
    (Answer(503, "busy", "7"), RETRY, 7.0, False, False, "busy", None),
    (Answer(503, None, "7"), RETRY, 7.0, False, False, "busy", None),
    (Answer(500, None, "7"), RETRY, 0.1, True, False, "retry", None),
    (Answer(502, None, None), RETRY, 0.1, False, False, "unreachable", None),
    (Answer(403, "refused", None), RETRY, 0.1, False, True, "refused", "refused"),
    (Answer(500, "rejected", None), RETRY, 0.1, False, True, "rejected", None),
    (Interrupted(), RETRY, 0.1, True, False, "no-response", "no-response"),
    (UnreadableToken(), DEAD, None, False, True, "unreadable", "unreadable"),
    (StorageMismatch("url"), DEAD, None, False, True, "storage-mismatch", "storage-mismatch"),
    (QueueUnavailable("locked"), RETRY, 1.0, False, False, "busy", None),
    (InvalidClaims("odd"), RETRY, 0.1, False, True, "rejected", InvalidClaims.slug),
    (BadSignature("other"), RETRY, 0.1, False, True, "refused", BadSignature.slug),
    (ZeroDivisionError(), RETRY, 0.1, False, True, "refused", "refused"),
]


@pytest.mark.parametrize(("found", "verdict", "seconds", "charged", "rejected", "reason", "recorded"), FOUND)
def test_a_task_is_judged_by_what_came_of_its_delivery(found, verdict, seconds, charged, rejected, reason, recorded):
    lease = Lease(make_task(eta=100.0), "owner", 160.0)
    settled = judge_attempt(lease, found, None, {}, now=100.0, jitter=0.0)
    assert (settled.verdict, settled.charged, settled.rejected, settled.reason) == (verdict, charged, rejected, reason)
    assert settled.at == (None if seconds is None else 100.0 + seconds)
    assert (None if settled.record is None else settled.record.reason) == recorded


@pytest.mark.parametrize("outcome", ["parked", "unreadable", "storage-mismatch", "dead"])
@pytest.mark.parametrize("status", [403, 500, 503])
def test_no_answer_can_park_a_task(status, outcome):
    """Whoever answers for a handler, such as a proxy, chooses the header."""
    lease = Lease(make_task(eta=100.0), "owner", 160.0)
    settled = judge_attempt(lease, Answer(status, outcome, None), None, {}, now=100.0, jitter=0.0)
    assert (settled.verdict, settled.charged, settled.reason) == (RETRY, True, "retry")


def test_options_that_were_signed_count_before_those_that_are_stored_and_those_before_the_queues():
    task = make_task(eta=100.0, retry_options={"min_backoff_seconds": 5.0})
    lease, queues = Lease(task, "owner", 160.0), {"default": {"min_backoff_seconds": 7.0, "task_retry_limit": 0}}

    def judged(signed, options):
        settled = judge_attempt(lease, Answer(500, "retry", None), signed, options, now=100.0, jitter=0.0)
        return settled.verdict, settled.at

    assert judged(None, {}) == (RETRY, 105.0)
    assert judged({"min_backoff_seconds": 6.0}, {}) == (RETRY, 106.0)
    assert judged({}, {}) == (RETRY, 100.1)
    assert judged(None, queues) == (DEAD, None)
    assert judged({"task_retry_limit": 3}, queues) == (RETRY, 107.0)
    assert judged(None, {"other": {"task_retry_limit": 0}}) == (RETRY, 105.0)
