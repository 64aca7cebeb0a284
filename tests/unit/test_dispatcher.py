"""The dispatcher: backoff, verdicts, and what hostile or failing storage and handlers do to it."""

import asyncio
import logging
import math
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safedefer import Key, Keyring, KeyState, Policy, TaskRetryOptions
from safedefer.delivery.handler import Response
from safedefer.dispatcher import loop
from safedefer.dispatcher.holds import TargetHolds
from safedefer.dispatcher.loop import (
    REJECT_LIMIT,
    REJECT_SECONDS,
    Dispatcher,
    DispatcherOptions,
    InProcessDelivery,
    Interrupted,
    Unreachable,
    asks_to_wait,
    attempt_headers,
    backoff,
    gives_up,
    judge,
)
from safedefer.dispatcher.prefetch import Prefetch
from safedefer.dispatcher.request_headers import delivery_headers
from safedefer.dispatcher.shares import TargetShares, share
from safedefer.errors import InvalidTaskError, QueueUnavailable
from safedefer.headers import read_hints
from safedefer.ledger import AttemptRecord
from safedefer.queues.base import Lease, QueuedTask, TaskState, Verdict
from safedefer.queues.memory.queue import MemoryQueue
from tests import sample_tasks as tasks
from tests.unit.apps import SECRET, make_app, until
from tests.unit.delivering import Delivering

NOW = 1_000_000.0


def task_of(number=1, **changes):
    values = {
        "id": f"{number:032x}", "queue": "default", "token": b"token", "audience": "test:default:default:/x", "url": "/x",
        "target": "default", "eta": NOW, "created": NOW, "expires": 2_000_000, "digest": bytes(32),
    }  # fmt: skip
    return QueuedTask(**{**values, **changes})


def lease_of(**changes):
    task = {name: changes.pop(name) for name in list(changes) if name in QueuedTask._fields}
    return Lease(**{"task": task_of(**task), "owner": "me", "until": NOW + 60, **changes})


def answer(status, outcome=None, **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(status, {**({"Safedefer-Outcome": outcome} if outcome else {}), **named}, b"")


def verdict(lease, response, now=NOW, jitter=0.0):
    return judge(lease, response, now=now, jitter=jitter)


# --- Backoff --------------------------------------------------------------------------------------

# From App Engine's own words: "if min_backoff_seconds is 10, max_backoff_seconds is 300 and max_doublings is 3, then
# intervals are 10s, 20s, 40s, 80s, 160s, 240s, 300s, 300s".
DOCUMENTED = (
    TaskRetryOptions(min_backoff_seconds=10, max_backoff_seconds=300, max_doublings=3),
    [10, 20, 40, 80, 160, 240, 300, 300],
)
BACKOFF = [
    DOCUMENTED,
    (TaskRetryOptions(), [0.1, 0.2, 0.4, 0.8, 1.6, 3.2]),
    (TaskRetryOptions(max_doublings=0, min_backoff_seconds=5), [5, 10, 15, 20]),
    (TaskRetryOptions(min_backoff_seconds=5, max_backoff_seconds=5), [5, 5, 5]),
    (TaskRetryOptions(min_backoff_seconds=0), [0, 0, 0]),
    (TaskRetryOptions(min_backoff_seconds=5000), [5000, 5000]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), BACKOFF)
def test_retries_wait_as_app_engine_documents(options, expected):
    assert [backoff(options, n) for n in range(1, len(expected) + 1)] == pytest.approx(expected)


@given(
    st.floats(0, 1e6), st.floats(0, 1e6), st.integers(0, 10**6), st.integers(1, 10**9), st.floats(0, 1)
)  # fmt: skip
def test_waits_grow_to_a_maximum_and_jitter_takes_away(first, second, doublings, n, jitter):
    low, high = sorted((first, second))
    options = TaskRetryOptions(min_backoff_seconds=low, max_backoff_seconds=high, max_doublings=doublings)
    wait = backoff(options, n)
    assert math.isfinite(wait)
    assert low <= wait <= high
    assert wait <= backoff(options, n + 1)
    assert 0 <= backoff(options, n, jitter=jitter) <= wait
    exponent = min(n - 1, doublings)
    if exponent < 60:
        assert wait == pytest.approx(min(high, low * 2**exponent * max(n - exponent, 1)))


# attempts, age -> given up?
GIVES_UP = [
    ({}, 10**6, 1e9, None),
    ({"task_retry_limit": 0}, 1, 0, "retry-limit"),
    ({"task_retry_limit": 2}, 2, 0, None),
    ({"task_retry_limit": 2}, 3, 0, "retry-limit"),
    ({"task_age_limit": 60}, 1, 60, None),
    ({"task_age_limit": 60}, 1, 60.1, "age-limit"),
    ({"task_retry_limit": 2, "task_age_limit": 60}, 3, 60, None),
    ({"task_retry_limit": 2, "task_age_limit": 60}, 2, 61, None),
    ({"task_retry_limit": 2, "task_age_limit": 60}, 3, 61, "retry-and-age-limit"),
]


@pytest.mark.parametrize(("limits", "attempts", "age", "expected"), GIVES_UP)
def test_a_task_is_given_up_when_all_its_limits_are_exceeded(limits, attempts, age, expected):
    assert gives_up(TaskRetryOptions(**limits), attempts=attempts, age=age) == expected


# --- Verdicts -------------------------------------------------------------------------------------

# status, outcome -> verdict, charged, executed, rejected
TABLE = [
    (200, "succeeded", Verdict.DONE, True, True, False),
    (200, "duplicate", Verdict.DONE, True, True, False),
    (200, "failed", Verdict.DEAD, True, True, False),
    (408, "retry", Verdict.RETRY, True, True, False),
    (500, "retry", Verdict.RETRY, True, False, False),
    (409, "running", Verdict.RETRY, False, False, False),
    (503, "early", Verdict.RETRY, False, False, False),
    (503, "busy", Verdict.RETRY, False, False, False),
    (500, "rejected", Verdict.RETRY, False, False, True),
    (403, "refused", Verdict.RETRY, False, False, True),
    (413, "refused", Verdict.RETRY, False, False, True),
    (404, None, Verdict.RETRY, True, True, False),
    (301, None, Verdict.RETRY, True, True, False),
    (500, None, Verdict.RETRY, True, False, False),
    (501, None, Verdict.RETRY, True, False, False),
    (429, None, Verdict.RETRY, False, False, False),
    (502, None, Verdict.RETRY, False, False, False),
    (503, None, Verdict.RETRY, False, False, False),
    (504, None, Verdict.RETRY, False, False, False),
    (502, "other", Verdict.RETRY, True, False, False),
    (429, "other", Verdict.RETRY, True, True, False),
    (200, None, Verdict.DONE, True, True, False),
    (204, "other", Verdict.DONE, True, True, False),
]


@pytest.mark.parametrize(("status", "outcome", "expected", "charged", "executed", "rejected"), TABLE)
def test_the_answer_says_what_becomes_of_a_task(status, outcome, expected, charged, executed, rejected):
    settled = verdict(lease_of(), answer(status, outcome))
    assert (settled.verdict, settled.charged, settled.executed, settled.rejected, settled.status) == (
        expected, charged, executed, rejected, status,
    )  # fmt: skip
    assert (settled.at is not None and settled.at > NOW) is (expected is Verdict.RETRY)


def test_header_names_count_in_any_case():
    lower = Response(200, {"safedefer-outcome": "failed"}, b"")
    assert verdict(lease_of(), lower).verdict is Verdict.DEAD
    busy = Response(503, {"SAFEDEFER-OUTCOME": "busy", "retry-after": "7"}, b"")
    assert verdict(lease_of(), busy).at == NOW + 7


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5", 5),
        ("0", 1),
        ("61", 60),
        ("9" * 30, 1),
        ("-5", 1),
        ("x", 1),
        ("٣", 1),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 60),
    ],
)
def test_a_handler_puts_a_task_off_by_seconds_within_a_minute(text, seconds):
    assert verdict(lease_of(), answer(503, "early", Retry_After=text)).at == NOW + seconds


