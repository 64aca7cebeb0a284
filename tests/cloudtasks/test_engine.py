"""The engine against the emulator: what it creates, what it refuses, and what a dead endpoint means."""

import asyncio
import contextlib
import os
import signal
import socket
import threading

import pytest
from google.cloud import tasks_v2

from safedefer.errors import (
    ConfigurationError,
    InvalidTaskError,
    InvalidTaskNameError,
    MissingExtra,
    QueueUnavailable,
    TaskAlreadyExistsError,
    TaskTooLargeError,
    TombstonedTaskError,
    UnknownQueueError,
)
from safedefer.queues.base import NotAllStored, QueuedTask
from safedefer.queues.cloudtasks.engine import CloudTasks
from safedefer.queues.config import QueueFile
from safedefer.queues.rates import QueueLimits
from tests.cloudtasks.emulated import DEADLINE, PARENT, QUEUE, T0, Emulated, wait_for
from tests.ports import ReservedPort

ACCOUNT = "tasks@p-1.iam.gserviceaccount.com"
BASE = "cloudtasks://p-1/europe-west1"
FULL = tasks_v2.Task.View.FULL


@pytest.fixture
def emulated():
    made = Emulated(queues=(QUEUE,))
    made.client.pause_queue(name=QUEUE)
    yield made
    made.close()


@pytest.fixture
def engine(emulated):
    made = new_engine(emulated)
    yield made
    made.close()


def new_engine(emulated, more=f"&service_account={ACCOUNT}", address=None):
    to = f"address={emulated.target_url if address is None else address}"
    return CloudTasks(f"{BASE}?endpoint={emulated.url}&{to}{more}", clock=emulated.clock)


def new_task(number=1, **changes):
    identity = f"{number:032x}"
    task = QueuedTask(
        id=identity, queue="mail", token=b"a.b.c", audience="prod:mail:default:/run", url="/run", target="default",
        eta=T0, created=T0, expires=int(T0) + 2_678_400,
    )  # fmt: skip
    return task._replace(**changes)


def stored(emulated):
    return list(emulated.client.list_tasks(request={"parent": QUEUE, "response_view": FULL}))


def test_a_task_is_created_with_all_that_a_handler_needs(emulated, engine):
    engine.enqueue_many([new_task(headers={"X-Mine": "1"}, eta=T0 + 90.25)])
    (task,) = stored(emulated)
    assert task.http_request.url == f"{emulated.target_url}/run"
    assert task.http_request.body == b"a.b.c"
    assert dict(task.http_request.headers) == {
        "X-Mine": "1", "Content-Type": "application/jose", "Safedefer-Task-Id": f"{1:032x}",
        "Safedefer-Due": f"{T0 + 90.25:.6f}", "Safedefer-Sent": f"{T0:.6f}",
    }  # fmt: skip
    assert task.http_request.oidc_token.service_account_email == ACCOUNT
    assert task.http_request.oidc_token.audience == emulated.target_url
    assert task.schedule_time.timestamp() == T0 + 90.25
    assert task.retry_config.max_attempts == -1


def test_ids_are_ordered_by_time_and_names_are_not(emulated, engine):
    engine.enqueue_many([new_task(number) for number in range(8)])
    names = [task.name.rpartition("/")[2] for task in stored(emulated)]
    assert all(len(name) == 64 for name in names)
    assert names == sorted(names)
    ids = [task.http_request.headers["Safedefer-Task-Id"] for task in stored(emulated)]
    assert ids != sorted(ids)


def test_a_name_that_lives_and_one_that_ended_are_told_apart(emulated, engine):
    engine.enqueue_many([new_task(1, name="once")])
    with pytest.raises(TaskAlreadyExistsError):
        engine.enqueue_many([new_task(2, name="once")])
    (task,) = stored(emulated)
    emulated.client.delete_task(name=task.name)
    with pytest.raises(TombstonedTaskError):
        engine.enqueue_many([new_task(3, name="once")])
    assert stored(emulated) == []


