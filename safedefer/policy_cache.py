"""``Gate``: what codecs and the execution ask of a policy. ``PolicyCache``: what it answered is not asked again while it holds.

A cache may only repeat a verdict. Names are admitted by immutable patterns. A function or class that was proved is
looked at again whenever it is asked for: the module still leads to it, and it still says its name. Refusals, bound
objects and nested classes are not kept. A key holder can make up names, so the number of entries is bounded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, Final, Protocol, final

from safedefer.callables.getters import module_dict
from safedefer.refs import UNBOUND, CallableRef, class_path, reference

_SIZE: Final = 4096
#: Stands for a reference that was never asked for.
_NOTHING: Final[tuple[None, Any]] = (None, None)


class Gate(Protocol):
    """What is asked before a class or a callable is named or loaded. Whoever asks imports nothing itself."""

    @property
    def is_settled(self) -> bool:
        """Whether a name that was admitted stays so. Marks come with the modules that are imported."""
        ...

    def load(self) -> None:
        """Import and look up what is named exactly, when a handler starts. Raises ``ConfigurationError``."""
        ...

    def check(self, ref: CallableRef) -> CallableRef:
        """Admit a reference by its names. Raises ``PolicyViolation`` or ``CapabilityExceeded``."""
        ...

    def class_name(self, cls: type) -> str:
        """Name a class as ``module:qualname``, proved and admitted. Raises ``NotDeferrable``."""
        ...

    def load_class(self, name: str) -> type:
        """Find an admitted class. Raises a ``RejectedTask``: not admitted, or not that class."""
        ...

    def callable_ref(self, obj: object) -> CallableRef:
        """Name a callable, proved and admitted. Raises ``NotDeferrable``."""
        ...

    def load_callable(self, ref: CallableRef, bound: object = UNBOUND) -> Callable[..., object]:
        """Find an admitted callable. Raises a ``RejectedTask``: not admitted, or not that callable."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """A function that a reference was proved to lead to, and what to look at to see that it still does."""

    ref: CallableRef
    function: FunctionType
    module: object
    namespace: dict[str, object]
    module_name: str
    qualname: str
    code: CodeType
    name: str

    @classmethod
    def of(cls, ref: CallableRef, function: FunctionType) -> Found:
        """Remember a proof that was just made. The function says the name under which it was found."""
        name = function.__module__
        module = sys.modules[name]
        namespace = module_dict(module)
        return cls(ref, function, module, namespace, name, function.__qualname__, function.__code__, function.__name__)

    def holds(self) -> bool:
        """Whether the name still leads to this function, and the function still says this name."""
        function, qualname, module_name = self.function, self.qualname, self.module_name
        return (
            self.namespace.get(qualname) is function
            and sys.modules.get(module_name) is self.module
            and function.__qualname__ == qualname
            and function.__module__ == module_name
            # What was judged besides its name: no lambda, no generator.
            and function.__code__ is self.code
            and function.__name__ == self.name
        )


@dataclass(frozen=True, slots=True)
class FoundClass:
    """A class at the top level of a module that was proved to have its name, and what shows that it still has."""

    name: str
    qualname: str
    cls: type
    kind: type
    """Its metaclass."""
    module_name: str
    module: object
    namespace: dict[str, object]

    @classmethod
    def of(cls, name: str, found: type) -> FoundClass | None:
        """Remember a proof that was just made; None of a nested class, which takes several looks."""
        module_name, _, qualname = name.partition(":")
        if "." in qualname:
            return None
        module = sys.modules[module_name]
        return cls(name, qualname, found, type(found), module_name, module, module_dict(module))

    def holds(self) -> bool:
        """Whether the name still leads to this class, and the class still says this name."""
        found = self.cls
        return (
            self.namespace.get(self.qualname) is found
            and sys.modules.get(self.module_name) is self.module
            and type(found) is self.kind
            and class_path(found) == self.name
        )


@final
class PolicyCache:
    """A gate that remembers what another gate admitted.

    Args:
        gate: The policy, or a policy within the patterns of a key.
    """

    __slots__ = ("_admitted", "_found", "_found_classes", "_gate", "_named", "_named_classes")

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        # By id, and the object is kept: a look-up by the object itself would run a user's hash.
        self._admitted: dict[int, CallableRef] = {}
        self._named: dict[FunctionType, Found] = {}
        self._found: dict[int, tuple[CallableRef, Found]] = {}
        self._named_classes: dict[int, FoundClass] = {}
        self._found_classes: dict[str, FoundClass] = {}

    def load(self) -> None:
        """See ``Gate.load``."""
        self._gate.load()

    @property
    def is_settled(self) -> bool:
        """See ``Gate.is_settled``."""
        return self._gate.is_settled

    def check(self, ref: CallableRef) -> CallableRef:
        """Admit a reference by its names. See ``Gate.check``."""
        # By identity: the same name is the same object (refs.reference), and what is kept here stays that object.
        if self._admitted.get(id(ref)) is ref:
            return ref
        moved = self._gate.check(ref)
        if moved is ref and self._gate.is_settled and reference(*ref.parts) is ref:
            _make_room(self._admitted)
            self._admitted[id(ref)] = ref
        return moved

    def class_name(self, cls: type) -> str:
        """Name a class that is part of an argument. See ``Gate.class_name``."""
        known = self._named_classes.get(id(cls))
        if known is not None and known.holds():
            return known.name
        name = self._gate.class_name(cls)
        if len(self._named_classes) < _SIZE and (found := FoundClass.of(name, cls)) is not None:
            self._named_classes[id(cls)] = found
        return name

    def load_class(self, name: str) -> type:
        """Find a class that is part of an argument. See ``Gate.load_class``."""
        known = self._found_classes.get(name)
        if known is not None and known.holds():
            return known.cls
        cls = self._gate.load_class(name)
        if len(self._found_classes) < _SIZE and (found := FoundClass.of(class_path(cls), cls)) is not None:
            self._found_classes[name] = found
        return cls

    def callable_ref(self, obj: object) -> CallableRef:
        """Name a callable. See ``Gate.callable_ref``."""
        if type(obj) is not FunctionType:
            return self._gate.callable_ref(obj)
        # Functions are their own keys: no other hash than object's runs.
        known = self._named.get(obj)
        if known is not None and known.holds():
            return known.ref
        ref = self._gate.callable_ref(obj)
        if len(self._named) < _SIZE:
            self._named[obj] = Found.of(ref, obj)
        return ref

    def load_callable(self, ref: CallableRef, bound: object = UNBOUND) -> Callable[..., object]:
        """Find a callable. See ``Gate.load_callable``."""
        asked, known = self._found.get(id(ref), _NOTHING)
        if asked is ref and bound is UNBOUND and known.holds():
            return known.function
        found = self._gate.load_callable(ref, bound)
        if type(found) is FunctionType and reference(*ref.parts) is ref:
            _make_room(self._found)
            self._found[id(ref)] = ref, Found.of(ref, found)
        return found


def _make_room(known: dict[int, Any]) -> None:
    """Forget what is known when it is too much: names that a key holder made up must not keep others out for ever."""
    if len(known) >= _SIZE:
        known.clear()
