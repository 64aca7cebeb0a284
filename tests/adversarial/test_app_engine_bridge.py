"""The bridge for App Engine's pickled tasks: it reads what ``deferred`` wrote, and runs nothing of what others write."""

import copyreg
import datetime
import functools
import os
import pickle
import pickletools
import subprocess
import sys
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from decimal import Decimal
from types import FunctionType, ModuleType

import pytest

from safedefer import ConfigurationError, Error, InvalidArguments, Policy, PolicyViolation
from safedefer.migrate.app_engine import AppEngineBridge
from tests.unit.apps import make_app

HOME = "bridged_tasks"
UTC = datetime.UTC
UNTIL = datetime.datetime(2027, 1, 31, tzinfo=UTC)
NOW = UNTIL.timestamp() - 86_400
CALLS = []


def work(*args, **kwargs):
    CALLS.append((args, kwargs))


class Plain:
    def __init__(self, to=None):
        self.to = to

    def send(self, text):
        CALLS.append((self.to, text))

    @classmethod
    def announce(cls, text): ...

    def __call__(self, *args): ...


@dataclass
class Point:
    x: int
    y: int


class Slotted:
    __slots__ = ("a",)


class WithState:
    def __setstate__(self, state):
        CALLS.append("setstate")


class Hashed:
    def __hash__(self):
        CALLS.append("hash")
        return 1

    def __eq__(self, other):
        CALLS.append("eq")
        return True


class Reduced:
    def __reduce__(self):
        return os.system, ("exit 1",)


class Dying:
    def __del__(self):
        CALLS.append("del")


class NewRuns:
    def __new__(cls):
        CALLS.append("new")
        return object.__new__(cls)


def outside(): ...


