"""Classes whose objects the codec's tests carry. Importable, so that a policy can admit them."""

import dataclasses
import enum
import functools
from collections import namedtuple
from typing import Any, NamedTuple

import attrs
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, RootModel

RAN: list[str] = []
"""What ran that must not: hooks note themselves here."""


class Color(enum.Enum):
    RED = 1
    GREEN = "g"
    PAIR = (1, [2])
    CRIMSON = 1


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Mode(enum.StrEnum):
    FAST = "fast"


class Perm(enum.Flag):
    R = 1
    W = 2
    X = 4
    RW = 3


class IntPerm(enum.IntFlag):
    R = 4
    W = 2


class OwnMissing(enum.Flag):
    A = 1
    B = 2

    @classmethod
    def _missing_(cls, value):
        RAN.append("_missing_")
        return super()._missing_(value)


Point = namedtuple("Point", "x y")


class Typed(NamedTuple):
    name: str
    tags: list[str]


class Point3(Point):
    """A subclass with a __dict__ and a __new__ that would change the value again."""

    def __new__(cls, x, y):
        return super().__new__(cls, x + 1, y + 1)


@dataclasses.dataclass
class Single:
    id: int


class OnlyModel(BaseModel):
    n: int


@dataclasses.dataclass
class Order:
    id: int
    lines: list[Any] = dataclasses.field(default_factory=list)
    note: str = "none"
    total: dataclasses.InitVar[int | None] = None
    parent: Any = None

    def __post_init__(self, total):
        RAN.append("__post_init__")
        self.computed = total

    @functools.cached_property
    def size(self):
        return len(self.lines)


@dataclasses.dataclass(frozen=True)
class Money:
    amount: Any
    currency: str = "EUR"


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    a: Any
    b: Any = 2


@dataclasses.dataclass(slots=True)
class SlottedMutable:
    a: Any
    b: Any = None


@dataclasses.dataclass
class Chain:
    next: Any = None


class Plain:
    def __init__(self, *args):
        RAN.append("__init__")

    def __eq__(self, other):
        return type(other) is type(self) and vars(self) == vars(other)

    __hash__ = object.__hash__


class Node:
    """Identity equality and hash."""


class WithSlots:
    __slots__ = ("_WithSlots__hidden", "__weakref__", "a", "b")


class SlotsAndDict(WithSlots):
    __slots__ = ("__dict__", "c")


class StateOfASlot(SlotsAndDict):
    """Its state has a slot's name where Python puts it into the ``__dict__``."""

    def __getstate__(self):
        return {"a": 2}


class StateHooks:
    def __init__(self, n):
        self.n = n
        self.cache = object()

    def __getstate__(self):
        return {"n": self.n}

    def __setstate__(self, state):
        self.n = state["n"]
        self.cache = None

    def __eq__(self, other):
        return type(other) is type(self) and self.n == other.n

    __hash__ = None


class GetOnly:
    def __init__(self, n):
        self.n, self.drop = n, object()

    def __getstate__(self):
        return {"n": self.n}


class SetOnly:
    def __init__(self, n):
        self.n = n

    def __setstate__(self, state):
        self.n = state["n"]
        self.was_set = True


class TupleState:
    def __init__(self, a):
        self.a = a

    def __getstate__(self):
        return (self.a, [1])

    def __setstate__(self, state):
        self.a, self.rest = state


class NewArgs:
    def __new__(cls, a, b):
        self = super().__new__(cls)
        self.a, self.b = a, b
        return self

    def __getnewargs__(self):
        return (self.a, self.b)

    def __eq__(self, other):
        return type(other) is type(self) and (self.a, self.b) == (other.a, other.b)

    __hash__ = None


class NewArgsEx:
    def __new__(cls, a, *, b):
        self = super().__new__(cls)
        self.a, self.b = a, b
        return self

    def __getnewargs_ex__(self):
        return (self.a,), {"b": self.b}


class NewNeedsArgs:
    def __new__(cls, a):
        return super().__new__(cls)


class BareNew:
    def __new__(cls):
        self = super().__new__(cls)
        self.made_by = "new"
        return self


class Reduced:
    def __reduce__(self):
        RAN.append("__reduce__")
        return (print, ("owned",))


class ReducedEx:
    def __reduce_ex__(self, protocol):
        RAN.append("__reduce_ex__")
        return (print, ("owned",))


