"""Classes that no policy of the tests names, each with one hook of Python's that tells in ``RAN`` that it ran."""

import datetime
import enum
import sys
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, PrivateAttr

RAN: list[str] = []
T = TypeVar("T")
_HERE = sys.modules[__name__]

#: What each hook returns, told of the class's base and the arguments, as far as Python cares.
_ANSWERS: dict[str, Any] = {
    "__hash__": lambda base, self: 7,
    "__eq__": lambda base, self, other: self is other,
    "__ne__": lambda base, self, other: self is not other,
    **dict.fromkeys(("__lt__", "__le__", "__gt__", "__ge__"), lambda base, self, other: True),
    **dict.fromkeys(("__bool__", "__contains__"), lambda base, self, *other: True),
    **dict.fromkeys(("__len__", "__length_hint__", "__index__", "__int__", "__sizeof__"), lambda base, self: 1),
    **dict.fromkeys(("__float__",), lambda base, self: 1.0),
    **dict.fromkeys(("__complex__",), lambda base, self: 1j),
    **dict.fromkeys(("__repr__", "__str__", "__format__", "__fspath__"), lambda base, self, *spec: "text"),
    "__bytes__": lambda base, self: b"text",
    **dict.fromkeys(("__iter__", "__reversed__"), lambda base, self: iter(())),
    "__getattribute__": lambda base, self, name: base.__getattribute__(self, name),
    **dict.fromkeys(("__getattr__", "__getitem__", "__missing__"), lambda base, self, name: None),
    **dict.fromkeys(("__reduce__", "__reduce_ex__"), lambda base, self, *version: (int, ())),
    "__getstate__": lambda base, self: {},
    "__getnewargs__": lambda base, self: (),
    "__getnewargs_ex__": lambda base, self: ((), {}),
    **dict.fromkeys(("__setstate__", "__init__", "__setattr__"), lambda base, self, *args: None),
    "__new__": lambda base, cls, *args: base.__new__(cls, *args) if base is not object else object.__new__(cls),
    **dict.fromkeys(("__call__", "__get__", "__copy__", "__deepcopy__", "__enter__"), lambda base, self, *args: self),
    "__dir__": lambda base, self: [],
    "__instancecheck__": lambda base, self, other: True,
    "__subclasscheck__": lambda base, self, other: True,
    **dict.fromkeys(("__or__", "__and__", "__sub__", "__add__", "__ror__", "__rsub__", "__radd__", "__mod__"), lambda base, self, other: self),
}  # fmt: skip
#: Attributes that are looked at, made by a property.
_PROPERTIES = (
    "__class__", "__dict__", "__signature__", "__wrapped__", "__text_signature__", "__annotations__", "__module__", "__name__", "__doc__",
    "__origin__", "__args__", "__mro__", "__weakref__", "__fields__", "__defaults__", "__code__", "__self__", "__func__",
    "tzinfo", "value", "name", "args", "filename", "int", "_fields", "model_fields",
)  # fmt: skip
_OF_CLASSES = ("__class_getitem__", "__init_subclass__", "__get_pydantic_core_schema__", "__subclasshook__")
HOOKS = (*_ANSWERS, *_PROPERTIES, *_OF_CLASSES)


def _hook(base: type, name: str) -> Any:
    if name in _PROPERTIES:

        def read(self: object) -> object:
            RAN.append(name)
            return int if name == "__class__" else {}

        return property(read)
    if name in _OF_CLASSES:

        def asked(cls: type, *args: object) -> object:
            RAN.append(name)
            return cls if name == "__class_getitem__" else NotImplemented

        return classmethod(asked)
    answer = _ANSWERS[name]

    def hook(*args: Any) -> object:
        RAN.append(name)
        return answer(base, *args)

    hook.__name__, hook.__qualname__, hook.__module__ = name, f"hook.{name}", __name__
    return hook


def loud(base: type, name: str) -> Any:
    """Return a class of this module, with one hook that tells when it runs."""
    title = f"Loud_{base.__name__}_{name.strip('_')}"
    if title not in vars(_HERE):
        namespace = {"__module__": __name__, "__qualname__": title, name: _hook(base, name)}
        if name == "__eq__":
            namespace["__hash__"] = base.__hash__
        setattr(_HERE, title, type(title, (base,), namespace))
    return vars(_HERE)[title]


BASES: tuple[type, ...] = (
    object,
    int,
    float,
    complex,
    str,
    bytes,
    tuple,
    list,
    set,
    frozenset,
    dict,
    uuid.UUID,
    Exception,
    OSError,
    datetime.tzinfo,
)


