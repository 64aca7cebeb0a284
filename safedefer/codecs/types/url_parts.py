"""The results of ``urlparse`` and ``urlsplit``: named tuples of the standard library, which no module pattern admits."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import ParseResult, ParseResultBytes, SplitResult, SplitResultBytes

from safedefer.codecs import inspect_safely
from safedefer.codecs.packs import Pack, PackedType
from safedefer.codecs.shared import Refusal

_CLASSES: Final[dict[str, Any]] = {
    cls.__name__: cls for cls in (ParseResult, ParseResultBytes, SplitResult, SplitResultBytes)
}


def _check(name: object, parts: Any) -> Any:
    cls = _CLASSES.get(name) if type(name) is str else None
    text = bytes if cls in (ParseResultBytes, SplitResultBytes) else str
    if cls is None or len(parts) != len(cls._fields) or any(type(part) is not text for part in parts):
        raise Refusal("here must be the name of a result of urlparse or urlsplit, and its parts; pass the URL as text")
    return cls


def _parts(value: Any) -> tuple[Any, ...]:
    getter = inspect_safely.dict_getter(type(value))
    if getter is not None and getter(value):
        raise Refusal("attributes were added to the parts of the URL; pass them as arguments of their own")
    name = type(value).__name__
    _check(name, value)
    return name, *tuple.__iter__(value)


def _make(values: Any) -> object:
    if type(values) is not tuple or not values:
        raise Refusal("$url_parts is a tuple of the name of a class and its parts; pass the URL as text")
    return tuple.__new__(_check(values[0], values[1:]), values[1:])


PACK: Final = Pack("urllib.parse", lambda: (PackedType("$url_parts", tuple(_CLASSES.values()), _parts, _make),))
