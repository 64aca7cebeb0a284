"""``App``: the typed form, and what it is made of."""

import asyncio
import functools
import logging
import subprocess
import sys
import threading

import pytest

from safedefer import App, Deferral, Key, Keyring, KeyState, Options, Policy, TaskRetryOptions, configure, defer
from safedefer.claims import MAX_LIFETIME, callable_name
from safedefer.errors import (
    BadTransactionStateError,
    ConfigurationError,
    InvalidTaskError,
    InvalidUrlError,
    NotDeferrable,
    QueueUnavailable,
    RejectedTask,
    TaskAlreadyExistsError,
    TaskTooLargeError,
    TombstonedTaskError,
    UnencodableArgument,
    UnknownQueueError,
)
from safedefer.events import LogObserver, TaskEnqueued, TaskHandled
from safedefer.options import Limits
from safedefer.queues.base import TaskState
from safedefer.sending.routes import LIFETIME
from safedefer.task import VerifiedPointer, VerifiedTask
from tests import sample_tasks as tasks
from tests.queues.single import settle
from tests.unit.apps import SECRET, Recorder, handle, make_app

NOW = 1_800_000_000.5


@pytest.fixture
def app():
    tasks.reset()
    app = make_app(clock=lambda: NOW)
    yield app
    app.close()


def claims_of(app, task):
    return app.verify(task.payload, expired=True).claims


# --- What a task says ------------------------------------------------------------------------------


def test_a_task_says_what_was_asked_for(app):
    retry = TaskRetryOptions(task_retry_limit=2)
    task = app.options(
        countdown=60, headers={"X-Shop": "1"}, name="receipt-1", queue="mail", retry_options=retry, target="big"
    ).defer(tasks.add, 1)
    assert (task.name, task.queue_name, task.target, task.url) == ("receipt-1", "mail", "big", "/_ah/queue/deferred")
    assert task.headers == {"X-Shop": "1"}
    assert task.eta_posix == NOW + 60
    assert task.eta.utcoffset().total_seconds() == 0
    assert task.retry_options is retry
    assert task.was_enqueued is True
    assert task.size == len(task.payload)
    assert len(task.id) == 32


def test_the_token_says_the_same_signed(app):
    task = app.options(countdown=60, headers={"X-Shop": "1"}, name="receipt-1", queue="mail").defer(
        tasks.add, 1, scale=2
    )
    claims = claims_of(app, task)
    assert claims["jti"] == task.id
    assert claims["aud"] == "test:mail:default:/_ah/queue/deferred"
    assert (claims["iat"], claims["nbf"]) == (int(NOW), int(NOW + 60))
    assert claims["exp"] == claims["nbf"] + LIFETIME
    assert claims.get("name") == "receipt-1"
    assert claims.get("headers") == {"X-Shop": "1"}
    assert callable_name(claims["call"]) == "tests.sample_tasks:add"
    assert (claims["args"], claims["kwargs"]) == ([1], {"scale": 2})


@pytest.mark.parametrize(
    ("age", "lifetime"), [(None, LIFETIME), (60, LIFETIME), (40 * 86_400, 40 * 86_400), (2**31 - 1, MAX_LIFETIME)]
)
def test_a_token_lives_as_long_as_its_age_limit_and_no_longer_than_92_days(app, age, lifetime):
    task = app.options(retry_options=TaskRetryOptions(task_age_limit=age)).defer(tasks.add, 1)
    claims = claims_of(app, task)
    assert claims["exp"] - claims["nbf"] == lifetime


def test_ids_are_version_7_uuids_and_sort_by_time():
    moments = iter([1000.0, 1000.001, 2000.0])
    app = make_app(clock=lambda: next(moments))
    ids = [app.defer(tasks.add, number).id for number in range(3)]
    assert ids == sorted(ids)
    assert {one[12] for one in ids} == {"7"}
    assert {one[16] for one in ids} <= set("89ab")


def test_arguments_of_any_name_reach_the_callable(app):
    app.defer(tasks.keywords, self=1, obj=2, args=3, kwargs=4, _countdown=5)
    view = app.queue.tasks()[0]
    assert app.verify(view.token).claims["kwargs"] == {"self": 1, "obj": 2, "args": 3, "kwargs": 4, "_countdown": 5}


