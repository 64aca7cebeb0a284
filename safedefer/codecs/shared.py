"""Shared by encoder and decoder: refusals that collect their path, and tests of JSON names and text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias

Json: TypeAlias = Any
"""A tree of exact dict, list, str, int, float, bool and None."""

#: Integers that every JSON parser keeps (RFC 7493, section 2.2).
SAFE_INT: Final = 2**53 - 1

_ATTRIBUTE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")


#: The three parts of a ``CallData``. A plain tuple of them will do, and costs less.
Values: TypeAlias = tuple[Any, Any, Any]


class CallData(NamedTuple):
    """The values of one call.

    ``bound`` is the object of a method or instance, else ``refs.UNBOUND``; ``args`` is a sequence and
    ``kwargs`` a dict with str keys. They hold values before encoding and trees of JSON after it.
    """

    bound: Any
    args: Any
    kwargs: Any


class Obstacles(NamedTuple):
    """What keeps the values of a call from being encoded."""

    missing: tuple[str, ...] = ()
    """Exact patterns that the policy lacks."""
    hooked: tuple[str, ...] = ()
    """Those of them whose classes have hooks: what their objects hold is looked at once they are admitted."""
    refusals: Mapping[str, str] = MappingProxyType({})
    """The other reasons, by path: a sentence each, with the remedy."""


class Refusal(Exception):
    """A value cannot be carried.

    ``why`` (str) ends with the remedy, ``trail`` (list[str]) is the path, innermost step first, ``kind``
    (str) names the type of a value that could not be encoded, and ``instead`` is what the remedy says to pass, by its
    step of the path.
    """

    def __init__(self, why: str, *steps: str, instead: Mapping[str, object] = MappingProxyType({})) -> None:
        super().__init__(why)
        self.why = why
        self.trail: list[str] = list(steps)
        self.kind = ""
        self.instead = instead

    @property
    def path(self) -> str:
        """The path of the value, such as ``$.args[0].items[3]``."""
        return "$" + "".join(reversed(self.trail))


class OverLimit(Refusal):
    """The call holds more values, or more levels of them, than the limits allow."""


class VersionSkew(Refusal):
    """A value cannot be read here, but where the code is that the task was made for: the task is tried again."""


def step(key: object) -> str:
    """Return the path step of a key: ``.name``, ``[3]``, or ``{}`` for any other key."""
    if type(key) is str and _ATTRIBUTE.fullmatch(key):
        return f".{key}"
    if type(key) is int and -SAFE_INT <= key <= SAFE_INT:
        return f"[{key}]"
    return "{}"


def is_text(value: str) -> bool:
    """Whether the text has no lone surrogate, so that JSON can hold it (RFC 8259, section 8.2)."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_member_name(key: object) -> bool:
    """Whether the key may name a member of a JSON object of values: text, and not a tag."""
    return type(key) is str and key[:1] != "$" and is_text(key)
