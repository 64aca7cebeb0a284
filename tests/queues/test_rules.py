from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safedefer.ledger import Admission, AttemptRecord, EndState, Execution
from safedefer.queues.base import Lease, Settlement, Verdict
from safedefer.queues.rules import (
    LOST_LEASE,
    MOST_COUNTED,
    Counters,
    DeliveryResult,
    Ending,
    Known,
    admit,
    after_lost_lease,
    after_retry,
    by_ledger,
    end_of,
    judge,
    leaves_charge,
    may_cancel,
    must_be_alone,
    plus,
    retry_charges,
    sets_time,
)
from tests.queues.contract import make_task

SUCCEEDED, FAILED, CANCELLED, RETRY = EndState.SUCCEEDED, EndState.FAILED, EndState.CANCELLED, EndState.RETRY
DONE = Settlement(verdict=Verdict.DONE)
UNCHARGED = Settlement(verdict=Verdict.DONE, charged=False)
GAVE_UP = Settlement(verdict=Verdict.DEAD, reason="retry-limit")
VAGUE = Settlement(verdict=Verdict.DEAD)
REJECTED = Settlement(verdict=Verdict.DEAD, reason="rejected", charged=False)

# settlement, what the ledger knows, how the task ends
ENDS = [
    (DONE, None, Ending(SUCCEEDED, None, True)),
    (UNCHARGED, None, Ending(SUCCEEDED, None, False)),
    (GAVE_UP, None, Ending(FAILED, "retry-limit", True)),
    (VAGUE, None, Ending(FAILED, None, True, True)),
    (REJECTED, None, Ending(FAILED, "rejected", False, True)),
    # A run that has not ended overrules nothing.
    (DONE, Known("running", True, True), Ending(SUCCEEDED, None, True)),
    (GAVE_UP, Known("running", False), Ending(FAILED, "retry-limit", True)),
    (GAVE_UP, Known(RETRY, True), Ending(FAILED, "retry-limit", True)),
    # The ledger agrees; what is not uncharged was charged with its lost lease.
    (DONE, Known(SUCCEEDED, True), Ending(SUCCEEDED, None, True)),
    (DONE, Known(SUCCEEDED, False), Ending(SUCCEEDED, None, False)),
    (UNCHARGED, Known(SUCCEEDED, True), Ending(SUCCEEDED, None, False)),
    (GAVE_UP, Known(FAILED, True), Ending(FAILED, "retry-limit", True)),
    (VAGUE, Known(FAILED, True), Ending(FAILED, None, True, True)),
    # The ledger has the last word, and the reason of what it overrules goes.
    (DONE, Known(FAILED, False), Ending(FAILED, None, False, True)),
    (DONE, Known(CANCELLED, True), Ending(CANCELLED, None, True)),
    (GAVE_UP, Known(SUCCEEDED, True), Ending(SUCCEEDED, None, True)),
    (GAVE_UP, Known(CANCELLED, False), Ending(CANCELLED, None, False)),
    (REJECTED, Known(SUCCEEDED, True), Ending(SUCCEEDED, None, False)),
]


@pytest.mark.parametrize(("settlement", "known", "expected"), ENDS)
def test_the_ledger_has_the_last_word_on_how_a_task_ends(settlement, known, expected):
    assert end_of(settlement, known) == expected


BEFORE = Counters(3, 5, 2, 10.0, 1, 20.0, 503, "busy")

# before, settlement, after
RETRIES = [
    (Counters(), Settlement(verdict=Verdict.RETRY, status=500, reason="retry"),
     Counters(1, 1, 0, 100.0, 0, None, 500, "retry")),
    (Counters(), Settlement(verdict=Verdict.RETRY, charged=False, rejected=True, status=500, reason="rejected"),
     Counters(0, 1, 0, None, 1, 107.0, 500, "rejected")),
    (BEFORE, Settlement(verdict=Verdict.RETRY, executed=True, status=404, reason="retry"),
     Counters(4, 6, 3, 10.0, 1, 20.0, 404, "retry")),
    (BEFORE, Settlement(verdict=Verdict.RETRY, rejected=True, charged=False), Counters(3, 6, 2, 10.0, 2, 20.0, None, None)),
]  # fmt: skip


@pytest.mark.parametrize(("before", "settlement", "after"), RETRIES)
def test_a_retry_counts_what_its_settlement_says(before, settlement, after):
    assert after_retry(before, settlement, leased_at=100.0, now=107.0) == after


RECORD = AttemptRecord("id", "aud", 100.0, 160.0, "retry", None, LOST_LEASE)

