"""Recognizing trees of plain JSON values at the speed of C.

Most tasks carry ids, numbers and flat dicts. They are themselves in JSON, and need no walk in Python:
each level of the tree is judged at once by the set of its types.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from math import isfinite
from types import NoneType
from typing import Any, Final

from safedefer.claims import Limits
from safedefer.codecs.walk import SAFE_INT, is_text

# Types are compared by id: a set of the types themselves would run the hash of a user's metaclass.
_STR, _INT, _FLOAT, _BOOL, _NONE, _LIST, _DICT = map(id, (str, int, float, bool, NoneType, list, dict))
_PLAIN: Final = frozenset({_STR, _INT, _FLOAT, _BOOL, _NONE, _LIST, _DICT})
_ONLY_STR: Final = frozenset({_STR})
_SILENT: Final = frozenset({_BOOL, _NONE})
# From this many containers of one length on, their values are judged by column.
_COLUMNS: Final = 16

_Group = Sequence[Any]


def is_plain(values: _Group, limits: Limits) -> bool:
    """Say whether the values are a tree of plain JSON that is itself on the wire.

    False is only "not certainly": the walk decides, and finds the path.

    Args:
        values: The topmost values.
        limits: ``depth`` and ``items`` are kept.

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
            if not _sort(group, lists, dicts):
                return False
        if not lists and not dicts:
            return items <= limits.items
        # What is met twice has to arrive as one, and a cycle would never end.
        before = len(met)
        met.update(map(id, lists), map(id, dicts))
        items += sum(map(len, lists)) + sum(map(len, dicts))
        if len(met) - before != len(lists) + len(dicts) or items > limits.items:
            return False
        if dicts and not _names_are_plain(dicts):
            return False
        groups = [*_regroup(lists), *_regroup([d.values() for d in dicts])]
    return False


def _sort(group: _Group, lists: list[list[Any]], dicts: list[dict[str, Any]]) -> bool:
    """Check the scalars of a group and sort out its containers."""
    kinds = set(map(id, map(type, group)))
    if len(kinds) == 1:
        (kind,) = kinds
        if kind == _LIST:
            lists.extend(group)
        elif kind == _DICT:
            dicts.extend(group)
        else:
            return kind in _SILENT or _scalars_are_plain(kind, group)
        return True
    if not kinds <= _PLAIN:
        return False
    if _LIST in kinds:
        lists.extend([v for v in group if type(v) is list])
    if _DICT in kinds:
        dicts.extend([v for v in group if type(v) is dict])
    return (
        (_STR not in kinds or _scalars_are_plain(_STR, [v for v in group if type(v) is str]))
        and (_INT not in kinds or _scalars_are_plain(_INT, [v for v in group if type(v) is int]))
        and (_FLOAT not in kinds or _scalars_are_plain(_FLOAT, [v for v in group if type(v) is float]))
    )


def _scalars_are_plain(kind: int, group: _Group) -> bool:
    """Check values that are exactly of one scalar type."""
    if kind == _STR:
        # Each by itself first: two lone surrogates that meet in a join stay lone in Python, so one text will do.
        return is_text("".join(group))
    if kind == _INT:
        return bool(min(group) >= -SAFE_INT and max(group) <= SAFE_INT)
    # A sum of finite floats may overflow, which costs a walk; with a NaN or an infinity it is never finite.
    return kind == _FLOAT and bool(isfinite(sum(group)))


def _names_are_plain(dicts: Sequence[dict[str, Any]]) -> bool:
    if set(map(id, map(type, chain.from_iterable(dicts)))) - _ONLY_STR:
        return False
    # One text for all names: "\n$" inside a name is a false alarm, which costs a walk.
    text = "\n" + "\n".join(set().union(*dicts))
    return "\n$" not in text and is_text(text)


def _regroup(containers: Sequence[Any]) -> list[_Group]:
    """Return the values of the containers in groups that are likely to be of one type each."""
    if len(containers) >= _COLUMNS and len(set(map(len, containers))) == 1:
        return list(zip(*containers, strict=True))
    group = list(chain.from_iterable(containers))
    return [group] if group else []


# --- The text that a tree was parsed from ---------------------------------------------------------

# Digits become 0, and whatever may stand before a number becomes a comma.
_SHAPE: Final = bytes.maketrans(b"123456789[:- \t\n\rE", b"000000000,,,,,,,e")


def may_hold_tags(text: bytes) -> bool:
    """Say whether the JSON text may hold a member name that begins with ``$``."""
    return b'"$' in text or rb"\u0024" in text


def may_break_limits(text: bytes, limits: Limits) -> bool:
    """Say whether the JSON text may hold too many values, too deep ones, or numbers that are not plain.

    A cheap over-estimate: it may say yes without cause, never no.
    """
    brackets = text.count(b"[") + text.count(b"{")
    if brackets > limits.depth or brackets + text.count(b",") > limits.items:
        return True
    shape = text.translate(_SHAPE)
    # An integer beyond 2**53-1 has at least 16 digits; an infinity has that many too, or an exponent of three.
    return b",0000000000000000" in shape or b"0e000" in shape or b"0e+000" in shape
