"""Attacks on the pickle fallback by a holder of a key that may sign pickles, and what it carries honestly."""

import builtins
import copyreg
import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
from base64 import b64encode
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from ipaddress import ip_address
from pathlib import Path, PurePosixPath
from uuid import uuid4
from zoneinfo import ZoneInfo

import cloudpickle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safedefer.codecs.pickled import PickledCodec
from safedefer.codecs.typed import CallData
from safedefer.errors import InvalidArguments, PolicyViolation, RejectedTask, UnencodableArgument, UnresolvableCallable
from safedefer.options import Limits
from safedefer.policy import Policy
from safedefer.refs import UNBOUND
from tests.zoo import values as zoo
from tests.zoo.exactly import assert_exact


def no_items():
    """What a pickle should not call."""
    zoo.RAN.append("called")
    return ()


POLICY = Policy("tests.zoo.values", f"{__name__}:no_items", "builtins:list.__init__", "builtins:str.__init__")
CODEC = PickledCodec()
RUNS_CODE = PickledCodec(by_value_runs_code=True)
STAMP = [f"{sys.version_info.major}.{sys.version_info.minor}", cloudpickle.__version__]


def carry(*args, codec=CODEC, policy=POLICY, bound=UNBOUND, **kwargs):
    sent = codec.encode(CallData(bound, args, kwargs), policy)
    return codec.decode(sent, policy, text=b"")


def load(data, codec=CODEC, policy=POLICY, stamp=None):
    """Decode bytes that somebody else pickled, in the shape of a call."""
    return codec.decode(CallData(UNBOUND, [b64encode(data).decode(), *(stamp or STAMP)], {}), policy, text=b"")


def call_of(value):
    return ((), (value,), {})


def text(value):
    raw = value.encode()
    return pickle.SHORT_BINUNICODE + bytes([len(raw)]) + raw


def name(module, qualname):
    return text(module) + text(qualname) + pickle.STACK_GLOBAL


def wrap(body):
    """The call ((), (body,), {}) around opcodes that leave one value."""
    return b"\x80\x05)" + body + pickle.TUPLE1 + pickle.EMPTY_DICT + pickle.TUPLE3 + b"."


def call(callee, *args):
    return callee + b"(" + b"".join(args) + b"t" + pickle.REDUCE


def build(target, state):
    return target + state + pickle.BUILD


V = "tests.zoo.values"
NONE = pickle.NONE
RANGE = name("builtins", "range") + b"(" + b"J\xff\xff\x00\x00" + b"t" + pickle.REDUCE
NODE = name("tests.zoo.values", "Node") + b")" + pickle.NEWOBJ
OFFSETS = pickle.LONG1 + b"\x06" + b"\x00" * 5 + b"\xf0" + pickle.LONG1 + b"\x06" + b"\x01" + b"\x00" * 4 + b"\xf0"


def state(attribute, value):
    return b"}" + text(attribute) + value + b"s"


def own(attribute, function=(V, "top")):
    """An object of an admitted class with a function of the policy as an attribute."""
    return build(NODE, state(attribute, name(*function)))


SLOT_STATE = NONE + b"}" + text("__doc__") + text("owned") + b"s" + pickle.TUPLE2
DICT_STATE = b"}" + text("__doc__") + text("owned") + b"s"

