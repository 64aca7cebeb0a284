"""Delivery without a framework: requests from anywhere, records, redaction, batches."""

import asyncio
import secrets
import threading
import time
from contextlib import contextmanager
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safedefer.concurrency import batches as batches_module
from safedefer.concurrency.batches import Batches
from safedefer.concurrency.threads import Threads
from safedefer.delivery import ledger_client
from safedefer.delivery.handler import OUTCOME_HEADER, redacted_traceback
from safedefer.errors import QueueUnavailable
from safedefer.events import LogObserver, RequestRefused, TaskEnqueued, TaskHandled, TaskStarted
from safedefer.ledger import Admission, AttemptRecord, EndState, Execution
from safedefer.queues import open_queue
from tests import sample_tasks as tasks
from tests.queues.single import begin
from tests.unit.apps import JOSE, handle, make_app, until


@pytest.fixture
def app():
    tasks.reset()
    app = make_app()
    yield app
    tasks.GATE.set()
    app.close()


def outcome(response):
    return response.status, response.headers["Safedefer-Outcome"]


def test_a_request_from_any_framework_is_handled(app):
    task = app.defer(tasks.add, 1)
    response = handle(app, task.payload)
    assert response == (200, {"Safedefer-Outcome": "succeeded"}, b"succeeded\n")
    status, headers, body = handle(app, task.payload, {"content-TYPE": "application/jose"})
    assert (status, headers, body) == (415, {"Safedefer-Outcome": "refused"}, b"refused\n")


def test_the_type_of_a_tasks_exception_is_in_the_event_and_the_log_and_its_text_in_neither(caplog):
    told, log = [], LogObserver()

    def observe(event):
        told.append(event)
        log(event)

    app = make_app(observer=observe)
    assert outcome(handle(app, app.defer(tasks.loud, "order of Ann").payload)) == (500, "retry")
    assert outcome(handle(app, app.defer(tasks.add, 1).payload)) == (200, "succeeded")
    failed, done = [event for event in told if isinstance(event, TaskHandled)]
    assert (failed.error_type, type(failed.error)) == ("builtins.ValueError", ValueError)
    assert (done.error_type, done.error) == (None, None)
    assert "(exception): builtins.ValueError" in caplog.text
    assert "Ann" not in caplog.text + repr(failed)
    app.close()


def test_an_observer_hears_that_an_attempt_begins_before_its_code_runs_and_of_no_other_request():
    told = []
    app = make_app(observer=told.append)
    task = app.options(queue="mail").defer(tasks.add, 1)
    for _ in range(2):
        handle(app, task.payload, {**JOSE, "X-AppEngine-TaskRetryCount": "2"})
    handle(app, b"no task")
    enqueued, started, *_ = told
    assert [type(each) for each in told] == [TaskEnqueued, TaskStarted, TaskHandled, TaskHandled, RequestRefused]
    assert told[3].outcome == "duplicate"
    assert started == TaskStarted(
        task_id=enqueued.task_id, queue="mail", callable="tests.sample_tasks:add", kid="k1", attempt=3
    )
    app.close()


@pytest.mark.parametrize(
    ("failures", "lease", "expected", "most"), [(2, 60.0, (200, "succeeded"), 3), (1000, 1.0, (503, "busy"), 5)]
)
def test_a_run_whose_end_cannot_be_written_down_is_tried_again_while_nobody_else_may_run_it(
    failures, lease, expected, most
):
    tasks.reset()
    app = make_app(lease_seconds=lease)
    token = app.defer(tasks.add, 1).payload
    finish_many, calls = app.queue.ledger.finish_many, []

    def full(ends):
        calls.append(len(ends))
        if len(calls) <= failures:
            raise QueueUnavailable("the disk is full; free some space")
        return finish_many(ends)

    app.queue.ledger.finish_many = full
    assert outcome(handle(app, token)) == expected
    assert len(tasks.RAN) == 1
    assert 2 <= len(calls) <= most
    app.close()


def test_a_run_is_kept_alive_until_its_end_is_written_down(monkeypatch):
    app = make_app(lease_seconds=3.0)
    finish, extended = app.queue.ledger.finish_many, []

    def fail(ends):
        if not extended:
            raise QueueUnavailable("the disk is full")
        return finish(ends)

    monkeypatch.setattr(app.queue.ledger, "finish_many", fail)
    monkeypatch.setattr(app.queue.ledger, "extend_many", lambda executions, **more: extended.extend(executions))
    token = app.serialize(tasks.add, 1)
    assert outcome(asyncio.run(app.handle({"Content-Type": "application/jose"}, token))) == (200, "succeeded")
    assert extended, "within a lease its end was not written down, nor was it prolonged"
    app.close()