OCTOBER = 1_445_326_080.0  # Tuesday, 20 October 2015, 07:28:00 UTC

RETRY_AFTER = [
    ("600", 600), ("3600", 3600), ("3601", 3600), ("999999999", 3600), ("9999999999", 1), ("0", 1),
    # The three forms of an HTTP date, and other zones than they allow.
    ("Tue, 20 Oct 2015 07:38:00 GMT", 600), ("Tuesday, 20-Oct-15 07:38:00 GMT", 600), ("Tue Oct 20 07:38:00 2015", 600),
    ("Tue, 20 Oct 2015 09:38:00 +0200", 600), ("Tue, 20 Oct 2015 07:38:00 -0000", 600), ("Tue, 20 Oct 2015 07:38:00", 600),
    ("Tue, 20 Oct 2015 09:38:00 GMT", 3600), ("Fri, 31 Dec 9999 23:59:59 GMT", 3600),
    ("Tue, 20 Oct 2015 07:28:00 GMT", 1), ("Mon, 01 Jan 0001 00:00:00 +1400", 1), ("Fri, 31 Dec 9999 23:59:59 -1400", 3600),
    # Neither seconds nor a date.
    ("", 1), (" ", 1), ("soon", 1), ("-600", 1), ("+600", 1), ("600.0", 1), ("6e2", 1), ("1_0", 1), ("٣", 1), ("nan", 1), ("inf", 1),
    ("Tue, 40 Oct 2015 07:38:00 GMT", 1), ("Tue, 20 Oct 99999999999 07:38:00 GMT", 1), ("Tue, 20 Oct 2015 07:38:00 +99999999", 1),
    ("Tue, 20 Oct 2015 07:38:00 GMT" + " " * 10_000, 1), ("(" * 60, 1), ("Tue, ٢٠ Oct 2015 07:38:00 GMT", 1), ("\0", 1),
]  # fmt: skip


@pytest.mark.parametrize(("text", "seconds"), RETRY_AFTER)
def test_retry_after_is_seconds_or_a_date_up_to_an_hour_ahead(text, seconds):
    assert asks_to_wait(answer(503, Retry_After=text), now=OCTOBER) == seconds
    assert verdict(lease_of(eta=OCTOBER), answer(503, Retry_After=text), now=OCTOBER).at == OCTOBER + seconds


@given(st.text(max_size=80))
def test_no_retry_after_breaks_anything(text):
    assert 1 <= asks_to_wait(answer(503, Retry_After=text), now=OCTOBER) <= 3600


@pytest.mark.parametrize(
    ("count", "since", "expected"),
    [(0, None, Verdict.RETRY), (REJECT_LIMIT - 2, NOW - 2 * REJECT_SECONDS, Verdict.RETRY),
     (REJECT_LIMIT - 1, NOW - REJECT_SECONDS + 1, Verdict.RETRY), (REJECT_LIMIT - 1, NOW - REJECT_SECONDS, Verdict.DEAD),
     (1000, NOW - 1, Verdict.RETRY)],
)  # fmt: skip
@pytest.mark.parametrize(("status", "outcome"), [(500, "rejected"), (403, "refused")])
def test_rejections_are_given_up_after_ten_over_an_hour(count, since, expected, status, outcome):
    settled = verdict(lease_of(rejections=count, first_rejection=since), answer(status, outcome))
    assert settled.verdict is expected
    assert (REJECT_LIMIT, REJECT_SECONDS) == (10, 3600)
    if expected is Verdict.DEAD:
        assert settled.reason == outcome


def test_ten_rejections_with_the_default_backoff_leave_time_for_the_hour():
    waits = [backoff(TaskRetryOptions(), n) for n in range(1, 30)]
    assert sum(waits[:10]) < REJECT_SECONDS < sum(waits)


