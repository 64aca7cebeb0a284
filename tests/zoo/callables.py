"""One callable of every kind that may be deferred, and of every kind that may not, with odd relatives.

``ACCEPTED`` are (label, object, kind, module, qualname, member); ``REFUSED`` are (label, object,
reason). Traps note in ``RAN`` that they ran; nothing may.
"""

import abc
import asyncio
import contextlib
import enum
import functools
import math
import operator
import os
import re
import subprocess
import time
import types
from collections import OrderedDict, namedtuple
from subprocess import run as reexported  # noqa: F401  # reached by a test as this module's
from typing import NamedTuple
from unittest import mock

from pydantic import BaseModel

from safedefer import deferrable
from tests.zoo.decorators import Base, CallableBase, MarkedBase, foreign, unwrapped, wrapped

HERE = __name__
RAN: list[str] = []


def function(a=1, *args, **kwargs):
    return a


async def coroutine(a=1):
    return a


def _private():
    return "private"


@wrapped
def decorated(a=1):
    return a


@functools.singledispatch
def dispatched(a):
    return a


def Function():  # differs from `function` in case only
    return "upper"


@types.coroutine
def generator_coroutine():
    yield


def outer():
    def nested():
        return "nested"

    class Local:
        def method(self):
            return "local"

        @classmethod
        def build(cls):
            return cls()

        def __call__(self):
            return "local"

    def closure():
        return Local

    return nested, Local, closure


nested, Local, closure = outer()


def renamed_source():
    def hidden():
        return "hidden"

    return hidden


# A nested function that is found under the name that it claims is judged by look-up.
claimed = renamed_source()
claimed.__qualname__ = claimed.__name__ = "claimed"

lambda_ = lambda: "lambda"
renamed_lambda = lambda: "renamed"
renamed_lambda.__qualname__ = renamed_lambda.__name__ = "renamed_lambda"
wrapped_lambda = functools.wraps(function)(lambda *args: None)


def trap_hung(self):
    return "hung"


class Plain:
    def __init__(self, value=0):
        self.value = value

    def method(self, a=1):
        return self.value, a

    async def async_method(self):
        return self.value

    def _private(self):
        return "private"

    def __mangled(self):
        return "mangled"

    def __dunder__(self):
        return "dunder"

    @classmethod
    def build(cls, a=1):
        return cls(a)

    @classmethod
    async def async_build(cls):
        return cls()

    @staticmethod
    def static():
        return "static"

    @wrapped
    def decorated(self):
        return "decorated"

    @unwrapped
    def undecorated(self):
        return "undecorated"

    @property
    def prop(self):
        RAN.append("property")
        return function

    @functools.lru_cache  # noqa: B019
    def cached(self):
        return "cached"

    def overridden(self):
        return "plain"

    def becomes_static(self):
        return "plain"

    def generator(self):
        yield 1

    method_lambda = lambda self: "lambda"
    partial_method = functools.partialmethod(method, 2)
    hung = foreign
    foreign = foreign

    class Nested:
        def method(self):
            return "nested"

        @classmethod
        def build(cls):
            return cls()

        def __call__(self):
            return "nested"

    def mangled_itself(self):
        return self.__mangled


class Child(Plain):
    def overridden(self):
        return "child"

    @staticmethod
    def becomes_static():
        return "static"

    @property
    def super_overridden(self):
        return super().overridden

    def super_method(self):
        return super().method

    def super_becomes_static(self):
        return super().becomes_static

    @classmethod
    def super_build(cls):
        return super().build


class ChildBuild(Plain):
    @classmethod
    def build(cls, a=1):
        return cls(a)

    @classmethod
    def super_build(cls):
        return super().build


class Calling:
    def __init__(self, value=0):
        self.value = value

    def __call__(self, a=1):
        return self.value, a


class AsyncCalling:
    async def __call__(self):
        return "called"


class AliasCalling:
    def run(self):
        return "ran"

    __call__ = run


class ForeignCalling:
    __call__ = foreign


class StaticCalling:
    @staticmethod
    def __call__():
        return "static"


class LambdaCalling:
    __call__ = lambda self: "lambda"


class GeneratorCalling:
    def __call__(self):
        yield 1


class AsyncGeneratorCalling:
    async def __call__(self):
        yield 1


class CCalling:
    __call__ = operator.attrgetter("x")


