"""The plan of a class: how the codec encodes and decodes its objects, decided once for each class.

``make_plan`` looks at the class and runs none of its code. The plan says which tag the class has, where its objects
keep their state, and which state hooks of Python's data model (``__getstate__``, ``__setstate__``, ``__getnewargs__``,
``__new__``) it defines itself.
"""

from __future__ import annotations

import collections
import copyreg
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, EnumType, Flag
from functools import lru_cache, partialmethod, singledispatchmethod
from inspect import signature
from types import (
    BuiltinFunctionType,
    ClassMethodDescriptorType,
    FunctionType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodWrapperType,
    WrapperDescriptorType,
)
from typing import Any, Final, cast
from uuid import UUID

from pydantic import BaseModel, RootModel

from safedefer.codecs import inspect_safely
from safedefer.codecs.field_defaults import Defaults, of_class, of_model
from safedefer.codecs.registry import TypeRegistry

#: Built-in bases with contents, which objects of subclasses carry as one value, as items, or as keys and values.
CONTENTS: Final[dict[type, str]] = {
    int: "value",
    float: "value",
    complex: "value",
    str: "value",
    bytes: "value",
    tuple: "items",
    frozenset: "items",
    list: "items",
    set: "items",
    dict: "keys",
    UUID: "value",
}
#: The bases among them whose objects are filled after they are made.
MUTABLE: Final[tuple[type, ...]] = (list, set, dict)

REMEDY: Final = "pass an id, register the type (safedefer.register_type), or opt in to pickle"
#: Classes whose values have a plain form of their own, by the name of one in their MRO.
_LISTED: Final = "pass a list of its items"
_PLAIN: Final = {
    **dict.fromkeys(
        (
            "dict_keys",
            "dict_values",
            "dict_items",
            "odict_keys",
            "odict_values",
            "odict_items",
            "generator",
            "map",
            "filter",
            "zip",
            "enumerate",
            "reversed",
            "list_iterator",
            "list_reverseiterator",
            "tuple_iterator",
            "set_iterator",
            "itertools.chain",
            "itertools.islice",
        ),
        _LISTED,
    ),
    "mappingproxy": "pass dict(value)",
    "memoryview": "pass bytes(value)",
    "types.SimpleNamespace": "pass vars(value), which is a dict",
    "functools.partial": "pass the function and its arguments as arguments",
    "module": "pass its name",
    "logging.Logger": "get the logger by its name in the task",
    "_io.BytesIO": "pass value.getvalue()",
    "_io.StringIO": "pass value.getvalue()",
    "_io._IOBase": "pass its path, or what was read from it",
    "google._upb._message.Message": "pass value.SerializeToString(), which is bytes",
    "werkzeug.datastructures.structures.MultiDict": "pass value.to_dict(flat=False), which is a dict",
    "numpy.generic": "pass value.item(), which is a value of Python",
    "numpy.ndarray": f"pass value.tolist() if it is small; else {REMEDY}",
}
#: App Engine's bundled SDK: its attribute is a protobuf, whose own advice would be of no use.
_DB_KEY: Final = "google.appengine.api.datastore_types.Key"
_NAMEDTUPLE_ARGS: Final = cast("Any", collections.namedtuple("_Probe", "a")).__getnewargs__.__code__  # noqa: PYI024
# dataclasses generates these for slotted frozen classes; they only read and set the fields.
_DATACLASS_STATE: Final = tuple(
    getattr(dataclasses, name) for name in ("_dataclass_getstate", "_dataclass_setstate") if hasattr(dataclasses, name)
)
_MODEL_STATE: Final = tuple(
    vars(base)[name] for base in (BaseModel, RootModel) for name in ("__getstate__", "__setstate__")
)

# Classes whose __hash__ and __eq__ are known to be harmless.
_KNOWN: Final[tuple[type, ...]] = (BaseModel, RootModel, Enum, Flag, UUID)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """How the codec carries the objects of one class."""

    cls: type
    tag: str
    base: type = object
    state_of: Callable[[object], Any] | None = None
    slots: dict[str, MemberDescriptorType] = field(default_factory=dict)
    shadowed: tuple[MemberDescriptorType, ...] = ()
    getstate: FunctionType | None = None
    setstate: FunctionType | None = None
    newargs: FunctionType | None = None
    newargs_ex: FunctionType | None = None
    new: FunctionType | None = None
    definers: tuple[type, ...] = ()
    """Other classes of the MRO whose hooks run: the policy must admit them too."""
    hash_definers: tuple[type, ...] = ()
    """The same for ``__hash__`` and ``__eq__``, which run when an object is a dict key or set member."""
    identity_hash: bool = True
    functions: frozenset[str] = frozenset()
    """Names of the functions of the class, without those of declared fields. No attribute of an object may hide one."""
    defaults: Defaults = field(default_factory=dict)
    """Those of declared fields, which tokens from before a field lack."""
    private_defaults: Defaults = field(default_factory=dict)
    """The same for the private attributes of a pydantic model."""


