"""What a refusal says: all that keeps a call from being deferred, and what to do, so that one attempt is enough."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Mapping, Sequence
from inspect import signature
from types import FunctionType, MethodType
from typing import Any, Final

from safedefer.codecs.inspect_safely import without_annotations
from safedefer.codecs.typed import TypedCodec
from safedefer.errors import NotDeferrable, UnencodableArgument
from safedefer.policy_cache import Gate
from safedefer.refs import UNBOUND, bound_object, find_member

_WRAPS: Final = " (one that a decorator made: use functools.wraps in the decorator)"


def tell_all(
    error: TypeError, codec: TypedCodec, gate: Gate, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Add to the refusal of a call what else keeps it from being deferred. Whatever the look raises, the refusal stands.

    Args:
        error: The refusal. Its message is extended; a ``NotDeferrable`` or ``UnencodableArgument`` gets the patterns.
        codec: Which looks at the values.
        gate: Which says what may be named.
        target: The callable.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    try:
        _extend(error, codec, gate, target, args, kwargs)
    except Exception:  # noqa: BLE001 - the stack is nearly full, a value changes meanwhile, a library's own fault: what is known is told
        return


def _extend(
    error: TypeError, codec: TypedCodec, gate: Gate, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    named = not isinstance(error, NotDeferrable) or error.reason == "policy"
    bound = bound_object(target) if named else UNBOUND  # what is no callable of any kind is told to be that alone
    found = codec.obstacles((bound, tuple(args), dict(kwargs)), gate)
    told, more = str(error), list[str]()
    if isinstance(error, UnencodableArgument):
        # What no pattern helps is told in place of the pattern.
        told = found.refusals.get(error.path, told)
    if isinstance(error, NotDeferrable):
        if error.reason == "nested-function":
            told += _WRAPS
        if named and (unfit := _misfit(target, args, kwargs)):
            more.append(f"it does not take these arguments: {unfit}")
    if lacking := [f"'{pattern}'" for pattern in found.missing if f"'{pattern}'" not in told]:
        more.append(f"add {', '.join(lacking)} to the policy")
    if found.hooked:
        more.append(f"more may be missing once {', '.join(found.hooked)} may run a hook of its state")
    more += [refusal for refusal in found.refusals.values() if refusal.rpartition("; ")[0] not in told]
    error.args = (f"{told}; for the same call, {'; '.join(more)}" if more else told,)
    if isinstance(error, NotDeferrable | UnencodableArgument):
        error.missing = tuple(dict.fromkeys((*error.missing, *found.missing)))


def _no_arguments(self: object) -> None: ...


def _misfit(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return why a callable does not take these arguments; empty if it does, or if to find out might run code of it."""
    function, before = target, 0
    if type(target) is MethodType:
        function, before = target.__func__, 1
    elif type(target) is type or type(target) is ABCMeta:
        makers = {name: find_member(target, name) for name in ("__new__", "__init__")}
        if makers["__new__"][0] is object:
            function, before = (_no_arguments if makers["__init__"][0] is object else makers["__init__"][1]), 1
    if type(function) is not FunctionType or any(type(name) is not str for name in kwargs):
        return ""
    try:
        signature(without_annotations(function)).bind(*(None,) * before, *args, **kwargs)
    except TypeError as error:
        return str(error)
    return ""
