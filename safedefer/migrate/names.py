"""What the names of a module stand for: scopes and bindings, read from its syntax tree. Nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, TypeAlias

Scope: TypeAlias = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp  # fmt: skip
Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef

_SCOPES: Final = (
    ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
)  # fmt: skip
_MOST_STEPS: Final = 20


@dataclass(frozen=True, slots=True)
class Binding:
    """One way in which a scope binds a name."""

    node: ast.AST
    """What stands in the code: a definition, an import's alias, a parameter, a target."""
    value: ast.expr | None = None
    """What is assigned, where that is an expression by itself."""
    imported: str | None = None
    """The dotted name that an import leads to."""


@dataclass(slots=True)
class Names:
    """The scopes of one module."""

    module: str
    """Its dotted name, as far as its path says."""
    tree: ast.Module
    is_package: bool = False
    parents: dict[ast.AST, ast.AST] = field(default_factory=dict)
    bindings: dict[ast.AST, dict[str, list[Binding]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read the tree."""
        globals_: dict[ast.AST, set[str]] = {}
        for node in ast.walk(self.tree):
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Global | ast.Nonlocal):
                globals_.setdefault(self.scope(node), set()).update(node.names)
        for node in ast.walk(self.tree):
            scope = self.scope(node)
            for name, binding in self._bound_by(node):
                home: ast.AST = self.tree if name in globals_.get(scope, ()) else scope
                self.bindings.setdefault(home, {}).setdefault(name, []).append(binding)

    def scope(self, node: ast.AST) -> Scope:
        """Return the scope that a node stands in."""
        current = self.parents.get(node)
        # Decorators, defaults and bases are evaluated outside of what they belong to.
        below = node
        while current is not None:
            outside = isinstance(current, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not (
                below in current.body or isinstance(below, ast.arguments)
            )
            if isinstance(current, _SCOPES) and not outside:
                return current
            below, current = current, self.parents.get(current)
        return self.tree

    def enclosing(self, node: ast.AST) -> Iterator[ast.AST]:
        """Give what a node stands in, the nearest first."""
        current = self.parents.get(node)
        while current is not None:
            yield current
            current = self.parents.get(current)

    def enclosing_class(self, node: ast.AST) -> ast.ClassDef | None:
        """Return the class that the method around a node is defined in."""
        return next((each for each in self.enclosing(node) if isinstance(each, ast.ClassDef)), None)

    def look_up(self, name: str, at: ast.AST) -> tuple[Scope, list[Binding]] | None:
        """Return the scope that binds a name as it is seen at a node, and how; None for a built-in or unknown name."""
        first = scope = self.scope(at)
        while True:
            found = self.bindings.get(scope, {}).get(name)
            if found and (scope is first or not isinstance(scope, ast.ClassDef)):
                return scope, found
            if isinstance(scope, ast.Module):
                return None
            scope = self.scope(scope)

    def binds(self, name: str) -> list[Binding]:
        """Return every binding of a name, in whichever scope."""
        return [each for scope in self.bindings.values() for each in scope.get(name, ())]

    def dotted(self, expr: ast.expr) -> str | None:
        """Return the dotted name that an expression leads to: through imports, else ``module.name``; None if it is no name.

        Built-ins are ``builtins.open``.
        """
        if isinstance(expr, ast.Attribute):
            owner = self.dotted(expr.value)
            return None if owner is None else f"{owner}.{expr.attr}"
        if not isinstance(expr, ast.Name):
            return None
        found = self.look_up(expr.id, expr)
        if found is None:
            return f"builtins.{expr.id}"
        scope, bindings = found
        imported = {each.imported for each in bindings}
        if None not in imported:
            # `try: import a.x as x; except ImportError: import b.x as x`: the first is meant.
            return bindings[0].imported
        if isinstance(scope, ast.Module):
            return f"{self.module}.{expr.id}"
        return None

    def value(self, expr: ast.expr, steps: int = _MOST_STEPS) -> ast.expr:
        """Return what was assigned to a name or to ``self.name``, if that is one expression; else the expression itself."""
        if not steps:
            return expr
        bindings: list[Binding] = []
        if isinstance(expr, ast.Name):
            found = self.look_up(expr.id, expr)
            bindings = found[1] if found else []
        elif isinstance(expr, ast.Attribute) and isinstance(expr.value, ast.Name) and expr.value.id in {"self", "cls"}:
            owner = self.enclosing_class(expr)
            bindings = [] if owner is None else self._attributes(owner, expr.attr)
        if len(bindings) == 1 and bindings[0].value is not None:
            return self.value(bindings[0].value, steps - 1)
        return expr

    def definition(self, expr: ast.expr) -> ast.AST | None:
        """Return the function, class or lambda of this file that a name leads to."""
        if isinstance(expr, ast.Name):
            found = self.look_up(expr.id, expr)
            if found is None or len(found[1]) != 1:
                return None
            node = found[1][0].node
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                return node
            value = found[1][0].value
            return value if isinstance(value, ast.Lambda) else None
        if isinstance(expr, ast.Attribute):
            owner: ast.AST | None = None
            if isinstance(expr.value, ast.Name) and expr.value.id in {"self", "cls"}:
                owner = self.enclosing_class(expr)
            else:
                owner = self.definition(self._instance_of(expr.value))
            if isinstance(owner, ast.ClassDef):
                return next((each for each in owner.body if _name(each) == expr.attr), None)
        return None

    def _instance_of(self, expr: ast.expr) -> ast.expr:
        """Return the class where an expression makes an object of one by calling it."""
        value = self.value(expr)
        return value.func if isinstance(value, ast.Call) else expr

    def _attributes(self, owner: ast.ClassDef, name: str) -> list[Binding]:
        own = list(self.bindings.get(owner, {}).get(name, ()))
        for node in ast.walk(owner):
            if isinstance(node, ast.Assign):
                own += [
                    Binding(target, node.value)
                    for target in node.targets
                    if isinstance(target, ast.Attribute)
                    and target.attr == name
                    and isinstance(target.value, ast.Name)
                    and target.value.id == "self"
                ]
        return own

    def _bound_by(self, node: ast.AST) -> Iterator[tuple[str, Binding]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, Binding(node)
        elif isinstance(node, ast.arg):
            yield node.arg, Binding(node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                yield alias.asname or top, Binding(alias, imported=alias.name if alias.asname else top)
        elif isinstance(node, ast.ImportFrom):
            base = self.origin(node)
            for alias in node.names:
                yield alias.asname or alias.name, Binding(alias, imported=f"{base}.{alias.name}".lstrip("."))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, Binding(node, self._assigned(node))
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name, Binding(node)

    def _assigned(self, target: ast.Name) -> ast.expr | None:
        parent = self.parents[target]
        if isinstance(parent, ast.Assign) and target in parent.targets:
            return parent.value
        if isinstance(parent, ast.AnnAssign | ast.NamedExpr):
            return parent.value
        return parent.context_expr if isinstance(parent, ast.withitem) else None

    def origin(self, node: ast.ImportFrom) -> str:
        """Return the dotted name of the module that a ``from`` import names."""
        if not node.level:
            return node.module or ""
        parts = self.module.split(".")
        up = node.level - (1 if self.is_package else 0)
        base = parts[: len(parts) - up] if up <= len(parts) else []
        return ".".join([*base, *([node.module] if node.module else [])])


def _name(node: ast.AST) -> str | None:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name
    return None
