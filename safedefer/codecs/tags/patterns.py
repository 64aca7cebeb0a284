"""The tag ``$pattern``: compiled regular expressions.

To compile a pattern takes work that its length does not bound alone: their number, their length, and the characters of
their ranges are counted.
"""

from __future__ import annotations

import re
from typing import Any, Final

from safedefer.codecs.decoder import Decoder, array, integer
from safedefer.codecs.encoder import Encoder
from safedefer.codecs.shared import Json, Refusal, VersionSkew

MAX_PATTERN: Final = 1_024
MAX_PATTERNS: Final = 16
#: The most characters that the ranges of case-insensitive patterns of one call may span.
MAX_FOLDED: Final = 200_000
#: As many characters in ranges of other patterns, up to U+FFFF, take the work of one: ``re`` marks them in a table.
_UNFOLDED: Final = 20
# Without re.DEBUG, which prints, and the deprecated re.TEMPLATE.
_FLAGS: Final = int(re.ASCII | re.IGNORECASE | re.LOCALE | re.MULTILINE | re.DOTALL | re.UNICODE | re.VERBOSE)


def _encode_pattern(enc: Encoder, value: re.Pattern[Any], depth: int) -> Json:
    enc.patterns += 1
    source = value.pattern
    if type(source) not in (str, bytes) or len(source) > MAX_PATTERN or enc.patterns > MAX_PATTERNS:
        raise Refusal(
            f"patterns have at most {MAX_PATTERN} characters, and a call {MAX_PATTERNS} of them; pass the text"
        )
    enc.folded += _folded(source, value.flags)
    if enc.folded > MAX_FOLDED:
        raise Refusal(
            f"the ranges of patterns have more than {MAX_FOLDED} characters; write narrower ones, or pass the text"
        )
    if value.flags & ~_FLAGS or _compile(source, value.flags) != value:
        raise Refusal("a pattern that its text and flags do not give again; pass the text")
    return {"$pattern": [enc.value(source, depth + 1), value.flags]}


def _decode_pattern(dec: Decoder, payload: Json, depth: int) -> re.Pattern[Any]:
    tree, flags = array(payload, least=2, most=2)
    source = dec.value(tree, depth + 1)
    dec.patterns += 1
    if type(source) not in (str, bytes) or len(source) > MAX_PATTERN or dec.patterns > MAX_PATTERNS:
        raise Refusal(f"$pattern is text or $bytes of at most {MAX_PATTERN}, and there are at most {MAX_PATTERNS}")
    dec.folded += _folded(source, integer(flags, 0, _FLAGS))
    if dec.folded > MAX_FOLDED:
        raise Refusal(f"the ranges of patterns have more than {MAX_FOLDED} characters")
    pattern = _compile(source, integer(flags, 0, _FLAGS) & _FLAGS)
    if pattern is None or pattern.flags != flags:
        raise VersionSkew("$pattern is [pattern, flags], with the flags that Python reports")
    return pattern


#: A character of a pattern: escaped by number, by name, or otherwise; or not escaped.
_CHARACTER: Final = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{1,3})|(N)\{[^}]*\}|(.))|(.)", re.DOTALL
)
_IGNORES_CASE: Final = re.compile(r"\(\?[a-zA-Z]*i")
_LAST: Final = 0x10FFFF
_LAST_MARKED: Final = 0xFFFF


def _folded(source: str | bytes, flags: int) -> int:
    """Return how many characters the ranges of a case-insensitive pattern span: ``re`` folds each when it compiles.

    A text like a range outside brackets counts too. Ranges of other patterns count less.
    """
    text = source if isinstance(source, str) else source.decode("latin-1")
    folds = flags & re.IGNORECASE or _IGNORES_CASE.search(text) is not None
    most = _LAST if folds else _LAST_MARKED
    found = list(_CHARACTER.finditer(text))
    spanned = sum(
        max(0, min(_code(after, unknown=_LAST), most) - _code(before, unknown=0) + 1)
        for before, dash, after in zip(found, found[1:], found[2:], strict=False)
        if dash[0] == "-"
    )
    return spanned if folds else spanned // _UNFOLDED


def _code(character: re.Match[str], *, unknown: int) -> int:
    for group, base in ((1, 16), (2, 16), (3, 16), (4, 8)):
        if character[group] is not None:
            return int(character[group], base)
    return unknown if character[5] is not None else ord(character[6] or character[7])


def _compile(source: Any, flags: int) -> re.Pattern[Any] | None:
    try:
        return re.compile(source, flags)
    # re.error, OverflowError, RecursionError, ValueError, and warnings that are errors.
    except Exception:  # noqa: BLE001
        return None


ENCODERS: Final[dict[type, Any]] = {
    re.Pattern: _encode_pattern,
}

DECODERS: Final[dict[str, Any]] = {
    "$pattern": _decode_pattern,
}