class Evil:
    """Everything it can run, it notes; it is refused because it has a __reduce__."""

    def __getattribute__(self, name):
        RAN.append(f"__getattribute__ {name}")
        return object.__getattribute__(self, name)

    @property
    def __class__(self):
        RAN.append("__class__")
        return dict

    def __eq__(self, other):
        RAN.append("__eq__")
        return True

    def __hash__(self):
        RAN.append("__hash__")
        return 1

    def __bool__(self):
        RAN.append("__bool__")
        return False

    def __len__(self):
        RAN.append("__len__")
        return 0

    def __iter__(self):
        RAN.append("__iter__")
        return iter(())

    def __repr__(self):
        RAN.append("__repr__")
        return "evil"

    __str__ = __repr__

    def __getstate__(self):
        RAN.append("__getstate__")
        return {}

    def __reduce__(self):
        RAN.append("__reduce__")
        return (dict, ())


class EvilMeta(type):
    def __hash__(cls):
        RAN.append("meta __hash__")
        return 1

    def __eq__(cls, other):
        RAN.append("meta __eq__")
        return True

    def __getattribute__(cls, name):
        RAN.append(f"meta __getattribute__ {name}")
        return type.__getattribute__(cls, name)

    def __instancecheck__(cls, instance):
        RAN.append("meta __instancecheck__")
        return True

    def __subclasscheck__(cls, instance):
        RAN.append("meta __subclasscheck__")
        return True


class OfEvilMeta(metaclass=EvilMeta):
    pass


class MyList(list):
    pass


class MyDict(dict):
    def __setitem__(self, key, value):
        RAN.append("MyDict.__setitem__")
        super().__setitem__(key, value)


class MySet(set):
    pass


class MyFrozen(frozenset):
    pass


class MyStr(str):
    __slots__ = ()


class Celsius(float):
    """Its __new__ would change the value again."""

    def __new__(cls, value):
        RAN.append("Celsius.__new__")
        return super().__new__(cls, value + 273.15)


class MyInt(int):
    pass


class MyBytes(bytes):
    pass


class MyTuple(tuple):
    __slots__ = ()


class MyComplex(complex):
    pass


class Oops(Exception):
    def __init__(self, code, *, detail=None):
        RAN.append("Oops.__init__")
        super().__init__(f"code {code}")
        self.code, self.detail = code, detail


class FileOops(OSError):
    def __init__(self, *args):
        RAN.append("FileOops.__init__")
        super().__init__(*args)


class ReducedOops(Exception):
    def __reduce__(self):
        return (ReducedOops, ())


class Model(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int = 1
    items: list[Any] = Field(default_factory=list)
    _private: Any = PrivateAttr(default=None)
    _unset: int = PrivateAttr()


class FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True)
    a: int = 1
    when: Any = None


class Root(RootModel[list[int]]):
    pass


@attrs.define
class AttrsSlotted:
    a: Any
    b: Any = attrs.field(default=2)
    _c: Any = 3


@attrs.frozen
class AttrsFrozen:
    a: Any


@attrs.define(slots=False)
class AttrsDict:
    a: Any

    def __attrs_post_init__(self):
        RAN.append("__attrs_post_init__")


class ByValue:
    """Hash and equality by attribute."""

    def __init__(self, key, other=None):
        self.key, self.other = key, other

    def __eq__(self, other):
        return type(other) is type(self) and self.key == other.key

    def __hash__(self):
        return hash(self.key)


class Outer:
    class Inner:
        def __init__(self, n):
            self.n = n

    class Choice(enum.Enum):
        A = "a"


class Worker:
    def __init__(self, n=0):
        self.n = n

    def work(self, x):
        return self.n + x

    @classmethod
    def build(cls, n):
        return cls(n)

    def __call__(self):
        return self.n

    def __eq__(self, other):
        return type(other) is type(self) and self.n == other.n

    __hash__ = None


class HiddenDict:
    @property
    def __dict__(self):
        RAN.append("__dict__ property")
        return {}


class Key:
    """An ndb-like key, which its own code pickles."""

    def __init__(self, *path):
        self.path = path

    def __eq__(self, other):
        return type(other) is Key and self.path == other.path

    def __hash__(self):
        return hash(self.path)

    def __reduce__(self):
        RAN.append("Key.__reduce__")
        return (Key, self.path)


def top(x=1):
    return x


class Child(ByValue):
    """Inherits its hash."""

    def __init__(self):
        super().__init__("k")