def make_plan(cls: type, registry: TypeRegistry) -> Plan:
    """Make the plan of a class. Runs no code of the class or of its metaclass.

    Raises:
        ValueError: They cannot travel; the message says why, and ends with the remedy.
    """
    if inspect_safely.derives(type(cls), EnumType):
        return Plan(cls, "$enum", hash_definers=hash_definers(cls))
    # Written in Python, and carried like one in C: its own hooks would drop the attributes of a subclass.
    base = inspect_safely.solid_base(cls)
    if base is object and inspect_safely.derives(cls, UUID):
        base = UUID
    exception = inspect_safely.derives(base, BaseException)
    _check_layout(cls, base, exception=exception)
    _refuse_reducers(cls, base)
    slots, shadowed = _slots(cls, base)
    tag, ignored = _tag(cls, base, registry)
    hooks = {
        name: _own_hook(cls, name)
        for name in ("__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__", "__new__")
    }
    definers = tuple(
        {
            id(d): d
            for hook in hooks.values()
            if hook is not None and not ignored(hook[1]) and (d := hook[0]) is not cls and _is_foreign(d)
        }.values()
    )
    own = {name: None if hook is None or ignored(hook[1]) else hook[1] for name, hook in hooks.items()}
    if base is set or base is frozenset:  # the __reduce__ of these two ignores both hooks
        own["__getnewargs__"] = own["__getnewargs_ex__"] = None
    _pair_hooks(own, hooks)
    if any(own.values()):
        if exception:
            raise ValueError(f"an exception with state hooks or a __new__ of its own is not carried; {REMEDY}")
        tag = "$object"
    if own["__new__"] and not (own["__getnewargs__"] or own["__getnewargs_ex__"]):
        if base in CONTENTS and base not in MUTABLE:
            own["__new__"] = None  # the carried value is final: the class's __new__ would change it again
        else:
            _check_bare_new(own["__new__"], cls)
    return Plan(
        cls,
        tag,
        base,
        inspect_safely.dict_getter(cls),
        slots,
        shadowed,
        own["__getstate__"],
        own["__setstate__"],
        own["__getnewargs__"],
        own["__getnewargs_ex__"],
        own["__new__"],
        definers,
        hash_definers(cls),
        # None is no hash at all: nothing hashes its objects.
        (found := inspect_safely.lookup(cls, "__hash__")) is not None and (found[0] is object or found[1] is None),
        function_names(cls),
        *(of_model(cls) if tag == "$model" else (of_class(cls), {})),
    )


def _pair_hooks(own: dict[str, FunctionType | None], hooks: Mapping[str, tuple[type, FunctionType] | None]) -> None:
    """Pair each hook that the class defines with its counterpart, as pickle does, also if a library generated that one.

    Raises:
        ValueError: The state that a generated hook takes or returns is not documented.
    """
    for name, other in (("__getstate__", "__setstate__"), ("__setstate__", "__getstate__")):
        if own[name] is not None and own[other] is None and hooks[other] is not None:
            raise ValueError(f"it defines {name}, and {other} is that of a library; define both, or {REMEDY}")
    new = hooks["__new__"]
    if new is not None and (own["__getnewargs__"] is not None or own["__getnewargs_ex__"] is not None):
        own["__new__"] = new[1]


def _never_called() -> None: ...  # pragma: no cover  # for the type of its cache alone


_FUNCTIONS: Final = (
    FunctionType,
    classmethod,
    staticmethod,
    BuiltinFunctionType,
    MethodDescriptorType,
    ClassMethodDescriptorType,
    WrapperDescriptorType,
    MethodWrapperType,
    # What functools makes of a method.
    type(lru_cache(_never_called)),
    partialmethod,
    singledispatchmethod,
)


def function_names(cls: type) -> frozenset[str]:
    """Return the names of the functions of a class, without those of declared fields."""
    names: set[str] = set()
    declared: set[str] = set()
    for each in inspect_safely.mro(cls):
        own = inspect_safely.namespace(each)
        names.update(name for name, value in own.items() if any(type(value) is kind for kind in _FUNCTIONS))
        declared.update(own.get("__dataclass_fields__", ()), own.get("__pydantic_fields__", ()))
        declared.update(field.name for field in own.get("__attrs_attrs__", ()))
    return frozenset(names - declared)


def _check_layout(cls: type, base: type, *, exception: bool) -> None:
    """Refuse ``object`` itself, and a class that may keep state in C or has a finalizer.

    Raises:
        ValueError: The class is one of these.
    """
    if (base is cls and not exception and cls is not object) or (
        base is not object and base not in CONTENTS and not exception
    ):
        what = (
            "its state is kept in C, or it is a resource of this process"
            if base is cls
            # pydantic models in disguise (SQLModel) declare slots and take their descriptors away.
            else f"{inspect_safely.type_name(base)} has slots that nothing shows"
            if "__slots__" in inspect_safely.namespace(base)
            else f"a subclass of {inspect_safely.type_name(base)} may hide state in C"
        )
        raise ValueError(f"{what}; {_instead(cls)}")
    if _DB_KEY in map(inspect_safely.type_name, inspect_safely.mro(cls)):
        raise ValueError("a key of db is kept in C; pass str(key), and make it again in the task: db.Key(text)")
    if cls is object:
        raise ValueError(
            "a bare object() is nothing but its identity, which does not travel; use None or an enum member"
        )
    if (finalizer := inspect_safely.lookup(cls, "__del__")) is not None:
        raise ValueError(
            f"{inspect_safely.type_name(finalizer[0])} defines __del__, which would run on whatever state a token gives "
            f"the object; {REMEDY}"
        )


