"""What an existing Celery application is set to, and what its operator does, loses no task."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from billiard.einfo import ExceptionInfo
from celery import Celery, Task
from celery.exceptions import Reject, SoftTimeLimitExceeded, Terminated
from celery.worker import state
from kombu import Exchange, Queue

from safedefer.errors import ConfigurationError, QueueUnavailable
from safedefer.headers import Response
from safedefer.queues.celery import engine as engines
from safedefer.queues.celery.engine import TASK_NAME, CeleryEngine
from safedefer.queues.celery.engine import _route_back as route_back
from safedefer.queues.celery.task import HANDLED
from safedefer.queues.celery.worker import _LastSync as LastSync
from safedefer.queues.celery.worker import _SyncedRequest as SyncedRequest
from safedefer.queues.memory.queue import MemoryQueue
from tests import sample_tasks
from tests.queues import celery_app as tasks
from tests.queues.brokers import RABBITMQ, celery_worker, rabbitmq, valkey, wait_for
from tests.queues.contract import make_task
from tests.queues.test_celery import SOON, Answers, FakeRequest, ran
from tests.unit.apps import make_app as make_plain_app

#: Each of these has Celery let go of messages whose task has not returned.
CARELESS = {
    "task_acks_late": False,
    "task_acks_on_failure": True,
    "task_acks_on_timeout": True,
    "task_acks_on_failure_or_timeout": True,
    "task_reject_on_worker_lost": False,
    "task_retry_on_worker_lost": True,
    "task_store_errors_even_if_ignored": True,
    "task_annotations": {"*": {"acks_late": False, "expires": 1, "acks_on_timeout": True, "max_retries": 1}},
    "worker_deduplicate_successful_tasks": True,
}


@pytest.fixture
def environment(tmp_path):
    with valkey() as url:
        yield {"TEST_BROKER": url, "TEST_FOLDER": str(tmp_path)}


@pytest.fixture
def app(environment, tmp_path):
    app = tasks.make_app(environment["TEST_BROKER"], tmp_path)
    yield app
    app.close()


def engine_of(broker, conf):
    celery = Celery("settings", broker=broker, set_as_current=False)
    celery.conf.update(conf)
    return CeleryEngine(celery)


@pytest.mark.parametrize(
    ("broker", "conf", "lossless"),
    [
        ("amqp://", {}, True),
        ("pyamqp://a;pyamqp://b", {}, True),
        ("amqp://", {"task_queues": {"mail": {"exchange": "mail", "routing_key": "mail"}}}, True),
        ("amqp://", {"task_queues": [Queue("mail", Exchange("mail"), routing_key="mail")]}, True),
        ("amqp://", {"task_queues": {"mail": {"durable": False}}}, False),
        ("amqp://", {"task_queues": [Queue("mail", durable=False)]}, False),
        ("amqp://", {"task_queues": [Queue("mail", Exchange("mail", delivery_mode="transient"))]}, False),
        ("amqp://", {"task_queues": [Queue("mail", auto_delete=True)]}, False),
        ("amqp://", {"task_queues": [Queue("mail", message_ttl=60.0)]}, False),
        ("amqp://", {"task_queues": [Queue("mail", expires=60.0)]}, False),
        ("amqp://", {"task_queues": [Queue("mail", queue_arguments={"x-max-length": 1_000})]}, False),
        ("amqp://", {"task_queues": [Queue("mail", queue_arguments={"x-queue-type": "quorum"})]}, False),
        ("amqp://", {"task_default_queue_type": "quorum"}, False),
        ("amqp://", {"task_default_delivery_mode": "transient"}, False),
        ("amqp://", {"task_routes": {"safedefer.*": {"delivery_mode": 1}}}, False),
        ("amqp://", {"task_annotations": {"*": {"delivery_mode": 1}}}, False),
        ("amqp://a;redis://b", {}, False),
        ("redis://a;amqp://b", {}, False),
        ("redis://a", {}, False),
        ("rediss://a/0?ssl_cert_reqs=required", {}, False),
        ("sentinel://a:26379;sentinel://b:26379", {}, False),
        ("nonsense://", {}, False),
    ],
)
def test_only_a_broker_that_keeps_each_message_needs_no_copies(broker, conf, lossless):
    engine = engine_of(broker, conf)
    assert engine.capabilities.lossless is lossless
    engine.close()


def route_by_task(name, args, kwargs, options, task=None, **more):
    return {"queue": f"of-{task.name}"}


@pytest.mark.parametrize(
    "conf",
    [
        {},
        {"broker_transport_options": {"global_keyprefix": "of-us:"}},
        {"task_default_priority": 5, "broker_transport_options": {"queue_order_strategy": "priority"}},
        {"task_routes": {"safedefer.*": {"queue": "mine"}}},
        {"task_routes": (route_by_task,)},
    ],
    ids=["plain", "prefix", "priority", "routes", "router"],
)
def test_messages_that_wait_are_counted_where_they_are_sent_and_those_that_workers_have_too(conf):
    with valkey() as url:
        engine = engine_of(url, conf)
        engine.enqueue_many([make_task(queue="default") for _ in range(3)])
        engine.enqueue_many([make_task(queue="mail") for _ in range(2)])
        assert [engine.messages(queue) for queue in ("default", "mail", "empty")] == [3, 2, 0]
        with engine.celery.connection_for_read() as connection, connection.channel() as channel:
            message = channel.basic_get("mail")
            assert [engine.messages(queue) for queue in ("default", "mail", "empty")] == [4, 2, 1]
            channel.basic_ack(message.delivery_tag)
        assert engine.messages("mail") == 1
        engine.close()


def test_a_broker_that_guesses_how_many_messages_wait_is_not_asked():
    engine = engine_of("sqla+sqlite://", {})
    assert engine.messages("default") is None
    engine.close()


def test_producers_that_all_wait_for_a_broker_do_not_keep_the_app_from_closing():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts, and answers nothing
        engine = engine_of(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", {})

        def enqueue():
            with contextlib.suppress(QueueUnavailable):
                engine.enqueue_many([make_task()])

        for _ in range(engines._CONNECTIONS + 1):
            threading.Thread(target=enqueue, daemon=True).start()
        wait_for(lambda: engine._producers is not None and engine._producers._resource.qsize() == 0)
        time.sleep(0.2)  # and the last one asks for a connection
        closing = threading.Thread(target=engine.close, daemon=True)
        closing.start()
        closing.join(10.0)
        assert not closing.is_alive()


def test_no_child_of_a_worker_hands_over(app, environment, tmp_path):
    with celery_worker("tests.queues.celery_app:celery", environment) as worker:
        for _ in range(4):
            app.defer(tasks.note_threads)
        wait_for(lambda: len(ran(tmp_path)) == 4)
    children = [line.split() for line in ran(tmp_path)]
    assert {parent for parent, *_ in children} == {str(worker.pid)}
    assert not [names for _, *names in children if "safedefer-hand-over" in names]


def test_a_worker_of_a_careless_application_loses_no_task(app, environment, tmp_path):
    conf = {**CARELESS, "task_time_limit": 3, "result_backend": environment["TEST_BROKER"]}
    app.push_queue.engine.celery.conf.update(conf)
    revoked = app.options(countdown=4).defer(tasks.add, 1)  # more than the second after which annotations let it expire
    hangs = app.defer(tasks.hang_once)  # runs into Celery's hard time limit
    app.options(queue="mail", retry_options=SOON).defer(tasks.fail_first, 1)
    with celery_worker(
        "tests.queues.celery_app:celery", {**environment, "TEST_CONF": json.dumps(conf)}, "-Q", "celery,mail"
    ):
        app.push_queue.engine.celery.control.revoke(revoked.id)
        wait_for(lambda: "add 1" in ran(tmp_path))
        wait_for(lambda: sum(line.startswith("hang ") for line in ran(tmp_path)) == 2)
        wait_for(lambda: ran(tmp_path).count("fail_first") == 2)
        wait_for(lambda: app.queue.find(hangs.id) is None)
    assert len(ran(tmp_path)) == 5


def test_a_task_that_celery_is_told_to_terminate_runs_again(app, environment, tmp_path):
    task = app.defer(tasks.hang_once)
    with celery_worker("tests.queues.celery_app:celery", environment):
        wait_for(lambda: (tmp_path / "hangs").exists())
        app.push_queue.engine.celery.control.revoke(task.id, terminate=True, signal="SIGKILL")
        wait_for(lambda: sum(line.startswith("hang ") for line in ran(tmp_path)) == 2)


@pytest.mark.parametrize(
    "kind",
    [
        "valkey",
        pytest.param("rabbitmq", marks=pytest.mark.skipif(not RABBITMQ.exists(), reason="RabbitMQ is not installed")),
    ],
)
def test_a_retry_runs_in_the_queue_of_its_task(kind, tmp_path):
    with {"valkey": valkey, "rabbitmq": rabbitmq}[kind]() as url:
        app = tasks.make_app(url, tmp_path)
        app.options(queue="mail", retry_options=SOON).defer(tasks.fail_first, 1)
        with celery_worker(
            "tests.queues.celery_app:celery", {"TEST_BROKER": url, "TEST_FOLDER": str(tmp_path)}, "-Q", "mail"
        ):
            wait_for(lambda: ran(tmp_path).count("fail_first") == 2)
        app.close()


@pytest.mark.parametrize(
    ("info", "route"),
    [
        ({"exchange": "", "routing_key": "mail"}, {"queue": "mail"}),
        ({"exchange": None, "routing_key": "mail"}, {"queue": "mail"}),
        ({"exchange": "topics", "routing_key": "mail.a"}, {"exchange": "topics", "routing_key": "mail.a"}),
        ({}, {}),
    ],
)
def test_the_next_message_of_a_task_goes_where_the_last_one_came_from(info, route):
    assert route_back(info) == route


# --- Without a broker -----------------------------------------------------------------------------


class OwnTask(Task):
    """The base class of an application's own tasks."""

    autoretry_for = (Exception,)
    expires = 1
    Request = "celery.worker.request:Request"