def invoke_member(obj, membername, *args, **kwargs): ...


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """Make the module of tasks, and the name of App Engine's that pickles have."""
    CALLS.clear()
    module, sdk = ModuleType(HOME), ModuleType("google.appengine.ext.deferred.deferred")
    for each in (work, Plain, Point, Slotted, WithState, Hashed, Reduced, Dying, NewRuns):
        monkeypatch.setattr(each, "__module__", HOME)
        setattr(module, each.__name__, each)
        for member in vars(each).values():
            if type(member) in {FunctionType, classmethod}:
                monkeypatch.setattr(getattr(member, "__func__", member), "__module__", HOME)
    for name in ("google.appengine", "google.appengine.ext", "google.appengine.ext.deferred"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(invoke_member, "__module__", sdk.__name__)
    sdk.invoke_member = invoke_member
    monkeypatch.setitem(sys.modules, HOME, module)
    monkeypatch.setitem(sys.modules, sdk.__name__, sdk)
    yield module
    CALLS.clear()


@pytest.fixture
def app():
    return make_app(policy=Policy(HOME))


@pytest.fixture
def bridge(app):
    return AppEngineBridge(app, until=UNTIL, clock=lambda: NOW)


def serialized(obj, *args, protocol=2, **kwargs):
    """Do what App Engine's ``serialize`` does."""
    if hasattr(obj, "__self__") and hasattr(obj, "__func__"):
        return pickle.dumps((invoke_member, (obj.__self__, obj.__func__.__name__, *args), kwargs), protocol)
    return pickle.dumps((obj, args, kwargs), protocol)


def spelt(body):
    """Return a task whose one argument is made by opcodes."""
    return b"\x80\x02c" + f"{HOME}\nwork\n".encode() + body + b"\x85}\x87."


VALUES = [
    None, True, 1, -5, 2**70, 1.5, "é", b"\x00\xff", [1, [2]], (1, (2,), ()), {"a": {1: 2}}, {1, 2}, frozenset({"x"}), bytearray(b"ab"), 1 + 2j,
    datetime.datetime(2026, 1, 2, 3, 4, 5, 6), datetime.datetime(2026, 1, 2, tzinfo=UTC), datetime.date(2026, 1, 2), datetime.time(3, 4),
    datetime.timedelta(1, 2, 3), Decimal("1.50"), OrderedDict([("b", 1), ("a", 2)]), uuid.UUID(int=5),
]  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_arrive_as_they_were(bridge, value, protocol):
    try:
        body = serialized(work, value, key=value, protocol=protocol)
    except ValueError:
        pytest.fail("the value cannot be pickled")
    if protocol < 2 and type(value) is uuid.UUID:
        body = serialized(work, value, key=value)
    call = bridge.read(body)
    assert call.callable is work
    assert call.args == (value,)
    assert call.kwargs == {"key": value}
    assert type(call.args[0]) is type(value)
    assert not CALLS


@pytest.mark.parametrize("protocol", range(6))
def test_objects_methods_and_callable_objects_are_read(bridge, protocol):
    call = bridge.read(serialized(Plain("ada").send, "hello", protocol=protocol))
    assert (type(call.callable.__self__), vars(call.callable.__self__), call.args) == (Plain, {"to": "ada"}, ("hello",))
    assert bridge.read(serialized(Plain(1), 2, protocol=protocol)).callable.to == 1
    assert bridge.read(serialized(Plain.announce, "x", protocol=protocol)).callable == Plain.announce
    point = bridge.read(serialized(work, Point(1, 2), protocol=protocol)).args[0]
    assert point == Point(1, 2)


def test_sharing_and_circles_are_kept(bridge):
    inner = []
    inner.append(inner)
    first, second = bridge.read(serialized(work, inner, inner)).args
    assert first is second
    assert first[0] is first


def test_texts_of_python_2_are_texts_and_a_datetime_of_it_is_one(bridge):
    state = datetime.datetime(2026, 1, 2, 3).__reduce_ex__(2)[1][0]
    body = spelt(b"cdatetime\ndatetime\nU\x0a" + state + b"\x85R")
    assert bridge.read(body).args == (datetime.datetime(2026, 1, 2, 3),)
    assert bridge.read(spelt(b"U\x02\xc3\xa9")).args == ("é",)
    assert bridge.read(spelt(rb"S'a\x62\n'" + b"\n")).args == ("ab\n",)
    with pytest.raises(InvalidArguments, match="no UTF-8"):
        bridge.read(spelt(b"U\x01\xff"))


def test_what_is_read_is_deferred_and_signed_and_runs(app, bridge):
    task = bridge.defer(serialized(Plain("ada").send, "hello"), name="task-1", queue="mail")
    assert (task.name, task.queue_name) == ("task-1", "mail")
    app.run(task.payload)
    assert CALLS == [("ada", "hello")]
    with pytest.raises(Error, match="task-1|name"):
        bridge.defer(serialized(Plain("ada").send, "hello"), name="task-1", queue="mail")


# --- Attacks --------------------------------------------------------------------------------------


class Evil:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


GADGETS = {
    "system": Evil(os.system, "touch /tmp/owned"),
    "popen": Evil(subprocess.Popen, ["true"]),
    "eval": Evil(eval, "1"),
    "exec": Evil(exec, "1"),
    "getattr": Evil(getattr, "x", "upper"),
    "partial": functools.partial(work, 1),
    "import": Evil(__import__, "os"),
    "copyreg": Evil(copyreg.add_extension, "os", "system", 7),
    "loads": Evil(pickle.loads, b"."),
    "open": Evil(open, "/etc/passwd"),
    "type": Evil(type, "x", (), {}),
    "bytes of a size": Evil(bytes, 10**9),
    "bytearray of a size": Evil(bytearray, 10**9),
    "range": Evil(range, 10**18),
    "reconstructor of a dict": Evil(copyreg._reconstructor, dict, dict, {}),
    "a task's own function": Evil(work, 1),
    "encode by another codec": Evil(__import__("_codecs").encode, "x", "punycode"),
    "reduce": Reduced(),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", GADGETS)
def test_no_gadget_is_called_as_an_argument_or_as_the_callable(bridge, name, protocol, monkeypatch):
    argument = serialized(work, GADGETS[name], protocol=protocol)
    callee = pickle.dumps((GADGETS[name], (), {}), protocol)
    for function in ("system", "popen"):
        monkeypatch.setattr(os, function, lambda *_: CALLS.append("called"))
    for body in (argument, callee):
        with pytest.raises(Error):
            bridge.read(body)
    assert CALLS == []


@pytest.mark.parametrize(
    "body",
    [
        spelt(b"(S'id'\nios\nsystem\n"),  # INST
        spelt(b"(cos\nsystem\nS'id'\no"),  # OBJ
        spelt(b"P1\n"), spelt(b"K\x01Q"),  # persistent ids
        spelt(b"\x82\x01"), spelt(b"\x83\x01\x00"), spelt(b"\x84\x01\x00\x00\x00"),  # the extension registry
        spelt(b"\x97"), spelt(b"K\x01\x98"),  # buffers out of band
        spelt(f"c{HOME}\nPlain\n)".encode() + b"}\x92"),  # NEWOBJ_EX
        spelt(f"c{HOME}\nWithState\n)".encode() + b"\x81}b"),
        spelt(f"c{HOME}\nNewRuns\n)".encode() + b"\x81"),
        spelt(f"c{HOME}\nDying\n)".encode() + b"\x81"),
        spelt(f"c{HOME}\nPlain\n)".encode() + b"\x81}U\x04sendK\x01sb"),  # an attribute that hides a method
        spelt(f"c{HOME}\nPlain\nK\x01\x85".encode() + b"\x81"),  # construction with arguments
        spelt(f"c{HOME}\nPlain\n}}".encode() + b"b"),  # the state of a class
        spelt(b"]}b"), spelt(b"}}b"), spelt(b"K\x01}b"),  # the state of a value
        spelt(f"}}c{HOME}\nHashed\n)".encode() + b"\x81K\x01s"),  # hashes a key
        spelt(f"(c{HOME}\nHashed\n)".encode() + b"\x81\x91"),  # a member
        spelt(b"c_codecs\nencode\nU\x01x" + f"c{HOME}\nHashed\n)".encode() + b"\x81\x86R"),  # compared
        spelt(b"ccopy_reg\n_reconstructor\n" + f"c{HOME}\nPlain\nc{HOME}\nHashed\n)".encode() + b"\x81N\x87R"),
        spelt(b"cos\nsystem\n"), spelt(f"c{HOME}\nPlain\n".encode()),  # names as arguments
        spelt(b"c\n\n)\x81"), spelt(b"cos\x00\nsystem\n)\x81"), spelt("cö\nx\n)".encode() + b"\x81"),
        b"\x80\x02cos\nsystem\nU\x02id\x85}\x87.",
        b"\x80\x02cposix\nsystem\nU\x02id\x85}\x87.",
        b"\x80\x02cbuiltins\neval\nU\x011\x85}\x87.",
        b"\x80\x02c__builtin__\napply\n)}\x87.",
        b"\x80\x02cgoogle.appengine.ext.deferred.deferred\nrun_from_datastore\nU\x01k\x85}\x87.",
        b"\x80\x02cgoogle.appengine.ext.deferred.deferred\nrun\nU\x01k\x85}\x87.",
        b"\x80\x02cgoogle.appengine.ext.deferred.deferred\ninvoke_member\n)}\x87.",
        b"\x80\x02cgoogle.appengine.ext.deferred.deferred\ninvoke_member\nU\x01xU\x06format\x86}\x87.",
        b"\x80\x02cgoogle.appengine.ext.deferred.deferred\ninvoke_member\n" + f"c{HOME}\nPlain\n".encode() + b"U\x08__init__\x86}\x87.",
        b"\x80\x02cgoogle.appengine.ext.deferred.deferred\ninvoke_member\n" + f"c{HOME}\nPlain\n)".encode() + b"\x81U\x09__class__\x86}\x87.",
        b"\x80\x02cgoogle.appengine.ext.deferred.deferred\ninvoke_member\n" + f"c{HOME}\n".encode() + b"work\nU\x0b__globals__\x86}\x87.",
        b"", b".", b"N.", b"(.", b"\x80\x09N.", b"(N", b"N" * 3, b"\x80\x02)}\x86.", b"\x80\x02NN}\x87.", spelt(b"N") + b"x", spelt(b"N")[:-1],
        spelt(b"h\x05"), spelt(b"T\xff\xff\xff\x7f"), spelt(b"\x8d" + b"\xff" * 8), spelt(b"\x8b\x00\x00\x00\x40"), spelt(b"T\xff\xff\xff\xff"),
        spelt(b"\x8b" + (2_000).to_bytes(4, "little") + b"\x01" * 2_000), spelt(b"I" + b"9" * 5_000 + b"\n"), spelt(b"(K\x01d"), spelt(b"t"), spelt(b"(b"),
        spelt(b"S'x\n"), spelt(b"p-1\n"), spelt(b"cdecimal\nDecimal\nX" + (5_000).to_bytes(4, "little") + b"9" * 5_000 + b"\x85R"),
        spelt(b"cuuid\nUUID\n)\x81}U\x03intJ\xff\xff\xff\xffsb"), spelt(b"N" * 200_000), b"\x80\x02" + b"]" * 1_048_577,
    ],
)  # fmt: skip
def test_what_somebody_wrote_is_refused_and_runs_nothing(bridge, body, monkeypatch):
    for function in ("system", "popen"):
        monkeypatch.setattr(os, function, lambda *_: CALLS.append("called"))
    with pytest.raises(Error):
        bridge.defer(body)
    assert CALLS == []


def test_an_object_that_would_run_code_when_it_goes_or_hides_a_method_is_not_made(bridge):
    with pytest.raises(InvalidArguments, match="defines __del__"):
        bridge.read(spelt(f"c{HOME}\nDying\n)".encode() + b"\x81"))
    with pytest.raises(InvalidArguments, match="hides the function send"):
        bridge.read(spelt(f"c{HOME}\nPlain\n)".encode() + b"\x81}U\x04sendK\x01sb"))


def test_a_body_has_100_000_values_at_most(bridge):
    with pytest.raises(InvalidArguments, match="over 100,000 values"):
        bridge.read(spelt(b"(" + b"N" * 100_001 + b"t"))


def laughs(kind):
    """Return a task of a value that unfolds to 10**30 others."""
    body = b"K\x01" + {"list": b"]q\x00(" + b"K\x01" * 10 + b"e", "tuple": b"(" + b"K\x01" * 10 + b"tq\x00"}[kind]
    for n in range(30):
        one, put = b"h" + bytes([n]), b"q" + bytes([n + 1])
        body += b"0" + (b"]" + put + b"(" + one * 10 + b"e" if kind == "list" else b"(" + one * 10 + b"t" + put)
    return body[2:]


def test_what_unfolds_is_bounded(app, bridge):
    assert len(bridge.read(spelt(laughs("list"))).args[0]) == 10  # shared, and not unfolded
    with pytest.raises(InvalidArguments, match="a key is too large"):
        bridge.read(spelt(b"}q\xff0" + laughs("tuple") + b"0h\xffh\x1eK\x01s"))
    with pytest.raises(Error):  # deeper than a task may be
        bridge.defer(spelt(b"]" * 50_000 + b"a" * 49_999))


TEXT = b"X" + (400_000).to_bytes(4, "little") + b"x" * 400_000 + b"q\x00"
LIST = b"](" + b"K\x01" * 40_000 + b"eq\x00"
STATE = b"}(" + b"".join(b"U\x05" + b"%05d" % n + b"N" for n in range(20_000)) + b"uq\x00"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (TEXT + b"0(" + b"c_codecs\nencode\nh\x00U\x06latin1\x86R" * 10_000 + b"t", "copies"),
        (TEXT + b"0(" + b"c__builtin__\nbytearray\nh\x00\x85R" * 10_000 + b"t", "copies"),
        (LIST + b"0(" + b"c__builtin__\nset\nh\x00\x85R" * 10_000 + b"t", "copies"),
        (STATE + b"0(" + (f"c{HOME}\nPlain\n)".encode() + b"\x81h\x00b") * 1_000 + b"t", "copies"),
        (b"(" + b"".join(f"c{HOME}\nPlain\n)".encode() + b"\x81" for _ in range(2)) + b"t", None),
        (b"}(" + b"".join(b"\x8a\x0a" + ((2**61 - 1) * n).to_bytes(10, "little") + b"N" for n in range(2, 40_000)) + b"u", "keys"),
        (b"}(" + b"K\x01" + b"N" + b"K\x01K\x02\x86N" * 10_000 + b"u", "keys"),
        (b"}(" + b"G" + b"\x00" * 8 + b"N" + b"G?\xf0\x00\x00\x00\x00\x00\x00N" * 30_000 + b"u", "keys"),
    ],
    ids=["bytes", "bytearrays", "sets", "states", "two objects", "colliding integers", "tuples", "floats"],
)  # fmt: skip
def test_what_is_copied_or_hashed_is_bounded(bridge, body, reason):
    if reason is None:
        bridge.read(spelt(body))
    else:
        with pytest.raises(InvalidArguments, match=reason):
            bridge.read(spelt(body))


