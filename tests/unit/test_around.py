"""``App(around=[...])``: context managers around every run."""

import asyncio
import contextlib
import contextvars
import threading

import pytest

from safedefer import PermanentTaskFailure
from safedefer.delivery import ledger_client
from safedefer.errors import ConfigurationError
from safedefer.queues.config import QueueFile
from tests import sample_tasks
from tests.unit.apps import JOSE, make_app, until

SEEN = []
CONTEXT = contextvars.ContextVar("context", default="nothing")
HERE = __name__


def note(*fields):
    SEEN.append((*fields, threading.get_ident()))


def plain(end="return"):
    note("call", CONTEXT.get())
    return finish(end)


async def later(end="return"):
    note("call", CONTEXT.get())
    await asyncio.sleep(0)
    note("awaited", CONTEXT.get())
    return finish(end)


def returns_awaitable(end="return"):
    return later(end)


class Called:
    async def __call__(self, end="return"):
        return await later(end)


def finish(end):
    if end == "raise":
        raise ValueError("raised")
    if end == "never":
        raise PermanentTaskFailure("never")
    return "result"


async def sleep_long():
    note("call", CONTEXT.get())
    await asyncio.sleep(30)


@contextlib.contextmanager
def sync_manager():
    note("enter sync")
    token = CONTEXT.set("sync")
    try:
        yield
    except BaseException as error:
        note(type(error).__name__)
        raise
    finally:
        CONTEXT.reset(token)
        note("exit sync")


@contextlib.asynccontextmanager
async def async_manager():
    note("enter async")
    token = CONTEXT.set("async")
    try:
        yield
    except BaseException as error:
        note(type(error).__name__)
        raise
    finally:
        CONTEXT.reset(token)
        note("exit async")


class Fails:
    """Fails where it is told to."""

    def __init__(self, where):
        self.where = where

    def __call__(self):
        if self.where == "make":
            raise RuntimeError("make")
        return self

    def __enter__(self):
        if self.where == "enter":
            raise RuntimeError("enter")

    def __exit__(self, *error):
        if self.where == "exit":
            raise RuntimeError("exit")
        return self.where == "suppress"


class OnlyLater:
    """The same, awaited."""

    def __init__(self, where):
        self.inner = Fails(where)

    def __call__(self):
        self.inner()
        return self

    async def __aenter__(self):
        return self.inner.__enter__()

    async def __aexit__(self, *error):
        return self.inner.__exit__(*error)


TARGETS = {"def": plain, "async def": later, "an awaitable": returns_awaitable, "async __call__": Called()}


@pytest.fixture
def make():
    SEEN.clear()
    made = []

    def make(*around, **changes):
        made.append(make_app(policy=changes.pop("policy", None) or sample_policy(), around=around, **changes))
        return made[-1]

    yield make
    for app in made:
        app.close()


def sample_policy():
    from safedefer import Policy

    return Policy(HERE, sample_tasks.__name__)


async def answer(app, call, *args):
    status, headers, _ = await app.handle(JOSE, app.serialize(call, *args))
    return status, headers["Safedefer-Outcome"]


def words():
    return [line[0] for line in SEEN]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("around", [(sync_manager,), (async_manager,), (sync_manager, async_manager)])
async def test_each_run_is_within_and_sees_what_was_set(make, name, around):
    app = make(*around)
    for _ in range(3):  # the third call of a coroutine function needs no thread
        SEEN.clear()
        assert await answer(app, TARGETS[name]) == (200, "succeeded")
        calls = [line for line in SEEN if line[0] == "call"]
        assert len(calls) == 1
        assert calls[0][1] == ("sync" if sync_manager in around else "async")
        assert words()[0] == ("enter async" if async_manager in around else "enter sync")
        assert words()[-1] == ("exit async" if async_manager in around else "exit sync")
        enters, exits = (sum(word.startswith(start) for word in words()) for start in ("enter", "exit"))
        assert enters == exits >= len(around)


async def test_a_sync_one_is_entered_in_the_thread_of_the_run_and_an_async_one_on_the_loop(make):
    app = make(sync_manager, async_manager)
    assert await answer(app, plain) == (200, "succeeded")
    threads = {line[0]: line[-1] for line in SEEN}
    assert threads["call"] == threads["enter sync"] == threads["exit sync"] != threading.get_ident()
    assert threads["enter async"] == threads["exit async"] == threading.get_ident()
    SEEN.clear()
    assert await answer(app, later) == (200, "succeeded")
    assert {line[-1] for line in SEEN} == {threading.get_ident()}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("manager", [sync_manager, async_manager])
@pytest.mark.parametrize(("end", "expected"), [("raise", (500, "retry")), ("never", (200, "failed"))])
async def test_an_error_is_seen_and_stays_what_it_is(make, name, manager, end, expected):
    app = make(manager)
    assert await answer(app, TARGETS[name], end) == expected
    assert ("ValueError" if end == "raise" else "PermanentTaskFailure") in words()
    assert words()[-1].startswith("exit")


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", [Fails, OnlyLater])
@pytest.mark.parametrize("where", ["make", "enter", "exit"])
async def test_one_that_fails_is_the_attempts_failure(make, name, kind, where):
    app = make(kind(where))
    assert await answer(app, TARGETS[name]) == (500, "retry")
    # What a plain callable returned is not awaited once its own context could not be left.
    assert ("call" in words()) == (where == "exit" and (name, kind) != ("an awaitable", Fails))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", [Fails, OnlyLater])
async def test_one_may_suppress_an_error_but_no_rejection(make, name, kind):
    app = make(kind("suppress"))
    assert await answer(app, TARGETS[name], "raise") == (200, "succeeded")
    token = app.serialize(plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(f"{HERE}.plain")
        status, headers, _ = await app.handle(JOSE, token)
    assert (status, headers["Safedefer-Outcome"]) == (500, "rejected")


@pytest.mark.parametrize("manager", [sync_manager, async_manager])
async def test_a_coroutine_that_passes_its_deadline_leaves(make, manager):
    file = QueueFile.parse("queue:\n- name: default\n  rate: 100/s\n  attempt_deadline: 0.3\n")
    app = make(manager, queue_yaml=file)
    assert await answer(app, sleep_long) == (500, "retry")
    assert words()[-2:] == ["CancelledError", f"exit {manager.__name__.partition('_')[0]}"]


@pytest.mark.parametrize("manager", [sync_manager, async_manager])
async def test_a_coroutine_that_is_cancelled_leaves(make, manager, monkeypatch):
    monkeypatch.setattr(ledger_client, "_LOOK_SECONDS", 0.1)
    app = make(manager)
    task = app.defer(sleep_long)
    running = asyncio.create_task(app.handle(JOSE, task.payload))
    await until(lambda: "call" in words())
    assert app.cancel(task.id)
    status, headers, _ = await running
    assert (status, headers["Safedefer-Outcome"]) == (200, "cancelled")
    assert words()[-1].startswith("exit")


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("around", [(sync_manager,), (async_manager,), (sync_manager, async_manager)])
def test_run_and_run_async_are_within_too(make, name, around):
    app = make(*around)
    token = app.serialize(TARGETS[name])
    for run in (app.run, lambda token: asyncio.run(app.run_async(token))):
        SEEN.clear()
        assert run(token) == "result"
        assert next(line[1] for line in SEEN if line[0] == "call") == ("sync" if sync_manager in around else "async")
        assert words()[-1].startswith("exit")


def test_a_context_manager_in_place_of_what_makes_one_is_refused(make):
    with pytest.raises(ConfigurationError, match=r"client\.context, not client\.context\(\)"):
        make(contextlib.nullcontext())
