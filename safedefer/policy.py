"""Policy: what may run. Immutable, and required: without one nothing runs.

====================  ============================================================================
pattern               allows
====================  ============================================================================
``pkg.mod``           the module's own top-level functions and classes, their objects and methods
``pkg.*``             the package and all below it, ``__main__`` modules excepted
``mod:qualname``      exactly that object; a class with its own members and its objects
``deferrable=True``   also what was decorated ``@deferrable`` in a module that is imported already
====================  ============================================================================

The rules, in the order in which they are asked:

1. By name, before anything is imported. Built-ins, the standard library and gadgets need an exact
   pattern.
2. The reference is resolved and proved (``refs``).
3. By identity. An exact pattern admits the object that it named when the policy was loaded. A member
   is admitted only if the class of the MRO that defines it is: an inherited one from elsewhere
   needs a pattern of its own, ``mod:Class.member``. Built-in methods are admitted one by one,
   ``builtins:list.append``: no callee is implicit. A class may be called if those that define its
   ``__init__`` and ``__new__`` are admitted, or in a table of harmless ones.

The same policy is asked in ``defer()``, so that a mistake shows at the sender.

Over 450 lines, since what a pattern may name and what it then admits are one set of rules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from importlib import import_module
from types import ClassMethodDescriptorType, FunctionType, MappingProxyType, MethodDescriptorType
from typing import Any, Final, NoReturn, TypeVar, cast, final

from pydantic import ValidationError

from safedefer.callables import refusals
from safedefer.callables.getters import class_mro
from safedefer.callables.policy_patterns import EXACT, OTHER_MODULES, PatternsByKind, check_moved, read_patterns
from safedefer.callables.wrappers import unwrapped
from safedefer.errors import (
    CapabilityExceeded,
    ConfigurationError,
    NotDeferrable,
    PolicyViolation,
    UnresolvableCallable,
)
from safedefer.gadgets import GADGETS, HARMLESS_BASES, HARMLESS_TYPES, is_gadget, is_standard_library
from safedefer.keys import Immutable
from safedefer.refs import (
    METACLASSES,
    UNBOUND,
    CallableRef,
    check_class,
    class_path,
    find,
    find_member,
    is_found,
    reference,
)

_T = TypeVar("_T")

#: The longest name that a class inside the arguments may have, before it is taken apart.
_MAX_NAME: Final = 511

#: What runs when a class is called. Those of built-in classes are of types of their own, and ``__new__`` is static.
_CONSTRUCTION: Final = ("__new__", "__init__")
#: Marked objects by identity. The object is kept, so that its id is never another's.
_MARKED: Final[dict[int, object]] = {}

_HARMLESS_NAMES: Final = {class_path(cls): cls for cls in HARMLESS_TYPES}


def deferrable(obj: _T) -> _T:
    """Mark a function or class, so that ``Policy(deferrable=True)`` admits it.

    The mark is on this object alone: subclasses and wrappers do not inherit it.

    Raises:
        ConfigurationError: It is neither; built-ins need an exact pattern.
    """
    if type(obj) is not FunctionType and not issubclass(type(obj), type):
        raise ConfigurationError(
            f"@deferrable marks functions and classes, not {type(obj).__qualname__}; use an exact pattern 'module:name'"
        )
    _MARKED[id(obj)] = obj
    return obj


@final
class Policy(Immutable):
    """Which references may run.

    Args:
        patterns: ``pkg.mod``, ``pkg.*`` or ``mod:qualname``. None: nothing may run.
        deferrable: Whether ``@deferrable`` marks count.
        moved: Old names to new ones, ``{"old.mod:f": "new.mod:f"}``: queued tasks of renamed things
            keep running. One step; both names must be admitted.
        metaclasses: Further metaclasses that classes may have, or ``mod:qualname`` of them.

    Raises:
        ConfigurationError: A pattern is malformed, or names the standard library as a whole. One that names nothing is
            found by ``load``, or by the first use.
    """

    __slots__ = ("_deferrable", "_moved", "_named_metaclasses", "_read", "_resolved", "patterns")

    patterns: tuple[str, ...]
    """The patterns, as given."""
    _read: PatternsByKind
    _resolved: tuple[Mapping[str, object], frozenset[type]] | None
    _deferrable: bool
    _moved: Mapping[str, str]
    _named_metaclasses: tuple[type | str, ...]

    def __init__(
        self,
        *patterns: str,
        deferrable: bool = False,
        moved: Mapping[str, str] | None = None,
        metaclasses: Iterable[type | str] = (),
    ) -> None:
        moved = dict(moved or {})
        check_moved(moved)
        self._set(
            patterns=patterns,
            _read=read_patterns(patterns),
            _resolved=None,
            _deferrable=deferrable,
            _moved=MappingProxyType(moved),
            _named_metaclasses=tuple(metaclasses),
        )

    def __repr__(self) -> str:
        """Show the patterns."""
        # One that was refused while it was made is shown in its traceback.
        marks = ", deferrable=True" if getattr(self, "_deferrable", False) else ""
        return f"Policy({', '.join(map(repr, getattr(self, 'patterns', ())))}{marks})"

    @property
    def is_settled(self) -> bool:
        """See ``Gate.is_settled``."""
        return not self._deferrable

    def restricted(self, patterns: Iterable[str]) -> _Restricted:
        """Return the gate that admits what both this policy and the ``patterns`` of a key admit."""
        return _Restricted(self, self.only(*patterns))

    def only(self, *patterns: str) -> Policy:
        """Return a policy of some patterns alone, with the same moves and metaclasses, in which no mark counts."""
        return Policy(*patterns, moved=self._moved, metaclasses=self._named_metaclasses)

    def resolve(self) -> tuple[Mapping[str, object], frozenset[type]]:
        """Return what the exact patterns and the metaclasses name: looked up once, at the first use or ``load``.

        Not when the policy is built: the modules of tasks may import the module that builds it.

        Raises:
            ConfigurationError: One names nothing, or what cannot be deferred.
        """
        found = self._resolved
        if found is None:
            exact: dict[str, object] = {}
            for module, qualname in self._read.exact:
                name = f"{module}:{qualname}"
                # The old name of something that moved is never looked up, whatever still stands there.
                exact |= {name: UNBOUND} if name in self._moved else _exact_object(module, qualname)
            found = MappingProxyType(exact), METACLASSES | {_metaclass(item) for item in self._named_metaclasses}
            self._set(_resolved=found)
        return found

    @property
    def _exact(self) -> Mapping[str, object]:
        return self.resolve()[0]

    @property
    def _metaclasses(self) -> frozenset[type]:
        return self.resolve()[1]

    def load(self) -> None:
        """Import what is named exactly, modules and callables: called when a handler starts.

        Raises:
            ConfigurationError: A module cannot be imported, whatever it raised, or an exact pattern names nothing.
        """
        self.resolve()
        gone = {name.partition(":")[0] for name in self._moved}
        for module in sorted(self._read.modules):
            try:
                import_module(module)
            except Exception as error:
                if module in gone and isinstance(error, ModuleNotFoundError):
                    continue
                raise ConfigurationError(
                    f"the policy names the module {module}, which cannot be imported: {type(error).__name__}: {error}; "
                    "correct the pattern or the module, or start where it can be imported"
                ) from error

    # --- By name: nothing is imported ---

    def check(self, ref: CallableRef) -> CallableRef:
        """Admit a reference by its names alone, and follow ``moved``. Imports nothing.

        Returns:
            The reference to resolve.

        Raises:
            PolicyViolation: No pattern admits it.
        """
        self._check_names(ref)
        moved = self._follow(ref)
        if moved is not ref:
            self._check_names(moved)
        return moved

    def _check_names(self, ref: CallableRef) -> None:
        if str(ref) in self._exact or _callee(ref) in self._exact:
            return
        if self._is_gadget(ref.module, ref.qualname, ref.member):
            _deny(ref, "it is a known gadget, a way to run whatever it is handed, and needs an exact pattern")
        if ref.kind == "builtin":
            _deny(ref, "a built-in needs an exact pattern")
        if not self._admits(ref.module, ref.qualname):
            _deny(ref, refusals.NO_PATTERN)

    def _is_gadget(self, module: str, qualname: str, member: str | None) -> bool:
        """Whether it is a known gadget that no exact pattern names. Naming its class is not naming a listed member."""
        name = f"{module}:{qualname}"
        if member is not None and f"{name}.{member}" in GADGETS:
            return f"{name}.{member}" not in self._exact
        return is_gadget(module, qualname) and name not in self._exact

    def _admits(self, module: str, qualname: str) -> bool:
        """Whether a function or class is admitted by its name."""
        if f"{module}:{qualname}" in self._exact:
            return True
        if is_standard_library(module) or is_gadget(module, qualname):
            return False
        if module in self._read.modules or self._in_package(module):
            return True
        return self._is_marked(module, qualname) or any(
            f"{module}:{outer}" in self._exact or self._is_marked(module, outer) for outer in _outers(qualname)
        )

    def _in_package(self, module: str) -> bool:
        return f"{module}.".startswith(self._read.packages) and OTHER_MODULES.isdisjoint(module.split("."))

    def _is_marked(self, module: str, qualname: str) -> bool:
        # Only what is imported already counts: a mark must not cause an import.
        if not self._deferrable or module not in sys.modules:
            return False
        try:
            return self._has_mark(find(module, qualname))
        except UnresolvableCallable:
            return False

    def _has_mark(self, obj: object) -> bool:
        return self._deferrable and _MARKED.get(id(obj)) is obj

    def _follow(self, ref: CallableRef) -> CallableRef:
        if not self._moved:
            return ref
        target, member = self._moved.get(str(ref)), ref.member
        if target is None:
            target = self._moved.get(f"{ref.module}:{ref.qualname}")
            if target is None:
                return ref
        elif member is not None:
            target, _, member = target.rpartition(".")
        module, _, qualname = target.partition(":")
        try:
            return reference(ref.kind, module, qualname, member)
        except ValidationError:
            _deny(ref, "moved maps a method to something that is none")

    # --- By identity: after the look-up ---

    def _check_object(self, ref: CallableRef) -> None:
        """Admit what a reference leads to, which ``refs`` has proved.

        Raises:
            PolicyViolation: An exact pattern named another object, or an inherited member comes from elsewhere.
        """
        owner = find(ref.module, ref.qualname)
        name = f"{ref.module}:{ref.qualname}"
        if name in self._exact and self._exact[name] is not owner:
            _deny(ref, "it is not the object that the exact pattern named when the policy was loaded")
        if ref.kind == "class":
            self._check_bases(ref, cast("type", owner))
        elif ref.kind not in {"function", "builtin"}:
            member = "__call__" if ref.kind == "instance" else cast("str", ref.member)
            self._check_member(ref, cast("type", owner), member)

    def _check_bases(self, ref: CallableRef, cls: type) -> None:
        """Refuse to call a class that inherits its construction from a gadget, such as ``subprocess.Popen``."""
        if class_path(cls) in self._exact:
            return
        for base in class_mro(cls)[1:]:
            module, _, qualname = class_path(base).partition(":")
            if self._is_gadget(module, qualname, None) and base not in _PLAIN_BASES:
                _deny(ref, "it inherits from a known gadget, which needs an exact pattern")
        for definer in (find_member(cls, name)[0] for name in _CONSTRUCTION):
            if definer is cls or any(definer is base for base in HARMLESS_BASES) or self._names_construction(definer):
                continue
            if not self._defines(definer):
                raise refusals.foreign_construction(str(ref), class_path(definer))

    def _names_construction(self, definer: type) -> bool:
        """Whether an exact pattern names the ``__init__`` or ``__new__`` of a class."""
        names = ((f"{class_path(definer)}.{member}", member) for member in _CONSTRUCTION)
        return any(self._exact.get(name, UNBOUND) is find_member(definer, member)[1] for name, member in names)

    def _defines(self, cls: type) -> bool:
        """Whether a class is admitted by its name, and found there."""
        name = class_path(cls)
        module, _, qualname = name.partition(":")
        # By name first: the proof that the class is found there may import.
        admitted = self._admits(module, qualname) and is_found(cls, module, qualname)
        if admitted:
            self._check_exact_class(name, cls, PolicyViolation)
        return admitted

    def _check_member(self, ref: CallableRef, cls: type, member: str) -> None:
        definer, raw = find_member(cls, member)
        for owner in (cls, definer):
            exact = self._exact.get(f"{class_path(owner)}.{member}")
            if exact is raw:
                return
            if exact is not None:
                _deny(_callee(ref), "the member is not the one that the exact pattern named when the policy was loaded")
        name = class_path(definer)
        module, _, qualname = name.partition(":")
        if ref.kind == "builtin_method":
            raise refusals.builtin_method(str(ref), f"{name}.{member}")
        if self._is_gadget(module, qualname, member):
            _deny(_callee(ref), f"it is a known gadget of {name}, which needs an exact pattern")
        # By name first: the proof that the class is found there may import.
        if self._admits(module, qualname) and (definer is cls or is_found(definer, module, qualname)):
            self._check_exact_class(name, definer, PolicyViolation)
        elif not self._has_mark(raw.__func__ if type(raw) is classmethod else raw):
            _deny(_callee(ref), f"it is inherited from {name}, and needs an exact pattern")

    # --- ``policy_cache.Gate``: what codecs and the execution ask ---

    def class_name(self, cls: type) -> str:
        """Name a class that is part of an argument. See ``Gate.class_name``."""
        name = class_path(cls)
        if _HARMLESS_NAMES.get(name) is cls:
            return name
        module, qualname = check_class(cls, metaclasses=self._metaclasses, nested=True)
        if not self._admits(module, qualname):
            raise refusals.class_not_admitted(name)
        if name in self._moved:
            raise NotDeferrable(f"the class {name} has moved; use {self._moved[name]}", reason="moved")
        self._check_exact_class(name, cls, NotDeferrable)
        return name

    def check_class_name(self, name: str) -> str:
        """Admit a class inside the arguments by its name alone, and follow ``moved``. Imports nothing.

        Returns:
            The name to look up.

        Raises:
            PolicyViolation: No pattern admits it.
        """
        if name in _HARMLESS_NAMES:
            return name
        for step in (name, self._moved.get(name, name)):
            # The length first: names inside the arguments are bounded by the token alone.
            if len(step) > _MAX_NAME or EXACT.fullmatch(step) is None or not self._admits(*step.split(":")):
                raise PolicyViolation(
                    f"the class {_shown(step)} inside the arguments is not admitted; add a pattern for it to the policy"
                )
        return self._moved.get(name, name)

    def load_class(self, name: str) -> type:
        """Find a class that is part of an argument. See ``Gate.load_class``."""
        name = self.check_class_name(name)
        if (harmless := _HARMLESS_NAMES.get(name)) is not None:
            return harmless
        cls = find(*name.split(":"))
        if not issubclass(type(cls), type):
            raise UnresolvableCallable(f"{name} is not a class; deploy the code that defines it")
        try:
            proved = ":".join(check_class(cast("type", cls), metaclasses=self._metaclasses, nested=True))
        except NotDeferrable as error:
            raise UnresolvableCallable(f"{name} cannot be used: {error}") from error
        if proved != name:
            raise UnresolvableCallable(f"{name} is a class of another name; deploy the code that defines it")
        self._check_exact_class(name, cast("type", cls), PolicyViolation)
        return cast("type", cls)

    def _check_exact_class(self, name: str, cls: type, error: type[NotDeferrable | PolicyViolation]) -> None:
        """Refuse a class that took the place of one named exactly, or lives in one that did."""
        same = self._exact.get(name, cls) is cls
        module, _, qualname = name.partition(":")
        for outer in _outers(qualname):
            named = self._exact.get(f"{module}:{outer}")
            same = same and (named is None or is_found(named, module, outer))
        if not same:
            raise error(f"{name} is not the class that the exact pattern named when the policy was loaded; restart")

    def callable_ref(self, obj: object) -> CallableRef:
        """Name a callable. See ``Gate.callable_ref``."""
        ref = CallableRef.of(obj, metaclasses=self._metaclasses)
        try:
            moved = self.check(ref)
            if moved.parts != ref.parts:
                raise NotDeferrable(f"{ref} has moved; defer {moved}", reason="moved")
            self._check_object(ref)
        except PolicyViolation as error:
            raise self._refusal(ref, obj, str(error)) from error
        return ref

    def _refusal(self, ref: CallableRef, obj: object, told: str) -> NotDeferrable:
        """Return the refusal of a callable. Its remedy is enough: the pattern of a module does not admit all that a class inherits."""
        inherits_call = ref.kind == "instance" and find_member(type(obj), "__call__")[0] is not type(obj)
        wanted = _callee(ref) if inherits_call else str(ref)
        if refusals.NO_PATTERN in told and self._moved.keys().isdisjoint((str(ref), f"{ref.module}:{ref.qualname}")):
            try:
                self.only(ref.module)._check_object(ref)  # noqa: SLF001 - another policy
                which = "pattern"
            except (PolicyViolation, ConfigurationError):
                which = "exact pattern"
            told = str(refusals.not_admitted(wanted, f"no {which} admits it"))
        return NotDeferrable(told, reason="policy", missing=(wanted,))

    def load_callable(self, ref: CallableRef, bound: object = UNBOUND) -> Callable[..., object]:
        """Find a callable. See ``Gate.load_callable``."""
        now = self.check(ref)
        found = now.resolve(bound, metaclasses=self._metaclasses)
        self._check_object(now)
        return found


@final
class _Restricted:
    """A policy within the patterns of the key that signed: the key's refusal is ``CapabilityExceeded``."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, outer: Policy, inner: Policy) -> None:
        self._outer = outer
        self._inner = inner

    def load(self) -> None:
        """See ``Gate.load``. The modules of a key's patterns are not imported for it: they admit nothing alone."""
        self._outer.load()
        self._inner.resolve()

    @property
    def is_settled(self) -> bool:
        """See ``Gate.is_settled``. Patterns of a key admit no marks."""
        return self._outer.is_settled

    def check(self, ref: CallableRef) -> CallableRef:
        """Admit a reference by its names. Raises ``PolicyViolation`` or ``CapabilityExceeded``."""
        self._within(self._inner.check, ref)
        return self._outer.check(ref)

    def class_name(self, cls: type) -> str:
        """See ``Gate.class_name``."""
        name = self._outer.class_name(cls)
        self._inner_names(self._inner.class_name, cls)
        return name

    def load_class(self, name: str) -> type:
        """See ``Gate.load_class``. Both are asked by name before one imports: a key's patterns admit nothing alone."""
        self._within(self._inner.check_class_name, name)
        cls = self._outer.load_class(name)
        self._within(self._inner.load_class, name)
        return cls

    def callable_ref(self, obj: object) -> CallableRef:
        """See ``Gate.callable_ref``."""
        ref = self._outer.callable_ref(obj)
        self._inner_names(self._inner.callable_ref, obj)
        return ref

    def load_callable(self, ref: CallableRef, bound: object = UNBOUND) -> Callable[..., object]:
        """See ``Gate.load_callable``. Both are asked by name before one imports."""
        self._within(self._inner.check, ref)
        found = self._outer.load_callable(ref, bound)
        self._within(self._inner.load_callable, ref, bound)
        return found

    @staticmethod
    def _inner_names(ask: Callable[..., object], obj: object) -> None:
        try:
            ask(obj)
        except NotDeferrable as error:
            raise NotDeferrable(f"the active key may not name it: {error}", reason=error.reason) from error

    @staticmethod
    def _within(ask: Callable[..., object], *args: object) -> None:
        try:
            ask(*args)
        except PolicyViolation as error:
            raise CapabilityExceeded("the key that signed this may not name it; sign with another key") from error


