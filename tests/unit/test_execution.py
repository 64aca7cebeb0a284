"""Execution: where callables run, what their ends mean, and what cancelling does."""

import asyncio
import contextvars
import threading

import pytest

from safedefer import Key, Keyring, Policy, current_task
from safedefer.codecs.typed import TypedCodec
from safedefer.execution import run as execution
from safedefer.execution.context import TaskContext
from safedefer.execution.direct import call_in_thread
from safedefer.execution.prepare import Prepared, is_async
from safedefer.execution.run import CoroutineCancelled, Result, execute
from safedefer.task import VerifiedTask
from tests import sample_tasks as tasks
from tests.unit.apps import make_app

CODECS = {"typed": TypedCodec()}
KEYRING = Keyring(Key("k1", bytes(range(32))))
CONTEXT = TaskContext(id="i" * 16, name=None, queue_name="default", url="/x", headers={})


@pytest.fixture
def app():
    tasks.reset()
    app = make_app(keyring=KEYRING)
    yield app
    tasks.GATE.set()
    app.close()


def verified(app, *call, **kwargs):
    task = app.verify(app.serialize(*call, **kwargs))
    assert type(task) is VerifiedTask
    return task


async def run(app, *call, validate=None, **kwargs):
    return await execute(verified(app, *call, **kwargs), CODECS, CONTEXT, validate=validate)


async def test_plain_callables_run_in_a_thread_and_coroutines_on_the_loop(app):
    assert (await run(app, tasks.thread_name)).result is Result.SUCCEEDED
    assert (await run(app, tasks.loop_thread_name)).result is Result.SUCCEEDED
    thread, loop = tasks.RAN
    assert thread != loop == threading.current_thread().name


@pytest.mark.parametrize("make", [tasks.make_unrun, tasks.make_unrun_later])
@pytest.mark.parametrize("kind", sorted(tasks.MADE))
async def test_a_generator_that_comes_back_is_a_failure(app, make, kind):
    outcome = await run(app, make, kind)
    assert (outcome.result, outcome.reason) == (Result.FAILED, "returned-generator")
    assert tasks.RAN == []


async def test_a_generator_that_is_a_coroutine_is_awaited(app):
    assert (await run(app, tasks.make_old_coroutine)).result is Result.SUCCEEDED
    assert tasks.RAN == ["old"]


class Counted:
    """Threads that count who comes."""

    def __init__(self):
        self.calls = 0

    def __call__(self, call):
        self.calls += 1
        return execution.to_thread(call)


async def threads_for(app, *call, validate=None):
    counted = Counted()
    outcome = await execute(verified(app, *call), CODECS, CONTEXT, in_thread=counted, validate=validate)
    assert outcome.result is Result.SUCCEEDED
    return counted.calls


async def test_a_coroutine_function_that_is_known_needs_no_thread_unless_its_arguments_may_block(app):
    execution._known.clear()
    assert await threads_for(app, tasks.add_later, 1) == 1
    assert await threads_for(app, tasks.add_later, 2) == 0
    assert await threads_for(app, tasks.add_later, 2, validate="annotations") == 1
    assert (
        await threads_for(app, tasks.add_later, (3,), ()) == 1
    )  # a tag: other tags name classes, whose code would run
    assert await threads_for(app, tasks.add_later, "x" * 20_000, "") == 1
    assert await threads_for(app, tasks.add, 1) == await threads_for(app, tasks.add, 1) == 1
    assert await threads_for(app, tasks.Counter(1).increment_async) == 1
    assert await threads_for(app, tasks.Counter(1).increment_async) == 1


async def test_what_is_known_is_bounded(app, monkeypatch):
    execution._known.clear()
    monkeypatch.setattr(execution, "_MOST_KNOWN", 1)
    for _ in range(2):
        await threads_for(app, tasks.add_later, 1)
        await threads_for(app, tasks.keep_context_async)
    assert len(execution._known) == 1


