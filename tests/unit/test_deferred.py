"""``safedefer.deferred`` as App Engine documented it, sentence by sentence."""

import inspect
import re
import subprocess
import sys
import threading
from dataclasses import fields
from datetime import UTC, datetime, timedelta

import pytest

import safedefer
from safedefer import App, Options, PermanentTaskFailure, Policy, SingularTaskFailure, TaskRetryOptions, deferred
from safedefer.claims import Claims
from safedefer.errors import ConfigurationError, InvalidEtaError, InvalidTaskError, NotDeferrable, RejectedTask
from tests import sample_tasks as tasks
from tests.unit.apps import handle, make_app

NOW = 1_800_000_000.0


@pytest.fixture
def app():
    tasks.reset()
    app = make_app(clock=lambda: NOW, allow_pickle=True)
    deferred.configure(app)
    yield app
    deferred.configure(None)
    app.close()


def claims_of(app, task):
    return app.verify(task.payload, expired=True).claims


# "The following callables can be used as tasks"
COUNTER = tasks.Counter(10)
CAN = {
    "functions defined in the top level of a module": (tasks.add, (1, 2), ("add", 1, 2, 1)),
    "coroutine functions too": (tasks.add_later, (1, 2), ("add_later", 1, 2)),
    "instances of classes that implement __call__": (COUNTER, (1,), ("call", 11)),
    "instances with an async __call__": (tasks.AsyncCall(), (1,), ("async call", 1)),
    "instance methods of objects of classes": (COUNTER.increment, (1,), ("increment", 11)),
    "async instance methods": (COUNTER.increment_async, (1,), ("increment_async", 11)),
    "class methods of classes": (tasks.Counter.make, (5,), ("make", 5)),
}


@pytest.mark.parametrize("what", CAN)
def test_these_callables_can_be_used_as_tasks(app, what):
    obj, args, expected = CAN[what]
    task = deferred.defer(obj, *args)
    assert handle(app, task.payload).headers["Safedefer-Outcome"] == "succeeded"
    assert tasks.RAN == [expected]


def test_classes_and_built_ins_can_be_used_as_tasks(app):
    import operator

    for obj, args, result in [(tasks.Counter, (5,), tasks.Counter(5)), (len, ("abc",), 3), (operator.add, (1, 2), 3)]:
        assert deferred.run(deferred.serialize(obj, *args)) == result
    deferred.configure(make_app(policy=Policy("builtins:str.split")))
    assert deferred.run(deferred.serialize("a-b".split, "-")) == ["a", "b"]


# "The following callables can NOT be used as tasks"
def test_these_callables_can_not_be_used_as_tasks(app):
    def nested():
        pass

    class Nested:
        def method(self):
            pass

    for obj in (nested, Nested, Nested(), Nested().method, lambda: None, tasks.Counter.static, COUNTER.static):
        with pytest.raises(NotDeferrable) as caught:
            deferred.defer(obj)
        assert isinstance(caught.value, deferred.Error)


def test_the_default_url_and_queue_are_used_as_soon_as_possible(app):
    task = deferred.defer(tasks.add, 1)
    assert (task.url, task.queue_name, task.name) == ("/_ah/queue/deferred", "default", None)
    assert task.eta_posix == NOW
    assert task.was_enqueued


def test_retry_options_and_a_deadline_are_signed(app):
    retry = TaskRetryOptions(task_retry_limit=3, min_backoff_seconds=0.5)
    claims = claims_of(app, deferred.defer(tasks.add, 1, _retry_options=retry, _deadline=90))
    assert (claims["retry"], claims["deadline"]) == ({"min_backoff_seconds": 0.5, "task_retry_limit": 3}, 90)
    assert claims_of(app, deferred.defer(tasks.add, 1, _retry_options=TaskRetryOptions()))["retry"] == {}
    assert not {"retry", "deadline"} & claims_of(app, deferred.defer(tasks.add, 1)).keys()
    assert claims_of(app, app.options(deadline=1.5).defer(tasks.add, 1))["deadline"] == 1.5
    for deadline in (0, 86_401, True):
        with pytest.raises(InvalidTaskError, match="deadline"):
            deferred.defer(tasks.add, 1, _deadline=deadline)
        with pytest.raises(InvalidTaskError, match="deadline"):
            app.options(deadline=deadline)