# what the ledger knows, attempts and first attempt after, record
LOST = [
    (None, 3, 10.0, None),
    (Known("running", False, True), 3, 10.0, None),
    (Known("running", True, True), 4, 10.0, RECORD),
    (Known("running", True, False), 4, 10.0, RECORD),
    (Known(RETRY, True), 4, 10.0, None),
    (Known(SUCCEEDED, True), 4, 10.0, None),
    (Known(FAILED, False), 3, 10.0, None),
]


@pytest.mark.parametrize(("known", "attempts", "first", "record"), LOST)
def test_a_lost_lease_is_an_attempt_if_the_run_had_begun(known, attempts, first, record):
    lost = after_lost_lease(BEFORE, ("aud", "id"), known, leased_at=100.0, now=160.0)
    assert lost.counters == Counters(attempts, 6, 2, first, 1, 20.0, None, LOST_LEASE)
    assert (lost.charged, lost.record) == (attempts == 4, record)


@pytest.mark.parametrize(("leased_at", "first"), [(100.0, 100.0), (None, 160.0)])
def test_the_first_attempt_began_when_its_lost_lease_did(leased_at, first):
    lost = after_lost_lease(Counters(), ("aud", "id"), Known("running", True), leased_at=leased_at, now=160.0)
    assert (lost.counters.attempts, lost.counters.first_attempt) == (1, first)


@pytest.mark.parametrize(
    ("charged", "rejected", "sets"), [(True, False, True), (False, True, True), (False, False, False)]
)
def test_what_no_handler_took_moves_no_retry(charged, rejected, sets):
    assert sets_time(Settlement(verdict=Verdict.RETRY, charged=charged, rejected=rejected)) is sets


# state, uncharged, alive, early, what another run is told
RETRIES_ADMITTED = [
    (RETRY, False, False, False, Admission.RUN),
    (RETRY, False, False, True, Admission.EARLY),
    (RETRY, True, False, True, Admission.UNSETTLED),
    (RETRY, True, False, False, Admission.UNSETTLED),
    ("running", False, False, True, Admission.EARLY),
    ("running", True, False, False, Admission.RUN),
    ("running", True, True, True, Admission.RUNNING),
    (SUCCEEDED, True, False, True, Admission.DUPLICATE),
]


@pytest.mark.parametrize(("state", "uncharged", "alive", "early", "expected"), RETRIES_ADMITTED)
def test_a_task_that_failed_runs_when_its_delivery_is_settled_and_its_time_has_come(
    state, uncharged, alive, early, expected
):
    known = Known(str(state), uncharged, alive, early)
    run = Execution("aud", "id", b"digest", "you", 1000)
    assert admit(run, digest=b"digest", owner="me", entry=known) is expected


# what the ledger knows before, losses after, since when, whether the task is poison at 1000
LOSSES = [
    (Known("running", True), 1, 1000.0, False),
    (Known("running", True, True), 1, 1000.0, False),  # its end, should it come, resets the count
    (Known("running", True, losses=1, first_loss=300.0), 2, 300.0, False),
    (Known("running", True, losses=3, first_loss=10.0), 4, 10.0, False),
    (Known("running", True, losses=4, first_loss=400.5), 5, 400.5, False),
    (Known("running", True, losses=4, first_loss=400.0), 5, 400.0, True),
    (Known("running", True, losses=9, first_loss=400.5), 10, 400.5, False),
    (Known("running", True, losses=9, first_loss=10.0), 10, 10.0, True),
    (Known("running", True, losses=2**40, first_loss=10.0), MOST_COUNTED + 1, 10.0, True),
    # Never begun, or charged before: no loss, however many there were.
    (Known("running", False, losses=9, first_loss=10.0), 9, 10.0, False),
    (Known(RETRY, True, losses=9, first_loss=10.0), 9, 10.0, False),
    (Known(SUCCEEDED, True), 0, None, False),
    (None, 0, None, False),
]


@pytest.mark.parametrize(("known", "losses", "since", "poison"), LOSSES)
def test_a_run_that_began_and_never_ended_is_a_loss_and_the_fifth_over_ten_minutes_is_poison(
    known, losses, since, poison
):
    lost = after_lost_lease(BEFORE, ("aud", "id"), known, leased_at=900.0, now=1000.0)
    assert (lost.losses, lost.first_loss, lost.is_poison(1000.0)) == (losses, since, poison)


@pytest.mark.parametrize(("losses", "alone"), [(0, False), (1, False), (2, True), (5, True)])
def test_a_task_is_alone_from_its_second_loss_on(losses, alone):
    assert must_be_alone(losses) is alone