@pytest.mark.parametrize(("now", "result"), [(None, Result.REJECTED), ("plain", Result.SUCCEEDED)])
async def test_a_known_coroutine_function_that_is_another_thing_now_is_looked_at_in_a_thread(
    app, monkeypatch, now, result
):
    token = app.serialize(tasks.add_later, 1)
    assert await threads_for(app, tasks.add_later, 1) <= 1

    def add_later(a, b=0):
        tasks.RAN.append(threading.current_thread() is threading.main_thread())

    add_later.__module__, add_later.__qualname__ = tasks.__name__, "add_later"
    monkeypatch.setattr(tasks, "add_later", add_later if now else None)
    counted = Counted()
    outcome = await execute(app.verify(token), CODECS, CONTEXT, in_thread=counted)
    assert (outcome.result, counted.calls) == (result, 1)
    assert tasks.RAN[1:] == ([False] if now else [])


async def test_an_awaitable_that_is_returned_is_awaited(app):
    assert (await run(app, tasks.returns_awaitable, 5)).result is Result.SUCCEEDED
    assert tasks.RAN == [("awaited", 5)]


async def test_a_running_task_knows_its_context_and_nobody_else_does(app):
    await run(app, tasks.keep_context)
    await run(app, tasks.keep_context_async)
    assert tasks.CONTEXTS == [CONTEXT, CONTEXT]
    assert current_task() is None


async def test_two_tasks_at_once_have_each_their_own_context(app):
    other = TaskContext(id="o" * 16, name="other", queue_name="mail", url="/x", headers={})
    task = verified(app, tasks.keep_context_async)
    await asyncio.gather(*(execute(task, CODECS, context) for context in (CONTEXT, other)))
    assert sorted(context.id for context in tasks.CONTEXTS) == ["i" * 16, "o" * 16]


async def test_context_variables_of_the_caller_are_seen_in_the_thread(app):
    variable = contextvars.ContextVar("variable")
    variable.set(7)
    assert await call_in_thread(variable.get) == 7


@pytest.mark.parametrize("name", tasks.RAISES)
@pytest.mark.parametrize("how", [tasks.raise_, tasks.raise_async])
async def test_whatever_is_raised_is_an_outcome(app, how, name):
    outcome = await asyncio.wait_for(run(app, how, name), 60)
    assert (outcome.result, outcome.reason) == (Result.RETRY, "exception")
    assert outcome.error is not None


@pytest.mark.parametrize("kind", ["plain", "subclass"])
async def test_the_two_documented_failures_mean_the_same_in_subclasses(app, kind):
    outcome = await run(app, tasks.permanent, kind)
    assert (outcome.result, outcome.reason) == (Result.FAILED, "permanent-task-failure")
    outcome = await run(app, tasks.singular, kind)
    assert (outcome.result, outcome.reason) == (Result.RETRY, "singular-task-failure")


async def test_a_rejection_that_a_task_raises_is_an_exception_like_any_other(app):
    assert (await run(app, tasks.raise_rejection)).reason == "exception"


async def test_cancelling_the_caller_ends_a_coroutine(app):
    task = asyncio.create_task(run(app, tasks.sleep_long))
    while not tasks.RAN:  # noqa: ASYNC110  # what is waited for is a list
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert type(caught.value) is CoroutineCancelled
    assert tasks.RAN == ["begun", "over"]


