"""The seam of push engines: the handler judges, the store remembers, and whoever forges headers gains nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
import tracemalloc
from dataclasses import replace

import pytest
from aiohttp import web

from safedefer import Key, Keyring, KeyState, Policy, TaskRetryOptions
from safedefer.errors import (
    BadTransactionStateError,
    ConfigurationError,
    ExpiredTask,
    InvalidTaskError,
    QueueUnavailable,
)
from safedefer.events import TaskDead, TaskRetried
from safedefer.ledger import Execution
from safedefer.queues.base import DeadFilter, NotAllStored, Settlement, TaskState, Verdict
from safedefer.queues.copies import load
from safedefer.queues.hand_over import HandingOver
from safedefer.queues.memory.queue import MemoryQueue
from safedefer.queues.progress import Progress
from safedefer.queues.pushed import cancel_key, progress_key
from safedefer.queues.rules import OUTLASTED, REJECT_LIMIT, Counters
from safedefer.queues.sqlite.queue import SQLiteQueue
from tests import sample_tasks as tasks
from tests.queues.pushing import PROOF, PROVEN, RETRIES, SINCE, TASK, PushEngineInMemory
from tests.unit.apps import JOSE, Recorder, make_app, until

NOW = 1_800_000_000.0
FROM_ENGINE = {**JOSE, PROVEN: PROOF}
LIMITED = TaskRetryOptions(task_retry_limit=2, min_backoff_seconds=10.0, max_backoff_seconds=10.0)


class Clock:
    """The time that a test says."""

    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture(params=["memory", "sqlite", "sqlite, in one process with the engine"])
def store(request, tmp_path, engine):
    engine.in_process = request.param.startswith("sqlite,")
    return MemoryQueue() if request.param == "memory" else SQLiteQueue(tmp_path / "store.db")


@pytest.fixture
def engine():
    return PushEngineInMemory()


@pytest.fixture
def clock():
    return Clock(NOW)


@pytest.fixture
def told():
    return Recorder()


@pytest.fixture
def app(store, engine, clock, told):
    tasks.reset()
    app = make_app(queue=engine, store=store, clock=clock, observers=[told])
    yield app
    tasks.GATE.set()
    app.close()


def post(app, token, headers=None, **more):
    """Deliver a token as the engine does; return status and outcome."""
    response = asyncio.run(app.handle(FROM_ENGINE if headers is None else headers, token, **more))
    return response.status, response.headers["Safedefer-Outcome"]


def dead(app):
    return list(app.queue.dead_letters(DeadFilter()))


def execution_of(app, task, owner="killed"):
    claims = app.authenticate(task.payload)
    verified = app.verify(task.payload)
    return Execution(claims["aud"], claims["jti"], verified.digest, owner, claims["exp"])


# --- What the handler judges ----------------------------------------------------------------------


def test_a_task_goes_to_the_engine_and_runs_once(app, engine, store):
    task = app.defer(tasks.add, 1)
    assert list(engine.tasks) == [task.id]
    assert store.find(task.id) is None
    assert post(app, task.payload) == (200, "succeeded")
    assert post(app, task.payload) == (200, "duplicate")
    assert tasks.RAN == [("add", 1, 0, 1)]


def test_a_failure_is_answered_with_the_time_of_the_retry_and_nothing_runs_before(app, clock, told):
    task = app.options(retry_options=LIMITED).defer(tasks.fail)
    response = asyncio.run(app.handle(FROM_ENGINE, task.payload))
    assert (response.status, response.headers["Safedefer-Outcome"]) == (500, "retry")
    wait = int(response.headers["Retry-After"])
    assert 5 <= wait <= 10
    assert post(app, task.payload) == (425, "early")  # 503 would slow the whole queue
    assert post(app, task.payload, {**FROM_ENGINE, RETRIES: "1"}) == (425, "early")
    clock.now += 10
    assert post(app, task.payload) == (500, "retry")
    assert tasks.RAN == ["fail", "fail"]
    assert [event.attempts for event in told.events if isinstance(event, TaskRetried)] == [1, 2]


def test_the_signed_limit_buries_the_task_and_answers_200(app, clock, store, told):
    task = app.options(retry_options=LIMITED).defer(tasks.fail)
    answers = []
    for _ in range(3):
        answers.append(post(app, task.payload))
        clock.now += 60
    assert answers == [(500, "retry"), (500, "retry"), (200, "failed")]
    (letter,) = dead(app)
    assert (letter.id, letter.reason, letter.attempts, letter.token) == (task.id, "retry-limit", 3, task.payload)
    assert [record.outcome for record in letter.records] == ["retry", "retry", "retry"]
    assert post(app, task.payload) == (200, "duplicate")
    claims = app.authenticate(task.payload)
    assert store.keep.get_many([progress_key(claims["aud"], task.id)]) == {}
    assert [(event.reason, event.attempts) for event in told.events if isinstance(event, TaskDead)] == [
        ("retry-limit", 3)
    ]


def test_the_limit_of_the_queue_counts_for_a_task_without_its_own(store, engine, clock, tmp_path):
    tasks.reset()
    file = tmp_path / "queue.yaml"
    file.write_text("queue:\n- name: default\n  retry_parameters:\n    task_retry_limit: 0\n")
    app = make_app(queue=engine, store=store, clock=clock, queue_yaml=file)
    task = app.defer(tasks.fail)
    assert post(app, task.payload) == (200, "failed")
    assert [letter.reason for letter in dead(app)] == ["retry-limit"]
    app.close()


@pytest.mark.parametrize("limit", [0, 1])
def test_the_limit_of_the_queue_counts_for_a_task_whose_run_outlasted_its_deadline(
    store, engine, clock, tmp_path, limit
):
    """Nobody judges such a run when it ends: the next delivery does."""
    tasks.reset()
    file = tmp_path / "queue.yaml"
    file.write_text(f"queue:\n- name: default\n  retry_parameters:\n    task_retry_limit: {limit}\n")
    app = make_app(queue=engine, store=store, clock=clock, queue_yaml=file)
    task = app.defer(tasks.add, 1)
    claims = app.authenticate(task.payload)
    outlasted = Progress(Counters(attempts=1, retries=1, retry_reason=OUTLASTED))
    app.queue.keep.put(progress_key(claims["aud"], task.id), outlasted.dump(), expires=int(NOW) + 86_400)
    again = {**FROM_ENGINE, RETRIES: "1"}
    assert post(app, task.payload, again) == (200, "failed" if limit == 0 else "succeeded")
    assert [letter.reason for letter in dead(app)] == ["retry-limit"][limit:]
    assert len(tasks.RAN) == limit
    app.close()


def test_a_permanent_failure_is_buried_with_its_reason(app):
    task = app.defer(tasks.permanent)
    assert post(app, task.payload) == (200, "failed")
    assert [(letter.id, letter.reason) for letter in dead(app)] == [(task.id, "permanent-task-failure")]


def test_a_task_that_expired_with_the_engine_is_buried_and_may_be_run_again(app, engine, clock):
    task = app.defer(tasks.add, 1)
    clock.now += 31 * 86_400 + 60
    assert post(app, task.payload) == (200, "failed")
    assert [letter.reason for letter in dead(app)] == ["expired-task"]
    engine.tasks.clear()
    again = app.retry(task.id)
    assert list(engine.tasks) == [again.id]
    assert dead(app) == []
    assert post(app, engine.tasks[again.id].token) == (200, "succeeded")
    assert post(app, task.payload) == (200, "duplicate")
    assert tasks.RAN == [("add", 1, 0, 1)]


def test_a_captured_token_whose_end_the_ledger_has_forgotten_is_no_proof_that_its_task_died(app, store, clock):
    task = app.defer(tasks.add, 1)
    assert post(app, task.payload) == (200, "succeeded")
    clock.now += 32 * 86_400
    store.prune(now=clock.now)
    assert post(app, task.payload, JOSE) == (403, "refused")
    assert post(app, task.payload) == (200, "failed")
    assert [letter.id for letter in dead(app)] == [task.id]
    with pytest.raises(ExpiredTask):
        app.retry(task.id)
    assert tasks.RAN == [("add", 1, 0, 1)]


def test_a_re_run_waits_in_the_store_while_the_engine_is_down(app, engine, clock):
    task = app.defer(tasks.permanent)
    post(app, task.payload)
    engine.tasks.clear()
    engine.down = True
    again = app.retry(task.id)
    assert app.queue.find(again.id).state is TaskState.WAITING
    engine.down = False
    clock.now += 120
    assert app.push_queue.hand_over_due(now=clock.now) == 1
    assert list(engine.tasks) == [again.id]
    assert app.queue.find(again.id) is None
    assert post(app, engine.tasks[again.id].token) == (200, "failed")


def test_rejections_are_counted_in_the_store_and_end_as_a_dead_letter(store, engine, clock):
    tasks.reset()
    keyring = Keyring(Key("k1", bytes(range(32)), KeyState.ACTIVE))
    sender = make_app(queue=engine, store=store, clock=clock, keyring=keyring)
    app = make_app(queue=engine, store=store, clock=clock, keyring=keyring, policy=Policy("tests.zoo.values"))
    task = sender.options(retry_options=TaskRetryOptions(task_retry_limit=0)).defer(tasks.add, 1)
    answers = set()
    for _ in range(REJECT_LIMIT - 1):
        answers.add(post(app, task.payload))
        clock.now += 500
    assert answers == {(500, "rejected")}
    assert post(app, task.payload) == (200, "failed")
    (letter,) = dead(app)
    assert (letter.id, letter.reason, letter.attempts) == (task.id, "policy-violation", 0)
    app.delivery.close()


# --- Runs that never ended ------------------------------------------------------------------------


def lose_a_run(app, task, clock):
    """Begin a run whose process is gone."""
    app.queue.ledger.begin_many([execution_of(app, task)], now=clock.now, lease=1.0)
    clock.now += 130


def test_a_lost_run_is_charged_and_recorded_and_the_task_runs_again(app, clock):
    task = app.options(retry_options=LIMITED).defer(tasks.fail)
    lose_a_run(app, task, clock)
    assert post(app, task.payload) == (500, "retry")
    clock.now += 60
    assert post(app, task.payload) == (200, "failed")
    (letter,) = dead(app)
    assert letter.attempts == 3
    assert [record.reason for record in letter.records] == ["lease-expired", "exception", "exception"]


def test_the_fifth_lost_run_in_a_row_is_poison(app, clock):
    task = app.defer(tasks.add, 1)
    for _ in range(4):
        lose_a_run(app, task, clock)
        # As a process that dies while it runs, and counted the loss before.
        progress = Progress.load(app.queue.keep.get_many([key := progress_key(*execution_of(app, task)[:2])]).get(key))
        progress, _ = progress.after_loss(*execution_of(app, task)[:2], now=clock.now)
        app.queue.keep.put(key, progress.dump(), expires=int(clock.now) + 86_400)
    clock.now += 400
    app.queue.ledger.begin_many([execution_of(app, task, "last")], now=clock.now, lease=1.0)
    clock.now += 2
    assert post(app, task.payload) == (200, "failed")
    assert [letter.reason for letter in dead(app)] == ["poison"]
    assert tasks.RAN == []


def test_a_dead_letter_that_was_stored_before_the_process_died_is_no_second_run_of_what_succeeds(app, clock):
    task = app.defer(tasks.add, 1)
    lose_a_run(app, task, clock)
    view = app.push_queue.engine.tasks[task.id]
    app.queue.bury(view, reason="retry-limit", attempts=1, now=clock.now, verified=True)
    assert post(app, task.payload) == (200, "succeeded")
    with pytest.raises(Exception, match="succeeded"):
        app.retry(task.id)


def test_a_first_delivery_of_a_task_whose_begin_was_undone_keeps_to_what_was_counted(app, clock, store):
    """A crash of the database's server may undo a begin, and not what was counted of its run."""
    task = app.options(retry_options=LIMITED).defer(tasks.fail)
    counted = Progress.load(None).after(
        Settlement(verdict=Verdict.RETRY, at=clock.now + 10, status=500, reason="exception"),
        started=clock.now,
        now=clock.now,
    )
    store.keep.put(progress_key(*execution_of(app, task)[:2]), counted.dump(), expires=int(clock.now) + 86_400)
    assert post(app, task.payload) == (425, "early")
    assert tasks.RAN == []
    clock.now += 10
    assert [post(app, task.payload), clock.now] == [(500, "retry"), clock.now]
    clock.now += 10
    assert post(app, task.payload) == (200, "failed")
    assert [letter.attempts for letter in dead(app)] == [3]