def test_a_name_in_use_is_told_to_an_account_that_may_not_look_at_tasks(emulated, engine, monkeypatch):
    engine.enqueue_many([new_task(1, name="once")])

    def exists(name):
        raise QueueUnavailable("forbidden")

    monkeypatch.setattr(engine.client, "exists", exists)
    with pytest.raises(TaskAlreadyExistsError):
        engine.enqueue_many([new_task(2, name="once")])


def test_an_id_is_taken_once(emulated, engine):
    engine.enqueue_many([new_task(1)])
    with pytest.raises(TaskAlreadyExistsError):
        engine.enqueue_many([new_task(1)])


def test_retry_options_become_whole_seconds_and_attempts_stay_unlimited(emulated, engine):
    options = {"task_retry_limit": 2.0, "min_backoff_seconds": 2.5, "max_backoff_seconds": 30.0, "max_doublings": 3.0}
    engine.enqueue_many([new_task(retry_options=options)])
    config = stored(emulated)[0].retry_config
    assert (config.max_attempts, config.max_doublings) == (-1, 3)
    assert (config.min_backoff.total_seconds(), config.max_backoff.total_seconds()) == (3, 30)


@pytest.mark.parametrize(
    ("deadline", "seconds"), [(None, 630), (1.0, 31), (100.0, 130), (0.0, 1_800), (86_400.0, 1_800)]
)
def test_the_service_waits_for_the_deadline_of_an_attempt_and_30_seconds_more(emulated, engine, deadline, seconds):
    engine.enqueue_many([new_task(deadline=deadline)])
    assert stored(emulated)[0].dispatch_deadline.total_seconds() == seconds


def test_a_batch_says_of_each_task_what_became_of_it(emulated, engine):
    engine.enqueue_many([new_task(1, name="taken")])
    with pytest.raises(NotAllStored) as caught:
        engine.enqueue_many([new_task(2), new_task(3, name="taken"), new_task(4)])
    assert {key: type(error) for key, error in caught.value.failed.items()} == {f"{3:032x}": TaskAlreadyExistsError}
    assert len(stored(emulated)) == 3
    with pytest.raises(TaskAlreadyExistsError):
        engine.enqueue_many([new_task(5, name="taken"), new_task(6, name="taken")])


def test_many_tasks_are_created_in_batches(emulated, engine):
    engine.enqueue_many(new_task(number) for number in range(250))
    assert len(stored(emulated)) == 250


def test_a_queue_that_is_not_there_is_an_error_that_says_what_to_do(engine):
    with pytest.raises(UnknownQueueError, match="queues update"):
        engine.enqueue_many([new_task(queue="other")])
    with pytest.raises(UnknownQueueError):
        engine.enqueue_many([new_task(1, queue="other"), new_task(2, queue="other")])


@pytest.mark.parametrize(("changes", "error"), [
    ({"queue": "a.b"}, InvalidTaskNameError),
    ({"target": "elsewhere"}, InvalidTaskError),
    ({"headers": {"authorization": "x"}}, InvalidTaskError),
    ({"headers": {"X-CloudTasks-QueueName": "x"}}, InvalidTaskError),
    ({"token": b"x" * 1_048_569}, TaskTooLargeError),
])  # fmt: skip
def test_what_cloud_tasks_cannot_have_is_refused_before_anything_is_stored(emulated, engine, changes, error):
    with pytest.raises(error):
        engine.enqueue_many([new_task(1), new_task(2, **changes)])
    assert stored(emulated) == []


def test_the_largest_token_that_is_taken_is_taken_by_the_service(emulated, engine):
    with pytest.raises(TaskTooLargeError) as caught:
        engine.enqueue_many([new_task(token=b"x" * 1_048_569)])
    engine.enqueue_many([new_task(token=b"x" * caught.value.limit)])
    assert len(stored(emulated)) == 1


