"""Which expressions of the user's code make a datetime without a time zone, as far as the code says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from datetime import datetime
from typing import Final

from safedefer.migrate.names import Names

_NAIVE: Final = frozenset({"datetime.datetime.utcnow", "datetime.datetime.today", "datetime.datetime.utcfromtimestamp"})
_AWARE_IF: Final = {"datetime.datetime.now": 0, "datetime.datetime.fromtimestamp": 1, "datetime.datetime.combine": 2}
_ENDS: Final = frozenset({"datetime.datetime.min", "datetime.datetime.max"})
_ONE_OF: Final = frozenset({"builtins.min", "builtins.max"})
#: Positional arguments of ``datetime()`` before ``tzinfo``.
_BEFORE_ZONE: Final = 7


def is_naive(names: Names, expr: ast.expr, stored: frozenset[str] = frozenset()) -> bool:
    """Whether an expression makes a datetime without a time zone.

    Args:
        names: Those of its file.
        expr: The expression.
        stored: Attributes that count as datetimes without one.
    """
    return _TimeReader(names, stored).naive(expr, frozenset())


def is_naive_property(names: Names, made: ast.Call) -> bool:
    """Whether a call makes App Engine's property of datetimes without a time zone."""
    dotted = names.dotted(made.func) or ""
    return (
        dotted.startswith("google.")
        and dotted.endswith(".DateTimeProperty")
        and not (_has(made, "tzinfo") or _spread(made))
    )


class _TimeReader:
    def __init__(self, names: Names, stored: frozenset[str]) -> None:
        self._names = names
        self._stored = stored

    def naive(self, expr: ast.expr, within: frozenset[ast.AST]) -> bool:
        """Whether it is one; ``within`` are the names and functions that are being read, which say nothing of themselves."""
        if isinstance(expr, ast.Name) and (several := self._several(expr)):
            return self._assigned(several, within)
        expr = self._names.value(expr)
        if self._is_stored(expr) or self._names.dotted(expr) in _ENDS:
            return True
        if isinstance(expr, ast.Subscript):  # of a repeated property
            return self._is_stored(self._names.value(expr.value))
        if isinstance(expr, ast.Call):
            return self._made(expr, within)
        return any(self.naive(each, within) for each in _parts(expr))

    def _several(self, expr: ast.Name) -> list[tuple[ast.AST, ast.expr | None]]:
        found = self._names.look_up(expr.id, expr)
        bindings = [] if found is None else found[1]
        return [(each.node, each.value) for each in bindings] if len(bindings) > 1 else []

    def _assigned(self, bindings: list[tuple[ast.AST, ast.expr | None]], within: frozenset[ast.AST]) -> bool:
        """Whether all that is assigned to a name is one; what adds to it and None change nothing of that."""
        first = bindings[0][0]
        if first in within:
            return True
        values = [
            value
            for node, value in bindings
            if not isinstance(self._names.parents.get(node), ast.AugAssign)
            and not (isinstance(value, ast.Constant) and value.value is None)
        ]
        return bool(values) and all(value is not None and self.naive(value, within | {first}) for value in values)

    def _made(self, call: ast.Call, within: frozenset[ast.AST]) -> bool:
        if isinstance(call.func, ast.Attribute) and call.func.attr == "replace":
            zone = next((each.value for each in call.keywords if each.arg == "tzinfo"), None)
            if zone is not None:
                return isinstance(zone, ast.Constant) and zone.value is None
            return self.naive(call.func.value, within)
        made = self._names.dotted(call.func) or ""
        if made in _NAIVE:
            return True
        if made in _ONE_OF:
            return any(self.naive(each, within) for each in call.args)
        if made == "datetime.datetime":
            return not _has(call, "tzinfo") and len(call.args) <= _BEFORE_ZONE and not _spread(call)
        if made == "datetime.datetime.strptime":
            form = call.args[1] if len(call.args) > 1 else None
            return isinstance(form, ast.Constant) and isinstance(form.value, str) and "%z" not in form.value
        if made == "datetime.datetime.fromisoformat":
            return bool(call.args) and _is_text_without_zone(call.args[0])
        if made in _AWARE_IF:
            return not _has(call, "tz", "tzinfo") and len(call.args) <= _AWARE_IF[made] and not _spread(call)
        return self._returned(call, within)

    def _returned(self, call: ast.Call, within: frozenset[ast.AST]) -> bool:
        """Whether all that a function of the file returns is one."""
        function = self._names.definition(call.func)
        if not isinstance(function, ast.FunctionDef) or function in within:
            return False
        returns = [each for each in ast.walk(function) if isinstance(each, ast.Return)]
        own = [each.value for each in returns if self._names.scope(each) is function]
        return bool(own) and all(value is not None and self.naive(value, within | {function}) for value in own)

    def _is_stored(self, expr: ast.expr) -> bool:
        if not self._stored:
            return False
        if isinstance(expr, ast.Attribute):
            return expr.attr in self._stored
        # `self.due`, followed to what the class says of it.
        return isinstance(expr, ast.Call) and is_naive_property(self._names, expr)


def _parts(expr: ast.expr) -> Iterator[ast.expr]:
    """Give the parts of which one makes an expression a datetime without a time zone, if it is one itself."""
    if isinstance(expr, ast.BinOp) and isinstance(expr.op, ast.Add | ast.Sub):
        yield expr.left
        if isinstance(expr.op, ast.Add):
            yield expr.right
    elif isinstance(expr, ast.IfExp):
        yield from (expr.body, expr.orelse)
    elif isinstance(expr, ast.BoolOp):
        yield from expr.values
    elif isinstance(expr, ast.NamedExpr):
        yield expr.value


def _is_text_without_zone(expr: ast.expr) -> bool:
    if not (isinstance(expr, ast.Constant) and isinstance(expr.value, str)):
        return False
    try:
        return datetime.fromisoformat(expr.value).tzinfo is None
    except ValueError:
        return False


def _has(call: ast.Call, *keywords: str) -> bool:
    return any(each.arg in keywords for each in call.keywords)


def _spread(call: ast.Call) -> bool:
    return any(isinstance(each, ast.Starred) for each in call.args) or any(each.arg is None for each in call.keywords)