@pytest.mark.parametrize("store", ["sqlite, in one process with the engine"], indirect=True)
def test_a_run_that_began_is_given_back_where_the_store_fails_for_another_of_the_same_turn(app, store):
    first, again = app.defer(tasks.add, 1), app.defer(tasks.add, 2)
    begin = store.ledger.begin_many
    store.ledger.begin_many([execution_of(app, again)], now=NOW, lease=60.0)

    def down(*_, **__):
        raise QueueUnavailable("away")

    app.push_queue.ledger.begin_many = down

    async def both():
        return await asyncio.gather(*(app.handle(FROM_ENGINE, task.payload) for task in (first, again)))

    assert [answer.status for answer in asyncio.run(both())] == [503, 503]
    app.push_queue.ledger.begin_many = begin
    assert post(app, first.payload) == (200, "succeeded")
    assert tasks.RAN == [("add", 1, 0, 1)]


# --- Attacks --------------------------------------------------------------------------------------


def test_a_stranger_with_a_captured_token_is_refused_and_nothing_runs(app):
    task = app.defer(tasks.add, 1)
    assert post(app, task.payload, JOSE) == (403, "refused")
    assert post(app, task.payload, {**JOSE, PROVEN: "proof-of-somebody"}) == (403, "refused")
    assert tasks.RAN == []
    assert post(app, task.payload) == (200, "succeeded")