# --- What is refused at the call ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"a": 2}), ((1,), {"nothing": 2})], ids=str
)
def test_arguments_that_do_not_bind_raise_at_the_call(app, args, kwargs):
    with pytest.raises(TypeError) as caught:
        app.defer(tasks.add, *args, **kwargs)
    assert not isinstance(caught.value, NotDeferrable)
    assert app.queue.tasks() == []


def test_a_wrapper_is_bound_to_what_it_takes_itself(app):
    task = app.defer(tasks.injected, 5)
    assert handle(app, task.payload).status == 200
    assert tasks.RAN == [("connection", 5)]


def test_binding_looks_at_methods_classes_and_objects(app):
    counter = tasks.Counter(1)
    for call in [(counter.increment, 1, 2), (counter,), (tasks.Counter,), (tasks.Counter.make, 1, 2)]:
        with pytest.raises(TypeError):
            app.defer(*call)
    for call in [(counter.increment, 2), (counter, 3), (tasks.Counter, 4), (tasks.Counter.make, 5)]:
        app.defer(*call)
    assert len(app.queue.tasks()) == 4


@pytest.mark.parametrize(
    "obj",
    [lambda: None, functools.partial(tasks.add, 1), tasks.Counter.static, eval, subprocess.run, 5, None],
    ids=["lambda", "partial", "static", "eval", "outside the policy", "int", "None"],
)
def test_what_may_not_be_deferred_is_refused(app, obj):
    with pytest.raises(NotDeferrable) as caught:
        app.defer(obj)
    assert isinstance(caught.value, TypeError)
    assert caught.value.reason
    assert app.queue.tasks() == []


def test_an_argument_that_cannot_arrive_is_refused_with_its_path(app):
    with pytest.raises(UnencodableArgument) as caught:
        app.defer(tasks.add, [1, threading.Lock()])
    assert caught.value.path == "$.args[0][1]"


def test_an_unknown_queue_is_refused_if_queues_are_declared():
    app = make_app(queues=["mail"])
    app.options(queue="mail").defer(tasks.add, 1)
    app.defer(tasks.add, 1)
    with pytest.raises(UnknownQueueError, match="default, mail"):
        app.options(queue="male").defer(tasks.add, 1)


def test_an_unknown_target_is_refused_if_targets_are_declared():
    app = make_app(targets={"big": "http://127.0.0.1:1"})
    app.options(target="big").defer(tasks.add, 1)
    app.options(target="default").defer(tasks.add, 1)
    with pytest.raises(InvalidTaskError, match=r"no target bigger.*big"):
        app.options(target="bigger").defer(tasks.add, 1)


def test_a_transactional_task_needs_a_transaction(app):
    with pytest.raises(BadTransactionStateError):
        app.options(transactional=True).defer(tasks.add, 1)


def test_a_name_is_taken_while_its_task_lives_and_for_days_after(app):
    named = app.options(name="once")
    task = named.defer(tasks.add, 1)
    with pytest.raises(TaskAlreadyExistsError):
        named.defer(tasks.add, 1)
    assert app.cancel(task.id)
    with pytest.raises(TombstonedTaskError):
        named.defer(tasks.add, 1)
    app.options(name="once", queue="other").defer(tasks.add, 1)


def test_pickling_needs_the_app_and_the_key():
    with pytest.raises(NotDeferrable, match="allow_pickle=True") as caught:
        make_app().options(pickle=True).defer(tasks.add, 1)
    assert caught.value.reason == "pickle-off"
    with pytest.raises(NotDeferrable, match="key k may not sign pickled") as caught:
        app = make_app(keyring=Keyring(Key("k", SECRET, KeyState.ACTIVE)), allow_pickle=True)
        app.options(pickle=True).defer(tasks.add, 1)
    assert caught.value.reason == "pickle-key"


def test_pickled_arguments_run_where_all_agree():
    tasks.reset()
    app = make_app(allow_pickle=True)
    task = app.options(pickle=True).defer(tasks.add, 1, 2)
    assert claims_of(app, task)["cty"] == "pickle"
    assert handle(app, task.payload).status == 200
    assert tasks.RAN == [("add", 1, 2, 1)]


