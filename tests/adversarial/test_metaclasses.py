"""A metaclass runs whenever its classes are looked at: those that do are refused, and are not run to find out."""

import pytest

from safedefer.errors import (
    ConfigurationError,
    InvalidArguments,
    NotDeferrable,
    UnencodableArgument,
    UnresolvableCallable,
)
from safedefer.policy import Policy
from safedefer.refs import METACLASSES, UNBOUND, CallableRef, bound_object, loud_hooks
from safedefer.settings import Settings
from tests.adversarial import metas
from tests.adversarial.metas import RAN
from tests.zoo import parsed
from tests.zoo.exactly import carry, carry_one, decode_one

HERE = metas.__name__
POLICY = Policy(HERE)


def loud_class(monkeypatch, label, bases=(type,)):
    meta = type.__new__(type, "Loud", bases, {"__module__": HERE, "__qualname__": "Loud"} | metas.LOUD[label])
    cls = metas.make(meta)
    monkeypatch.setitem(vars(metas), type.__dict__["__qualname__"].__get__(cls), cls)
    RAN.clear()
    return cls


def refused(cls):
    """Ask for everything that a token or a caller can ask of a class."""
    obj = object.__new__(cls)
    name = type.__dict__["__qualname__"].__get__(cls)
    for each in (cls, obj, type.__dict__["__dict__"].__get__(cls)["go"].__get__(obj)):
        with pytest.raises(NotDeferrable) as caught:
            POLICY.callable_ref(each)
        assert caught.value.reason == "metaclass"
    for kind, member, bound in (
        ("class", None, UNBOUND),
        ("instance", None, obj),
        ("method", "go", obj),
        ("classmethod", "run", UNBOUND),
    ):
        with pytest.raises(UnresolvableCallable, match="metaclass"):
            CallableRef(kind=kind, module=HERE, qualname=name, member=member).resolve(bound)


@pytest.mark.parametrize("label", metas.LOUD)
def test_what_runs_when_a_class_is_looked_at_is_refused_and_does_not_run(label, monkeypatch):
    refused(loud_class(monkeypatch, label))
    assert RAN == []


@pytest.mark.parametrize("label", metas.LOUD)
@pytest.mark.parametrize("base", sorted(METACLASSES - {type}, key=str), ids=str)
def test_what_a_known_metaclass_is_derived_into_counts_as_well(label, base, monkeypatch):
    meta = type.__new__(type, "Loud", (base,), {"__module__": HERE, "__qualname__": "Loud"} | metas.LOUD[label])
    heir = type.__new__(type, "Heir", (meta,), {"__module__": HERE, "__qualname__": "Heir"})
    assert loud_hooks(metas.make(heir)) != []
    assert RAN == []


def test_what_a_mixin_of_the_metaclass_brings_counts(monkeypatch):
    meta = type("Mixed", (metas.MixinProperty, type), {"__module__": HERE, "__qualname__": "Mixed"})
    assert loud_hooks(metas.make(meta)) == ["run"]


def test_a_metaclass_that_has_one_itself_is_refused(monkeypatch):
    meta = type.__new__(metas.MetaOfMeta, "Loud", (type,), {"__module__": HERE, "__qualname__": "Loud"})
    cls = metas.make(meta)
    monkeypatch.setitem(vars(metas), cls.__qualname__, cls)
    RAN.clear()
    refused(cls)
    with pytest.raises(UnencodableArgument, match="__class__"):
        carry_one(cls, _policy=POLICY)
    assert RAN == []


def test_a_hook_that_comes_later_is_seen(monkeypatch):
    meta = type("Later", (type,), {"__module__": HERE, "__qualname__": "Later"})
    cls = metas.make(meta)
    monkeypatch.setitem(vars(metas), cls.__qualname__, cls)
    ref = POLICY.callable_ref(cls)
    assert ref.resolve() is cls
    meta.__call__ = metas.trap("__call__")
    with pytest.raises(UnresolvableCallable, match="__call__"):
        POLICY.load_callable(ref)
    assert RAN == []


