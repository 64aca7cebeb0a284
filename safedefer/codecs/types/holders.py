"""Packed types whose objects are their attributes: taken apart and made without a hook, a property or ``__init__``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from safedefer.codecs import inspect_safely
from safedefer.codecs.shared import Refusal


def own_state(value: object) -> dict[str, Any]:
    """Return the ``__dict__`` of an object, itself; of one that has none, an empty dict.

    Raises:
        Refusal: A name is not exactly text. To look another name up would run code of its class.
    """
    getter = inspect_safely.dict_getter(type(value))
    own: dict[str, Any] = {} if getter is None else getter(value)
    if any(type(name) is not str for name in own):
        raise Refusal("the name of an attribute of it is not exactly a str; pass what it is made from")
    return own


def _any(_values: tuple[Any, ...]) -> bool:
    return True


def holder(
    cls: Any, fields: dict[str, tuple[type, ...] | None], check: Callable[[tuple[Any, ...]], bool] = _any
) -> tuple[Any, Any]:
    """Return the functions of a packed class whose objects are no more than their attributes.

    Args:
        cls: The class.
        fields: The attributes, with the exact types of each (None: any).
        check: Whether the values, in this order, are those of an object.
    """

    def fits(values: Any) -> bool:
        pairs = zip(values, fields.values(), strict=True)
        return all(kinds is None or any(type(value) is kind for kind in kinds) for value, kinds in pairs)

    def parts(value: Any) -> tuple[Any, ...]:
        own = own_state(value)
        values = tuple(own[name] for name in fields if name in own)
        if own.keys() != fields.keys() or not (fits(values) and check(values)):
            wrong = {
                name
                for name, kinds in fields.items()
                if kinds is not None and not any(type(own.get(name)) is kind for kind in kinds)
            }
            names = f" ({', '.join(sorted(wrong | own.keys() - fields.keys()))})".replace(" ()", "")
            raise Refusal(
                f"an attribute was added to it, or holds what it should not{names}; pass what it is made from"
            )
        return values

    def make(values: Any) -> object:
        if type(values) is not tuple or len(values) != len(fields) or not (fits(values) and check(values)):
            raise Refusal(f"here must be the parts of {inspect_safely.type_name(cls)}")
        made = object.__new__(cls)
        own_state(made).update(zip(fields, values, strict=True))
        return made

    return parts, make