def test_headers_are_found_in_any_case_and_repeated_ones_agree_with_nothing(app):
    task = app.options(queue="mail").defer(tasks.add, 1)
    for headers in (
        {"X-APPENGINE-QUEUENAME": "default"},
        {"X-AppEngine-QueueName": "mail", "x-appengine-queuename": "mail"},
    ):
        assert outcome(handle(app, task.payload, headers)) == (403, "refused")
    assert outcome(handle(app, task.payload, {"X-APPENGINE-QUEUENAME": "mail"})) == (200, "succeeded")


@pytest.mark.parametrize(
    ("text", "count"), [("3", 3), ("-1", 0), ("x", 0), ("9" * 30, 0), ("٣", 0), ("", 0), ("1, 2", 0)]
)
def test_the_number_of_retries_is_a_hint_that_cannot_hurt(app, text, count):
    handle(app, app.serialize(tasks.keep_context), {"X-AppEngine-TaskRetryCount": text})
    assert tasks.CONTEXTS[0].retry_count == count


def test_the_path_must_be_the_one_that_was_signed(app):
    token = app.serialize(tasks.add, 1)
    for path in ("/", "/_ah/queue/default", "/_ah/queue/deferred/", "/_ah//queue/deferred", ""):
        assert outcome(handle(app, token, path=path)) == (403, "refused")
    assert outcome(handle(app, token, path="/_ah/queue/deferred")) == (200, "succeeded")


def test_without_a_path_only_urls_of_this_application_will_do(app):
    assert outcome(handle(app, app.options(url="/elsewhere").defer(tasks.add, 1).payload)) == (403, "refused")
    assert outcome(handle(app, app.options(url=None, queue="mail").defer(tasks.add, 1).payload)) == (200, "succeeded")


@given(st.binary(max_size=300))
def test_no_bytes_make_the_handler_raise(data):
    assert outcome(handle(SHARED, data)) == (403, "refused")


SHARED = make_app()


def test_a_failure_of_our_own_is_answered_and_not_quoted(app, caplog):
    app.delivery._verifier = None
    response = handle(app, app.serialize(tasks.add, 1))
    assert outcome(response) == (500, "retry")
    assert "AttributeError" in caplog.text
    assert "verify" not in caplog.text


async def test_the_record_is_stored_before_the_answer_even_if_nobody_waits(app):
    task = app.defer(tasks.wait_for_gate)
    waiting = asyncio.create_task(app.handle(JOSE, task.payload))
    await asyncio.to_thread(tasks.STARTED.wait, 30)
    tasks.GATE.set()
    assert (await waiting).status == 200
    assert [record.outcome for record in app.queue.find(task.id).records] == ["succeeded"]


@pytest.mark.parametrize(("failures", "lease", "stored"), [(2, 60.0, ["succeeded"]), (1000, 1.0, [])])
async def test_an_end_that_could_not_be_written_is_written_later_even_if_nobody_waits(
    failures, lease, stored, monkeypatch
):
    monkeypatch.setattr(ledger_client, "_STORE_AGAIN", 0.01)
    tasks.reset()
    app = make_app(lease_seconds=lease)
    task = app.defer(tasks.add_later, 1)
    finish_many, failing, go = app.queue.ledger.finish_many, threading.Event(), threading.Event()
    left = [failures]

    def full(ends):
        failing.set()
        go.wait(30)
        if left[0]:
            left[0] -= 1
            raise QueueUnavailable("the disk is full; free some space")
        return finish_many(ends)

    app.queue.ledger.finish_many = full
    waiting = asyncio.create_task(app.handle(JOSE, task.payload))
    await asyncio.to_thread(failing.wait, 30)
    waiting.cancel()
    await asyncio.wait({waiting})
    go.set()
    # The second try is a late one: by then there was something in it.
    await until(lambda: failures - left[0] > 1 and not app.delivery._ledger_client._late)
    assert [record.outcome for record in app.queue.find(task.id).records] == stored
    assert len(tasks.RAN) == 1
    app.close()


async def test_a_cancelled_thread_keeps_the_task_to_itself(app):
    task = app.defer(tasks.wait_for_gate)
    waiting = asyncio.create_task(app.handle(JOSE, task.payload))
    await asyncio.to_thread(tasks.STARTED.wait, 30)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert outcome(await app.handle(JOSE, task.payload)) == (409, "running")
    assert app.delivery.running == 1
    assert await app.delivery.drained(0.01) is False


def test_one_app_works_in_one_loop_after_another(app):
    for number in range(3):
        assert outcome(handle(app, app.defer(tasks.add, number).payload)) == (200, "succeeded")