# --- Patterns -------------------------------------------------------------------------------------------

# Bases that construct nothing dangerous, though as callees they would be gadgets.
_PLAIN_BASES: Final = frozenset({object, type, Enum})


def _exact_object(module: str, qualname: str) -> dict[str, object]:
    """Resolve an exact pattern: the object by the name that the wire carries, which of ``operator:add`` is ``_operator:add``."""
    owner, dot, member = qualname.rpartition(".")
    try:
        home = find(module, owner) if dot else None
        # The last part may be a member that its class inherits.
        is_member = issubclass(type(home), type)
        found = find_member(cast("type", home), member)[1] if is_member else unwrapped(find(module, qualname))
    except UnresolvableCallable as error:
        raise ConfigurationError(
            f"the pattern {module}:{qualname} names nothing: {error}; correct it, or defer after its module is imported"
        ) from error
    if issubclass(type(found), type):
        return {class_path(cast("type", found)): found}
    if is_member:
        if type(found) not in _MEMBER_TYPES and member not in _CONSTRUCTION:
            raise ConfigurationError(f"the pattern {module}:{qualname} names no method or class method; correct it")
        return {f"{class_path(cast('type', home))}.{member}": found}
    try:
        ref = CallableRef.of(found)
    except NotDeferrable as error:
        raise ConfigurationError(f"the pattern {module}:{qualname} names what cannot be deferred: {error}") from error
    if ref.kind not in {"function", "builtin"}:
        raise ConfigurationError(f"the pattern {module}:{qualname} names an object or its method; name {ref} instead")
    return {str(ref): found}


