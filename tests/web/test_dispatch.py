"""The dispatcher against real handlers: in process and by HTTP, with the real SQLite queue."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from aiohttp import web

from safedefer import Key, Keyring, KeyState, Policy, TaskRetryOptions
from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions, HttpDelivery, InProcessDelivery
from safedefer.queues.base import TaskState
from safedefer.web.server import serving
from tests import sample_tasks as tasks
from tests.ports import ReservedPort
from tests.unit.apps import JOSE, SECRET, make_app, until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
async def app(tmp_path):
    tasks.reset()
    app = make_app(keyring=Keyring(Key("k1", SECRET, KeyState.ACTIVE)), queue=f"sqlite:///{tmp_path}/q.db")
    yield app
    tasks.GATE.set()
    await asyncio.to_thread(app.close)


@pytest.fixture(params=["in process", "http"])
async def deliver(request, app):
    if request.param == "in process":
        yield InProcessDelivery(app.handle)
    else:
        async with serving(app, "127.0.0.1", 0) as url, HttpDelivery(url) as http:
            yield http


def dispatcher_of(app, deliver, **options):
    return Dispatcher(app.queue, deliver, clock=time.time, options=DispatcherOptions(**options))


async def run_due(app, deliver, **options):
    await dispatcher_of(app, deliver, **options).run_until_empty()


def state_of(app, task):
    return app.queue.find(task.id).state


class Raw:
    """A server that says what it is told, and counts who comes."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.address = "http://127.0.0.1:%d" % self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error):
        self.server.close()

    async def serve(self, reader, writer):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            self.requests.append((head, await reader.readexactly(length)))
            answer = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
            if answer is None:
                writer.transport.abort()
            else:
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def http(status, **headers):
    lines = [f"HTTP/1.1 {status} x", "Content-Length: 0", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


# --- From end to end ------------------------------------------------------------------------------


async def test_every_task_runs_once(app, deliver):
    made = app.defer_many([((tasks.add, tasks.add_later)[n % 2], (n,), {}) for n in range(100)])
    await run_due(app, deliver)
    assert sorted(value[1] for value in tasks.RAN) == list(range(100))
    assert {state_of(app, task) for task in made} == {TaskState.SUCCEEDED}


async def test_a_failing_task_is_tried_until_its_limit_and_then_is_a_dead_letter(app, deliver):
    quick = TaskRetryOptions(task_retry_limit=3, min_backoff_seconds=0, max_backoff_seconds=0)
    task = app.options(retry_options=quick).defer(tasks.fail)
    await run_due(app, deliver)
    view = app.queue.find(task.id)
    assert (view.state, view.reason, view.attempts) == (TaskState.DEAD, "retry-limit", 4)
    assert [record.reason for record in view.records] == ["exception"] * 4
    assert tasks.RAN == ["fail"] * 4


async def test_a_task_that_fails_once_succeeds(app, deliver):
    task = app.options(retry_options=TaskRetryOptions(min_backoff_seconds=0)).defer(tasks.fail_once)
    await run_due(app, deliver)
    assert (state_of(app, task), len(app.queue.find(task.id).records)) == (TaskState.SUCCEEDED, 2)


async def test_a_permanent_failure_is_a_dead_letter_at_once(app, deliver):
    task = app.defer(tasks.permanent)
    await run_due(app, deliver)
    view = app.queue.find(task.id)
    assert (view.state, view.reason, len(view.records)) == (TaskState.DEAD, "permanent-task-failure", 1)
    again = app.retry(task.id)
    await run_due(app, deliver)
    assert state_of(app, again) is TaskState.DEAD


async def test_a_large_task_travels_as_a_pointer(app, deliver):
    task = app.defer(tasks.keywords, text="x" * 100_000)
    await run_due(app, deliver)
    assert state_of(app, task) is TaskState.SUCCEEDED
    assert tasks.RAN == [{"text": "x" * 100_000}]


async def test_the_task_knows_of_itself(app, deliver):
    retry = TaskRetryOptions(min_backoff_seconds=0)
    task = app.options(name="n", queue="mail", url=None, headers={"X-Shop": "1"}, retry_options=retry).defer(
        tasks.keep_context
    )
    await run_due(app, deliver)
    (context,) = tasks.CONTEXTS
    assert (context.id, context.name, context.queue_name, context.url) == (task.id, "n", "mail", "/_ah/queue/mail")
    assert (context.headers, context.retry_count) == ({"X-Shop": "1"}, 0)


async def test_a_token_that_the_storage_altered_runs_nothing(app, deliver):
    import apsw

    task = app.defer(tasks.add, 1)
    connection = apsw.Connection(app.queue.path)
    connection.execute("UPDATE safedefer_tasks SET token = CAST(token || 'x' AS BLOB)")
    connection.close()
    await run_due(app, deliver)
    view = app.queue.find(task.id)
    assert (view.state, view.attempts, view.records[-1].reason) == (TaskState.WAITING, 0, "refused")
    assert tasks.RAN == []


@pytest.mark.parametrize("headers", ['{"X": "a\\r\\nEvil: 1"}', '{"Host": "evil"}', "[1]", "no json", '"x"'])
async def test_a_row_that_somebody_wrote_does_not_keep_the_others(app, deliver, headers):
    import apsw

    odd, good = app.defer(tasks.add, 1), app.defer(tasks.add, 2)
    connection = apsw.Connection(app.queue.path)
    connection.execute("UPDATE safedefer_tasks SET headers = ? WHERE id = ?", (headers, odd.id))
    connection.close()
    dispatcher = dispatcher_of(app, deliver)
    running = asyncio.create_task(dispatcher.run())
    await until(lambda: state_of(app, good) is TaskState.SUCCEEDED and state_of(app, odd) is not TaskState.RUNNING)
    dispatcher.stop()
    await asyncio.wait_for(running, 60)
    assert ("add", 2, 0, 1) in tasks.RAN
    # What is no mapping at all is no hint: the token says all that is needed.
    runs = not headers.startswith("{")
    assert (state_of(app, odd) is TaskState.SUCCEEDED) is runs


# --- HTTP alone -----------------------------------------------------------------------------------


async def test_the_request_is_what_app_engine_sent(app):
    task = app.options(name="n", headers={"X-Shop": "1"}).defer(tasks.add, 1)
    async with Raw(http(200, Safedefer_Outcome="succeeded")) as raw, HttpDelivery(raw.address) as deliver:
        await run_due(app, deliver)
    ((head, body),) = raw.requests
    assert head.startswith(b"POST /_ah/queue/deferred HTTP/1.1\r\n")
    for line in (b"Content-Type: application/jose", b"X-Shop: 1", b"X-AppEngine-QueueName: default",
                 b"X-AppEngine-TaskName: n", b"X-AppEngine-TaskRetryCount: 0", b"X-AppEngine-TaskExecutionCount: 0"):  # fmt: skip
        assert line + b"\r\n" in head
    assert b"Accept-Encoding" not in head
    assert body == task.payload
    assert state_of(app, task) is TaskState.SUCCEEDED


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_no_redirect_is_followed(app, status):
    task = app.defer(tasks.add, 1)
    async with Raw(http(200, Safedefer_Outcome="succeeded")) as elsewhere:
        async with Raw(http(status, Location=elsewhere.address)) as raw, HttpDelivery(raw.address) as deliver:
            await run_due(app, deliver)
    assert elsewhere.requests == []
    view = app.queue.find(task.id)
    assert (view.state, view.attempts, len(raw.requests)) == (TaskState.WAITING, 1, 1)


async def test_a_200_without_an_outcome_is_done_as_on_app_engine_and_is_warned_of(app, caplog):
    task = app.defer(tasks.add, 1)
    async with Raw(http(200)) as raw, HttpDelivery(raw.address) as deliver:
        await run_due(app, deliver)
    assert app.queue.find(task.id).state is TaskState.SUCCEEDED
    assert "correct the address" in caplog.text


async def test_a_connection_lost_after_sending_is_not_charged_where_nothing_ran(app):
    task = app.defer(tasks.add, 1)
    async with Raw(None) as raw, HttpDelivery(raw.address) as deliver:
        await run_due(app, deliver)
    view = app.queue.find(task.id)
    assert (view.state, view.attempts, [r.reason for r in view.records]) == (TaskState.WAITING, 0, ["no-response"])
    assert len(raw.requests) == 1


async def test_an_answer_that_is_no_http_is_not_charged_where_nothing_ran(app):
    task = app.defer(tasks.add, 1)
    async with Raw(b"220 smtp.example ESMTP\r\n") as raw, HttpDelivery(raw.address) as deliver:
        await run_due(app, deliver)
    view = app.queue.find(task.id)
    assert (view.attempts, [r.reason for r in view.records]) == (0, ["no-response"])


async def test_a_handler_that_is_down_charges_nothing(app):
    made = app.defer_many([(tasks.add, (n,), {}) for n in range(5)])
    with ReservedPort() as nobody:
        async with HttpDelivery(nobody.url) as deliver:
            dispatcher = dispatcher_of(app, deliver)
            running = asyncio.create_task(dispatcher.run())
            await asyncio.sleep(0.4)
            dispatcher.stop()
            await running
    assert {(app.queue.find(task.id).state, app.queue.find(task.id).attempts) for task in made} == {
        (TaskState.WAITING, 0)
    }


async def test_a_handler_that_takes_too_long_is_charged_and_finds_its_task_in_the_ledger(app):
    task = app.options(retry_options=TaskRetryOptions(min_backoff_seconds=0)).defer(tasks.sleep, 0.5)
    async with serving(app, "127.0.0.1", 0) as url, HttpDelivery(url, timeout=0.2) as deliver:
        dispatcher = dispatcher_of(app, deliver)
        running = asyncio.create_task(dispatcher.run())
        await until(lambda: state_of(app, task) is TaskState.SUCCEEDED)
        dispatcher.stop()
        await running
    assert tasks.RAN == ["slept"]
    assert app.queue.find(task.id).state is TaskState.SUCCEEDED


async def test_a_target_that_is_down_stops_no_other(tmp_path):
    tasks.reset()
    with ReservedPort() as nobody:
        queue = f"sqlite:///{tmp_path}/q.db"
        app = make_app(queue=queue, targets={"big": nobody.url}, policy=Policy("tests.sample_tasks"))
        app.options(target="big").defer_many([(tasks.add, (n,), {}) for n in range(60)])
        app.defer_many([(tasks.add, (n,), {}) for n in range(60)])
        async with serving(app, "127.0.0.1", 0) as url, HttpDelivery(url, targets=app.targets) as deliver:
            await asyncio.wait_for(run_due(app, deliver), 60)
    assert len(tasks.RAN) == 60
    waiting = app.queue.tasks(limit=1000)
    assert {(view.target, view.attempts) for view in waiting} == {("big", 0)}
    assert len(waiting) == 60
    await asyncio.to_thread(app.close)


async def test_a_target_that_takes_connections_and_never_answers_stops_no_other(tmp_path):
    tasks.reset()
    connections = []

    async def hang(reader, writer):
        connections.append(writer)
        await reader.read(-1)
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    hung = "http://127.0.0.1:%d" % server.sockets[0].getsockname()[1]
    app = make_app(queue=f"sqlite:///{tmp_path}/q.db", targets={"big": hung}, policy=Policy("tests.sample_tasks"))
    app.options(target="big").defer_many([(tasks.add, (n,), {}) for n in range(60)])
    async with serving(app, "127.0.0.1", 0) as url, HttpDelivery(url, targets=app.targets, timeout=60.0) as deliver:
        dispatcher = dispatcher_of(app, deliver, drain_seconds=0.1)
        running = asyncio.create_task(dispatcher.run())
        await until(lambda: connections)
        app.defer_many([(tasks.add, (n,), {}) for n in range(20)])
        await until(lambda: len(tasks.RAN) == 20)
        assert len(connections) <= 8
        dispatcher.stop()
        await running
    assert {view.target for view in app.queue.tasks(limit=1000)} == {"big"}
    server.close()
    await asyncio.to_thread(app.close)


async def test_many_answers_with_bodies_do_not_matter(app):
    async def large(request):
        return web.Response(body=b"x" * 3_000_000, headers={"Safedefer-Outcome": "succeeded"})

    web_app = web.Application()
    web_app.router.add_post("/{rest:.*}", large)
    runner = web.AppRunner(web_app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        app.defer_many([(tasks.add, (n,), {}) for n in range(20)])
        async with HttpDelivery("http://127.0.0.1:%d" % runner.addresses[0][1]) as deliver:
            await run_due(app, deliver)
        assert app.queue.tasks() == []
    finally:
        await runner.cleanup()


# --- Long tasks, wake-up, drain -------------------------------------------------------------------


async def test_a_task_longer_than_both_leases_runs_once(tmp_path, monkeypatch):
    tasks.reset()
    moment = [time.time()]
    app = make_app(queue=f"sqlite:///{tmp_path}/q.db", lease_seconds=0.6, clock=lambda: moment[0])
    extended = {"lease": [], "run": []}
    for name, owner in (("lease", app.queue), ("run", app.queue.ledger)):

        def extend_many(many, *, now, extend_many=owner.extend_many, moments=extended[name], **more):
            result = extend_many(many, now=now, **more)
            moments.append(now)
            return result

        monkeypatch.setattr(owner, "extend_many", extend_many)
    task = app.defer(tasks.wait_for_gate, 60.0)
    deliver, options = InProcessDelivery(app.handle), DispatcherOptions(lease_seconds=0.6)
    dispatcher = Dispatcher(app.queue, deliver, clock=lambda: moment[0], options=options)
    running = asyncio.create_task(dispatcher.run())
    await until(tasks.STARTED.is_set)
    for _ in range(4):
        moment[0] += 0.4
        await until(lambda: all(moments and moments[-1] == moment[0] for moments in extended.values()))
        # Neither another dispatcher nor another handler takes it.
        assert app.queue.lease(owner="other", limit=1, seconds=60.0, now=moment[0]) == []
        assert (await app.handle(JOSE, task.payload)).headers["Safedefer-Outcome"] == "running"
    tasks.GATE.set()
    await until(lambda: state_of(app, task) is TaskState.SUCCEEDED)
    dispatcher.stop()
    await running
    assert tasks.RAN == ["waited"]
    view = app.queue.find(task.id)
    assert (view.state, view.attempts) == (TaskState.SUCCEEDED, 1)
    await asyncio.to_thread(app.close)


DEFER = """
import sys, time
from safedefer import App, Key, Keyring, KeyState
from tests import sample_tasks as tasks
from tests.unit.apps import SECRET, make_app
app = make_app(keyring=Keyring(Key("k1", SECRET, KeyState.ACTIVE)), queue=f"sqlite:///{sys.argv[1]}/q.db")
for line in sys.stdin:
    app.defer(tasks.keywords, at=time.time())
    print("deferred", flush=True)
"""


async def test_what_another_process_defers_runs_long_before_the_next_poll(app, tmp_path, monkeypatch):
    arrived = []

    class Ran(list):
        def append(self, value):
            arrived.append(time.time() - value["at"])

    monkeypatch.setattr(tasks, "RAN", Ran())
    dispatcher = dispatcher_of(app, InProcessDelivery(app.handle), poll_seconds=60.0)
    running = asyncio.create_task(dispatcher.run())
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DEFER, str(tmp_path), cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    for number in range(20):
        process.stdin.write(b"\n")
        assert await process.stdout.readline() == b"deferred\n"
        while len(arrived) <= number:  # noqa: ASYNC110  # what is waited for is a list
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.02)
    process.stdin.close()
    await process.wait()
    dispatcher.stop()
    await running
    arrived.sort()
    median, worst = arrived[10] * 1000, arrived[-1] * 1000
    print(f"from defer() in another process to the call: median {median:.0f} ms, worst {worst:.0f} ms")
    assert median < 20_000


async def test_a_cancelled_coroutine_may_run_again_at_once(app):
    task = app.defer(tasks.sleep_long)
    dispatcher = dispatcher_of(app, InProcessDelivery(app.handle), drain_seconds=0.1)
    running = asyncio.create_task(dispatcher.run())
    while tasks.RAN != ["begun"]:  # noqa: ASYNC110  # what is waited for is a list
        await asyncio.sleep(0.01)
    dispatcher.stop()
    await asyncio.wait_for(running, 120)
    assert tasks.RAN == ["begun", "over"]
    view = app.queue.find(task.id)
    assert (view.state, view.attempts, view.records[-1].reason) == (TaskState.WAITING, 0, "cancelled")
    # The ledger admits it again: it does not wait for the lease of the run that is over.
    again = asyncio.create_task(app.handle({"Content-Type": "application/jose"}, task.payload))
    while tasks.RAN != ["begun", "over", "begun"]:  # noqa: ASYNC110  # what is waited for is a list
        await asyncio.sleep(0.01)
    again.cancel()
    await asyncio.wait({again})