# --- Redaction ------------------------------------------------------------------------------------


def raised(error):
    try:
        raise error
    except BaseException as caught:
        return redacted_traceback(caught)


def test_tokens_are_blanked_wherever_they_stand(app):
    token = app.serialize(tasks.add, 1).decode()
    for text in (token, f"bad:{token}", repr(f"\n{token}"), f"x{token}y", f"{token},{token}", f"a.b.{token}"):
        said = raised(ValueError(text))
        assert token not in said
        assert token[token.rindex(".") :] not in said
        assert "[token]" in said
    assert "1.2.3 and a.b.c.d.e.f.g.h.i.j" in raised(ValueError("1.2.3 and a.b.c.d.e.f.g.h.i.j"))


def test_control_characters_are_replaced():
    said = raised(ValueError("a\x1b[31m\r\0\x7f\x9b\ud800\u202eb"))
    assert not set(said) & set("\x1b\r\0\x7f\x9b\ud800")
    said.encode()


def test_a_huge_text_is_cut_and_takes_no_time():
    started = time.process_time()
    said = raised(ValueError("eyJ" * 500_000 + "."))
    assert len(said) < 17_000
    assert said.startswith("[...]")
    assert time.process_time() - started < 60


def test_an_exception_that_cannot_be_shown_has_its_type():
    assert "Unusual" in raised(tasks.Unusual())

    class Hostile(Exception):
        @property
        def __notes__(self):
            raise RuntimeError("no notes")

    assert "Hostile" in raised(Hostile())


@given(st.text(max_size=200))
def test_whatever_the_text_a_traceback_can_be_stored(text):
    raised(ValueError(text)).encode()


# --- Batches and the ledger -----------------------------------------------------------------------


@contextmanager
def threads(most):
    found = Threads(most, "test")
    yield found
    found.close(wait=True)


def threaded(in_thread, call):
    return lambda items, _gone: in_thread(partial(call, items))


async def test_what_comes_while_a_call_is_under_way_is_called_together():
    calls = []

    def call(items):
        calls.append(len(items))
        time.sleep(0.01)
        return [item * 2 for item in items]

    with threads(2) as in_thread:
        batches = Batches(threaded(in_thread, call))
        assert await asyncio.gather(*(batches(n) for n in range(600))) == [n * 2 for n in range(600)]
        assert calls == [256, 256, 88]


async def test_what_nothing_waits_for_is_gathered_for_a_while_and_no_longer(monkeypatch):
    calls = []

    def call(items):
        calls.append(list(items))
        return items

    with threads(1) as in_thread:
        batches = Batches(threaded(in_thread, call))
        monkeypatch.setattr(batches_module, "_PATIENCE", 1.0)
        await batches(0, patient=True)  # alone: at once
        later = []
        for number in (1, 2):
            later.append(batches(number, patient=True))
            await asyncio.sleep(0.01)
        assert calls == [[0]]
        await asyncio.gather(*later)
        monkeypatch.setattr(batches_module, "_PATIENCE", 3600.0)
        waits = batches(3, patient=True)
        await asyncio.sleep(0.01)
        await asyncio.gather(batches(4), waits)  # one that is waited for takes the others along
        many = [batches(number, patient=True) for number in range(31)]
        await asyncio.sleep(0.01)
        await asyncio.gather(*many, batches(31, patient=True))  # enough
        assert calls[1:] == [[1, 2], [3, 4], list(range(32))]


async def test_a_full_batch_is_not_put_off_by_what_comes_before_it_in_each_turn(monkeypatch):
    monkeypatch.setattr(batches_module, "_PATIENCE", 3600.0)
    calls, loop = [], asyncio.get_running_loop()

    def call(items, _gone):
        calls.append(len(items))
        done = loop.create_future()
        done.set_result(items)
        return done

    batches = Batches(call)
    await batches(0, patient=True)
    waiting, over = [], loop.create_future()

    def each_turn(number):
        loop.call_soon(each_turn, number + 1) if number < 300 else over.set_result(None)
        waiting.append(batches(number, patient=True))

    each_turn(1)
    await over
    assert sum(calls) > 250
    waiting.append(batches(-1))
    await asyncio.gather(*waiting)


async def test_batches_whose_threads_are_gone_say_so():
    with threads(1) as in_thread:
        batches = Batches(threaded(in_thread, lambda items: items))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="let go"):
            await batches(1)


async def test_a_failed_call_fails_for_its_own_callers_alone():
    def call(items):
        if "bad" in items:
            raise QueueUnavailable("locked")
        return items

    with threads(1) as in_thread:
        batches = Batches(threaded(in_thread, call))
        with pytest.raises(QueueUnavailable):
            await batches("bad")
        assert await batches("good") == "good"
        waiting = asyncio.ensure_future(batches("late"))
        await asyncio.sleep(0)
        waiting.cancel()
        assert await batches("next") == "next"


