"""Values that the typed codec refuses to encode: with the path, the type, the cause and a remedy; and no code of theirs runs."""

import asyncio
import collections
import dataclasses
import enum
import io
import itertools
import re
import sys
import threading
from collections import Counter, OrderedDict, deque
from datetime import date, datetime, timedelta, tzinfo
from functools import partial
from ipaddress import ip_network
from operator import attrgetter
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import pytest

from safedefer.codecs.inspect_safely import type_name
from safedefer.codecs.typed import CallData, TypedCodec
from safedefer.errors import NotDeferrable, UnencodableArgument
from safedefer.options import Limits
from safedefer.policy import Policy
from safedefer.refs import UNBOUND
from tests.zoo import values as zoo
from tests.zoo.exactly import CODEC, POLICY, carry_one


def with_attribute(obj, name="hidden", value=1):
    vars(obj)[name] = value
    return obj


def raised():
    try:
        raise ValueError("x")
    except ValueError as error:
        return error


def raised_cause():
    error = ValueError("outer")
    error.__cause__ = raised()
    return error


def changed_args():
    error = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")
    error.args = ("nonsense",)
    return error


def odd_os_error():
    error = OSError("text")
    error.args = (2, "gone")
    return error


def shadowing_exception():
    error = OSError(2, "x")
    vars(error)["filename"] = "hidden"
    return error


def group_with_changed_list():
    errors = [ValueError(1)]
    group = ExceptionGroup("g", errors)
    errors.append(KeyError(2))
    group.args = ("g", [KeyError(3)])
    return group


def cycle_through_exception_args():
    holder = []
    error = ValueError(holder)
    holder.append(error)
    return error


def cycle_through_newargs():
    obj = zoo.NewArgs(1, [])
    obj.b.append(obj)
    return obj


def cycle_through_tuple_subclass():
    holder = []
    value = zoo.MyTuple((holder,))
    holder.append(value)
    return value


def early_hash():
    key = zoo.ByValue("k")
    key.other = {key}
    return key


def early_hash_inside_a_tuple():
    key = zoo.ByValue("k")
    key.other = {(1, key): 1}
    return key


def shared_dict():
    a, b = zoo.Node(), zoo.Node()
    b.__dict__ = a.__dict__
    a.x = 1
    return [a, b]


def vars_beside():
    node = zoo.Node()
    node.x = 1
    return [vars(node), node]


def vars_after():
    node = zoo.Node()
    node.x = 1
    return [node, vars(node)]


def fields_set_beside():
    model = zoo.Model(a=1)
    return [model, model.model_fields_set]


def both_slot_and_dict():
    obj = zoo.SlotsAndDict()
    obj.a = 1
    vars(obj)["a"] = 2
    return obj


def slot_in_dict():
    """Of the slot's name is an entry of its __dict__ alone: ``obj.a`` has no value."""
    obj = zoo.SlotsAndDict()
    vars(obj).update(a=2)
    return obj


class Shadow(zoo.WithSlots):
    __slots__ = ("a",)


def shadowed_slot():
    obj = Shadow()
    zoo.WithSlots.a.__set__(obj, 1)
    return obj


class Zone(tzinfo):
    def utcoffset(self, when):
        return timedelta(0)


class MyDate(date):
    pass


class MyOrdered(OrderedDict):
    pass


class MyDeque(deque):
    pass


@dataclasses.dataclass
class NotAdmitted:
    a: int = 1


class SelfReduced(dict):
    def __reduce_ex__(self, protocol):
        zoo.RAN.append("__reduce_ex__")
        return super().__reduce_ex__(protocol)


def local_class():
    class Local:
        pass

    return Local()


def local_function():
    def nested():
        pass

    return nested


def generator():
    yield


def deep(wrap, levels):
    value = 0
    for _ in range(levels):
        value = wrap(value)
    return value


def odd_namespace():
    node = zoo.Node()
    vars(node)[1] = 2
    return node


def dict_subclass_dict():
    node = zoo.Node()
    node.__dict__ = zoo.MyDict(a=1)
    return node


def tagged_enum():
    return enum.Enum("Made", ["A"]).A