def test_many_texts_and_small_integers_are_keys(bridge):
    many = {**{str(n): n for n in range(20_000)}, **{n: n for n in range(20_000)}}
    assert bridge.read(serialized(work, many)).args == (many,)


def test_a_name_that_the_policy_does_not_admit_imports_nothing(bridge):
    assert "antigravity" not in sys.modules
    for body in (
        b"\x80\x02cantigravity\nfly\n)}\x87.", spelt(b"cantigravity\nFly\n)\x81"), b"\x80\x02cantigravity.x\nF\n)\x81)}\x87.",
    ):  # fmt: skip
        with pytest.raises(PolicyViolation):
            bridge.read(body)
    assert "antigravity" not in sys.modules


def test_a_keys_limits_hold(monkeypatch):
    from safedefer import Key, Keyring, KeyState

    ring = Keyring(Key("k1", os.urandom(32), KeyState.ACTIVE, patterns=("elsewhere",)))
    bridge = AppEngineBridge(make_app(policy=Policy(HOME), keyring=ring), until=UNTIL, clock=lambda: NOW)
    with pytest.raises(Error, match="key"):
        bridge.read(serialized(work))


def test_the_time_of_a_bridge_ends_and_is_bounded(app):
    now = [NOW]
    bridge = AppEngineBridge(app, until=UNTIL, clock=lambda: now[0])
    bridge.read(serialized(work))
    now[0] = UNTIL.timestamp()
    with pytest.raises(ConfigurationError, match="is over"):
        bridge.read(serialized(work))
    for until in (datetime.datetime(2027, 1, 1), UNTIL + datetime.timedelta(days=100), "2027"):
        with pytest.raises(ConfigurationError):
            AppEngineBridge(app, until=until, clock=lambda: NOW)


def test_every_opcode_of_pickle_is_read_or_refused_and_none_reaches_pickle(bridge, monkeypatch):
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(pickle, "Unpickler", None)
    for opcode in pickletools.opcodes:
        for tail in (b"", b"\x00" * 9, b"1\n", b"os\nsystem\n"):
            try:
                bridge.read(spelt(b"]K\x01)" + opcode.code.encode("latin-1") + tail))
            except Error:
                continue
    assert CALLS == []


@pytest.mark.parametrize("seed", range(20))
def test_mutated_bodies_end_in_an_error_or_in_a_task(bridge, seed):
    import random

    chance = random.Random(seed)
    good = serialized(Plain("ada").send, VALUES[8:14], when=VALUES[15], protocol=seed % 6)
    for _ in range(100):
        body = bytearray(good)
        for _ in range(chance.randrange(1, 6)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        try:
            bridge.read(bytes(body))
        except Error:
            continue
    assert CALLS == []