def test_batches_outlive_the_loop_that_was_left_in_the_middle():
    with threads(1) as in_thread:
        batches = Batches(threaded(in_thread, lambda items: [time.sleep(0.05), *items][1:]))

        async def leave():
            task = asyncio.ensure_future(batches(1))
            await asyncio.sleep(0.01)
            task.cancel()

        async def use():
            return await asyncio.wait_for(batches(2), 60)

        asyncio.run(leave())
        assert asyncio.run(use()) == 2


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_many_runs_begin_and_end_as_one_would(kind, tmp_path):
    queue = open_queue("memory://" if kind == "memory" else f"sqlite:///{tmp_path}/q.db")
    runs = [
        Execution(audience="a", task_id=f"{n:032x}", digest=bytes(32), owner=f"o{n}", expires=10**9)
        for n in (1, 2, 2, 3)
    ]
    assert queue.ledger.begin_many(runs, now=1.0, lease=60.0) == [
        Admission.RUN, Admission.RUN, Admission.RUN, Admission.RUN,
    ]  # fmt: skip
    ends = [
        (run, state, AttemptRecord(task_id=run.task_id, audience="a", started=1.0, ended=2.0, outcome="x", status=200))
        for run, state in zip(
            runs, [EndState.SUCCEEDED, EndState.RETRY, EndState.SUCCEEDED, EndState.FAILED], strict=True
        )
    ]
    stranger = Execution(audience="a", task_id="f" * 32, digest=bytes(32), owner=secrets.token_hex(4), expires=10**9)
    assert list(queue.ledger.finish_many([*ends, (stranger, EndState.SUCCEEDED, ends[0][2])])) == [
        True, True, True, True, False,
    ]  # fmt: skip
    assert begin(queue.ledger, runs[0], now=3.0, lease=60.0) is Admission.DUPLICATE
    assert begin(queue.ledger, runs[1], now=3.0, lease=60.0) is Admission.DUPLICATE
    queue.close()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_what_has_run_is_written_down_although_its_loop_is_taken_down(kind, tmp_path):
    app = make_app(queue="memory://" if kind == "memory" else f"sqlite:///{tmp_path}/q.db")
    sent = [app.defer(tasks.add, 1, number) for number in range(2)]
    assert handle(app, sent[0].payload).headers[OUTCOME_HEADER] == "succeeded"

    async def leave():
        running = asyncio.create_task(app.handle(JOSE, sent[1].payload))
        end = app.delivery._ledger_client.end
        before = end._gathered.here().running
        while end._gathered.here().running is before and not end._gathered.here().pending:  # noqa: ASYNC110
            await asyncio.sleep(0)
        del running

    asyncio.run(leave())
    for _ in range(1500):
        outcome = handle(app, sent[1].payload).headers[OUTCOME_HEADER]
        if outcome != "running":
            break
        time.sleep(0.02)
    assert outcome == "duplicate"
    app.close()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_ends_that_gather_are_stored_although_their_loop_is_taken_down(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(batches_module, "_PATIENCE", 3600.0)
    queue = open_queue("memory://" if kind == "memory" else f"sqlite:///{tmp_path}/q.db")
    runs = [Execution("a", f"{n:032x}", bytes(32), f"o{n}", 10**9) for n in range(4)]
    queue.ledger.begin_many(runs, now=1.0, lease=3600.0)
    with threads(1) as in_thread:
        client = ledger_client.LedgerClient(
            lambda: queue.ledger, in_thread, clock=lambda: 1.0, seconds=60.0, cancel=lambda _: None
        )

        async def leave():
            ends = [
                client.finish(
                    (run, EndState.SUCCEEDED, AttemptRecord(run.task_id, "a", 1.0, 2.0, "x", 200)), patient=True
                )
                for run in runs
            ]
            await ends[0]
            gathering = [asyncio.create_task(end) for end in ends[1:]]
            await asyncio.sleep(0.01)
            del gathering

        asyncio.run(leave())
    for run in runs:
        assert begin(queue.ledger, run, now=3.0, lease=60.0) is Admission.DUPLICATE
    queue.close()


async def test_a_cancelled_call_is_an_unavailable_queue_to_those_who_were_not_cancelled():
    never = asyncio.get_running_loop().create_future()
    batches = Batches(lambda _items, _gone: never)
    waiting = batches(1)
    await asyncio.sleep(0)
    never.cancel()
    with pytest.raises(QueueUnavailable):
        await waiting