class InheritedCalling(CallableBase):
    pass


class Falsy:
    def __bool__(self):
        RAN.append("bool")
        return False

    def __len__(self):
        RAN.append("len")
        return 0

    def method(self):
        return "falsy"

    def __call__(self):
        return "falsy"


class Abstract(abc.ABC):
    @abc.abstractmethod
    def method(self): ...

    @classmethod
    def build(cls):
        return None


class Concrete(Abstract):
    def method(self):
        return "concrete"


class Color(enum.Enum):
    RED = 1

    def describe(self):
        return self.name

    @classmethod
    def parse(cls, text):
        return cls[text]


class ColorCalling(enum.Enum):
    RED = 1

    def __call__(self):
        return self.name


class Model(BaseModel):
    number: int = 1

    def method(self):
        return self.number

    @classmethod
    def build(cls):
        return cls()


class Row(NamedTuple):
    x: int = 1

    def method(self):
        return self.x


Point = namedtuple("Point", "x y", defaults=(1, 2))


class Record(Base):
    """An object of an ORM: most of its methods are another module's."""

    def own(self):
        return "own"


class MyList(list):
    def method(self):
        return "list"


class OverridingList(list):
    def append(self, item):
        RAN.append("append")

    def super_append(self):
        return super().append


class Dispatching:
    @functools.singledispatchmethod
    def go(self, value):
        return "any"

    @go.register
    def _(self, value: int):
        return "int"

    @functools.singledispatchmethod
    @classmethod
    def build(cls, value):
        return cls()


def of_no_class():
    return "lost"


of_no_class.__qualname__ = "Missing.of_no_class"


class Slotted:
    __slots__ = ("a",)

    def method(self):
        return "slotted"


class Meta(type):
    def __call__(cls, *args, **kwargs):
        RAN.append("Meta.__call__")
        return super().__call__(*args, **kwargs)

    def __getattribute__(cls, name):
        RAN.append(f"Meta.__getattribute__ {name}")
        return super().__getattribute__(name)

    def __eq__(cls, other):
        RAN.append("Meta.__eq__")
        return True

    def __hash__(cls):
        RAN.append("Meta.__hash__")
        return 1

    def meta_method(cls):
        return "meta"


class MetaMeta(type):
    def __hash__(cls):
        RAN.append("MetaMeta.__hash__")
        return 1

    def __eq__(cls, other):
        RAN.append("MetaMeta.__eq__")
        return True


class MetaOfMeta(type, metaclass=MetaMeta):
    pass


class WithMeta(metaclass=Meta):
    def method(self):
        return "meta"

    def __call__(self):
        return "meta"


class WithMetaOfMeta(metaclass=MetaOfMeta):
    pass


class EnumWithMethods(enum.EnumMeta):
    """A subclass of a known metaclass is another metaclass."""

    def __getattr__(cls, name):
        RAN.append(f"EnumWithMethods.__getattr__ {name}")
        raise AttributeError(name)


class MetaEnum(enum.Enum, metaclass=EnumWithMethods):
    RED = 1


class TrapText(str):
    """A text whose every method is the user's."""

    def _trap(self, *args):
        RAN.append("TrapText")
        return True

    __eq__ = __contains__ = startswith = endswith = partition = rpartition = __format__ = _trap

    def __hash__(self):
        RAN.append("TrapText.__hash__")
        return str.__hash__(self)


def trap_name():
    return "trap"


def trap_module():
    return "trap"


trap_name.__qualname__ = TrapText("trap_name")
trap_module.__module__ = TrapText(HERE)


def no_module():
    return "none"


no_module.__module__ = None


class TrapClassName:
    pass


TrapClassName.__qualname__ = TrapText("TrapClassName")


class ModuleIsObject:
    __module__ = property(lambda self: RAN.append("__module__"))


class ModuleIsTrapText:
    __module__ = TrapText(HERE)


def _trap(name):
    def trap(self, *args):
        RAN.append(name)
        raise RuntimeError(name)

    return trap