@pytest.mark.parametrize("cls", [metas.Quiet, metas.QuietAbstract, metas.OfPort], ids=lambda cls: cls.__name__)
def test_a_metaclass_that_is_silent_needs_no_setting(cls):
    RAN.clear()
    obj = cls()
    for each in (cls, obj, obj.go, cls.run):
        ref = POLICY.callable_ref(each)
        assert POLICY.load_callable(ref, bound_object(each)) == each
    assert carry_one(cls, _policy=POLICY) is cls
    assert type(carry_one(obj, _policy=POLICY)) is cls
    assert carry_one(obj.go, _policy=POLICY)() == 2
    assert RAN == []


@pytest.mark.parametrize("label", ["__call__", "__hash__", "__eq__"])
def test_a_class_that_decoding_would_call_or_hash_is_no_value_either(label, monkeypatch):
    cls = loud_class(monkeypatch, label)
    name = f"{HERE}:{type.__dict__['__qualname__'].__get__(cls)}"
    for value in (cls, object.__new__(cls), [cls]):
        with pytest.raises(UnencodableArgument, match=f"{HERE}:Loud, which defines {label}"):
            carry(value, _policy=POLICY)
    for tree in (
        {"$class": name},
        {"$set": [{"$class": name}]},
        {"$dict": [[{"$class": name}, 1]]},
        {"$object": {"class": name}},
    ):
        with pytest.raises(UnresolvableCallable, match="metaclass"):
            decode_one(tree, policy=POLICY)
    assert RAN == []


@pytest.mark.parametrize(
    "label",
    ["__getattribute__", "__getattr__", "__instancecheck__", "__bool__", "__len__", "property over a class method"],
)
def test_a_value_runs_nothing_of_a_metaclass_that_only_answers(label, monkeypatch):
    cls = loud_class(monkeypatch, label)
    value = object.__new__(cls)
    arrived = carry(value, {value: [cls]}, {cls}, _policy=POLICY).args
    assert RAN == []
    assert type(arrived[0]) is cls
    assert list(arrived[2]) == [cls]


def test_a_combination_of_flags_does_not_ask_a_metaclass():
    RAN.clear()
    name = f"{HERE}:LoudFlag"
    assert decode_one({"$enum": [name, "A"]}, policy=POLICY) is type.__getattribute__(metas.LoudFlag, "A")
    RAN.clear()
    with pytest.raises(InvalidArguments, match="combination"):
        decode_one({"$enum": [name, 3]}, policy=POLICY)
    assert RAN == []


def test_the_message_names_the_metaclass_and_the_setting_that_admits_it(monkeypatch):
    cls = loud_class(monkeypatch, "__len__")
    metas_loud = type(cls)
    monkeypatch.setattr(metas, "Loud", metas_loud, raising=False)
    with pytest.raises(NotDeferrable) as caught:
        POLICY.callable_ref(cls)
    assert f"the metaclass {HERE}:Loud, which defines __len__" in str(caught.value)
    name, _, value = next(word for word in str(caught.value).split() if word.startswith("SAFEDEFER_")).partition("=")
    monkeypatch.setenv("SAFEDEFER_POLICY", HERE)
    monkeypatch.setenv(name, value)
    policy = Settings.load().load_policy()
    assert policy.load_callable(policy.callable_ref(cls)) is cls
    monkeypatch.setenv(name, f"{HERE}:Missing")
    with pytest.raises(ConfigurationError, match="metaclass"):
        Settings.load().load_policy().load()


@pytest.mark.parametrize("argument", [
    {"$class": f"{HERE}:Quiet"}, {"$generic_alias": {"$tuple": [{"$class": "builtins:list"}, {"$tuple": [{"$class": f"{HERE}:Quiet"}]}]}},
])  # fmt: skip
def test_a_generic_model_is_not_named_by_what_a_metaclass_says_of_its_class(argument):
    RAN.clear()
    tree = {"$model": [[f"{parsed.__name__}:Page", argument], {"items": []}, ["items"], None, None]}
    with pytest.raises(InvalidArguments, match="without hooks"):
        decode_one(tree, policy=Policy(HERE, parsed.__name__))
    assert RAN == []
