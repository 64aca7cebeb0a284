"""The datetimes with nanoseconds that Google's libraries read: a stored entity of ndb holds them. Each needs its module imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final

from safedefer.codecs.packs import Pack, PackedType
from safedefer.codecs.shared import Refusal

_PER_SECOND: Final = 10**9
_PER_MICROSECOND: Final = 1000


def _types(module: str, tag: str) -> Callable[[], Sequence[PackedType]]:
    def types() -> tuple[PackedType, ...]:
        cls: Any = sys.modules[module].DatetimeWithNanoseconds
        nanosecond: Any = vars(cls)["_nanosecond"]

        def parts(value: Any) -> tuple[Any, ...]:
            given = value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond
            return datetime(*given, value.tzinfo, fold=value.fold), nanosecond.__get__(value)  # noqa: DTZ001  # its own

        def make(parts: Any) -> object:
            plain, nanos = parts if type(parts) is tuple and len(parts) == 2 else (None, None)  # noqa: PLR2004
            # 0 stands for no more than the microseconds say.
            if (
                type(plain) is not datetime
                or type(nanos) is not int
                or not 0 <= nanos < _PER_SECOND
                or (nanos and nanos // _PER_MICROSECOND != plain.microsecond)
            ):
                raise Refusal(f"{tag} is a tuple of $datetime and its nanoseconds")
            given = plain.year, plain.month, plain.day, plain.hour, plain.minute, plain.second, plain.microsecond
            made = datetime.__new__(cls, *given, plain.tzinfo, fold=plain.fold)
            nanosecond.__set__(made, nanos)
            return made

        return (PackedType(tag, (cls,), parts, make),)

    return types


PACKS: Final = (
    Pack("proto.datetime_helpers", _types("proto.datetime_helpers", "$google_proto_datetime")),
    Pack("google.api_core.datetime_helpers", _types("google.api_core.datetime_helpers", "$google_api_datetime")),
)
