"""Spans: what sends and runs tasks makes which, how they hang together, and what is in none of them."""

import asyncio
import logging
import sqlite3
import subprocess
import sys

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.semconv._incubating.attributes import messaging_attributes as messaging
from opentelemetry.semconv.attributes import error_attributes
from opentelemetry.trace import SpanKind, StatusCode

from safedefer.errors import ConfigurationError, NotDeferrable
from safedefer.observe.tracing import Tracing, span_context
from safedefer.testing import TestApp
from tests import sample_tasks as tasks
from tests.unit.apps import JOSE, handle, make_app

TRACE = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"


class Traced:
    """An app whose spans are kept."""

    def __init__(self, trace="link", *, tracebacks=False, sampler=None, **changes):
        self.kept = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.kept))
        self.tracing = Tracing(trace=trace, tracer_provider=self.provider, tracebacks=tracebacks)
        self.app = make_app(tracing=self.tracing, **changes)
        self.tracer = self.provider.get_tracer("test")

    @property
    def spans(self):
        return self.kept.get_finished_spans()

    def named(self, name):
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def make():
    tasks.reset()
    made = []

    def make(*args, **changes):
        made.append(Traced(*args, **changes))
        return made[-1]

    yield make
    for each in made:
        each.app.close()


def links(span):
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


def place(span):
    return span.context.trace_id, span.context.span_id


def test_a_run_is_linked_to_the_span_that_sent_its_task_in_a_trace_of_its_own(make):
    traced = make()
    task = traced.app.defer(tasks.add, 1)
    assert handle(traced.app, task.payload).status == 200
    send, process = traced.spans
    assert (send.name, send.kind, send.parent) == ("send default", SpanKind.PRODUCER, None)
    assert (process.name, process.kind, process.parent) == ("process default", SpanKind.CONSUMER, None)
    assert links(process) == [place(send)]
    assert process.links[0].context.is_remote
    assert process.context.trace_id != send.context.trace_id
    assert dict(send.attributes) == {
        messaging.MESSAGING_SYSTEM: "safedefer",
        messaging.MESSAGING_OPERATION_NAME: "send",
        messaging.MESSAGING_OPERATION_TYPE: messaging.MessagingOperationTypeValues.SEND.value,
        messaging.MESSAGING_DESTINATION_NAME: "default",
        messaging.MESSAGING_MESSAGE_ID: task.id,
    }
    assert dict(process.attributes) == {
        messaging.MESSAGING_SYSTEM: "safedefer",
        messaging.MESSAGING_OPERATION_NAME: "process",
        messaging.MESSAGING_OPERATION_TYPE: messaging.MessagingOperationTypeValues.PROCESS.value,
        messaging.MESSAGING_DESTINATION_NAME: "default",
        messaging.MESSAGING_MESSAGE_ID: task.id,
        "safedefer.callable": "tests.sample_tasks:add",
        "safedefer.attempt": 1,
        "safedefer.outcome": "succeeded",
    }
    assert {span.status.status_code for span in traced.spans} == {StatusCode.UNSET}


def test_a_run_is_a_child_of_the_span_that_sent_its_task_where_asked(make):
    traced = make("parent")
    task = traced.app.options(queue="mail").defer(tasks.add, 1)
    handle(traced.app, task.payload)
    send, process = traced.spans
    assert process.name == "process mail"
    assert (process.parent.trace_id, process.parent.span_id) == place(send)
    assert process.context.trace_id == send.context.trace_id
    assert links(process) == []


@pytest.mark.parametrize("trace", ["link", "parent"])
def test_the_span_of_the_request_is_the_parent_or_is_linked(make, trace):
    traced = make(trace)
    task = traced.app.defer(tasks.add, 1)
    with traced.tracer.start_as_current_span("request") as request:
        handle(traced.app, task.payload)
    (send,), (process,) = traced.named("send default"), traced.named("process default")
    around, linked = (request, send) if trace == "link" else (send, request)
    assert process.parent.span_id == around.get_span_context().span_id
    assert links(process) == [(linked.get_span_context().trace_id, linked.get_span_context().span_id)]


@pytest.mark.parametrize("function", [tasks.note_span, tasks.note_span_async])
def test_the_span_is_active_in_the_task_and_in_what_it_defers(make, function):
    traced = make()
    with traced.tracer.start_as_current_span("request") as request:
        task = traced.app.defer(function)
    assert not otel.get_current_span().get_span_context().is_valid
    handle(traced.app, task.payload)
    (send,), (process,) = traced.named("send default"), traced.named("process default")
    assert send.parent.span_id == request.get_span_context().span_id
    assert tasks.RAN == [process.context.span_id]
    assert not otel.get_current_span().get_span_context().is_valid


def test_every_attempt_has_a_span_linked_to_the_one_that_sent(make):
    traced = make()
    with TestApp(traced.app) as kit:
        traced.app.defer(tasks.fail_once)
        kit.run_due(raises=False)
        kit.clock.advance(60)
        kit.run_due(raises=False)
    send, first, second = traced.spans
    assert links(first) == links(second) == [place(send)]
    assert [run.attributes["safedefer.attempt"] for run in (first, second)] == [1, 2]
    assert [run.attributes["safedefer.outcome"] for run in (first, second)] == ["retry", "succeeded"]
    assert first.context.trace_id != second.context.trace_id