def test_a_pointer_says_all_that_its_task_says_but_the_call(app):
    task = app.options(
        headers={"X-Shop": "1"}, name="n", retry_options=TaskRetryOptions(task_retry_limit=3), deadline=90
    ).defer(tasks.add, "x" * 20_000)
    pointer = app.verify(task.payload)
    stored = app.follow(pointer)
    own = {"call", "args", "kwargs", "blob"}
    assert {name: value for name, value in pointer.claims.items() if name not in own} == {
        name: value for name, value in stored.claims.items() if name not in own
    }
    assert [*pointer.claims] == [name for name in Claims.__annotations__ if name in pointer.claims]
    assert stored.canonical


def test_all_nine_options_are_passed_to_the_queue(app):
    retry = TaskRetryOptions(task_retry_limit=1)
    task = deferred.defer(
        tasks.add, 1, _countdown=60, _headers={"X-Shop": "1"}, _name="n", _queue="foo", _retry_options=retry,
        _target="big", _transactional=False, _url="/tasks/x", scale=3,
    )  # fmt: skip
    assert (task.eta_posix, task.headers, task.name) == (NOW + 60, {"X-Shop": "1"}, "n")
    assert (task.queue_name, task.retry_options, task.target, task.url) == ("foo", retry, "big", "/tasks/x")
    (view,) = app.queue.tasks()
    assert (view.queue, view.retry_options, view.target, view.url) == (
        "foo",
        {"task_retry_limit": 1},
        "big",
        "/tasks/x",
    )
    assert claims_of(app, task)["kwargs"] == {"scale": 3}


def test_an_eta_is_the_other_way_to_say_when(app):
    eta = datetime.fromtimestamp(NOW, UTC) + timedelta(days=1)
    assert deferred.defer(tasks.add, 1, _eta=eta).eta == eta
    with pytest.raises(InvalidEtaError, match="no time zone"):
        deferred.defer(tasks.add, 1, _eta=datetime(2030, 1, 1))
    with pytest.raises(InvalidEtaError, match="not both"):
        deferred.defer(tasks.add, 1, _eta=eta, _countdown=1)


def test_no_url_is_the_default_url_of_the_queue(app):
    task = deferred.defer(tasks.add, 1, _queue="mail", _url=None)
    assert task.url == "/_ah/queue/mail"
    assert claims_of(app, task)["aud"] == "test:mail:default:/_ah/queue/mail"


def test_a_pickled_task_is_asked_for(app):
    assert claims_of(app, deferred.defer(tasks.add, 1, _pickle=True))["cty"] == "pickle"
    assert claims_of(app, deferred.defer(tasks.add, 1))["cty"] == "typed"


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("_countdwon", "_countdown"), ("_queu", "_queue"), ("_retry_option", "_retry_options"), ("_Name", "_name"),
     ("_header", "_headers"), ("_transaction", "_transactional"), ("_urls", "_url")],
)  # fmt: skip
def test_an_unknown_option_is_a_type_error_that_suggests_the_nearest(app, wrong, nearest):
    with pytest.raises(TypeError, match=f"no option '{wrong}'; did you mean {nearest}\\?"):
        deferred.defer(tasks.keywords, **{wrong: 1})
    assert app.queue.tasks() == []


@pytest.mark.parametrize("name", deferred.OPTION_HINTS)
def test_an_option_of_another_version_of_defer_says_what_to_do_in_its_place(app, name):
    with pytest.raises(TypeError, match=f"no option '{name}': {re.escape(deferred.OPTION_HINTS[name])}"):
        deferred.defer(tasks.keywords, **{name: 1})
    assert name not in deferred.OPTIONS


def test_all_unknown_options_are_told_at_once_and_what_is_like_no_option_is_not_taken_for_one(app):
    with pytest.raises(
        TypeError, match="no option '_small_task': .*leave it out, and no option '_service': use _target"
    ):
        deferred.defer(tasks.keywords, _small_task=True, _service="x")
    with pytest.raises(
        TypeError, match=r"no option '_limit'; a keyword of your own that begins with _ is passed with app\.options"
    ):
        deferred.defer(tasks.keywords, _limit=5)