class Trapped:
    """An object of which no question may be asked in Python."""

    __class__ = property(_trap("__class__"))
    __getattr__ = _trap("__getattr__")
    __getattribute__ = _trap("__getattribute__")
    __eq__ = _trap("__eq__")
    __hash__ = _trap("__hash__")
    __bool__ = _trap("__bool__")
    __len__ = _trap("__len__")
    __repr__ = _trap("__repr__")
    __str__ = _trap("__str__")
    __iter__ = _trap("__iter__")
    __get__ = _trap("__get__")
    __name__ = property(_trap("__name__"))
    __qualname__x = property(_trap("__qualname__"))
    prop = property(_trap("prop"))

    def method(self):
        return "trapped"

    def __call__(self):
        return "trapped"


class TrappedNotCallable:
    __class__ = property(_trap("__class__"))
    __getattribute__ = _trap("__getattribute__")
    __eq__ = _trap("__eq__")


def generator():
    yield 1


async def async_generator():
    yield 1


def passed_on(function):
    """A decorator such as a library's: calls the function, and hands on what that returns."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


@passed_on
@passed_on
def wrapped_generator():
    yield 1


@passed_on
async def wrapped_async_generator():
    yield 1


@contextlib.contextmanager
def context():
    yield 1


@contextlib.asynccontextmanager
async def async_context():
    yield 1


class WrappedGenerators:
    @contextlib.contextmanager
    def method(self):
        yield 1

    @classmethod
    @contextlib.contextmanager
    def class_method(cls):
        yield 1

    @contextlib.asynccontextmanager
    async def __call__(self):
        yield 1


@functools.lru_cache
def cached():
    return "cached"


@functools.cache
def cached_too():
    return "cached"


@unwrapped
def undecorated():
    return "undecorated"


def replaced():
    return "old"


old_replaced = replaced


def replaced():  # noqa: F811
    return "new"


def deleted():
    return "deleted"


old_deleted = deleted
del deleted


class Replaced:
    def method(self):
        return "old"


old_replaced_object = Replaced()


class Replaced:  # noqa: F811
    def method(self):
        return "new"


def café():
    return "not ASCII"


def ﬁle():  # Python folds the ligature: the attribute is `file`
    return "ligature"


def long_name():
    return "long"


LONG = "x" * 256
long_name.__qualname__ = long_name.__name__ = LONG
globals()[LONG] = long_name


class MemberNames:
    pass


def _member(name, text=None):
    def made(self):
        return name

    made.__name__ = text or name
    made.__qualname__ = f"MemberNames.{text or name}"
    setattr(MemberNames, name, made)


_member("_")
_member("_0")
_member("a__b")
_member(LONG)
_member("naïve")


class Shadowed:
    """An object whose attribute hides the method."""

    def __init__(self):
        self.method = function

    def method(self):
        return "hidden"


class Descriptor:
    def __get__(self, instance, owner):
        RAN.append("descriptor")
        return function

    def __call__(self):
        return "descriptor"


class Bound:
    """A bound method whose function is no Python function."""

    of_builtin = types.MethodType(len, "x")
    of_object = types.MethodType(Calling(), "x")


def closure_free():
    return "never admitted by another's exact pattern"


reexported_function = foreign


def steal(self):
    return "stolen"


steal.__qualname__ = "Plain.steal"


class PopenChild(subprocess.Popen):
    """A class that is built as a process is."""

    _child_created = False

    def __del__(self, **_):
        """Nothing was started."""


@deferrable
def marked():
    return "marked"


@functools.wraps(marked)
def wraps_marked():
    return "wraps"


wraps_marked.__qualname__ = wraps_marked.__name__ = "wraps_marked"


@deferrable
class MarkedClass:
    class Inner:
        pass

    def method(self):
        return "marked"

    @classmethod
    def build(cls):
        return cls()


class MarkedChild(MarkedClass):
    pass


class MarkedRecord(MarkedBase):
    pass


def main_function():
    return "main"


main_function.__module__ = "__main__"


def mp_main_function():
    return "main"


mp_main_function.__module__ = "__mp_main__"


class MainClass:
    def method(self):
        return "main"

    def __call__(self):
        return "main"


MainClass.__module__ = "__main__"


def null_module():
    return "null"


null_module.__module__ = "os\0"


class GettingModule(types.ModuleType):
    def __getattr__(self, name):
        RAN.append(f"module.__getattr__ {name}")
        return function


plain, child, calling = Plain(7), Child(8), Calling(9)
A = HERE

ACCEPTED = [
    ("function", function, "function", A, "function", None),
    ("async function", coroutine, "function", A, "coroutine", None),
    ("private function", _private, "function", A, "_private", None),
    ("function that differs in case", Function, "function", A, "Function", None),
    ("wraps-decorated function", decorated, "function", A, "decorated", None),
    ("function whose ligature Python folds to ASCII", ﬁle, "function", A, "file", None),
    ("singledispatch function", dispatched, "function", A, "dispatched", None),
    ("function found under the name that it claims", claimed, "function", A, "claimed", None),
    ("re-exported function is named at home", reexported, "function", "subprocess", "run", None),
    ("function of the standard library", os.path.join, "function", "posixpath", "join", None),
    ("class", Plain, "class", A, "Plain", None),
    ("subclass", Child, "class", A, "Child", None),
    ("abstract class", Concrete, "class", A, "Concrete", None),
    ("enum", Color, "class", A, "Color", None),
    ("pydantic model", Model, "class", A, "Model", None),
    ("named tuple", Point, "class", A, "Point", None),
    ("class of C", dict, "class", "builtins", "dict", None),
    ("class of C elsewhere", OrderedDict, "class", "collections", "OrderedDict", None),
    ("callable instance", calling, "instance", A, "Calling", None),
    ("async callable instance", AsyncCalling(), "instance", A, "AsyncCalling", None),
    ("instance whose __call__ is its own method", AliasCalling(), "instance", A, "AliasCalling", None),
    ("instance with inherited __call__", InheritedCalling(), "instance", A, "InheritedCalling", None),
    ("callable enum member", ColorCalling.RED, "instance", A, "ColorCalling", None),
    ("falsy callable instance", Falsy(), "instance", A, "Falsy", None),
    ("instance that answers nothing", Trapped(), "instance", A, "Trapped", None),
    ("method", plain.method, "method", A, "Plain", "method"),
    ("async method", plain.async_method, "method", A, "Plain", "async_method"),
    ("private method", plain._private, "method", A, "Plain", "_private"),
    ("wraps-decorated method", plain.decorated, "method", A, "Plain", "decorated"),
    ("inherited method", child.method, "method", A, "Child", "method"),
    ("overriding method", child.overridden, "method", A, "Child", "overridden"),
    ("super() method that is not overridden", child.super_method(), "method", A, "Child", "method"),
    ("method of a concrete class", Concrete().method, "method", A, "Concrete", "method"),
    ("method of an enum member", Color.RED.describe, "method", A, "Color", "describe"),
    ("method of a model", Model().method, "method", A, "Model", "method"),
    ("method of a named tuple", Row().method, "method", A, "Row", "method"),
    ("method of a list's subclass", MyList().method, "method", A, "MyList", "method"),
    ("method of a slotted object", Slotted().method, "method", A, "Slotted", "method"),
    ("method of a falsy object", Falsy().method, "method", A, "Falsy", "method"),
    ("inherited method of another module", Record().save, "method", A, "Record", "save"),
    ("method bound by hand", types.MethodType(Plain.method, plain), "method", A, "Plain", "method"),
    (
        "method that an attribute hides",
        types.MethodType(Shadowed.method, Shadowed()),
        "method",
        A,
        "Shadowed",
        "method",
    ),
    (
        "method of an object that answers nothing",
        types.MethodType(Trapped.method, Trapped()),
        "method",
        A,
        "Trapped",
        "method",
    ),
    ("member _", getattr(MemberNames(), "_"), "method", A, "MemberNames", "_"),
    ("member _0", getattr(MemberNames(), "_0"), "method", A, "MemberNames", "_0"),
    ("member a__b", MemberNames().a__b, "method", A, "MemberNames", "a__b"),
    ("class method", Plain.build, "classmethod", A, "Plain", "build"),
    ("class method through an object", plain.build, "classmethod", A, "Plain", "build"),
    ("async class method", Plain.async_build, "classmethod", A, "Plain", "async_build"),
    ("inherited class method", Child.build, "classmethod", A, "Child", "build"),
    ("super() class method that is not overridden", Child.super_build(), "classmethod", A, "Child", "build"),
    ("class method of an abstract class", Abstract.build, "classmethod", A, "Abstract", "build"),
    ("class method of an enum", Color.parse, "classmethod", A, "Color", "parse"),
    ("class method of a model", Model.build, "classmethod", A, "Model", "build"),
    ("inherited class method of another module", Record.create, "classmethod", A, "Record", "create"),
    ("built-in", len, "builtin", "builtins", "len", None),
    ("built-in that is also re-exported", operator.add, "builtin", "_operator", "add", None),
    ("built-in of a module of C", math.sqrt, "builtin", "math", "sqrt", None),
    ("built-in with a gadget's power", os.system, "builtin", "posix", "system", None),
    ("built-in of time", time.sleep, "builtin", "time", "sleep", None),
    ("built-in method", [1].append, "builtin_method", "builtins", "list", "append"),
    ("built-in method of a falsy owner", [].append, "builtin_method", "builtins", "list", "append"),
    ("built-in method of an empty text", "".upper, "builtin_method", "builtins", "str", "upper"),
    ("built-in method of zero", (0).bit_length, "builtin_method", "builtins", "int", "bit_length"),
    ("built-in method of False", False.bit_length, "builtin_method", "builtins", "bool", "bit_length"),
    ("built-in class method", dict.fromkeys, "builtin_method", "builtins", "dict", "fromkeys"),
    ("built-in class method through an object", {}.fromkeys, "builtin_method", "builtins", "dict", "fromkeys"),
    ("built-in method of a subclass", MyList().append, "builtin_method", A, "MyList", "append"),
    ("built-in method of a pattern", re.compile("a").match, "builtin_method", "re", "Pattern", "match"),
]

REFUSED = [
    ("nested function", nested, "nested-function"),
    ("closure", closure, "nested-function"),
    ("undecorated wrapper", undecorated, "nested-function"),
    ("lambda", lambda_, "lambda"),
    ("renamed lambda", renamed_lambda, "lambda"),
    ("wrapped lambda", wrapped_lambda, "lambda"),
    ("lambda in a class", plain.method_lambda, "lambda"),
    ("lambda as __call__", LambdaCalling(), "lambda"),
    ("nested class", Plain.Nested, "nested-class"),
    ("local class", Local, "nested-class"),
    ("object of a nested class", Plain.Nested(), "nested-class"),
    ("object of a local class", Local(), "nested-class"),
    ("method of a nested class", Plain.Nested().method, "nested-class"),
    ("method of a local class", Local().method, "nested-class"),
    ("class method of a nested class", Plain.Nested.build, "nested-class"),
    ("class method of a local class", Local.build, "nested-class"),
    ("static method", Plain.static, "static-method"),
    ("static method through an object", plain.static, "static-method"),
    ("static method through a subclass", Child.static, "static-method"),
    ("static override of an instance method", Child.becomes_static, "static-method"),
    ("static override through an object", child.becomes_static, "static-method"),
    ("super() method that a static method overrides", child.super_becomes_static(), "static-method"),
    ("static method of C", str.maketrans, "static-method"),
    ("method without its object", Plain.method, "unbound-method"),
    ("single dispatch method", Dispatching().go, "unbound-method"),
    ("single dispatch method of a class", Dispatching.build, "unbound-method"),
    ("mock of a function", mock.create_autospec(function), "name"),
    ("mock of a class", mock.create_autospec(Plain), "not-found"),
    ("mock", mock.Mock(), "not-found"),
    ("method of a mock", mock.Mock().method, "not-found"),
    ("super() method that is overridden", child.super_overridden, "overridden"),
    ("super() class method that is overridden", ChildBuild.super_build(), "overridden"),
    ("base's method bound to a child that overrides it", types.MethodType(Plain.overridden, child), "overridden"),
    ("super() method of C that is overridden", OverridingList().super_append(), "overridden"),
    ("function that claims to be of a class that is not there", of_no_class, "unbound-method"),
    ("partial", functools.partial(function, 1), "partial"),
    ("partial method", plain.partial_method, "partial"),
    ("lru_cache object", cached, "unsupported"),
    ("cache object", cached_too, "unsupported"),
    ("lru_cache in a class", plain.cached, "unsupported"),
    ("attrgetter", operator.attrgetter("x"), "unsupported"),
    ("methodcaller", operator.methodcaller("x"), "unsupported"),
    ("method descriptor of C", str.upper, "unsupported"),
    ("slot wrapper", str.__len__, "unsupported"),
    ("method wrapper", "x".__len__, "dunder"),
    ("constructor of C", object.__new__, "dunder"),
    ("special method", plain.__dunder__, "dunder"),
    ("__call__ by name", calling.__call__, "dunder"),
    ("__init__", plain.__init__, "dunder"),
    ("name-mangled method", plain.mangled_itself(), "name"),
    ("instance whose __call__ is of C", CCalling(), "unsupported"),
    ("instance whose __call__ is static", StaticCalling(), "unsupported"),
    ("instance whose __call__ is another module's", ForeignCalling(), "foreign-member"),
    ("function hung on a class", plain.hung, "foreign-member"),
    ("function hung on a class under its own name", plain.foreign, "foreign-member"),
    ("function hung on a class under another name", types.MethodType(trap_hung, plain), "not-found"),
    ("method that wraps a built-in", Bound.of_builtin, "unsupported"),
    ("method that wraps an object", Bound.of_object, "unsupported"),
    ("undecorated wrapper of a method", plain.undecorated, "not-found"),
    ("property object", Plain.__dict__["prop"], "not-callable"),
    ("static method object", Plain.__dict__["static"], "descriptor"),
    ("class method object", Plain.__dict__["build"], "descriptor"),
    ("number", 3, "not-callable"),
    ("None", None, "not-callable"),
    ("module", os, "not-callable"),
    ("object that answers nothing", TrappedNotCallable(), "not-callable"),
    ("generator function", generator, "generator"),
    ("async generator function", async_generator, "generator"),
    ("generator-based coroutine", generator_coroutine, "generator"),
    ("generator method", plain.generator, "generator"),
    ("generator as __call__", GeneratorCalling(), "generator"),
    ("async generator as __call__", AsyncGeneratorCalling(), "generator"),
    ("wrapped generator function", wrapped_generator, "generator"),
    ("wrapped async generator function", wrapped_async_generator, "generator"),
    ("context manager", context, "generator"),
    ("async context manager", async_context, "generator"),
    ("method that is a context manager", WrappedGenerators().method, "generator"),
    ("class method that is a context manager", WrappedGenerators.class_method, "generator"),
    ("async context manager as __call__", WrappedGenerators(), "generator"),
    ("class with a metaclass", WithMeta, "metaclass"),
    ("object of a class with a metaclass", WithMeta(), "metaclass"),
    ("method of an object of a class with a metaclass", WithMeta().method, "metaclass"),
    ("class whose metaclass has one", WithMetaOfMeta, "metaclass"),
    ("enum of another metaclass", MetaEnum, "metaclass"),
    ("method of a metaclass", WithMeta.meta_method, "metaclass"),
    ("method of a metaclass on a plain class", types.MethodType(Meta.meta_method, Plain), "not-found"),
    ("mro method", Plain.mro, "not-found"),
    ("replaced function", old_replaced, "not-found"),
    ("deleted function", old_deleted, "not-found"),
    ("method of an object of a replaced class", old_replaced_object.method, "not-found"),
    ("function named in Unicode", café, "name"),
    ("class method of a long name", getattr(MemberNames(), LONG), "name"),
    ("method named in Unicode", getattr(MemberNames(), "naïve"), "name"),
    ("function of a long name", long_name, "name"),
    ("function of a null module", null_module, "name"),
    ("function without a module", no_module, "name"),
    ("function whose name is a trap", trap_name, "name"),
    ("function whose module is a trap", trap_module, "name"),
    ("class whose name is a trap", TrapClassName, "name"),
    ("class whose module is an object", ModuleIsObject, "name"),
    ("class whose module is a trap", ModuleIsTrapText, "name"),
    ("function of __main__", main_function, "main-module"),
    ("function of __mp_main__", mp_main_function, "main-module"),
    ("class of __main__", MainClass, "main-module"),
    ("object of a class of __main__", MainClass(), "main-module"),
    ("method of an object of a class of __main__", MainClass().method, "main-module"),
    ("coroutine object", types.SimpleNamespace(), "not-callable"),
    ("built-in whose module is gone", types.FunctionType.__get__(function, 1).__reduce__, "dunder"),
    ("method of None", None.__dir__, "static-method"),
    ("bound method of a class of C", asyncio.Future.__class_getitem__, "dunder"),
    ("Popen object's method", types.MethodType(subprocess.Popen.kill, plain), "not-found"),
]