def test_many_tasks_have_one_span_with_their_number(make):
    traced = make()
    made = traced.app.defer_many([(tasks.add, (number,), {}) for number in range(3)])
    (send,) = traced.spans
    assert send.attributes[messaging.MESSAGING_BATCH_MESSAGE_COUNT] == 3
    assert messaging.MESSAGING_MESSAGE_ID not in send.attributes
    for task in made:
        handle(traced.app, task.payload)
    assert [links(run) for run in traced.named("process default")] == [[place(send)]] * 3


async def test_a_coroutine_defers_within_its_own_trace(make):
    traced = make()
    with traced.tracer.start_as_current_span("request") as request:
        await traced.app.defer_async(tasks.add, 1)
    (send,) = traced.named("send default")
    assert send.parent.span_id == request.get_span_context().span_id


def test_tasks_of_a_transaction_are_traced_too(make, tmp_path):
    traced = make(queue=f"sqlite:///{tmp_path}/tasks.db")
    connection = sqlite3.connect(tmp_path / "shop.db")
    with traced.app.transaction(connection):
        one = traced.app.options(transactional=True).defer(tasks.add, 1)
        two, three = traced.app.options(transactional=True).defer_many([(tasks.add, (each,), {}) for each in (2, 3)])
    traced.app.outbox.sweep()
    send, batch = traced.named("send default")
    assert send.attributes[messaging.MESSAGING_MESSAGE_ID] == one.id
    assert batch.attributes[messaging.MESSAGING_BATCH_MESSAGE_COUNT] == 2
    for task in (one, two, three):
        stored = traced.app.queue.find(task.id)
        assert stored.headers == {"traceparent": traced.app.authenticate(stored.token)["trace"]}
        handle(traced.app, stored.token)
    assert [links(run) for run in traced.named("process default")] == [[place(send)], [place(batch)], [place(batch)]]
    connection.close()


async def test_the_task_of_an_awaited_transaction_is_traced(make, tmp_path):
    aiosqlite = pytest.importorskip("sqlalchemy.ext.asyncio")
    traced = make()
    engine = aiosqlite.create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shop.db")
    async with engine.connect() as connection, traced.app.transaction(connection):
        task = await traced.app.options(transactional=True).defer_async(tasks.add, 1)
    await engine.dispose()
    (send,) = traced.named("send default")
    assert send.attributes[messaging.MESSAGING_MESSAGE_ID] == task.id
    assert span_context(traced.app.authenticate(task.payload)["trace"]).span_id == send.context.span_id


def test_an_oversize_task_carries_its_trace_and_agrees_with_its_headers(make):
    traced = make(inline_limit=600)
    task = traced.app.defer(tasks.add, "x" * 2_000)
    trace = traced.app.authenticate(task.payload)["trace"]
    assert task.headers == {"traceparent": trace}
    handle(traced.app, task.payload)
    send, process = traced.spans
    assert links(process) == [place(send)]


async def test_the_http_handler_traces_by_the_token_and_not_by_the_request(make):
    traced = make()
    task = await traced.app.defer_async(tasks.add, 1)
    web_app = web.Application()
    web_app.add_routes(traced.app.routes())
    async with TestClient(TestServer(web_app)) as client:
        headers = {**JOSE, "traceparent": TRACE, "tracestate": "evil=1", "baggage": "evil=1"}
        answer = await client.post(task.url, data=task.payload, headers=headers)
        assert answer.status == 200
    send, process = traced.spans
    assert links(process) == [place(send)]
    assert process.parent is None


@pytest.mark.parametrize("trace", [
    None, "", "00", TRACE.upper(), f"{TRACE}\n", f"{TRACE}-00", f"ff{TRACE[2:]}", f"00-{'0' * 32}-{'b' * 16}-01",
    f"00-{'a' * 32}-{'0' * 16}-01", TRACE.replace("a", "\u0661", 1), "x" * 100_000,
])  # fmt: skip
def test_a_trace_that_is_none_is_ignored(trace):
    assert span_context(trace) is None


@pytest.mark.parametrize("mode", ["link", "parent"])
@pytest.mark.parametrize("trace", [f"ff{TRACE[2:]}", f"00-{'0' * 32}-{'b' * 16}-01", f"00-{'a' * 32}-{'0' * 16}-ff"])
def test_a_task_that_was_signed_with_an_impossible_trace_runs_without_it(make, monkeypatch, mode, trace):
    traced = make(mode)
    monkeypatch.setattr(traced.app._builder, "_trace", lambda: trace)
    task = traced.app.defer(tasks.add, 1)
    assert traced.app.authenticate(task.payload)["trace"] == trace
    assert handle(traced.app, task.payload).status == 200
    (process,) = traced.named("process default")
    assert (process.parent, links(process)) == (None, [])


