"""What "exact" means to the tests: equal, of the same types, in the same order, with the same sharing."""

import math
import re
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import datetime, time
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from uuid import UUID

import jiter
from pydantic import BaseModel
from pydantic_core import to_json

from safedefer.codecs.typed import CallData, TypedCodec
from safedefer.policy import Policy
from safedefer.refs import UNBOUND

POLICY = Policy(
    "tests.zoo.values", "builtins:print", "builtins:len", "_operator:add", "operator:add", "builtins:list.append", "builtins:str.upper"
)  # fmt: skip
CODEC = TypedCodec()


def text_of(call):
    """The claims as they are dumped, by one call."""
    claims = {"args": call.args, "kwargs": call.kwargs}
    if call.bound is not UNBOUND:
        claims["bound"] = call.bound
    return to_json(claims)


def parse(text):
    claims = jiter.from_json(text, allow_inf_nan=False, catch_duplicate_keys=True)
    return CallData(claims.get("bound", UNBOUND), claims["args"], claims["kwargs"])


def carry(*args, _bound=UNBOUND, _codec=CODEC, _policy=POLICY, **kwargs):
    """Return the call after its journey as JSON text."""
    text = text_of(_codec.encode(CallData(_bound, args, kwargs), _policy))
    return _codec.decode(parse(text), _policy, text=text)


def carry_one(value, **options):
    (arrived,) = carry(value, **options).args
    return arrived


def tree_of(value):
    return CODEC.encode(CallData(UNBOUND, (value,), {}), POLICY).args[0]


def decode_one(tree, codec=CODEC, policy=POLICY):
    """Decode a tree that somebody else wrote."""
    text = to_json({"args": [tree], "kwargs": {}})
    return codec.decode(parse(text), policy, text=text).args[0]


class Different(AssertionError):
    pass


def assert_exact(sent, arrived):
    _Comparison().compare(sent, arrived, "$")


