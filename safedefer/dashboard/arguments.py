"""Arguments as rows of a tree, read from the claims of a token that one of our keys signed.

No value is decoded: a tag of the wire format is shown by its name, with its payload. So no code of users is imported or run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import orjson

from safedefer.claims import Claims

#: Rows, characters of a value, and levels that are shown.
_MOST_ROWS: Final = 500
_MOST_TEXT: Final = 2_000
_MOST_DEPTH: Final = 12

_KINDS: Final = {bool: "bool", int: "int", float: "float", str: "str"}


@dataclass(frozen=True, slots=True)
class ArgumentRow:
    """One value: a line of the tree."""

    depth: int
    name: str
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of a task."""

    rows: list[ArgumentRow]
    is_cut: bool
    """Whether there are more rows, or deeper ones."""
    pickled: int | None = None
    """The size of pickled arguments, which are never read here."""


def arguments_of(claims: Claims) -> Arguments:
    """Return the arguments that claims hold; none where they point to a stored token."""
    if claims["cty"] == "pickle":
        text = orjson.dumps([claims.get("args", []), claims.get("kwargs", {})])
        return Arguments([], is_cut=False, pickled=len(text))
    rows = [*islice(_all_rows(claims), _MOST_ROWS + 1)]
    return Arguments(rows[:_MOST_ROWS], is_cut=len(rows) > _MOST_ROWS)


def search_text(claims: Claims) -> str:
    """Return the text in which arguments are searched: the values as the token spells them; pickled ones are not read."""
    if claims["cty"] == "pickle":
        return ""
    return orjson.dumps([claims.get("args", []), claims.get("kwargs", {})]).decode()


def _all_rows(claims: Claims) -> Iterator[ArgumentRow]:
    call = claims.get("call", {})
    if "bound" in call:
        yield from _rows("self", call["bound"], 0)
    for number, value in enumerate(claims.get("args", [])):
        yield from _rows(f"{number}", value, 0)
    for name, value in claims.get("kwargs", {}).items():
        yield from _rows(name, value, 0)


def _rows(name: str, value: Any, depth: int, tag: str = "") -> Iterator[ArgumentRow]:
    """Yield the rows of one value; ``tag`` is what the wire format calls it."""
    if isinstance(value, dict) and len(value) == 1 and not tag and (only := next(iter(value))).startswith("$"):
        yield from _rows(name, value[only], depth, only[1:])
        return
    if not isinstance(value, dict | list):
        kind = tag or ("None" if value is None else _KINDS[type(value)])
        text = "None" if value is None else value if isinstance(value, str) else str(value)
        yield ArgumentRow(depth, name, kind, text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…")
        return
    items = f"{len(value)} item{'' if len(value) == 1 else 's'}"
    yield ArgumentRow(depth, name, tag or ("dict" if isinstance(value, dict) else "list"), items)
    if depth == _MOST_DEPTH and value:
        yield ArgumentRow(depth, "", "", "… (deeper values are not shown)")
        return
    members = value.items() if isinstance(value, dict) else ((str(number), each) for number, each in enumerate(value))
    for each, inner in members:
        yield from _rows(each, inner, depth + 1)