@pytest.fixture
def celery():
    celery = Celery("careless", broker="memory://", set_as_current=False, task_cls=OwnTask)
    celery.conf.update(CARELESS)
    return celery


@pytest.fixture
def engine(celery):
    engine = CeleryEngine(celery)
    yield engine
    engine.close()


def test_nothing_of_the_application_says_how_messages_are_acknowledged(engine):
    task = engine.celery.tasks[TASK_NAME]
    assert {name: getattr(task, name) for name in HANDLED} == HANDLED
    assert not isinstance(task, OwnTask)


def test_an_application_whose_workers_would_drop_json_is_refused_before_a_task_is_taken(celery):
    app = make_plain_app(queue=celery, store=MemoryQueue())
    celery.conf.accept_content = ["pickle"]
    with pytest.raises(ConfigurationError, match="add 'json' to its accept_content"):
        app.defer(sample_tasks.add, 1)
    consumer = SimpleNamespace(app=celery, hub=None)
    with pytest.raises(ConfigurationError, match="add 'json'"):
        LastSync(consumer).start(consumer)
    celery.conf.accept_content = ["pickle", "application/json", "known-to-the-workers"]
    LastSync(consumer).start(consumer)
    app.close()


@pytest.mark.parametrize(
    ("outcome", "left", "syncs"), [("duplicate", False, 1), ("duplicate", True, 0), ("succeeded", False, 0)]
)
def test_an_end_that_another_worker_has_stored_is_synced_before_its_second_message_is_acknowledged(
    engine, monkeypatch, outcome, left, syncs
):
    synced = []
    answers = Answers(Response(200, {"Safedefer-Outcome": outcome}, b""))
    answers.syncs = lambda: lambda: synced.append(1)
    engine.serve(answers)
    request = FakeRequest()
    request.safedefer_parent = os.getppid() if left else 0
    engine.deliver(request, "token", "/url", 0, 1.0)
    assert len(synced) == syncs


