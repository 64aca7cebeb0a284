"""Whether a reference resolves here: the proof that a handler makes, without the arguments of a task.

A method is proved with an object of its class that no code of the class made, in place of the one in the arguments: that
one is decoded by code of the class.
"""

from __future__ import annotations

from types import ClassMethodDescriptorType
from typing import Any, Final, cast

from safedefer.callables.getters import class_mro
from safedefer.policy_cache import Gate
from safedefer.refs import UNBOUND, CallableRef, find, find_member

_BOUND: Final = frozenset({"instance", "method", "builtin_method"})
# Include/object.h: made by a class statement, or PyType_FromSpec.
_HEAP: Final = 1 << 9


def prove(gate: Gate, ref: CallableRef) -> None:
    """Prove that a reference leads to what it says, and that the gate admits that.

    The module is imported only if the gate admits the names. Nothing is called.

    Raises:
        PolicyViolation: The policy does not admit it.
        CapabilityExceeded: The key that signed may not name it.
        UnresolvableCallable: It is not here, or is something else now.
    """
    now = gate.check(ref)
    if now.kind not in _BOUND:
        gate.load_callable(ref)
        return
    found = find(now.module, now.qualname)
    bound: Any = UNBOUND
    if issubclass(type(found), type):
        cls = cast("type", found)
        # A special method is called by its object, which stands in the arguments.
        _, raw = find_member(cls, now.member or "__call__")
        bound = cls if type(raw) is ClassMethodDescriptorType else stand_in(cls)
        if bound is UNBOUND:
            return
    gate.load_callable(ref, bound)


def stand_in(cls: type) -> Any:
    """Return an object of exactly this class, made by C code alone; ``UNBOUND`` if there can be none."""
    try:
        find_member(cls, "__del__")
    except Exception:  # noqa: BLE001  # it has none: nothing of the class runs when the object goes
        built_in = next(base for base in class_mro(cls) if not base.__flags__ & _HEAP)
        try:
            return cast("Any", built_in).__new__(cls)
        except TypeError:  # it needs arguments, or is abstract
            return UNBOUND
    return UNBOUND
