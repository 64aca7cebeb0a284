"""Values that the typed codec carries, each alone and inside every kind of container."""

import re
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from ipaddress import ip_address, ip_interface, ip_network
from operator import add
from pathlib import Path, PurePosixPath, PureWindowsPath
from uuid import uuid1, uuid4
from zoneinfo import ZoneInfo

import pytest

from safedefer.errors import UnencodableArgument
from tests.zoo import values as zoo
from tests.zoo.exactly import assert_exact, carry, carry_one, tree_of

PARIS = ZoneInfo("Europe/Paris")


def make(cls, **attributes):
    """An object without __init__."""
    obj = cls.__new__(cls)
    for name, value in attributes.items():
        setattr(obj, name, value)
    return obj


def unset_slot():
    return make(zoo.WithSlots, a=1)


def full_slots():
    obj = make(zoo.SlotsAndDict, a=1, b=[2], c=3, extra=4)
    obj._WithSlots__hidden = 5
    return obj


def made_tuple_state():
    obj = zoo.TupleState((1, 2))
    obj.rest = [1]
    return obj


def noted(error, *notes):
    for note in notes:
        error.add_note(note)
    return error


def chained():
    error = ValueError("outer")
    error.__cause__ = KeyError("inner")
    error.__context__ = RuntimeError("context")
    return error


def suppressed():
    error = ValueError("x")
    error.__suppress_context__ = True
    return error


def model():
    obj = zoo.Model(a=2, items=[1, (2,)], more={"$x": 1})
    obj._private = {1, 2}
    return obj


def cached():
    order = zoo.Order(1, [1, 2])
    assert order.size == 2
    return order


def counter_zero():
    return Counter({"a": 0, "b": -1, ("t",): 2.5})