def test_a_closed_queue_takes_nothing(app):
    app.close()
    with pytest.raises(QueueUnavailable):
        app.defer(tasks.add, 1)


# --- Several at once ------------------------------------------------------------------------------


def test_several_calls_are_stored_together(app):
    made = app.defer_many((tasks.add, (number,), {"scale": 2}) for number in range(5))
    assert {task.id for task in made} == {view.id for view in app.queue.tasks()}
    assert len(made) == 5


def test_of_several_calls_all_are_stored_or_none(app):
    with pytest.raises(UnencodableArgument):
        app.defer_many([(tasks.add, (1,), {}), (tasks.add, (threading.Lock(),), {})])
    assert app.queue.tasks() == []
    assert app.defer_many([]) == []


def test_several_tasks_cannot_share_a_name(app):
    with pytest.raises(InvalidTaskError, match="one name"):
        app.options(name="n").defer_many([(tasks.add, (1,), {}), (tasks.add, (2,), {})])
    assert app.queue.tasks() == []
    assert app.options(name="n").defer_many([(tasks.add, (1,), {})])[0].name == "n"


# --- Oversize -------------------------------------------------------------------------------------


def test_a_large_task_is_stored_as_a_blob_and_pointed_to(app):
    task = app.options(name="large").defer(tasks.add, "x" * 20_000)
    assert task.size < 1024
    pointer = app.verify(task.payload)
    assert type(pointer) is VerifiedPointer
    followed = app.follow(pointer)
    assert type(followed) is VerifiedTask
    for name in ("jti", "aud", "nbf", "exp", "name"):
        assert pointer.claims.get(name) == followed.claims.get(name)
    assert pointer.blob["length"] > 20_000
    assert followed.claims["args"] == ["x" * 20_000]


def test_the_limit_of_inline_tokens_is_exact():
    app = make_app(inline_limit=2000)
    sizes = {}
    for length in range(1000, 1200):
        token = app.serialize(tasks.add, "x" * length)
        task = app.defer(tasks.add, "x" * length)
        sizes[len(token)] = app.verify(task.payload)
    for size, verified in sizes.items():
        assert type(verified) is (VerifiedTask if size <= 2000 else VerifiedPointer), size
    assert min(sizes) < 2000 < max(sizes)


def test_a_large_task_runs_and_its_event_names_the_callable():
    tasks.reset()
    seen = Recorder()
    app = make_app(observer=seen)
    task = app.defer(tasks.add, "x" * 20_000, "y")
    assert handle(app, task.payload).headers["Safedefer-Outcome"] == "succeeded"
    enqueued, started, handled = seen.events
    assert enqueued == TaskEnqueued(
        task_id=task.id, queue="default", callable="tests.sample_tasks:add", size=len(task.payload)
    )
    assert started.callable == handled.callable == "tests.sample_tasks:add"


def test_a_task_over_the_limit_is_refused_with_its_size(app):
    with pytest.raises(TaskTooLargeError) as caught:
        app.defer(tasks.add, "x" * 1_100_000)
    assert caught.value.size > caught.value.limit == 1_048_576
    assert app.queue.tasks() == []


def test_a_stored_token_runs_by_its_key_and_is_deleted():
    tasks.reset()
    app = make_app()
    blob = app.verify(app.defer(tasks.add, "x" * 20_000, "y").payload).blob
    assert app.run_from_datastore(blob["id"]) == "x" * 20_000 + "y"
    assert app.queue.blobs.get(blob["id"]) is None


def test_a_stored_token_that_must_be_retried_stays():
    app = make_app()
    blob = app.verify(app.defer(tasks.fail, "x" * 20_000).payload).blob
    with pytest.raises(ValueError, match="xxx"):
        app.run_from_datastore(blob["id"])
    assert app.queue.blobs.get(blob["id"]) is not None


# --- Running --------------------------------------------------------------------------------------


def test_run_returns_what_the_callable_returns(app):
    assert app.run(app.serialize(tasks.add, 1, 2, scale=3)) == 9
    assert app.run(app.serialize(tasks.add_later, 1, 2)) == 3
    assert app.run(app.serialize(tasks.returns_awaitable, 7)) == 7
    assert app.run(app.serialize(tasks.Counter(5).increment, 2)) == 7