@pytest.mark.parametrize(
    ("end", "outcome", "charge"), [(RETRY, "retry", True), (RETRY, "rejected", False), (FAILED, "rejected", True)]
)
def test_a_rejected_run_is_not_to_be_charged(end, outcome, charge):
    assert leaves_charge(end, RECORD._replace(outcome=outcome)) is charge


# charged, what the ledger knows, whether the run is charged
CHARGES = [
    (True, None, False),
    (False, None, False),
    (True, Known("running", True, True), True),
    (False, Known("running", True, True), False),
    (False, Known(RETRY, True), True),
    (False, Known(SUCCEEDED, True), False),
    (True, Known(SUCCEEDED, True), True),
]


@pytest.mark.parametrize(("charged", "known", "expected"), CHARGES)
def test_a_run_that_another_delivery_began_and_that_goes_on_stays_to_be_charged(charged, known, expected):
    assert retry_charges(Settlement(verdict=Verdict.RETRY, charged=charged), known) is expected


# state, alive, whether the task can be cancelled, what a run by the same owner and by another one is told
STATES = [
    ("running", True, False, Admission.RUN, Admission.RUNNING),
    ("running", False, True, Admission.RUN, Admission.RUN),
    (RETRY, False, True, Admission.UNSETTLED, Admission.UNSETTLED),
    (SUCCEEDED, False, False, Admission.DUPLICATE, Admission.DUPLICATE),
    (FAILED, False, False, Admission.DUPLICATE, Admission.DUPLICATE),
    (CANCELLED, False, False, Admission.DUPLICATE, Admission.DUPLICATE),
]


@pytest.mark.parametrize(("state", "alive", "cancel", "same", "other"), STATES)
def test_the_ledger_says_what_runs_and_what_can_be_cancelled(state, alive, cancel, same, other):
    known = Known(str(state), uncharged=True, alive=alive)
    assert may_cancel(known) is cancel
    for owner, expected in (("me", same), ("you", other)):
        run = Execution("aud", "id", b"digest", owner, 1000)
        assert admit(run, digest=b"digest", owner="me", entry=known) is expected
        assert admit(run, digest=b"another", owner="me", entry=known) is Admission.CONFLICT


def lease_of(**counted):
    return Lease(make_task(), "owner", 160.0)._replace(**counted)


NO_ANSWER = Settlement(verdict=Verdict.RETRY, at=5.0, reason="no-response", answered=False)
GIVEN_UP = replace(NO_ANSWER, verdict=Verdict.DEAD, at=None, reason="retry-limit")
DEADLINE = Settlement(verdict=Verdict.DEAD, status=500, reason="retry-limit")
# What the dispatcher says, what the ledger knows: verdict, whether it is charged, whether it counts as a rejection
BY_LEDGER = [
    *[(item, Known(str(SUCCEEDED), uncharged=True), Verdict.DONE, True, False) for item in (NO_ANSWER, GIVEN_UP)],
    *[(item, Known(str(CANCELLED)), Verdict.DONE, True, False) for item in (NO_ANSWER, GIVEN_UP)],
    *[(item, Known("running", True, True), Verdict.RETRY, False, False) for item in (NO_ANSWER, GIVEN_UP, DEADLINE)],
    *[(item, None, Verdict.RETRY, False, True) for item in (NO_ANSWER, GIVEN_UP)],
    *[(item, Known(str(RETRY)), Verdict.RETRY, False, True) for item in (NO_ANSWER, GIVEN_UP)],
    *[(NO_ANSWER, Known(state, uncharged=True), Verdict.RETRY, True, False) for state in ("running", str(RETRY))],
    *[(GIVEN_UP, Known(state, uncharged=True), Verdict.DEAD, True, False) for state in ("running", str(RETRY))],
    (DEADLINE, None, Verdict.DEAD, True, False),
    (DEADLINE, Known("running", uncharged=True), Verdict.DEAD, True, False),
    (replace(DEADLINE, reason=None, status=200), Known("running", True, True), Verdict.DEAD, True, False),
]


@pytest.mark.parametrize(("said", "known", "verdict", "charged", "rejected"), BY_LEDGER)
def test_the_ledger_is_asked_before_a_delivery_without_an_answer_is_charged(said, known, verdict, charged, rejected):
    found = by_ledger(lease_of(), said, known, now=100.0)
    assert (found.verdict, found.charged, found.rejected) == (verdict, charged, rejected)
    if verdict is Verdict.DONE:
        assert end_of(found, known).state == known.state
    if verdict is Verdict.RETRY and not charged:
        assert (100.0 < found.at <= 101.0, found.reason) == (
            True,
            "deadline-exceeded" if said is DEADLINE else "no-response",
        )


