"""What is to be rewritten in a file: decided on its syntax tree, carried out by ``edit``. Places are those of the text."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

_LINES: Final = re.compile("\r\n|\r|\n")


class Span(NamedTuple):
    """Where a node begins and ends: lines from 1, columns in characters from 0."""

    line: int
    column: int
    end_line: int
    end_column: int


class Piece(NamedTuple):
    """An argument of the new call."""

    how: Literal["keep", "positional", "rename", "elements", "items", "star", "stars", "seconds", "new"]
    """``keep``: as it is. ``positional``, ``rename``: without its keyword, with another. ``elements``, ``items``: those of a literal
    tuple, list or dict. ``star``, ``stars``: behind ``*`` or ``**``. ``seconds``: of a timedelta. ``new``: ``text``."""
    at: int = -1
    """Of the old argument."""
    keyword: str | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class CallEdit:
    """A call, rewritten."""

    callee: str
    pieces: Sequence[Piece]


@dataclass(frozen=True, slots=True)
class ImportEdit:
    """An import of which some names come from elsewhere."""

    moved: Sequence[int]
    """Those that do, by their place in the statement."""
    module: str
    """Where they come from now; of ``import a.b``, in place of ``a.b``."""
    count: int
    """How many names the statement has."""


@dataclass(slots=True)
class Edits:
    """All of a file."""

    statements: dict[Span, ImportEdit] = field(default_factory=dict)
    """Imports."""

    calls: dict[Span, CallEdit] = field(default_factory=dict)
    names: dict[Span, str] = field(default_factory=dict)
    """Names and dotted names, replaced."""
    decorators: set[Span] = field(default_factory=set)
    """Decorators that go."""
    imports: list[str] = field(default_factory=list)
    """Statements that are needed, if the file does not have them."""
    maybe_unused: set[str] = field(default_factory=set)
    """Names of imports that go, if nothing uses them any more."""

    def need(self, statement: str) -> None:
        """Ask for an import."""
        if statement not in self.imports:
            self.imports.append(statement)


class Places:
    """Turns the places of ``ast``, which counts bytes of UTF-8, to those of the text."""

    def __init__(self, text: str) -> None:
        self._lines = _LINES.split(text)

    def span(self, node: ast.expr | ast.stmt) -> Span:
        """Return the place of an expression or statement."""
        end_line, end_column = node.end_lineno, node.end_col_offset
        assert end_line is not None
        assert end_column is not None
        return Span(node.lineno, self.column(node.lineno, node.col_offset), end_line, self.column(end_line, end_column))

    def column(self, line: int, offset: int) -> int:
        """Return the column of an offset."""
        text = self._lines[line - 1] if line <= len(self._lines) else ""
        return offset if text.isascii() else len(text.encode()[:offset].decode(errors="ignore"))


class CallArguments:
    """The arguments of a call, in the order of the text."""

    def __init__(self, call: ast.Call) -> None:
        both: list[ast.expr | ast.keyword] = [*call.args, *call.keywords]
        self.all: list[ast.expr | ast.keyword] = sorted(both, key=lambda each: (each.lineno, each.col_offset))
        self.positional: list[tuple[int, ast.expr]] = [
            (n, each) for n, each in enumerate(self.all) if isinstance(each, ast.expr)
        ]
        self.keywords: dict[str, tuple[int, ast.expr]] = {
            each.arg: (n, each.value) for n, each in enumerate(self.all) if isinstance(each, ast.keyword) and each.arg
        }
        self.stars: list[int] = [n for n, each in self.positional if isinstance(each, ast.Starred)]
        self.double: list[int] = [
            n for n, each in enumerate(self.all) if isinstance(each, ast.keyword) and each.arg is None
        ]

    def value(self, keyword: str) -> ast.expr | None:
        """Return the value of a keyword."""
        found = self.keywords.get(keyword)
        return None if found is None else found[1]


def spread(args: tuple[int, ast.expr] | None, kwargs: tuple[int, ast.expr] | None) -> Iterator[Piece]:
    """Give the arguments that a tuple and a dict stand for."""
    if args is not None and not _is_none(args[1]):
        yield Piece("elements" if isinstance(args[1], ast.Tuple | ast.List) else "star", args[0])
    if kwargs is not None and not _is_none(kwargs[1]):
        yield Piece("items" if _is_plain_dict(kwargs[1]) else "stars", kwargs[0])


def _is_none(expr: ast.expr) -> bool:
    return isinstance(expr, ast.Constant) and expr.value is None


def _is_plain_dict(expr: ast.expr) -> bool:
    return isinstance(expr, ast.Dict) and all(
        isinstance(key, ast.Constant) and isinstance(key.value, str) and key.value.isidentifier() and not key.value.startswith("_")
        for key in expr.keys
    )  # fmt: skip
