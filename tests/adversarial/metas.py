"""Classes of metaclasses that run code at every turn, and of those that run none. What ran is in ``RAN``."""

import abc
import enum
import typing

RAN = []


def trap(name, result=None):
    def hook(cls, *args, **kwargs):
        RAN.append(name)
        return result(cls, *args, **kwargs) if callable(result) else result

    return hook


def _made(cls, *args, **kwargs):
    return type.__call__(cls, *args, **kwargs)


#: Hooks that run when a class is called, compared or asked for something; and a well-behaved body for each.
HOOKS = {
    "__call__": _made, "__getattribute__": type.__getattribute__, "__getattr__": "anything", "__instancecheck__": True, "__subclasscheck__": True,
    "__eq__": True, "__ne__": False, "__hash__": 1, "__lt__": True, "__bool__": True, "__len__": 1, "__signature__": None, "__text_signature__": "()",
    "__wrapped__": None, "__get__": None, "__set__": None, "__abstractmethods__": frozenset(), "__class__": type, "__mro__": (),
}  # fmt: skip


class Property:
    """A data descriptor."""

    def __init__(self, name):
        self.name = name

    def __get__(self, cls, meta):
        RAN.append(self.name)
        return str

    def __set__(self, cls, value):
        RAN.append(self.name)


class Deleter:
    """A data descriptor, too."""

    def __get__(self, cls, meta):
        RAN.append("deleter")
        return str

    def __delete__(self, cls):
        RAN.append("deleter")


class Text(str):
    """A name with methods of its own."""

    __slots__ = ()

    def __eq__(self, other):
        RAN.append("Text.__eq__")
        return str.__eq__(self, other)

    def __getitem__(self, index):
        RAN.append("Text.__getitem__")
        return "ok"

    __hash__ = str.__hash__


class MetaOfMeta(type):
    def __getattribute__(cls, name):
        RAN.append(f"MetaOfMeta {name}")
        return type.__getattribute__(cls, name)


class MixinProperty:
    __slots__ = ()
    run = Property("run of a mixin")


#: Metaclasses that run code, by what they do it with.
LOUD = {
    **{name: {name: trap(name, body)} for name, body in HOOKS.items()},
    "property over a class method": {"run": Property("run")},
    "deleter over a class method": {"run": Deleter()},
    "__module__ as a property": {"__module__": Property("__module__")},
    "__doc__ as a property": {"__doc__": Property("__doc__")},
    "__annotations__ as a property": {"__annotations__": Property("__annotations__")},
    "a name that is no plain text": {Text("odd"): 1},
}


def make(meta):
    """Return a class of the metaclass, that ``find`` finds here."""
    RAN.clear()
    name = f"Of{len(FOUND)}"
    body = {
        "__module__": __name__,
        "__qualname__": name,
        "run": classmethod(run),
        "go": go,
        "__call__": call,
    }
    run.__qualname__, go.__qualname__, call.__qualname__ = f"{name}.run", f"{name}.go", f"{name}.__call__"
    cls = type.__new__(meta, name, (), body)
    type.__init__(cls, name, (), body)
    return cls


def run(cls):
    return 1


def go(self):
    return 2


def call(self):
    return 3


FOUND = {}


class QuietMeta(type):
    """As ndb's and SQLAlchemy's: it does its work when a class is made, and shows and changes classes."""

    kinds: typing.ClassVar[list] = []
    label = property(lambda cls: "label")

    def __new__(cls, name, bases, namespace):
        return super().__new__(cls, name, bases, namespace)

    def __init__(cls, name, bases, namespace):
        super().__init__(name, bases, namespace)
        QuietMeta.kinds.append(name)

    @classmethod
    def __prepare__(cls, name, bases):
        return {}

    def __repr__(cls):
        RAN.append("__repr__")
        return "quiet"

    def __setattr__(cls, name, value):
        RAN.append("__setattr__")
        type.__setattr__(cls, name, value)

    def helper(cls):
        RAN.append("helper")


class QuietABCMeta(abc.ABCMeta):
    """Nothing of its own."""


class Quiet(metaclass=QuietMeta):
    def __init__(self, size=0):
        self.size = size

    @classmethod
    def run(cls):
        return 1

    def go(self):
        return 2

    def __call__(self):
        return 3


class QuietAbstract(metaclass=QuietABCMeta):
    @classmethod
    def run(cls):
        return 1

    def go(self):
        return 2

    def __call__(self):
        return 3


class Port(typing.Protocol):
    def go(self): ...


class OfPort(Port):
    @classmethod
    def run(cls):
        return 1

    def go(self):
        return 2

    def __call__(self):
        return 3


class LoudEnumMeta(enum.EnumMeta):
    def __getattribute__(cls, name):
        RAN.append(name)
        return super().__getattribute__(name)


class LoudFlag(enum.Flag, metaclass=LoudEnumMeta):
    A = 1
    B = 2