async def test_run_async_returns_it_in_a_loop(app):
    for call, result in [((tasks.add, 1, 2), 3), ((tasks.add_later, 1, 2), 3), ((tasks.returns_awaitable, 7), 7)]:
        assert await app.run_async(app.serialize(*call)) == result


async def test_run_refuses_to_block_a_loop(app):
    with pytest.raises(RuntimeError, match=r"run_async\(\)"):
        app.run(app.serialize(tasks.add, 1))


@pytest.mark.parametrize("name", tasks.RAISES)
def test_run_raises_what_the_callable_raises(app, name):
    with pytest.raises(BaseException) as caught:
        app.run(app.serialize(tasks.raise_, name))
    assert type(caught.value) is type(tasks.RAISES[name]())


async def test_run_async_raises_what_a_thread_can_raise(app):
    for name in tasks.RAISES.keys() - {"SystemExit", "KeyboardInterrupt"}:  # those end a loop, as they should
        with pytest.raises(BaseException) as caught:
            await asyncio.wait_for(app.run_async(app.serialize(tasks.raise_, name)), 60)
        kind = type(tasks.RAISES[name]())
        assert type(caught.value) is (RuntimeError if kind is StopIteration else kind)


def test_run_refuses_what_is_not_ours(app):
    other = make_app()
    for data in [b"", b"x", other.serialize(tasks.add, 1), app.serialize(tasks.add, 1)[:-1]]:
        with pytest.raises(RejectedTask):
            app.run(data)
    assert tasks.RAN == []


def test_serialize_enqueues_nothing(app):
    token = app.serialize(tasks.add, 1)
    assert type(token) is bytes
    assert token.count(b".") == 2
    assert app.queue.tasks() == []


async def test_defer_async_does_not_block_the_loop(app):
    task = await app.defer_async(tasks.add, 1)
    other = await app.options(queue="mail").defer_async(tasks.add, 2)
    assert {view.id for view in app.queue.tasks()} == {task.id, other.id}


# --- Dead letters ---------------------------------------------------------------------------------


def bury(app, *call, options=None):
    from safedefer.queues.base import Settlement, Verdict

    task = app.defer_with(options or Options(), call[0], call[1:], {})
    (lease,) = app.queue.lease(owner="test", limit=1, seconds=60, now=NOW)
    settle(app.queue, lease, Settlement(verdict=Verdict.DEAD, reason="test"), now=NOW)
    return task


def test_a_dead_letter_runs_again_as_a_new_task(app):
    dead = bury(app, tasks.add, 1, options=Options(name="n", headers={"X-Shop": "1"}, queue="mail"))
    again = app.retry(dead.id)
    assert again.id != dead.id
    claims = claims_of(app, again)
    assert claims.get("retry_of") == dead.id
    assert (claims.get("name"), claims.get("headers"), again.headers, again.queue_name) == (
        None,
        {"X-Shop": "1"},
        {"X-Shop": "1"},
        "mail",
    )
    assert [view.state for view in app.queue.tasks()] == [TaskState.WAITING]
    assert app.retry(dead.id) is None
    assert app.retry(again.id) is None


def test_a_large_dead_letter_runs_again(app):
    dead = bury(app, tasks.add, "x" * 20_000)
    again = app.retry(dead.id)
    assert app.follow(app.verify(again.payload)).claims["args"] == ["x" * 20_000]


def test_a_dead_letter_that_does_not_verify_now_is_not_signed_again():
    queue = make_app().queue
    strong = Key("a", SECRET, KeyState.ACTIVE)
    dead = bury(make_app(keyring=Keyring(strong), queue=queue, clock=lambda: NOW), tasks.add, 1)
    revoked = Keyring(Key("a", SECRET, KeyState.REVOKED), Key("b", SECRET[::-1], KeyState.ACTIVE))
    with pytest.raises(RejectedTask):
        make_app(keyring=revoked, queue=queue, clock=lambda: NOW).retry(dead.id)
    with pytest.raises(RejectedTask):
        make_app(keyring=Keyring(strong), policy=Policy(), queue=queue, clock=lambda: NOW).retry(dead.id)
    assert queue.find(dead.id).state is TaskState.DEAD