def test_targets_have_addresses_of_their_own(emulated):
    engine = new_engine(emulated, f"&service_account={ACCOUNT}&target.mail={emulated.target_url}/mail")
    engine.enqueue_many([new_task(target="mail")])
    request = stored(emulated)[0].http_request
    assert (request.url, request.oidc_token.audience) == (
        f"{emulated.target_url}/mail/run",
        f"{emulated.target_url}/mail",
    )
    engine.close()


def test_app_engine_tasks_have_services_and_no_oidc_token(emulated, monkeypatch):
    engine = CloudTasks(f"{BASE}?endpoint={emulated.url}&app_engine=yes", clock=emulated.clock)
    engine.enqueue_many([new_task(target="mail", deadline=86_400.0)])
    (task,) = stored(emulated)
    assert task.app_engine_http_request.relative_uri == "/run"
    assert task.app_engine_http_request.app_engine_routing.service == "mail"
    assert task.dispatch_deadline.total_seconds() == 86_415
    emulated.client.resume_queue(name=QUEUE)
    headers = emulated.requests(1)[0][2]
    assert engine.authenticate(headers)
    assert not engine.authenticate({"X-AppEngine-QueueName": ""})
    assert not engine.authenticate({})
    engine.close()
    at_googles = CloudTasks(f"{BASE}?app_engine=yes")
    monkeypatch.delenv("GAE_APPLICATION", raising=False)
    assert not at_googles.authenticate(headers)  # outside App Engine nobody takes the header from a stranger's request
    monkeypatch.setenv("GAE_APPLICATION", "p-1")
    assert at_googles.authenticate(headers)


def test_a_delivery_proves_who_sent_it_and_says_how_often(emulated, engine):
    engine.enqueue_many([new_task(1)])
    emulated.target.answers = [404]
    emulated.client.resume_queue(name=QUEUE)
    emulated.requests(1)
    emulated.settled(stored(emulated)[0].name, 1)
    emulated.tick(1)
    first, second = (each[2] for each in emulated.requests(2))
    assert engine.authenticate(first)
    attempts = engine.attempt(first), engine.attempt(second)
    assert [(each.retries, each.executions, each.previous_response) for each in attempts] == [(0, 0, None), (1, 1, 404)]
    assert [(each.task_id, each.since, each.sent) for each in attempts] == [(f"{1:032x}", T0, T0)] * 2
    assert not engine.authenticate({**first, "Authorization": "Bearer x"})
    emulated.clock.moment += 3_611
    assert not engine.authenticate(first)


@pytest.mark.parametrize("headers", [
    {}, {"X-CloudTasks-TaskRetryCount": "-1", "Safedefer-Due": "nan"}, {"x-cloudtasks-taskretrycount": "9" * 99},
    {"Safedefer-Due": "1e999", "X-CloudTasks-TaskPreviousResponse": "x"},
])  # fmt: skip
def test_headers_that_are_none_of_the_services_count_nothing(engine, headers):
    attempt = engine.attempt(headers)
    assert (attempt.retries, attempt.executions, attempt.since, attempt.previous_response) == (0, 0, None, None)


def test_any_sender_is_taken_only_by_a_setting_that_warns(emulated, caplog):
    engine = new_engine(emulated, f"&service_account={ACCOUNT}&unsafe_accept_any_sender=yes")
    assert engine.authenticate({})
    assert "unsafe_accept_any_sender" in caplog.text


def test_a_task_without_a_name_is_deleted_by_its_id_and_a_purge_says_how_many(emulated, engine):
    engine.enqueue_many([new_task(1), new_task(2), new_task(3, name="named")])
    assert engine.cancel(f"{1:032x}", now=T0)
    assert not engine.cancel(f"{1:032x}", now=T0)
    assert not engine.cancel(f"{3:032x}", now=T0)
    (stats,) = engine.stats(now=T0)
    assert (stats.queue, stats.waiting, stats.running, stats.dead, stats.oldest) == ("mail", 2, 0, 0, T0)
    assert engine.purge("mail", now=T0) == 2
    assert stored(emulated) == []


