"""The Celery engine with real brokers and real workers: Valkey always, RabbitMQ where it is installed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from celery import Celery
from celery.exceptions import Reject, SoftTimeLimitExceeded
from kombu import Connection, Queue

from safedefer import TaskRetryOptions
from safedefer.cli.doctor import check_queue
from safedefer.cli.processes import _load_to_dispatch as load_to_dispatch
from safedefer.errors import ConfigurationError, QueueUnavailable
from safedefer.headers import Response
from safedefer.queues import open_engine
from safedefer.queues.base import DeadFilter, TaskState
from safedefer.queues.celery.broker import weaknesses_of_redis
from safedefer.queues.celery.engine import LONGEST_WAIT, TASK_NAME, CeleryEngine, WorkerHeaders
from safedefer.queues.memory.queue import MemoryQueue
from tests import sample_tasks
from tests.queues import celery_app as tasks
from tests.queues.brokers import RABBITMQ, celery_worker, rabbitmq, valkey, wait_for
from tests.queues.push_contract import PushContract
from tests.unit.apps import JOSE
from tests.unit.apps import make_app as make_plain_app

SOON = TaskRetryOptions(min_backoff_seconds=0.1, max_backoff_seconds=1.0, task_retry_limit=3)


@pytest.fixture(
    scope="module",
    params=[
        "valkey",
        pytest.param("rabbitmq", marks=pytest.mark.skipif(not RABBITMQ.exists(), reason="RabbitMQ is not installed")),
    ],
)
def broker(request):
    with {"valkey": valkey, "rabbitmq": rabbitmq}[request.param]() as url:
        yield url


@pytest.fixture
def app(broker, tmp_path):
    app = tasks.make_app(broker, tmp_path)
    yield app
    app.close()


@pytest.fixture
def environment(broker, tmp_path):
    return {"TEST_BROKER": broker, "TEST_FOLDER": str(tmp_path)}


def ran(folder: Path) -> list[str]:
    file = folder / "ran"
    return file.read_text().split("\n")[:-1] if file.exists() else []


def dead(app):
    return list(app.queue.dead_letters(DeadFilter()))


def forge(app, token, task_id="forged"):
    """Publish any message to the broker, as whoever may write it."""
    app.push_queue.engine.celery.send_task(TASK_NAME, (token, "/_ah/queue/deferred", 0, 0.0), task_id=task_id)


def test_a_worker_runs_retries_buries_and_survives_the_death_of_its_child(app, environment, tmp_path):
    numbers = range(20)
    app.defer_many([(tasks.add, (number,), {}) for number in numbers], atomic=False)
    app.defer_many([(tasks.add_later, (number,), {}) for number in numbers], atomic=False)
    app.options(retry_options=SOON).defer(tasks.fail_first, 2)
    given_up = app.options(retry_options=SOON).defer(tasks.fail)
    buried = app.defer(tasks.permanent)
    big = app.defer(tasks.note, "x" * 20_000)
    forge(app, "not-a-token")
    forge(app, make_plain_app().defer(sample_tasks.add, 1).payload.decode())
    forge(app, 17)
    killed = app.defer(tasks.hang_once)
    with celery_worker("tests.queues.celery_app:celery", environment):
        wait_for(lambda: (tmp_path / "hangs").exists())
        os.kill(int((tmp_path / "hangs").read_text()), signal.SIGKILL)
        wait_for(lambda: sum(line.startswith("hang ") for line in ran(tmp_path)) == 2)
        wait_for(lambda: {letter.id for letter in dead(app)} >= {given_up.id, buried.id})
        wait_for(lambda: ran(tmp_path).count("fail_first") == 3)
        wait_for(lambda: len([line for line in ran(tmp_path) if line.startswith("add")]) == 2 * len(numbers))
        wait_for(lambda: "x" * 20_000 in ran(tmp_path))
        wait_for(lambda: app.queue.find(killed.id) is None)
    lines = ran(tmp_path)
    assert sorted(line for line in lines if line.startswith("add ")) == sorted(f"add {number}" for number in numbers)
    loops = {tuple(line.split()[2:]) for line in lines if line.startswith("add_later")}
    assert len(loops) == len({pid for pid, _ in loops}), "each process has one event loop"
    letters = {letter.id: letter for letter in dead(app)}
    assert (letters[given_up.id].reason, letters[given_up.id].attempts) == ("retry-limit", 4)
    assert letters[buried.id].reason == "permanent-task-failure"
    assert set(letters) == {given_up.id, buried.id}
    assert lines.count("fail") == 4
    assert app.queue.blobs.get(big.id) is None


@pytest.mark.parametrize("broker", ["valkey"], indirect=True)
def test_what_is_due_in_more_than_a_minute_waits_in_the_store_until_a_worker_hands_it_over(
    broker, environment, tmp_path
):
    started = time.time()
    past = tasks.make_app(broker, tmp_path, clock=lambda: started - 3_600)
    # Deferred an hour ago, and due since a moment.
    task = past.options(countdown=3_600).defer(tasks.add, 7)
    cancelled = past.options(countdown=3_600).defer(tasks.add, 8)
    assert past.queue.find(task.id).state is TaskState.WAITING
    assert past.cancel(cancelled.id)
    with celery_worker("tests.queues.celery_app:celery", environment):
        wait_for(lambda: ran(tmp_path) == ["add 7"])
    assert past.queue.find(task.id) is None
    assert ran(tmp_path) == ["add 7"]
    past.close()


class TestCelery(PushContract):
    BY_HTTP = False
    KNOWS_ITS_TASKS = False

    @pytest.fixture
    def engine(self, broker):
        made = CeleryEngine(Celery("contract", broker=broker, set_as_current=False))
        made.celery.conf.update(task_publish_retry=False)
        with made.celery.connection() as connection, contextlib.closing(connection.SimpleQueue("mail")) as queue:
            queue.clear()
        yield made
        made.close()

    @pytest.fixture
    def deliveries(self, engine):
        def deliver(number):
            answers = Answers(Response(200, {}, b""))
            engine.serve(answers)
            with engine.celery.connection() as connection, contextlib.closing(connection.SimpleQueue("mail")) as queue:
                for _ in range(number):
                    message = queue.get(timeout=60)
                    values, keywords, _ = message.payload
                    assert keywords == {}
                    request = FakeRequest()
                    request.id = message.headers["id"]
                    engine.deliver(request, *values)
                    message.ack()
            return answers.given

        return deliver

    @pytest.fixture
    def stop(self, engine, broker):
        def stop():
            engine.celery.conf.broker_write_url = broker.partition("://")[0] + "://127.0.0.1:1"
            engine.celery.conf.broker_transport_options = {"max_retries": 0}

        return stop


# --- Without a broker, or a worker ----------------------------------------------------------------


@pytest.fixture
def engine():
    engine = CeleryEngine(Celery("test", broker="redis://127.0.0.1:1/0", set_as_current=False))
    engine.celery.conf.update(task_publish_retry=False, broker_transport_options={"max_retries": 0})
    yield engine
    engine.close()


@pytest.fixture
def plain(engine):
    sample_tasks.reset()
    app = make_plain_app(queue=engine, store=MemoryQueue())
    yield app
    app.close()


def messages(engine, monkeypatch):
    """Return a list of what the engine publishes from now on."""
    found = []
    monkeypatch.setattr(engine, "_publish", lambda *values: found.append(values))
    return found


def by_worker(retries=0, since=None):
    since = time.time() if since is None else since
    return WorkerHeaders({**JOSE, "X-AppEngine-TaskRetryCount": str(retries), "Safedefer-Since": repr(since)})


def test_headers_of_an_http_request_are_never_those_of_a_worker(plain, engine, monkeypatch):
    messages(engine, monkeypatch)
    task = plain.defer(sample_tasks.add, 1)
    forged = make_plain_app().defer(sample_tasks.add, 2).payload
    captured = dict(by_worker(retries=1_000, since=0.0))
    assert asyncio.run(plain.handle(captured, task.payload)).status == 403
    assert asyncio.run(plain.handle(captured, forged)).status == 403
    assert dead(plain) == []
    assert asyncio.run(plain.handle(by_worker(), task.payload)).status == 200
    assert asyncio.run(plain.handle(by_worker(retries=10, since=0.0), forged)).status == 200
    assert [letter.reason for letter in dead(plain)] == ["bad-signature"]


def test_a_retry_in_more_than_a_minute_leaves_the_broker_and_waits_in_the_store(plain, engine, monkeypatch):
    published = messages(engine, monkeypatch)
    slow = TaskRetryOptions(min_backoff_seconds=1_000.0, max_backoff_seconds=1_000.0)
    task = plain.options(retry_options=slow).defer(sample_tasks.fail)
    answer = asyncio.run(plain.handle(by_worker(), task.payload))
    assert (answer.status, answer.headers["Safedefer-Outcome"]) == (202, "retry")
    view = plain.queue.find(task.id)
    assert view.state is TaskState.WAITING
    assert view.due - time.time() > LONGEST_WAIT
    assert asyncio.run(plain.handle(by_worker(), task.payload)).status in {425, 500}
    assert sample_tasks.RAN == ["fail"]
    published.clear()
    assert plain.push_queue.hand_over_due(now=view.due + 1) == 1
    assert [message[0] for message in published] == [task.id]


@pytest.mark.parametrize(
    ("answer", "retries", "seconds"),
    [
        (Response(500, {"Retry-After": "7"}, b""), 0, 7),
        (Response(500, {"Retry-After": "9999"}, b""), 0, LONGEST_WAIT),
        (Response(500, {"Retry-After": "0"}, b""), 0, 1),
        (Response(409, {}, b""), 0, 1),
        (Response(409, {}, b""), 50, 10),
        (Response(403, {}, b""), 50, LONGEST_WAIT),
    ],
)
def test_a_countdown_is_whole_seconds_up_to_a_minute(engine, monkeypatch, answer, retries, seconds):
    published = messages(engine, monkeypatch)
    engine.serve(Answers(answer))
    engine.deliver(FakeRequest(), "token", "/url", retries, 1.0)
    ((task_id, values, countdown, route),) = published
    assert (task_id, values, countdown) == ("the-id", ("token", "/url", retries + 1, 1.0), seconds)
    assert route == {"queue": "mail"}


def test_a_message_is_not_acknowledged_if_the_next_one_was_not_published(engine):
    engine.serve(Answers(Response(500, {}, b"")))
    with pytest.raises(Reject) as raised:
        engine.deliver(FakeRequest(), "token", "/url", 0, 1.0)
    assert raised.value.requeue is True


@pytest.mark.parametrize("error", [QueueUnavailable("away"), RuntimeError("closed")])
def test_a_message_goes_back_to_the_broker_where_the_handler_cannot_be_asked(engine, monkeypatch, error):
    monkeypatch.setattr("safedefer.queues.celery.engine._NOT_HANDLED_SECONDS", 0.0)

    class Broken:
        def submit(self, *_):
            raise error

    engine.serve(Broken())
    with pytest.raises(Reject) as raised:
        engine.deliver(FakeRequest(), "token", "/url", 0, 1.0)
    assert raised.value.requeue is True


def test_a_soft_time_limit_of_celerys_does_not_end_the_wait_for_an_answer(engine, monkeypatch):
    published = messages(engine, monkeypatch)
    answers = Answers(Response(200, {}, b""))
    answers.interrupted = 2
    engine.serve(answers)
    engine.deliver(FakeRequest(), "token", "/url", 0, 1.0)
    assert published == []
    assert answers.interrupted == 0


@pytest.mark.parametrize(
    "values",
    [
        (17, "/url", 0, 1.0),
        ("t\u00f6ken", "/url", 0, 1.0),
        ("token", None, 0, 1.0),
        ("token", "/url", -1, 1.0),
        ("token", "/url", True, 1.0),
        ("token", "/url", 0, float("nan")),
        ("token", "/url", 0, 10**400),
        ("token", "/url", 10**400, "soon"),
    ],
)
def test_a_message_that_is_none_of_ours_is_dropped(engine, caplog, values):
    answers = Answers(Response(200, {}, b""))
    engine.serve(answers)
    engine.deliver(FakeRequest(), *values)
    assert "it is none of ours" in caplog.text
    assert answers.given == []


def test_a_broker_that_is_away_is_an_error_at_defer(plain, engine):
    with pytest.raises(QueueUnavailable, match="Celery broker"):
        plain.defer(sample_tasks.add, 1)


def test_a_transport_that_does_not_import_is_named_with_what_to_install(plain, engine, monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'redis'")

    monkeypatch.setattr(engine, "_producer", missing)
    with pytest.raises(QueueUnavailable, match=r"No module named 'redis'.*pip install 'celery\[redis\]'"):
        plain.defer(sample_tasks.add, 1)


def test_the_doctor_asks_the_broker(plain, monkeypatch):
    def queue():
        return [(finding.status, finding.text) for finding in check_queue(plain)]

    with pytest.raises(QueueUnavailable, match="the Celery broker does not answer"):
        queue()
    monkeypatch.setattr(plain.push_queue.engine.celery, "connection_for_write", lambda: Connection("memory://"))
    assert [status for status, _ in queue()] == ["ok"]


def test_a_command_that_dispatches_names_the_one_that_starts_celerys_workers(monkeypatch):
    celery = Celery("shop", broker="redis://127.0.0.1:1/0", set_as_current=False)
    app = make_plain_app(queue=celery, store=MemoryQueue())
    monkeypatch.setattr(tasks, "celery", celery, raising=False)
    monkeypatch.setattr(tasks, "app", app, raising=False)
    with pytest.raises(ConfigurationError, match="`celery -A tests.queues.celery_app:celery worker`"):
        load_to_dispatch("tests.queues.celery_app:app", None, ())
    assert app.push_queue.engine.worker_command("tests.sample_tasks") == "celery -A MODULE:CELERY_APPLICATION worker"
    app.close()


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({"appendonly": "no"}, ["set appendonly yes"]),
        ({"appendonly": "yes", "appendfsync": "everysec"}, ["set appendfsync always"]),
        ({"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "allkeys-lru"}, ["maxmemory-policy noeviction"]),
        ({"appendonly": "yes", "appendfsync": "always"}, []),
    ],
)  # fmt: skip
def test_the_doctor_says_how_a_broker_may_lose_tasks(settings, texts):
    with valkey(**settings) as url:
        app = make_plain_app(queue=Celery("weak", broker=url, set_as_current=False), store=MemoryQueue())
        found = [finding for finding in check_queue(app) if finding.status == "warn"]
        app.close()
    assert len(found) == len(texts)
    assert all(
        "the broker may lose messages" in each.text and text in each.text
        for each, text in zip(found, texts, strict=True)
    )


def test_the_doctor_says_that_queues_are_not_durable(plain, engine, monkeypatch):
    monkeypatch.setattr(engine.celery, "connection_for_write", lambda: Connection("memory://"))
    assert engine.weaknesses() == []
    engine.celery.conf.task_queues = [Queue("mail", durable=False)]
    assert [text for text in engine.weaknesses() if "not durable" in text]
    engine.celery.conf.update(task_queues=None, task_default_delivery_mode="transient")
    assert [text for text in engine.weaknesses() if "not durable" in text]


def test_a_server_that_answers_no_config_is_asked_for_nothing_more():
    class Client:
        def info(self, section):
            return {"persistence": {"aof_enabled": 1}, "memory": {}}[section]

        def config_get(self, _):
            raise ConnectionError("unknown command 'CONFIG'")

    assert weaknesses_of_redis(Client()) == []


@pytest.mark.parametrize("url", ["celery://", "celery://?broker=", "celery://host", "celery://?broker=host"])
def test_a_url_names_its_broker(url):
    with pytest.raises(ConfigurationError, match="names its broker"):
        open_engine(url)


@pytest.mark.parametrize(
    ("url", "broker"),
    [
        ("celery+amqp://u:p@host//", "amqp://u:p@host//"),
        ("celery://?broker=redis%3A%2F%2Fhost%2F3", "redis://host/3"),
    ],
)
def test_a_broker_is_read_from_the_url(url, broker):
    engine = open_engine(url)
    assert engine.celery.conf.broker_url == broker
    assert engine.celery.conf.accept_content == ["json"]
    engine.close()


def test_an_existing_celery_application_is_an_engine_of_one_app():
    celery = Celery("existing", broker="redis://127.0.0.1:1/0", set_as_current=False)
    app = make_plain_app(queue=celery, store=MemoryQueue())
    assert app.pushes
    assert TASK_NAME in celery.tasks
    with pytest.raises(ConfigurationError, match="another App"):
        make_plain_app(queue=celery, store=MemoryQueue())
    app.close()
    make_plain_app(queue=celery, store=MemoryQueue()).close()


class FakeRequest:
    """What Celery gives a bound task."""

    def __init__(self):
        self.request = self
        self.id = "the-id"
        self.delivery_info = {"exchange": "", "routing_key": "mail", "redelivered": False}


class Answers:
    """A handler that gives one answer."""

    def __init__(self, answer):
        self.answer = answer
        self.interrupted = 0
        self.given = []

    def submit(self, headers, token, url, /):
        assert isinstance(headers, WorkerHeaders)
        self.given.append((headers, token))
        return self

    def result(self):
        if self.interrupted:
            self.interrupted -= 1
            raise SoftTimeLimitExceeded
        return self.answer

    def start(self):
        raise AssertionError
