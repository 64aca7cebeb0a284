"""Tags of times: dates, clock times, durations, and time zones.

All are immutable, so none is counted for ``$ref``. Every ``decode_*`` accepts one spelling only: the one that
``encode_*`` writes.
"""

# ruff: noqa: ARG001 - handlers have one signature

from __future__ import annotations

from datetime import date, datetime, time, timedelta, timezone, tzinfo
from typing import Any, Final, TypeVar, cast
from zoneinfo import ZoneInfo

from safedefer.codecs.decoder import Decoder, array, integer, string
from safedefer.codecs.encoder import Encoder
from safedefer.codecs.inspect_safely import derives
from safedefer.codecs.shared import Json, Refusal, VersionSkew
from safedefer.codecs.zones import has_zone, is_key

_NO_ZONE: Final = "the time zone is not in this machine's database; install tzdata"
_DAYS: Final = 999_999_999
_DAY: Final = 86_399
_MICRO: Final = 999_999
#: In a tuple: freezegun, while time stands, replaces the classes that a module has under names of its own.
_REAL: Final = (datetime, date)


def _encode_datetime(enc: Encoder, value: datetime, depth: int) -> Json:
    zone = value.tzinfo
    if zone is None:
        return {"$datetime": [value.isoformat(), value.fold, None]}
    return {"$datetime": [value.replace(tzinfo=None).isoformat(), value.fold, _encode_zone(enc, zone, depth)]}


def _decode_datetime(dec: Decoder, payload: Json, depth: int) -> datetime:
    text, fold, zone = array(payload, least=3, most=3)
    return _parse(_REAL[0], text).replace(fold=integer(fold, 0, 1), tzinfo=_decode_zone(dec, zone, depth))


def _encode_time(enc: Encoder, value: time, depth: int) -> Json:
    zone = value.tzinfo
    tree = None if zone is None else _encode_zone(enc, zone, depth)
    return {"$time": [value.replace(tzinfo=None).isoformat(), value.fold, tree]}


def _decode_time(dec: Decoder, payload: Json, depth: int) -> time:
    text, fold, zone = array(payload, least=3, most=3)
    return _parse(time, text).replace(fold=integer(fold, 0, 1), tzinfo=_decode_zone(dec, zone, depth))


def _encode_date(enc: Encoder, value: date, _depth: int) -> Json:
    return {"$date": value.isoformat()}


def _decode_date(dec: Decoder, payload: Json, _depth: int) -> date:
    return _parse(_REAL[1], payload)


_Moment = TypeVar("_Moment", date, datetime, time)


def _parse(cls: type[_Moment], payload: Json) -> _Moment:
    """Parse ISO 8601 text in the form that ``isoformat`` writes, and in no other."""
    text = string(payload)
    try:
        value = cls.fromisoformat(text)
    except ValueError:
        raise Refusal("here must be ISO 8601 text without a time zone") from None
    if value.isoformat() != text or getattr(value, "tzinfo", None) is not None:
        raise Refusal("here must be ISO 8601 text as Python writes it, without a time zone")
    return value


def _encode_zone(enc: Encoder, zone: tzinfo, depth: int) -> Json:
    try:
        return enc.value(zone, depth + 1)
    except Refusal as refusal:
        refusal.trail.append(".tzinfo")
        raise


def _decode_zone(dec: Decoder, payload: Json, depth: int) -> tzinfo | None:
    zone = dec.value(payload, depth + 1)
    if zone is not None and not derives(type(zone), tzinfo):
        raise Refusal("here must be a time zone or null")
    return cast("tzinfo | None", zone)


def _encode_timedelta(enc: Encoder, value: timedelta, _depth: int) -> Json:
    return {"$timedelta": [value.days, value.seconds, value.microseconds]}


def _decode_timedelta(dec: Decoder, payload: Json, _depth: int) -> timedelta:
    days, seconds, micro = array(payload, least=3, most=3)
    return timedelta(integer(days, -_DAYS, _DAYS), integer(seconds, 0, _DAY), integer(micro, 0, _MICRO))


def _encode_timezone(enc: Encoder, value: timezone, depth: int) -> Json:
    offset, *name = value.__getinitargs__()  # type: ignore[attr-defined]
    parts: list[Json] = [offset.days, offset.seconds, offset.microseconds]
    return {"$timezone": [*parts, enc.value(name[0], depth + 1) if name else None]}


def _decode_timezone(dec: Decoder, payload: Json, depth: int) -> timezone:
    *offset, name = array(payload, least=4, most=4)
    delta = _decode_timedelta(dec, offset, depth)
    try:
        return timezone(delta) if name is None else timezone(delta, dec.text(name, depth + 1))
    except ValueError:
        raise Refusal("the offset of $timezone is strictly within a day") from None


def _encode_zoneinfo(enc: Encoder, value: ZoneInfo, _depth: int) -> Json:
    key = value.key
    try:
        shared = value.__reduce__()[1][1]
    except Exception:  # noqa: BLE001 - pickle.PicklingError, for a zone that was read from a file
        shared = False
    if not shared or type(key) is not str or not is_key(key):
        raise Refusal("a ZoneInfo from a file or from no_cache() equals no other; make it with ZoneInfo(key)")
    return {"$zoneinfo": key}


def _decode_zoneinfo(dec: Decoder, payload: Json, _depth: int) -> ZoneInfo:
    key = string(payload)
    if not is_key(key):
        raise Refusal("$zoneinfo is a key of the IANA time zone database")
    if not has_zone(key):
        raise VersionSkew(_NO_ZONE)
    try:
        return ZoneInfo(key)
    except Exception as error:
        raise VersionSkew(_NO_ZONE) from error


ENCODERS: Final[dict[type, Any]] = {
    datetime: _encode_datetime,
    date: _encode_date,
    time: _encode_time,
    timedelta: _encode_timedelta,
    timezone: _encode_timezone,
    ZoneInfo: _encode_zoneinfo,
}

DECODERS: Final[dict[str, Any]] = {
    "$datetime": _decode_datetime,
    "$date": _decode_date,
    "$time": _decode_time,
    "$timedelta": _decode_timedelta,
    "$timezone": _decode_timezone,
    "$zoneinfo": _decode_zoneinfo,
}
