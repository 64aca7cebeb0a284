"""The memory of a policy: what holds is not proved again, what changed is, and a refusal is never remembered."""

import sys
from abc import ABCMeta
from types import FunctionType, ModuleType

import pytest

from safedefer.errors import CapabilityExceeded, NotDeferrable, PolicyViolation, UnresolvableCallable
from safedefer.policy import Policy, deferrable
from safedefer.policy_cache import Found, FoundClass, PolicyCache
from safedefer.refs import CallableRef, reference
from tests.zoo import callables as zoo

ZOO = "tests.zoo.callables"


class Meta(ABCMeta):
    pass


@pytest.fixture
def module(monkeypatch):
    """A module with functions and classes, found in ``sys.modules``."""
    found = ModuleType("tests.found")
    found.ABCMeta = ABCMeta
    exec("def f(): pass\ndef g(): pass\nclass C(metaclass=ABCMeta): pass\nclass D:\n    class E: pass\n", vars(found))
    monkeypatch.setitem(sys.modules, "tests.found", found)
    return found


def test_a_remembered_function_is_what_was_proved(module):
    ref = CallableRef.of(module.f)
    found = Found.of(ref, module.f)
    assert found == Found(ref, module.f, module, vars(module), "tests.found", "f", module.f.__code__, "f")
    assert found.holds()


@pytest.mark.parametrize("change", [
    lambda module, f: delattr(module, "f"),
    lambda module, f: setattr(module, "f", FunctionType(f.__code__, vars(module))),
    lambda module, f: sys.modules.pop("tests.found"),
    lambda module, f: sys.modules.update({"tests.found": ModuleType("tests.found")}),
    lambda module, f: setattr(f, "__qualname__", "g"),
    lambda module, f: setattr(f, "__module__", "tests"),
    lambda module, f: setattr(f, "__code__", f.__code__.replace(co_name="g")),
    lambda module, f: setattr(f, "__name__", "g"),
])  # fmt: skip
def test_a_remembered_function_that_changed_is_looked_up_again(module, change):
    found = Found.of(CallableRef.of(module.f), module.f)
    change(module, module.f)
    assert not found.holds()


def test_a_remembered_class_is_what_was_proved(module):
    found = FoundClass.of("tests.found:C", module.C)
    assert found == FoundClass("tests.found:C", "C", module.C, ABCMeta, "tests.found", module, vars(module))
    assert found.holds()
    assert FoundClass.of("tests.found:D.E", module.D.E) is None, "a nested class takes several looks"


@pytest.mark.parametrize("change", [
    lambda module, cls: delattr(module, "C"),
    lambda module, cls: setattr(module, "C", ABCMeta("C", (), {"__module__": "tests.found"})),
    lambda module, cls: sys.modules.pop("tests.found"),
    lambda module, cls: sys.modules.update({"tests.found": ModuleType("tests.found")}),
    lambda module, cls: setattr(cls, "__class__", Meta),
    lambda module, cls: setattr(cls, "__qualname__", "D"),
    lambda module, cls: setattr(cls, "__module__", "tests"),
])  # fmt: skip
def test_a_remembered_class_that_changed_is_looked_up_again(module, change):
    found = FoundClass.of("tests.found:C", module.C)
    change(module, module.C)
    assert not found.holds()


def test_a_policy_does_not_prove_again_what_it_has_proved(module, monkeypatch):
    policy = PolicyCache(Policy("tests.found"))

    def look():
        ref = policy.callable_ref(module.f)
        return ref, policy.load_callable(ref), policy.class_name(module.C), policy.load_class("tests.found:C")

    def trap(*args, **kwargs):
        raise AssertionError("proved again")

    before = look()
    assert before[1:] == (module.f, "tests.found:C", module.C)
    for name in ("refs._classify", "refs.find", "policy.find", "policy.check_class"):
        monkeypatch.setattr(f"safedefer.{name}", trap)
    assert look() == before


def test_a_policy_does_not_judge_a_name_again_that_it_has_admitted(monkeypatch):
    policy, name = PolicyCache(Policy("tests.found")), reference("function", "tests.found", "f", None)
    assert policy.check(name) is name
    monkeypatch.setattr(Policy, "_check_names", lambda self, ref: pytest.fail("judged again"))
    assert policy.check(name) is name