ACCEPTED = {
    "none": None,
    "true": True,
    "int": 42,
    "largest plain int": 2**53 - 1,
    "smallest big int": 2**53,
    "negative big int": -(2**53),
    "huge int": 10**4299,
    "float": 0.1,
    "whole float": 1.0,
    "negative zero": -0.0,
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "tiny": 5e-324,
    "largest float": 1.7976931348623157e308,
    "str": "text",
    "empty": "",
    "unicode": "naïve 😀 \u2028 \0",
    "unnormalized": "e\u0301 é ﬁ",
    "lone surrogate": "a\ud800b",
    "two lone surrogates": "\ud83d\ude00",
    "dollar": "$ref",
    "list": [1, "a", None, [2.5, []]],
    "dict": {"a": 1, "": {"b": [True]}},
    "key order": {"z": 1, "a": 2, "m": 3},
    "tag-like dict": {"$tuple": [1]},
    "tag with sibling": {"$ref": 0, "a": 1},
    "dollar key": {"$": 1, "$$": 2},
    "marker of another library": {"__type__": "datetime", "py/object": "os.system", "__kombu_type__": 1},
    "claims-like": {"v": 1, "jti": "x", "call": {"kind": "function"}, "args": [], "kwargs": {}},
    "int keys": {1: "a", "1": "b", -2: "c"},
    "mixed keys": {None: 1, True: 2, 2.5: 3, (1, "a"): 4, b"x": 5, frozenset({1}): 6},
    "surrogate key": {"\udc00": 1},
    "tuple": (1, (2, ()), [3]),
    "set": {1, "a", (2,), frozenset({3})},
    "empty set": set(),
    "frozenset": frozenset({"a", 1.5}),
    "bytes": b"\x00\xff" * 3,
    "empty bytes": b"",
    "one byte": b"a",
    "two bytes": b"ab",
    "bytearray": bytearray(b"abc"),
    "complex": complex(-0.0, float("inf")),
    "naive datetime": datetime(2026, 11, 22, 7, 27, 19, 123),
    "datetime min": datetime.min,
    "datetime max": datetime.max,
    "aware datetime": datetime(2026, 7, 1, 12, tzinfo=PARIS),
    "fold": datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=PARIS),
    "naive fold": datetime(2026, 10, 25, 2, 30, fold=1),
    "utc": datetime(2026, 1, 1, tzinfo=UTC),
    "fixed offset": datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=-3, microseconds=1))),
    "named offset": datetime(2026, 1, 1, tzinfo=timezone(timedelta(0), "UTC")),
    "offset with an odd name": timezone(timedelta(hours=5, minutes=30), "\ud800$"),
    "date": date(1, 1, 1),
    "time": time(23, 59, 59, 999999, tzinfo=UTC, fold=1),
    "naive time": time(1, 2),
    "timedelta": timedelta(days=-1, microseconds=1),
    "timedelta max": timedelta.max,
    "timezone utc": UTC,
    "zoneinfo": PARIS,
    "zoneinfo with a sign": ZoneInfo("Etc/GMT+5"),
    "decimal": Decimal("1.10"),
    "decimal exponent": Decimal("1E+5"),
    "decimal negative zero": Decimal("-0E-3"),
    "decimal nan": Decimal("sNaN123"),
    "decimal -inf": Decimal("-Infinity"),
    "fraction": Fraction(-3, 4),
    "huge fraction": Fraction(1, 3**100),
    "uuid": uuid4(),
    "uuid1": uuid1(),
    "path": Path("a/../b"),
    "root path": PurePosixPath("//x"),
    "empty path": Path(),
    "windows path": PureWindowsPath("C:\\x\\y"),
    "path with surrogates": Path("a\udcff"),
    "ipv4": ip_address("10.0.0.1"),
    "ipv6": ip_address("fe80::1%eth0"),
    "network": ip_network("10.0.0.0/8"),
    "interface": ip_interface("10.1.2.3/8"),
    "range": range(10, 0, -2),
    "huge range": range(0, 2**70),
    "slice": slice(1, None, "x"),
    "ellipsis": ...,
    "enum": zoo.Color.RED,
    "enum alias": zoo.Color.CRIMSON,
    "enum with a tuple": zoo.Color.PAIR,
    "int enum": zoo.Level.HIGH,
    "str enum": zoo.Mode.FAST,
    "flag": zoo.Perm.R,
    "named combination": zoo.Perm.RW,
    "combination": zoo.Perm.R | zoo.Perm.X,
    "no flags": zoo.Perm(0),
    "int flag": zoo.IntPerm.R | zoo.IntPerm.W,
    "unknown bits": zoo.IntPerm(64 | 2),
    "nested enum": zoo.Outer.Choice.A,
    "namedtuple": zoo.Point(1, [2]),
    "typed namedtuple": zoo.Typed("n", ["t"]),
    "namedtuple with its own __new__": zoo.Point3(1, 2),
    "dataclass": zoo.Order(1, [2], parent=zoo.Order(3)),
    "dataclass with cached property": cached(),
    "frozen dataclass": zoo.Money(Decimal("1.5")),
    "slotted frozen": zoo.Slotted([1]),
    "slotted": zoo.SlottedMutable((1,), zoo.SlottedMutable(1)),
    "model": model(),
    "frozen model": zoo.FrozenModel(when=datetime(2026, 1, 1, tzinfo=UTC)),
    "model not validated": zoo.Model.model_construct(a="not an int"),
    "root model": zoo.Root([1, 2]),
    "object": make(zoo.Plain, x=1, y=[2]),
    "object without attributes": make(zoo.Plain),
    "unset slots": unset_slot(),
    "slots and dict": full_slots(),
    "nested class": zoo.Outer.Inner(1),
    "state hooks": zoo.StateHooks(3),
    "tuple state": made_tuple_state(),
    "new args": zoo.NewArgs(1, [2]),
    "new args ex": zoo.NewArgsEx(1, b=2),
    "list subclass": zoo.MyList([1, (2,)]),
    "dict subclass": zoo.MyDict({"a": 1, 2: 3}),
    "set subclass": zoo.MySet({1, 2}),
    "frozenset subclass": zoo.MyFrozen({1, 2}),
    "str subclass": zoo.MyStr("abc\ud800"),
    "float subclass": zoo.Celsius(1.0),
    "int subclass": zoo.MyInt(2**70),
    "bytes subclass": zoo.MyBytes(b"x"),
    "tuple subclass": zoo.MyTuple((1, [2])),
    "complex subclass": zoo.MyComplex(1, -0.0),
    "str subclass as a key": {zoo.MyStr("k"): 1, 2: zoo.MyStr("$")},
    "attrs slotted": zoo.AttrsSlotted(1, [2]),
    "attrs frozen": zoo.AttrsFrozen({"a": 1}),
    "attrs dict": zoo.AttrsDict((1,)),
    "function": zoo.top,
    "built-in": print,
    "built-in of operator": add,
    "class method": zoo.Worker.build,
    "method": zoo.Worker(3).work,
    "built-in method": [1, 2].append,
    "built-in method of a str": "x".upper,
    "class": zoo.Order,
    "nested class itself": zoo.Outer.Inner,
    "built-in class": list,
    "pattern": re.compile(r"a+(?P<n>b)", re.IGNORECASE | re.VERBOSE),
    "bytes pattern": re.compile(rb"\d"),
    "inline flags": re.compile("(?im)x"),
    "ordereddict": OrderedDict([("b", 1), ("a", [2])]),
    "defaultdict": defaultdict(list, {"a": [1]}),
    "defaultdict of a function": defaultdict(zoo.top, {1: 2}),
    "defaultdict of nothing": defaultdict(None, {1: 2}),
    "deque": deque([1, [2]], maxlen=5),
    "deque without maxlen": deque(),
    "counter": counter_zero(),
    "exception": ValueError("x", 1, (2,)),
    "exception without args": KeyError(),
    "os error": FileNotFoundError(2, "gone", "a", None, "b"),
    "plain os error": OSError("just text"),
    "unicode error": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    "import error": ImportError("no", name="mod", path="/p"),
    "stop iteration": StopIteration(5),
    "system exit": SystemExit(3),
    "syntax error": SyntaxError("bad", ("f.py", 1, 2, "text", 1, 3)),
    "name error": NameError("x", name="x"),
    "attribute error": AttributeError("x", name="x", obj=[1]),
    "exception with notes": noted(ValueError(1), "a note"),
    "exception group": ExceptionGroup("g", [ValueError(1), KeyError(2)]),
    "exception chain": chained(),
    "suppressed context": suppressed(),
    "own exception": zoo.Oops(5, detail=[1]),
    "own os error": zoo.FileOops(2, "x", "file"),
}
# Compared by attributes elsewhere, because their hooks drop some on purpose.
LOSSY_BY_DESIGN = {"state hooks"}