def test_queues_are_made_and_changed_by_what_queue_yaml_declares(emulated, engine, caplog):
    file = QueueFile.parse(
        "queue: [{name: fresh, rate: 20/s, max_concurrent_requests: 7}, {name: mail, rate: 5/s}, {name: slow, rate: 0}]"
    )
    engine.configure(file.limits, now=T0)
    queues = {queue.name.rpartition("/")[2]: queue for queue in emulated.client.list_queues(parent=PARENT)}
    fresh = queues["fresh"]
    assert (fresh.rate_limits.max_dispatches_per_second, fresh.rate_limits.max_concurrent_dispatches) == (20, 7)
    assert all(queue.retry_config.max_attempts == -1 for queue in queues.values())
    assert queues["slow"].state.name == "PAUSED"
    assert "mail stays paused" in caplog.text
    engine.pause("mail", paused=False, now=T0)
    controls = {control.queue: control for control in engine.controls(now=T0)}
    assert (controls["fresh"].limits.rate, controls["fresh"].limits.max_concurrent) == (20, 7)
    assert {name: control.paused for name, control in controls.items()} == {
        "default": False, "fresh": False, "mail": False, "slow": True,
    }  # fmt: skip


@pytest.mark.parametrize("limits", [
    {"queue": "a.b"}, {"queue": "mail", "rate": 501.0}, {"queue": "mail", "max_concurrent": 5_001},
])  # fmt: skip
def test_limits_beyond_googles_are_refused(engine, limits):
    with pytest.raises(ConfigurationError):
        engine.configure([QueueLimits(**limits)], now=T0)


def test_a_dead_endpoint_is_a_queue_that_is_unavailable():
    with ReservedPort() as nobody:
        engine = CloudTasks(f"{BASE}?endpoint={nobody.url}&address=http://127.0.0.1:1&service_account={ACCOUNT}")
        for call in (
            lambda: engine.enqueue_many([new_task(1)]), lambda: engine.enqueue_many([new_task(1, name="named")]),
            lambda: engine.enqueue_many([new_task(1), new_task(2)]), lambda: engine.stats(now=T0),
            lambda: engine.cancel("1" * 32, now=T0), lambda: engine.pause("mail", paused=True, now=T0),
            lambda: engine.authenticate({"Authorization": "Bearer eyJhbGciOiJSUzI1NiIsImtpZCI6ImsifQ.e30.e30"}),
        ):  # fmt: skip
            with pytest.raises(QueueUnavailable):
                call()
        engine.close()


class _Deaf:
    """Passes requests on, and lets go of the connection instead of the first ``number`` answers."""

    def __init__(self, url, number):
        self.left = number
        self.port = int(url.rpartition(":")[2])
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                one, _ = self.server.accept()
            except OSError:
                return
            threading.Thread(target=self._pass, args=(one,), daemon=True).start()

    def _pass(self, one):
        with one, socket.create_connection(("127.0.0.1", self.port)) as other:
            threading.Thread(target=self._forward, args=(one, other), daemon=True).start()
            while answer := other.recv(1 << 20):
                if self.left:
                    self.left -= 1
                    one.shutdown(socket.SHUT_RDWR)
                    return
                one.sendall(answer)

    def _forward(self, one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 20):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("number", [1, 2])
def test_an_answer_that_was_lost_stores_a_task_once_and_is_no_error(emulated, number):
    """The name is the task's own: in use at the second try, it is the first try's."""
    deaf = _Deaf(emulated.url, 1)
    engine = CloudTasks(
        f"{BASE}?endpoint={deaf.url}&address={emulated.target_url}&service_account={ACCOUNT}", clock=emulated.clock
    )
    engine.enqueue_many([new_task(each) for each in range(number)])
    assert deaf.left == 0
    assert len(stored(emulated)) == number
    engine.close()
    deaf.server.close()