def _instead(cls: type) -> str:
    """Return what to do for a class with state in C."""
    names = [inspect_safely.type_name(each) for each in inspect_safely.mro(cls)]
    return next((remedy for name, remedy in _PLAIN.items() if name in names), REMEDY)


def _refuse_reducers(cls: type, base: type) -> None:
    """Refuse a class with a reducer of its own: only pickle runs reducers."""
    for name in ("__reduce_ex__", "__reduce__"):
        found = inspect_safely.lookup(cls, name)
        if found is not None and found[0] is not object and not inspect_safely.derives(base, found[0]):
            raise ValueError(f"{inspect_safely.type_name(found[0])} defines {name}, which is not run; {_instead(cls)}")
    if any(known is cls for known in copyreg.dispatch_table):
        raise ValueError(f"copyreg has a reducer for it, which is not run; {REMEDY}")


def _slots(cls: type, base: type) -> tuple[dict[str, MemberDescriptorType], tuple[MemberDescriptorType, ...]]:
    visible: dict[str, MemberDescriptorType] = {}
    shadowed: list[MemberDescriptorType] = []
    for name, descriptor, hidden in inspect_safely.slots(cls, stop=base):
        if hidden:
            shadowed.append(descriptor)
        else:
            visible[name] = descriptor
    return visible, tuple(shadowed)


def _tag(cls: type, base: type, registry: TypeRegistry) -> tuple[str, Callable[[object], bool]]:
    """Return the tag of a class, and a function that says whether a hook is generated and need not run."""
    if inspect_safely.derives(base, BaseException):
        return "$exception", _never
    if base is tuple and _is_namedtuple(cls):
        return "$namedtuple", _is_namedtuple_hook
    if base is object and inspect_safely.derives(cls, BaseModel):
        return "$model", lambda hook: any(hook is known for known in _MODEL_STATE)
    if base is object and (family := registry.family_of(cls)) is not None:
        return family.tag, cast("Callable[[object], bool]", family.generated)
    if base is object and "__dataclass_fields__" in inspect_safely.namespace(cls):
        return "$dataclass", lambda hook: any(hook is known for known in _DATACLASS_STATE)
    return "$object", lambda hook: any(hook is known for known in _DATACLASS_STATE)


def _never(_hook: object) -> bool:
    return False


def _is_namedtuple(cls: type) -> bool:
    found = inspect_safely.lookup(cls, "_fields")
    return found is not None and type(found[1]) is tuple and _fields_home(found[0])


def _fields_home(cls: type) -> bool:
    args = inspect_safely.namespace(cls).get("__getnewargs__")
    return type(args) is FunctionType and args.__code__ is _NAMEDTUPLE_ARGS


def _is_namedtuple_hook(hook: object) -> bool:
    if type(hook) is not FunctionType:
        return False
    # The generated __new__ calls `tuple.__new__`, and is compiled in a namespace of its own.
    home = str(hook.__globals__.get("__name__", ""))
    return hook.__code__ is _NAMEDTUPLE_ARGS or (hook.__name__ == "__new__" and home.startswith("namedtuple_"))


def _own_hook(cls: type, name: str) -> tuple[type, FunctionType] | None:
    """Return the class that defines a hook in Python, and the function; None if the hook is built in.

    Raises:
        ValueError: The hook is not a plain function.
    """
    found = inspect_safely.lookup(cls, name)
    if found is None or found[0] is UUID or not inspect_safely.made_in_python(found[0]):
        return None
    raw = found[1].__func__ if type(found[1]) is staticmethod and name == "__new__" else found[1]
    if type(raw) is not FunctionType:
        raise ValueError(f"its {name} is not a plain function; {REMEDY}")
    return found[0], raw


def _check_bare_new(new: FunctionType, cls: type) -> None:
    try:
        signature(inspect_safely.without_annotations(new)).bind(cls)
    except (TypeError, ValueError):
        raise ValueError(f"its __new__ needs arguments that nobody knows; define __getnewargs__, or {REMEDY}") from None


def hash_definers(cls: type) -> tuple[type, ...]:
    """Return the classes from which a class inherits ``__hash__`` or ``__eq__``, without those known to be harmless."""
    found = (inspect_safely.lookup(cls, name) for name in ("__hash__", "__eq__"))
    return tuple(each[0] for each in found if each is not None and each[0] is not cls and _is_foreign(each[0]))


def _is_foreign(cls: type) -> bool:
    """Whether a class is neither built in nor one of those whose comparisons are known to be harmless."""
    return inspect_safely.made_in_python(cls) and not any(cls is known for known in _KNOWN)
