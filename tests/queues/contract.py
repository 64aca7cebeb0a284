"""The contract of a pull queue, its ledger and its blobs: every implementation runs all of it.

A test class inherits ``QueueContract`` and has a fixture ``queue`` that gives an empty queue whose
tombstones last ``TOMBSTONE`` seconds and whose history lasts ``HISTORY`` seconds, which archives dead
letters that are older than ``DEAD_AGE`` seconds or more than ``DEAD_LIMIT``, and takes blobs of
``BLOB_LIMIT`` bytes: ``QUEUE_OPTIONS``.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import pytest

from safedefer.blobs import Blob
from safedefer.errors import ExpiredTask, QueueUnavailable, ReplayedTask, TaskAlreadyExistsError, TombstonedTaskError
from safedefer.ledger import Admission, AttemptRecord, EndState, Execution, VerifiedLetter
from safedefer.queues import copies, rules
from safedefer.queues.base import (
    NOTICE_BYTES,
    NOTICE_SECONDS,
    NOTICES,
    AlreadyWaiting,
    DeadFilter,
    Lease,
    PullQueue,
    QueuedTask,
    QueueStats,
    Settlement,
    TaskState,
    Verdict,
    task_digest,
)
from safedefer.queues.rates import QueueLimits
from safedefer.queues.rules import LOST_LEASE
from tests.queues.cases import RUNS, SETTLEMENTS
from tests.queues.single import begin, extend, finish, settle

TOMBSTONE = 1000.0
HISTORY = 5000.0
DEAD_AGE = 20_000.0
DEAD_LIMIT = 10
BLOB_LIMIT = 1_000_000
LATER = 4000.0
EXPIRES = 1_000_000
PLANTED = "test:default:default:/planted"
QUEUE_OPTIONS = {
    "tombstone_seconds": TOMBSTONE,
    "history_seconds": HISTORY,
    "dead_seconds": DEAD_AGE,
    "dead_limit": DEAD_LIMIT,
    "blob_limit": BLOB_LIMIT,
}

_numbers = itertools.count(1)

VIEWED = {
    EndState.SUCCEEDED: TaskState.SUCCEEDED,
    EndState.FAILED: TaskState.DEAD,
    EndState.CANCELLED: TaskState.CANCELLED,
}

DONE = Settlement(verdict=Verdict.DONE)
DEAD = Settlement(verdict=Verdict.DEAD, reason="permanent-task-failure")
RETRY_NOW = Settlement(verdict=Verdict.RETRY, at=103.0, status=500, reason="retry")


def make_task(**changes: object) -> QueuedTask:
    """Return a task with an id of its own, due at 100."""
    number = next(_numbers)
    values: dict[str, object] = {
        "id": f"{number:032x}",
        "queue": "default",
        "token": f"token-{number}".encode(),
        "audience": "test:default:default:/_ah/queue/deferred",
        "url": "/_ah/queue/deferred",
        "target": "default",
        "eta": 100.0,
        "created": 100.0,
        "expires": EXPIRES,
        "digest": hashlib.sha256(f"token-{number}".encode()).digest(),
        "callable_name": "shop.tasks:send_receipt",
    }
    return QueuedTask(**{**values, **changes})


def oversize_task(**changes: object) -> QueuedTask:
    """Return a pointer whose token is stored as a blob."""
    number = next(_numbers)
    data = f"a large token {number}".encode() * 1000
    digest = hashlib.sha256(data).digest()
    return make_task(token=b"pointer", blob=Blob(f"blob-{number:016x}", data), digest=digest, **changes)


def whole(task: QueuedTask) -> QueuedTask:
    """Return a leased task with the digest that an engine may leave to be computed."""
    return task._replace(digest=task_digest(task))


def execution_of(task: QueuedTask, owner: str = "run-1", **changes: object) -> Execution:
    values: dict[str, object] = {
        "audience": task.audience,
        "task_id": task.id,
        "digest": task_digest(task),
        "owner": owner,
        "expires": task.expires,
    }
    return Execution(**{**values, **changes})


def letter_of(task: QueuedTask, *, expired: bool = False, **changes: object) -> VerifiedLetter:
    return VerifiedLetter(task.audience, task_digest(task), task.expires, expired)._replace(**changes)


def record_of(task: QueuedTask, outcome: str = "succeeded", **changes: object) -> AttemptRecord:
    values: dict[str, object] = {
        "task_id": task.id,
        "audience": task.audience,
        "started": 100.0,
        "ended": 101.0,
        "outcome": outcome,
        "status": 200,
    }
    return AttemptRecord(**{**values, **changes})


def take(
    queue: PullQueue, *, now: float = 100.0, limit: int = 1000, seconds: float = 60.0, **more: object
) -> list[Lease]:
    return list(queue.lease(owner="dispatcher", limit=limit, seconds=seconds, now=now, **more))


def take_one(queue: PullQueue, *, now: float = 100.0, seconds: float = 60.0) -> Lease:
    (lease,) = take(queue, now=now, seconds=seconds)
    return lease


def ids(leases: list[Lease]) -> list[str]:
    return [lease.task.id for lease in leases]


def rests(queue: PullQueue, seconds: float) -> bool:
    """Whether no wait of some seconds ends early; where waits may end for nothing, none but a few of them."""
    if queue.capabilities.exact_wake:
        return not queue.wait(seconds)
    return any(not queue.wait(max(seconds, 0.2)) for _ in range(4))


def until_all_wait(count: int) -> None:
    """Return when so many threads are in a queue's ``wait``."""
    deadline = time.monotonic() + 60.0
    while sum(map(_waits, sys._current_frames().values())) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _waits(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "wait" and "/safedefer/queues/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


class QueueContract:
    # --- Enqueue and lease --------------------------------------------------------------------

    def test_a_task_is_leased_as_it_was_enqueued(self, queue):
        task = make_task(
            name="receipt-42",
            headers={"X-Shop": "é", "b": "2"},
            retry_options={"task_retry_limit": 3, "min_backoff_seconds": 0.5},
            token=bytes(range(256)),
            target="backend",
            eta=99.123456,
            created=98.5,
        )
        queue.enqueue_many([task])
        lease = take_one(queue)
        assert whole(lease.task) == task
        assert lease == Lease(task=task, owner=lease.owner, until=160.0)

    def test_a_task_is_due_at_its_eta_and_not_before(self, queue):
        queue.enqueue_many([make_task(eta=200.0)])
        assert take(queue, now=199.999) == []
        assert len(take(queue, now=200.0)) == 1

    def test_what_fell_due_first_is_leased_first_and_then_what_came_first(self, queue):
        tasks = [make_task(eta=eta) for eta in (50.0, 40.0, 50.0, 30.0, 40.0)]
        queue.enqueue_many(tasks)
        order = (3, 1, 4, 0, 2) if queue.capabilities.due_order else range(5)
        expected = [tasks[index].id for index in order]
        assert ids(take(queue, limit=2)) + ids(take(queue, limit=2)) + ids(take(queue, limit=2)) == expected

    def test_a_retry_takes_its_place_by_the_time_of_the_retry(self, queue):
        first, second = make_task(eta=10.0), make_task(eta=60.0)
        queue.enqueue_many([first, second])
        settle(queue, take(queue, now=20.0)[0], Settlement(verdict=Verdict.RETRY, at=70.0), now=20.0)
        expected = [second.id, first.id] if queue.capabilities.due_order else [first.id, second.id]
        assert ids(take(queue)) == expected

    def test_a_leased_task_is_not_leased_again(self, queue):
        queue.enqueue_many([make_task()])
        assert len(take(queue)) == 1
        assert take(queue, now=159.9) == []

    @pytest.mark.parametrize("limit", [0, -1])
    def test_a_limit_below_one_leases_nothing(self, queue, limit):
        queue.enqueue_many([make_task()])
        assert take(queue, limit=limit) == []

    def test_a_lease_takes_only_the_queues_that_it_names(self, queue):
        mail, video, default = make_task(queue="mail", eta=3.0), make_task(queue="video", eta=1.0), make_task(eta=2.0)
        queue.enqueue_many([video, default, mail])
        assert take(queue, queues=[]) == []
        assert take(queue, queues=["nothing"]) == []
        assert ids(take(queue, queues=["mail", "video", "mail"], limit=1)) == [video.id]
        assert ids(take(queue, queues=["mail", "video"])) == [mail.id]
        assert ids(take(queue)) == [default.id]

    def test_every_lease_has_an_owner_of_its_own(self, queue):
        queue.enqueue_many([make_task() for _ in range(10)])
        leases = take(queue)
        assert len({lease.owner for lease in leases}) == 10
        assert all(lease.owner.startswith("dispatcher") for lease in leases)

    def test_a_batch_is_stored_whole_or_not_at_all(self, queue):
        taken = make_task(name="taken")
        queue.enqueue_many([taken])
        batch = [make_task(), oversize_task(), make_task(name="taken")]
        with pytest.raises(TaskAlreadyExistsError):
            queue.enqueue_many(batch)
        assert ids(take(queue)) == [taken.id]
        assert queue.blobs.get(batch[1].blob.id) is None

    def test_a_name_twice_in_one_batch_is_refused(self, queue):
        with pytest.raises(TaskAlreadyExistsError):
            queue.enqueue_many([make_task(name="n"), make_task(name="n")])
        assert take(queue) == []

    def test_an_empty_batch_is_nothing(self, queue):
        queue.enqueue_many([])
        assert queue.next_due(now=0.0) is None

    def test_a_task_id_is_accepted_once(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        with pytest.raises(TaskAlreadyExistsError):
            queue.enqueue_many([task._replace(queue="mail")])
        with pytest.raises(TaskAlreadyExistsError):
            queue.enqueue_many([(again := make_task()), again])
        assert ids(take(queue)) == [task.id]

    @pytest.mark.parametrize(
        ("settlement", "error"), [(DONE, TombstonedTaskError), (DEAD, TaskAlreadyExistsError)], ids=["done", "dead"]
    )
    def test_a_task_that_ended_is_not_enqueued_again(self, queue, settlement, error):
        task = make_task()
        queue.enqueue_many([task])
        settle(queue, take_one(queue), settlement, now=101.0)
        with pytest.raises(error):
            queue.enqueue_many([task])
        assert take(queue) == []

    # --- Names --------------------------------------------------------------------------------

    def test_a_name_is_taken_while_its_task_waits_and_runs(self, queue):
        queue.enqueue_many([make_task(name="n")])
        with pytest.raises(TaskAlreadyExistsError):
            queue.enqueue_many([make_task(name="n")])
        take_one(queue)
        with pytest.raises(TaskAlreadyExistsError):
            queue.enqueue_many([make_task(name="n", created=99999.0)])

    @pytest.mark.parametrize("end", ["done", "dead", "cancel"])
    def test_a_name_is_a_tombstone_after_its_task_ended_and_then_free(self, queue, end):
        task = make_task(name="n")
        queue.enqueue_many([task])
        if end == "cancel":
            assert queue.cancel(task.id, now=500.0)
        else:
            settle(queue, take_one(queue), DONE if end == "done" else DEAD, now=500.0)
        with pytest.raises(TombstonedTaskError):
            queue.enqueue_many([make_task(name="n", created=500.0)])
        with pytest.raises(TombstonedTaskError):
            queue.enqueue_many([make_task(name="n", created=500.0 + TOMBSTONE - 0.001)])
        free = make_task(name="n", created=500.0 + TOMBSTONE)
        queue.enqueue_many([free])
        with pytest.raises(TaskAlreadyExistsError):
            queue.enqueue_many([make_task(name="n", created=9999.0)])
        assert ids(take(queue)) == [free.id]

    def test_names_are_per_queue(self, queue):
        queue.enqueue_many([make_task(name="n"), make_task(name="n", queue="mail"), make_task(name="N")])
        assert len(take(queue)) == 3

    # --- Settle -------------------------------------------------------------------------------

    def test_a_done_task_is_gone_and_the_ledger_knows(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        settle(queue, take_one(queue), DONE, now=110.0)
        assert take(queue, now=LATER) == []
        assert queue.next_due(now=110.0) is None
        assert begin(queue.ledger, execution_of(task), now=111.0, lease=60.0) is Admission.DUPLICATE
        view = queue.find(task.id)
        assert (view.state, view.ended, view.attempts, view.token) == (TaskState.SUCCEEDED, 110.0, 1, b"")

    def test_a_retry_is_due_again_with_its_counters(self, queue):
        queue.enqueue_many([make_task()])
        lease = take_one(queue)
        settle(
            queue,
            lease,
            Settlement(verdict=Verdict.RETRY, at=200.0, executed=True, status=408, reason="exception"),
            now=105.0,
        )
        assert take(queue, now=199.9) == []
        again = take_one(queue, now=210.0)
        assert again == Lease(
            task=lease.task,
            owner=again.owner,
            until=270.0,
            attempts=1,
            retries=1,
            executions=1,
            first_attempt=100.0,
            previous_response=408,
            retry_reason="exception",
        )

    def test_an_uncharged_retry_counts_as_a_delivery_only(self, queue):
        queue.enqueue_many([make_task()])
        settle(queue, take_one(queue), Settlement(verdict=Verdict.RETRY, charged=False, status=503), now=105.0)
        again = take_one(queue, now=105.0)
        assert (again.attempts, again.retries, again.executions, again.first_attempt) == (0, 1, 0, None)
        settle(queue, again, Settlement(verdict=Verdict.RETRY), now=106.0)
        third = take_one(queue, now=107.0)
        assert (third.attempts, third.retries, third.first_attempt) == (1, 2, 105.0)
        settle(queue, third, Settlement(verdict=Verdict.RETRY), now=108.0)
        assert take_one(queue, now=109.0).first_attempt == 105.0

    def test_rejections_are_counted_from_the_first(self, queue):
        queue.enqueue_many([make_task()])
        for now in (110.0, 120.0):
            settle(queue, take_one(queue, now=now), Settlement(verdict=Verdict.RETRY, rejected=True), now=now + 1)
        lease = take_one(queue, now=130.0)
        assert (lease.rejections, lease.first_rejection) == (2, 111.0)

    def test_a_dead_letter_keeps_everything(self, queue):
        task = make_task(name="n", headers={"a": "b"}, retry_options={"task_retry_limit": 2.0})
        queue.enqueue_many([task])
        settle(queue, take_one(queue), Settlement(verdict=Verdict.RETRY), now=101.0)
        record = record_of(task, "failed", reason="exception", exception_type="ValueError", traceback="…")
        settle(
            queue,
            take_one(queue, now=102.0),
            Settlement(verdict=Verdict.DEAD, reason="gave-up", record=record),
            now=103.0,
        )
        view = queue.find(task.id)
        assert (view.state, view.reason, view.attempts, view.ended) == (TaskState.DEAD, "gave-up", 2, 103.0)
        assert (view.token, view.audience, view.headers) == (task.token, task.audience, {"a": "b"})
        assert view.retry_options == {"task_retry_limit": 2.0}
        assert (view.eta, view.created, view.expires) == (task.eta, task.created, task.expires)
        assert (view.name, view.queue, view.url, view.target) == ("n", "default", task.url, task.target)
        assert view.callable_name == task.callable_name
        assert list(view.records) == [record]
        assert begin(queue.ledger, execution_of(task), now=104.0, lease=60.0) is Admission.DUPLICATE
        assert take(queue, now=LATER) == []

    def test_a_lost_lease_settles_nothing(self, queue):
        task = make_task(name="n")
        queue.enqueue_many([task])
        old = take_one(queue)
        new = take_one(queue, now=160.0)
        for verdict in Verdict:
            lost = Settlement(verdict=verdict, record=record_of(task))
            assert list(queue.settle_many([(old, lost)], now=161.0)) == [False]
        assert list(queue.extend_many([old], seconds=999.0, now=161.0)) == [False]
        view = queue.find(task.id)
        assert (view.state, view.attempts, list(view.records)) == (TaskState.RUNNING, 0, [])
        assert queue.next_due(now=161.0) == 220.0
        settle(queue, new, DONE, now=162.0)
        assert list(queue.settle_many([(new, DONE)], now=163.0)) == [False]

    def test_a_lease_that_ran_out_settles_while_nobody_else_has_the_task(self, queue):
        queue.enqueue_many([make_task()])
        settle(queue, take_one(queue), DONE, now=9999.0)
        assert take(queue, now=LATER) == []

    def test_several_are_settled_at_once_and_the_lost_ones_told(self, queue):
        queue.enqueue_many([make_task(), make_task(), make_task()])
        first, second, third = take(queue)
        settle(queue, second, DONE, now=101.0)
        retry = Settlement(verdict=Verdict.RETRY, at=300.0)
        assert list(queue.settle_many([(first, DONE), (second, DONE), (third, retry)], now=102.0)) == [
            True,
            False,
            True,
        ]
        assert queue.find(first.task.id).state is TaskState.SUCCEEDED
        assert queue.next_due(now=103.0) == 300.0

    @pytest.mark.parametrize(
        "odd", ["lost", "named", "retried", "twice", "failed", "no entry", "charged", "with a record"]
    )
    def test_what_is_settled_together_ends_as_it_would_alone(self, queue, odd):
        """Engines end many tasks that succeeded by one statement; one that is not like the others spoils none of them."""
        tasks = [make_task(name="odd" if odd == "named" else None), make_task(), make_task()]
        queue.enqueue_many(tasks)
        leases = take(queue)
        first = leases[0]
        if odd == "lost":  # its lease runs out before its run begins
            assert ids(take(queue, now=170.0, limit=1)) == [first.task.id]
        for number, lease in enumerate(leases):
            if number or odd != "no entry":
                run = execution_of(lease.task)
                assert begin(queue.ledger, run, now=170.0, lease=30.0) is Admission.RUN
                if odd == "charged" and not number:  # its lease runs out after that
                    (leases[0],) = take(queue, now=210.0, limit=1)
                state = EndState.FAILED if odd == "failed" and not number else EndState.SUCCEEDED
                finish(queue.ledger, run, state, record_of(lease.task, str(state)))
        settlements = [(lease, DONE) for lease in leases]
        if odd == "retried":
            settlements[0] = (first, Settlement(verdict=Verdict.RETRY, at=900.0, reason="retry"))
        elif odd == "with a record":
            settlements[0] = (first, Settlement(verdict=Verdict.DONE, record=record_of(first.task, "no-response")))
        elif odd == "twice":
            settlements.append((first, DONE))
        kept = list(queue.settle_many(settlements, now=211.0))
        assert kept == [odd != "lost", True, True, *([False] if odd == "twice" else [])]
        states = {"failed": TaskState.DEAD, "lost": TaskState.RUNNING, "retried": TaskState.WAITING}
        views = [queue.find(task.id) for task in tasks]
        assert [view.state for view in views] == [states.get(odd, TaskState.SUCCEEDED), *[TaskState.SUCCEEDED] * 2]
        assert [view.attempts for view in views] == [int(odd != "lost"), 1, 1]
        assert len(views[0].records) == {"no entry": 0, "with a record": 2, "charged": 2}.get(odd, 1)
        if odd == "named":
            with pytest.raises(TombstonedTaskError):
                queue.enqueue_many([make_task(name="odd", created=212.0)])

    def test_extending_keeps_the_task(self, queue):
        queue.enqueue_many([make_task()])
        lease = take_one(queue)
        extend(queue, lease, seconds=60.0, now=150.0)
        assert take(queue, now=209.9) == []
        settle(queue, lease, DONE, now=209.9)

    # --- Leases that run out ------------------------------------------------------------------

    def test_a_lease_that_ran_out_before_the_run_began_is_not_charged(self, queue):
        queue.enqueue_many([make_task()])
        take_one(queue)
        again = take_one(queue, now=160.0)
        assert (again.attempts, again.retries, again.first_attempt) == (0, 1, None)

    def test_a_lease_that_ran_out_after_the_run_began_is_charged_once(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        take_one(queue)
        assert begin(queue.ledger, execution_of(task), now=101.0, lease=30.0) is Admission.RUN
        second = take_one(queue, now=160.0)
        assert (second.attempts, second.retries, second.first_attempt) == (1, 1, 100.0)
        third = take_one(queue, now=220.0)
        assert (third.attempts, third.retries, third.first_attempt) == (1, 2, 100.0)
        assert begin(queue.ledger, execution_of(task, "run-2"), now=221.0, lease=30.0) is Admission.RUN
        fourth = take_one(queue, now=280.0)
        assert (fourth.attempts, fourth.retries, fourth.first_attempt) == (2, 3, 100.0)
        assert [record.reason for record in queue.find(task.id).records] == ["lease-expired", "lease-expired"]

    def test_a_run_that_ended_while_its_dispatcher_died_is_charged(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        take_one(queue)
        run = execution_of(task)
        begin(queue.ledger, run, now=101.0, lease=30.0)
        finish(queue.ledger, run, EndState.RETRY, record_of(task, "retry"))
        assert take_one(queue, now=160.0).attempts == 1
        assert [record.outcome for record in queue.find(task.id).records] == ["retry"]

    @pytest.mark.parametrize("state", [EndState.SUCCEEDED, EndState.FAILED])
    def test_a_run_that_was_charged_with_its_lost_lease_is_not_charged_by_who_finds_it_ended(self, queue, state):
        task = make_task()
        queue.enqueue_many([task])
        take_one(queue)
        run = execution_of(task)
        begin(queue.ledger, run, now=101.0, lease=30.0)
        finish(queue.ledger, run, state, record_of(task))
        again = take_one(queue, now=160.0)
        assert again.attempts == 1
        settle(queue, again, DONE, now=161.0)
        assert queue.find(task.id).attempts == 1

    def test_a_run_that_goes_on_is_charged_in_the_end_although_another_delivery_met_it(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        lease = take_one(queue)
        run = execution_of(task)
        begin(queue.ledger, run, now=101.0, lease=30.0)
        met = Settlement(verdict=Verdict.RETRY, charged=False, status=409, reason="running")
        settle(queue, lease, met, now=102.0)
        finish(queue.ledger, run, EndState.SUCCEEDED, record_of(task))
        settle(queue, take_one(queue, now=103.0), DONE, now=104.0)
        assert queue.find(task.id).attempts == 1

    def test_a_run_that_ended_and_was_not_to_be_charged_is_not_charged_with_a_later_lease(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        lease = take_one(queue)
        run = execution_of(task)
        begin(queue.ledger, run, now=101.0, lease=30.0)
        finish(queue.ledger, run, EndState.RETRY, record_of(task, "rejected"))
        rejected = Settlement(verdict=Verdict.RETRY, charged=False, rejected=True, status=500, reason="rejected")
        settle(queue, lease, rejected, now=102.0)
        take_one(queue, now=103.0)
        assert take_one(queue, now=163.0).attempts == 0

    def test_a_settled_delivery_is_not_charged_twice(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        lease = take_one(queue)
        run = execution_of(task)
        begin(queue.ledger, run, now=101.0, lease=30.0)
        finish(queue.ledger, run, EndState.RETRY, record_of(task, "retry"))
        settle(queue, lease, Settlement(verdict=Verdict.RETRY), now=102.0)
        take_one(queue, now=103.0)
        assert take_one(queue, now=163.0).attempts == 1

    def test_a_failed_run_whose_dispatcher_died_becomes_a_dead_letter(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        take_one(queue)
        run = execution_of(task)
        begin(queue.ledger, run, now=101.0, lease=30.0)
        finish(queue.ledger, run, EndState.FAILED, record_of(task, "failed", reason="permanent-task-failure"))
        # The next delivery is answered "duplicate", which says no more than that the task ended.
        settle(queue, take_one(queue, now=160.0), Settlement(verdict=Verdict.DONE, charged=False), now=161.0)
        view = queue.find(task.id)
        assert (view.state, view.reason, view.token) == (TaskState.DEAD, "permanent-task-failure", task.token)

    def test_a_task_that_succeeded_by_the_ledger_is_not_a_dead_letter(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        lease = take_one(queue)
        run = execution_of(task)
        begin(queue.ledger, run, now=101.0, lease=30.0)
        finish(queue.ledger, run, EndState.SUCCEEDED, record_of(task))
        settle(queue, lease, DEAD, now=102.0)
        assert queue.find(task.id).state is TaskState.SUCCEEDED

    # --- The rules, which are written once ------------------------------------------------------

    @pytest.mark.parametrize("lost", [False, True], ids=["held", "lost"])
    @pytest.mark.parametrize("run", RUNS)
    def test_an_engine_settles_as_the_rules_say(self, queue, run, lost):
        tasks = [make_task() for _ in SETTLEMENTS]
        queue.enqueue_many(tasks)
        leases, now, leased = take(queue), 100.0, 100.0
        runs = [execution_of(task) for task in tasks]
        known = None
        if run is not None:
            assert set(queue.ledger.begin_many(runs, now=now, lease=30.0)) == {Admission.RUN}
            known = rules.Known(rules.RUNNING, uncharged=True, alive=True)
        if run in tuple(EndState):
            records = [record_of(task, str(run), reason="recorded") for task in tasks]
            assert all(queue.ledger.finish_many([(item, run, r) for item, r in zip(runs, records, strict=True)]))
            known = known._replace(state=str(run))
        before, recorded = rules.Counters(), "recorded" if run in tuple(EndState) else None
        if lost:
            now = leased = 160.0
            known = known and known._replace(alive=False)
            delivery = rules.after_lost_lease(before, ("a", "i"), known, leased_at=100.0, now=now)
            before, leases = delivery.counters, take(queue, now=now)
            recorded = LOST_LEASE if delivery.record else recorded
            known = known and known._replace(uncharged=False)
        assert [rules.Counters.of(lease) for lease in leases] == [before] * len(tasks)
        leases.sort(key=lambda lease: lease.task.id)
        assert all(queue.settle_many(list(zip(leases, SETTLEMENTS, strict=True)), now=now + 1))
        settled = [
            rules.by_ledger(lease, item, known, now=now + 1) for lease, item in zip(leases, SETTLEMENTS, strict=True)
        ]
        for task, settlement in zip(tasks, settled, strict=True):
            if settlement.verdict is not Verdict.RETRY:
                end, view = rules.end_of(settlement, known), queue.find(task.id)
                reason = (recorded if end.by_record else None) or end.reason
                expected = (VIEWED[end.state], before.attempts + end.charged, reason)
                assert (view.state, view.attempts, view.reason) == expected, settlement
        retries = [item for item in settled if item.verdict is Verdict.RETRY]
        after = [rules.after_retry(before, item, leased_at=leased, now=now + 1) for item in retries]
        # What a RETRY left to be charged is charged by the next lease, as its run was lost.
        over = known and known._replace(alive=False)
        owed = [
            known and known._replace(uncharged=known.uncharged and not rules.retry_charges(item, known))
            for item in retries
        ]
        gone = [
            rules.has_lost_run(item.reason, left and left._replace(alive=False))
            for item, left in zip(retries, owed, strict=True)
        ]
        after = [
            rules.after_lost_run(counters, ("a", "i"), over, now=300.0, retry_options={}, eta=0.0).counters
            if lost_run
            else counters
            for counters, lost_run in zip(after, gone, strict=True)
        ]
        again = sorted(take(queue, now=300.0), key=lambda lease: lease.task.id)
        assert [rules.Counters.of(lease) for lease in again] == after
        # Whether the settlement charged the run shows when the next lease is lost.
        known = known and known._replace(alive=False)
        expected = []
        for counters, left, lost_run in zip(after, owed, gone, strict=True):
            left = left and left._replace(alive=False, uncharged=left.uncharged and not lost_run)
            expected.append(rules.after_lost_lease(counters, ("a", "i"), left, leased_at=300.0, now=400.0).counters)
        third = sorted(take(queue, now=400.0), key=lambda lease: lease.task.id)
        assert [rules.Counters.of(lease) for lease in third] == expected

    def test_a_task_that_ends_its_handler_as_often_as_its_retry_limit_says_is_a_dead_letter(self, queue):
        task, now = make_task(retry_options={"task_retry_limit": 1}), 100.0
        queue.enqueue_many([task])
        silent = Settlement(verdict=Verdict.RETRY, at=now, reason="no-response", answered=False)
        for attempts in (0, 1):
            lease = take_one(queue, now=now)
            assert lease.attempts == attempts
            begin(queue.ledger, execution_of(task, f"run {attempts}"), now=now, lease=30.0)
            settle(queue, lease, silent, now=now + 1)
            assert queue.find(task.id).state is TaskState.WAITING, "its run may go on"
            now += 60.0
        assert take(queue, now=now) == []
        view = queue.find(task.id)
        assert (view.state, view.reason, view.attempts) == (TaskState.DEAD, "retry-limit", 2)
        assert [record.reason for record in view.records] == [LOST_LEASE] * 2

    def test_a_run_that_is_lost_while_its_task_is_leased_again_is_charged(self, queue):
        task = make_task(retry_options={"task_retry_limit": 1})
        queue.enqueue_many([task])
        silent = Settlement(verdict=Verdict.RETRY, at=100.0, reason="no-response", answered=False)
        lease = take_one(queue, now=100.0)
        begin(queue.ledger, execution_of(task, "run 0"), now=100.0, lease=30.0)
        settle(queue, lease, silent, now=101.0)
        # Just before the run's lease is over: a delivery would begin a second run just after it.
        assert take(queue, now=129.9) == []
        assert [(lease.attempts, lease.retries) for lease in take(queue, now=130.9)] == [(1, 1)]

    def test_a_task_that_ends_its_handler_again_and_again_is_charged_and_dead_in_the_end(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        silent = Settlement(verdict=Verdict.DEAD, reason="retry-limit", answered=False)
        seen = []
        for now in (100.0, 300.0, 500.0, 700.0, 900.0, 1100.0):
            leases = take(queue, now=now)
            if not leases:
                break
            (lease,) = leases
            seen.append((lease.attempts, lease.losses))
            assert begin(queue.ledger, execution_of(task, f"run-{now}"), now=now, lease=30.0) is Admission.RUN
            settle(queue, lease, silent, now=now + 1)
            assert take(queue, now=now + 3) == [], "its run may go on"
        assert seen == [(n, n) for n in range(5)]
        view = queue.find(task.id)
        assert (view.state, view.attempts, view.reason) == (TaskState.DEAD, 5, "poison")

    @pytest.mark.parametrize("now", [110.0, 200.0], ids=["alive", "over"])
    @pytest.mark.parametrize("run", RUNS[1:])
    def test_an_engine_admits_and_cancels_as_the_rules_say(self, queue, run, now):
        task = make_task()
        queue.enqueue_many([task])
        first = execution_of(task)
        assert begin(queue.ledger, first, now=100.0, lease=30.0) is Admission.RUN
        if run in tuple(EndState):
            assert finish(queue.ledger, first, run, record_of(task))
        ended = run in tuple(EndState)
        known = rules.Known(str(run), uncharged=True, alive=not ended and now < 130.0)
        owner = None if ended else first.owner
        for asked in (first._replace(digest=b"another"), execution_of(task, "run-2"), first):
            expected = rules.admit(asked, digest=first.digest, owner=owner, entry=known)
            assert begin(queue.ledger, asked, now=now, lease=30.0) is expected
            if expected is Admission.RUN:
                known, owner = rules.Known(rules.RUNNING, uncharged=True, alive=True), asked.owner
        assert queue.cancel(task.id, now=now) is rules.may_stop(known)
        # It is marked only where it runs; the queue keeps it until its delivery ends.
        assert (queue.find(task.id).state is TaskState.CANCELLED) is rules.may_cancel(known)

    # --- Cancel -------------------------------------------------------------------------------

    def test_a_cancelled_task_does_not_run(self, queue):
        task = oversize_task()
        queue.enqueue_many([task])
        assert queue.cancel(task.id, now=100.0) is True
        assert queue.cancel(task.id, now=100.0) is False
        assert take(queue, now=LATER) == []
        assert begin(queue.ledger, execution_of(task), now=101.0, lease=60.0) is Admission.DUPLICATE
        assert queue.blobs.get(task.blob.id) is None
        view = queue.find(task.id)
        assert (view.state, view.ended, view.attempts) == (TaskState.CANCELLED, 100.0, 0)

    def test_only_a_task_that_has_not_ended_is_cancelled(self, queue):
        task = make_task()
        assert queue.cancel(task.id, now=100.0) is False
        queue.enqueue_many([task])
        settle(queue, take_one(queue), DONE, now=159.9)
        assert queue.cancel(task.id, now=160.0) is False
        assert queue.find(task.id).state is TaskState.SUCCEEDED

    @pytest.mark.parametrize("verdict", ["done", "dead", "retry", "lost"])
    @pytest.mark.parametrize("runs", [True, False])
    def test_a_task_that_is_leased_or_runs_is_marked_and_its_delivery_ends_as_cancelled(self, queue, runs, verdict):
        task, other = oversize_task(), make_task()
        queue.enqueue_many([task])
        lease = take_one(queue)
        run, bystander = execution_of(task), execution_of(other)
        begin(queue.ledger, bystander, now=100.0, lease=60.0)
        if runs:
            begin(queue.ledger, run, now=100.0, lease=60.0)
        assert list(queue.ledger.cancelled_many([bystander, run])) == [False, False]
        assert queue.cancel(task.id, now=101.0) is True
        assert queue.cancel(task.id, now=101.0) is False, "it has ended by the ledger"
        assert list(queue.ledger.cancelled_many([bystander, run])) == [False, True]
        assert queue.find(task.id).state is TaskState.RUNNING
        assert queue.blobs.get(task.blob.id) is not None, "the handler may be about to read it"
        assert list(queue.ledger.extend_many([run], now=102.0, lease=60.0)) == [False]
        assert finish(queue.ledger, run, EndState.SUCCEEDED, record_of(task)) is False
        assert begin(queue.ledger, execution_of(task, "run-2"), now=102.0, lease=60.0) is Admission.DUPLICATE
        if verdict == "retry":
            settle(queue, lease, Settlement(verdict=Verdict.RETRY, at=103.0), now=103.0)
        if verdict in {"retry", "lost"}:
            lease = take_one(queue, now=170.0)
        settle(queue, lease, DEAD if verdict == "dead" else DONE, now=171.0)
        view = queue.find(task.id)
        assert (view.state, view.attempts) == (TaskState.CANCELLED, int(runs or verdict == "retry"))
        assert queue.blobs.get(task.blob.id) is None

    def test_a_task_whose_lease_ran_out_is_cancelled(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        lease = take_one(queue)
        begin(queue.ledger, execution_of(task), now=100.0, lease=60.0)
        assert queue.cancel(task.id, now=210.0) is True
        assert queue.find(task.id).state is TaskState.CANCELLED
        assert list(queue.settle_many([(lease, DONE)], now=211.0)) == [False]

    # --- Oversize -----------------------------------------------------------------------------

    def test_a_blob_is_stored_with_its_task(self, queue):
        task = oversize_task()
        queue.enqueue_many([task])
        lease = take_one(queue)
        assert whole(lease.task) == task._replace(blob=None, blob_id=task.blob.id)
        assert queue.blobs.get(task.blob.id) == task.blob.data
        assert queue.find(task.id).token == task.blob.data

    @pytest.mark.parametrize("settlement", [DONE, DEAD], ids=["done", "dead"])
    def test_a_blob_goes_when_its_task_ends(self, queue, settlement):
        task = oversize_task()
        queue.enqueue_many([task])
        settle(queue, take_one(queue), Settlement(verdict=Verdict.RETRY), now=101.0)
        assert queue.blobs.get(task.blob.id) == task.blob.data
        settle(queue, take_one(queue, now=102.0), settlement, now=103.0)
        assert queue.blobs.get(task.blob.id) is None

    def test_a_dead_letter_keeps_the_stored_token(self, queue):
        task = oversize_task()
        queue.enqueue_many([task])
        settle(queue, take_one(queue), DEAD, now=101.0)
        assert queue.find(task.id).token == task.blob.data
        assert queue.tasks(states=[TaskState.DEAD])[0].token == task.blob.data

    def test_a_dead_letter_whose_blob_is_gone_keeps_the_pointer(self, queue):
        task = oversize_task()
        queue.enqueue_many([task])
        queue.blobs.delete(task.blob.id)
        queue.blobs.delete(task.blob.id)
        settle(queue, take_one(queue), DEAD, now=101.0)
        assert queue.find(task.id).token == b"pointer"

    def test_a_blob_belongs_to_one_task(self, queue):
        task = oversize_task()
        queue.enqueue_many([task])
        other = make_task(blob=Blob(task.blob.id, b"other"))
        with pytest.raises(TaskAlreadyExistsError):
            queue.enqueue_many([other])
        assert queue.blobs.get(task.blob.id) == task.blob.data
        assert queue.find(other.id) is None

    def test_a_blob_that_is_not_there_is_none(self, queue):
        assert queue.blobs.get("nothing-of-this-name") is None

    # --- Looking ------------------------------------------------------------------------------

    def test_next_due_is_the_first_eta_retry_or_end_of_a_lease(self, queue):
        assert queue.next_due(now=0.0) is None
        queue.enqueue_many([make_task(eta=100.0), make_task(eta=300.0, queue="mail")])
        assert queue.next_due(now=0.0) == 100.0
        assert queue.next_due(now=0.0, queues=["mail"]) == 300.0
        assert queue.next_due(now=0.0, queues=["mail", "default"]) == 100.0
        assert queue.next_due(now=0.0, queues=[]) is None
        take_one(queue)
        assert queue.next_due(now=100.0) == 160.0

    def test_stats_count_by_queue(self, queue):
        assert list(queue.stats(now=100.0)) == []
        queue.enqueue_many([make_task(queue="z", eta=90.0), *(make_task(eta=100.0 + n) for n in range(4))])
        queue.enqueue_many([make_task(queue="a", eta=500.0)])
        dead, running = take(queue, now=100.0, limit=2)
        assert (dead.task.queue, running.task.queue) == ("z", "default")
        settle(queue, dead, DEAD, now=101.0)
        assert list(queue.stats(now=159.0)) == [
            QueueStats(queue="a", waiting=1, running=0, dead=0, oldest=500.0),
            QueueStats(queue="default", waiting=3, running=1, dead=0, oldest=101.0),
            QueueStats(queue="z", waiting=0, running=0, dead=1, oldest=None),
        ]
        # The lost one should have run at its eta.
        assert queue.stats(now=160.0)[1] == QueueStats(queue="default", waiting=4, running=0, dead=0, oldest=100.0)

    def test_what_put_a_task_off_does_not_make_it_younger(self, queue):
        queue.enqueue_many([make_task(eta=100.0), make_task(eta=4000.0), make_task(eta=100.0, queue="mail")])
        for number in range(1, 4):  # a handler that is down, or fails
            (lease,) = take(queue, now=100.0 + 100.0 * number, queues=["default"])
            settlement = Settlement(
                verdict=Verdict.RETRY, at=100.0 + 100.0 * (number + 1), charged=number == 2, reason="unreachable"
            )
            settle(queue, lease, settlement, now=101.0 + 100.0 * number)
            oldest = {stats.queue: stats.oldest for stats in queue.stats(now=150.0 + 100.0 * number)}
            assert oldest == {"default": 100.0, "mail": 100.0}

    def test_tasks_are_listed_by_state_newest_first(self, queue):
        tasks = [make_task(created=float(n), eta=float(n), queue="mail" if n % 2 else "default") for n in range(6)]
        queue.enqueue_many(tasks)
        leases = take(queue, limit=4)
        settle(queue, leases[0], DONE, now=101.0)
        settle(queue, leases[1], DEAD, now=102.0)
        queue.cancel(tasks[5].id, now=103.0)

        def listed(**filters: object) -> list[int]:
            return [int(view.created) for view in queue.tasks(**filters)]

        assert listed() == [4, 3, 2, 1]
        assert listed(limit=2) == [4, 3]
        assert listed(queue="mail") == [3, 1]
        assert listed(states=[TaskState.WAITING]) == [4]
        assert listed(states=[TaskState.RUNNING]) == [3, 2]
        assert listed(states=[TaskState.DEAD]) == [1]
        assert listed(states=[TaskState.SUCCEEDED]) == [0]
        assert listed(states=[TaskState.CANCELLED]) == [5]
        assert listed(states=list(TaskState)) == [5, 4, 3, 2, 1, 0]
        assert queue.find("0" * 31 + "x") is None

    def test_living_tasks_are_listed_in_pages_by_their_places(self, queue):
        tasks = [make_task(queue="mail" if n % 2 else "default") for n in range(6)]
        queue.enqueue_many(tasks)
        first, second = take(queue, limit=2)
        settle(queue, first, DEAD, now=102.0)
        settle(queue, second, RETRY_NOW, now=102.0)

        def paged(**filters: object) -> list[str]:
            found, after = [], 0
            while page := queue.live_tasks(after=after, limit=2, **filters):
                assert len(page) <= 2
                places = [place for place, _ in page]
                assert places == sorted(places)
                assert places[0] > after
                found += [view.id for _, view in page]
                after = places[-1]
            return found

        ids = [task.id for task in tasks if task.id != first.task.id]
        assert paged() == ids
        assert paged(queue="mail") == [task.id for task in tasks if task.queue == "mail" and task.id in ids]
        assert paged(queue="none") == []

    def test_a_waiting_task_says_when_it_is_due(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        assert queue.find(task.id).due == pytest.approx(100.0)
        settlement = Settlement(verdict=Verdict.RETRY, at=1_700.0, status=500, reason="retry")
        settle(queue, take(queue)[0], settlement, now=101.0)
        ((_, view),) = queue.live_tasks()
        assert (view.eta, view.due) == (100.0, pytest.approx(1_700.0))

    def pages(self, of, state, /, **options):
        """Return the created times of all pages of a state, and how many pages there were."""
        found, after, count = [], None, 0
        while count < 50:
            page = of.page(state, after=after, **options)
            found += [int(task.view.created) for task in page.tasks]
            count, after = count + 1, page.after
            assert {task.view.state for task in page.tasks} <= {state}
            if after is None:
                return found, count
        raise AssertionError("the pages have no end")

    def test_every_state_is_listed_in_pages_newest_first(self, queue):
        tasks = [make_task(created=float(n), eta=float(n), queue="mail" if n % 2 else "default") for n in range(18)]
        queue.enqueue_many(tasks)
        leases = take(queue, limit=14)
        for number, end in enumerate((DONE,) * 4 + (DEAD,) * 5):
            settle(queue, leases[number], end, now=101.0 + number)
        queue.cancel(tasks[17].id, now=200.0)
        for look in (1, 2, 100):
            assert self.pages(queue, TaskState.WAITING, look=look)[0] == [16, 15, 14]
            assert self.pages(queue, TaskState.RUNNING, look=look)[0] == [13, 12, 11, 10, 9]
            assert self.pages(queue, TaskState.DEAD, look=look)[0] == [8, 7, 6, 5, 4]
            assert self.pages(queue, TaskState.SUCCEEDED, look=look)[0] == [3, 2, 1, 0]
            assert self.pages(queue, TaskState.CANCELLED, look=look)[0] == [17]
            for state, expected in (
                (TaskState.WAITING, [15]), (TaskState.RUNNING, [13, 11, 9]), (TaskState.DEAD, [7, 5]),
                (TaskState.SUCCEEDED, [3, 1]), (TaskState.CANCELLED, [17]),
            ):  # fmt: skip
                assert self.pages(queue, state, queue="mail", look=look)[0] == expected
        assert self.pages(queue, TaskState.WAITING, look=1)[1] >= 3
        assert queue.page(TaskState.DEAD, queue="none").tasks == []

    def test_a_page_shows_the_token_and_no_records(self, queue):
        task = make_task(name="n")
        queue.enqueue_many([task])
        ((position, view),) = queue.page(TaskState.WAITING).tasks
        assert (position[1], view.id, view.token, view.name) == (task.id, task.id, task.token, "n")
        assert not view.records

    @pytest.mark.parametrize(
        "after", [(1e300, ""), (-1e300, "x"), (0.0, "\0"), (2.0**63, "\uffff"), (float("inf"), "")]
    )
    @pytest.mark.parametrize("state", list(TaskState))
    def test_a_position_that_somebody_made_up_is_some_position(self, queue, state, after):
        assert queue.page(state, after=after).tasks == []

    def test_what_ended_is_counted_by_queue_state_and_time(self, queue):
        tasks = [make_task(eta=float(n), queue="mail" if n == 5 else "default") for n in range(6)]
        queue.enqueue_many(tasks)
        ends = ((DONE, 120.0), (DONE, 150.0), (DONE, 190.0), (DEAD, 170.0), (DONE, 241.0))
        for lease, (end, now) in zip(take(queue, queues=["default"]), ends, strict=True):
            settle(queue, lease, end, now=now)
        queue.cancel(tasks[5].id, now=131.0)
        assert sorted(queue.ends(since=130.0, step=60.0)) == [
            ("default", TaskState.DEAD, 0, 1),
            ("default", TaskState.SUCCEEDED, 0, 1),
            ("default", TaskState.SUCCEEDED, 1, 2),
            ("mail", TaskState.CANCELLED, 0, 1),
        ]
        assert sum(each.number for each in queue.ends(since=0.0, step=60.0)) == 6
        assert sum(each.number for each in queue.ends(since=0.0, step=1e6, most=1)) in {1, 2}
        assert queue.ends(since=1e6, step=60.0) == []

    def test_how_long_the_newest_attempts_took_is_told(self, queue):
        queue.enqueue_many([make_task(queue="mail", audience="prod:mail:default:/") for _ in range(3)])
        state = iter((EndState.SUCCEEDED, EndState.FAILED, EndState.SUCCEEDED))
        for lease, (started, ended) in zip(take(queue), ((10.0, 12.5), (20.0, 20.25), (30.0, 29.0)), strict=True):
            run, end = execution_of(lease.task), next(state)
            assert begin(queue.ledger, run, now=10.0, lease=60.0) is Admission.RUN
            finish(queue.ledger, run, end, record_of(lease.task, str(end), started=started, ended=ended))
            settle(queue, lease, DEAD if end is EndState.FAILED else DONE, now=ended)
        found = sorted(queue.attempt_times(since=0.0))
        assert found == [("mail", 0.0), ("mail", 0.25), ("mail", 2.5)]  # a clock that was set back took no time
        assert sorted(queue.attempt_times(since=15.0)) == found[:2]
        assert len(queue.attempt_times(since=0.0, most=1)) in {1, 2}

    def test_a_notice_replaces_what_the_process_said_before(self, queue):
        queue.put_notice("run 1", "a", now=100.0)
        queue.put_notice("run 2", "b", now=101.0)
        queue.put_notice("run 1", "c", now=102.0)
        assert queue.notices(since=0.0) == [("run 1", "c", 102.0), ("run 2", "b", 101.0)]
        assert queue.notices(since=101.5) == [("run 1", "c", 102.0)]
        queue.put_notice("run 1", "", now=103.0)
        assert queue.notices(since=0.0) == [("run 2", "b", 101.0)]

    def test_notices_are_bounded_and_go_by_their_age(self, queue):
        for number in range(NOTICES + 5):
            queue.put_notice(f"run {number}", "x", now=100.0 + number)
        queue.put_notice("long", "x" * (NOTICE_BYTES + 1), now=300.0)
        found = queue.notices(since=0.0)
        assert (len(found), found[0]) == (NOTICES, ("long", "", 300.0))
        queue.put_notice("new", "x", now=300.0 + NOTICE_SECONDS + 1.0)
        assert [each.process for each in queue.notices(since=0.0)] == ["new"]

    def test_only_the_newest_hundred_records_of_a_task_are_kept(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        for number in range(105):
            queue.ledger.record_many([record_of(task, "retry", started=float(number))])
        assert [record.started for record in queue.find(task.id).records] == [float(n) for n in range(5, 105)]

    # --- Dead letters again -------------------------------------------------------------------

    def test_a_dead_letter_is_replaced_by_a_new_task(self, queue):
        dead = make_task()
        queue.enqueue_many([dead])
        settle(queue, take_one(queue), DEAD, now=101.0)
        again = oversize_task()
        assert queue.replace_dead(dead.id, again, letter_of(dead), now=102.0) is True
        assert queue.find(dead.id) is None
        assert ids(take(queue)) == [again.id]
        assert queue.blobs.get(again.blob.id) == again.blob.data
        assert queue.replace_dead(dead.id, make_task(), letter_of(dead), now=103.0) is False

    def test_a_dead_letter_stays_when_its_replacement_is_refused(self, queue):
        dead, named = make_task(), make_task(name="n")
        queue.enqueue_many([dead])
        settle(queue, take_one(queue), DEAD, now=101.0)
        queue.enqueue_many([named])
        with pytest.raises(TaskAlreadyExistsError):
            queue.replace_dead(dead.id, make_task(name="n"), letter_of(dead), now=102.0)
        assert queue.find(dead.id).state is TaskState.DEAD
        assert queue.replace_dead(named.id, make_task(), letter_of(named), now=103.0) is False

    def test_a_replaced_task_runs_no_more_and_is_replaced_no_second_time(self, queue):
        dead = make_task()
        queue.enqueue_many([dead])
        settle(queue, take_one(queue), DEAD, now=101.0)
        assert queue.replace_dead(dead.id, make_task(), letter_of(dead), now=102.0) is True
        assert begin(queue.ledger, execution_of(dead), now=103.0, lease=60.0) is Admission.DUPLICATE
        # Its row comes back, as whoever writes the storage can do; the task that it would become does not.
        queue.enqueue_many([dead])
        (lease,) = [lease for lease in take(queue, now=103.0) if lease.task.id == dead.id]
        settle(queue, lease, DEAD, now=103.0)
        assert queue.find(dead.id).state is TaskState.CANCELLED

    @pytest.mark.parametrize("expired", [False, True])
    @pytest.mark.parametrize("how", ["succeeded", "replaced", "runs", "other"])
    def test_a_letter_that_the_ledger_contradicts_is_not_replaced(self, queue, expired, how):
        dead = make_task()
        self.plant(queue, dead)
        entry = execution_of(dead, audience=PLANTED, **({"digest": b"another"} if how == "other" else {}))
        letter = letter_of(dead, audience=PLANTED)
        if how == "replaced":
            assert queue.replace_dead(dead.id, make_task(eta=1e6), letter, now=101.0) is True
            self.plant(queue, dead)
        else:
            assert begin(queue.ledger, entry, now=100.0, lease=60.0) is Admission.RUN
        if how in ("succeeded", "other"):
            end = EndState.SUCCEEDED if how == "succeeded" else EndState.FAILED
            assert finish(queue.ledger, entry, end, record_of(dead))
        with pytest.raises(ReplayedTask, match="defer"):
            queue.replace_dead(dead.id, make_task(), letter._replace(expired=expired), now=102.0)
        assert queue.find(dead.id).state is TaskState.DEAD
        assert take(queue, now=102.0) == []

    @pytest.mark.parametrize("how", ["unknown", "retry", "lost"])
    def test_an_expired_letter_needs_the_proof_that_it_died_and_another_does_not(self, queue, how):
        dead = make_task()
        self.plant(queue, dead)
        entry = execution_of(dead, audience=PLANTED)
        if how != "unknown":
            assert begin(queue.ledger, entry, now=100.0, lease=1.0) is Admission.RUN
        if how == "retry":
            assert finish(queue.ledger, entry, EndState.RETRY, record_of(dead, "retry"))
        letter = letter_of(dead, audience=PLANTED)
        with pytest.raises(ExpiredTask, match="defer it anew"):
            queue.replace_dead(dead.id, make_task(created=102.0), letter._replace(expired=True), now=102.0)
        assert queue.find(dead.id).state is TaskState.DEAD
        assert queue.replace_dead(dead.id, make_task(created=102.0), letter, now=102.0) is True
        assert begin(queue.ledger, entry._replace(owner="run-2"), now=103.0, lease=60.0) is Admission.DUPLICATE

    def test_a_letter_that_expired_is_replaced_for_as_long_as_it_is_there(self, queue):
        dead, dropped = make_task(expires=1000), make_task(expires=1000)
        queue.enqueue_many([dead, dropped])
        queue.settle_many([(lease, DEAD) for lease in take(queue)], now=101.0)
        for now in (5000.0, 5001.0):
            queue.prune(now=now)
        assert begin(queue.ledger, execution_of(dead), now=5002.0, lease=60.0) is Admission.DUPLICATE
        assert queue.replace_dead(dead.id, make_task(eta=1e6), letter_of(dead, expired=True), now=5003.0) is True
        # The entry goes with the letter, whichever way that went; what comes back later has no proof.
        assert queue.drop_dead([dropped.id]) == 1
        queue.prune(now=5004.0)
        for task in (dead, dropped):
            self.plant(queue, task)
            with pytest.raises(ExpiredTask):
                queue.replace_dead(task.id, make_task(), letter_of(task, expired=True, audience=PLANTED), now=5005.0)

    @staticmethod
    def plant(queue, task):
        """Make a dead letter of a task, without the entry in the ledger that its token names: that is of ``PLANTED``."""
        queue.enqueue_many([task])
        settle(queue, take_one(queue, now=100.0), DEAD, now=100.0)

    # --- Ledger -------------------------------------------------------------------------------

    def test_a_task_runs_in_one_place_at_a_time(self, queue):
        task, ledger = make_task(), queue.ledger
        first, second = execution_of(task, "run-1"), execution_of(task, "run-2")
        assert begin(ledger, first, now=100.0, lease=60.0) is Admission.RUN
        assert begin(ledger, second, now=159.9, lease=60.0) is Admission.RUNNING
        assert ledger.extend_many([second], now=159.9, lease=60.0)[0] is False
        assert ledger.extend_many([first], now=159.9, lease=60.0)[0] is True
        assert begin(ledger, second, now=219.8, lease=60.0) is Admission.RUNNING
        assert begin(ledger, second, now=220.0, lease=60.0) is Admission.RUN
        assert ledger.extend_many([first], now=221.0, lease=60.0)[0] is False
        assert finish(ledger, first, EndState.RETRY, record_of(task, "retry")) is False
        assert begin(ledger, first, now=222.0, lease=60.0) is Admission.RUNNING
        assert finish(ledger, second, EndState.SUCCEEDED, record_of(task)) is True
        assert begin(ledger, first, now=223.0, lease=60.0) is Admission.DUPLICATE
        assert finish(ledger, second, EndState.FAILED, record_of(task)) is False
        assert ledger.extend_many([second], now=223.0, lease=60.0)[0] is False

    @pytest.mark.parametrize("digest", ["same", "another"])
    @pytest.mark.parametrize("ours", [True, False])
    @pytest.mark.parametrize("before", [None, *EndState])
    @pytest.mark.parametrize("end", EndState)
    def test_an_end_counts_as_the_rules_say(self, queue, end, before, ours, digest):
        task, ledger = make_task(), queue.ledger
        first, second = execution_of(task, "run-1"), execution_of(task, "run-2")
        begin(ledger, first, now=100.0, lease=60.0)
        assert begin(ledger, second, now=170.0, lease=60.0) is Admission.RUN
        if before is not None:
            assert finish(ledger, second, before, record_of(task, "retry"))
        ended = (second if ours else first)._replace(**({} if digest == "same" else {"digest": b"another"}))
        known = rules.Known("running" if before is None else str(before), uncharged=True, alive=before is None)
        counts = digest == "same" and rules.end_counts(end, known, ours=ours)
        assert finish(ledger, ended, end, record_of(task, "retry")) is counts
        state = str(end) if counts else known.state
        expected = {"running": Admission.RUNNING, "retry": Admission.RUN}.get(state, Admission.DUPLICATE)
        assert begin(ledger, execution_of(task, "run-3"), now=171.0, lease=60.0) is expected

    @pytest.mark.parametrize("late", [EndState.SUCCEEDED, EndState.FAILED, EndState.CANCELLED])
    def test_a_late_end_counts_and_the_queue_believes_it(self, queue, late):
        task = make_task()
        queue.enqueue_many([task])
        lost = execution_of(task, "run-1")
        take_one(queue, seconds=60.0)
        begin(queue.ledger, lost, now=100.0, lease=60.0)
        lease = take_one(queue, now=161.0)
        second = execution_of(task, "run-2")
        assert begin(queue.ledger, second, now=161.0, lease=60.0) is Admission.RUN
        ends = [
            (lost, late, record_of(task, str(late))),
            (second, EndState.RETRY, record_of(task, "retry")),
            (second, EndState.SUCCEEDED, record_of(task, started=161.0)),
        ]
        assert list(queue.ledger.finish_many(ends)) == [True, False, False]
        assert begin(queue.ledger, execution_of(task, "run-3"), now=162.0, lease=60.0) is Admission.DUPLICATE
        settle(queue, lease, DONE, now=163.0)
        states = {"succeeded": TaskState.SUCCEEDED, "failed": TaskState.DEAD, "cancelled": TaskState.CANCELLED}
        assert queue.find(task.id).state is states[str(late)]

    def test_a_retry_and_a_late_success_in_one_call_are_a_success(self, queue):
        task, ledger = make_task(), queue.ledger
        first, second = execution_of(task, "run-1"), execution_of(task, "run-2")
        begin(ledger, first, now=100.0, lease=60.0)
        begin(ledger, second, now=161.0, lease=60.0)
        ends = [(second, EndState.RETRY, record_of(task, "retry")), (first, EndState.SUCCEEDED, record_of(task))]
        assert list(ledger.finish_many(ends)) == [True, True]
        assert begin(ledger, execution_of(task, "run-3"), now=162.0, lease=60.0) is Admission.DUPLICATE

    @pytest.mark.parametrize("state", [EndState.SUCCEEDED, EndState.FAILED, EndState.CANCELLED])
    def test_a_run_that_ended_is_a_duplicate(self, queue, state):
        task = make_task()
        run = execution_of(task)
        begin(queue.ledger, run, now=100.0, lease=60.0)
        assert finish(queue.ledger, run, state, record_of(task)) is True
        assert begin(queue.ledger, execution_of(task, "run-2"), now=101.0, lease=60.0) is Admission.DUPLICATE

    def test_a_run_that_failed_may_begin_again_at_once_where_the_queue_does_not_have_the_task(self, queue):
        """Its token was serialized and posted by somebody's own means: nobody settles a delivery of it."""
        task = make_task()
        for number in range(3):
            run = execution_of(task, f"run-{number}")
            assert begin(queue.ledger, run, now=100.0 + number, lease=60.0) is Admission.RUN
            assert finish(queue.ledger, run, EndState.RETRY, record_of(task, "retry")) is True
        assert begin(queue.ledger, execution_of(task, "run-3"), now=104.0, lease=60.0) is Admission.RUN

    def test_a_run_that_failed_may_begin_again_when_its_delivery_is_settled_and_its_time_has_come(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        lease, run = take_one(queue), execution_of(task)
        begin(queue.ledger, run, now=100.0, lease=60.0)
        assert finish(queue.ledger, run, EndState.RETRY, record_of(task, "retry")) is True
        assert queue.ledger.extend_many([run], now=101.0, lease=60.0)[0] is False
        again = execution_of(task, "run-2")
        assert begin(queue.ledger, again, now=101.0, lease=60.0) is Admission.UNSETTLED
        settle(queue, lease, Settlement(verdict=Verdict.RETRY, at=130.0), now=102.0)
        for early in (102.0, 129.0):
            assert begin(queue.ledger, again, now=early, lease=60.0) is Admission.EARLY
        assert take_one(queue, now=130.1).attempts == 1
        assert begin(queue.ledger, again, now=130.2, lease=60.0) is Admission.RUN

    @pytest.mark.parametrize("wait", [0.0, None])
    def test_a_retry_that_is_due_at_once_begins_at_once(self, queue, wait):
        task = make_task()
        queue.enqueue_many([task])
        lease, run = take_one(queue), execution_of(task)
        begin(queue.ledger, run, now=100.0, lease=60.0)
        finish(queue.ledger, run, EndState.RETRY, record_of(task, "retry"))
        at = None if wait is None else 101.0 + wait
        settle(queue, lease, Settlement(verdict=Verdict.RETRY, at=at), now=101.0)
        take_one(queue, now=101.0)
        assert begin(queue.ledger, execution_of(task, "run-2"), now=101.0, lease=60.0) is Admission.RUN

    def test_a_delivery_that_no_handler_took_moves_no_retry(self, queue):
        """Else a handler whose clock is late would be early for ever."""
        task = make_task()
        queue.enqueue_many([task])
        lease, run = take_one(queue), execution_of(task)
        begin(queue.ledger, run, now=100.0, lease=60.0)
        finish(queue.ledger, run, EndState.RETRY, record_of(task, "retry"))
        settle(queue, lease, Settlement(verdict=Verdict.RETRY, at=130.0), now=102.0)
        lease = take_one(queue, now=131.0)
        put_off = Settlement(verdict=Verdict.RETRY, at=140.0, charged=False, reason="early")
        settle(queue, lease, put_off, now=132.0)
        assert begin(queue.ledger, execution_of(task, "run-2"), now=133.0, lease=60.0) is Admission.RUN

    def test_a_rejected_run_is_not_charged_and_may_begin_again_before_its_delivery_is_settled(self, queue):
        """None of its own code ran: who fixes the deploy need not wait for a dispatcher."""
        task = make_task()
        queue.enqueue_many([task])
        take_one(queue)
        run = execution_of(task)
        begin(queue.ledger, run, now=100.0, lease=60.0)
        assert finish(queue.ledger, run, EndState.RETRY, record_of(task, "rejected"))
        assert begin(queue.ledger, execution_of(task, "run-2"), now=101.0, lease=60.0) is Admission.RUN
        finish(queue.ledger, execution_of(task, "run-2"), EndState.RETRY, record_of(task, "rejected"))
        assert take_one(queue, now=160.0).attempts == 0

    def test_a_run_past_its_deadline_keeps_the_time_of_its_retry_when_it_ends_after_all(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        lease, run = take_one(queue), execution_of(task)
        begin(queue.ledger, run, now=100.0, lease=60.0)
        settle(queue, lease, Settlement(verdict=Verdict.RETRY, at=150.0), now=101.0)
        assert finish(queue.ledger, run, EndState.RETRY, record_of(task, "retry"))
        assert begin(queue.ledger, execution_of(task, "run-2"), now=149.0, lease=60.0) is Admission.EARLY
        assert begin(queue.ledger, execution_of(task, "run-2"), now=151.0, lease=60.0) is Admission.RUN

    # --- Poison -------------------------------------------------------------------------------

    def lose(self, queue, task, *, now, after=None):
        """Begin a run of a leased task, and lease it again when nobody ended or prolonged the run."""
        run = execution_of(task, f"run-{now}")
        assert begin(queue.ledger, run, now=now, lease=30.0) is Admission.RUN
        if after is not None:
            after(run)
        found = take(queue, now=now + 60.0)
        return found[0] if found else None

    def leased(self, queue):
        task = make_task(name="pill")
        queue.enqueue_many([task])
        take_one(queue)
        return task

    def test_the_fifth_lost_run_in_a_row_over_ten_minutes_is_a_dead_letter(self, queue):
        task, now = self.leased(queue), 100.0
        for losses in range(1, 5):
            lease = self.lose(queue, task, now=now)
            now += 60.0
            assert (lease.losses, lease.attempts) == (losses, losses)
        # Ten minutes since the first was counted, at 160.
        lease = self.lose(queue, task, now=700.0 - 1)
        assert lease.losses == 5, "five, but within ten minutes"
        assert self.lose(queue, task, now=701.0 + 60.0) is None
        view = queue.find(task.id)
        assert (view.state, view.reason, view.attempts) == (TaskState.DEAD, rules.POISON, 6)
        assert [record.reason for record in view.records] == [LOST_LEASE] * 6
        assert begin(queue.ledger, execution_of(task, "late"), now=900.0, lease=30.0) is Admission.DUPLICATE
        with pytest.raises(TombstonedTaskError):
            queue.enqueue_many([make_task(name="pill", created=900.0)])
        fresh = make_task(created=900.0, eta=900.0)
        assert queue.replace_dead(task.id, fresh, letter_of(task), now=900.0)
        assert take_one(queue, now=901.0).losses == 0

    @pytest.mark.parametrize("end", [EndState.RETRY, None])
    def test_a_lease_that_is_not_lost_says_the_losses_too(self, queue, end):
        task = self.leased(queue)
        self.lose(queue, task, now=100.0)
        lease = self.lose(queue, task, now=160.0)
        assert lease.losses == 2
        if end is not None:
            run = execution_of(task, "ends")
            begin(queue.ledger, run, now=221.0, lease=30.0)
            finish(queue.ledger, run, end, record_of(task, "retry"))
        settle(queue, lease, Settlement(verdict=Verdict.RETRY, at=230.0, charged=False), now=222.0)
        assert take_one(queue, now=231.0).losses == (2 if end is None else 0), "any end resets the count"

    def test_what_was_given_back_or_never_began_is_no_loss(self, queue):
        task = self.leased(queue)
        lease = self.lose(queue, task, now=100.0)
        for now in (221.0, 282.0):  # leased, and lost before the run began
            lease = take_one(queue, now=now)
            assert lease.losses == 1
        begin(queue.ledger, execution_of(task, "drained"), now=283.0, lease=30.0)
        settle(queue, lease, rules.give_back(lease, now=284.0), now=284.0)
        assert take_one(queue, now=320.0).losses == 1

    def test_a_run_whose_end_comes_late_was_not_lost(self, queue):
        task = self.leased(queue)

        def late(run):
            self.late = run

        self.lose(queue, task, now=100.0)
        lease = self.lose(queue, task, now=160.0, after=late)
        assert lease.losses == 2
        assert begin(queue.ledger, execution_of(task, "another"), now=221.0, lease=30.0) is Admission.RUN
        assert finish(queue.ledger, self.late, EndState.RETRY, record_of(task, "retry")) is False
        assert take_one(queue, now=281.0).losses == 1, "the run of now is lost, the others do not count"

    def test_a_run_that_the_store_refused_to_prolong_and_that_goes_on_was_not_lost(self, queue):
        task = self.leased(queue)
        first = execution_of(task, "run-100.0")
        self.lose(queue, task, now=100.0)
        assert list(queue.ledger.extend_many([first], now=160.5, lease=0.1)) == [True], "nobody took it over yet"
        for number, now in enumerate(range(161, 2000, 61)):
            lease = self.lose(queue, task, now=float(now))
            assert lease is not None
            assert lease.losses == (2 if number == 0 else 1)
            assert list(queue.ledger.extend_many([first], now=now + 60.5, lease=30.0)) == [False]

    def test_another_digest_resets_nothing(self, queue):
        task = self.leased(queue)
        self.lose(queue, task, now=100.0)
        forged = execution_of(task, "forged")._replace(digest=b"another")
        queue.ledger.extend_many([forged], now=161.0, lease=30.0)
        finish(queue.ledger, forged, EndState.RETRY, record_of(task, "retry"))
        assert self.lose(queue, task, now=162.0).losses == 2

    def test_the_leases_of_a_dead_dispatcher_fall_due_unless_a_run_began(self, queue):
        tasks = [make_task() for _ in range(4)]
        queue.enqueue_many(tasks)
        dead = {lease.task.id for lease in queue.lease(owner="dead", limit=3, seconds=60.0, now=100.0)}
        (living,) = queue.lease(owner="deadly", limit=3, seconds=60.0, now=100.0)
        begun = next(task for task in tasks if task.id in dead)
        begin(queue.ledger, execution_of(begun), now=101.0, lease=30.0)
        assert queue.release(["dead", "gone"], now=102.0) == 2
        assert queue.release([], now=102.0) == 0
        again = queue.lease(owner="new", limit=9, seconds=60.0, now=102.0)
        assert {lease.task.id for lease in again} == dead - {begun.id}
        assert {(lease.attempts, lease.losses) for lease in again} == {(0, 0)}
        settle(queue, living, DONE, now=103.0)

    @pytest.mark.parametrize("state", [None, EndState.RETRY, EndState.SUCCEEDED])
    def test_the_same_id_with_another_digest_is_a_conflict(self, queue, state):
        task = make_task()
        run = execution_of(task)
        begin(queue.ledger, run, now=100.0, lease=60.0)
        if state is not None:
            finish(queue.ledger, run, state, record_of(task))
        other = execution_of(task, "run-2", digest=b"another")
        assert begin(queue.ledger, other, now=9999.0, lease=60.0) is Admission.CONFLICT

    def test_runs_that_ask_together_are_admitted_as_one_by_one(self, queue):
        new, ended, early, twice = tasks = [make_task() for _ in range(4)]
        queue.enqueue_many(tasks)
        for task, state in ((ended, EndState.SUCCEEDED), (early, EndState.RETRY)):
            begin(queue.ledger, execution_of(task), now=100.0, lease=60.0)
            finish(queue.ledger, execution_of(task), state, record_of(task, "rejected"))
        runs = [execution_of(task, f"run-{number}") for number, task in enumerate([twice, new, ended, early, twice])]
        assert list(queue.ledger.begin_many(runs, now=101.0, lease=60.0)) == [
            Admission.RUN,
            Admission.RUN,
            Admission.DUPLICATE,
            Admission.RUN,
            Admission.RUNNING,
        ]
        other = [execution_of(task, "other") for task in (twice, new, early)]
        assert set(queue.ledger.begin_many(other, now=160.0, lease=60.0)) == {Admission.RUNNING}
        assert set(queue.ledger.extend_many(runs[:2] + runs[3:4], now=101.0, lease=60.0)) == {True}

    def test_runs_that_end_together_end_as_one_by_one(self, queue):
        one, retried, another, twice = tasks = [make_task() for _ in range(4)]
        queue.enqueue_many(tasks)
        runs = [execution_of(task) for task in tasks]
        queue.ledger.begin_many(runs, now=100.0, lease=60.0)
        ends = [
            (runs[0], EndState.SUCCEEDED, record_of(one)),
            (execution_of(retried, "lapsed"), EndState.RETRY, record_of(retried, "retry")),
            (execution_of(another, digest=b"another"), EndState.FAILED, record_of(another, "failed")),
            (runs[3], EndState.FAILED, record_of(twice, "failed")),
            (execution_of(twice, "lapsed"), EndState.SUCCEEDED, record_of(twice)),
        ]
        assert list(queue.ledger.finish_many(ends)) == [True, False, False, True, False]
        again = [run._replace(owner="again") for run in runs]
        assert list(queue.ledger.begin_many(again, now=101.0, lease=60.0)) == [
            Admission.DUPLICATE,
            Admission.RUNNING,
            Admission.RUNNING,
            Admission.DUPLICATE,
        ]
        assert [len(queue.find(task.id).records) for task in tasks] == [1, 1, 1, 2]
        settle(queue, next(lease for lease in take(queue) if lease.task.id == twice.id), DONE, now=102.0)
        assert queue.find(twice.id).state is TaskState.DEAD

    def test_entries_are_per_audience(self, queue):
        task = make_task()
        begin(queue.ledger, execution_of(task), now=100.0, lease=60.0)
        other = execution_of(task, "run-2", audience="prod:default:default:/x", digest=b"another")
        assert begin(queue.ledger, other, now=100.0, lease=60.0) is Admission.RUN

    def test_the_record_of_a_run_is_kept_although_the_run_is_lost(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        assert finish(queue.ledger, execution_of(task), EndState.SUCCEEDED, record_of(task)) is False
        assert list(queue.find(task.id).records) == [record_of(task)]

    def test_records_are_kept_in_order(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        records = [record_of(task, "retry", started=float(n), status=None, reason=f"r{n}") for n in range(5)]
        for record in records:
            queue.ledger.record_many([record])
        assert list(queue.find(task.id).records) == records
        assert list(queue.tasks()[0].records) == []

    def test_the_ledger_forgets_an_hour_after_expiry(self, queue):
        old, late, running = make_task(expires=1000), make_task(expires=1001), make_task(expires=1000)
        for task in (old, late):
            run = execution_of(task)
            begin(queue.ledger, run, now=100.0, lease=60.0)
            finish(queue.ledger, run, EndState.SUCCEEDED, record_of(task))
        begin(queue.ledger, execution_of(running), now=4600.0, lease=60.0)
        assert queue.prune(now=4600.0) == 0
        assert queue.prune(now=4600.5) == 1
        assert begin(queue.ledger, execution_of(old), now=4601.0, lease=60.0) is Admission.RUN
        assert begin(queue.ledger, execution_of(late), now=4601.0, lease=60.0) is Admission.DUPLICATE
        assert begin(queue.ledger, execution_of(running, "run-2"), now=4601.0, lease=60.0) is Admission.RUNNING

    # --- Forgetting ---------------------------------------------------------------------------

    def test_history_is_forgotten_by_age_and_dead_letters_are_not(self, queue):
        done, dead, waiting = make_task(name="n"), make_task(), make_task(eta=1e6)
        queue.enqueue_many([done, dead, waiting])
        for task in (done, dead, waiting):
            queue.ledger.record_many([record_of(task, "retry")])
        first, second = take(queue)
        queue.settle_many([(first, DONE), (second, DEAD)], now=100.0)
        queue.prune(now=100.0 + HISTORY)
        assert queue.find(done.id).state is TaskState.SUCCEEDED
        assert queue.prune(now=100.5 + HISTORY) > 0
        assert queue.find(done.id) is None
        assert len(queue.find(dead.id).records) == 1
        assert len(queue.find(waiting.id).records) == 1
        assert queue.prune(now=100.5 + HISTORY) == 0
        # The ledger still knows it, for as long as its token is valid.
        assert begin(queue.ledger, execution_of(done), now=101.0 + HISTORY, lease=60.0) is Admission.DUPLICATE

    def test_leasing_forgets_what_is_old(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        settle(queue, take_one(queue), DONE, now=100.0)
        take(queue, now=200.0 + HISTORY)
        queue.cancel("nothing-of-this-id", now=0.0)  # Comes after what the lease has set going.
        assert queue.find(task.id) is None

    def test_leasing_keeps_up_with_what_grows_old(self, queue):
        tasks = [make_task() for _ in range(1300)]
        queue.enqueue_many(tasks)
        assert all(queue.settle_many([(lease, DONE) for lease in take(queue, limit=2000)], now=100.0))
        for step in range(8):
            take(queue, now=200.0 + HISTORY + step)
            queue.cancel("nothing-of-this-id", now=0.0)  # Comes after what the lease has set going.
        assert queue.tasks(states=[TaskState.SUCCEEDED]) == []

    # --- Waiting and threads ------------------------------------------------------------------

    def test_wait_returns_at_once_for_a_task_that_nobody_has_seen(self, queue):
        queue.enqueue_many([make_task()])
        assert queue.wait(30.0) is True
        assert rests(queue, 0.03)

    def test_wait_is_over_when_the_time_is(self, queue):
        take(queue)
        assert rests(queue, 0.0)
        started = time.monotonic()
        assert queue.wait(0.05) is False
        assert 0.045 <= time.monotonic() - started < 60.0

    def test_a_lease_has_seen_what_was_there(self, queue):
        queue.enqueue_many([make_task(), make_task()])
        take(queue, limit=1)
        assert rests(queue, 0.03)

    def test_the_dispatchers_own_writes_end_no_wait(self, queue):
        task = make_task()
        queue.enqueue_many([task])
        lease = take_one(queue)
        begin(queue.ledger, execution_of(task), now=100.0, lease=60.0)
        extend(queue, lease, seconds=60.0, now=100.0)
        settle(queue, lease, Settlement(verdict=Verdict.RETRY, at=500.0), now=100.0)
        assert rests(queue, 0.05)

    @pytest.mark.parametrize("how", ["enqueue", "enqueue_many", "replace_dead", "wake"])
    def test_wait_ends_for_a_new_task_and_for_wake(self, queue, how):
        dead = make_task()
        queue.enqueue_many([dead])
        settle(queue, take_one(queue), DEAD, now=100.0)
        actions = {
            "enqueue": lambda: queue.enqueue_many([make_task()]),
            "enqueue_many": lambda: queue.enqueue_many([make_task(), make_task()]),
            "replace_dead": lambda: queue.replace_dead(dead.id, make_task(), letter_of(dead), now=101.0),
            "wake": queue.wake,
        }
        assert rests(queue, 0.0)
        begun = threading.Barrier(3)
        with ThreadPoolExecutor(2) as pool:
            waits = [pool.submit(lambda: [begun.wait(), queue.wait(60.0)][1]) for _ in range(2)]
            begun.wait()
            # One that began to wait after the other has seen the task would wait for the next.
            until_all_wait(2)
            time.sleep(0.2)
            assert not any(wait.done() for wait in waits)
            actions[how]()
            assert [wait.result(30.0) for wait in waits] == [True, True]

    def test_a_wake_that_comes_before_the_wait_is_not_lost(self, queue):
        queue.wake()
        assert queue.wait(30.0) is True
        assert rests(queue, 0.03)

    def test_threads_lease_every_task_once(self, queue):
        tasks = [make_task() for _ in range(200)]
        barrier = threading.Barrier(8)

        def give(part: list[QueuedTask]) -> list[str]:
            barrier.wait()
            for task in part:
                queue.enqueue_many([task])
            return []

        def work() -> list[str]:
            barrier.wait()
            mine: list[str] = []
            deadline = time.monotonic() + 60.0
            while time.monotonic() < deadline and len(queue.tasks(states=[TaskState.SUCCEEDED], limit=200)) < 200:
                leases = take(queue, limit=7)
                mine += ids(leases)
                assert all(queue.settle_many([(lease, DONE) for lease in leases], now=101.0))
            return mine

        with ThreadPoolExecutor(8) as pool:
            runs = [pool.submit(give, tasks[n::4]) for n in range(4)] + [pool.submit(work) for _ in range(4)]
            leased = [task_id for run in runs for task_id in run.result()]
        assert sorted(leased) == sorted(task.id for task in tasks)

    def test_threads_that_want_one_name_get_it_once(self, queue):
        barrier = threading.Barrier(8)

        def give() -> bool:
            barrier.wait()
            try:
                queue.enqueue_many([make_task(name="n")])
            except TaskAlreadyExistsError:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            results = [run.result() for run in [pool.submit(give) for _ in range(8)]]
        assert results.count(True) == 1
        assert len(take(queue)) == 1

    def test_a_closed_queue_takes_nothing(self, queue):
        queue.enqueue_many([make_task()])
        queue.close()
        queue.close()
        with pytest.raises(QueueUnavailable, match="open a new one"):
            queue.enqueue_many([make_task()])

    # --- Holding queues back ------------------------------------------------------------------

    def test_a_rate_lets_a_bucket_through_at_once_and_then_its_pace(self, queue):
        queue.configure([QueueLimits(queue="default", rate=2.0, bucket_size=5)], now=100.0)
        queue.enqueue_many([make_task(eta=10.0) for _ in range(20)])
        assert len(take(queue, now=100.0)) == 5
        assert take(queue, now=100.4) == []
        assert len(take(queue, now=100.5)) == 1
        assert len(take(queue, now=102.0)) == 3
        assert take(queue, now=102.0) == []
        assert len(take(queue, now=150.0)) == 5

    def test_a_rate_holds_one_queue_and_leaves_the_others(self, queue):
        queue.configure([QueueLimits(queue="mail", rate=1.0, bucket_size=1)], now=100.0)
        mail, other = [make_task(queue="mail") for _ in range(3)], [make_task() for _ in range(3)]
        queue.enqueue_many([*mail, *other])
        assert ids(take(queue)) == [mail[0].id, *(task.id for task in other)]
        assert take(queue, queues=["mail"]) == []
        assert ids(take(queue, now=101.0, queues=["default", "mail"])) == [mail[1].id]

    def test_what_the_limit_of_a_lease_leaves_takes_no_token(self, queue):
        queue.configure([QueueLimits(queue="default", rate=1.0, bucket_size=4)], now=100.0)
        queue.enqueue_many([make_task() for _ in range(9)])
        assert len(take(queue, limit=1)) == 1
        assert len(take(queue, limit=9)) == 3

    def test_two_dispatchers_share_one_rate(self, queue):
        queue.configure([QueueLimits(queue="default", rate=10.0, bucket_size=2)], now=100.0)
        queue.enqueue_many([make_task() for _ in range(300)])
        leased = 0
        for step in range(200):
            leased += len(queue.lease(owner=f"dispatcher-{step % 2}", limit=50, seconds=999.0, now=100.0 + step / 20))
        assert leased == 2 + 99

    def test_a_clock_that_was_set_back_does_not_stop_a_rate(self, queue):
        queue.configure([QueueLimits(queue="default", rate=1.0, bucket_size=1)], now=5000.0)
        queue.enqueue_many([make_task() for _ in range(3)])
        assert len(take(queue, now=5000.0, seconds=9999.0)) == 1
        assert take(queue, now=1400.0) == []
        assert len(take(queue, now=1401.0)) == 1

    def test_a_cap_on_concurrency_counts_what_is_under_way(self, queue):
        queue.configure([QueueLimits(queue="default", max_concurrent=3)], now=100.0)
        queue.enqueue_many([make_task() for _ in range(10)])
        first = take(queue, limit=2)
        second = queue.lease(owner="another-dispatcher", limit=9, seconds=60.0, now=100.0)
        assert (len(first), len(second)) == (2, 1)
        settle(queue, first[0], DONE, now=101.0)
        assert len(take(queue, now=101.0)) == 1
        assert take(queue, now=102.0) == []
        assert len(take(queue, now=160.0)) == 2  # The leases of the two that were lost have run out.

    def test_lost_leases_are_leased_again_within_a_cap_that_was_lowered(self, queue):
        queue.enqueue_many([make_task() for _ in range(5)])
        assert len(take(queue, limit=4)) == 4
        queue.configure([QueueLimits(queue="default", max_concurrent=2), QueueLimits(queue="mail")], now=110.0)
        assert 110.0 < queue.next_due(now=110.0) <= 110.1
        assert queue.next_due(now=170.0) <= 170.0  # what is lost does not run
        again = take(queue, now=170.0)
        assert len(again) == 2
        assert take(queue, now=171.0) == []
        settle(queue, again[0], DONE, now=172.0)
        assert len(take(queue, now=172.0)) == 1

    def test_a_paused_queue_gives_nothing_until_it_is_resumed(self, queue):
        queue.enqueue_many([make_task(), make_task(queue="mail")])
        queue.pause("mail", paused=True, now=100.0)
        assert [lease.task.queue for lease in take(queue)] == ["default"]
        assert take(queue, now=999.0, queues=["mail"]) == []
        assert [(control.queue, control.paused) for control in queue.controls(now=100.0)] == [("mail", True)]
        queue.configure([], now=100.0)
        assert take(queue, now=101.0, queues=["mail"]) == []
        queue.pause("mail", paused=False, now=102.0)
        assert len(take(queue, now=102.0, queues=["mail"])) == 1
        assert list(queue.controls(now=102.0)) == []

    def test_a_rate_of_zero_is_a_pause(self, queue):
        queue.configure([QueueLimits(queue="default", rate=0.0)], now=100.0)
        queue.enqueue_many([make_task()])
        assert take(queue, now=9999.0) == []
        assert queue.next_due(now=200.0) == 201.0

    def test_a_queue_is_held_until_the_latest_time_that_was_asked_for(self, queue):
        queue.enqueue_many([make_task(), make_task(queue="mail")])
        queue.hold("mail", until=130.0, now=100.0)
        queue.hold("mail", until=120.0, now=100.0)
        assert len(take(queue, now=129.9)) == 1
        assert queue.next_due(now=125.0) == 130.0
        assert len(take(queue, now=130.0)) == 1

    def test_new_limits_replace_the_old_and_keep_what_the_bucket_holds(self, queue):
        queue.configure([QueueLimits(queue="default", rate=1.0, bucket_size=10)], now=100.0)
        queue.enqueue_many([make_task() for _ in range(40)])
        assert len(take(queue, limit=8)) == 8
        queue.configure([QueueLimits(queue="default", rate=1.0, bucket_size=10)], now=100.0)
        queue.configure([QueueLimits(queue="default", rate=4.0, bucket_size=20)], now=100.0)
        assert len(take(queue)) == 2
        assert len(take(queue, now=101.0)) == 4
        queue.configure([QueueLimits(queue="mail", rate=4.0)], now=101.0)
        assert len(take(queue, now=101.0)) == 26

    def test_a_dispatcher_is_told_when_a_held_queue_is_worth_a_look(self, queue):
        queue.configure([QueueLimits(queue="default", rate=0.5, bucket_size=1, max_concurrent=2)], now=100.0)
        queue.enqueue_many([make_task() for _ in range(4)])
        assert queue.next_due(now=100.0) == 100.0
        take(queue)
        assert queue.next_due(now=100.0) == pytest.approx(102.0)
        assert len(take(queue, now=102.0)) == 1
        assert 104.0 < queue.next_due(now=104.0) <= 104.1
        queue.pause("default", paused=True, now=104.0)
        assert queue.next_due(now=104.0) == 105.0

    def test_a_purge_cancels_what_waits_and_nothing_else(self, queue):
        waiting = [oversize_task(), make_task(name="n"), make_task(eta=9999.0)]
        running, other = make_task(eta=1.0), make_task(queue="mail")
        queue.enqueue_many([running])
        (lease,) = take(queue, limit=1)
        queue.enqueue_many([*waiting, other])
        assert queue.purge("default", now=100.0) == 3
        assert [queue.find(task.id).state for task in waiting] == [TaskState.CANCELLED] * 3
        assert queue.blobs.get(waiting[0].blob.id) is None
        assert queue.purge("nothing", now=100.0) == 0
        settle(queue, lease, DONE, now=101.0)
        with pytest.raises(TombstonedTaskError):
            queue.enqueue_many([make_task(name="n", created=101.0)])
        assert ids(take(queue, now=LATER * 3)) == [other.id]

    def test_a_purge_takes_thousands(self, queue):
        queue.enqueue_many([make_task() for _ in range(1203)])
        assert queue.purge("default", now=100.0) == 1203
        assert take(queue, now=LATER) == []

    # --- Unique by key ------------------------------------------------------------------------

    def test_a_key_belongs_to_one_waiting_or_running_task_of_a_queue(self, queue):
        first = make_task(unique_key="k")
        queue.enqueue_many([first, make_task(unique_key="k", queue="mail"), make_task(unique_key="other")])
        for _ in range(2):
            with pytest.raises(AlreadyWaiting) as caught:
                queue.enqueue_many([make_task(unique_key="k")])
            assert caught.value.task_id == first.id
            leases = take(queue)
        assert leases == []
        (lease,) = take(queue, now=160.0, limit=1)
        assert whole(lease.task) == first
        settle(queue, lease, DONE, now=161.0)
        again = make_task(unique_key="k")
        queue.enqueue_many([again])
        assert again.id in ids(take(queue, now=162.0))

    @pytest.mark.parametrize("how", ["done", "dead", "overruled", "cancel", "purge"])
    def test_a_key_is_free_when_its_task_has_ended(self, queue, how):
        task = make_task(unique_key="k")
        queue.enqueue_many([task])
        if how == "cancel":
            assert queue.cancel(task.id, now=100.0)
        elif how == "purge":
            assert queue.purge("default", now=100.0) == 1
        else:
            lease, run = take_one(queue), execution_of(task)
            if how == "overruled":
                begin(queue.ledger, run, now=101.0, lease=30.0)
                finish(queue.ledger, run, EndState.FAILED, record_of(task))
            settle(queue, lease, DEAD if how == "dead" else DONE, now=102.0)
        again = make_task(unique_key="k")
        queue.enqueue_many([again])
        assert ids(take(queue, now=103.0)) == [again.id]

    def test_a_key_until_the_start_is_free_when_its_task_is_leased_and_stays_the_next_ones(self, queue):
        key = "start:" + "0f" * 32
        first, second, third = (make_task(unique_key=key) for _ in range(3))
        queue.enqueue_many([first])
        with pytest.raises(AlreadyWaiting):
            queue.enqueue_many([second])
        lease = take_one(queue)
        queue.enqueue_many([second])
        for end in (lambda: None, lambda: settle(queue, lease, DONE, now=101.0)):
            end()
            with pytest.raises(AlreadyWaiting) as caught:
                queue.enqueue_many([third])
            assert caught.value.task_id == second.id
        settle(queue, take_one(queue, now=102.0), RETRY_NOW, now=103.0)
        queue.enqueue_many([third])
        assert set(ids(take(queue, now=104.0))) == {second.id, third.id}

    def test_a_key_that_only_begins_like_one_stays_until_the_end(self, queue):
        queue.enqueue_many([make_task(unique_key="start:of something else")])
        take_one(queue)
        with pytest.raises(AlreadyWaiting):
            queue.enqueue_many([make_task(unique_key="start:of something else")])

    def test_a_key_twice_in_one_batch_is_refused(self, queue):
        with pytest.raises(AlreadyWaiting):
            queue.enqueue_many([make_task(unique_key="k"), make_task(unique_key="k")])
        assert take(queue) == []

    # --- Dead letters in bulk -----------------------------------------------------------------

    def dead(self, given, ended: float, reason: str = "gave-up", **changes: object) -> QueuedTask:
        task = make_task(**changes)
        given.enqueue_many([task])
        (lease,) = take(given, now=ended)
        settle(given, lease, Settlement(verdict=Verdict.DEAD, reason=reason, record=record_of(task)), now=ended)
        return task

    def test_dead_letters_are_listed_oldest_first_and_page_by_page(self, queue):
        tasks = [self.dead(queue, 100.0 + n // 2) for n in range(7)]
        expected = sorted(tasks, key=lambda task: (100.0 + tasks.index(task) // 2, task.id))
        found, after = [], None
        while page := queue.dead_letters(DeadFilter(), after=after, limit=3):
            found += page
            after = (page[-1].ended, page[-1].id)
        assert [view.id for view in found] == [task.id for task in expected]
        assert list(found[0].records) == [record_of(expected[0])]

    def test_dead_letters_are_found_by_what_is_given(self, queue):
        first = self.dead(queue, 100.0)
        second = self.dead(queue, 101.0, queue="mail", reason="expired-task")
        third = self.dead(queue, 102.0, callable_name="shop.tasks:other", reason="expired-task")

        def found(**where: object) -> list[str]:
            return [view.id for view in queue.dead_letters(DeadFilter(**where))]

        assert found(queue="mail") == [second.id]
        assert found(reason="expired-task") == [second.id, third.id]
        assert found(reason="expired-task", queue="default") == [third.id]
        assert found(callable_name="shop.tasks:send_receipt") == [first.id, second.id]
        assert found(since=101.0) == [second.id, third.id]
        assert found(before=101.0) == [first.id]
        assert found(archived=True) == []

    def test_dead_letters_are_dropped_by_id(self, queue):
        first, second = self.dead(queue, 100.0), self.dead(queue, 101.0)
        waiting = make_task(eta=9999.0)
        queue.enqueue_many([waiting])
        assert queue.drop_dead([first.id, waiting.id, "nothing-of-this-id", first.id]) == 1
        assert queue.find(first.id) is None
        assert queue.find(waiting.id).state is TaskState.WAITING
        assert [view.id for view in queue.dead_letters(DeadFilter())] == [second.id]
        # The ledger still knows: the task that was dropped does not run again.
        assert begin(queue.ledger, execution_of(first), now=102.0, lease=60.0) is Admission.DUPLICATE

    def test_old_dead_letters_are_archived_and_kept(self, queue):
        old, new = self.dead(queue, 100.0), self.dead(queue, 150.0)
        queue.prune(now=120.0 + DEAD_AGE)
        assert [view.id for view in queue.dead_letters(DeadFilter())] == [new.id]
        assert [view.id for view in queue.dead_letters(DeadFilter(archived=True))] == [old.id]
        assert [view.id for view in queue.tasks(states=[TaskState.DEAD])] == [new.id]
        assert queue.stats(now=200.0)[0].dead == 1
        assert queue.find(old.id).token == old.token
        assert queue.replace_dead(old.id, make_task(), letter_of(old), now=200.0) is True
        assert queue.dead_letters(DeadFilter(archived=True)) == []

    def test_the_oldest_of_too_many_dead_letters_are_archived(self, queue):
        tasks = [self.dead(queue, 100.0 + n) for n in range(DEAD_LIMIT + 2)]
        queue.prune(now=200.0)
        assert [view.id for view in queue.dead_letters(DeadFilter(archived=True))] == [task.id for task in tasks[:2]]
        assert queue.prune(now=200.0) == 0

    # --- Room for blobs -----------------------------------------------------------------------

    def test_all_blobs_together_have_a_limit(self, queue):
        size = BLOB_LIMIT // 2
        tasks = [make_task(blob=Blob(f"blob-of-size-{n:08}", bytes(size)), digest=b"d" * 32) for n in range(3)]
        queue.enqueue_many(tasks[:2])
        with pytest.raises(QueueUnavailable, match="blob_limit"):
            queue.enqueue_many([tasks[2]])
        assert queue.find(tasks[2].id) is None
        assert queue.cancel(tasks[0].id, now=100.0)
        queue.enqueue_many([tasks[2]])
        assert queue.purge("default", now=100.0) == 2
        queue.enqueue_many([make_task(blob=Blob(f"blob-again-{n:08}", bytes(size)), digest=b"d" * 32) for n in (1, 2)])

    def test_a_batch_whose_blobs_have_no_room_is_refused_whole(self, queue):
        batch = [
            make_task(blob=Blob(f"blob-of-size-{n:08}", bytes(BLOB_LIMIT // 2)), digest=b"d" * 32) for n in (1, 2, 3)
        ]
        with pytest.raises(QueueUnavailable, match="blob_limit"):
            queue.enqueue_many(batch)
        assert take(queue) == []
        queue.enqueue_many(batch[:2])

    # --- As the store of a push engine ---

    def test_values_are_kept_under_their_keys_until_their_time(self, queue):
        keep = queue.keep
        keep.put("task:a", b"one", expires=100)
        keep.put("task:a", b"\0two\xff", expires=EXPIRES)
        keep.put("task:b", b"", expires=100)
        assert keep.get_many(["task:a", "task:b", "task:c"]) == {"task:a": b"\0two\xff", "task:b": b""}
        queue.prune(now=100.0 + rules.LEDGER_LEEWAY + 1)
        assert keep.get_many(["task:a", "task:b"]) == {"task:a": b"\0two\xff"}
        keep.delete(["task:a", "task:c"])
        assert keep.get_many(["task:a"]) == {}

    def test_blobs_that_are_kept_are_bounded_together_and_counters_are_not(self, queue):
        keep = queue.keep
        keep.put("blob:1", b"x" * (BLOB_LIMIT - 10), expires=EXPIRES)
        keep.put("blob:1", b"x" * (BLOB_LIMIT - 10), expires=EXPIRES)
        keep.put("task:1", b"x" * 100, expires=EXPIRES)
        with pytest.raises(QueueUnavailable, match="blob_limit"):
            keep.put("blob:2", b"x" * 11, expires=EXPIRES)
        keep.put("blob:2", b"x" * 10, expires=EXPIRES)

    def test_a_copy_is_looked_at_when_it_is_due_by_one_caller_and_less_and_less_often(self, queue):
        task = make_task(eta=130.0, headers={"X-Own": "1"}, blob_id="b" * 16, deadline=30.0)
        queue.copies.put_many([task, make_task(eta=9_000.0)])
        assert queue.copies.look(now=134.0, limit=10) == (0, [])
        seen, now = [], 135.0
        for looks in range(9):
            looked, (copy,) = queue.copies.look(now=now, limit=10)
            assert (looked, copy.audience, copy.task_id, copy.looks) == (1, task.audience, task.id, looks)
            assert copies.load(copy) == task._replace(digest=b"")
            assert queue.copies.look(now=now + copies.wait(looks) - 0.5, limit=10) == (0, [])
            seen.append(copies.wait(looks))
            now += copies.wait(looks)
        assert seen == [5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0, 300.0]

    def test_the_copy_of_a_task_that_runs_does_not_count_and_that_of_one_that_ended_goes(self, queue):
        runs, ended, failed, retried, lost, waits = tasks = [make_task() for _ in range(6)]
        queue.copies.put_many(tasks)
        for task in tasks[:-1]:
            begin(queue.ledger, execution_of(task), now=101.0, lease=1.0 if task is lost else 60.0)
        for task, state in ((ended, EndState.SUCCEEDED), (failed, EndState.FAILED), (retried, EndState.RETRY)):
            finish(queue.ledger, execution_of(task), state, record_of(task))
        looked, found = queue.copies.look(now=110.0, limit=100)
        assert (looked, {copy.task_id for copy in found}) == (6, {retried.id, lost.id, waits.id})
        looked, found = queue.copies.look(now=10_000.0, limit=100)
        assert (looked, {copy.task_id for copy in found}) == (4, {runs.id, retried.id, lost.id, waits.id})

    def test_copies_are_replaced_put_off_and_deleted(self, queue):
        first, second = make_task(), make_task()
        queue.copies.put_many([first, second])
        queue.copies.look(now=105.0, limit=10)
        queue.copies.put_many([first._replace(token=b"another")])
        looked, (copy,) = queue.copies.look(now=106.0, limit=10)
        assert (looked, copy.looks, copies.load(copy).token) == (1, 0, b"another")
        queue.copies.put_off([(second.audience, second.id), ("nobody's", "none")], until=500.0)
        assert queue.copies.look(now=499.0, limit=10)[0] == 1
        queue.copies.delete([(first.audience, first.id), ("nobody's", "none")])
        assert [copy.task_id for copy in queue.copies.look(now=5_000.0, limit=10)[1]] == [second.id]

    def test_a_look_is_bounded_and_what_is_due_first_comes_first(self, queue):
        tasks = [make_task(eta=100.0 + number) for number in range(5)]
        queue.copies.put_many(reversed(tasks))
        found = [queue.copies.look(now=200.0, limit=2) for _ in range(4)]
        assert [looked for looked, _ in found] == [2, 2, 1, 0]
        assert [{copy.task_id for copy in those} for _, those in found[:2]] == [
            {tasks[0].id, tasks[1].id}, {tasks[2].id, tasks[3].id},
        ]  # fmt: skip

    def test_a_task_that_is_no_row_is_buried_with_its_records_and_can_be_replaced(self, queue):
        task = make_task(headers={"X-Own": "1"}, retry_options={"task_retry_limit": 1.0})
        execution = execution_of(task)
        begin(queue.ledger, execution, now=100.0, lease=10.0)
        queue.ledger.record_many([record_of(task, "retry", reason="exception")])
        assert queue.bury(task, reason="retry-limit", attempts=2, now=101.0, verified=True)
        finish(queue.ledger, execution, EndState.FAILED, record_of(task, "retry", reason="exception"))
        (letter,) = queue.dead_letters(DeadFilter())
        assert (letter.id, letter.reason, letter.attempts, letter.token) == (task.id, "retry-limit", 2, task.token)
        assert (letter.headers, letter.retry_options, letter.ended) == (
            {"X-Own": "1"},
            {"task_retry_limit": 1.0},
            101.0,
        )
        assert len(letter.records) == 2
        queue.prune(now=101.0 + HISTORY + 1)
        assert len(queue.find(task.id).records) == 2
        assert queue.stats(now=102.0)[0].dead == 1
        again = make_task()
        assert queue.replace_dead(task.id, again, letter_of(task), now=103.0)
        assert begin(queue.ledger, execution_of(task, "other"), now=104.0, lease=10.0) is Admission.DUPLICATE
        assert [view.id for view in queue.tasks()] == [again.id]

    def test_a_letter_whose_token_nobody_verified_takes_no_others_place(self, queue):
        task = make_task()
        forged = task._replace(token=b"forged", audience="", queue="", url="", target="")
        assert queue.bury(forged, reason="bad-signature", attempts=0, now=101.0, verified=False)
        assert queue.bury(task, reason="retry-limit", attempts=1, now=102.0, verified=True)
        assert not queue.bury(forged, reason="bad-signature", attempts=0, now=103.0, verified=False)
        (letter,) = queue.dead_letters(DeadFilter())
        assert (letter.token, letter.reason, letter.audience) == (task.token, "retry-limit", task.audience)
        waiting = make_task()
        queue.enqueue_many((waiting,))
        assert not queue.bury(waiting._replace(token=b"forged"), reason="x", attempts=0, now=103.0, verified=False)

    def test_what_is_handed_over_leaves_neither_row_nor_history_nor_an_unsettled_retry(self, queue):
        task, lost, big = make_task(), make_task(), oversize_task()
        queue.enqueue_many((task, lost, big))
        leases = {lease.task.id: lease for lease in queue.lease(owner="me", limit=10, seconds=60.0, now=101.0)}
        execution = execution_of(task)
        begin(queue.ledger, execution, now=101.0, lease=10.0)
        finish(queue.ledger, execution, EndState.RETRY, record_of(task, "retry", reason="exception"))
        assert begin(queue.ledger, execution_of(task, "other"), now=102.0, lease=10.0) is Admission.UNSETTLED
        gone = leases[lost.id]._replace(owner=leases[task.id].owner + "0")
        asked = [leases[task.id], gone, leases[big.id]]
        assert list(queue.hand_over(asked, now=102.0)) == [True, False, True]
        assert [queue.find(each.id) for each in (task, big)] == [None, None]
        assert queue.find(lost.id).state is TaskState.RUNNING
        assert queue.blobs.get(big.blob.id) is None
        assert begin(queue.ledger, execution_of(task, "other"), now=103.0, lease=10.0) is Admission.RUN
        queue.enqueue_many((make_task(id=big.id),))

    def test_a_run_that_neither_ended_nor_is_extended_is_lost(self, queue):
        task, other = make_task(), make_task()
        ledger, execution = queue.ledger, execution_of(task)
        assert list(ledger.lost_many([execution, execution_of(other)], now=100.0)) == [False, False]
        begin(ledger, execution, now=100.0, lease=10.0)
        assert list(ledger.lost_many([execution], now=105.0)) == [False]
        begin(ledger, execution_of(other), now=105.0, lease=10.0)
        assert list(ledger.lost_many([execution, execution_of(other)], now=111.0)) == [True, False]
        assert list(ledger.lost_many([execution._replace(digest=b"x" * 32)], now=111.0)) == [False]
        finish(ledger, execution, EndState.RETRY, record_of(task, "retry", reason="exception"))
        assert list(ledger.lost_many([execution], now=112.0)) == [False]