def objects(base: type, name: str, count: int) -> list[Any]:
    """Return objects of such a class, made without its own hooks."""
    cls = loud(base, name)
    made: list[Any] = []
    for i in range(count):
        if base in (int, float, complex, tuple, frozenset, bytes, str):
            args: Any = {tuple: ((i,),), frozenset: ((i,),), bytes: (b"%d" % i,), str: (str(i),)}.get(base, (i,))
            made.append(base.__new__(cls, *args))
        elif base is uuid.UUID:
            each = object.__new__(cls)
            for attribute, value in (("int", i), ("is_safe", uuid.SafeUUID.unknown)):
                vars(uuid.UUID)[attribute].__set__(each, value)
            made.append(each)
        else:
            made.append(base.__new__(cls))
    return made


@dataclass
class Held:
    one: Any = None
    two: Any = field(default_factory=list)


class Boxed(Generic[T]):
    def __init__(self, value: Any) -> None:
        self.value = value


class Twice(NamedTuple):
    left: Any
    right: Any = None


class Sheet(BaseModel):
    one: Any = None
    _two: Any = PrivateAttr(default=None)


class Sheets(BaseModel, Generic[T]):
    items: list[Any] = []


class Level(enum.Enum):
    LOW = 1


class Slotted:
    __slots__ = ("one",)


def _slotted(value: Any) -> Any:
    made = Slotted()
    made.one = value
    return made


def _attribute(name: Any) -> Any:
    made = object.__new__(Held)
    made.__dict__[name] = 1
    return made


def _space(name: Any) -> Any:
    made = SimpleNamespace()
    made.__dict__[name] = name
    return made


def _name_in_thrown(name: Any) -> Any:
    made = _thrown(1)
    made.__dict__[name] = 1
    return made


def _raised(cls: Any, *args: Any) -> Any:
    made = cls.__new__(cls, *args)
    BaseException.args.__set__(made, args)  # type: ignore[attr-defined]
    return made


def _chained(value: Any) -> Any:
    error = KeyError("text")
    error.__dict__["added"] = value
    return error


def _thrown(*values: Any) -> Any:
    try:
        raise KeyError(*values) from _chained(values[0])
    except KeyError as error:
        return error


#: In these places more objects than are hashed without a count of equal hashes.
MANY = (
    "dict_key",
    "set",
    "frozenset",
    "set_of_sets",
    "mixed_set",
    "ordered",
    "counter",
    "default",
    "keys",
    "items",
    "keys_in_order",
)
#: Ways to hold such objects in a call: a function of the objects, and of their class.
PLACES: dict[str, Any] = {
    "itself": lambda each, cls: each[0],
    "class": lambda each, cls: cls,
    "list": lambda each, cls: list(each),
    "tuple": lambda each, cls: tuple(each),
    "dict_value": lambda each, cls: {"key": each[0]},
    "dict_key": lambda each, cls: dict.fromkeys(each, 1),
    "set": lambda each, cls: set(each),
    "frozenset": lambda each, cls: frozenset(each),
    "set_of_sets": lambda each, cls: {frozenset(each), frozenset(each[:1])},
    "mixed_set": lambda each, cls: {1, "text", *each},
    "ordered": lambda each, cls: OrderedDict.fromkeys(each, 1),
    "counter": lambda each, cls: Counter(each),
    "default": lambda each, cls: defaultdict(cls, dict.fromkeys(each, 1)),
    "deque": lambda each, cls: deque(each),
    "slice": lambda each, cls: slice(each[0], each[1], each[2]),
    "attribute": lambda each, cls: Boxed(each[0]),
    "field": lambda each, cls: Held(each[0], each[1]),
    "slot": lambda each, cls: _slotted(each[0]),
    "named_tuple": lambda each, cls: Twice(each[0], each[1]),
    "model": lambda each, cls: Sheet.model_construct(one=each[0]),
    "attribute_name": lambda each, cls: _attribute(each[0]),
    "name_in_a_namespace": lambda each, cls: _space(each[0]),
    "name_in_a_thrown_error": lambda each, cls: _name_in_thrown(each[0]),
    "argument_of_an_error": lambda each, cls: _raised(OSError, each[0], each[1]),
    "argument_of_a_syntax_error": lambda each, cls: _raised(SyntaxError, "text", each[0]),
    "arguments_of_a_group": lambda each, cls: _raised(ValueError, each[0]),
    "chained": lambda each, cls: _chained(each[0]),
    "thrown": lambda each, cls: _thrown(each[0], each[1]),
    "partial": lambda each, cls: partial(cls, each[0], each[1], key=each[2]),
    "values": lambda each, cls: {"key": each[0]}.values(),
    "keys": lambda each, cls: dict.fromkeys(each, 1).keys(),
    "items": lambda each, cls: dict.fromkeys(each, 1).items(),
    "keys_in_order": lambda each, cls: OrderedDict.fromkeys(each, 1).items(),
    "alias": lambda each, cls: list[cls],
    "alias_of_typing": lambda each, cls: Boxed[cls],
    "generic_model": lambda each, cls: Sheets[cls](),
}  # fmt: skip
