"""References to callables: the name of what a task calls, proved both ways.

The documented categories (App Engine ``deferred``) may travel: functions and classes at the top
level of a module, objects of such classes that implement ``__call__``, their instance methods and
class methods, built-in functions and built-in methods. Nested functions and classes, lambdas and
static methods may not, nor may anything else that happens to be callable.

The one rule behind the categories: **a reference is right when looking it up again gives back the
very same object and classifies it as the same kind.** ``CallableRef.of`` proves it where the task
is made, ``CallableRef.resolve`` proves it again where the task runs.

Look-ups read ``__dict__`` of modules and, along the MRO, of classes. No property, descriptor,
``__getattr__`` or metaclass of the user's runs.

Over 450 lines, since naming and finding again are one proof in two directions and share every look-up.
"""

from __future__ import annotations

import inspect
import re
import sys
from abc import ABCMeta
from collections.abc import Callable
from enum import Enum, EnumType
from functools import lru_cache, partial, singledispatchmethod
from importlib import import_module
from types import (
    BuiltinFunctionType,
    ClassMethodDescriptorType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    NoneType,
)
from typing import Annotated, Any, ClassVar, Final, Literal, Protocol, TypeAlias, cast

import typing_extensions
from pydantic import BaseModel, ConfigDict, Field

from safedefer.callables import refusals
from safedefer.callables.getters import class_dict, class_module, class_mro, class_qualname, module_dict
from safedefer.callables.wrappers import is_bound_task, unwrapped
from safedefer.errors import NotDeferrable, UnresolvableCallable

# Identifiers are ASCII: Python folds others by NFKC, so two texts would name one thing.
_IDENTIFIER = "[A-Za-z_][A-Za-z0-9_]*"
_MAX_NAME: Final = 255
# pydantic's engine anchors `$` at the very end of the text; Python's own `$` would let "os\n" pass.
ModuleName = Annotated[str, Field(pattern=rf"^{_IDENTIFIER}(\.{_IDENTIFIER})*$", max_length=_MAX_NAME)]
Qualname = Annotated[str, Field(pattern=rf"^{_IDENTIFIER}(\.{_IDENTIFIER})*$", max_length=_MAX_NAME)]
MemberName = Annotated[str, Field(pattern=r"^(_?[A-Za-z][A-Za-z0-9_]*|_[0-9][A-Za-z0-9_]*|_)$", max_length=_MAX_NAME)]

_DOTTED = re.compile(rf"{_IDENTIFIER}(?:\.{_IDENTIFIER})*")
_MEMBER = re.compile(rf"(?!__){_IDENTIFIER}")

#: Classes of these metaclasses may be deferred: what they do when called or looked at is known.
METACLASSES: Final[frozenset[type]] = frozenset(
    {type, ABCMeta, EnumType, type(BaseModel), type(Protocol), type(typing_extensions.Protocol)}
)
#: Special names that any metaclass may define: none runs when a class is called, compared or asked for an attribute.
_QUIET: Final = frozenset(
    {
        "__module__", "__qualname__", "__doc__", "__slots__", "__annotations__", "__annotate__", "__annotate_func__", "__firstlineno__", "__static_attributes__",
        "__init__", "__new__", "__prepare__", "__init_subclass__", "__repr__", "__str__", "__dir__", "__setattr__", "__delattr__", "__iter__", "__contains__", "__getitem__",
    }
)  # fmt: skip
#: What stands under them: a descriptor of another type would run code of its own.
_QUIET_TYPES: Final = (FunctionType, classmethod, staticmethod, str, NoneType, tuple, dict, int)
#: What of a metaclass matters to values too: its classes are singletons, or decoding hashes them as set members.
_LOUD_FOR_VALUES: Final = frozenset({"__class__", "__call__", "__hash__", "__eq__"})

#: Types of built-in functions and methods: methods of some classes of C know their class (``METH_METHOD``).
BUILTIN_TYPES: Final[tuple[type, ...]] = (BuiltinFunctionType, type(re.compile("").match))

#: How many decorators are looked through.
_MAX_WRAPPED: Final = 100
#: Modules that are another file in every process.
_MAIN_MODULES: Final = frozenset({"__main__", "__mp_main__"})


class _Unbound(Enum):
    UNBOUND = "unbound"


#: Stands for "no object": the callable is not a method or an instance.
UNBOUND: Final = _Unbound.UNBOUND

AnyCallable: TypeAlias = Callable[..., object]