def test_an_answer_to_a_named_task_that_was_lost_is_an_error_since_another_may_have_the_name(emulated):
    deaf = _Deaf(emulated.url, 1)
    engine = CloudTasks(
        f"{BASE}?endpoint={deaf.url}&address={emulated.target_url}&service_account={ACCOUNT}", clock=emulated.clock
    )
    with pytest.raises(QueueUnavailable):
        engine.enqueue_many([new_task(name="once")])
    assert len(stored(emulated)) == 1
    engine.close()
    deaf.server.close()


def test_a_child_of_a_fork_enqueues_by_connections_of_its_own(emulated, engine):
    engine.enqueue_many([new_task(1)])
    child = os.fork()
    if child == 0:
        signal.alarm(100)  # should it wait for what nobody releases
        try:
            engine.enqueue_many([new_task(2)])
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    engine.enqueue_many([new_task(3)])
    assert len(stored(emulated)) == 3


def test_a_fork_while_another_thread_fetches_keys_leaves_the_child_a_check_of_its_own(monkeypatch):
    started, gate, calls = threading.Event(), threading.Event(), []

    def fetch(url):
        calls.append(url)
        if len(calls) == 1:
            started.set()
            gate.wait(DEADLINE)
        return {"keys": []}

    monkeypatch.setattr("safedefer.queues.cloudtasks.oidc.fetch_keys", fetch)
    engine = CloudTasks(f"{BASE}?address=https://tasks.example.com&service_account={ACCOUNT}")
    headers = {"Authorization": "Bearer eyJhbGciOiJSUzI1NiIsImtpZCI6ImsifQ.e30.e30"}
    thread = threading.Thread(target=engine.authenticate, args=(headers,))
    thread.start()
    assert started.wait(DEADLINE)
    child = os.fork()
    if child == 0:
        signal.alarm(50)  # a lock that nobody releases
        os._exit(1 if engine.authenticate(headers) else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gate.set()
    thread.join(DEADLINE)
    assert len(calls) == 1
    engine.close()


def test_a_batch_whose_end_is_not_said_in_time_is_uncertain(emulated, engine, monkeypatch):
    from google.api_core import operation

    def result(self, **_):
        raise TimeoutError

    monkeypatch.setattr(operation.Operation, "result", result)
    # Each try finds the names of the first one in use: they are the tasks' own.
    with pytest.raises(QueueUnavailable):
        engine.enqueue_many([new_task(1), new_task(2)])
    assert len(stored(emulated)) == 2


def test_without_the_extra_the_error_says_what_to_install(emulated, engine, monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "safedefer.queues.cloudtasks.client", raising=False)
    monkeypatch.setitem(sys.modules, "google.cloud.tasks_v2", None)
    monkeypatch.setitem(sys.modules, "google.cloud", None)
    with pytest.raises(MissingExtra, match=r"safedefer\[gcp\]"):
        engine.enqueue_many([new_task()])


def test_without_credentials_the_error_says_how_to_have_some(monkeypatch, tmp_path):
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    engine = CloudTasks(f"{BASE}?address=https://tasks.example.com&service_account={ACCOUNT}")
    with pytest.raises(ConfigurationError, match="application-default login"):
        engine.enqueue_many([new_task()])


def test_the_tasks_are_delivered_with_a_loop_that_runs(emulated, engine):
    """Nothing of the engine waits for a loop: it is called in threads."""

    async def main():
        await asyncio.to_thread(engine.enqueue_many, [new_task(7)])

    asyncio.run(main())
    emulated.client.resume_queue(name=QUEUE)
    assert emulated.requests(1)[0][3] == b"a.b.c"
    wait_for(lambda: not stored(emulated), "the task's end")