@pytest.mark.parametrize("retries", ["0", "999999999"])
def test_counts_in_headers_change_neither_limit_nor_time(app, clock, retries):
    task = app.options(retry_options=LIMITED).defer(tasks.fail)
    forged = {
        **FROM_ENGINE,
        RETRIES: retries,
        SINCE: "0.0",
        "X-AppEngine-TaskRetryCount": retries,
        "Safedefer-Attempt": "1",
    }
    answers = []
    for _ in range(3):
        answers += [post(app, task.payload, forged), post(app, task.payload, forged)]
        clock.now += 60
    assert answers == [(500, "retry"), (425, "early")] * 2 + [(200, "failed"), (200, "duplicate")]
    assert [letter.attempts for letter in dead(app)] == [3]


def test_many_at_once_run_a_captured_token_once_before_its_time(app):
    task = app.options(retry_options=LIMITED).defer(tasks.fail)

    async def storm():
        answers = await asyncio.gather(*(app.handle(FROM_ENGINE, task.payload) for _ in range(12)))
        return sorted(answer.status for answer in answers)

    statuses = asyncio.run(storm())
    assert tasks.RAN == ["fail"]
    assert set(statuses) <= {500, 425, 409, 503}
    assert statuses.count(500) == 1


def test_a_stale_look_does_not_run_a_task_before_its_time(app, clock):
    task = app.options(retry_options=LIMITED).defer(tasks.fail)
    delivery, queue = app.delivery, app.push_queue
    stale = queue.keep.get_many
    looks = []

    def look(keys, /):
        looks.append(keys)
        return {} if len(looks) == 1 else stale(keys)  # the first look was before the failure was stored

    assert post(app, task.payload) == (500, "retry")
    queue.store.keep.get_many = look
    assert post(app, task.payload, {**FROM_ENGINE, RETRIES: "1"}) == (425, "early")
    assert len(looks) == 2
    assert tasks.RAN == ["fail"]
    queue.store.keep.get_many = stale
    clock.now += 60
    assert post(app, task.payload) == (500, "retry")
    assert delivery is app.delivery