MOUNTED = [  # the path of the request, the mount, the prefix, and what a token may name
    ("/a/u", "/a", "", {"/u", "/a/u"}),
    ("/a/u", "/a/", "", {"/u", "/a/u"}),  # ASGI servers are given either
    ("/u", "/a", "", {"/u"}),  # WSGI's PATH_INFO, old ASGI servers: the mount is not in the path
    ("/ab/u", "/a", "", {"/ab/u"}),
    ("/a", "/a", "", {"/a"}),
    ("/a/b/u", "/a/b", "", {"/u", "/a/b/u"}),
    ("/a/p/u", "/a", "/p", {"/u", "/a/p/u"}),
    ("/a/a/u", "/a", "", {"/a/u", "/a/a/u"}),
]


@pytest.mark.parametrize(("path", "mount", "prefix", "named"), MOUNTED)
def test_below_a_mount_the_path_that_was_signed_is_accepted(path, mount, prefix, named):
    app = make_app(prefix=prefix)
    for url in ("/u", "/a/u", "/a/a/u", "/ab/u", "/a", "/a/b/u", "/b/u", "/a/p/u", "/p/u"):
        task = app.options(url=url).defer(tasks.add, 1, 2)
        status = handle(app, task.payload, path=path, mount=mount).status
        assert (status == 200) == (url in named), url
    app.close()


# --- Making an App --------------------------------------------------------------------------------

WRONG = [
    ({"keyring": None}, "safedefer keys new"),
    ({"policy": None}, "policy=Policy"),
    ({"policy": "tests.sample_tasks"}, "policy=Policy"),
    ({"environment": "a:b"}, "environment 'a:b'"),
    ({"environment": ""}, "environment"),
    ({"url": "tasks"}, "url 'tasks'"),
    ({"url": "/{x}"}, "brace"),
    ({"prefix": "api"}, "prefix 'api'"),
    ({"queues": "mail"}, "list of names"),
    ({"queues": ["a b"]}, "queue 'a b'"),
    ({"targets": {"a b": "http://x"}}, "target 'a b'"),
    ({"targets": {"big": "127.0.0.1:80"}}, "target big must begin with http"),
    ({"concurrency": 0}, "concurrency"),
    ({"concurrency": True}, "concurrency"),
    ({"inline_limit": 0}, "inline_limit"),
    ({"lease_seconds": 0}, "lease_seconds"),
    ({"lease_seconds": float("nan")}, "lease_seconds"),
    ({"validate": "types"}, "validate"),
]


@pytest.mark.parametrize(("settings", "text"), WRONG)
def test_a_wrong_setting_of_an_app_is_refused(settings, text):
    with pytest.raises(ConfigurationError, match=text):
        make_app(**settings)


def test_making_an_app_opens_nothing(tmp_path):
    make_app(queue=f"sqlite:///{tmp_path}/q.db")
    assert list(tmp_path.iterdir()) == []


def test_options_are_reusable(app):
    deferral = app.options(queue="mail")
    assert type(deferral) is Deferral
    assert deferral.defer(tasks.add, 1).id != deferral.defer(tasks.add, 1).id


def test_the_log_level_is_of_normal_runs_alone(caplog):
    app = make_app()
    app.set_log_level(logging.CRITICAL)
    with caplog.at_level(logging.DEBUG, "safedefer"):
        handle(app, app.defer(tasks.add, 1).payload)
        handle(app, app.defer(tasks.fail).payload)
    levels = [record.levelno for record in caplog.records if isinstance(record.safedefer, TaskHandled)]
    assert levels == [logging.CRITICAL, logging.WARNING]
    with pytest.raises(TypeError, match=r"logging\.INFO"):
        app.set_log_level("INFO")
    assert isinstance(app.observer, LogObserver)