ATTACKS = {
    # reaching out of the policy
    "os.system": wrap(call(name("os", "system"), text("touch /tmp/owned"))),
    "posix.system": wrap(call(name("posix", "system"), text("touch /tmp/owned"))),
    "builtins.eval": wrap(call(name("builtins", "eval"), text("1"))),
    "builtins.getattr": wrap(call(name("builtins", "getattr"), NONE, text("__class__"))),
    "builtins.__import__": wrap(call(name("builtins", "__import__"), text("os"))),
    "subprocess.Popen": wrap(call(name("subprocess", "Popen"), text("true"))),
    "operator.methodcaller": wrap(call(name("operator", "methodcaller"), text("x"))),
    "functools.partial": wrap(call(name("functools", "partial"), name(V, "top"))),
    "pickle.loads": wrap(call(name("pickle", "loads"), b"C\x01.")),
    "cloudpickle": wrap(call(name("cloudpickle.cloudpickle", "_make_empty_cell"))),
    "types.CodeType": wrap(name("types", "CodeType")),
    "types.FunctionType": wrap(name("types", "FunctionType")),
    "copyreg.__newobj__": wrap(name("copyreg", "__newobj__")),
    "copyreg.add_extension": wrap(name("copyreg", "add_extension")),
    "copyreg.pickle": wrap(name("copyreg", "pickle")),
    "importlib": wrap(call(name("importlib", "import_module"), text("antigravity"))),
    "import of another module": wrap(name("antigravity", "x")),
    "dotted name": wrap(name(V, "Outer.Inner")),
    "dotted name to a global": wrap(name(V, "top.__globals__")),
    "dotted name to a module": wrap(name(V, "dataclasses.sys")),
    "dotted method": wrap(name(V, "Worker.build")),
    "re-exported module": wrap(name(V, "dataclasses")),
    "re-exported class": wrap(name(V, "BaseModel")),
    "private global": wrap(name(V, "__builtins__")),
    "a list of the module": wrap(name(V, "RAN")),
    "name with a zero": wrap(name("os\0", "system")),
    "name with a space": wrap(name(" os", "system")),
    "name that is bytes": wrap(b"C\x02os" + text("system") + pickle.STACK_GLOBAL),
    "full-width module": wrap(name("ｏｓ", "system")),
    "gadget of a harmless type": wrap(name("builtins", "str.format")),
    "bound method of a harmless type": wrap(name("builtins", "dict.fromkeys")),
    "zoneinfo from a file": wrap(name("zoneinfo", "ZoneInfo.from_file")),
    # calling and changing
    "calling an admitted function": wrap(call(name(V, "top"), text("x"))),
    "calling a class that is no callee": wrap(call(name("builtins", "type"), text("x"))),
    "calling a value": wrap(call(b"]", text("x"))),
    "newobj of a function": wrap(name(V, "top") + b")" + pickle.NEWOBJ),
    "newobj of a value": wrap(b"]" + b")" + pickle.NEWOBJ),
    "newobj_ex of a function": wrap(name(V, "top") + b")}" + pickle.NEWOBJ_EX),
    "build on a class, slots": wrap(build(name(V, "Node"), SLOT_STATE)),
    "build on a class, dict": wrap(build(name(V, "Node"), DICT_STATE)),
    "build on a function, slots": wrap(build(name(V, "top"), SLOT_STATE)),
    "build on a function, dict": wrap(build(name(V, "top"), DICT_STATE)),
    "build on a class through the memo": wrap(
        name(V, "Node") + pickle.MEMOIZE + b"0" + b"h\x00" + SLOT_STATE + pickle.BUILD
    ),
    "build on a harmless class": wrap(build(name("collections", "Counter"), SLOT_STATE)),
    "build on a built-in": wrap(build(name("builtins", "dict"), SLOT_STATE)),
    "setitem on a class": wrap(name(V, "Node") + text("a") + text("b") + b"s"),
    "append to a class": wrap(name(V, "Node") + text("a") + b"a"),
    "add items to a class": wrap(name(V, "Node") + b"(" + text("a") + pickle.ADDITEMS),
    "set items of a class": wrap(name(V, "Node") + b"(" + text("a") + text("b") + b"u"),
    "append items to a function": wrap(name(V, "top") + b"(" + text("a") + b"e"),
    "bytes of any size": wrap(call(name("builtins", "bytes"), pickle.LONG1 + b"\x06" + b"\x00" * 5 + b"\x01")),
    "bytearray of any size": wrap(call(name("builtins", "bytearray"), pickle.LONG1 + b"\x06" + b"\x00" * 5 + b"\x01")),
    "bytes subclass of any size": wrap(
        name(V, "MyBytes") + pickle.LONG1 + b"\x06" + b"\x00" * 5 + b"\x01" + pickle.TUPLE1 + pickle.NEWOBJ
    ),
    "list of a range": wrap(call(name("builtins", "list"), call(name("builtins", "range"), b"J\xff\xff\xff\x7f"))),
    "deque of a range": wrap(call(name("collections", "deque"), call(name("builtins", "range"), b"J\xff\xff\xff\x7f"))),
    "fraction of a text": wrap(call(name("fractions", "Fraction"), text("1e999999999"))),
    "reconstructor": wrap(name("copyreg", "_reconstructor")),
    # opcodes
    "extension": wrap(pickle.EXT1 + b"\x01"),
    "extension 4": wrap(pickle.EXT4 + struct.pack("<i", 1)),
    "persistent id": wrap(pickle.PERSID + b"x\n"),
    "binary persistent id": wrap(text("x") + pickle.BINPERSID),
    "inst": wrap(b"(" + pickle.INST + b"os\nsystem\n"),
    "obj": wrap(b"(" + name(V, "Node") + pickle.OBJ),
    "global by lines": wrap(b"cos\nsystem\n"),
    "admitted global by lines": wrap(b"c" + V.encode() + b"\nNode\n"),
    "next buffer": wrap(pickle.NEXT_BUFFER),
    "read-only buffer": wrap(pickle.NEXT_BUFFER + pickle.READONLY_BUFFER),
    "memo index": wrap(b"]" + pickle.LONG_BINPUT + struct.pack("<I", 2**31)),
    "memo by text": wrap(b"]" + b"p999999999\n"),
    "memo read before written": wrap(b"h\x05"),
    "dup": wrap(b"]2" + pickle.TUPLE2),
    "integer as text": wrap(b"I" + b"9" * 5000 + b"\n"),
    "long as text": wrap(b"L" + b"9" * 100_000 + b"L\n"),
    "string escapes": wrap(b"S'a'\n"),
    "trailing bytes": wrap(b"]") + b"x",
    "a second pickle": wrap(b"]") + wrap(b"]"),
    "empty": b"",
    "no stop": wrap(b"]")[:-1],
    "stack underflow": b"\x80\x05t.",
    "tuple of nothing": b"\x80\x05\x87.",
    "mark underflow": b"\x80\x05)a.",
    "length beyond the end": b"\x80\x05" + pickle.BINBYTES8 + struct.pack("<Q", 2**60) + b"x.",
    "frame beyond the end": b"\x80\x05" + pickle.FRAME + struct.pack("<Q", 2**60) + b").",
    "another protocol": b"\x80\x63).",
    "nested tuples": wrap(b")" + pickle.TUPLE1 * 100),
    "nested lists": wrap(b"]" * 100 + b"a" * 99),
    "a million values": wrap(b"(" + pickle.NONE * 500_000 + b"l"),
    "state of an enum's member": wrap(build(call(name(V, "Color"), pickle.BININT1 + b"\x01"), DICT_STATE)),
    "state of a member of an integer enum": wrap(build(call(name(V, "Level"), pickle.BININT1 + b"\x01"), DICT_STATE)),
    "a deque of a network": wrap(call(name("collections", "deque"), call(name("ipaddress", "IPv4Network"), text("10.0.0.0/8")))),
    "a counter of a network": wrap(call(name("collections", "Counter"), call(name("ipaddress", "IPv6Network"), text("::/0")))),
    "an ordered dict of a network, as a keyword": wrap(
        name("collections", "OrderedDict") + b")" + b"}" + text("a") + call(name("ipaddress", "IPv4Network"), text("10.0.0.0/8")) + b"s" + pickle.NEWOBJ_EX
        + pickle.POP + call(name("collections", "deque"), call(name("ipaddress", "IPv4Network"), text("10.0.0.0/8")))
    ),
    "a __setstate__ of the object": wrap(build(own("__setstate__"), DICT_STATE)),
    "an append of the object": wrap(own("append") + text("a") + b"a"),
    "an append of the object, for several": wrap(own("append") + b"(" + text("a") + b"e"),
    "an extend of the object": wrap(own("extend") + b"(" + text("a") + b"e"),
    "an add of the object": wrap(own("add") + b"(" + text("a") + pickle.ADDITEMS),
    "a state with items of its own": wrap(build(NODE, own("items", (__name__, "no_items")))),
    "slots with items of their own": wrap(build(NODE, NONE + own("items", (__name__, "no_items")) + pickle.TUPLE2)),
    "another class": wrap(build(NODE, NONE + state("__class__", name(V, "Plain")) + pickle.TUPLE2)),
    "arguments of an exception of any size": wrap(build(call(name("builtins", "ValueError")), state("args", RANGE))),
    "arguments of an exception of ours of any size": wrap(build(name(V, "Oops") + b")" + pickle.NEWOBJ, state("args", RANGE))),
    "offsets of a text error": wrap(call(name("builtins", "UnicodeDecodeError"), text("utf8"), b"C\x01a", OFFSETS, text("x"))),
    "offsets of a text error, later": wrap(
        build(call(name("builtins", "UnicodeEncodeError"), text("utf8"), text("a"), b"K\x00", b"K\x01", text("x")), state("end", b"M\xff\xff"))
    ),
    "a text error that was not begun": wrap(name("builtins", "UnicodeTranslateError") + b")" + pickle.NEWOBJ),
    # another shape
    "no call": pickle.dumps([], 5),
    "two": pickle.dumps(((), ()), 5),
    "args as a list": pickle.dumps(((), [], {}), 5),
    "kwargs that are no names": pickle.dumps(((), (), {1: 2}), 5),
    "an unannounced bound object": pickle.dumps(((1,), (), {}), 5),
    "kwargs as a counter": pickle.dumps(((), (), Counter()), 5),
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_owned():
    zoo.RAN.clear()
    doc, node_doc, top_doc, counter_doc = copyreg.__doc__, zoo.Node.__doc__, zoo.top.__doc__, Counter.__doc__
    yield
    assert zoo.RAN == []
    assert not Path("/tmp/owned").exists()
    assert (copyreg.__doc__, zoo.Node.__doc__, zoo.top.__doc__, Counter.__doc__) == (
        doc,
        node_doc,
        top_doc,
        counter_doc,
    )
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_and_does_nothing(attack):
    with pytest.raises((InvalidArguments, PolicyViolation, UnresolvableCallable)):
        load(ATTACKS[attack])


@pytest.mark.parametrize(
    "attack", [a for a in ATTACKS if "global" not in a and ("os." in a or a in ("extension", "empty"))]
)
def test_without_the_codec_these_would_have_worked_or_failed_alike(attack):
    """The table is of real pickles: what it names is what pickle would find."""
    try:
        pickletools.dis(ATTACKS[attack], out=io.StringIO())
    except ValueError:
        assert attack in ("empty", "extension")


class Exploit:
    def __init__(self, func, *args):
        self.reduced = (func, args)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_classic_exploit_is_refused_in_every_protocol(protocol):
    data = pickle.dumps(call_of(Exploit(os.system, "touch /tmp/owned")), protocol)
    with pytest.raises((InvalidArguments, PolicyViolation)):
        load(data)


@pytest.mark.parametrize(
    "exploit",
    [
        Exploit(eval, "zoo"), Exploit(exec, "1"), Exploit(getattr, zoo.Node, "x"), Exploit(setattr, zoo.Node, "x", 1),
        Exploit(subprocess.check_output, ["true"]), Exploit(builtins.open, "/tmp/owned", "w"), Exploit(map, eval, ["1"]),
        Exploit(zoo.top, 1), Exploit(zoo.Worker.build, 1), Exploit(type, "X", (), {}), Exploit(__import__, "os"),
    ],
)  # fmt: skip
def test_our_own_encoder_refuses_to_write_an_exploit_and_the_decoder_to_read_one(exploit):
    if exploit.reduced[0] is not zoo.top:
        with pytest.raises(UnencodableArgument):
            CODEC.encode(CallData(UNBOUND, [exploit], {}), POLICY)
    with pytest.raises(RejectedTask):
        load(pickle.dumps(call_of(exploit), 5))


def test_a_class_that_inherits_from_a_gadget_is_not_called():
    policy = Policy("tests.adversarial.test_pickled")
    with pytest.raises(PolicyViolation):
        load(wrap(call(name(__name__, "MyPopen"), text("true"))), policy=policy)


class MyPopen(subprocess.Popen):
    pass


def test_a_token_imports_nothing_outside_the_policy():
    before = set(sys.modules)
    with pytest.raises(PolicyViolation):
        load(wrap(name("this", "s")))
    assert set(sys.modules) - before <= set(sys.modules) - {"this"}
    assert "this" not in sys.modules


HONEST = {
    "plain": {"a": [1, 2.5, None, "x", b"y", (1,), {1, 2}, frozenset({3})]},
    "big": 2**100,
    "surrogate": "\ud800",
    "datetime": datetime(2026, 1, 1, tzinfo=UTC),
    "zone": datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/Paris")),
    "offset": timezone(timedelta(hours=1), "x"),
    "date": date(2026, 1, 1),
    "time": time(1, 2, 3, 4),
    "timedelta": timedelta(1),
    "decimal": Decimal("1.10"),
    "fraction": Fraction(1, 3),
    "uuid": uuid4(),
    "path": PurePosixPath("a/b"),
    "ip": ip_address("10.0.0.1"),
    "complex": 1j,
    "range": range(3),
    "slice": slice(1, 2),
    "ellipsis": ...,
    "bytearray": bytearray(b"x"),
    "ordered": OrderedDict(a=1),
    "default": defaultdict(list, a=[1]),
    "deque": deque([1], 3),
    "counter": Counter("aab"),
    "enum": zoo.Color.RED,
    "flag": zoo.Perm.R,
    "dataclass": zoo.Order(1, [2]),
    "slotted": zoo.Slotted(1),
    "namedtuple": zoo.Point(1, 2),
    "model": zoo.Model(a=2, more=1),
    "attrs": zoo.AttrsSlotted(1),
    "object": zoo.Node(),
    "list subclass": zoo.MyList([1]),
    "str subclass": zoo.MyStr("x"),
    "exception": ValueError("x"),
    "class": zoo.Order,
    "function": zoo.top,
    "hooks": zoo.TupleState(1),
}


@pytest.mark.parametrize("value", HONEST)
def test_ordinary_values_travel(value):
    (arrived,) = carry(HONEST[value]).args
    zoo.RAN.clear()
    if value != "hooks":
        assert_exact(HONEST[value], arrived)
    else:
        assert arrived.a == 1


def test_what_typed_refuses_may_travel_as_a_pickle_of_an_admitted_class():
    key = zoo.Key("a", 1)
    (arrived,) = carry(key).args
    assert arrived == key
    assert zoo.RAN == ["Key.__reduce__"]
    zoo.RAN.clear()


def test_sharing_holds_over_bound_args_and_kwargs():
    worker, shared = zoo.Worker(1), []
    call = carry(shared, worker, bound=worker, x=shared)
    assert call.bound is call.args[1]
    assert call.args[0] is call.kwargs["x"]


def test_the_wire_has_one_shape():
    sent = CODEC.encode(CallData(zoo.Worker(1), [1], {"a": 2}), POLICY)
    assert sent.bound == {"$pickle": 0}
    assert sent.kwargs == {}
    assert sent.args[1:] == STAMP
    assert CODEC.encode(CallData(UNBOUND, [1], {}), POLICY).bound is UNBOUND


GOOD = b64encode(pickle.dumps(((), (), {}), 5)).decode()


@pytest.mark.parametrize(
    "sent",
    [
        CallData(UNBOUND, [], {}), CallData(UNBOUND, [GOOD], {}), CallData(UNBOUND, [GOOD, *STAMP, 1], {}),
        CallData(UNBOUND, [1, *STAMP], {}), CallData(UNBOUND, [GOOD, *STAMP], {"a": 1}), CallData(1, [GOOD, *STAMP], {}),
        CallData({"$pickle": 0}, [GOOD, *STAMP], {}), CallData({"$pickle": False}, [GOOD, *STAMP], {}),
        CallData({"$pickle": 1}, [GOOD, *STAMP], {}), CallData(UNBOUND, [GOOD + "\n", *STAMP], {}),
        CallData(UNBOUND, [GOOD.rstrip("=") + "é", *STAMP], {}), CallData(UNBOUND, [" " + GOOD, *STAMP], {}),
    ],
)  # fmt: skip
def test_another_shape_is_refused(sent):
    with pytest.raises(InvalidArguments):
        CODEC.decode(sent, POLICY, text=b"")


@pytest.mark.parametrize("stamp", [["2.7", STAMP[1]], [STAMP[0], "0.0.1"], [STAMP[0] + " ", STAMP[1]]])
def test_another_version_is_a_clear_error_and_is_tried_again(stamp):
    with pytest.raises(UnresolvableCallable, match="same versions"):
        load(pickle.dumps(((), (), {}), 5), stamp=stamp)


def lambdas():
    return lambda x: x + 1


def test_functions_by_value_need_the_switch_at_both_ends():
    with pytest.raises(UnencodableArgument):
        CODEC.encode(CallData(UNBOUND, [lambdas()], {}), POLICY)
    sent = RUNS_CODE.encode(CallData(UNBOUND, [lambdas()], {}), POLICY)
    with pytest.raises(RejectedTask):
        CODEC.decode(sent, POLICY, text=b"")
    assert RUNS_CODE.decode(sent, POLICY, text=b"").args[0](1) == 2


def test_the_limits_hold_at_both_ends():
    small = PickledCodec(limits=Limits(token_bytes=300, items=20, depth=4))
    for value in ("x" * 400, [0] * 200, [[[[[[]]]]]]):
        with pytest.raises(UnencodableArgument):
            small.encode(CallData(UNBOUND, [value], {}), POLICY)
        with pytest.raises(InvalidArguments):
            load(pickle.dumps(call_of(value), 5), codec=small)


@pytest.mark.parametrize(
    "value",
    [Path(os.devnull).open(), (i for i in ()), sys, zoo.Outer.Inner(1), subprocess.Popen, eval],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_found_by_name_or_pickled_is_refused_when_deferring(value):
    with pytest.raises(UnencodableArgument):
        CODEC.encode(CallData(UNBOUND, [value], {}), POLICY)


def test_a_class_outside_the_policy_is_refused_when_deferring():
    with pytest.raises(UnencodableArgument, match="policy"):
        CODEC.encode(CallData(UNBOUND, [zoo.Typed("n", [])], {}), Policy("tests.zoo.values:Money"))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_mutated_pickle_raises_a_rejected_task_or_decodes(data):
    good = data.draw(st.sampled_from([pickle.dumps(call_of(v), 5) for n, v in HONEST.items() if n != "zone"]))
    position = data.draw(st.integers(0, len(good) - 1))
    patch = data.draw(st.binary(min_size=0, max_size=3))
    mutated = good[:position] + patch + good[position + data.draw(st.integers(0, 3)) :]
    try:
        load(mutated)
    except (InvalidArguments, PolicyViolation, UnresolvableCallable):
        pass
    finally:
        zoo.RAN.clear()


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.sampled_from([bytes([ord(op.code)]) for op in pickletools.opcodes]) | st.binary(max_size=4), max_size=30
    )
)
def test_random_opcodes_raise_a_rejected_task_or_decode(opcodes):
    try:
        load(b"\x80\x05" + b"".join(opcodes) + b".")
    except (InvalidArguments, PolicyViolation, UnresolvableCallable):
        pass