def forge(app):
    return make_app().defer(tasks.add, 666).payload  # signed by a key of somebody else's


def test_a_forged_token_is_refused_for_an_hour_and_then_buried_on_the_word_of_the_engine(app, clock):
    token = forge(app)
    for retries in range(REJECT_LIMIT + 2):
        assert post(app, token, {**FROM_ENGINE, RETRIES: str(retries), SINCE: repr(NOW)}) == (403, "refused")
    clock.now += 3_600
    late = {RETRIES: str(REJECT_LIMIT), SINCE: repr(NOW)}
    assert post(app, token, {**JOSE, **late}) == (403, "refused")  # a stranger fills no dead letters
    assert dead(app) == []
    assert post(app, token, {**FROM_ENGINE, **late}) == (200, "refused")
    (letter,) = dead(app)
    assert (letter.reason, letter.token) == ("bad-signature", token)
    assert post(app, token, {**FROM_ENGINE, **late}) == (200, "refused")
    assert len(dead(app)) == 1
    assert tasks.RAN == []


def test_a_forged_token_under_a_tasks_id_takes_neither_its_letter_nor_its_run(app, clock):
    victim = app.defer(tasks.permanent)
    clock.now += 3_600
    late = {**FROM_ENGINE, RETRIES: "20", SINCE: repr(NOW), TASK: victim.id}
    assert post(app, forge(app), late) == (200, "refused")
    assert post(app, victim.payload) == (200, "failed")
    letters = {letter.id: letter for letter in dead(app)}
    assert letters[victim.id].token == victim.payload
    assert post(app, forge(app), late) == (200, "refused")
    letters = {letter.id: letter for letter in dead(app)}
    assert letters[victim.id].token == victim.payload
    assert len(letters) == 2


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"[]",
        b"{",
        b'{"attempts": -5, "not_before": "x"}',
        b'{"attempts": 1e400}',
        b'{"not_before": 1' + b"0" * 400 + b"}",
        b"\xff",
        b"[" * 5000,
    ],
)
def test_counters_that_somebody_wrote_into_the_store_are_those_of_a_new_task(app, stored):
    task = app.defer(tasks.add, 1)
    claims = app.authenticate(task.payload)
    app.queue.keep.put(progress_key(claims["aud"], task.id), stored, expires=int(NOW) + 86_400)
    assert post(app, task.payload) == (200, "succeeded")


def test_progress_is_read_as_it_was_written():
    counters = Counters(3, 4, 2, 1.5, 1, 2.5, 500, "retry")
    progress = Progress(counters, 7.5, 2, 8.5)
    assert Progress.load(progress.dump()) == progress
    assert Progress.load(None) == Progress() == Progress.load(Progress().dump())


# --- Oversize, cancel, waiting --------------------------------------------------------------------


def test_an_oversize_task_is_kept_in_the_store_until_it_ends(app, engine, store):
    task = app.defer(tasks.keywords, text="x" * 20_000)
    (queued,) = engine.tasks.values()
    assert len(queued.token) < 2_000
    assert app.queue.blobs.get(queued.blob_id) is not None
    assert post(app, queued.token) == (200, "succeeded")
    assert app.queue.blobs.get(queued.blob_id) is None
    assert task.id == queued.id


def test_an_oversize_task_that_dies_keeps_its_whole_token(app, engine):
    task = app.defer(tasks.permanent, "x" * 20_000)
    (queued,) = engine.tasks.values()
    assert post(app, queued.token) == (200, "failed")
    (letter,) = dead(app)
    assert len(letter.token) > 20_000
    engine.tasks.clear()
    again = app.retry(task.id)
    (queued,) = engine.tasks.values()
    assert queued.id == again.id
    assert post(app, queued.token) == (200, "failed")


def test_stored_tokens_of_all_tasks_take_no_more_than_the_limit(engine, clock):
    tasks.reset()
    app = make_app(queue=engine, store=MemoryQueue(blob_limit=50_000), clock=clock)
    app.defer(tasks.keywords, text="x" * 20_000)
    with pytest.raises(QueueUnavailable, match="blob_limit"):
        app.defer(tasks.keywords, text="x" * 40_000)
    app.close()


def test_what_the_store_keeps_goes_when_its_time_is_over(app, engine, store, clock):
    app.defer(tasks.keywords, text="x" * 20_000)
    (queued,) = engine.tasks.values()
    store.prune(now=clock.now + 32 * 86_400 + 7_200)
    assert app.queue.blobs.get(queued.blob_id) is None


