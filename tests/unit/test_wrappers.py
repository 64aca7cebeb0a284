"""Tasks that another library decorated: deferred by the name of the function, and the function runs."""

import asyncio
import inspect
from types import FunctionType

import pytest

from safedefer.callables import wrappers
from safedefer.callables.wrappers import register_wrapper, unwrapped
from safedefer.errors import ConfigurationError, NotDeferrable, UnresolvableCallable
from safedefer.policy import Policy, deferrable
from safedefer.refs import UNBOUND, CallableRef, bound_object, find
from tests.unit.apps import handle, make_app
from tests.zoo import decorated

HERE = decorated.__name__
POLICY = Policy(HERE)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(wrappers, "_REGISTERED", {})
    register_wrapper(decorated.Job, "inner")
    register_wrapper(decorated.SlotJob, "inner")
    register_wrapper(decorated.SlotHeir, "inner")


def test_the_six_libraries_are_here_or_cannot_be_installed():
    kinds = {label.split()[0] for label in decorated.TASKS}
    assert kinds <= {"celery", "dramatiq", "huey", "taskiq", "procrastinate", "django"}
    for library in ("celery", "dramatiq", "huey", "taskiq", "procrastinate"):
        if library not in kinds:
            pytest.skip(f"{library} is not installed")


@pytest.mark.parametrize("label", decorated.TASKS)
def test_the_task_object_and_its_function_have_one_name(label):
    task, function = decorated.TASKS[label]
    for policy in (POLICY, Policy(f"{HERE}:{function.__name__.partition('__')[0]}")):
        refs = [policy.callable_ref(each) for each in (unwrapped(task), function, task)]
        assert {ref.parts for ref in refs} == {("function", HERE, function.__qualname__, None)}
        assert policy.load_callable(refs[0]) is unwrapped(task)
        assert unwrapped(task) is unwrapped(function)
        with pytest.raises(UnresolvableCallable):
            CallableRef(kind="instance", module=HERE, qualname=function.__qualname__).resolve(task)
        with pytest.raises(NotDeferrable):
            Policy("tests.sample_tasks").callable_ref(task)


@pytest.mark.parametrize("label", decorated.TASKS)
def test_a_deferred_task_runs_the_function(label):
    task, function = decorated.TASKS[label]
    app = make_app(policy=POLICY)
    for each in (task, function):
        deferred = app.defer(each, 4)
        assert app.run(deferred.payload) == 5 if not inspect.iscoroutinefunction(function) else True
        status, headers, _ = handle(app, deferred.payload)
        assert (status, headers["Safedefer-Outcome"]) == (200, "succeeded")
        result = asyncio.run(app.run_async(app.serialize(each, 4)))
        assert result == 5
    with pytest.raises(TypeError):
        app.defer(task, 1, 2, 3)


@pytest.mark.parametrize("label", decorated.REFUSED)
def test_a_task_whose_function_needs_the_task_object_is_refused(label):
    says = (
        r"takes the task \(bind=True, or run of a class\), .*function .* without self.*current_task\(\)"
        if label.startswith("celery")
        else ""
    )
    with pytest.raises(NotDeferrable, match=says):
        POLICY.callable_ref(decorated.REFUSED[label])


def test_what_is_not_registered_is_no_wrapper():
    for name in ("own", "own_slot"):
        assert unwrapped(getattr(decorated, name)) is getattr(decorated, name)
        with pytest.raises(UnresolvableCallable):
            POLICY.load_callable(CallableRef(kind="function", module=HERE, qualname=name))


@pytest.mark.parametrize("name", ["own", "own_slot", "own_heir"])
def test_a_type_of_ones_own_is_registered(registered, name):
    task = getattr(decorated, name)
    app = make_app(policy=POLICY)
    assert app.run(app.serialize(task, 4)) == 5
    assert app.run(app.serialize(task.inner, 4)) == 5


