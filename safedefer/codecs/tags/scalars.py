"""Tags of values that hold no other values: text, bytes, numbers, UUIDs, paths, addresses.

All but ``bytearray`` are immutable, and not counted for ``$ref``. Every ``decode_*`` accepts one spelling only: the one
that ``encode_*`` writes.
"""

# ruff: noqa: ARG001 - handlers have one signature

from __future__ import annotations

import re
from binascii import Error as Base64Error
from decimal import Decimal, DecimalException
from fractions import Fraction
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from math import gcd, inf, nan
from pathlib import PosixPath, PurePath, PurePosixPath, PureWindowsPath, WindowsPath
from types import EllipsisType
from typing import Any, Final
from uuid import UUID, SafeUUID

from pybase64 import b64decode, b64encode_as_string

from safedefer.codecs.decoder import Decoder, array, string
from safedefer.codecs.encoder import Encoder
from safedefer.codecs.inspect_safely import derives, dict_getter
from safedefer.codecs.shared import SAFE_INT, Json, Refusal, is_text

# --- Text and bytes -------------------------------------------------------------------------------


def _base64(value: bytes | bytearray) -> str:
    return b64encode_as_string(value)


def _unbase64(payload: Json) -> bytes:
    """Decode base64 (RFC 4648, section 4), canonical only."""
    text = string(payload)
    try:
        value = b64decode(text, validate=True)
    except (Base64Error, ValueError):
        raise Refusal("here must be base64 with padding") from None
    # With other spare bits in the last group, one value would have two spellings.
    if text[-4:] != _base64(value[-((len(value) - 1) % 3 + 1) :] if value else b""):
        raise Refusal("here must be canonical base64 with padding")
    return value


def _encode_str(enc: Encoder, value: str, _depth: int) -> Json:
    return value if is_text(value) else {"$str": _base64(value.encode("utf-8", "surrogatepass"))}


def _decode_str(dec: Decoder, payload: Json, _depth: int) -> str:
    raw = _unbase64(payload)
    try:
        value = raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise Refusal("$str is not the UTF-8 of code points") from None
    if is_text(value):
        raise Refusal("$str without a lone surrogate is written as a plain string")
    return value


def _encode_bytes(enc: Encoder, value: bytes, _depth: int) -> Json:
    return {"$bytes": _base64(value)}


def _decode_bytes(dec: Decoder, payload: Json, _depth: int) -> bytes:
    return _unbase64(payload)


def _encode_bytearray(enc: Encoder, value: bytearray, _depth: int) -> Json:
    return enc.enter(value) or {"$bytearray": _base64(value)}


def _decode_bytearray(dec: Decoder, payload: Json, _depth: int) -> bytearray:
    value = bytearray(_unbase64(payload))
    dec.share(value)
    return value


# --- Numbers --------------------------------------------------------------------------------------

_INTEGER: Final = re.compile(r"-?[1-9][0-9]{15,}")
_BITS_PER_DIGIT: Final = 3.3219280948873626
_FLOATS: Final = {"nan": nan, "inf": inf, "-inf": -inf}
_DECIMAL: Final = re.compile(r"-?(?:[0-9]+(?:\.[0-9]+)?(?:E[+-][0-9]{1,20})?|Infinity|s?NaN[0-9]*)")


def _encode_int(enc: Encoder, value: int, _depth: int) -> Json:
    digits = enc.limits.int_digits
    # The bits first: to write decimal digits takes quadratic time.
    if value.bit_length() <= digits * _BITS_PER_DIGIT + 1:
        try:
            text = str(value)
        except ValueError:  # sys.set_int_max_str_digits
            text = ""
        if text and len(text.lstrip("-")) <= digits:
            return {"$int": text}
    raise Refusal(f"an integer of more than {digits} digits; pass it as bytes")