def test_a_failure_beyond_its_limit_is_a_dead_letter_with_the_limits_name():
    lease = lease_of(retry_options={"task_retry_limit": 1}, attempts=1)
    settled = verdict(lease, answer(500, "retry"))
    assert (settled.verdict, settled.reason) == (Verdict.DEAD, "retry-limit")
    lease = lease_of(retry_options={"task_age_limit": 10}, eta=NOW - 11)
    assert verdict(lease, answer(500, "retry")).reason == "age-limit"


@pytest.mark.parametrize(
    "stored", [{"min_backoff_seconds": "1"}, {"x": 1}, {"max_doublings": -1}, {"task_retry_limit": 1e9}]
)
def test_stored_retry_options_that_make_no_sense_are_the_defaults(stored):
    assert verdict(lease_of(retry_options=stored), answer(500, "retry")).at == pytest.approx(NOW + 0.1)


# --- Headers --------------------------------------------------------------------------------------


def test_a_delivery_carries_app_engines_headers():
    lease = lease_of(
        name="n", queue="mail", headers={"X-Shop": "1", "traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"},
        retries=3, executions=2, previous_response=500, retry_reason="retry", attempts=2,
    )  # fmt: skip
    assert attempt_headers(lease) == {
        "Content-Type": "application/jose", "X-Shop": "1", "traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01",
        "X-AppEngine-QueueName": "mail", "X-AppEngine-TaskName": "n", "X-AppEngine-TaskRetryCount": "3",
        "X-AppEngine-TaskExecutionCount": "2", "X-AppEngine-TaskETA": "1000000.000000",
        "X-AppEngine-TaskPreviousResponse": "500", "X-AppEngine-TaskRetryReason": "retry",
        "Safedefer-Attempt": "3",
    }  # fmt: skip


@pytest.mark.parametrize(("retries", "attempts", "number"), [(0, 0, 1), (6, 0, 1), (6, 2, 3), (2, 2, 3)])
def test_a_delivery_says_which_attempt_it_is_and_those_that_no_handler_took_are_none(retries, attempts, number):
    lease = lease_of(retries=retries, attempts=attempts)
    assert delivery_headers(lease).hints.attempt == number
    assert read_hints(attempt_headers(lease)).attempt == number
    assert [
        (hints.retries, hints.attempt)
        for hints in [read_hints({"safedefer-attempt": str(number), "X-AppEngine-TaskRetryCount": "9"})]
    ] == [(9, number)]


HOSTILE = {
    "header value": {"headers": {"X": "a\r\nEvil: 1"}},
    "header name": {"headers": {"X\r\nEvil": "a"}},
    "host": {"headers": {"Host": "evil"}},
    "length": {"headers": {"content-length": "1"}},
    "coding": {"headers": {"Transfer-Encoding": "chunked"}},
    "queue header": {"headers": {"x-appengine-queuename": "other"}},
    "trace": {"headers": {"traceparent": "a\r\nb"}},
    "not text": {"headers": {"X": 1}},
    "name": {"name": "a\r\nEvil: 1"},
    "queue": {"queue": "a\r\nEvil: 1"},
    "id": {"id": "a\r\nEvil: 1"},
    "other host": {"url": "@evil.example/x"},
    "absolute url": {"url": "http://evil.example/x"},
    "two slashes": {"url": "//evil.example/x"},
    "request line": {"url": "/x HTTP/1.1\r\nEvil: 1"},
    "query": {"url": "/x?y"},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_somebody_wrote_into_the_storage_makes_no_other_request(what):
    with pytest.raises((InvalidTaskError, TypeError)):
        attempt_headers(lease_of(**HOSTILE[what]))


def test_a_stored_reason_that_is_no_slug_is_left_out():
    assert "X-AppEngine-TaskRetryReason" not in attempt_headers(lease_of(retry_reason="a\r\nEvil: 1"))


# --- Work -----------------------------------------------------------------------------------------


class Handler:
    """Answers as it is told: a function of the task, or one answer for all."""

    several = False

    def __init__(self, reply=None):
        self.reply = reply or (lambda task: answer(200, "succeeded"))
        self.seen = []

    async def __call__(self, task, headers):
        self.seen.append(task.id)
        reply = self.reply(task)
        if asyncio.iscoroutine(reply):
            reply = await reply
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def address(self, task):
        return ""


class Targets(Handler):
    """A handler for each target."""

    several = True

    def address(self, task, /):
        return task.target


def dispatch(queue, handler, clock=lambda: NOW, **options):
    return Dispatcher(queue, handler, clock=clock, options=DispatcherOptions(**options))


async def test_run_until_empty_runs_what_is_due_and_leaves_the_rest():
    queue = MemoryQueue()
    queue.enqueue_many([task_of(n) for n in range(1, 41)])
    queue.enqueue_many([task_of(99, eta=NOW + 5)])
    handler = Handler()
    await dispatch(queue, handler).run_until_empty()
    assert sorted(handler.seen) == [task_of(n).id for n in range(1, 41)]
    assert [view.id for view in queue.tasks()] == [task_of(99).id]


async def test_a_dispatcher_can_run_again():
    queue = MemoryQueue()
    handler = Handler()
    dispatcher = dispatch(queue, handler)
    for number in (1, 2):
        queue.enqueue_many([task_of(number)])
        await dispatcher.run_until_empty()
    assert handler.seen == [task_of(1).id, task_of(2).id]


async def test_tasks_that_are_deferred_by_tasks_run_too():
    tasks.reset()
    from safedefer import deferred

    app = make_app()
    deferred.configure(app)
    try:
        app.defer(tasks.defer_another, 20)
        await dispatch(app.queue, InProcessDelivery(app.handle), clock=time.time).run_until_empty()
    finally:
        deferred.configure(None)
    assert tasks.RAN == list(range(20, -1, -1))


async def test_no_more_than_the_concurrency_is_delivered_at_once():
    running = most = 0

    async def slow(task):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.002)
        running -= 1
        return answer(200, "succeeded")

    queue = MemoryQueue()
    queue.enqueue_many([task_of(n) for n in range(1, 61)])
    await dispatch(queue, Handler(slow), concurrency=5).run_until_empty()
    assert most == 5