# value, path below the argument, a word of the message
REFUSED = {
    "object()": (object(), "", "identity"),
    "lambda": (lambda: 1, "", "lambda"),
    "nested function": (local_function(), "", "nested"),
    "object of a local class": (local_class(), "", "function"),
    "class outside the policy": (NotAdmitted(), "", "policy"),
    "that class itself": (NotAdmitted, "", "policy"),
    "dangerous class": (__import__("subprocess").Popen, "", "policy"),
    "partial": (partial(zoo.top, 1), "", "as arguments"),
    "attrgetter": (attrgetter("x"), "", "register"),
    "module": (sys, "", "pass its name"),
    "file": (io.StringIO("x"), "", "value.getvalue()"),
    "lock": (threading.Lock(), "", "register"),
    "generator": (generator(), "", "a list of its items"),
    "iterator": (iter([1]), "", "a list of its items"),
    "reversed": (reversed([1]), "", "a list of its items"),
    "chain": (itertools.chain([1]), "", "a list of its items"),
    "view of an ordered dict": (OrderedDict(a=1).keys(), "", "a list of its items"),
    "map": (map(str, []), "", "a list of its items"),
    "memoryview": (memoryview(b"x"), "", "bytes(value)"),
    "dict view": ({}.keys(), "", "a list of its items"),
    "contextvar": (__import__("contextvars").ContextVar("x"), "", "register"),
    "future": (asyncio.Future, "", "policy"),
    "simple namespace": (SimpleNamespace(a=1), "", "vars(value)"),
    "weakref": (__import__("weakref").ref(zoo.Node), "", "register"),
    "property": (property(lambda self: 1), "", "register"),
    "not implemented": (NotImplemented, "", "register"),
    "generic alias": (list[...], "", "pass the class alone"),
    "union": (int | str, "", "register"),
    "type var": (__import__("typing").TypeVar("T"), "", "register"),
    "code": (zoo.top.__code__, "", "register"),
    "mapping proxy": (vars(zoo.Node), "", "dict(value)"),
    "key of db": (type("Key", (), {"__module__": "google.appengine.api.datastore_types"})(), "", "str(key)"),
    "chain map": (collections.ChainMap({}), "", "policy"),
    "own reduce": (zoo.Reduced(), "", "__reduce__"),
    "own reduce_ex": (zoo.ReducedEx(), "", "__reduce_ex__"),
    "everything overridden": (zoo.Evil(), "", "__reduce__"),
    "evil metaclass": (zoo.OfEvilMeta(), "", "metaclass"),
    "class of an evil metaclass": (zoo.OfEvilMeta, "", "metaclass"),
    "new that needs arguments": (zoo.NewNeedsArgs(1), "", "__getnewargs__"),
    "hidden dict": (zoo.HiddenDict(), "", "__dict__"),
    "dict subclass as __dict__": (dict_subclass_dict(), "", "exactly a dict"),
    "attribute that is no name": (odd_namespace(), "[1]", "rename"),
    "attribute with $": (with_attribute(zoo.Node(), "$ref"), "{}", "rename"),
    "attribute with a lone surrogate": (with_attribute(zoo.Node(), "a\ud800"), "{}", "rename"),
    "attribute with a str subclass": (with_attribute(zoo.Node(), zoo.MyStr("a")), "{}", "rename"),
    "slot and dict entry of one name": (both_slot_and_dict(), "", "share a name"),
    "empty slot and dict entry of its name": (slot_in_dict(), "", "share a name"),
    "dict entry of a slot's name by its state": (zoo.StateOfASlot(), "", "share a name"),
    "shadowed slot": (shadowed_slot(), "", "policy"),
    "counter with an attribute": (with_attribute(Counter("ab")), "", "attributes"),
    "ordered dict with an attribute": (with_attribute(OrderedDict(a=1)), "", "attributes"),
    "network with an attribute": (with_attribute(ip_network("10.0.0.0/8")), "", "attributes"),
    "named tuple with an attribute": (
        with_attribute(type("P", (zoo.Point,), {"__module__": zoo.__name__})(1, 2)),
        "",
        None,
    ),
    "date subclass": (MyDate(2026, 1, 1), "", "register"),
    "ordered dict subclass": (MyOrdered(), "", "register"),
    "deque subclass": (MyDeque(), "", "register"),
    "dict subclass with a reducer": (SelfReduced(), "", "__reduce_ex__"),
    "zone of one's own": (datetime(2026, 1, 1, tzinfo=Zone()), ".tzinfo", "register"),
    "zone not cached": (ZoneInfo.no_cache("Europe/Paris"), "", "no_cache"),
    "enum made at run time": (tagged_enum(), "", "not"),
    "flags of a class with _missing_": (zoo.OwnMissing.A | zoo.OwnMissing.B, "", "name"),
    "integer of 4,301 digits": (10**4300, "", "digits"),
    "long pattern": (re.compile("a" * 1025), "", "1024"),
    "seventeen patterns": ([re.compile(f"a{i}") for i in range(17)], "[16]", "16"),
    "traceback": (raised(), "", "traceback"),
    "traceback of the cause": (raised_cause(), ".__cause__", "traceback"),
    "exception whose args were changed": (changed_args(), "", "args"),
    "os error of another class": (odd_os_error(), "", "args"),
    "group whose args were changed": (group_with_changed_list(), "", "args"),
    "exception hiding an attribute": (shadowing_exception(), "", "filename"),
    "exception with a reducer": (zoo.ReducedOops(), "", "__reduce__"),
    "cycle through exception args": (cycle_through_exception_args(), ".args[0][0]", "cycle"),
    "cycle through new args": (cycle_through_newargs(), "[1][0]", "cycle"),
    "cycle through a tuple subclass": (cycle_through_tuple_subclass(), "[0][0]", "cycle"),
    "hash that would run early": (early_hash(), ".other{0}", "hash"),
    "hash that would run early, inside": (early_hash_inside_a_tuple(), ".other{0}[1]", "hash"),
    "two objects with one __dict__": (shared_dict(), "[1]", "copy"),
    "vars() before its object": (vars_beside(), "[1]", "copy"),
    "vars() after its object": (vars_after(), "[1]", "copy"),
    "fields-set beside its model": (fields_set_beside(), "[1]", "copy"),
    "65 lists": (deep(lambda v: [v], 65), "[0]" * 63, "64"),
    "65 tuples": (deep(lambda v: (v,), 65), "[0]" * 63, "64"),
    "100,001 items": ([0] * 100_001, "", "100000"),
    "wide tree of shared tuples": (deep(lambda v: (v, v), 40), None, "100000"),
    "pickle of the class below": (zoo.Key("a", 1), "", "__reduce__"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_cannot_arrive_is_refused_with_its_path(name):
    value, path, word = REFUSED[name]
    zoo.RAN.clear()
    with pytest.raises(UnencodableArgument) as refusal:
        CODEC.encode(CallData(UNBOUND, [1, {"k": value}], {}), POLICY)
    ran, zoo.RAN[:] = list(zoo.RAN), []
    assert ran == []
    if path is not None and word is not None:
        assert refusal.value.path == "$.args[1].k" + path
    if word is not None:
        assert word in str(refusal.value)
    assert str(refusal.value).startswith(refusal.value.path)
    assert ";" in str(refusal.value), "a remedy"


@pytest.mark.parametrize("name", REFUSED)
def test_the_same_value_is_refused_as_keyword_argument_and_as_bound_object(name):
    value = REFUSED[name][0]
    with pytest.raises(UnencodableArgument, match=r"^\$\.kwargs\.when"):
        CODEC.encode(CallData(UNBOUND, [], {"when": value}), POLICY)
    with pytest.raises(UnencodableArgument, match=r"^\$\.bound"):
        CODEC.encode(CallData(value, [], {}), POLICY)


@pytest.mark.parametrize("keyword", ["$x", "$ref", "a\ud800", zoo.MyStr("a")])
def test_a_keyword_that_is_no_plain_name_is_refused(keyword):
    with pytest.raises(UnencodableArgument, match="rename"):
        CODEC.encode(CallData(UNBOUND, [], {keyword: 1}), POLICY)


def test_the_type_is_named():
    with pytest.raises(UnencodableArgument, match=re.escape("$.args[0] (_thread.lock)")):
        carry_one(threading.Lock())


def test_the_gate_refusal_is_the_cause():
    with pytest.raises(UnencodableArgument) as refusal:
        carry_one(NotAdmitted())
    assert isinstance(refusal.value.__cause__, NotDeferrable)


def test_a_hook_that_raises_is_an_unencodable_argument_with_the_cause():
    broken = zoo.StateHooks(1)
    del broken.n
    with pytest.raises(UnencodableArgument, match="__getstate__ raised AttributeError") as refusal:
        carry_one([broken])
    assert refusal.value.path == "$.args[0][0]"
    assert isinstance(refusal.value.__cause__, AttributeError)


def test_no_hook_of_a_class_runs_before_the_policy_admits_it():
    nobody = Policy()
    for value in (zoo.StateHooks(1), zoo.NewArgs(1, 2), zoo.GetOnly(1)):
        zoo.RAN.clear()
        with pytest.raises(UnencodableArgument, match="policy"):
            carry_one_with(nobody, value)


def carry_one_with(policy, value):
    return CODEC.encode(CallData(UNBOUND, [value], {}), policy)


def test_hash_and_eq_that_come_from_a_class_outside_the_policy_do_not_run():
    only_child = Policy("tests.zoo.values:Child")
    child = zoo.Child()
    carry_one_with(only_child, [child])
    with pytest.raises(UnencodableArgument, match="ByValue"):
        carry_one_with(only_child, {child})
    with pytest.raises(UnencodableArgument, match="ByValue"):
        carry_one_with(only_child, [child, {child: 1}])


def test_a_nearly_full_stack_is_an_unencodable_argument():
    codec = TypedCodec(limits=Limits(depth=400))
    value = deep(lambda v: (v,), 190)

    def descend(n):
        if n:
            return descend(n - 1)
        return codec.encode(CallData(UNBOUND, [value], {}), POLICY)

    frames = sys.getrecursionlimit() - len(__import__("inspect").stack()) - 100
    with pytest.raises(UnencodableArgument, match="less deep"):
        descend(frames)


def test_what_the_parser_could_not_read_is_refused_when_the_limit_of_depth_is_raised():
    codec = TypedCodec(limits=Limits(depth=150))
    with pytest.raises(UnencodableArgument, match="brackets"):
        codec.encode(CallData(UNBOUND, [deep(lambda v: {1: v}, 100)], {}), POLICY)
    codec.encode(CallData(UNBOUND, [deep(lambda v: (v,), 80)], {}), POLICY)


def test_the_limits_of_the_codec_hold():
    codec = TypedCodec(limits=Limits(depth=3, items=5, int_digits=20))
    encode = lambda v: codec.encode(CallData(UNBOUND, [v], {}), POLICY)
    encode([[[1]]])
    encode([1, 2, 3, 4])
    encode(10**19)
    for value in ([[[[1]]]], [1, 2, 3, 4, 5], 10**20, ((((1,),),),), {1: 2, 3: 4, 5: 6}):
        with pytest.raises(UnencodableArgument):
            encode(value)


@pytest.mark.parametrize(("cls", "name"), [
    (int, "int"), (itertools.count, "itertools.count"), (type(re.compile("")), "re.Pattern"), (date, "datetime.date"),
    (KeyError, "KeyError"), (deque, "collections.deque"),
])  # fmt: skip
def test_a_type_is_named_with_its_module_also_if_it_was_made_in_c(cls, name):
    assert type_name(cls) == name


@pytest.mark.parametrize("value", [itertools.count(), iter({}), NotImplemented], ids=lambda v: type_name(type(v)))
def test_the_first_remedy_is_to_pass_an_id(value):
    with pytest.raises(UnencodableArgument) as caught:
        carry_one(value)
    assert str(caught.value).index("pass an id") < str(caught.value).index("register the type")


@pytest.mark.parametrize("patterns", [(), ("tests.*",)])
def test_the_first_remedy_for_an_object_of_a_library_is_to_pass_an_id_too(patterns, monkeypatch):
    orm = pytest.importorskip("sqlalchemy.orm")
    base = type("Base", (orm.DeclarativeBase,), {"__module__": __name__})
    order = type("Order", (base,), {
        "__module__": __name__, "__tablename__": "orders", "__annotations__": {"id": orm.Mapped[int]},
        "id": orm.mapped_column(primary_key=True),
    })  # fmt: skip
    monkeypatch.setattr(sys.modules[__name__], "Order", order, raising=False)
    with pytest.raises(UnencodableArgument, match="; pass an id, or"):
        carry_one(order(id=1), _policy=Policy(*patterns))
    with pytest.raises(UnencodableArgument, match="; pass an id, or add 'sqlalchemy"):
        carry_one(orm.Session(), _policy=Policy(*patterns))


class Hidden:
    """As SQLModel: its slot is there, and the descriptor that would show it is not."""

    __slots__ = ("inside",)


del Hidden.inside


def test_slots_that_nothing_shows_are_said_to_be_that():
    cls = type("Below", (Hidden,), {"__module__": __name__})
    with pytest.raises(UnencodableArgument, match=r"Hidden has slots that nothing shows; pass an id"):
        CODEC.encode(CallData(UNBOUND, [cls()], {}), Policy(__name__))