def test_a_cancelled_task_does_not_run_and_one_that_runs_is_stopped(app, engine):
    task = app.defer(tasks.add, 1)
    assert app.cancel(task.id) is True
    assert engine.tasks == {}
    assert post(app, task.payload) == (200, "cancelled")
    assert post(app, task.payload) == (200, "duplicate")
    assert tasks.RAN == []

    async def cancel_while_it_runs():
        running = app.defer(tasks.sleep_long)
        delivery = asyncio.create_task(app.handle(FROM_ENGINE, running.payload))
        await until(lambda: tasks.RAN)
        # Another process says so: this one finds the mark.
        app.queue.keep.put(cancel_key(running.id), b"", expires=int(NOW) + 86_400)
        return (await asyncio.wait_for(delivery, 60)).headers["Safedefer-Outcome"]

    assert asyncio.run(cancel_while_it_runs()) == "cancelled"


def test_a_dead_letter_is_not_cancelled(app):
    task = app.defer(tasks.permanent)
    post(app, task.payload)
    assert app.cancel(task.id) is False


def test_what_the_engine_would_not_hold_waits_in_the_store_and_is_handed_over_when_it_is_due(store, clock):
    tasks.reset()
    engine = PushEngineInMemory(longest_wait=60.0)
    app = make_app(queue=engine, store=store, clock=clock)
    soon = app.options(countdown=30).defer(tasks.add, 1)
    later = app.options(countdown=90).defer(tasks.keywords, text="y" * 20_000)
    assert list(engine.tasks) == [soon.id]
    assert [view.id for view in app.queue.tasks()] == [later.id]
    assert app.push_queue.hand_over_due(now=clock.now) == 0
    clock.now += 95
    engine.down = True
    with pytest.raises(QueueUnavailable):
        app.push_queue.hand_over_due(now=clock.now)
    engine.down = False
    clock.now += 120
    assert app.push_queue.hand_over_due(now=clock.now) == 1
    assert app.queue.tasks() == []
    assert post(app, engine.tasks[later.id].token) == (200, "succeeded")
    cancelled = app.options(countdown=90).defer(tasks.add, 3)
    assert app.cancel(cancelled.id) is True
    clock.now += 100
    assert app.push_queue.hand_over_due(now=clock.now) == 0
    app.close()


def test_a_run_that_failed_before_the_store_forgot_its_task_is_tried_again(store, clock):
    tasks.reset()
    engine = PushEngineInMemory(longest_wait=60.0)
    app = make_app(queue=engine, store=store, clock=clock)
    task = app.options(countdown=90, retry_options=LIMITED).defer(tasks.fail)
    clock.now += 100
    hand_over, store.hand_over = store.hand_over, lambda leases, *, now: [False] * len(leases)
    app.push_queue.hand_over_due(now=clock.now)  # and the process dies here
    store.hand_over = hand_over
    assert post(app, task.payload) == (500, "retry")
    clock.now += 100
    app.push_queue.hand_over_due(now=clock.now)  # another process does it again
    assert post(app, task.payload) == (500, "retry")
    assert tasks.RAN == ["fail", "fail"]
    app.close()


# --- What an engine may lose ----------------------------------------------------------------------


@pytest.fixture
def loses(engine, app):
    """Make the engine one that may lose what it has taken."""
    engine.capabilities = replace(engine.capabilities, lossless=False, longest_wait=60.0)
    engine.messages = lambda queue: 0
    return engine


def look_until(app, clock, seconds):
    """Look each second, as the process does that hands over."""
    for _ in range(int(seconds)):
        clock.now += 1
        app.push_queue.hand_over_lost(now=clock.now)


def test_a_task_that_the_engine_has_lost_is_handed_over_again_and_runs(app, loses, clock):
    task = app.defer(tasks.add, 1)
    loses.tasks.clear()
    look_until(app, clock, 39)
    assert loses.tasks == {}, "it may be on its way"
    look_until(app, clock, 2)
    assert loses.tasks[task.id].token == task.payload
    assert post(app, loses.tasks.pop(task.id).token) == (200, "succeeded")
    look_until(app, clock, 7_200)
    assert loses.tasks == {}
    assert tasks.RAN == [("add", 1, 0, 1)]


def test_a_task_that_ended_runs_or_waits_for_its_retry_is_not_handed_over_again(app, loses, clock, store):
    done, runs = app.defer(tasks.add, 1), app.defer(tasks.add, 2)
    slow = TaskRetryOptions(min_backoff_seconds=50.0, max_backoff_seconds=50.0)
    failed = app.options(retry_options=slow).defer(tasks.fail)
    assert post(app, done.payload) == (200, "succeeded")
    assert post(app, failed.payload) == (500, "retry")
    store.ledger.begin_many([execution_of(app, runs)], now=clock.now, lease=300.0)
    loses.tasks.clear()
    look_until(app, clock, 20)
    assert post(app, failed.payload) == (425, "early")
    look_until(app, clock, 200)
    assert post(app, failed.payload) == (500, "retry")
    loses.tasks.clear()
    look_until(app, clock, 20)
    assert loses.tasks == {}
    look_until(app, clock, 400)
    assert set(loses.tasks) == {runs.id, failed.id}, "the run is lost, and the time of the retry has come"
    assert post(app, done.payload) == (200, "duplicate")