#: The categories of callables that may be deferred (App Engine ``deferred``, module doc).
KindName: TypeAlias = Literal["function", "class", "instance", "method", "classmethod", "builtin", "builtin_method"]


class CallableRef(BaseModel):
    """The name of a callable: enough to find it again, never the callable itself.

    ``module`` and ``qualname`` name a function or a class; ``member`` names a method of that class.
    The object of a method or instance is not part of the name: it travels as a typed value.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(
        strict=True, frozen=True, extra="forbid", hide_input_in_errors=True, defer_build=True
    )

    kind: KindName
    module: ModuleName
    qualname: Qualname
    member: MemberName | None = None

    def __str__(self) -> str:
        """Return ``module:qualname`` or ``module:qualname.member``: the form that policies use."""
        return f"{self.module}:{self.qualname}" + (f".{self.member}" if self.member is not None else "")

    @property
    def parts(self) -> tuple[KindName, str, str, str | None]:
        """Kind, module, qualname and member: what makes two references, of whichever class, the same."""
        return self.kind, self.module, self.qualname, self.member

    @classmethod
    def of(cls, obj: object, *, metaclasses: frozenset[type] = METACLASSES) -> CallableRef:
        """Name a callable, and prove that the name leads back to it.

        Args:
            obj: The callable.
            metaclasses: Metaclasses that a class may have.

        Returns:
            The reference.

        Raises:
            NotDeferrable: It is none of the documented kinds, or its name leads elsewhere. The
                message says what to do; ``reason`` is a stable slug.
        """
        return _classify(obj, metaclasses)

    def resolve(self, bound: object = UNBOUND, *, metaclasses: frozenset[type] = METACLASSES) -> AnyCallable:
        """Find the callable again, and prove that it is what the reference says.

        Imports the module. Whether that may happen is the policy's to say, and it is asked first.

        Args:
            bound: The decoded object of an ``instance``, ``method`` or ``builtin_method``.
            metaclasses: Metaclasses that a class may have.

        Returns:
            The callable, bound where the kind is a method's.

        Raises:
            UnresolvableCallable: It is missing, or is something else now.
        """
        try:
            found = self._bind(bound)
            if found is not None and _classify(found, metaclasses).parts == self.parts:
                return found
        except NotDeferrable as error:
            raise UnresolvableCallable(f"{self} cannot be called: {error}") from error
        raise UnresolvableCallable(
            f"{self} does not lead back to a {self.kind} of that name; "
            "deploy the code that the task was made for, or map the old name with Policy(moved=...)"
        )

    def _bind(self, bound: object) -> AnyCallable | None:
        owner, member = find(self.module, self.qualname), self.member
        if self.kind in {"function", "class", "builtin"}:
            return cast("AnyCallable", owner) if member is None and bound is UNBOUND else None
        if self.kind == "instance":
            return cast("AnyCallable", bound) if member is None and type(bound) is owner else None
        if not _is_class(owner) or member is None:
            return None
        return _bind_member(self.kind, cast("type", owner), member, bound)


@lru_cache(maxsize=4096)
def reference(kind: KindName, module: str, qualname: str, member: str | None) -> CallableRef:
    """Return the reference of a name. The same name gives the same object, by which ``policy_cache`` knows it.

    Raises:
        pydantic.ValidationError: It is no name.
    """
    return CallableRef(kind=kind, module=module, qualname=qualname, member=member)


def bound_object(obj: object) -> object:
    """Return the object that a callable is bound to and that must travel with it, else ``UNBOUND``."""
    kind = type(obj)
    if kind is FunctionType:
        return UNBOUND
    if kind is MethodType:
        owner = cast("MethodType", obj).__self__
        return UNBOUND if _is_class(owner) else owner
    if _is_builtin(kind):
        owner = cast("Any", obj).__self__
        return UNBOUND if owner is None or type(owner) is ModuleType else owner
    return UNBOUND if _is_class(obj) else obj


def find(module: str, qualname: str) -> object:
    """Import ``module`` and look ``qualname`` up in it, reading ``__dict__`` only. Of a wrapper, return its function.

    Raises:
        UnresolvableCallable: There is no such module or name, or the module fails to import.
    """
    # fullmatch, and before import: import_module("os\0") returns a working `os` on current CPythons.
    if _DOTTED.fullmatch(module) is None or _DOTTED.fullmatch(qualname) is None:
        raise UnresolvableCallable("module and qualified name must be dotted ASCII identifiers; defer a named object")
    loaded: object = sys.modules.get(module)
    if loaded is None:
        try:
            loaded = import_module(module)
        except Exception as error:
            raise UnresolvableCallable(
                f"the module {module} cannot be imported ({type(error).__name__}); deploy it, or mend its import"
            ) from error
    if not issubclass(type(loaded), ModuleType):
        raise UnresolvableCallable(f"{module} is not a module here; do not replace modules that tasks live in")
    first, *rest = qualname.split(".")
    found: object = module_dict(loaded).get(first, UNBOUND)
    for part in rest:
        found = class_dict(found).get(part, UNBOUND) if _is_class(found) else UNBOUND
    if found is UNBOUND:
        raise UnresolvableCallable(
            f"{module}:{qualname} does not exist (no __getattr__ is asked); deploy it, or map the old name with Policy(moved=...)"
        )
    inner: Any = unwrapped(found)
    return inner if inner is not found and (inner.__module__, inner.__qualname__) == (module, qualname) else found


def find_member(owner: type, member: str) -> tuple[type, object]:
    """Return the class of ``owner``'s MRO that defines ``member``, and the raw attribute there.

    Raises:
        UnresolvableCallable: No class of the MRO defines it.
    """
    for cls in class_mro(owner):
        namespace = class_dict(cls)
        if member in namespace:
            return cls, namespace[member]
    raise UnresolvableCallable(f"{class_path(owner)} has no member {member}; deploy the code that has it")


def generic_origin(cls: type) -> type:
    """Return the generic pydantic model that ``Page[int]`` is made from; of any other class, the class itself."""
    own = class_dict(cls).get("__pydantic_generic_metadata__")
    origin = own.get("origin") if type(own) is dict else None
    return cast("type", origin) if origin is not None and class_mro(cls)[1] is origin else cls


def class_path(cls: type) -> str:
    """Return ``module:qualname`` as the class itself says it, reading no metaclass code. What is no text is empty."""
    module = class_dict(cls).get("__module__")
    if module is None:
        # Static types of C keep the module inside tp_name; only type's own getter knows it.
        module = class_module(cls)
    return f"{_text(module)}:{_text(class_qualname(cls))}"


def check_class(cls: type, *, metaclasses: frozenset[type] = METACLASSES, nested: bool = False) -> tuple[str, str]:
    """Prove that a class is found again by its name.

    Args:
        cls: The class.
        metaclasses: Metaclasses that it may have.
        nested: Whether a class inside a class will do (as a value it does, as a task it does not).

    Returns:
        Its module and qualified name.

    Raises:
        NotDeferrable: It is not found, or is something else.
    """
    module, _, qualname = class_path(cls).partition(":")
    if "<locals>" in qualname:
        raise refusals.local_class(qualname)
    if "." in qualname and not nested:
        raise refusals.nested_class(qualname)
    # By identity: a set would ask the metaclass's own metaclass for a hash.
    if type(cls) is not type and not any(type(cls) is known for known in metaclasses):
        name, loud = class_path(type(cls)), loud_hooks(cls)
        for hook in (hook for hook in loud if not nested or hook in _LOUD_FOR_VALUES):
            raise refusals.metaclass(qualname, name, hook)
    _prove(cls, module, qualname)
    return module, qualname


def loud_hooks(cls: type) -> list[str]:
    """Return what the metaclass of a class defines that may run when the class is called, compared or asked for an attribute.

    A metaclass of its own counts as ``__class__``. Judged by what stands in the namespaces; nothing of them runs.
    """
    known, meta = (object, *METACLASSES), type(cls)
    loud = [] if any(type(meta) is each for each in known) else ["__class__"]
    for each in (each for each in class_mro(meta) if not any(each is base for base in known)):
        loud += [_text(name) for name, value in class_dict(each).items() if not _is_quiet(cls, name, value)]
    return loud


def _is_quiet(cls: type, name: object, value: object) -> bool:
    """Whether an attribute of the metaclass runs only if it is asked for by its name, which no attribute of the class has."""
    if type(name) is not str or (name[:2] == "__" and name[-2:] == "__"):
        return type(name) is str and name in _QUIET and any(type(value) is kind for kind in _QUIET_TYPES)
    data = any(hook in class_dict(kind) for kind in class_mro(type(value)) for hook in ("__set__", "__delete__"))
    return not (data and any(name in class_dict(each) for each in class_mro(cls)))


# --- Classification -------------------------------------------------------------------------------


def _classify(obj: object, metaclasses: frozenset[type]) -> CallableRef:
    obj = unwrapped(obj)
    kind = type(obj)
    if kind is FunctionType:
        return _function(cast("FunctionType", obj))
    if kind is MethodType:
        return _method(cast("MethodType", obj), metaclasses)
    if _is_builtin(kind):
        return _builtin(obj, metaclasses)
    if _is_class(obj):
        module, qualname = check_class(cast("type", obj), metaclasses=metaclasses)
        # A metaclass, or an enum without members (its functional API), makes a class of the names and functions it is given.
        if issubclass(cast("type", obj), type) or (
            issubclass(kind, EnumType) and not class_dict(obj).get("_member_map_")
        ):
            raise refusals.makes_class(qualname)
        return reference("class", module, qualname, None)
    return _instance(obj, metaclasses)


def _function(func: FunctionType) -> CallableRef:
    _check_code(func)
    module, qualname = _text(func.__module__), _text(func.__qualname__)
    if "<locals>" in qualname:
        raise refusals.nested_function()
    if "." in qualname:
        raise refusals.unbound_method(qualname, _kind_of_member(module, qualname))
    # Such as the ``__getattr__`` of a module, which may import what it is asked for.
    if qualname.startswith("__") and qualname.endswith("__"):
        raise refusals.special_function(qualname)
    _prove(func, module, qualname)
    return reference("function", module, qualname, None)


def _method(method: MethodType, metaclasses: frozenset[type]) -> CallableRef:
    owner: object = method.__self__
    func: object = method.__func__
    if type(func) is not FunctionType:
        raise refusals.wrapped_method()
    is_class = _is_class(owner)
    cls = cast("type", owner) if is_class else type(owner)
    member = _text(func.__name__)
    _check_code(func)
    _check_member(member)
    named = cls if is_class else generic_origin(cls)
    module, qualname = check_class(named, metaclasses=metaclasses)
    definer, raw = _static_member(named, member)
    if is_class:
        if type(raw) is not classmethod or raw.__func__ is not func:
            raise refusals.overridden_classmethod(qualname, member)
    elif raw is not func:
        raise refusals.other_member(qualname, member, raw)
    _check_home(func, definer, member)
    return reference("classmethod" if is_class else "method", module, qualname, member)


def _builtin(obj: object, metaclasses: frozenset[type]) -> CallableRef:
    owner: object = cast("Any", obj).__self__
    name = _text(cast("Any", obj).__name__)
    if owner is None or type(owner) is ModuleType:
        return _builtin_function(obj, owner, name)
    _check_member(name)
    is_class = _is_class(owner)
    cls = cast("type", owner) if is_class else type(owner)
    module, qualname = check_class(cls, metaclasses=metaclasses)
    _, raw = _static_member(cls, name)
    found = cast("Any", _bind_raw(raw, owner, cls))
    # The same object and the same C function: ``==`` compares both, and runs no code of the object's.
    if found is None or found.__self__ is not owner or found != obj:
        raise refusals.other_member(qualname, name, raw)
    return reference("builtin_method", module, qualname, name)


def _builtin_function(obj: object, home: ModuleType | None, name: str) -> CallableRef:
    modules = [module_dict(home).get("__name__")] if home is not None else []
    for module in map(_text, (*modules, cast("Any", obj).__module__)):
        if len(module) <= _MAX_NAME and is_found(obj, module, name):
            return reference("builtin", module, name, None)
    raise refusals.missing_builtin(name, cast("Any", obj).__qualname__)


#: What a singledispatchmethod gives is a function, refused by its name, and from Python 3.14 on an object of this class.
_DISPATCHING: Final = type(singledispatchmethod(partial).__get__(None, object))


def _instance(obj: object, metaclasses: frozenset[type]) -> CallableRef:
    cls = type(obj)
    if cls is _DISPATCHING:
        raise refusals.unbound_method("it", singledispatchmethod)
    if is_bound_task(obj):
        raise refusals.bound_task()
    definer = next((c for c in class_mro(cls) if "__call__" in class_dict(c)), None)
    call = class_dict(definer)["__call__"] if definer is not None else None
    if definer is None or type(call) is not FunctionType:
        raise refusals.not_callable(cls, class_qualname(cls), has_call=definer is not None)
    _check_code(call)
    module, qualname = check_class(cls, metaclasses=metaclasses)
    # `__call__ = run` in the class itself is one more name for a method of it.
    _check_home(call, definer, _text(call.__qualname__).rpartition(".")[2])
    return reference("instance", module, qualname, None)


# --- Proofs ---------------------------------------------------------------------------------------


def _prove(obj: object, module: str, qualname: str) -> None:
    """Refuse unless looking ``module:qualname`` up gives ``obj`` itself."""
    if _DOTTED.fullmatch(module) is None or _DOTTED.fullmatch(qualname) is None:
        raise refusals.not_ascii(module, qualname)
    if len(module) > _MAX_NAME or len(qualname) > _MAX_NAME:
        raise refusals.long_name(_MAX_NAME)
    if module in _MAIN_MODULES:
        raise refusals.main_module(module, qualname)
    if not is_found(obj, module, qualname):
        raise refusals.found_otherwise(module, qualname)


def is_found(obj: object, module: str, qualname: str) -> bool:
    """Whether looking ``module:qualname`` up gives ``obj`` itself. Imports the module."""
    try:
        return find(module, qualname) is obj
    except UnresolvableCallable:
        return False


def _static_member(cls: type, member: str) -> tuple[type, object]:
    try:
        return find_member(cls, member)
    except UnresolvableCallable as error:
        raise refusals.missing_member(class_qualname(cls), member) from error


def _check_code(func: FunctionType) -> None:
    if func.__code__.co_name == "<lambda>" or func.__name__ == "<lambda>":
        raise refusals.lambda_function()
    # What functools.wraps wrapped counts too: @contextmanager and the like call it, and run nothing of its body.
    inner: object = func
    for _ in range(_MAX_WRAPPED):
        if type(inner) is not FunctionType:
            break
        if inner.__code__.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
            raise refusals.generator()
        inner = inner.__dict__.get("__wrapped__")


def _check_member(member: str) -> None:
    if member.startswith("__") and member.endswith("__"):
        raise refusals.special_method(member)
    if _MEMBER.fullmatch(member) is None:
        raise refusals.mangled_member(member)
    if len(member) > _MAX_NAME:
        raise refusals.long_member(_MAX_NAME)


def _check_home(func: FunctionType, definer: type, member: str) -> None:
    """Refuse a function that only hangs on the class: it has a name of its own elsewhere."""
    module, qualname = _text(func.__module__), _text(func.__qualname__)
    if f"{module}:{qualname}" != f"{class_path(definer)}.{member}":
        raise refusals.foreign_member(member, module, qualname)


def _kind_of_member(module: str, qualname: str) -> type | None:
    """Return the type of what a class has under the name of a function, for the message that refuses the function."""
    owner, _, name = qualname.rpartition(".")
    try:
        raw = find(module, owner)
        return type(find_member(cast("type", raw), name)[1]) if _is_class(raw) else None
    except (UnresolvableCallable, TypeError):
        return None


# --- Look-ups of members --------------------------------------------------------------------------


def _bind_member(kind: KindName, cls: type, member: str, bound: object) -> AnyCallable | None:
    """Bind a member to the class itself or to an object of exactly that class, as the kind says; None if that cannot be."""
    if kind == "classmethod":
        fits = bound is UNBOUND
    elif kind == "method":
        fits = type(bound) is cls or generic_origin(type(bound)) is cls
    else:
        fits = bound is not UNBOUND and (bound is cls or type(bound) is cls)
    if not fits:
        return None
    _, raw = find_member(cls, member)
    if kind == "builtin_method":
        return _bind_raw(raw, bound, cls)
    if kind == "method":
        return MethodType(raw, bound) if type(raw) is FunctionType else None
    if type(raw) is not classmethod or type(raw.__func__) is not FunctionType:
        return None
    return MethodType(raw.__func__, cls)


def _bind_raw(raw: object, bound: object, cls: type) -> AnyCallable | None:
    """Bind a method descriptor of C to its object; the descriptor's own code is CPython's."""
    if type(raw) is MethodDescriptorType and bound is not cls:
        found: object = cast("Any", raw).__get__(bound, cls)
    elif type(raw) is ClassMethodDescriptorType and bound is cls:
        found = cast("Any", raw).__get__(None, cls)
    else:
        return None
    return cast("AnyCallable", found) if _is_builtin(type(found)) else None


# --- Small parts ----------------------------------------------------------------------------------


def _is_class(obj: object) -> bool:
    # issubclass of the type, not isinstance of the object: isinstance reads obj.__class__, user code.
    return issubclass(type(obj), type)


def _is_builtin(kind: type) -> bool:
    # By identity: `in` of a set would ask the user's metaclass for a hash, and that of a tuple for equality.
    return any(kind is builtin for builtin in BUILTIN_TYPES)


def _text(value: object) -> str:
    """Return a name as it is if it is exactly text, else empty: a subclass of ``str`` brings methods of its own."""
    return value if type(value) is str else ""