def message(engine, **headers):
    values = {"id": "the-id", "task": TASK_NAME, "safedefer_parent": 17, **headers}
    return SimpleNamespace(
        headers=values, body=b"", payload=((), {}, {}), content_type="", content_encoding="",
        delivery_info={"exchange": "", "routing_key": "mail", "redelivered": True}, properties={},
    )  # fmt: skip


@pytest.fixture
def said():
    return []


@pytest.fixture
def request_(engine, said):
    return SyncedRequest(
        message(engine, expires="2020-01-01T00:00:00+00:00"),
        app=engine.celery,
        task=engine.celery.tasks[TASK_NAME],
        on_ack=lambda *_: said.append("acknowledged"),
        on_reject=lambda _log, _errors, requeue: said.append("back" if requeue else "dropped"),
    )


def failed(error):
    try:
        raise error
    except Exception:
        return ExceptionInfo()


@pytest.mark.parametrize(
    "error", [Terminated(15), ValueError("any"), SoftTimeLimitExceeded(), Reject("any", requeue=False)]
)
def test_a_message_whose_task_did_not_return_goes_back(request_, said, error):
    request_.on_failure(failed(error), return_ok=True)
    assert said == ["back"]


def test_a_message_that_celery_terminates_goes_back(request_, said):
    request_.time_start = 1.0
    request_.terminate(SimpleNamespace(terminate_job=lambda *_: None))
    assert said == ["back"]