def test_with_many_messages_before_it_a_task_is_late_and_not_lost(app, loses, clock):
    loses.messages = lambda queue: 5_000
    app.defer(tasks.add, 1)
    loses.tasks.clear()
    look_until(app, clock, 3_000)
    assert loses.tasks == {}
    look_until(app, clock, 600)
    assert len(loses.tasks) == 1, "the engine's other tasks may be what waits"
    loses.tasks.clear()
    look_until(app, clock, 4_000)
    assert loses.tasks == {}
    loses.messages = lambda queue: 3
    look_until(app, clock, 300)
    assert len(loses.tasks) == 1


def test_what_the_engine_refuses_leaves_no_copy(app, loses, clock):
    loses.down = True
    with pytest.raises(QueueUnavailable):
        app.defer(tasks.add, 1)
    loses.down = False
    loses.refuses = {"tests.sample_tasks:fail"}
    with pytest.raises(NotAllStored) as caught:
        app.defer_many([(tasks.add, (2,), {}), (tasks.fail, (), {})], atomic=False)
    (taken,) = loses.tasks
    assert taken not in caught.value.failed
    loses.refuses, loses.tasks = set(), {}
    look_until(app, clock, 100)
    assert list(loses.tasks) == [taken]


def test_an_engine_that_breaks_leaves_no_copy(app, loses, clock, monkeypatch):
    def breaks(some):
        raise ValueError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(loses, "enqueue_many", breaks)
        with pytest.raises(ValueError, match="a bug"):
            app.defer(tasks.add, 1)
    look_until(app, clock, 400)
    assert loses.tasks == {}


def test_without_a_copy_nothing_is_handed_to_the_engine(app, loses, store, monkeypatch):
    def full(tasks):
        raise QueueUnavailable("the disk is full; free some space and try again")

    monkeypatch.setattr(store.copies, "put_many", full)
    with pytest.raises(QueueUnavailable, match="full"):
        app.defer(tasks.add, 1)
    assert loses.tasks == {}


def test_a_copy_that_the_store_does_not_let_go_of_is_said(app, loses, store, monkeypatch, caplog):
    def away(keys):
        raise QueueUnavailable("the database is away; start it")

    loses.down = True
    monkeypatch.setattr(store.copies, "delete", away)
    with pytest.raises(QueueUnavailable, match="the engine is down"):
        app.defer(tasks.add, 1)
    assert "may run later" in caplog.text


def test_what_is_lost_comes_soon_after_an_engine_that_was_away(app, loses, clock):
    task = app.defer(tasks.add, 1)
    loses.tasks.clear()
    loses.down = True
    for _ in range(2_000):
        clock.now += 1
        with contextlib.suppress(QueueUnavailable):
            app.push_queue.hand_over_lost(now=clock.now)
    loses.down = False
    look_until(app, clock, 11)
    assert list(loses.tasks) == [task.id]


def test_what_waited_in_the_store_is_not_lost_either(app, loses, clock):
    task = app.options(countdown=90).defer(tasks.add, 1)
    clock.now += 91
    assert app.push_queue.hand_over_due(now=clock.now) == 1
    loses.tasks.clear()
    look_until(app, clock, 80)
    assert post(app, loses.tasks.pop(task.id).token) == (200, "succeeded")


def test_an_oversize_task_that_is_lost_has_its_arguments(app, loses, clock):
    task = app.defer(tasks.keywords, text="y" * 20_000)
    loses.tasks.clear()
    look_until(app, clock, 80)
    assert post(app, loses.tasks.pop(task.id).token) == (200, "succeeded")


def test_a_lost_task_of_another_time_is_buried_and_forgotten(app, loses, clock):
    task = app.defer(tasks.add, 1)
    clock.now = app.authenticate(task.payload)["exp"] + 10 * 86_400.0
    loses.tasks.clear()
    look_until(app, clock, 100)
    assert post(app, loses.tasks.pop(task.id).token)[0] == 200
    assert [letter.id for letter in dead(app)] == [task.id]
    look_until(app, clock, 4_000)
    assert loses.tasks == {}


def test_a_copy_that_somebody_wrote_is_deleted_or_refused_by_the_handler(app, loses, clock, store, caplog):
    genuine = app.defer(tasks.add, 1)
    (queued,) = loses.tasks.values()
    store.copies.put_many([queued._replace(id="1" * 32, token=b"for.ged.token"), queued._replace(id="2" * 32)])
    (copy,) = [each for each in store.copies.look(now=NOW + 5, limit=10)[1] if each.task_id == "2" * 32]
    assert load(copy._replace(task="[" * 100_000)) is None
    assert load(copy._replace(task='{"queue": 1}')) is None
    assert load(copy._replace(task=copy.task.replace('"queue":"default"', '"queue":["default"]'))) is None
    loses.tasks.clear()
    look_until(app, clock, 90)
    assert post(app, loses.tasks["1" * 32].token)[0] == 403
    assert post(app, loses.tasks["2" * 32].token) == (200, "succeeded"), "it is the genuine task"
    assert post(app, genuine.payload) == (200, "duplicate")


def test_what_an_engine_that_counts_nothing_may_have_lost_comes_less_and_less_often(app, loses, clock):
    del loses.messages
    task = app.defer(tasks.add, 1)
    given, enqueue_many = [], loses.enqueue_many

    def noting(some):
        given.extend(each.id for each in some)
        enqueue_many(some)

    loses.enqueue_many = noting
    look_until(app, clock, 79)
    assert given == []
    look_until(app, clock, 2)
    assert given == [task.id]
    look_until(app, clock, 36_000)
    assert len(given) == 5, "each message more makes a long queue longer"
    loses.messages = lambda queue: None
    look_until(app, clock, 36_000)
    assert len(given) == 6