def test_the_memory_of_a_policy_is_bounded(monkeypatch):
    monkeypatch.setattr("safedefer.policy_cache._SIZE", 3)
    policy = PolicyCache(Policy(ZOO))
    for number in range(10):
        policy.check(reference("function", ZOO, f"f{number}", None))
        policy.check(CallableRef(kind="function", module=ZOO, qualname=f"g{number}"))  # no shared object: not kept
    assert len(policy._admitted) == 1, "room was made three times: what somebody made up keeps nothing out"
    assert all(reference(*kept.parts) is kept for kept in policy._admitted.values())
    policy = PolicyCache(Policy("tests.zoo.*"))
    functions = [zoo.function, zoo.coroutine, zoo.decorated, zoo.Function, zoo.claimed]
    for function in functions * 2:
        assert policy.load_callable(policy.callable_ref(function)) is function
    assert len(policy._named) == 3
    assert 1 <= len(policy._found) <= 3


def test_a_refusal_is_not_remembered(module):
    cache, ref = PolicyCache(Policy("tests.found")), reference("function", "tests.found", "later", None)
    for _ in range(2):
        with pytest.raises(UnresolvableCallable):
            cache.load_callable(ref)
        with pytest.raises(UnresolvableCallable):
            cache.load_class("tests.found:Later")
        with pytest.raises(PolicyViolation):
            cache.check(reference("function", "tests.other", "f", None))
    exec("def later(): pass\nclass Later: pass\n", vars(module))
    assert cache.load_callable(ref) is module.later
    assert cache.load_class("tests.found:Later") is module.Later


def test_what_took_the_place_of_what_was_remembered_is_judged_anew(module):
    cache = PolicyCache(Policy("tests.found:f", "tests.found:C"))
    ref = cache.callable_ref(module.f)
    assert cache.load_callable(ref) is module.f
    assert cache.load_class("tests.found:C") is module.C
    old = module.f, module.C
    exec("def f(): pass\nclass C: pass\n", vars(module))
    for call in (lambda: cache.load_callable(ref), lambda: cache.load_class("tests.found:C")):
        with pytest.raises(PolicyViolation, match="named when the policy was loaded"):
            call()
    for call in (lambda: cache.callable_ref(old[0]), lambda: cache.class_name(old[1])):
        with pytest.raises(NotDeferrable):
            call()


def test_a_name_that_is_admitted_by_a_mark_is_asked_each_time(module, monkeypatch):
    deferrable(module.f)
    cache, ref = PolicyCache(Policy(deferrable=True)), reference("function", "tests.found", "f", None)
    assert not cache.is_settled
    assert cache.check(ref) is ref
    monkeypatch.delitem(sys.modules, "tests.found")
    with pytest.raises(PolicyViolation):
        cache.check(ref)


def test_the_limits_of_a_key_are_remembered_with_the_policy(module):
    gate = Policy("tests.found", deferrable=True).restricted(["tests.found:f"])
    cache = PolicyCache(gate)
    assert cache.is_settled is gate.is_settled is False
    allowed, other = (reference("function", "tests.found", name, None) for name in "fg")
    for _ in range(2):
        assert cache.load_callable(allowed) is module.f
        with pytest.raises(CapabilityExceeded):
            cache.load_callable(other)
        with pytest.raises(NotDeferrable, match="the active key may not name it"):
            cache.callable_ref(module.g)


def test_a_moved_name_leads_to_the_new_one_from_memory_too(module, monkeypatch):
    moved = {"tests.gone:f": "tests.found:f", "tests.gone:C": "tests.found:C"}
    cache, old = (
        PolicyCache(Policy("tests.gone", "tests.found", moved=moved)),
        reference("function", "tests.gone", "f", None),
    )
    for _ in range(2):
        assert cache.load_callable(old) is module.f
        assert cache.load_class("tests.gone:C") is module.C
        monkeypatch.setattr("safedefer.refs._classify", lambda *args: pytest.fail("proved again"))


def test_nested_classes_and_bound_methods_are_proved_each_time(module):
    cache = PolicyCache(Policy("tests.found", "builtins:list.append"))
    assert cache.class_name(module.D.E) == "tests.found:D.E"
    module.D.E = type("E", (), {"__module__": "tests.found", "__qualname__": "D.E"})
    assert cache.load_class("tests.found:D.E") is module.D.E
    values = [1]
    ref = cache.callable_ref(values.append)
    assert cache.load_callable(ref, values).__self__ is values