@pytest.mark.parametrize(
    "name", ["_start", "_parent", "_tag", "_data", "_namespace", "_page", "_delta", "_user", "_rate"]
)
def test_a_keyword_of_ones_own_is_not_taken_for_an_option(app, name):
    with pytest.raises(TypeError, match=f"no option '{name}'; a keyword of your own"):
        deferred.defer(tasks.keywords, **{name: 1})


@pytest.mark.parametrize("obj", [tasks.underscored, tasks.Underscored().method, tasks.underscored_and_wrapped])
def test_a_parameter_of_the_callable_may_begin_with_an_underscore_as_it_could_on_app_engine(app, obj):
    task = deferred.defer(obj, _token="t", _countdown=0)
    assert claims_of(app, task)["kwargs"] == {"_token": "t"}
    with pytest.raises(TypeError, match="did you mean _queue"):
        deferred.defer(obj, _token="t", _quue="x")


def test_no_parameter_is_looked_for_in_what_is_no_function(app):
    for obj in (tasks.Counter, len, "text", tasks.Underscored()):
        with pytest.raises(TypeError, match="no option '_token'"):
            deferred.defer(obj, _token=1)


def test_the_names_of_rest_parameters_are_no_parameters(app):
    def rest(*_queu, **_header): ...

    for name, meant in (("_queu", "_queue"), ("_header", "_headers")):
        with pytest.raises(TypeError, match=f"no option '{name}'; did you mean {meant}"):
            deferred.defer(rest, **{name: 1})


def test_a_callable_whose_signature_cannot_be_read_has_no_parameters(app):
    def circle(_token): ...
    def claims(_token): ...

    circle.__wrapped__, claims.__signature__ = circle, "none"
    for obj in (circle, claims):
        with pytest.raises(TypeError, match="no option '_token'"):
            deferred.defer(obj, _token=1)


def test_the_errors_of_taskqueue_are_names_of_the_module(app):
    deferred.defer(tasks.add, 1, _name="once", _retry_options=deferred.TaskRetryOptions(task_retry_limit=0))
    with pytest.raises(deferred.TaskAlreadyExistsError):
        deferred.defer(tasks.add, 1, _name="once")
    assert issubclass(deferred.TaskAlreadyExistsError, deferred.DeferError)


async def test_defer_async_takes_the_same_options(app):
    task = await deferred.defer_async(tasks.add, 1, _queue="mail", _name="n", scale=2)
    assert (task.queue_name, task.name) == ("mail", "n")
    with pytest.raises(TypeError, match="did you mean _name"):
        await deferred.defer_async(tasks.keywords, _nam="n")


def test_the_signature_lists_every_option():
    parameters = inspect.signature(deferred.defer).parameters
    assert [name for name in parameters if name.startswith("_")] == [
        "_countdown", "_eta", "_headers", "_name", "_queue", "_retry_options", "_target", "_transactional", "_url",
        "_deadline", "_pickle",
    ]  # fmt: skip
    assert parameters["_queue"].default == "default"
    assert parameters["_url"].default == safedefer.DEFAULT_URL == "/_ah/queue/deferred"


@pytest.mark.parametrize("headers", [[], 0, ""])
def test_headers_that_are_no_mapping_are_refused_even_if_empty(app, headers):
    with pytest.raises(InvalidTaskError, match="headers is a dict"):
        deferred.defer(tasks.add, 1, _headers=headers)


def test_serialize_and_run_are_each_others_inverse(app):
    data = deferred.serialize(tasks.add, 1, 2, scale=10)
    assert type(data) is bytes
    assert deferred.run(data) == 30


async def test_run_async_runs_in_a_loop(app):
    assert await deferred.run_async(deferred.serialize(tasks.add_later, 1, 2)) == 3


def test_run_refuses_what_was_not_signed(app):
    import pickle

    for data in (b"", pickle.dumps((tasks.add, (1,), {})), b"a.b.c"):
        with pytest.raises(RejectedTask):
            deferred.run(data)
    assert tasks.RAN == []


def test_run_from_datastore_executes_a_stored_task(app):
    blob = app.verify(deferred.defer(tasks.add, "x" * 20_000, "y").payload).blob
    assert deferred.run_from_datastore(blob["id"]).endswith("xy")
    with pytest.raises(PermanentTaskFailure):
        deferred.run_from_datastore(blob["id"])