def test_a_queue_that_the_engine_does_not_take_keeps_no_other_queue_waiting(app, loses, clock, store):
    tasks_of = [app.defer(tasks.add, number) for number in range(8)]
    gone = [loses.tasks[task.id]._replace(queue=f"gone-{number}") for number, task in enumerate(tasks_of[:5])]
    store.copies.put_many(gone)

    def messages(queue):
        if queue.startswith("gone"):
            raise QueueUnavailable("there is no such queue; declare it")
        return 0

    loses.messages = messages
    loses.tasks.clear()
    asked = 0
    for _ in range(120):
        clock.now += 1
        try:
            app.push_queue.hand_over_lost(now=clock.now)
        except QueueUnavailable:
            asked += 1
    assert set(loses.tasks) == {task.id for task in tasks_of[5:]}
    assert asked, "and it is said"


def test_an_engine_that_is_away_is_not_asked_for_each_of_many_queues(app, loses, clock, store):
    task = app.defer(tasks.add, 1)
    queued = loses.tasks[task.id]
    store.copies.put_many([queued._replace(id=f"{number:032d}", queue=f"q{number}") for number in range(50)])
    asked = []

    def messages(queue):
        asked.append(queue)
        raise QueueUnavailable("the engine does not answer; start it")

    loses.messages = messages
    for _ in range(45):
        clock.now += 1
        asked.clear()
        with contextlib.suppress(QueueUnavailable):
            app.push_queue.hand_over_lost(now=clock.now)
        assert len(asked) <= 3, "each may take seconds"
    loses.messages = lambda queue: 0
    loses.tasks.clear()
    look_until(app, clock, 11)
    assert len(loses.tasks) == 51


@pytest.mark.parametrize("number", ["Infinity", "1e400", "-1", "NaN", "1" + "0" * 400])
@pytest.mark.parametrize("name", ["eta", "created", "expires"])
def test_a_copy_whose_times_are_none_is_deleted(app, loses, clock, store, name, number):
    task = app.defer(tasks.add, 1)
    (copy,) = store.copies.look(now=clock.now + 5, limit=10)[1]
    values = json.loads(copy.task)
    values[name] = 7_777
    forged = json.dumps(values).replace("7777", number)
    assert load(copy._replace(task=forged)) is None
    assert load(copy).id == task.id


def test_what_is_due_and_cannot_be_handed_over_keeps_nothing_that_is_lost_waiting(app, loses, clock, monkeypatch):
    task = app.defer(tasks.add, 1)
    loses.tasks.clear()
    queue = app.push_queue

    def away(*, now):
        raise QueueUnavailable("the engine does not know the queue; declare it")

    monkeypatch.setattr(queue._hand_over, "due", away)
    clock.now += 45
    queue.hand_over_lost(now=clock.now)
    clock.now += 40
    thread = HandingOver(queue._hand_over, lambda: (setattr(clock, "now", clock.now + 40), clock.now)[1])
    thread.start()
    try:
        asyncio.run(until(lambda: task.id in loses.tasks))
    finally:
        thread.stop()


def test_few_copies_are_in_memory_at_once(app, loses, clock, store):
    task = app.defer(tasks.add, 1)
    queued = loses.tasks[task.id]._replace(token=b"x" * 1_000_000)
    store.copies.put_many([queued._replace(id=f"{number:032d}") for number in range(100)])
    look_until(app, clock, 39)
    loses.enqueue_many = lambda some: None
    clock.now += 2
    tracemalloc.start()
    assert app.push_queue.hand_over_lost(now=clock.now) == 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000_000, "all of them at once have 200 MB"


def test_two_messages_of_a_token_that_no_key_signed_are_one_dead_letter(app, loses, clock, told):
    task = app.defer(tasks.add, 1)
    given_up = {**FROM_ENGINE, RETRIES: "20", SINCE: str(clock.now - 7_200), TASK: task.id}
    for _ in range(3):
        assert post(app, b"for.ged.token", given_up)[0] == 200
    assert [letter.id for letter in dead(app)] == [task.id]
    assert post(app, b"an.other.token", given_up)[0] == 200
    assert len(dead(app)) == 2, "another token has its own"


def test_a_child_is_not_forked_in_the_middle_of_a_look(app, loses, monkeypatch):
    lock, looking = threading.Lock(), threading.Event()

    def look(*, now):
        with lock:  # as of a library that opens a connection
            looking.set()
            time.sleep(0.3)
        return 0

    monkeypatch.setattr(app.push_queue._hand_over, "lost", look)
    thread = HandingOver(app.push_queue._hand_over, time.time)
    thread.start()
    try:
        assert looking.wait(10.0)
        child = os.fork()
        if child == 0:
            os._exit(0 if lock.acquire(timeout=5.0) else 1)
        assert os.waitpid(child, 0)[1] == 0
        looking.clear()
        assert looking.wait(10.0), "the thread goes on"
    finally:
        thread.stop()