def test_a_message_that_celery_revokes_is_handled(request_, said, monkeypatch, caplog):
    monkeypatch.setattr(state, "revoked", {"the-id"})
    assert request_.revoked() is False
    assert "use `safedefer tasks cancel`" in caplog.text
    assert said == []


def test_a_message_that_celery_cannot_read_is_dropped(request_, said):
    request_.reject(requeue=False)
    assert said == ["dropped"]


def test_a_message_says_nothing_of_its_parent_and_is_never_one_that_celery_takes_for_done(request_):
    assert request_.request_dict["safedefer_parent"] == 0
    assert request_.request_dict["delivery_info"]["redelivered"] is False


def test_a_message_that_the_engine_acknowledges_names_its_parent(engine, said):
    engine.acknowledgements = SimpleNamespace(mark="mark")
    request = SyncedRequest(message(engine), app=engine.celery, task=engine.celery.tasks[TASK_NAME])
    assert request.request_dict["safedefer_parent"] == os.getpid()


@pytest.mark.parametrize("error", [SoftTimeLimitExceeded(), RuntimeError("any"), MemoryError()])
def test_whatever_ends_a_delivery_the_message_goes_back(engine, monkeypatch, error):
    monkeypatch.setattr(engines, "_NOT_HANDLED_SECONDS", 0.0)

    def ends(*_):
        raise error

    monkeypatch.setattr(engine, "deliver", ends)
    with pytest.raises(Reject) as raised:
        engine.celery.tasks[TASK_NAME].run("token", "/url", 0, 1.0)
    assert raised.value.requeue is True


def test_a_message_of_another_application_of_the_process_goes_back(engine, monkeypatch):
    monkeypatch.setattr(engines, "_NOBODY_SECONDS", 0.0)
    other = Celery("other", broker="memory://", set_as_current=False)
    other.finalize()
    with pytest.raises(Reject) as raised:
        other.tasks[TASK_NAME].run("token", "/url", 0, 1.0)
    assert raised.value.requeue is True
    request = SyncedRequest(message(engine), app=other, task=other.tasks[TASK_NAME], on_ack=lambda *_: None)
    request.acknowledge()
    assert request.acknowledged


@pytest.mark.parametrize("values", [((), {}), (("token",), {}), (("token", "/url", 0, 1.0), {"more": 1})])
def test_a_message_of_other_arguments_is_dropped(engine, caplog, values):
    engine.celery.tasks[TASK_NAME].run(*values[0], **values[1])
    assert "it is none of ours" in caplog.text
