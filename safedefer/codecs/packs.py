"""Packs: the data types of a well-known library, registered once the process has imported that library.

A pack names exact types, takes their values apart and makes equal ones, and runs nothing of the user's. So its types need
no pattern of the policy; a class of the user's among the parts (of an entity) is named as a value, and goes through the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from safedefer.codecs.inspect_safely import derives


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PackedType:
    """Types of one tag.

    Args:
        tag: The tag on the wire.
        classes: The exact types.
        encode: Returns a value that can be carried. Raises ``Refusal`` if the object would not arrive equal.
        decode: Returns an object of one of the types. A holder of a key chooses its argument.
        base: The classes derived from it belong to the tag, too.
        own: The steps of the path of parts that are no attributes of the object: its class, and what holds its values.
    """

    tag: str
    classes: tuple[type, ...]
    encode: Callable[[Any], object]
    decode: Callable[[Any], object]
    base: type | None = None
    own: tuple[str, ...] = ()

    def carries(self, cls: type) -> bool:
        """Whether objects of this class have the tag."""
        return any(cls is each for each in self.classes) or (self.base is not None and derives(cls, self.base))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Pack:
    """The types of one library.

    Args:
        module: The module of the library whose import makes them known. A pack imports nothing.
        types: Returns them. Raises ``AttributeError`` while the library is half imported.
    """

    module: str
    types: Callable[[], Sequence[PackedType]]