def test_invoke_member_calls_a_member(app):
    assert deferred.invoke_member("a,b,c", "split", ",", maxsplit=1) == ["a", "b,c"]
    assert deferred.invoke_member(COUNTER, "increment", by=2) == 12
    with pytest.raises(AttributeError):
        deferred.invoke_member(COUNTER, "nothing")


def test_no_token_names_invoke_member(app):
    with pytest.raises(NotDeferrable):
        deferred.defer(deferred.invoke_member, "a", "upper")
    for obj in (deferred.run, deferred.defer, deferred.run_from_datastore, deferred.configure):
        with pytest.raises(NotDeferrable):
            deferred.defer(obj, b"")


def test_set_log_level_is_of_the_application_in_use(app):
    deferred.set_log_level(10)
    assert app.observer.level == 10


def test_the_exceptions_have_one_root():
    assert issubclass(PermanentTaskFailure, deferred.Error)
    assert issubclass(SingularTaskFailure, deferred.Error)
    assert deferred.PermanentTaskFailure is safedefer.PermanentTaskFailure


def test_the_package_re_exports_the_module():
    for name in set(deferred.__all__) - {"configured_app", "current_app"}:
        assert getattr(safedefer, name) is getattr(deferred, name), name
    with pytest.raises(AttributeError):
        deferred.nothing
    with pytest.raises(AttributeError):
        safedefer.nothing


def test_the_task_handler_is_found_without_importing_aiohttp_before():
    code = (
        "import sys; from safedefer import deferred; assert 'aiohttp' not in sys.modules\n"
        "from safedefer.deferred import TaskHandler as a; from safedefer import TaskHandler as b\n"
        "import aiohttp.web; assert a is b and issubclass(a, aiohttp.web.View)\n"
        "class Mine(a): pass\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_configuration_the_error_says_which_command_makes_a_key(monkeypatch):
    for name in ("SAFEDEFER_KEYS", "SAFEDEFER_KEYS_FILE", "SAFEDEFER_POLICY"):
        monkeypatch.delenv(name, raising=False)
    deferred.configure(None)
    with pytest.raises(ConfigurationError, match="safedefer keys new"):
        deferred.defer(tasks.add, 1)


def test_without_configuration_the_environment_is_used(monkeypatch):
    deferred.configure(None)
    monkeypatch.setenv("SAFEDEFER_KEYS", "k1:" + "QkJDRERFRkdISUpLTE1OT1BRUlNUVVZXWFlaWzAxMjM0")
    monkeypatch.setenv("SAFEDEFER_POLICY", "tests.sample_tasks")
    monkeypatch.setenv("SAFEDEFER_QUEUE", "memory://")
    try:
        assert deferred.run(deferred.serialize(tasks.add, 1, 2)) == 3
        assert deferred.current_app() is deferred.current_app()
    finally:
        deferred.configure(None)


def test_a_module_of_tasks_may_ask_for_the_app_while_the_policy_finds_it(tmp_path, monkeypatch):
    (tmp_path / "asking_tasks.py").write_text("from safedefer import deferred\ndeferred.current_app()\ndef f(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SAFEDEFER_KEYS", "k1:" + "QkJDRERFRkdISUpLTE1OT1BRUlNUVVZXWFlaWzAxMjM0")
    monkeypatch.setenv("SAFEDEFER_POLICY", "asking_tasks:f")
    monkeypatch.setenv("SAFEDEFER_QUEUE", "memory://")
    deferred.configure(None)
    found = []

    def ask():
        app = deferred.current_app()
        app.policy.load()
        found.append(app)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(30)
    assert found == [deferred.current_app()]
    found[0].close()
    deferred.configure(None)


def test_every_option_is_spelled_once_and_the_forms_agree():
    options = {item.name for item in fields(Options)}
    assert [*inspect.signature(App.options).parameters][1:] == [item.name for item in fields(Options)]
    for name in options:
        assert f"\n    {name}: " in inspect.getdoc(App.options), name
    # App Engine's functions have no unique tasks.
    named = {name for name in inspect.signature(deferred.defer).parameters if name.startswith("_")}
    assert named == {f"_{name}" for name in options - {"unique", "unique_until"}}
    assert inspect.signature(deferred.defer_async).parameters == inspect.signature(deferred.defer).parameters
