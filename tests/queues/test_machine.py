"""Any sequence of operations leaves a queue as it leaves a plain model of it, whatever the engine."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import apsw
import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from safedefer.errors import TaskAlreadyExistsError, TombstonedTaskError
from safedefer.ledger import Admission, EndState, Execution
from safedefer.queues.base import Lease, QueuedTask, QueueStats, Settlement, TaskState, Verdict
from safedefer.queues.memory.queue import MemoryQueue
from safedefer.queues.postgres.migrations import migrate
from safedefer.queues.postgres.queue import PostgresQueue
from safedefer.queues.rates import FULL_LOOK, PAUSED_LOOK, QueueLimits
from safedefer.queues.rules import POISON_LOSSES, POISON_SECONDS
from safedefer.queues.sqlite.queue import SQLiteQueue
from tests.postgres.server import fresh_database, shared_server
from tests.queues.clocked import CLOCK, CLOCKED_PATH, TABLES, Clocked
from tests.queues.contract import execution_of, letter_of, make_task, oversize_task, record_of, whole
from tests.queues.single import begin, extend, finish, settle

TOMBSTONE = 50.0
#: Where all leases have one length.
LEASE = 30.0
QUEUES = ("default", "mail")
NIGHT = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


@dataclass
class Model:
    """One task: where it stands, and what the next lease must say of it."""

    task: QueuedTask
    order: int
    due: float
    state: TaskState = TaskState.WAITING
    lease: Lease | None = None
    leased_at: float = 0.0
    attempts: int = 0
    deliveries: int = 0
    first_attempt: float | None = None
    rejections: int = 0
    ledger: str | None = None
    run: str | None = None
    run_until: float = 0.0
    uncharged: bool = False
    not_before: float = 0.0
    losses: int = 0
    first_loss: float | None = None
    records: int = 0
    lost: list[Lease] = field(default_factory=list)

    @property
    def lives(self) -> bool:
        return self.state in (TaskState.WAITING, TaskState.RUNNING)


class QueueMachine(RuleBasedStateMachine):
    """The model and its rules; an engine opens the queue."""

    #: A lease ends after the seconds of whoever takes it, and what fell due first is leased first.
    exact = True

    @initialize()
    def start(self):
        self.open()
        self.now = 100.0
        self.models: dict[str, Model] = {}
        self.names: dict[tuple[str, str], float | None] = {}
        self.replaced: list[str] = []
        self.paused: set[str] = set()
        self.caps: dict[str, int] = {}
        self.runs = self.tasks_made = 0
        # Something to work on, or most sequences would go by without a lease.
        self.enqueue([("default", "n1", 0, False), ("mail", None, -5, True), ("default", None, 0, False)])

    def reopen(self):
        self.queue.close()
        self.open()

    def teardown(self):
        if hasattr(self, "queue"):
            self.queue.close()

    def some(self, data, condition, label) -> Model:
        return data.draw(st.sampled_from([model for model in self.models.values() if condition(model)]), label=label)

    def has(self, condition) -> bool:
        return any(condition(model) for model in self.models.values())

    def name_error(self, task: QueuedTask):
        until = self.names.get((task.queue, task.name), 0.0)
        if task.name is None or (until is not None and until <= task.created):
            return None
        return TaskAlreadyExistsError if until is None else TombstonedTaskError

    def added(self, task: QueuedTask):
        stored = task._replace(blob=None, blob_id=task.blob.id if task.blob else None)
        self.models[task.id] = Model(stored, self.tasks_made, task.eta)
        self.tasks_made += 1
        if task.name is not None:
            self.names[task.queue, task.name] = None

    def ended(self, model: Model, state: TaskState, ledger: str):
        model.state, model.lease = state, None
        if model.task.name is not None:
            self.names[model.task.queue, model.task.name] = self.now + TOMBSTONE
        if model.ledger in (None, "running", "retry"):
            model.ledger, model.run = ledger, None

    # --- Rules --------------------------------------------------------------------------------

    tasks = st.tuples(
        st.sampled_from(QUEUES), st.sampled_from([None, "n1", "n2"]), st.sampled_from([-20, 0, -1, 30]), st.booleans()
    )

    def make(self, drawn) -> QueuedTask:
        queue, name, delay, oversize = drawn
        make = oversize_task if oversize else make_task
        return make(queue=queue, name=name, eta=self.now + delay, created=self.now)

    @rule(batch=st.lists(tasks, min_size=1, max_size=3))
    def enqueue_some(self, batch):
        self.enqueue(batch)

    def enqueue(self, batch):
        made = [self.make(drawn) for drawn in batch]
        named = [(task.queue, task.name) for task in made if task.name]
        refused = next((error for task in made if (error := self.name_error(task))), None)
        if refused is None and len(named) != len(set(named)):
            refused = TaskAlreadyExistsError
        try:
            self.queue.enqueue_many(made)
        except (TaskAlreadyExistsError, TombstonedTaskError):
            assert refused is not None
            return
        assert refused is None
        for task in made:
            self.added(task)

    @rule(
        passed=st.sampled_from([5.0, 0.0, 20.0, 70.0]),
        limit=st.sampled_from([3, 1]),
        seconds=st.sampled_from([10.0, 30.0]),
        queues=st.sampled_from([None, *QUEUES]),
    )
    def time_passes_and_a_dispatcher_leases(self, passed, limit, seconds, queues):
        self.now += passed
        seconds = seconds if self.exact else LEASE
        due = [
            model
            for model in self.models.values()
            if model.lives and model.due <= self.now and queues in (None, model.task.queue)
        ]
        due.sort(key=lambda model: (model.due, model.order) if self.exact else (model.order,))
        due = self.within_caps(due)
        only = None if queues is None else [queues]
        leases = list(self.queue.lease(owner="d", limit=limit, seconds=seconds, now=self.now, queues=only))
        due = [model for model in due[:limit] if not self.is_buried(model)]
        assert [whole(lease.task) for lease in leases] == [model.task for model in due[:limit]]
        for lease, model in zip(leases, due, strict=False):
            if model.lease is not None:
                model.lost.append(model.lease)
                self.charge_lost_lease(model)
            assert (lease.attempts, lease.retries, lease.losses) == (model.attempts, model.deliveries, model.losses)
            assert (lease.first_attempt, lease.rejections) == (model.first_attempt, model.rejections)
            model.state, model.lease, model.leased_at = TaskState.RUNNING, lease, self.now
            model.due = lease.until
            model.deliveries += 1

    def is_buried(self, model: Model) -> bool:
        """Bury a task whose process died once too often; whether it was."""
        since = self.now if model.first_loss is None else model.first_loss
        lost = model.lease is not None and model.uncharged and model.ledger == "running"
        if not lost or model.losses < POISON_LOSSES - 1 or self.now - since < POISON_SECONDS:
            return False
        model.lost.append(model.lease)
        self.charge_lost_lease(model)
        self.ended(model, TaskState.DEAD, "failed")
        return True

    def within_caps(self, due: list[Model]) -> list[Model]:
        """Return those that their queues may give now."""
        allowed = {queue: self.allowance(queue) for queue in QUEUES}
        admitted = []
        # Under a cap PostgreSQL leases first what was leased before: a lost lease keeps its slot.
        for model in due if self.exact else sorted(due, key=lambda model: model.lease is None):
            allowed[model.task.queue] -= 1
            if allowed[model.task.queue] >= 0:
                admitted.append(model)
        return admitted if self.exact else sorted(admitted, key=lambda model: model.order)

    def allowance(self, queue: str) -> int:
        if queue in self.paused:
            return 0
        return max(self.caps[queue] - self.running(queue), 0) if queue in self.caps else 1000

    def running(self, queue: str) -> int:
        return sum(
            model.lease is not None and model.due > self.now
            for model in self.models.values()
            if model.lives and model.task.queue == queue
        )

    @rule(queue=st.sampled_from(QUEUES), paused=st.booleans())
    def pause(self, queue, paused):
        self.queue.pause(queue, paused=paused, now=self.now)
        (self.paused.add if paused else self.paused.discard)(queue)

    @rule(caps=st.dictionaries(st.sampled_from(QUEUES), st.integers(1, 2)))
    def configure(self, caps):
        limits = [QueueLimits(queue=queue, max_concurrent=most) for queue, most in caps.items()]
        self.queue.configure(limits, now=self.now)
        self.caps = caps

    def may_be_cancelled(self, model: Model) -> bool:
        waits = model.state is TaskState.WAITING or (model.state is TaskState.RUNNING and model.due <= self.now)
        runs = model.ledger == "running" and model.run_until > self.now
        return waits and not runs and model.ledger not in ("succeeded", "failed", "cancelled")

    @rule(queue=st.sampled_from(QUEUES))
    def purge(self, queue):
        models = [m for m in self.models.values() if m.task.queue == queue and self.may_be_cancelled(m)]
        assert self.queue.purge(queue, now=self.now) == len(models)
        for model in models:
            if model.lease is not None:
                model.lost.append(model.lease)
            self.ended(model, TaskState.CANCELLED, "cancelled")

    @precondition(lambda self: self.has(lambda model: model.state is TaskState.DEAD))
    @rule(data=st.data())
    def drop_dead(self, data):
        model = self.some(data, lambda model: model.state is TaskState.DEAD, "dropped")
        assert self.queue.drop_dead([model.task.id]) == 1
        del self.models[model.task.id]
        self.replaced.append(model.task.id)

    def charge_lost_lease(self, model: Model):
        if not model.uncharged:
            return
        model.uncharged = False
        model.records += model.ledger == "running"
        if model.ledger == "running":
            model.losses += 1
            model.first_loss = self.now if model.first_loss is None else model.first_loss
        model.attempts += 1
        model.first_attempt = model.leased_at if model.first_attempt is None else model.first_attempt

    @precondition(lambda self: self.has(lambda model: model.lease))
    @rule(
        data=st.data(),
        verdict=st.sampled_from([Verdict.RETRY, None, Verdict.DEAD, Verdict.DONE]),
        wait=st.sampled_from([0, 5, 30]),
        charged=st.booleans(),
        rejected=st.booleans(),
    )
    def settle(self, data, verdict, wait, charged, rejected):
        model = self.some(data, lambda model: model.lease, "settled")
        if verdict is None:
            extend(self.queue, model.lease, seconds=wait, now=self.now)
            model.due = self.now + (wait if self.exact else LEASE)
            return
        settlement = Settlement(verdict=verdict, at=self.now + wait, charged=charged, rejected=rejected, reason="why")
        settle(self.queue, model.lease, settlement, now=self.now)
        model.lost.append(model.lease)
        if verdict is Verdict.RETRY:
            model.attempts += charged
            model.state, model.lease, model.due = TaskState.WAITING, None, self.now + wait
            # A run that another delivery began, and that goes on, is not charged yet.
            model.uncharged = model.uncharged and not charged and model.ledger != "retry"
            if model.ledger is not None and (charged or rejected):
                model.not_before = model.due
            model.rejections += rejected
            if charged and model.first_attempt is None:
                model.first_attempt = model.leased_at
            return
        said = "failed" if verdict is Verdict.DEAD else "succeeded"
        over = model.ledger not in (None, "running", "retry")
        # What was charged when its lease ran out is not charged by who finds it ended.
        model.attempts += charged and not (over and not model.uncharged)
        known = model.ledger if over else said
        states = {"failed": TaskState.DEAD, "succeeded": TaskState.SUCCEEDED, "cancelled": TaskState.CANCELLED}
        self.ended(model, states[known], said)

    @precondition(lambda self: self.has(lambda model: model.lost))
    @rule(data=st.data(), verdict=st.sampled_from(Verdict))
    def settle_stale(self, data, verdict):
        model = self.some(data, lambda model: model.lost, "stale")
        lease = data.draw(st.sampled_from(model.lost), label="lost lease")
        settlement = Settlement(verdict=verdict, record=record_of(model.task))
        assert list(self.queue.settle_many([(lease, settlement)], now=self.now)) == [False]

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def cancel(self, data):
        model = self.some(data, lambda model: True, "cancelled")
        cancelled = self.may_be_cancelled(model)
        stopped = model.lives and model.ledger not in ("succeeded", "failed", "cancelled")
        assert self.queue.cancel(model.task.id, now=self.now) is (cancelled or stopped)
        if stopped and not cancelled:  # it is leased or runs: the ledger says so, and its delivery ends
            model.ledger, model.run = "cancelled", None
        if cancelled:
            if model.lease is not None:
                model.lost.append(model.lease)
            self.ended(model, TaskState.CANCELLED, "cancelled")

    @precondition(lambda self: self.models)
    @rule(data=st.data(), other=st.booleans(), seconds=st.sampled_from([10.0, 40.0]))
    def begin(self, data, other, seconds):
        # Mostly what somebody has a lease of; sometimes anything.
        leased = self.has(lambda model: model.lease) and data.draw(st.integers(0, 3), label="begin any") < 3
        model = self.some(data, lambda model: model.lease or not leased, "begun")
        self.runs += 1
        run = execution_of(model.task, f"run-{self.runs}")
        if other:
            expected = Admission.RUN if model.ledger is None else Admission.CONFLICT
            if expected is Admission.RUN:
                return  # Nothing is known yet that this digest could contradict.
            assert begin(self.queue.ledger, run._replace(digest=b"another"), now=self.now, lease=seconds) is expected
            return
        self.begins(model, run, seconds)

    def begins(self, model: Model, run: Execution, seconds: float):
        if model.ledger in ("succeeded", "failed", "cancelled"):
            expected = Admission.DUPLICATE
        elif model.ledger == "running" and model.run_until > self.now:
            expected = Admission.RUNNING
        elif model.ledger == "retry" and model.uncharged:
            expected = Admission.UNSETTLED
        elif model.not_before > self.now:
            expected = Admission.EARLY
        else:
            expected = Admission.RUN
            model.ledger, model.run, model.uncharged, model.not_before = "running", run.owner, True, 0.0
            model.run_until = self.now + seconds
        assert begin(self.queue.ledger, run, now=self.now, lease=seconds) is expected

    @precondition(lambda self: self.has(lambda model: model.run))
    @rule(
        data=st.data(),
        state=st.sampled_from(EndState),
        ours=st.booleans(),
        outcome=st.sampled_from(["retry", "rejected"]),
    )
    def finish(self, data, state, ours, outcome):
        if state is EndState.CANCELLED:
            return  # Only cancel() says so.
        model = self.some(data, lambda model: model.run, "finished")
        run = execution_of(model.task, model.run if ours else "somebody-else")
        counts = ours or state is not EndState.RETRY
        assert finish(self.queue.ledger, run, state, record_of(model.task, outcome)) is counts
        model.records += 1
        model.losses, model.first_loss = 0, None
        if counts:
            model.ledger, model.run = str(state), None
            model.uncharged = model.uncharged and not (state is EndState.RETRY and outcome == "rejected")

    @precondition(lambda self: self.has(lambda model: model.lease))
    @rule(data=st.data(), times=st.integers(1, 6), passed=st.sampled_from([60.0, 200.0]))
    def a_task_ends_process_after_process(self, data, times, passed):
        """What it takes to see five losses in a row; a random sequence hardly ever has them."""
        for _ in range(times):
            model = self.some(data, lambda model: model.lease or model.state is not TaskState.RUNNING, "pill")
            if model.lease is None or model.ledger in ("succeeded", "failed", "cancelled"):
                return
            self.runs += 1
            self.begins(model, execution_of(model.task, f"run-{self.runs}"), 1.0)
            self.time_passes_and_a_dispatcher_leases(passed, 3, 30.0, None)

    @rule(dead=st.booleans())
    def a_dispatcher_dies(self, dead):
        """Its leases fall due at once, but those whose run began."""
        found = [
            model
            for model in self.models.values()
            if dead and model.lives and model.lease is not None and model.due > self.now and not model.uncharged
        ]
        assert self.queue.release(["d" if dead else "e"], now=self.now) == len(found)
        for model in found:
            model.due = self.now

    @precondition(lambda self: self.has(lambda model: model.state is TaskState.DEAD))
    @rule(data=st.data(), drawn=tasks)
    def replace_dead(self, data, drawn):
        model = self.some(data, lambda model: model.state is TaskState.DEAD, "replaced")
        task = self.make(drawn)
        refused = self.name_error(task)
        try:
            assert self.queue.replace_dead(model.task.id, task, letter_of(model.task), now=self.now) is True
        except (TaskAlreadyExistsError, TombstonedTaskError):
            assert refused is not None
            return
        assert refused is None
        del self.models[model.task.id]
        self.replaced.append(model.task.id)
        self.added(task)

    @rule(reopen=st.booleans())
    def prune(self, reopen):
        self.queue.prune(now=self.now)
        if reopen:
            self.reopen()

    # --- What holds at every step -------------------------------------------------------------

    @invariant()
    def every_task_is_where_the_model_says(self):
        if not hasattr(self, "models"):
            return
        for model in self.models.values():
            view = self.queue.find(model.task.id)
            assert (view.state, view.attempts) == (model.state, model.attempts)
            assert len(view.records) == model.records
            if model.task.blob_id:
                assert (self.queue.blobs.get(model.task.blob_id) is not None) is model.lives
            if model.lives or model.state is TaskState.DEAD:
                assert (view.token == b"pointer") is False
        for task_id in self.replaced:
            assert self.queue.find(task_id) is None

    def worth_a_look(self, model: Model) -> float:
        queue = model.task.queue
        if queue in self.paused:
            return max(model.due, self.now + PAUSED_LOOK)
        full = queue in self.caps and self.running(queue) >= self.caps[queue]
        return max(model.due, self.now + FULL_LOOK) if full else model.due

    @invariant()
    def the_counts_are_the_models(self):
        if not hasattr(self, "models"):
            return
        lives = [model for model in self.models.values() if model.lives]
        due = min(map(self.worth_a_look, lives), default=None)
        assert self.queue.next_due(now=self.now) == (due if due is None else pytest.approx(due, abs=0.002))
        expected = []
        for queue in QUEUES:
            mine = [model for model in lives if model.task.queue == queue]
            running = [model for model in mine if model.lease is not None and model.due > self.now]
            waiting = [model.task.eta for model in mine if model not in running]
            dead = sum(model.state is TaskState.DEAD and model.task.queue == queue for model in self.models.values())
            if mine or dead:
                expected.append(
                    QueueStats(
                        queue=queue,
                        waiting=len(waiting),
                        running=len(running),
                        dead=dead,
                        oldest=pytest.approx(min(waiting), abs=0.002) if waiting else None,
                    )
                )
        assert list(self.queue.stats(now=self.now)) == expected


class MemoryQueueMachine(QueueMachine):
    def open(self):
        self.queue = MemoryQueue(tombstone_seconds=TOMBSTONE)

    def reopen(self):
        """Keep it: what is in memory does not survive."""


class SQLiteQueueMachine(QueueMachine):
    def open(self):
        if not hasattr(self, "folder"):
            self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, "tasks.db")
        self.queue = SQLiteQueue(self.path, tombstone_seconds=TOMBSTONE)

    def teardown(self):
        super().teardown()
        if hasattr(self, "queue"):
            connection = apsw.Connection(str(self.path))
            assert connection.pragma("integrity_check") == "ok"
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
            connection.close()
            self.folder.cleanup()


class PostgresQueueMachine(QueueMachine):
    exact = False
    dsn = ""

    def open(self):
        ticks = self.queue.ticks if hasattr(self, "queue") else 0
        self.queue = Clocked(PostgresQueue(self.dsn, tombstone_seconds=TOMBSTONE), self.dsn, ticks=ticks)

    def teardown(self):
        super().teardown()
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute("TRUNCATE " + ", ".join(f"safedefer.{table}" for table in TABLES))


def machine_settings(*, max_examples):
    return settings(
        deadline=None, suppress_health_check=list(HealthCheck), stateful_step_count=40, max_examples=max_examples
    )


TestMemoryQueueMachine = MemoryQueueMachine.TestCase
TestMemoryQueueMachine.settings = machine_settings(max_examples=300 if NIGHT else 40)
TestSQLiteQueueMachine = SQLiteQueueMachine.TestCase
TestSQLiteQueueMachine.settings = machine_settings(max_examples=300 if NIGHT else 40)


@pytest.fixture(scope="module")
def machine_database():
    server = shared_server()
    with fresh_database(server) as name:
        PostgresQueueMachine.dsn = server.dsn(name)
        migrate(PostgresQueueMachine.dsn)
        with psycopg.connect(PostgresQueueMachine.dsn, autocommit=True) as connection:
            connection.execute(CLOCK)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("safedefer.queues.postgres.errors.SEARCH_PATH", CLOCKED_PATH)
            yield


@pytest.mark.usefixtures("machine_database")
class TestPostgresQueueMachine(PostgresQueueMachine.TestCase):
    # Each step asks a server several times: about 2 s an example, and far more where one must be shrunk.
    settings = machine_settings(max_examples=100 if NIGHT else 6)