def _decode_int(dec: Decoder, payload: Json, _depth: int) -> int:
    text = string(payload)
    if len(text) > dec.limits.int_digits + 1 or _INTEGER.fullmatch(text) is None:
        raise Refusal("$int is a decimal integer, within the limit of digits")
    try:
        value = int(text)
    except ValueError:  # sys.set_int_max_str_digits
        raise Refusal("$int is within the limit of digits") from None
    if -SAFE_INT <= value <= SAFE_INT or len(text.lstrip("-")) > dec.limits.int_digits:
        raise Refusal("$int is beyond 2**53-1, and within the limit of digits")
    return value


def _encode_float(enc: Encoder, value: float, _depth: int) -> Json:
    return {"$float": "nan" if value != value else "inf" if value > 0 else "-inf"}  # noqa: PLR0124 - that is NaN


def _decode_float(dec: Decoder, payload: Json, _depth: int) -> float:
    value = _FLOATS.get(string(payload))
    if value is None:
        raise Refusal("$float is nan, inf or -inf")
    return float(payload)  # an object of its own: a set may hold several NaN


def _encode_complex(enc: Encoder, value: complex, depth: int) -> Json:
    return {"$complex": [enc.value(value.real, depth + 1), enc.value(value.imag, depth + 1)]}


def _decode_complex(dec: Decoder, payload: Json, depth: int) -> complex:
    real, imag = (dec.value(part, depth + 1) for part in array(payload, least=2, most=2))
    if type(real) is not float or type(imag) is not float:
        raise Refusal("$complex is two floats")
    return complex(real, imag)


def _encode_decimal(enc: Encoder, value: Decimal, _depth: int) -> Json:
    return {"$decimal": str(value).replace("e", "E")}  # a context may ask for a small e


def _decode_decimal(dec: Decoder, payload: Json, _depth: int) -> Decimal:
    text = string(payload)
    if _DECIMAL.fullmatch(text) is None:
        raise Refusal("$decimal is the text of a decimal number")
    try:
        value = Decimal(text)
    except DecimalException:
        raise Refusal("$decimal is out of range") from None
    if str(value).replace("e", "E") != text:
        raise Refusal("$decimal is the canonical text of a decimal number")
    return value


def _encode_fraction(enc: Encoder, value: Fraction, depth: int) -> Json:
    return {"$fraction": [enc.value(value.numerator, depth + 1), enc.value(value.denominator, depth + 1)]}


def _decode_fraction(dec: Decoder, payload: Json, depth: int) -> Fraction:
    over, under = (dec.value(part, depth + 1) for part in array(payload, least=2, most=2))
    if type(over) is not int or type(under) is not int or under < 1 or gcd(over, under) != 1:
        raise Refusal("$fraction is two integers in lowest terms, the second positive")
    return Fraction(over, under)


def _encode_range(enc: Encoder, value: range, depth: int) -> Json:
    return {"$range": [enc.value(part, depth + 1) for part in (value.start, value.stop, value.step)]}


def _decode_range(dec: Decoder, payload: Json, depth: int) -> range:
    start, stop, step = (dec.value(part, depth + 1) for part in array(payload, least=3, most=3))
    if type(start) is not int or type(stop) is not int or type(step) is not int or step == 0:
        raise Refusal("$range is three integers, the last not 0")
    return range(start, stop, step)


def _encode_ellipsis(enc: Encoder, value: EllipsisType, _depth: int) -> Json:
    return {"$ellipsis": True}


def _decode_ellipsis(dec: Decoder, payload: Json, _depth: int) -> EllipsisType:
    if payload is not True:
        raise Refusal("$ellipsis is true")
    return ...


# --- Identifiers ----------------------------------------------------------------------------------