@pytest.fixture(autouse=True)
def nothing_of_the_class_runs(request):
    zoo.RAN.clear()
    yield
    zoo.RAN.clear()


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_value_arrives_exactly(name):
    value = ACCEPTED[name]
    zoo.RAN.clear()
    arrived = carry_one(value)
    assert zoo.RAN == []
    if name in LOSSY_BY_DESIGN:
        assert type(arrived) is type(value)
        assert arrived == value
    else:
        assert_exact(value, arrived)


WRAPPERS = {
    "list": lambda v: [v, 1],
    "dict": lambda v: {"k": v},
    "int-key dict": lambda v: {1: v},
    "tuple": lambda v: (v, v),
    "deque": lambda v: deque([v]),
    "defaultdict": lambda v: defaultdict(None, {1: v}),
    "ordereddict": lambda v: OrderedDict(a=v),
    "namedtuple": lambda v: zoo.Point(v, v),
    "dataclass": lambda v: zoo.Money(v, [v]),
    "slots": lambda v: zoo.SlottedMutable(v),
    "object": lambda v: make(zoo.Plain, v=v),
    "attrs": lambda v: zoo.AttrsSlotted(v),
    "model": lambda v: zoo.FrozenModel.model_construct(a=v),
    "exception": lambda v: ValueError(v),
    "slice": lambda v: slice(v),
    "list subclass": lambda v: zoo.MyList([v]),
    "dict subclass": lambda v: zoo.MyDict(a=v),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_value_arrives_inside_every_container(wrapper):
    for name, value in ACCEPTED.items():
        if name not in LOSSY_BY_DESIGN:
            wrapped = WRAPPERS[wrapper](value)
            assert_exact(wrapped, carry_one(wrapped))


def test_many_values_travel_in_one_call_by_position_and_by_name():
    values = [value for name, value in ACCEPTED.items() if name not in LOSSY_BY_DESIGN]
    named = {f"k{i}": value for i, value in enumerate(values)}
    call = carry(*values, **named)
    assert_exact([values, named], [call.args, call.kwargs])


def test_the_bound_object_is_shared_with_the_arguments():
    worker = zoo.Worker(1)
    worker.items = [worker]
    call = carry(worker, worker.items, _bound=worker)
    assert call.args[0] is call.bound
    assert call.args[1] is call.bound.items
    assert call.bound.items[0] is call.bound


def test_a_falsy_bound_object_arrives():
    assert carry(1, _bound=[]).bound == []
    assert carry(1, _bound="").bound == ""


def test_what_was_one_list_arrives_as_one_across_arguments():
    shared = [1]
    call = carry(shared, {"a": shared}, x=(shared,))
    assert call.args[0] is call.args[1]["a"] is call.kwargs["x"][0]


def test_what_were_two_equal_lists_arrive_as_two():
    first, second = carry([1], [1]).args
    assert first == second
    assert first is not second


def cycle_list():
    a = [1]
    a.append(a)
    return a


def cycle_dict():
    a = {}
    a["self"] = a
    a[1] = a
    return a


def cycle_object():
    a = make(zoo.Node)
    a.me, a.list = a, [a]
    return a


def cycle_through_tuple():
    a = [1]
    a.append((a, (a,)))
    return a


def cycle_of_dataclasses():
    a, b = zoo.Chain(), zoo.Chain()
    a.next, b.next = b, a
    return a


def cycle_through_set_member():
    a = make(zoo.Node)
    a.home = {a}
    return a


def cycle_through_dict_key():
    a = make(zoo.Node)
    a.home = {a: 1, (a,): 2}
    return a


def cycle_from_the_set():
    node = make(zoo.Node)
    home = {node}
    node.home = home
    return home


def cycle_through_frozenset():
    node = make(zoo.Node)
    node.home = frozenset({node})
    return node


def cycle_through_deque():
    a = deque()
    a.append([a])
    return a


def cycle_through_model():
    a = zoo.Model()
    a.items = [a]
    return a


def cycle_through_exception():
    a = ValueError("x")
    a.me = [a]
    return a


def cycle_through_list_subclass():
    a = zoo.MyList()
    a.append(a)
    a.me = a
    return a


def cycle_through_a_method():
    worker = zoo.Worker()
    worker.callback = worker.work
    return worker


CYCLES = {name: make for name, make in globals().items() if name.startswith("cycle_")}


@pytest.mark.parametrize("name", CYCLES)
def test_a_cycle_arrives_as_a_cycle(name):
    value = CYCLES[name]()
    assert_exact(value, carry_one(value))


def test_a_key_with_a_hash_of_its_own_arrives_in_a_set_and_as_a_key():
    key = zoo.ByValue("k", [1])
    (arrived,) = carry_one({key})
    assert arrived == key
    assert arrived.other == [1]
    keyed, as_list = carry({key: 1}, [key]).args
    assert next(iter(keyed)) is as_list[0]


def test_sixty_nested_dataclasses_arrive():
    top = None
    for _ in range(60):
        top = zoo.Chain(top)
    assert_exact(top, carry_one(top))


def test_what_stands_in_the_arguments_and_in_the_state_counts_twice_at_each_level():
    """So do its parts, and theirs: sixteen levels are 2**16 values."""
    value = 1
    for _ in range(14):
        value = [zoo.NewArgs(value, 1)]
    assert_exact(value, carry_one(value))
    with pytest.raises(UnencodableArgument, match="100000 values"):
        carry_one([zoo.NewArgs([zoo.NewArgs([zoo.NewArgs(value, 1)], 1)], 1)])


@pytest.mark.parametrize(
    "wrap",
    [
        zoo.Chain, zoo.Slotted, zoo.AttrsFrozen, lambda v: make(zoo.Node, v=v), lambda v: {1: v}, lambda v: (v,),
        lambda v: defaultdict(None, {"a": v}), lambda v: zoo.Model.model_construct(a=v), lambda v: ValueError(v),
        lambda v: zoo.MyDict(a=v), lambda v: zoo.TupleState(v),
    ],
)  # fmt: skip
def test_sixty_two_levels_of_any_tag_fit_the_parser(wrap):
    value = 1
    for _ in range(31):
        value = wrap(value)
    carry_one(value)


def test_a_set_of_several_nans_keeps_them():
    nans = {float("nan"), float("nan")}
    assert len(carry_one(nans)) == 2


def test_getstate_without_setstate_restores_the_dict_that_it_returned():
    arrived = carry_one(zoo.GetOnly(3))
    assert vars(arrived) == {"n": 3}


def test_setstate_without_getstate_gets_the_default_state():
    arrived = carry_one(zoo.SetOnly(3))
    assert vars(arrived) == {"n": 3, "was_set": True}


def test_a_class_with_a_bare_new_is_made_by_it():
    arrived = carry_one(zoo.BareNew())
    assert vars(arrived) == {"made_by": "new"}


def test_a_flag_with_missing_of_its_own_travels_by_name_only():
    assert carry_one(zoo.OwnMissing.A) is zoo.OwnMissing.A


@pytest.mark.parametrize("value", [{"a": [1, 2.5, "x", None, True]}, [[["é"]]], {}, [{}, {}]])
def test_plain_values_are_returned_as_they_are(value):
    assert tree_of(value) is value


def test_every_core_tag_is_in_the_table():
    """The table above would be a poor one if a tag were missing from it."""
    from safedefer.codecs.registry import CORE_TAGS

    seen = set()

    def walk(tree):
        if type(tree) is dict:
            seen.update(k for k in tree if k[:1] == "$")
            for each in tree.values():
                walk(each)
        elif type(tree) is list:
            for each in tree:
                walk(each)

    shared = []
    walk(tree_of([shared, shared, *ACCEPTED.values()]))
    assert CORE_TAGS <= seen
    assert seen - CORE_TAGS == {"$attrs"}
