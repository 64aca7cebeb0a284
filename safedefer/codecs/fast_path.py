"""Recognizing trees of plain JSON values at the speed of C.

Most tasks carry ids, numbers and flat dicts. They are themselves in JSON, and need no walk in Python:
each level of the tree is judged at once by the set of its types.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from gc import get_referents
from itertools import chain, cycle, repeat
from math import isfinite
from operator import is_
from types import NoneType
from typing import Any, Final

from safedefer.claims import CANONICAL_BRACKETS, SHORT, Limits, is_deeper, write_json
from safedefer.codecs.shared import SAFE_INT, Values, is_text
from safedefer.refs import UNBOUND

_PLAIN: Final[tuple[type, ...]] = (str, int, float, bool, NoneType, list, dict)
# Below this many values a loop in Python is faster than setting out for C.
_FEW: Final = 64
# From this many containers of one length on, their values are judged by column; with more columns, at once.
_COLUMNS: Final = 16

_HANDFUL: Final = 8

_Group = Sequence[Any]


def are_few_scalars(args: _Group, kwargs: dict[str, Any], limits: Limits) -> bool:
    """Say whether the arguments are a handful of ASCII texts, plain numbers, bools and None: the commonest tasks.

    False is only "not certainly".
    """
    if len(args) > _HANDFUL or len(kwargs) > _HANDFUL or limits.items < 2 * _HANDFUL:
        return False
    # The conditions stand twice: a call costs more than the question, and this is asked of every task.
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
    """Write arguments that are plain JSON, in one go.

    Returns:
        The texts of ``args`` and ``kwargs``; None is only "not certainly plain".
    """
    if not is_plain([kwargs, *args], limits, to_be_written=True):
        return None
    try:
        texts = write_json(args), write_json(kwargs)
    except TypeError:  # an integer beyond 2**53-1, a lone surrogate, a name that is no str
        return None
    return None if any(may_hold_tags(text) for text in texts) else texts


def is_plain(values: _Group, limits: Limits, *, to_be_written: bool = False) -> bool:
    """Say whether the values are a tree of plain JSON that is itself on the wire.

    False is only "not certainly": the walk decides, and finds the path.

    Args:
        values: The topmost values.
        limits: ``depth`` and ``items`` are kept.
        to_be_written: Leave what ``write_json`` refuses by itself to it: wide integers, lone surrogates, names
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
        # What is met twice has to arrive as one, and a cycle would never end.
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
    # Types are compared by identity: a set of them would run the hash of a user's metaclass. And they must be: what
    # orjson takes for a text or a number may be a member of an enumeration.
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
        # One text will do: lone surrogates that meet in a join stay lone in Python.
        return is_text("".join(group))
    if kind is int:
        return bool(min(group) >= -SAFE_INT and max(group) <= SAFE_INT)
    if kind is float:
        # A sum of finite floats may overflow, which costs a walk; with a NaN or an infinity it is never finite.
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
    if not names or not all(map(is_, chain.from_iterable(dicts), cycle(names))):  # of no names a cycle has none
        names = list(chain.from_iterable(dicts))
    if not all(map(is_, map(type, names), repeat(str))):
        return False
    # One text for all names: "\n$" inside a name is a false alarm, which costs a walk.
    text = "\n" + "\n".join(names)
    return "\n$" not in text and is_text(text)


def _columns(containers: Sequence[Any]) -> list[_Group]:
    """Split the values of the containers into groups that are likely to be of one type each."""
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
    """Split the values of dicts of one length into columns, without a step in Python for each; empty if they differ."""
    if len(dicts) < _COLUMNS or not 1 < (size := len(dicts[0])) <= _COLUMNS:
        return []
    # What a dict shows to the garbage collector are its values; were it more or less, their number would tell.
    values = get_referents(*dicts)
    if len(values) != size * len(dicts) or set(map(len, dicts)) != {size}:
        return []
    return [values[column::size] for column in range(size)]


# --- The text that a tree was parsed from ---------------------------------------------------------

# Digits and the plus of an exponent become 0, and whatever may stand before a number becomes a comma.
_SHAPE: Final = bytes.maketrans(b"123456789+[:- \t\n\rE", b"0000000000,,,,,,,e")

DOLLAR, _BACKSLASH = b"$\\"

_ONE_KIND: Final = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b'[]{}"\\'))


def may_hold_tags(text: bytes) -> bool:
    """Say whether the JSON text may hold a member name that begins with ``$``."""
    # One byte first, as a number: to search for it is several times faster than for bytes.
    if DOLLAR not in text and _BACKSLASH not in text:
        return False
    return b'"$' in text or rb"\u0024" in text


def is_canonical_plain(call: Values, text: bytes, limits: Limits) -> bool:
    """Say whether values are themselves, and within limits, that were parsed from a canonical text.

    Its numbers are plain. False is only "not certainly".
    """
    # Of tags, too: what is canonical spells a dollar sign in one way only.
    if DOLLAR in text or (len(text) > 2 * limits.items and _may_hold_many(text, limits)):
        return False
    if len(text) > SHORT and limits.depth >= CANONICAL_BRACKETS - 2:
        return True
    bound, args, kwargs = call
    # What lists and dicts show to the garbage collector is what they hold, and scalars show nothing.
    inner = get_referents(*args, *kwargs.values())
    if bound is not UNBOUND:
        inner += get_referents(bound)
    return not inner or not is_deeper(inner, limits.depth - 1)


def may_break_limits(text: bytes, limits: Limits) -> bool:
    """Say whether the JSON text may hold too many values, too deep ones, or numbers that are not plain.

    A cheap over-estimate: it may say yes without cause, never no.

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
    # A value takes at least two bytes of text, so that a short one needs not be asked.
    return text.count(b"[") + text.count(b"{") + text.count(b",") > limits.items


def _may_be_deep(text: bytes, depth: int) -> bool:
    """Say whether brackets may nest deeper than ``depth`` inside the two that every value is in."""
    skeleton = text.translate(_ONE_KIND, _NO_BRACKETS)
    if skeleton.count(b"[") <= depth:
        return False
    if b"\\" in skeleton:
        return True
    # Strings without brackets vanish here. A bracket inside one leaves an odd quote before it, so if none is left,
    # every bracket is a real one.
    skeleton = skeleton.replace(b'""', b"")
    if b'"' in skeleton:
        return True
    for _ in range(depth + 2):
        if not skeleton:
            return False
        # The innermost level goes, and no other.
        skeleton = skeleton.replace(b"[]", b"")
    return bool(skeleton)