def test_a_fork_does_not_wait_for_an_engine_that_does_not_answer(app, loses, monkeypatch):
    looking, answer = threading.Event(), threading.Event()

    def look(*, now):
        looking.set()
        answer.wait(30.0)
        return 0

    monkeypatch.setattr(app.push_queue._hand_over, "lost", look)
    thread = HandingOver(app.push_queue._hand_over, time.time)
    thread.start()
    try:
        assert looking.wait(10.0)
        child = os.fork()
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        answer.set()
        thread.stop()


def test_a_dead_letter_of_a_token_that_no_key_signed_ends_its_copy(app, loses, clock, store):
    task = app.defer(tasks.add, 1)
    queued = loses.tasks[task.id]
    other = queued._replace(id="3" * 32)
    store.copies.put_many([queued._replace(token=b"for.ged.token"), other._replace(token=b"an.other.token")])
    store.bury(other._replace(token=b"in its place"), reason="refused", attempts=0, now=clock.now, verified=False)
    given_up = {**FROM_ENGINE, RETRIES: "20", SINCE: str(clock.now - 7_200)}
    look_until(app, clock, 60)
    for token in (b"for.ged.token", b"an.other.token"):
        (found,) = [each.id for each in loses.tasks.values() if each.token == token]
        assert post(app, token, {**given_up, TASK: found})[0] == 200
    assert len(dead(app)) == 3
    look_until(app, clock, 300)
    app.queue.drop_dead([letter.id for letter in dead(app)])
    loses.tasks.clear()
    look_until(app, clock, 4_000)
    assert loses.tasks == {}


# --- Errors at defer() ----------------------------------------------------------------------------


def test_what_an_engine_cannot_do_is_an_error_at_defer(app, engine):
    with pytest.raises(InvalidTaskError, match="names of tasks"):
        app.options(name="one").defer(tasks.add, 1)
    with pytest.raises(InvalidTaskError, match="unique"):
        app.options(unique=True).defer(tasks.add, 1)
    with pytest.raises(BadTransactionStateError):
        app.options(transactional=True).defer(tasks.add, 1)
    with pytest.raises(InvalidTaskError, match="atomic=False"):
        app.defer_many([(tasks.add, (1,), {})])
    assert engine.tasks == {}


def test_a_batch_says_of_each_task_whether_it_was_stored(app, engine):
    assert len(app.defer_many([(tasks.add, (1,), {}), (tasks.add, (2,), {})], atomic=False)) == 2
    engine.refuses.add("tests.sample_tasks:fail")
    with pytest.raises(NotAllStored) as raised:
        app.defer_many([(tasks.add, (3,), {}), (tasks.fail, (), {})], atomic=False)
    assert len(raised.value.failed) == 1
    assert len(engine.tasks) == 3


@pytest.mark.parametrize(
    ("queue", "store", "text"),
    [
        ("celery://", None, "needs a store"),
        (PushEngineInMemory(), None, "needs a store"),
        ("memory://", "memory://", "its own store"),
        (PushEngineInMemory(), "celery+amqp://host", "pull engine"),
    ],
)
def test_an_engine_and_its_store_are_both_given(queue, store, text):
    with pytest.raises(ConfigurationError, match=text):
        make_app(queue=queue, store=store)


def test_nothing_leases_what_an_engine_pushes(app):
    with pytest.raises(ConfigurationError, match="nothing to dispatch"):
        app.queue.lease(owner="me", limit=1, seconds=1.0, now=NOW)
    with pytest.raises(ConfigurationError, match="own tools"):
        app.queue.pause("default", paused=True, now=NOW)
    assert list(app.queue.controls(now=NOW)) == []


def test_counts_are_of_the_engine_and_the_store(app):
    app.defer(tasks.add, 1)
    buried = app.defer(tasks.permanent)
    post(app, buried.payload)
    (stats,) = app.queue.stats(now=NOW)
    assert (stats.queue, stats.waiting, stats.dead) == ("default", 2, 1)


def test_closing_the_app_closes_the_engine_and_the_store(engine):
    app = make_app(queue=engine, store=MemoryQueue())
    app.defer(tasks.add, 1)
    app.close()
    assert engine.closed


# --- By HTTP, with a clock of its own -------------------------------------------------------------


def test_an_engine_that_posts_by_http_until_it_is_answered_2xx_loses_nothing(store, engine):
    tasks.reset()
    app = make_app(queue=engine, store=store)
    once = TaskRetryOptions(min_backoff_seconds=0.01, max_backoff_seconds=0.01, task_retry_limit=3)
    good = app.options(retry_options=once).defer(tasks.fail_once)
    bad = app.options(retry_options=once).defer(tasks.fail)

    async def serve():
        server = web.AppRunner(web_app := web.Application())
        web_app.add_routes(app.routes())
        await server.setup()
        site = web.TCPSite(server, "127.0.0.1", 0)
        await site.start()
        try:
            host, port = server.addresses[0][:2]
            return await engine.post_all(f"http://{host}:{port}")
        finally:
            await server.cleanup()

    statuses = asyncio.run(serve())
    assert set(statuses[good.id][:-1]) <= {500, 425}
    assert (statuses[good.id][-1], statuses[bad.id].count(500), statuses[bad.id][-1]) == (200, 3, 200)
    assert [(letter.id, letter.attempts) for letter in dead(app)] == [(bad.id, 4)]
    app.close()