_SAFE: Final = {"safe": SafeUUID.safe, "unsafe": SafeUUID.unsafe, None: SafeUUID.unknown}
_SAFE_NAMES: Final = {SafeUUID.safe: "safe", SafeUUID.unsafe: "unsafe", SafeUUID.unknown: None}
_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_PATHS: Final = {cls.__name__: cls for cls in (PosixPath, PurePosixPath, PureWindowsPath, WindowsPath)}
_IPS: Final = {
    cls.__name__: cls for cls in (IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network)
}
# The attributes that ipaddress keeps in the __dict__ of a network: its parts, and cached properties.
_IP_PARTS: Final = frozenset(
    {"network_address", "netmask", "_prefixlen", "hosts", "broadcast_address", "hostmask", "network", "is_private"}
)


def _encode_uuid(enc: Encoder, value: UUID, _depth: int) -> Json:
    return {"$uuid": [str(value), _SAFE_NAMES[value.is_safe]]}


def _decode_uuid(dec: Decoder, payload: Json, _depth: int) -> UUID:
    text, safe = array(payload, least=2, most=2)
    if (
        type(text) is not str
        or _UUID.fullmatch(text) is None
        or type(safe) not in (str, type(None))
        or safe not in _SAFE
    ):
        raise Refusal('$uuid is [text, null], or "safe" or "unsafe" for null')
    return UUID(text, is_safe=_SAFE[safe])


def _encode_path(enc: Encoder, value: PurePath, depth: int) -> Json:
    cls = type(value)
    text = str(value)
    if derives(cls, PureWindowsPath) and cls(text).parts != value.parts:
        raise Refusal("a path whose text is read as another path; pass its parts")
    return {"$path": [cls.__name__, enc.value(text, depth + 1)]}


def _decode_path(dec: Decoder, payload: Json, depth: int) -> PurePath:
    name, tree = array(payload, least=2, most=2)
    text = dec.text(tree, depth + 1)
    try:
        path = _PATHS[string(name)](text)
    except KeyError:
        raise Refusal("$path names one of pathlib's classes") from None
    except NotImplementedError as error:
        raise Refusal("a path of another operating system; pass a pure path") from error
    if str(path) != text:
        raise Refusal("$path is the normal text of a path")
    return path


def _encode_ip(enc: Encoder, value: Any, depth: int) -> Json:
    cls = type(value)
    getter = dict_getter(cls)
    if getter is not None and not getter(value).keys() <= _IP_PARTS:
        raise Refusal("attributes were added to it; pass them as arguments of their own")
    text = str(value)
    try:
        same = cls(text) == value
    except ValueError:
        same = False
    if not same:
        raise Refusal("an address whose text is read as another address; pass its parts")
    return {"$ip": [cls.__name__, enc.value(text, depth + 1)]}


def _decode_ip(dec: Decoder, payload: Json, depth: int) -> object:
    name, tree = array(payload, least=2, most=2)
    text = dec.text(tree, depth + 1)
    cls = _IPS.get(string(name))
    try:
        value = None if cls is None else cls(text)
    except ValueError:
        value = None
    if value is None or str(value) != text:
        raise Refusal("$ip is a class of ipaddress and the normal text of its value")
    return value


ENCODERS: Final[dict[type, Any]] = {
    str: _encode_str,
    bytes: _encode_bytes,
    bytearray: _encode_bytearray,
    int: _encode_int,
    float: _encode_float,
    complex: _encode_complex,
    Decimal: _encode_decimal,
    Fraction: _encode_fraction,
    range: _encode_range,
    EllipsisType: _encode_ellipsis,
    UUID: _encode_uuid,
    **dict.fromkeys(_PATHS.values(), _encode_path),
    **dict.fromkeys(_IPS.values(), _encode_ip),
}

DECODERS: Final[dict[str, Any]] = {
    "$str": _decode_str,
    "$bytes": _decode_bytes,
    "$bytearray": _decode_bytearray,
    "$int": _decode_int,
    "$float": _decode_float,
    "$complex": _decode_complex,
    "$decimal": _decode_decimal,
    "$fraction": _decode_fraction,
    "$range": _decode_range,
    "$ellipsis": _decode_ellipsis,
    "$uuid": _decode_uuid,
    "$path": _decode_path,
    "$ip": _decode_ip,
}