_MEMBER_TYPES: Final = frozenset({FunctionType, classmethod, MethodDescriptorType, ClassMethodDescriptorType})


def _outers(qualname: str) -> list[str]:
    """Return the classes that a nested class lives in: ``A`` and ``A.B`` of ``A.B.C``."""
    parts = qualname.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _metaclass(item: type | str) -> type:
    found = item
    if isinstance(item, str):
        module, _, qualname = item.partition(":")
        try:
            found = cast("Any", find(module, qualname))
        except UnresolvableCallable as error:
            raise ConfigurationError(
                f"the metaclass {item!a} cannot be found; write 'mod:qualname': {error}"
            ) from error
    if not isinstance(found, type) or not issubclass(found, type):
        raise ConfigurationError(f"{item!a} is not a metaclass; name a subclass of type")
    return found


def _callee(ref: CallableRef) -> str:
    """Return the exact pattern of what runs when a reference is called: of an object, the ``__call__`` of its class."""
    return f"{ref}.__call__" if ref.kind == "instance" else str(ref)


def _deny(ref: CallableRef | str, why: str) -> NoReturn:
    raise refusals.not_admitted(str(ref), why)


def _shown(name: str) -> str:
    return name if len(name) <= _MAX_NAME and EXACT.fullmatch(name) is not None else "of an unreadable name"
