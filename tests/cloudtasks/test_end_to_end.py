"""App, emulator, handler over HTTP, store: what becomes of tasks whose queue is Cloud Tasks."""

import asyncio
import contextlib
import socket

import pytest
from google.api_core import exceptions

from safedefer import Key, Keyring, KeyState, TaskRetryOptions
from safedefer.errors import InvalidTaskError, TaskAlreadyExistsError, TombstonedTaskError
from safedefer.events import RequestRefused, TaskHandled
from safedefer.queues.base import DeadFilter, NotAllStored
from safedefer.queues.cloudtasks.engine import CloudTasks
from safedefer.queues.sqlite.queue import SQLiteQueue
from safedefer.web.server import serving
from tests import sample_tasks as tasks
from tests.cloudtasks.emulated import PARENT, Clock, Emulated, wait_for
from tests.unit.apps import Recorder, make_app

ACCOUNT = "tasks@p-1.iam.gserviceaccount.com"
QUEUE = f"{PARENT}/queues/default"
LIMITED = TaskRetryOptions(task_retry_limit=2, min_backoff_seconds=10.0, max_backoff_seconds=10.0)


class World:
    """An application whose tasks go through the emulator to its own handler, on one clock."""

    def __init__(self, path, **changes):
        self.clock = Clock()
        self.emulated = Emulated(queues=(QUEUE,), clock=self.clock)
        self.store = SQLiteQueue(path / "store.db")
        self.told = Recorder()
        self.stack = contextlib.AsyncExitStack()
        self.keyring = changes.get("keyring") or Keyring(Key("k1", bytes(range(9, 41)), KeyState.ACTIVE))
        # The handler's address is known once it listens: the engine learns it then.
        self.app = make_app(
            queue=self._engine("http://127.0.0.1:1"), store=self.store, clock=self.clock, observers=[self.told],
            **{"keyring": self.keyring, **changes},
        )  # fmt: skip
        self.url = self.emulated.loop.call(self.stack.enter_async_context(serving(self.app)))
        self.engine.address = self._engine(self.url).address

    def _engine(self, address):
        url = f"cloudtasks://p-1/europe-west1?endpoint={self.emulated.url}&address={address}&service_account={ACCOUNT}"
        made = CloudTasks(url, clock=self.clock)
        self.engine = getattr(self, "engine", made)
        return made

    @property
    def client(self):
        return self.emulated.client

    def pause(self):
        self.client.pause_queue(name=QUEUE)

    def tick(self, seconds):
        """Move the clock, and have due tasks delivered."""
        self.clock.moment += seconds
        self.client.resume_queue(name=QUEUE)

    def left(self):
        return list(self.client.list_tasks(parent=QUEUE))

    def emptied(self):
        wait_for(lambda: not self.left(), "the queue's end")

    def answered(self, number):
        """Wait until the only task was answered so often."""
        return wait_for(
            lambda: next((each for each in self.left() if each.response_count >= number), None), "the answer"
        )

    def dead(self):
        return list(self.app.queue.dead_letters(DeadFilter()))

    def close(self):
        tasks.GATE.set()
        self.emulated.loop.call(self.stack.aclose())
        self.app.close()
        self.emulated.close()


@pytest.fixture
def world(tmp_path):
    tasks.reset()
    made = World(tmp_path)
    yield made
    made.close()


def test_a_task_runs_once_and_leaves_the_queue(world):
    task = world.app.defer(tasks.add, 1, b=2)
    world.emptied()
    assert tasks.RAN == [("add", 1, 2, 1)]
    assert asyncio.run(world.app.handle({"Content-Type": "application/jose"}, task.payload)).status == 403  # no OIDC


def test_a_coroutine_runs_and_sees_the_task_it_is(world):
    task = world.app.options(name="receipt-42").defer(tasks.keep_context_async)
    world.emptied()
    (context,) = tasks.CONTEXTS
    assert (context.id, context.name, context.queue_name) == (task.id, "receipt-42", "default")


def test_a_task_waits_for_its_eta(world):
    world.app.options(countdown=3600).defer(tasks.add, 1)
    world.tick(3599)
    assert tasks.RAN == []
    world.tick(1)
    world.emptied()
    assert tasks.RAN == [("add", 1, 0, 1)]


def test_what_is_due_later_than_the_service_keeps_tasks_waits_in_the_store(world):
    task = world.app.options(countdown=25 * 86_400).defer(tasks.add, 1)
    assert world.left() == []
    assert world.app.queue.find(task.id).state.value == "waiting"
    world.clock.moment += 25 * 86_400
    wait_for(lambda: tasks.RAN, "the run")  # the handler's process hands over what is due
    world.emptied()
    assert tasks.RAN == [("add", 1, 0, 1)]


