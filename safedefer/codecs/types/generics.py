"""``Box[int]``, which ``Box[int](1)`` keeps as ``__orig_class__``, and ``list[int]``: a class and its arguments."""

from __future__ import annotations

import typing
from types import GenericAlias
from typing import Any, Final, cast

from safedefer.codecs import inspect_safely
from safedefer.codecs.packs import Pack, PackedType
from safedefer.codecs.shared import Refusal
from safedefer.refs import loud_hooks

_ALIAS: Final[type] = type(typing.Iterable[int])
_GENERIC: Final = cast("type", typing.Generic)
#: What ``list[int]`` and the like are made of.
_BUILT_IN: Final = (list, dict, set, frozenset, tuple)
#: The most classes among the arguments, at all depths: typing and pydantic keep what is made of them.
MOST_ARGUMENTS: Final = 32


def count(value: Any) -> int:
    """Return the number of classes in an alias, or 1 for anything else."""
    is_alias = type(value) in (_ALIAS, GenericAlias)
    return 1 + sum(count(each) for each in value.__args__) if is_alias else 1


def _parts(alias: Any) -> tuple[Any, tuple[Any, ...]]:
    origin, args = alias.__origin__, alias.__args__
    try:
        made = _make((origin, args))
    except Refusal:
        made = None
    if type(made) is not type(alias) or made != alias or repr(made) != repr(alias):
        raise Refusal(
            "only aliases of generic classes with classes as arguments are carried; pass the class alone, or give the alias a "
            "name: class IntBox(Box[int])"
        )
    return origin, args


def _make(parts: Any) -> object:
    if type(parts) is not tuple or len(parts) != 2 or type(parts[1]) is not tuple or not parts[1]:  # noqa: PLR2004
        raise Refusal("$generic_alias is a class and its arguments")
    origin, args = parts
    if not all(map(_is_argument, (origin, *args))) or not issubclass(type(origin), type):
        raise Refusal("$generic_alias is of classes, and of other such aliases")
    if sum(count(each) for each in args) > MOST_ARGUMENTS:
        raise Refusal(f"$generic_alias has at most {MOST_ARGUMENTS} arguments, those of its arguments counted")
    if any(origin is each for each in _BUILT_IN):
        return GenericAlias(origin, args)
    found = inspect_safely.lookup(origin, "__class_getitem__")
    # Any other one is code of the class, and so is what a metaclass answers to origin[args].
    if found is None or found[0] is not _GENERIC or not inspect_safely.derives(origin, _GENERIC):
        raise Refusal("$generic_alias is of a class that is typing.Generic")
    try:
        return cast("object", found[1].__get__(None, origin)(args))
    except TypeError:
        raise Refusal("the class of $generic_alias takes other arguments") from None


def _is_argument(value: object) -> bool:
    # typing looks at the attributes of the classes.
    return type(value) in (_ALIAS, GenericAlias) or (
        issubclass(type(value), type) and not loud_hooks(cast("type", value))
    )


def _types() -> tuple[PackedType, ...]:
    return (PackedType("$generic_alias", (_ALIAS, GenericAlias), _parts, _make),)


PACK: Final = Pack("typing", _types)