def test_a_task_whose_run_never_begins_is_given_up_by_the_limit_of_rejections():
    lease = lease_of(rejections=9, first_rejection=0.0)
    assert by_ledger(lease, NO_ANSWER, None, now=3599.0).verdict is Verdict.RETRY
    found = by_ledger(lease, NO_ANSWER, None, now=3600.0)
    assert (found.verdict, found.charged, found.reason) == (Verdict.DEAD, False, "no-response")


def test_a_task_that_the_ledger_does_not_know_can_be_cancelled():
    assert may_cancel(None)


@given(st.integers(0, 2**64), st.booleans())
def test_counters_stop_where_one_more_still_fits(count, more):
    assert plus(count, more) == (count + more if count <= MOST_COUNTED else MOST_COUNTED + more)
    assert plus(count, more) < 2**31


def test_counters_are_fields_of_a_lease():
    assert Lease._fields[3:] == (*Counters._fields, "losses")
    assert Counters.of(Lease(make_task(), "owner", 160.0, *BEFORE)) == BEFORE


def failed(options, queues_own) -> Settlement:
    lease = Lease(make_task(eta=100.0, retry_options=options), "owner", 160.0, 2)
    return judge(lease, DeliveryResult(500, "retry"), queues_own=queues_own, now=100.0, jitter=0.0)


def test_a_task_without_an_option_of_its_own_has_that_of_its_queue():
    queues_own = {"task_retry_limit": 2, "min_backoff_seconds": 5}
    assert failed({"task_retry_limit": 3}, queues_own).at == 120.0
    assert failed({}, queues_own).verdict is Verdict.DEAD
    assert failed({}, None).at == pytest.approx(100.4)


def test_options_that_contradict_each_other_are_the_tasks_own():
    assert failed({"max_backoff_seconds": 1}, {"min_backoff_seconds": 5}).at == pytest.approx(100.4)
    assert failed({"task_retry_limit": "x"}, {"min_backoff_seconds": 5}).at == pytest.approx(100.4)


def test_a_handler_judges_without_http():
    lease = Lease(make_task(eta=100.0), "owner", 160.0)
    early = judge(lease, DeliveryResult(503, "early"), now=100.0, jitter=0.0)
    assert (early.verdict, early.at, early.charged) == (Verdict.RETRY, 101.0, False)
    assert judge(lease, DeliveryResult(503, "early", 500.0), now=100.0, jitter=0.0).at == 160.0
    assert judge(lease, DeliveryResult(503, None, 500.0), now=100.0, jitter=0.0).at == 600.0
    assert judge(lease, DeliveryResult(200, "failed"), now=100.0, jitter=0.0) == Settlement(
        verdict=Verdict.DEAD, status=200, executed=True
    )


# What a proxy says for a handler that it does not reach: status, deliveries and attempts before it, seconds, reason.
PROXY = [
    (502, 0, 0, 0.1, "unreachable"),
    (504, 1, 0, 0.2, "unreachable"),
    (503, 2, 0, 0.4, "busy"),
    (429, 3, 0, 0.8, "busy"),
    (502, 7, 5, 0.4, "unreachable"),
    # Lost leases may have been charged without a delivery, and a storage writer may write anything.
    (502, 0, 9, 0.1, "unreachable"),
    (502, MOST_COUNTED, 0, 60.0, "unreachable"),
]


@pytest.mark.parametrize(("status", "retries", "attempts", "seconds", "reason"), PROXY)
@pytest.mark.parametrize("outcome", [None, ""])
def test_an_answer_of_a_proxy_charges_nothing_and_waits_by_what_was_not_charged(
    status, retries, attempts, seconds, reason, outcome
):
    limits = {"task_retry_limit": 0, "task_age_limit": 1}  # both are exceeded: only a charged attempt ends a task
    lease = Lease(make_task(eta=1.0, retry_options=limits), "owner", 160.0, attempts, retries)
    settled = judge(lease, DeliveryResult(status, outcome), now=100.0, jitter=0.0)
    assert settled == Settlement(
        verdict=Verdict.RETRY, at=pytest.approx(100.0 + seconds), charged=False, status=status, reason=reason
    )
    assert 100.0 + seconds / 2 <= judge(lease, DeliveryResult(status, outcome), now=100.0, jitter=1.0).at < settled.at


@pytest.mark.parametrize(("status", "outcome"), [(500, None), (404, None), (502, "retry"), (503, "other")])
def test_what_is_not_a_proxys_answer_for_its_handler_is_charged(status, outcome):
    lease = Lease(make_task(eta=100.0), "owner", 160.0)
    assert judge(lease, DeliveryResult(status, outcome), now=100.0, jitter=0.0).charged