def test_an_error_is_recorded_by_its_type_alone(make):
    traced = make()
    task = traced.app.defer(tasks.loud, "order of Ann")
    handle(traced.app, task.payload)
    with pytest.raises(NotDeferrable):
        traced.app.defer(print, "order of Ann")
    sent, process, refused = traced.spans
    assert sent.status.status_code is StatusCode.UNSET
    assert process.attributes[error_attributes.ERROR_TYPE] == "builtins.ValueError"
    assert (process.attributes["safedefer.outcome"], process.attributes["safedefer.reason"]) == ("retry", "exception")
    assert refused.attributes[error_attributes.ERROR_TYPE] == "safedefer.errors.NotDeferrable"
    for span in (process, refused):
        assert (span.status.status_code, span.status.description, span.events) == (StatusCode.ERROR, None, ())
    everything = "".join(span.to_json() for span in traced.spans)
    assert "Ann" not in everything
    assert task.payload.decode().split(".")[-1] not in everything
    assert "k1" not in everything


def test_a_traceback_is_in_the_span_where_asked_without_tokens(make):
    traced = make(tracebacks=True)
    token = traced.app.serialize(tasks.add, 1).decode()
    handle(traced.app, traced.app.defer(tasks.fail, token).payload)
    (event,) = traced.named("process default")[0].events
    assert event.name == "exception"
    assert "tests/sample_tasks.py" in event.attributes["exception.stacktrace"]
    assert "[token]" in event.attributes["exception.stacktrace"]
    assert token not in event.attributes["exception.stacktrace"]


def test_a_run_past_its_deadline_has_that_for_its_error(make):
    traced = make()
    task = traced.app.options(deadline=1).defer(tasks.sleep_long)
    assert handle(traced.app, task.payload).status == 500
    (process,) = traced.named("process default")
    assert process.attributes[error_attributes.ERROR_TYPE] == "deadline-exceeded"


async def test_a_run_that_ends_with_its_process_has_an_ended_span(make):
    traced = make()
    task = await traced.app.defer_async(tasks.sleep_long)
    running = asyncio.create_task(traced.app.handle(JOSE, task.payload))
    async with asyncio.timeout(60):
        while "begun" not in tasks.RAN:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    (process,) = traced.named("process default")
    assert process.attributes[error_attributes.ERROR_TYPE].endswith("CoroutineCancelled")


def test_what_is_not_sampled_says_so_to_its_runs(make):
    traced = make("parent", sampler=ALWAYS_OFF)
    task = traced.app.defer(tasks.add, 1)
    sent = span_context(traced.app.authenticate(task.payload)["trace"])
    assert not sent.trace_flags.sampled
    assert handle(traced.app, task.payload).status == 200
    assert traced.spans == ()


class _Broken(SpanProcessor):
    def __init__(self, where):
        self.where = where

    def on_start(self, span, parent_context=None):
        if self.where == "start":
            raise RuntimeError("order of Ann")

    def on_end(self, span):
        if self.where == "end":
            raise RuntimeError("order of Ann")


@pytest.mark.parametrize("where", ["start", "end"])
def test_what_raises_in_the_sdk_changes_nothing_of_a_task_and_is_logged_once(make, caplog, where):
    traced = make()
    traced.provider.add_span_processor(_Broken(where))
    with caplog.at_level(logging.ERROR, logger="safedefer"):
        for number in range(3):
            task = traced.app.defer(tasks.add, number)
            assert handle(traced.app, task.payload).status == 200
    assert [call[1] for call in tasks.RAN] == [0, 1, 2]
    assert caplog.text.count("tracing failed (builtins.RuntimeError)") == 1
    assert "Ann" not in caplog.text


def test_a_task_without_a_trace_runs_and_is_linked_to_nothing(make):
    """As of a producer that traces nothing: an older one, or one without the extra."""
    traced = make()
    token = traced.app.serialize(tasks.add, 1)
    assert "trace" not in traced.app.authenticate(token)
    assert handle(traced.app, token).status == 200
    assert links(traced.spans[0]) == []


def test_without_an_sdk_nothing_is_written_into_tokens():
    app = make_app(tracing=Tracing())
    task = app.defer(tasks.add, 1)
    assert "trace" not in app.authenticate(task.payload)
    assert handle(app, task.payload).status == 200
    app.close()


def test_unique_tasks_of_two_traces_are_the_same(make):
    traced = make()
    one, two = (traced.app.options(unique=True).defer(tasks.add, 1) for _ in range(2))
    assert one.id == two.id
    assert [span.attributes[messaging.MESSAGING_MESSAGE_ID] for span in traced.spans] == [one.id, one.id]


def test_a_wrong_setting_is_refused():
    with pytest.raises(ConfigurationError, match='"link" or "parent"'):
        Tracing(trace="child")
    for wrong in ("parent", Tracing):
        with pytest.raises(ConfigurationError, match=r"Tracing\(\), or None"):
            make_app(tracing=wrong)


def test_a_missing_library_is_said_with_what_to_install():
    code = "import sys; sys.modules['opentelemetry'] = None\nimport safedefer.observe.tracing"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'safedefer[otel]'" in run.stderr