@pytest.mark.parametrize(
    ("reply", "charged"),
    [(Unreachable("down"), 0), (Interrupted("reset"), 0), (answer(503, "busy"), 0), (answer(503, "early"), 0),
     (answer(409, "running"), 0), (answer(500, "retry"), 1), (answer(403, "refused"), 0), (ValueError("row"), 0)],
)  # fmt: skip
async def test_an_attempt_is_charged_only_if_the_handler_took_it(reply, charged):
    queue = MemoryQueue()
    queue.enqueue_many([task_of()])
    await dispatch(queue, Handler(lambda task: reply)).run_until_empty()
    view = queue.find(task_of().id)
    assert (view.state, view.attempts) == (TaskState.WAITING, charged)
    if isinstance(reply, Interrupted):
        assert [record.reason for record in view.records] == ["no-response"]


async def test_a_hostile_row_is_kept_and_its_neighbours_run(caplog):
    queue = MemoryQueue()
    for number, what in enumerate(HOSTILE, 1):
        queue.enqueue_many([task_of(number, **HOSTILE[what])])
    queue.enqueue_many([task_of(99)])
    handler = Handler()
    await dispatch(queue, handler).run_until_empty()
    assert handler.seen == [task_of(99).id]
    assert len(queue.tasks(states=[TaskState.WAITING])) == len(HOSTILE)
    assert all(record.getMessage().isprintable() for record in caplog.records)


async def test_an_answer_that_no_handler_gives_counts_as_refused_and_the_next_task_runs(caplog):
    queue = MemoryQueue()
    queue.enqueue_many([task_of(1), task_of(2)])
    handler = Handler(lambda task: answer("200" if task.id == task_of(1).id else 200, "succeeded"))
    await asyncio.wait_for(dispatch(queue, handler).run_until_empty(), 30.0)
    view = queue.find(task_of(1).id)
    assert (view.state, view.attempts) == (TaskState.WAITING, 0)
    assert queue.find(task_of(2).id).state is TaskState.SUCCEEDED
    assert [record.outcome for record in view.records] == ["refused"]
    assert "cannot be delivered (TypeError)" in caplog.text


async def test_storage_that_fails_is_tried_again(caplog):
    class Failing(MemoryQueue):
        left = 3

        def _maybe(self):
            if self.left:
                self.left -= 1
                raise [QueueUnavailable("locked"), ValueError("a row"), QueueUnavailable("locked")][self.left]

        def lease(self, **more):
            self._maybe()
            return super().lease(**more)

        def settle_many(self, settlements, *, now):
            self._maybe()
            return super().settle_many(settlements, now=now)

    queue = Failing()
    queue.enqueue_many([task_of()])
    handler = Handler()
    dispatcher = dispatch(queue, handler)
    dispatcher._sleep = lambda seconds: asyncio.sleep(0)
    await dispatcher.run_until_empty()
    assert handler.seen == [task_of().id]
    assert queue.find(task_of().id).state is TaskState.SUCCEEDED
    assert "a row" not in caplog.text


async def test_settling_that_fails_is_tried_again():
    class Failing(MemoryQueue):
        left = 1

        def settle_many(self, settlements, *, now):
            if self.left:
                self.left -= 1
                raise RuntimeError("bug")
            return super().settle_many(settlements, now=now)

    queue = Failing()
    queue.enqueue_many([task_of()])
    await dispatch(queue, Handler()).run_until_empty()
    assert queue.find(task_of().id).state is TaskState.SUCCEEDED


async def test_a_lease_that_was_lost_changes_nothing(caplog):
    queue = MemoryQueue()
    queue.enqueue_many([task_of()])

    async def lose(task):
        (stolen,) = queue.lease(owner="other", limit=1, seconds=60, now=NOW + 100)
        assert stolen.task.id == task.id
        return answer(200, "succeeded")

    with caplog.at_level(logging.WARNING):
        await dispatch(queue, Handler(lose)).run_until_empty()
    assert queue.find(task_of().id).state is TaskState.RUNNING
    assert "delivered elsewhere" in caplog.text


async def test_the_lease_of_a_long_task_is_prolonged_before_it_ends():
    class Extending(MemoryQueue):
        extended = ()

        def extend_many(self, leases, *, seconds, now):
            self.extended += tuple((self._state.rows[lease.task.id].due, now) for lease in leases)
            return super().extend_many(leases, seconds=seconds, now=now)

    queue = Extending()
    queue.enqueue_many([task_of()])
    stolen = []

    async def slow(task):
        for count in (1, 2):
            await until(lambda: len(queue.extended) >= count)
            stolen.extend(queue.lease(owner="other", limit=1, seconds=60, now=queue.extended[-1][0] + 0.01))
        return answer(200, "succeeded")

    handler = Handler(slow)
    await dispatch(queue, handler, clock=time.time, lease_seconds=3.0).run_until_empty()
    assert stolen == []
    assert all(now < end for end, now in queue.extended)
    assert handler.seen == [task_of().id]
    assert queue.find(task_of().id).state is TaskState.SUCCEEDED


async def test_leases_that_cannot_be_prolonged_are_tried_again_and_lost_ones_are_let_go(caplog):
    class Failing(MemoryQueue):
        calls = 0

        def extend_many(self, leases, *, seconds, now):
            self.calls += 1
            if self.calls == 1:
                raise QueueUnavailable("locked")
            ours = [lease for lease in leases if lease.task.id != task_of(2).id]
            super().extend_many(ours, seconds=seconds, now=now)
            return [lease in ours for lease in leases]

    queue = Failing()
    queue.enqueue_many([task_of(n) for n in (1, 2, 3)])

    async def slow(task):
        await until(lambda: queue.calls >= 4)
        return answer(200, "succeeded")

    # The clock stands still: the leases, prolonged every 0.1 s, do not run out.
    await dispatch(queue, Handler(slow), lease_seconds=0.3).run_until_empty()
    assert "extending leases failed: locked; trying again" in caplog.text
    assert queue.find(task_of(1).id).state is queue.find(task_of(3).id).state is TaskState.SUCCEEDED