async def test_cancelling_the_caller_leaves_a_thread_running(app):
    task = asyncio.create_task(run(app, tasks.wait_for_gate))
    await asyncio.to_thread(tasks.STARTED.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert type(caught.value) is not CoroutineCancelled
    assert tasks.RAN == []
    tasks.GATE.set()
    while not tasks.RAN:  # noqa: ASYNC110  # what is waited for is a list
        await asyncio.sleep(0.005)


async def test_a_task_may_cancel_itself_and_use_timeouts(app):
    assert (await run(app, tasks.times_out)).reason == "exception"
    task = asyncio.current_task()
    assert task.cancelling() == 0


# --- validate="annotations" -----------------------------------------------------------------------

VALID = [
    ((1, ["a"]), {}),
    ((1, ["a"], 2, 3), {"flag": True}),
    ((1,), {"names": []}),
]
INVALID = [
    (("1", ["a"]), {}, "count"),
    ((1, ("a",)), {}, "names"),
    ((1, [1]), {}, "names"),
    ((1, [], "2"), {}, "more"),
    ((1, []), {"flag": 1}, "options"),
    ((True, []), {}, "count"),
]


@pytest.mark.parametrize(("args", "kwargs"), VALID)
async def test_arguments_of_the_annotated_types_pass(app, args, kwargs):
    assert (await run(app, tasks.typed, *args, validate="annotations", **kwargs)).result is Result.SUCCEEDED


@pytest.mark.parametrize(("args", "kwargs", "name"), INVALID)
async def test_arguments_of_other_types_failed_unrun(app, args, kwargs, name):
    outcome = await run(app, tasks.typed, *args, validate="annotations", **kwargs)
    assert (outcome.result, outcome.reason) == (Result.FAILED, "invalid-arguments")
    assert f"the argument {name} " in str(outcome.error)
    assert tasks.RAN == []
    assert (await run(app, tasks.typed, *args, **kwargs)).result is Result.SUCCEEDED


async def test_annotations_of_what_a_wrapper_wraps_do_not_refuse_what_the_wrapper_takes(app):
    assert (await run(app, tasks.injected, 5, validate="annotations")).result is Result.SUCCEEDED


async def test_annotations_that_cannot_be_read_refuse_nothing(app):
    assert (await run(app, tasks.badly_annotated, 5, validate="annotations")).result is Result.SUCCEEDED
    assert (await run(app, len, "abc", validate="annotations")).result is Result.SUCCEEDED


def test_is_async_sees_coroutine_functions_and_async_calls():
    assert is_async(tasks.add_later)
    assert is_async(tasks.AsyncCall())
    assert is_async(tasks.Counter(1).increment_async)
    for target in (tasks.add, tasks.AsyncCall, tasks.Counter(1), tasks.Counter(1).increment, len, [].append):
        assert not is_async(target)


async def test_without_the_codec_a_task_is_rejected(app):
    outcome = await execute(verified(app, tasks.add, 1), {}, CONTEXT)
    assert (outcome.result, outcome.reason) == (Result.REJECTED, "unresolvable-callable")


async def test_a_policy_that_changed_since_rejects(app):
    sender = make_app(keyring=KEYRING, policy=Policy("tests.sample_tasks", "operator:sub"))
    import operator

    token = sender.serialize(operator.sub, 2, 1)
    assert (await app.handle({"Content-Type": "application/jose"}, token)).status == 500


def test_what_is_prepared_shows_none_of_its_arguments():
    shown = repr(Prepared(len, ["4111-card"], {"password": "secret"}))
    assert shown == "<Prepared with 1 and 1 named arguments>"


ORIGINAL = {"__module__": "google.appengine.ext.deferred.deferred"}
TheirError = type("Error", (Exception,), dict(ORIGINAL))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("PermanentTaskFailure", (Result.FAILED, "permanent-task-failure")),
        ("SingularTaskFailure", (Result.RETRY, "singular-task-failure")),
        ("AnotherFailure", (Result.RETRY, "exception")),
    ],
)
async def test_errors_of_the_original_that_code_not_ported_yet_raises_count_as_ours(app, monkeypatch, name, expected):
    theirs = type(name, (TheirError,), dict(ORIGINAL))
    for raised in (theirs, type("Own", (theirs,), {})):

        def fail():
            raise raised("never")

        monkeypatch.setattr(Prepared, "__call__", lambda _: fail())
        outcome = await run(app, tasks.thread_name)
        assert (outcome.result, outcome.reason) == expected
