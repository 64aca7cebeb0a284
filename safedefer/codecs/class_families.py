"""Class families: the classes that a library makes, and how the codec recognizes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ClassFamily:
    """Classes that a library makes. The codec carries their objects by attributes, without ``__init__``.

    Args:
        tag: The tag on the wire; its payload is ``["module:qualname", {attribute: value}]``.
        matches: Says whether a class is one of the family. It must not run code of the class.
        generated: Says whether the library generated a method (``__getstate__``, ``__setstate__``), which then does
            the same as reading or setting the attributes.
    """

    tag: str
    matches: Callable[[type], bool]
    generated: Callable[[FunctionType], bool]