class _Comparison:
    def __init__(self):
        self.pairs = {}
        self.back = {}
        self.keep = []

    def fail(self, path, why):
        raise Different(f"{path}: {why}")

    def once(self, a, b, path):
        """Whether this pair of shared things was met before; each has one partner only."""
        if id(a) in self.pairs or id(b) in self.back:
            if self.pairs.get(id(a)) != id(b) or self.back.get(id(b)) != id(a):
                self.fail(path, "sharing differs")
            return True
        self.pairs[id(a)], self.back[id(b)] = id(b), id(a)
        self.keep += [a, b]
        return False

    def compare(self, a, b, path):
        kind = type(a)
        if kind is not type(b):
            self.fail(path, f"{kind} arrived as {type(b)}")
        if kind in (type(None), bool, int, str, bytes, type(...), range) or isinstance(a, type):
            if a != b:
                self.fail(path, f"{a!r} arrived as {b!r}")
        elif kind is float:
            if not (math.isnan(a) and math.isnan(b)) and struct.pack("d", a) != struct.pack("d", b):
                self.fail(path, f"{a!r} arrived as {b!r}")
        elif kind is complex:
            self.compare(a.real, b.real, path)
            self.compare(a.imag, b.imag, path)
        elif kind in (datetime, time):
            if a.replace(tzinfo=None) != b.replace(tzinfo=None) or a.fold != b.fold or repr(a.tzinfo) != repr(b.tzinfo):
                self.fail(path, f"{a!r} arrived as {b!r}")
        elif kind is Decimal:
            if a.as_tuple() != b.as_tuple():
                self.fail(path, f"{a!r} arrived as {b!r}")
        elif kind is UUID:
            if a != b or a.is_safe is not b.is_safe:
                self.fail(path, f"{a!r} arrived as {b!r}")
        elif kind is slice:
            self.many([a.start, a.stop, a.step], [b.start, b.stop, b.step], path)
        elif kind is tuple:
            self.many(a, b, path)
        elif kind in (list, deque):
            if not self.once(a, b, path):
                if kind is deque and a.maxlen != b.maxlen:
                    self.fail(path, "maxlen")
                self.many(a, b, path)
        elif kind is bytearray:
            if not self.once(a, b, path) and a != b:
                self.fail(path, f"{a!r} arrived as {b!r}")
        elif kind in (set, frozenset):
            if kind is frozenset or not self.once(a, b, path):
                self.members(a, b, path)
        elif kind in (dict, OrderedDict, defaultdict, Counter):
            if not self.once(a, b, path):
                if kind is defaultdict:
                    self.compare(a.default_factory, b.default_factory, path + ".default_factory")
                self.many(list(a), list(b), path + ".keys")
                self.many(list(a.values()), list(b.values()), path)
        elif isinstance(a, Enum) or kind in (FunctionType, re.Pattern, Fraction):
            if a is not b and a != b:
                self.fail(path, f"{a!r} arrived as {b!r}")
        elif kind is BuiltinFunctionType:
            if type(a.__self__) is ModuleType:
                return self.compare(id(a), id(b), path)
            self.compare(a.__name__, b.__name__, path)
            self.compare(a.__self__, b.__self__, path + ".__self__")
        elif kind is MethodType:
            self.compare(a.__self__, b.__self__, path + ".__self__")
            self.compare(a.__func__, b.__func__, path + ".__func__")
        else:
            self.objects(a, b, path)

    def objects(self, a, b, path):
        if (not isinstance(a, tuple)) and type(a).__module__.startswith("tests.") and self.once(a, b, path):
            return
        if isinstance(a, BaseException):
            if self.once(a, b, path):
                return
            for name in ("args", "__cause__", "__context__", "__suppress_context__"):
                self.compare(getattr(a, name), getattr(b, name), f"{path}.{name}")
            for name in (
                "errno",
                "strerror",
                "filename",
                "filename2",
                "name",
                "path",
                "obj",
                "code",
                "value",
                "lineno",
            ):
                self.compare(getattr(a, name, None), getattr(b, name, None), f"{path}.{name}")
        if isinstance(a, BaseModel):
            self.compare(set(a.model_fields_set), set(b.model_fields_set), path + ".model_fields_set")
            self.compare(a.__pydantic_extra__, b.__pydantic_extra__, path + ".extra")
            self.compare(a.__pydantic_private__, b.__pydantic_private__, path + ".private")
        for base in (list, dict, set, frozenset, tuple, str, bytes, int, float):
            if isinstance(a, base):
                _Comparison.compare(self, _contents(a, base), _contents(b, base), path)
        if not type(a).__module__.startswith("tests.") and not isinstance(a, BaseException) and a != b:
            self.fail(path, f"{a!r} arrived as {b!r}")
        if not type(a).__module__.startswith("tests."):
            return
        slots = [n for c in type(a).__mro__ for n in _slots_of(c)]
        for name in slots:
            self.compare(_get(a, name), _get(b, name), f"{path}.{name}")
        if hasattr(a, "__dict__"):
            da, db = vars(a), vars(b)
            if list(da) != list(db):
                self.fail(path, f"attributes {list(da)} arrived as {list(db)}")
            for name in da:
                self.compare(da[name], db[name], f"{path}.{name}")

    def many(self, a, b, path):
        if len(a) != len(b):
            self.fail(path, f"{len(a)} items arrived as {len(b)}")
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            self.compare(x, y, f"{path}[{i}]")

    def members(self, a, b, path):
        """Sets have no order: pair members by a stable key."""
        if len(a) != len(b):
            self.fail(path, f"{len(a)} members arrived as {len(b)}")
        self.many(sorted(a, key=_order), sorted(b, key=_order), path)


def _order(value, levels=4):
    """A text that is the same for equal members; objects that differ deep below, or not at all, have one for all."""
    kind = type(value)
    if levels == 0:
        parts = ""
    elif isinstance(value, frozenset):
        parts = sorted(_order(each, levels - 1) for each in value)
    elif isinstance(value, tuple):
        parts = [_order(each, levels - 1) for each in value]
    elif kind.__module__.startswith("tests.") and hasattr(value, "__dict__"):
        parts = [f"{name}={_order(each, levels - 1)}" for name, each in vars(value).items()]
    elif isinstance(value, str | bytes | int | float | complex | None):
        parts = repr(value)
    else:
        parts = "" if isinstance(value, list | dict | set) or kind.__module__.startswith("tests.") else repr(value)
    return f"{kind.__name__}{parts}"


def _contents(value, base):
    return (
        base(base.__iter__(value))
        if base in (list, set, frozenset, tuple)
        else (dict(dict.items(value)) if base is dict else base.__getnewargs__(value)[0])
    )


def _slots_of(cls):
    names = vars(cls).get("__slots__", ())
    return [n for n in ((names,) if isinstance(names, str) else names) if not n.startswith("__") and n != "__dict__"]


MISSING = "<unset>"


def _get(value, name):
    try:
        return getattr(value, name)
    except AttributeError:
        return MISSING
