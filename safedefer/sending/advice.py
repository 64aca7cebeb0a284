"""What a refusal says: all that keeps a call from being deferred, and what to do, so that one attempt is enough."""

from __future__ import annotations

import contextlib
import functools
from abc import ABCMeta
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from types import FunctionType, MethodType
from typing import Any, Final

from safedefer.codecs.inspect_safely import without_annotations
from safedefer.codecs.typed import TypedCodec
from safedefer.errors import DeferError, InvalidTaskError, NotDeferrable, UnencodableArgument
from safedefer.policy_cache import Gate
from safedefer.refs import UNBOUND, bound_object, find_member

_SAME_CALL: Final = "; for the same call, "
#: Options that are checked with each other, and those of them that mean nothing by themselves.
_TOGETHER: Final = tuple(
    map(frozenset, (("countdown", "eta"), ("name", "unique"), ("unique", "unique_until"), ("target", "url")))
)
_NOT_ALONE: Final = ("unique_until",)
#: How many further refusals of options are told: there may be any number of headers.
_TOLD: Final = 8
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


def tell_more(error: TypeError | DeferError, *attempts: Callable[[], object]) -> None:
    """Add to a refusal what else is refused of the same call: what each of these raises. None of them may enqueue.

    Whatever else they raise, the refusal stands.
    """
    added = 0
    for attempt in attempts:
        if added == _TOLD:
            return
        try:
            attempt()
        except (TypeError, DeferError) as other:
            told, more = str(error), str(other).replace(_SAME_CALL, "; ")
            if more not in told:
                error.args = (f"{told}{'; ' if _SAME_CALL in told else _SAME_CALL}{more}",)
                added += 1
        except Exception:  # noqa: BLE001, S110 - as tell_all
            pass


def tell_options(error: InvalidTaskError, given: Mapping[str, Any], make: Callable[[dict[str, Any]], object]) -> None:
    """Add to the refusal of one option what is said of the others, each by itself.

    Args:
        error: The refusal.
        given: All options.
        make: Checks some of them.
    """
    pairs = [names for names in _TOGETHER if names.issubset(given)]
    alone = [frozenset({name}) for name in given if name not in _NOT_ALONE]
    parts: list[dict[str, Any]] = [{name: given[name] for name in names} for names in (*pairs, *alone)]
    with contextlib.suppress(Exception):  # a mapping of the caller's own may raise anything
        if isinstance(headers := given.get("headers"), Mapping):
            parts += [{"headers": {name: value}} for name, value in headers.items()]
    tell_more(error, *(functools.partial(make, part) for part in parts))


def _extend(
    error: TypeError, codec: TypedCodec, gate: Gate, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    named = not isinstance(error, NotDeferrable) or error.reason == "policy"
    bound = bound_object(target) if named else _meant(error, target, args)
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
    # What is no callable of any kind is told to be that alone.
    others = [refusal for path, refusal in found.refusals.items() if named or path != "$.bound"]
    more += [refusal for refusal in others if refusal.rpartition("; ")[0] not in told]
    error.args = (f"{told}{_SAME_CALL}{'; '.join(more)}" if more else told,)
    if isinstance(error, NotDeferrable | UnencodableArgument):
        error.missing = tuple(dict.fromkeys((*error.missing, *found.missing)))


def _meant(error: TypeError, target: Any, args: Sequence[Any]) -> object:
    """Return what the message says to defer in place of what is no task, as far as it is known; else ``UNBOUND``."""
    if type(target) is functools.partial:
        return target
    if getattr(error, "reason", "") == "metaclass":
        return target.__self__ if type(target) is MethodType else target
    if getattr(error, "reason", "") == "unbound-method" and type(target) is FunctionType:
        return UNBOUND if not args or args[0] is None else MethodType(target, args[0])
    return UNBOUND


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