async def test_a_queue_that_cannot_be_held_is_tried_on(caplog):
    class Failing(MemoryQueue):
        def hold(self, queue, *, until, now):
            raise QueueUnavailable("locked")

    queue = Failing()
    queue.enqueue_many([task_of()])
    handler = Handler(lambda task: answer(503, "busy", Retry_After="1"))
    await dispatch(queue, handler).run_until_empty()
    assert "cannot be held (queue-unavailable)" in caplog.text
    assert queue.find(task_of().id).attempts == 0


async def test_a_queue_that_was_held_and_answers_again_begins_anew():
    replies = [answer(503, "busy", Retry_After="1"), answer(200, "succeeded")]
    queue = MemoryQueue()
    queue.enqueue_many([task_of()])
    dispatcher = dispatch(queue, Handler(lambda task: replies.pop(0)), clock=time.time)
    running = asyncio.create_task(dispatcher.run())
    await until(lambda: not queue.tasks())
    assert dispatcher._state.attempts._busy == {}
    dispatcher.stop()
    await running


async def test_a_settlement_that_is_cancelled_is_stored_all_the_same():
    begun, gate = threading.Event(), threading.Event()

    class Slow(MemoryQueue):
        def settle_many(self, settlements, *, now):
            begun.set()
            gate.wait(30)
            return super().settle_many(settlements, now=now)

    queue = Slow()
    queue.enqueue_many([task_of()])
    running = asyncio.create_task(dispatch(queue, Handler()).run())
    await asyncio.to_thread(begun.wait, 30)
    running.cancel()
    await asyncio.sleep(0.05)
    gate.set()
    await asyncio.wait({running})
    assert queue.find(task_of().id).state is TaskState.SUCCEEDED


async def test_there_is_work_while_the_next_is_leased():
    class Slow(MemoryQueue):
        def lease(self, **more):
            time.sleep(0.005)
            return super().lease(**more)

    queue = Slow()
    queue.enqueue_many([task_of(n) for n in range(1, 601)])
    idle = []

    async def quick(task):
        await asyncio.sleep(0.001)
        idle.append(dispatcher._state.leasing and len(dispatcher._state.deliveries))
        return answer(200, "succeeded")

    dispatcher = dispatch(queue, Handler(quick), clock=time.time, concurrency=4)
    await dispatcher.run_until_empty()
    assert len(idle) == 600
    assert sum(1 for slots in idle if slots) > 20


async def test_what_was_leased_begins_before_the_queue_is_looked_at_again(monkeypatch):
    monkeypatch.setattr(loop, "_BEGIN_SECONDS", 60.0)
    seen, looked, here = [], asyncio.Event(), asyncio.get_running_loop()

    class Watched(MemoryQueue):
        def next_due(self, **more):
            seen.append("looked")
            here.call_soon_threadsafe(looked.set)
            return super().next_due(**more)

    async def slow(task):
        await asyncio.sleep(0.05)
        seen.append("ran")
        return answer(200, "succeeded")

    queue = Watched()
    queue.enqueue_many([task_of()])
    dispatcher = dispatch(queue, Handler(slow))
    running = asyncio.create_task(dispatcher.run())
    await looked.wait()
    dispatcher.stop()
    await running
    assert seen == ["ran", "looked"]


async def test_a_target_that_is_down_stops_no_other():
    def reply(task):
        if task.target == "down":
            return Unreachable("refused", address="down", everywhere=False)
        return answer(200, "succeeded")

    queue = MemoryQueue()
    queue.enqueue_many([task_of(n, target="down" if n % 2 else "up") for n in range(1, 201)])
    handler = Targets(reply)
    await asyncio.wait_for(dispatch(queue, handler, concurrency=4).run_until_empty(), 60)
    waiting = queue.tasks(states=[TaskState.WAITING], limit=1000)
    assert len(waiting) == 100
    assert {view.target for view in waiting} == {"down"}
    assert {view.attempts for view in waiting} == {0}
    # Most were not sent the way of the first ones.
    assert len(handler.seen) < 110


async def test_a_target_that_hangs_takes_one_slot_alone():
    moment = [NOW]
    tried, over = [], asyncio.Event()

    async def reply(task):
        if task.target == "up":
            return answer(200, "succeeded")
        tried.append(task.id)
        if len(tried) > 1:
            await over.wait()
        raise Unreachable("timed out", address="down", everywhere=False)

    queue = MemoryQueue()
    queue.enqueue_many([task_of(n, target="down") for n in range(1, 51)])
    dispatcher = dispatch(queue, Targets(reply), clock=lambda: moment[0], concurrency=4)
    running = asyncio.create_task(dispatcher.run())
    await until(lambda: tried and queue.next_due(now=moment[0]) > moment[0])  # all are put off
    moment[0] += 100
    queue.wake()
    await until(lambda: len(tried) > 1)
    queue.enqueue_many([task_of(n, target="up") for n in range(100, 120)])
    await until(lambda: not [view for view in queue.tasks(limit=1000) if view.target == "up"])
    assert len(tried) == 2
    dispatcher.stop()
    over.set()
    await running


# slots, held by silent others, answers, share
SHARES = [
    (16, 0, False, 8), (16, 8, False, 4), (16, 12, False, 2), (16, 15, False, 1), (16, 16, False, 1), (16, 0, True, 12), (16, 8, True, 6),
    (1, 0, False, 1), (1, 0, True, 1), (2, 0, False, 1), (2, 0, True, 1), (3, 0, True, 2), (4, 0, True, 3), (4, 2, True, 1), (0, 5, False, 1),
]  # fmt: skip


@pytest.mark.parametrize(("slots", "silent", "answers", "expected"), SHARES)
def test_the_share_of_a_target(slots, silent, answers, expected):
    assert share(slots, silent, answers=answers) == expected


@given(st.integers(1, 1000), st.integers(1, 20))
def test_hung_targets_leave_a_slot_while_there_are_fewer_than_halvings(slots, targets):
    moment = [0.0]
    shares = TargetShares(slots, clock=lambda: moment[0])
    held = 0
    for number in range(targets):
        while held < slots and shares.has_room(str(number)):
            shares.begin(str(number))
            held += 1
        moment[0] += 10
    assert held <= slots
    if 2**targets <= slots:
        assert held < slots


