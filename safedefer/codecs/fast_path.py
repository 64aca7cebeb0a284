"""The fast path: recognize trees of plain JSON values with loops in C.

Most tasks carry ids, numbers and flat dicts. JSON holds these unchanged, and they need no walk in Python: functions
of C judge all values of a level of the tree together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from gc import get_referents
from itertools import chain, cycle, repeat
from math import isfinite
from operator import is_
from types import NoneType
from typing import Any, Final

from safedefer.claims import CANONICAL_BRACKETS, SHORT, is_deeper, write_json
from safedefer.codecs.shared import SAFE_INT, Values, is_text
from safedefer.options import Limits
from safedefer.refs import UNBOUND

_PLAIN: Final[tuple[type, ...]] = (str, int, float, bool, NoneType, list, dict)
# For fewer values a loop in Python is faster than the calls into C.
_FEW: Final = 64
# With so many containers of one length, their values are judged by column; longer ones than this, all at once.
_COLUMNS: Final = 16

_HANDFUL: Final = 8

_Group = Sequence[Any]


def are_few_scalars(args: _Group, kwargs: dict[str, Any], limits: Limits) -> bool:
    """Whether the arguments are a few ASCII texts, plain integers, bools and None, as in the commonest tasks.

    False means "not certainly".
    """
    if len(args) > _HANDFUL or len(kwargs) > _HANDFUL or limits.items < 2 * _HANDFUL:
        return False
    # The conditions stand twice: a call costs more than the test, and this runs for every task.
    for value in args:
        kind = type(value)
        if not (
            (kind is str and value.isascii())
            or (kind is int and -SAFE_INT <= value <= SAFE_INT)
            or value is None
            or kind is bool
        ):
            return False
    for name, value in kwargs.items():
        kind = type(value)
        if (
            type(name) is not str
            or not name.isascii()
            or "$" in name
            or not (
                (kind is str and value.isascii())
                or (kind is int and -SAFE_INT <= value <= SAFE_INT)
                or value is None
                or kind is bool
            )
        ):
            return False
    return True


def written_plainly(args: list[Any], kwargs: dict[str, Any], limits: Limits) -> tuple[bytes, bytes] | None:
    """Write the JSON text of arguments that are plain.

    Returns:
        The texts of ``args`` and ``kwargs``; None means "not certainly plain".
    """
    if not is_plain([kwargs, *args], limits, to_be_written=True):
        return None
    try:
        texts = write_json(args), write_json(kwargs)
    except TypeError:  # an integer beyond 2**53-1, a lone surrogate, a name that is no str
        return None
    return None if any(may_hold_tags(text) for text in texts) else texts


def is_plain(values: _Group, limits: Limits, *, to_be_written: bool = False) -> bool:
    """Whether the values are a tree of plain JSON, which is on the wire as it is.

    False means "not certainly": then the walk decides, and finds the path.

    Args:
        values: The topmost values.
        limits: Bounds ``depth`` and ``items``.
        to_be_written: Skip the tests that ``write_json`` makes itself: of wide integers, lone surrogates, and names
            that are not str.

    Returns:
        True if every value below is exactly a str without lone surrogates, an int within
        ±(2**53-1), a finite float, a bool, None, a list, or a dict whose keys are str that do not
        begin with ``$``; and no list or dict is met twice.
    """
    groups: Iterable[_Group] = (values,)
    met: set[int] = set()
    items = len(values)
    for _ in range(limits.depth + 1):
        lists: list[list[Any]] = []
        dicts: list[dict[str, Any]] = []
        for group in groups:
            if not _sort(group, lists, dicts, to_be_written=to_be_written):
                return False
        if not lists and not dicts:
            return items <= limits.items
        # A container that is met twice needs a $ref, and a cycle would never end.
        before = len(met)
        met.update(map(id, lists), map(id, dicts))
        if len(met) - before != len(lists) + len(dicts):
            return False
        if dicts and not to_be_written and not _names_are_plain(dicts):
            return False
        groups = [*_columns(lists), *(_columns_of_rows(dicts) or _columns(list(map(dict.values, dicts))))]
        items += sum(map(len, groups))
        if items > limits.items:
            return False
    return False


def _sort(  # noqa: C901 - one branch a type
    group: _Group, lists: list[list[Any]], dicts: list[dict[str, Any]], *, to_be_written: bool
) -> bool:
    """Check the scalars of a group and sort out its containers."""
    if len(group) < _FEW:
        return _sort_few(group, lists, dicts)
    kind: type = type(group[0])
    if kind is NoneType and all(map(is_, group, repeat(None))):
        return True
    # Types are compared by identity: a set of them would run the hash of a user's metaclass. And all are compared:
    # orjson takes members of some enums for texts or numbers.
    if all(map(is_, map(type, group), repeat(kind))):
        if kind is list:
            lists.extend(group)
        elif kind is dict:
            dicts.extend(group)
        else:
            return _scalars_are_plain(kind, group, to_be_written=to_be_written)
        return True
    rest: _Group = group
    for kind in _PLAIN:
        some: list[Any] = [v for v in rest if type(v) is kind]
        if not some:
            continue
        if kind is list:
            lists.extend(some)
        elif kind is dict:
            dicts.extend(some)
        elif not _scalars_are_plain(kind, some, to_be_written=to_be_written):
            return False
        if len(some) == len(rest):
            return True
        rest = [v for v in rest if type(v) is not kind]
    return False


def _sort_few(group: _Group, lists: list[list[Any]], dicts: list[dict[str, Any]]) -> bool:  # noqa: C901 - one branch a type
    for value in group:
        kind = type(value)
        if kind is str:
            if not value.isascii() and not is_text(value):
                return False
        elif kind is int:
            if not -SAFE_INT <= value <= SAFE_INT:
                return False
        elif kind is dict:
            dicts.append(value)
        elif kind is list:
            lists.append(value)
        elif kind is float:
            if value - value != 0.0:
                return False
        elif value is not None and kind is not bool:
            return False
    return True


def _scalars_are_plain(kind: type, group: _Group, *, to_be_written: bool) -> bool:
    """Check values that are exactly of one type."""
    if to_be_written and kind in (str, int):
        return True
    if kind is str:
        # One test for all: two lone surrogates stay lone when Python joins them.
        return is_text("".join(group))
    if kind is int:
        return bool(min(group) >= -SAFE_INT and max(group) <= SAFE_INT)
    if kind is float:
        # With a NaN or an infinity the sum is not finite. A sum of finite floats may overflow, which only costs a walk.
        return isfinite(sum(group))
    return kind is bool or kind is NoneType


def _names_are_plain(dicts: Sequence[dict[str, Any]]) -> bool:
    if len(dicts) < _COLUMNS:
        return all(
            type(name) is str and name[:1] != "$" and (name.isascii() or is_text(name))
            for each in dicts
            for name in each
        )
    names = list(dicts[0])
    # Rows mostly have the names of the first row, in its order, as the very same objects.
    if not names or not all(map(is_, chain.from_iterable(dicts), cycle(names))):  # a cycle of no names yields none
        names = list(chain.from_iterable(dicts))
    if not all(map(is_, map(type, names), repeat(str))):
        return False
    # One text for all names. "\n$" inside a name is a false alarm, which only costs a walk.
    text = "\n" + "\n".join(names)
    return "\n$" not in text and is_text(text)


def _columns(containers: Sequence[Any]) -> list[_Group]:
    """Split the values of the containers into groups, each likely of one type."""
    if not containers:
        return []
    size = len(containers[0])
    if len(containers) >= _COLUMNS and 1 < size <= _COLUMNS:
        try:
            return list(zip(*containers, strict=True))
        except ValueError:  # they are not of one length
            pass
    flat = list(chain.from_iterable(containers))
    return [flat] if flat else []


def _columns_of_rows(dicts: Sequence[dict[str, Any]]) -> list[_Group]:
    """Split the values of dicts of one length into columns, without a loop in Python; empty if the lengths differ."""
    if len(dicts) < _COLUMNS or not 1 < (size := len(dicts[0])) <= _COLUMNS:
        return []
    # The referents of a dict with str keys are its values. If they were not, their number would differ.
    values = get_referents(*dicts)
    if len(values) != size * len(dicts) or set(map(len, dicts)) != {size}:
        return []
    return [values[column::size] for column in range(size)]


# --- The text that a tree was parsed from ---------------------------------------------------------

# Digits and the plus of an exponent become 0; the characters that may precede a number become a comma.
_SHAPE: Final = bytes.maketrans(b"123456789+[:- \t\n\rE", b"0000000000,,,,,,,e")

DOLLAR, _BACKSLASH = b"$\\"

_ONE_KIND: Final = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b'[]{}"\\'))


def may_hold_tags(text: bytes) -> bool:
    """Whether the JSON text may hold a member name that begins with ``$``."""
    # First for one byte, given as a number: that search is several times faster than one for bytes.
    if DOLLAR not in text and _BACKSLASH not in text:
        return False
    return b'"$' in text or rb"\u0024" in text


def is_canonical_plain(call: Values, text: bytes, limits: Limits) -> bool:
    """Whether values that were parsed from a canonical text are plain and within limits.

    The numbers of a canonical text are plain. False means "not certainly".
    """
    # No dollar sign, no tags: a canonical text spells it in one way only.
    if DOLLAR in text or (len(text) > 2 * limits.items and _may_hold_many(text, limits)):
        return False
    if len(text) > SHORT and limits.depth >= CANONICAL_BRACKETS - 2:
        return True
    bound, args, kwargs = call
    # The referents of lists and dicts are their values, and scalars have none.
    inner = get_referents(*args, *kwargs.values())
    if bound is not UNBOUND:
        inner += get_referents(bound)
    return not inner or not is_deeper(inner, limits.depth - 1)


def may_break_limits(text: bytes, limits: Limits) -> bool:
    """Whether the JSON text may hold too many values, too deep ones, or numbers that are not plain.

    A cheap over-estimate: True may be wrong, False never is.

    Args:
        text: The text.
        limits: ``depth`` and ``items``.
    """
    if len(text) > 2 * limits.items and _may_hold_many(text, limits):
        return True
    if len(text) > limits.depth and _may_be_deep(text, limits.depth):
        return True
    shape = text.translate(_SHAPE)
    # An integer beyond 2**53-1 has at least 16 digits; an infinity has that many too, or an exponent of three.
    return b",0000000000000000" in shape or b"0e000" in shape


def _may_hold_many(text: bytes, limits: Limits) -> bool:
    # Only for long texts: a value takes at least two bytes.
    return text.count(b"[") + text.count(b"{") + text.count(b",") > limits.items


def _may_be_deep(text: bytes, depth: int) -> bool:
    """Whether brackets may nest deeper than ``depth``, inside the two that enclose every value."""
    skeleton = text.translate(_ONE_KIND, _NO_BRACKETS)
    if skeleton.count(b"[") <= depth:
        return False
    if b"\\" in skeleton:
        return True
    # This removes strings without brackets. A string with a bracket leaves its quotes. So if no quote is left, all
    # brackets are real ones.
    skeleton = skeleton.replace(b'""', b"")
    if b'"' in skeleton:
        return True
    for _ in range(depth + 2):
        if not skeleton:
            return False
        # This removes the innermost level.
        skeleton = skeleton.replace(b"[]", b"")
    return bool(skeleton)
