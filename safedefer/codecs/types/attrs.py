"""attrs classes, by the tag ``$attrs``: the shipped example of a ``ClassFamily``.

This module does not import attrs: attrs marks its classes (``__attrs_attrs__``), and a process with such a class has
imported attrs already. Without attrs installed the tag does not exist.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import FunctionType
from typing import Final, Protocol

from safedefer.codecs.class_families import ClassFamily
from safedefer.codecs.inspect_safely import namespace

# attrs generates these for slotted classes; they only read and set the fields.
_GENERATED: Final = frozenset({"slots_getstate", "slots_setstate"})


class _Registry(Protocol):
    def register_family(self, family: ClassFamily) -> None: ...


def register(registry: _Registry) -> None:
    """Register ``$attrs`` if attrs is installed."""
    if find_spec("attr") is not None:
        registry.register_family(ClassFamily("$attrs", _is_attrs_class, _is_generated))


def _is_attrs_class(cls: type) -> bool:
    # The attribute of the class itself: a plain subclass of an attrs class is carried as an ordinary object.
    return (namespace(cls).get("__attrs_attrs__") is not None) and "attr" in sys.modules


def _is_generated(function: FunctionType) -> bool:
    code = function.__code__
    home = sys.modules.get("attr._make")
    return code.co_name in _GENERATED and home is not None and code.co_filename == home.__file__
