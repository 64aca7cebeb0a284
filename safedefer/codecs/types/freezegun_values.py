"""freezegun's datetimes and dates, which code under test gets from ``datetime.now()``. Needs freezegun imported."""

from __future__ import annotations

import sys
from typing import Any, Final

from safedefer.codecs.packs import Pack, PackedType
from safedefer.codecs.shared import Refusal

_MODULE: Final = "freezegun.api"


def _types() -> tuple[PackedType, ...]:
    api: Any = sys.modules[_MODULE]
    fake_datetime, fake_date = api.FakeDatetime, api.FakeDate
    # By the names under which freezegun keeps them: it replaces those of every other module while time stands.
    datetime, date = api.real_datetime, api.real_date

    def bare(value: Any) -> None:
        if vars(value):
            raise Refusal("attributes were added to the datetime; pass them as arguments of their own")

    def moment(value: Any) -> object:
        bare(value)
        parts = value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond
        return datetime(*parts, value.tzinfo, fold=value.fold)

    def fake_moment(real: Any) -> object:
        if type(real) is not datetime:
            raise Refusal("$freezegun_datetime holds a $datetime")
        parts = real.year, real.month, real.day, real.hour, real.minute, real.second, real.microsecond
        return fake_datetime(*parts, real.tzinfo, fold=real.fold)

    def day(value: Any) -> object:
        bare(value)
        return date(value.year, value.month, value.day)

    def fake_day(real: Any) -> object:
        if type(real) is not date:
            raise Refusal("$freezegun_date holds a $date")
        return fake_date(real.year, real.month, real.day)

    return (
        PackedType("$freezegun_datetime", (fake_datetime,), moment, fake_moment),
        PackedType("$freezegun_date", (fake_date,), day, fake_day),
    )


PACK: Final = Pack(_MODULE, _types)