def test_importing_safedefer_imports_no_aiohttp():
    code = "import sys, safedefer, safedefer.deferred; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_module_may_use_the_app_while_the_policy_imports_it(tmp_path, monkeypatch):
    (tmp_path / "eager_tasks.py").write_text("import tests.unit.test_app as t\nt.HOLDER[0].queue\ndef f(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    HOLDER[0] = make_app(policy=Policy("eager_tasks"))
    ended = threading.Thread(target=lambda: HOLDER[0].delivery, daemon=True)
    ended.start()
    ended.join(30)
    assert not ended.is_alive()


HOLDER = [None]


def test_an_app_is_what_an_observer_hears_from():
    seen = Recorder()
    app = App(
        keyring=Keyring(Key("k", SECRET, KeyState.ACTIVE)),
        policy=Policy("tests.sample_tasks"),
        queue="memory://",
        observer=seen,
    )
    app.defer(tasks.add, 1)
    assert [type(event) for event in seen.events] == [TaskEnqueued]


# --- Absolute URLs --------------------------------------------------------------------------------

TARGETS = {"worker": "https://worker.example:8443/tasks", "other": "http://127.0.0.1:9001"}


@pytest.mark.parametrize(("url", "target", "path"), [
    ("https://worker.example:8443/tasks/mail", "worker", "/mail"),
    ("http://127.0.0.1:9001/mail", "other", "/mail"),
    ("/mail", "default", "/mail"),
])  # fmt: skip
def test_an_absolute_url_below_a_target_is_that_target_and_a_path(url, target, path):
    app = make_app(targets=TARGETS)
    task = app.options(url=url).defer(tasks.add, 1)
    assert (task.target, task.url) == (target, path)
    assert app.verify(task.payload).claims["aud"].split(":", 3)[2:] == [target, path]
    app.close()


@pytest.mark.parametrize(("url", "target"), [
    ("http://evil.example/mail", None),
    ("https://worker.example:8443.evil.example/tasks/mail", None),
    ("https://worker.example:8443@evil.example/tasks/mail", None),
    ("https://worker.example:8443/tasksmail", None),
    ("http://worker.example:8443/tasks/mail", None),
    ("http://127.0.0.1:90011/mail", None),
    ("http://127.0.0.1:9001/mail", "worker"),
    ("http://127.0.0.1:9001//evil.example/mail", None),
    ("http://127.0.0.1:9001/mail?x=1", None),
])  # fmt: skip
def test_an_absolute_url_anywhere_else_is_refused(url, target):
    app = make_app(targets=TARGETS)
    with pytest.raises(InvalidUrlError):
        app.options(url=url, target=target).defer(tasks.add, 1)
    app.close()


def test_the_drop_in_module_takes_absolute_urls_of_targets_too():
    app = make_app(targets=TARGETS)
    configure(app)
    try:
        task = defer(tasks.add, 1, _url="http://127.0.0.1:9001/mail")
        assert (task.target, task.url) == ("other", "/mail")
        with pytest.raises(InvalidUrlError, match="SAFEDEFER_TARGETS"):
            defer(tasks.add, 1, _url="https://evil.example/mail")
    finally:
        configure(None)
        app.close()


@pytest.mark.parametrize("where", ["the policy", "a key"])
def test_a_mistyped_exact_pattern_stops_the_handler_at_its_start_and_the_first_defer(where, tmp_path):
    wrong = "tests.sample_tasks:ad"
    key = Key("k1", SECRET, KeyState.ACTIVE, patterns=[wrong] if where == "a key" else None)
    app = make_app(
        queue=f"sqlite:///{tmp_path}/q.db",
        keyring=Keyring(key),
        policy=Policy(wrong if where == "the policy" else "tests.sample_tasks"),
    )
    with pytest.raises(ConfigurationError, match="tests.sample_tasks:ad names nothing"):
        _ = app.delivery
    with pytest.raises(ConfigurationError, match="tests.sample_tasks:ad names nothing"):
        app.defer(tasks.add, 1, 2)
    app.close()


def test_no_token_is_larger_than_what_a_queue_reads(tmp_path):
    with pytest.raises(ConfigurationError, match="token_bytes is a whole number, at most 2,097,152"):
        make_app(limits=Limits(token_bytes=2**21 + 1))
    app = make_app(queue=f"sqlite:///{tmp_path}/queue.db", limits=Limits(token_bytes=2**21))
    app.defer(tasks.add, "x" * 1_572_000, "y")
    (stored,) = app.queue.tasks(limit=2)
    assert 2**21 - 2_000 < len(stored.token) <= 2**21
    assert len(app.run(stored.token)) == 1_572_001
    app.close()