def test_a_target_that_answers_holds_more_slots_and_less_once_it_is_silent():
    moment = [0.0]
    shares = TargetShares(8, clock=lambda: moment[0])
    for _ in range(4):
        assert shares.has_room("a")
        shares.begin("a")
    assert not shares.has_room("a")
    assert shares.postpone("a", now=NOW) is None  # it may answer yet
    shares.answered("a")
    for _ in range(2):
        assert shares.has_room("a")
        shares.begin("a")
    assert not shares.has_room("a")
    moment[0] += 1.1
    shares.end("a")
    assert not shares.has_room("a")
    first, second = (shares.postpone("a", now=NOW) for _ in range(2))
    assert (first.verdict, first.charged, first.reason) == (Verdict.RETRY, False, "busy")
    assert NOW + 1 < first.at < second.at < NOW + 2
    shares.answered("a")
    assert shares.postpone("a", now=NOW) is None
    moment[0] += 1.1
    assert shares.postpone("a", now=NOW).at == first.at


async def hang(tasks, good, concurrency, hung=("hung",)):
    """Deliver to targets that hang, and to one that answers; return the most slots that one target held."""
    over, running, most = asyncio.Event(), {}, {}

    async def reply(task):
        if task.target not in hung:
            return answer(200, "succeeded")
        running[task.target] = running.get(task.target, 0) + 1
        most[task.target] = max(most.get(task.target, 0), running[task.target])
        await over.wait()
        return answer(200, "succeeded")

    queue = MemoryQueue()
    queue.enqueue_many(tasks)
    dispatcher = dispatch(queue, Targets(reply), clock=time.time, concurrency=concurrency)
    work = asyncio.create_task(dispatcher.run())
    await until(lambda: set(hung) <= running.keys())
    queue.enqueue_many(good)
    await until(lambda: not [view for view in queue.tasks(limit=1000) if view.target not in hung])
    dispatcher.stop()
    over.set()
    await work
    waiting = queue.tasks(states=[TaskState.WAITING], limit=1000)
    assert {view.attempts for view in waiting} <= {0}
    assert queue.tasks(states=[TaskState.RUNNING]) == []
    return most


