"""Inspect objects and classes without running their code.

``isinstance`` reads ``v.__class__``, ``getattr`` runs properties and ``__getattr__``, and ``==`` and
``hash`` run methods. The functions of this module read only data of the interpreter: the exact type, the MRO,
the namespaces of classes, and the C descriptors of an object's ``__dict__`` and slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType, GetSetDescriptorType, MemberDescriptorType
from typing import Any, Final, cast

from safedefer.callables.getters import class_dict, class_module, class_mro, class_qualname

_BASE: Final = cast("Any", type.__dict__["__base__"]).__get__
_FLAGS: Final = cast("Any", type.__dict__["__flags__"]).__get__
_SIZE: Final = cast("Any", type.__dict__["__basicsize__"]).__get__

# Include/object.h. HEAP: made by a class statement or PyType_FromSpec. IMMUTABLE: made in C.
_HEAP: Final = 1 << 9
_IMMUTABLE: Final = 1 << 8
_POINTER: Final = tuple.__itemsize__

MISSING: Final = object()


def mro(cls: type) -> tuple[type, ...]:
    """Return the MRO that the interpreter uses."""
    return cast("tuple[type, ...]", class_mro(cls))


def namespace(cls: type) -> dict[str, Any]:
    """Return the namespace of the class itself (a read-only view, typed as a dict)."""
    return cast("dict[str, Any]", class_dict(cls))


def type_name(cls: type) -> str:
    """Return ``module.qualname`` for messages; ``qualname`` alone for built-ins."""
    try:
        module = class_module(cls)  # of a class made in C too, such as numpy.bool, whose namespace does not have it
    except AttributeError:
        module = None
    name = cast("str", class_qualname(cls))
    return f"{module}.{name}" if type(module) is str and module != "builtins" else name


def derives(cls: type, base: type) -> bool:
    """Whether ``base`` is in the MRO of ``cls``. No ``__subclasscheck__`` runs."""
    for each in class_mro(cls):  # noqa: SIM110 - any() makes a generator, and this is asked for each object of a call
        if each is base:
            return True
    return False


def lookup(cls: type, name: str) -> tuple[type, Any] | None:
    """Return the class of the MRO that defines ``name``, and the raw attribute; None if none does."""
    for each in mro(cls):
        own = namespace(each)
        if name in own:
            return each, own[name]
    return None


def made_in_python(cls: type) -> bool:
    """Whether a class statement made the class, so that ``__dict__`` and slots are all its state.

    A class made in C may have more state: then its objects are larger than ``__dict__`` and slots explain.
    """
    flags = _FLAGS(cls)
    if not flags & _HEAP or flags & _IMMUTABLE:
        return False
    own = namespace(cls)
    slots = sum(1 for value in own.values() if _is_slot_of(cls, value))
    spare = sum(1 for name in ("__dict__", "__weakref__") if type(own.get(name)) is GetSetDescriptorType)
    hidden = (_SIZE(cls) - _SIZE(_BASE(cls))) // _POINTER - slots
    return bool(0 <= hidden <= spare)


def _is_slot_of(cls: type, value: object) -> bool:
    # A decorator that makes a second class (attrs) copies the slot descriptors of the first, which fit no object of it.
    return type(value) is MemberDescriptorType and value.__objclass__ is cls


def solid_base(cls: type) -> type:
    """Return the nearest base that was made in C. It decides the memory layout of the objects."""
    base = cls
    while made_in_python(base):
        base = _BASE(base)
    return base


def dict_getter(cls: type) -> Callable[[object], Any] | None:
    """Return a function that reads the ``__dict__`` of an object of the class; None if they have none.

    Raises:
        ValueError: The class hides it behind a property of its own.
    """
    found = lookup(cls, "__dict__")
    if found is None:
        return None
    if type(found[1]) is not GetSetDescriptorType:
        raise ValueError(
            "the class hides its __dict__ behind an attribute of its own; pass an id, or register the type"
        )
    return cast("Callable[[object], Any]", found[1].__get__)


def slots(cls: type, *, stop: type) -> Iterator[tuple[str, MemberDescriptorType, bool]]:
    """Yield the slots of the classes below ``stop``, base first: name, descriptor, and whether another name shadows it."""
    for each in reversed(mro(cls)):
        if each is stop or not made_in_python(each):
            continue
        for name, value in namespace(each).items():
            if _is_slot_of(each, value):
                visible = lookup(cls, name)
                yield name, value, visible is None or visible[1] is not value


def function(cls: type, name: str) -> FunctionType | None:
    """Return the attribute ``name`` of the class if it is a plain Python function, else None."""
    found = lookup(cls, name)
    return found[1] if found is not None and type(found[1]) is FunctionType else None


def without_annotations(function: FunctionType) -> FunctionType:
    """Return a function of the same parameters and defaults. Annotations are code too, from Python 3.14 on."""
    bare = FunctionType(function.__code__, {}, function.__name__, function.__defaults__, function.__closure__)
    bare.__kwdefaults__ = function.__kwdefaults__
    return bare
