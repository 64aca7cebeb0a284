"""Value types of pydantic: URLs, the time zone of parsed datetimes, and ``ByteSize``. pydantic is always imported."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

from pydantic import ByteSize, networks
from pydantic_core import MultiHostUrl, TzInfo, Url

from safedefer.codecs.packs import Pack, PackedType
from safedefer.codecs.shared import SAFE_INT, Refusal

_BASES: Final = (networks.AnyUrl.__base__, networks.PostgresDsn.__base__)
#: By name: the two of pydantic's core, and those of ``pydantic.networks`` that hold one of these.
_URLS: Final[dict[str, Any]] = {
    "Url": Url,
    "MultiHostUrl": MultiHostUrl,
    **{
        name: cls
        for name, cls in vars(networks).items()
        if isinstance(cls, type) and cls not in _BASES and any(base in cls.__mro__ for base in _BASES)
    },
}
_DAY: Final = 86_400


def _url_parts(url: Any) -> tuple[str, str]:
    cls = type(url)
    core = cls is Url or cls is MultiHostUrl
    if not core and vars(url).keys() != {"_url"}:
        raise Refusal("attributes were added to the URL; pass them as arguments of their own")
    text = str(url)
    try:
        made = cls(text)
    except ValueError:
        raise Refusal("a URL that its own class refuses; pass its text") from None
    if str(made) != text or made != url:
        raise Refusal("a URL whose text is read as another one; pass its text")
    return cls.__name__, text


def _url(parts: Any) -> object:
    if type(parts) is not tuple or [type(part) for part in parts] != [str, str] or parts[0] not in _URLS:
        raise Refusal("$pydantic_url is the name of a class of pydantic.networks and a text")
    name, text = parts
    try:
        made = _URLS[name](text)
    except ValueError:
        raise Refusal("the text of $pydantic_url is none that the class takes") from None
    if str(made) != text:
        raise Refusal("the text of $pydantic_url is the normal text of the URL")
    return made


def _offset(zone: Any) -> int:
    offset = zone.utcoffset(None)
    return int(offset // timedelta(seconds=1))


def _zone(seconds: Any) -> object:
    if type(seconds) is not int or not -_DAY < seconds < _DAY:
        raise Refusal("$pydantic_tz is the seconds of an offset within a day")
    return TzInfo(seconds)


def _size(value: Any) -> int:
    if vars(value):
        raise Refusal("attributes were added to the ByteSize; pass them as arguments of their own")
    return int.__index__(value)


def _byte_size(value: Any) -> object:
    if type(value) is not int or not -SAFE_INT <= value <= SAFE_INT:
        raise Refusal("$pydantic_bytesize is an integer")
    return int.__new__(ByteSize, value)


def _types() -> tuple[PackedType, ...]:
    return (
        PackedType("$pydantic_url", tuple(_URLS.values()), _url_parts, _url),
        PackedType("$pydantic_tz", (TzInfo,), _offset, _zone),
        PackedType("$pydantic_bytesize", (ByteSize,), _size, _byte_size),
    )


PACK: Final = Pack("pydantic", _types)