@pytest.mark.parametrize("concurrency", [2, 4, 16])
async def test_a_target_that_never_answers_leaves_half_of_the_slots_to_others(concurrency):
    tasks = [task_of(n, target="hung") for n in range(1, 51)]
    good = [task_of(n, target="up") for n in range(100, 120)]
    assert await hang(tasks, good, concurrency) == {"hung": concurrency // 2}


async def test_two_targets_that_never_answer_leave_slots_to_a_third():
    tasks = [task_of(n, target="one" if n % 2 else "two") for n in range(1, 51)]
    good = [task_of(n, target="up") for n in range(100, 120)]
    most = await hang(tasks, good, 16, hung=("one", "two"))
    assert sum(most.values()) <= 12


@pytest.mark.parametrize(("concurrency", "targets"), [(1, 1), (4, 3), (2, 5)])
async def test_as_many_hung_targets_as_slots_leave_one_to_a_target_that_answers(concurrency, targets):
    """Three hung targets held four slots until their timeouts, and nothing else was delivered."""
    hung = tuple(f"hung{number}" for number in range(targets))
    tasks = [task_of(n, target=hung[n % targets]) for n in range(1, 31)]
    good = [task_of(n, target="up") for n in range(100, 105)]
    most = await hang(tasks, good, concurrency, hung=hung)
    assert sum(most.values()) <= concurrency + targets


async def test_a_target_alone_has_all_slots():
    most = 0

    async def reply(task):
        nonlocal most
        most = max(most, len(dispatcher._state.deliveries))
        await asyncio.sleep(0.05)
        return answer(200, "succeeded")

    queue = MemoryQueue()
    queue.enqueue_many([task_of(n) for n in range(1, 31)])
    dispatcher = dispatch(queue, Handler(reply), concurrency=4)
    await dispatcher.run_until_empty()
    assert most == 4


async def test_many_tasks_for_two_targets_that_answer_all_run():
    queue = MemoryQueue()
    queue.enqueue_many([task_of(n, target="one" if n % 7 else "two") for n in range(1, 301)])

    async def reply(task):
        await asyncio.sleep(0.001)
        return answer(200, "succeeded")

    handler = Targets(reply)
    await asyncio.wait_for(dispatch(queue, handler, concurrency=4).run_until_empty(), 60)
    assert len(handler.seen) == 300
    assert {view.state for view in queue.tasks(limit=1000)} <= {TaskState.SUCCEEDED}


@pytest.mark.parametrize(
    "reply",
    [answer(503, "busy", Retry_After="600"), answer(503, Retry_After="600"), answer(429, Retry_After="600")],
    ids=["busy", "503", "429"],
)
async def test_a_target_that_asks_for_a_pause_holds_its_own_tasks_only(reply):
    def replies(task):
        return reply if task.target == "busy" else answer(200, "succeeded")

    queue = MemoryQueue()
    queue.enqueue_many([task_of(n, target="busy" if n % 2 else "up") for n in range(1, 41)])
    queue.enqueue_many([task_of(n, target="busy", queue="mail") for n in range(50, 52)])
    handler = Targets(replies)
    await asyncio.wait_for(dispatch(queue, handler, concurrency=2).run_until_empty(), 60)
    assert not any(control.held_until for control in queue.controls(now=NOW))
    waiting = queue.tasks(states=[TaskState.WAITING], limit=1000)
    assert {(view.target, view.attempts) for view in waiting} == {("busy", 0)}
    assert len(waiting) == 22
    sent = [task_id for task_id in handler.seen if int(task_id, 16) % 2 and int(task_id, 16) < 50]
    assert len(sent) <= 2  # the slots that were under way
    assert len(handler.seen) <= 20 + 2 + 2


def test_a_pause_of_a_target_ends_and_is_forgotten():
    holds = TargetHolds()
    assert not holds
    holds.hold("q", "a", until=NOW + 10, now=NOW)
    holds.hold("q", "a", until=NOW + 5, now=NOW)
    assert holds.postpone("q", "b", now=NOW) is holds.postpone("p", "a", now=NOW) is None
    first, second = (holds.postpone("q", "a", now=NOW + 9) for _ in range(2))
    assert (first.at, first.charged, first.reason, first.verdict) == (NOW + 10, False, "busy", Verdict.RETRY)
    assert second.at == NOW + 10.01
    assert holds.postpone("q", "a", now=NOW + 10) is None
    assert not holds
    holds.hold("q", "a", until=NOW + 10, now=NOW)
    holds.hold("q", "b", until=NOW + 30, now=NOW + 20)
    assert list(holds._until) == [("q", "b")]


async def test_one_handler_that_is_down_is_asked_again_and_the_queue_keeps_its_order():
    queue = MemoryQueue()
    queue.enqueue_many([task_of(n) for n in range(1, 6)])
    down = [3]

    def reply(task):
        if down[0]:
            down[0] -= 1
            return Unreachable("refused")
        return answer(200, "succeeded")

    handler = Handler(reply)
    dispatcher = dispatch(queue, handler, clock=time.time, concurrency=1)
    running = asyncio.create_task(dispatcher.run())
    await until(lambda: not queue.tasks())
    dispatcher.stop()
    await running
    assert len(handler.seen) == 8
    assert queue.tasks(states=[TaskState.WAITING]) == []


# --- Drain ----------------------------------------------------------------------------------------


async def test_a_stop_finishes_what_is_delivered_and_leases_nothing_more():
    queue = MemoryQueue()
    queue.enqueue_many([task_of(n) for n in range(1, 21)])
    begun, go = asyncio.Event(), asyncio.Event()

    async def slow(task):
        begun.set()
        await go.wait()
        return answer(200, "succeeded")

    handler = Handler(slow)
    dispatcher = dispatch(queue, handler, concurrency=3)
    running = asyncio.create_task(dispatcher.run())
    await begun.wait()
    await asyncio.sleep(0)
    dispatcher.stop()
    go.set()
    await running
    assert len(handler.seen) == 3
    assert len(queue.tasks(states=[TaskState.SUCCEEDED])) == 3
    assert len(queue.tasks(states=[TaskState.WAITING])) == 17
    assert queue.tasks(states=[TaskState.RUNNING]) == []


@pytest.mark.parametrize(("rate", "ahead"), [(75.0, 7), (160.0, 16), (405.0, 40), (5_000.0, 64)])
def test_no_more_than_a_tenth_of_a_second_of_work_is_leased_ahead_however_long_a_lease_takes(monkeypatch, rate, ahead):
    """Where tasks hold the interpreter a lease takes long: one process held what the others had slots for."""
    now = [100.0]
    monkeypatch.setattr("safedefer.dispatcher.prefetch.time.monotonic", lambda: now[0])
    prefetch = Prefetch(16)
    assert prefetch.wanted(delivering=0) == 16
    prefetch.leased([Lease(task_of(number), "w", 200.0) for number in range(16)], wanted=16, seconds=2.0)
    prefetch.ready.clear()
    for _ in range(16):
        prefetch.delivered()
    now[0] += 16 / rate
    assert prefetch.wanted(delivering=16) == ahead
    assert prefetch.wanted(delivering=15) == 1 + ahead


async def test_what_was_leased_ahead_is_given_back_untouched():
    queue = MemoryQueue()
    queue.enqueue_many([task_of(n) for n in range(1, 301)])
    most = 0

    async def quick(task):
        nonlocal most
        most = max(most, len(dispatcher._state.prefetch.ready))
        if task.id == task_of(200).id:
            dispatcher.stop()
        return answer(200, "succeeded")

    dispatcher = dispatch(queue, Handler(quick), concurrency=4)
    await dispatcher.run()
    assert most > 0
    waiting = queue.tasks(states=[TaskState.WAITING], limit=1000)
    done = queue.tasks(states=[TaskState.SUCCEEDED], limit=1000)
    assert len(waiting) + len(done) == 300
    assert len(waiting) > 80
    assert {view.attempts for view in waiting} == {0}


async def test_a_drain_that_is_over_gives_its_tasks_back():
    queue = MemoryQueue()
    queue.enqueue_many([task_of()])
    begun = asyncio.Event()

    async def endless(task):
        begun.set()
        await asyncio.sleep(60)

    dispatcher = dispatch(queue, Handler(endless), drain_seconds=0.05)
    running = asyncio.create_task(dispatcher.run())
    await begun.wait()
    dispatcher.stop()
    await asyncio.wait_for(running, 30)
    view = queue.find(task_of().id)
    assert (view.state, view.attempts) == (TaskState.WAITING, 0)


async def test_cancelling_it_leaves_nothing_running():
    queue = MemoryQueue()
    dispatcher = dispatch(queue, Handler())
    running = asyncio.create_task(dispatcher.run())
    await asyncio.sleep(0.05)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 60)
    assert len(asyncio.all_tasks()) == 1


# --- The reason of a dead letter ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "reason"), [((tasks.permanent,), "permanent-task-failure"), ((tasks.add, 1), "expired-task")]
)
async def test_a_dead_letter_has_the_reason_of_its_last_attempt(call, reason):
    tasks.reset()
    app = make_app(clock=lambda: moment[0])
    moment = [NOW]
    task = app.defer(*call)
    if reason == "expired-task":
        moment[0] += 32 * 86_400
    await dispatch(app.queue, InProcessDelivery(app.handle), clock=lambda: moment[0]).run_until_empty()
    view = app.queue.find(task.id)
    assert (view.state, view.reason) == (TaskState.DEAD, reason)
    assert view.records[-1].reason == reason
    assert app.verify(view.token, expired=True).claims["jti"] == task.id