def test_the_signed_limit_makes_a_dead_letter_and_the_service_forgets_the_task(world):
    task = world.app.options(retry_options=LIMITED).defer(tasks.fail)
    for attempt in (1, 2):
        world.answered(attempt)
        world.tick(10)
    world.emptied()
    assert tasks.RAN == ["fail"] * 3
    (letter,) = world.dead()
    assert (letter.id, letter.reason, letter.attempts) == (task.id, "retry-limit", 3)
    assert [event.attempt for event in world.told.events if isinstance(event, TaskHandled)] == [1, 2, 3]
    again = world.app.retry(task.id)
    wait_for(lambda: len(tasks.RAN) == 4, "the re-run")
    assert again.id != task.id


def test_a_task_that_fails_until_google_deletes_it_is_a_dead_letter_before(world):
    task = world.app.defer(tasks.fail)
    world.answered(1)
    world.tick(29.9 * 86_400)
    world.answered(2)
    assert world.dead() == []
    world.tick(0.2 * 86_400)
    world.emptied()
    (letter,) = world.dead()
    assert (letter.id, letter.reason, letter.attempts) == (task.id, "engine-retention", 3)


def test_no_header_makes_the_time_earlier_at_which_a_task_is_given_up(world):
    """Who may create tasks in Cloud Tasks posts a captured token with headers of their choice."""
    world.pause()
    task = world.app.defer(tasks.fail)
    headers = {"Content-Type": "application/jose", "Safedefer-Sent": "1.0", "Safedefer-Due": "1.0"}
    oidc = {"service_account_email": ACCOUNT, "audience": world.url}
    request = {"url": f"{world.url}{task.url}", "headers": headers, "body": task.payload, "oidc_token": oidc}
    name = f"{QUEUE}/tasks/forged"
    world.client.create_task(parent=QUEUE, task={"name": name, "http_request": request})
    world.client.run_task(name=name)
    world.emulated.settled(name, 1)
    assert tasks.RAN == ["fail"]
    assert world.dead() == []


def test_a_permanent_failure_is_a_dead_letter_at_once(world):
    world.app.defer(tasks.permanent)
    world.emptied()
    assert [letter.reason for letter in world.dead()] == ["permanent-task-failure"]


def test_an_oversize_task_is_kept_by_the_store_and_runs(world):
    world.app.defer(tasks.add, "x" * 50_000, "y")
    world.emptied()
    assert tasks.RAN[0][1] == "x" * 50_000


def test_names_are_used_once_and_tombstones_are_told(world):
    world.pause()
    named = world.app.options(name="once")
    named.defer(tasks.add, 1)
    with pytest.raises(TaskAlreadyExistsError):
        named.defer(tasks.add, 2)
    world.tick(0)
    world.emptied()
    with pytest.raises(TombstonedTaskError):
        named.defer(tasks.add, 3)
    assert tasks.RAN == [("add", 1, 0, 1)]


def test_a_batch_is_stored_only_where_its_caller_says_that_a_part_may_be(world):
    calls = [(tasks.add, (number,), {}) for number in range(5)]
    with pytest.raises(InvalidTaskError):
        world.app.defer_many(calls)
    assert world.left() == []
    world.app.defer_many(calls, atomic=False)
    world.emptied()
    assert sorted(each[1] for each in tasks.RAN) == list(range(5))
    with pytest.raises(InvalidTaskError):
        world.app.options(unique=True).defer(tasks.add, 1)
    assert issubclass(NotAllStored, Exception)


def test_a_cancelled_task_does_not_run(world):
    world.pause()
    task = world.app.defer(tasks.add, 1)
    named = world.app.options(name="named").defer(tasks.add, 2)
    assert world.app.cancel(task.id)
    assert world.app.cancel(named.id)  # the service cannot find it by its id: the store's mark counts
    assert len(world.left()) == 1
    world.tick(0)
    world.emptied()
    assert tasks.RAN == []