def test_an_attribute_that_its_objects_do_not_have_gives_nothing(registered):
    for cls in (decorated.Job, decorated.SlotJob):
        register_wrapper(cls, "outer")
    for task in (decorated.own, decorated.own_slot):
        assert unwrapped(task) is task


def test_only_the_exact_type_counts(registered):
    assert unwrapped(decorated.heir) is decorated.heir
    with pytest.raises(NotDeferrable):
        POLICY.callable_ref(decorated.heir.inner)


@pytest.mark.parametrize("name", ["moved", "renamed"])
def test_another_name_of_the_wrapper_is_not_the_functions(registered, name):
    """A token must not reach a function under a name that the function does not say."""
    with pytest.raises(UnresolvableCallable):
        POLICY.load_callable(CallableRef(kind="function", module=HERE, qualname=name))
    assert find(HERE, name) is getattr(decorated, name)


@pytest.mark.parametrize("name", ["no_function", "empty"])
def test_what_wraps_no_function_is_itself(registered, name):
    with pytest.raises(NotDeferrable):
        POLICY.callable_ref(getattr(decorated, name))


def test_a_generator_in_a_wrapper_is_refused_like_a_bare_one(registered):
    with pytest.raises(NotDeferrable) as caught:
        POLICY.callable_ref(decorated.generator)
    assert caught.value.reason == "generator"
    with pytest.raises(UnresolvableCallable):
        CallableRef(kind="function", module=HERE, qualname="generator").resolve()


def test_an_exact_pattern_means_the_function_of_the_wrapper_that_it_named(registered, monkeypatch):
    policy = Policy(f"{HERE}:own")
    ref = policy.callable_ref(decorated.own)
    policy.load()
    other = decorated.Job(decorated.own_slot.inner)
    other.inner = type(decorated.plain)(decorated.plain.__code__, vars(decorated), "own")
    other.inner.__qualname__ = "own"
    monkeypatch.setattr(decorated, "own", other)
    with pytest.raises(Exception, match="exact pattern"):
        policy.load_callable(ref)


def test_a_mark_on_the_function_counts_under_its_wrapper(registered):
    deferrable(decorated.own.inner)
    policy = Policy(deferrable=True)
    assert policy.load_callable(policy.callable_ref(decorated.own)) is decorated.own.inner


def test_what_is_bound_to_a_wrapper_is_nothing(registered):
    assert bound_object(unwrapped(decorated.own)) is UNBOUND


@pytest.mark.parametrize(
    ("cls", "attribute"),
    [(type(decorated.plain), "x"), (type, "x"), (decorated.own, "x"), (decorated.Job, "a b"), (decorated.Job, "")],
)
def test_what_is_no_wrapper_is_not_registered(cls, attribute):
    with pytest.raises(ConfigurationError):
        register_wrapper(cls, attribute)


def test_a_proxy_that_cannot_make_its_task_is_no_task():
    local = pytest.importorskip("celery.local")
    for make in (lambda: 1 / 0, lambda: 5):
        proxy = local.Proxy(FunctionType(make.__code__, {"__name__": "celery.app", "__builtins__": {}}))
        assert unwrapped(proxy) is proxy


@pytest.mark.parametrize("kind", ["Proxy", "PromiseProxy"])
def test_a_proxy_that_a_program_made_is_not_asked(kind, monkeypatch):
    """A token's name asked it, in any admitted module: it ran a function of the program."""
    local = pytest.importorskip("celery.local")
    ran = []

    class Lazy:
        def method(self):
            ran.append("method")

        def __call__(self):
            ran.append("call")

    for make in (lambda: ran.append("function"), Lazy().method, Lazy(), ran.append):
        proxy = getattr(local, kind)(make)
        monkeypatch.setattr(decorated, "lazy", proxy, raising=False)
        with pytest.raises(UnresolvableCallable):
            POLICY.load_callable(CallableRef(kind="function", module=HERE, qualname="lazy"))
        with pytest.raises(UnresolvableCallable):
            POLICY.load_class(f"{HERE}:lazy")
    assert ran == []