async def test_a_rejected_task_dies_after_an_hour_with_its_reason():
    tasks.reset()
    queue = MemoryQueue()
    moment = [NOW]
    common = {"queue": queue, "clock": lambda: moment[0], "keyring": Keyring(Key("k1", SECRET, KeyState.ACTIVE))}
    sender = make_app(**common)
    handler = make_app(**common, policy=Policy("tests.zoo.values"))
    task = sender.defer(tasks.add, 1)
    deliveries = 0
    while queue.find(task.id).state is TaskState.WAITING:
        await dispatch(queue, InProcessDelivery(handler.handle), clock=lambda: moment[0]).run_until_empty()
        deliveries += 1
        moment[0] += 401
    view = queue.find(task.id)
    assert (view.state, view.reason, view.attempts) == (TaskState.DEAD, "policy-violation", 0)
    assert deliveries == 10
    assert all(type(record) is AttemptRecord for record in view.records)
    assert len(view.records) == 10
    assert tasks.RAN == []


async def test_a_renamed_callable_runs_when_it_is_back():
    tasks.reset()
    moment = [NOW]
    app = make_app(clock=lambda: moment[0])
    task = app.defer(tasks.add, 1, 2)
    kept, tasks.add = tasks.add, None
    try:
        await dispatch(app.queue, InProcessDelivery(app.handle), clock=lambda: moment[0]).run_until_empty()
    finally:
        tasks.add = kept
    assert app.queue.find(task.id).state is TaskState.WAITING
    moment[0] += 10
    await dispatch(app.queue, InProcessDelivery(app.handle), clock=lambda: moment[0]).run_until_empty()
    assert app.queue.find(task.id).state is TaskState.SUCCEEDED
    assert tasks.RAN == [("add", 1, 2, 1)]


# --- Suspects -------------------------------------------------------------------------------------


class Suspicious(MemoryQueue):
    """Says of tasks how many losses they have."""

    losses: dict[str, int]

    def lease(self, **how):
        return [lease._replace(losses=self.losses.get(lease.task.id, 0)) for lease in super().lease(**how)]


async def delivered_together(queue, *, concurrency=16, seconds=0.02, **options):
    """Run all tasks; return for each what ran beside it, in the order in which they began."""
    running, beside = set(), {}

    async def call(task, headers):
        number = int(task.id, 16)
        for other in running:
            beside[other].add(number)
        beside[number] = set(running)
        running.add(number)
        await asyncio.sleep(seconds)
        running.discard(number)
        return answer(200, "succeeded")

    settings = DispatcherOptions(concurrency=concurrency, poll_seconds=0.05, **options)
    dispatcher = Dispatcher(queue, Delivering(call), clock=lambda: NOW, options=settings)
    await asyncio.wait_for(dispatcher.run_until_empty(), 120)
    return beside


@pytest.mark.parametrize("concurrency", [1, 4, 16])
async def test_a_suspect_runs_alone_after_what_was_leased_with_it(concurrency):
    queue = Suspicious()
    queue.losses = {task_of(2).id: 3, task_of(3).id: 1, task_of(7).id: 2, task_of(9).id: 2}
    queue.enqueue_many([task_of(number) for number in range(1, 31)])
    beside = await delivered_together(queue, concurrency=concurrency)
    assert set(beside) == set(range(1, 31)), "nobody starves"
    assert [beside[number] for number in (2, 7, 9)] == [set(), set(), set()]
    order = list(beside)
    first = [number for number in range(1, concurrency + 1) if number not in (2, 7, 9)]
    assert order[: len(first)] == first, "what was leased with a suspect goes first"
    if concurrency > 1:
        assert beside[3], "one loss may be anybody's"
    assert order.index(7) < order.index(2) or concurrency < 16, "the fewest losses first"
    assert all(queue.find(task_of(number).id).attempts == 1 for number in range(1, 31))


async def test_a_stop_gives_a_suspect_back_that_waits():
    queue = Suspicious()
    queue.losses = {task_of(1).id: 2}
    queue.enqueue_many([task_of(1), task_of(2)])
    ran, begun = [], asyncio.Event()

    async def call(task, headers):
        ran.append(int(task.id, 16))
        begun.set()
        await asyncio.sleep(0.2)
        return answer(200, "succeeded")

    dispatcher = Dispatcher(queue, Delivering(call), clock=lambda: NOW)
    running = asyncio.create_task(dispatcher.run())
    await begun.wait()
    dispatcher.stop()
    await asyncio.wait_for(running, 60)
    assert ran == [2]
    view = queue.find(task_of(1).id)
    assert (view.state, view.attempts) == (TaskState.WAITING, 0)


async def test_a_stop_lets_a_suspect_end_that_runs():
    queue = Suspicious()
    queue.losses = {task_of(1).id: 2}
    queue.enqueue_many([task_of(1)])
    begun = asyncio.Event()

    async def call(task, headers):
        begun.set()
        await asyncio.sleep(0.1)
        return answer(200, "succeeded")

    dispatcher = Dispatcher(queue, Delivering(call), clock=lambda: NOW)
    running = asyncio.create_task(dispatcher.run())
    await begun.wait()
    dispatcher.stop()
    await asyncio.wait_for(running, 60)
    assert queue.find(task_of(1).id).state is TaskState.SUCCEEDED


async def test_what_a_dead_dispatcher_had_leased_is_leased_at_once(caplog):
    class Failing(MemoryQueue):
        fails = 1

        def release(self, owners, *, now):
            if self.fails:
                self.fails -= 1
                raise QueueUnavailable("away")
            return super().release(owners, now=now)

    queue = Failing()
    queue.enqueue_many([task_of(number) for number in range(1, 4)])
    assert len(queue.lease(owner="before", limit=9, seconds=3600.0, now=NOW)) == 3
    beside = await asyncio.wait_for(released(queue), 60)
    assert set(beside) == {1, 2, 3}


async def released(queue):
    beside = {}
    while len(beside) < 3:  # until the release has succeeded nothing is due
        beside |= await delivered_together(queue, dead_owners=["before"], owner="after")
    return beside