def test_a_token_that_our_key_signed_is_refused_from_another_sender(world):
    """A captured token, posted by a stranger, and by another account of the same issuer."""
    world.pause()
    task = world.app.defer(tasks.add, 1)
    headers = {"Content-Type": "application/jose"}
    other = {"service_account_email": "other@p-1.iam.gserviceaccount.com", "audience": world.url}
    for sender in (
        {},
        {"Authorization": "Bearer a.b.c"},
        {"X-CloudTasks-TaskName": "x", "X-CloudTasks-QueueName": "default"},
    ):
        response = asyncio.run(world.app.handle({**headers, **sender}, task.payload))
        assert (response.status, response.headers["Safedefer-Outcome"]) == (403, "refused")
    request = {"url": f"{world.url}{task.url}", "headers": headers, "body": task.payload, "oidc_token": other}
    name = f"{QUEUE}/tasks/forged"
    world.client.create_task(parent=QUEUE, task={"name": name, "http_request": request})
    world.client.run_task(name=name)
    assert world.emulated.settled(name, 1).last_attempt.response_status.code != 0
    assert tasks.RAN == []
    refused = [event for event in world.told.events if isinstance(event, RequestRefused)]
    assert {(event.status, event.reason) for event in refused} == {(403, "not-from-the-engine")}
    world.client.delete_task(name=name)
    world.tick(0)
    world.emptied()
    assert tasks.RAN == [("add", 1, 0, 1)]


def test_forged_tokens_cause_no_fetch_of_keys(world):
    for _ in range(3):
        response = asyncio.run(
            world.app.handle(
                {
                    "Content-Type": "application/jose",
                    "Authorization": "Bearer eyJhbGciOiJSUzI1NiIsImtpZCI6ImsifQ.e30.e30",
                },
                b"eyJhbGciOiJIUzI1NiJ9.e30.e30",
            )
        )
        assert response.status == 403
    assert world.engine._sender is None


def test_a_task_of_a_key_that_is_gone_becomes_a_dead_letter_after_ten_deliveries_over_an_hour(world, tmp_path):
    """The service proves that it sent it; a stranger with the same bytes makes no letter."""
    foreign = make_app(
        queue=world.engine, store=SQLiteQueue(tmp_path / "other.db"), clock=world.clock,
        keyring=Keyring(Key("gone", bytes(range(50, 82)), KeyState.ACTIVE)),
    )  # fmt: skip
    task = foreign.defer(tasks.add, 1)
    for number in range(1, 12):
        if not world.left():
            break
        assert world.dead() == []
        world.answered(number)
        world.tick(2**number + 1)
    world.emptied()
    (letter,) = world.dead()
    assert (letter.id, letter.reason) == (task.id, "unknown-key")
    assert tasks.RAN == []
    foreign.queue.store.close()


def test_a_handler_that_is_full_answers_busy_and_the_task_runs_later(tmp_path):
    tasks.reset()
    world = World(tmp_path, concurrency=1)
    try:
        world.app.defer(tasks.wait_for_gate)
        assert tasks.STARTED.wait(60)
        world.app.defer(tasks.add, 1)
        busy = wait_for(lambda: [each for each in world.left() if each.response_count], "an answer")
        assert len(busy) == 1
        tasks.GATE.set()
        wait_for(lambda: len(world.left()) == 1, "the end of the first")  # until then the handler is full
        world.tick(5)
        world.emptied()
        assert ("add", 1, 0, 1) in tasks.RAN
    finally:
        world.close()


def test_an_app_engine_task_runs_and_is_tried_again(tmp_path):
    """5xx answers count as executions there, and a request without Google's header runs nothing."""
    tasks.reset()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        emulated = Emulated(queues=(QUEUE,), app_engine=address)
        engine = CloudTasks(
            f"cloudtasks://p-1/europe-west1?endpoint={emulated.url}&app_engine=yes", clock=emulated.clock
        )
        app = make_app(queue=engine, store=SQLiteQueue(tmp_path / "store.db"), clock=emulated.clock)
        stack = contextlib.AsyncExitStack()
        emulated.loop.call(stack.enter_async_context(serving(app, listener=listener)))
        try:
            task = app.options(retry_options=LIMITED).defer(tasks.fail_once)
            (stored,) = wait_for(
                lambda: [each for each in emulated.client.list_tasks(parent=QUEUE) if each.response_count], "it"
            )
            assert stored.app_engine_http_request.relative_uri == task.url
            assert asyncio.run(app.handle({"Content-Type": "application/jose"}, task.payload)).status == 403
            emulated.clock.moment += 10
            emulated.client.resume_queue(name=QUEUE)
            wait_for(lambda: not list(emulated.client.list_tasks(parent=QUEUE)), "the queue's end")
            assert tasks.RAN == ["fail_once", "fail_once"]
        finally:
            emulated.loop.call(stack.aclose())
            app.close()
            emulated.close()


def test_a_purged_queue_runs_nothing(world):
    world.pause()
    world.app.defer(tasks.add, 1)
    assert world.app.queue.purge("default", now=world.clock()) == 1
    with pytest.raises(exceptions.NotFound):
        world.client.get_task(name=f"{QUEUE}/tasks/none")
    world.tick(0)
    assert world.left() == []
    assert tasks.RAN == []
