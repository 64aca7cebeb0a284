"""The files that are looked at together: names of one file lead to definitions of another."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from safedefer.migrate.edits import Edits, Places
from safedefer.migrate.names import Binding, Names
from safedefer.migrate.notes import FileReport, Level
from safedefer.migrate.times import is_naive_property

APP_ENGINE: Final = ("google.appengine.ext.deferred", "google.appengine.ext.deferred.deferred")
DJANGAE: Final = ("djangae.deferred", "djangae.tasks.deferred")
OURS: Final = "safedefer.deferred"
_MODULES: Final = frozenset({*APP_ENGINE, *DJANGAE, OURS})
_MOST_STEPS: Final = 10


@dataclass(slots=True)
class CodeFile:
    """A file that parses."""

    report: FileReport
    data: bytes
    names: Names
    places: Places
    edits: Edits = field(default_factory=Edits)
    deferred_name: str | None = None
    """How the file names safedefer's ``deferred``, once that was asked."""

    def note(self, node: ast.AST, level: Level, code: str, text: str) -> None:
        """Say something of a node."""
        line, offset = getattr(node, "lineno", 0), getattr(node, "col_offset", -1)
        self.report.add(line, self.places.column(line, offset) + 1 if offset >= 0 else 0, level, code, text)

    def deferred(self) -> str:
        """Return how the file names safedefer's ``deferred``, and see that it imports it."""
        if self.deferred_name is None:
            self.deferred_name = self._deferred()
        return self.deferred_name

    def _deferred(self) -> str:
        top = self.names.bindings.get(self.names.tree, {})
        for name, bindings in top.items():
            if all(each.imported in _MODULES for each in bindings):
                return name
        foreign = any(each.imported not in _MODULES for each in self.names.binds("deferred"))
        self.edits.need(
            "from safedefer import deferred as safedefer_deferred" if foreign else "from safedefer import deferred"
        )
        return "safedefer_deferred" if foreign else "deferred"

    def unused_imports(self, *origins: str) -> None:
        """Let imports of these modules go, if nothing of the file uses them in the end."""
        for name, bindings in self.names.bindings.get(self.names.tree, {}).items():
            if all(
                each.imported is not None and f"{each.imported}.".startswith(tuple(f"{o}." for o in origins))
                for each in bindings
            ):
                self.edits.maybe_unused.add(name)


class OldTask(NamedTuple):
    """A function that a decorator of RQ or Celery made a task."""

    file: CodeFile
    node: ast.FunctionDef | ast.AsyncFunctionDef
    decorator: ast.expr
    kind: str
    """``rq`` or ``celery``."""
    options: dict[str, str]
    """Options of ``deferred.defer`` that the decorator stands for, as source: ``{"_queue": "'mail'"}``."""
    stays: str | None
    """Why the decorator stays and its calls are not rewritten; None if they are."""


class Project:
    """All files that were found."""

    def __init__(self, files: Iterable[CodeFile]) -> None:
        self.files: Final = list(files)
        self.tasks: Final[dict[str, OldTask]] = {}
        """Tasks of RQ and Celery, by dotted name."""
        self.kept: Final[set[int]] = set()
        """By id, definitions of tasks whose decorators stay: a use of them is not rewritten."""
        self._modules: Final = {file.names.module: file for file in self.files}
        self.naive_properties: Final = frozenset(name for file in self.files for name in _naive_properties(file.names))
        """Attributes that are App Engine's datetimes without a time zone in a class of these files."""

    def module(self, name: str) -> CodeFile | None:
        """Return the file of a module; by the end of its name, if that is one file's alone: a root may lie above the PATHs."""
        found = self._modules.get(name)
        if found is None and name:
            ends = [
                f
                for known, f in self._modules.items()
                if f".{name}".endswith(f".{known}") or f".{known}".endswith(f".{name}")
            ]
            found = ends[0] if len(ends) == 1 else None
        return found

    def canonical(self, dotted: str | None) -> str:
        """Follow imports from file to file, and return the name of a definition: ``module.name``, as the files are called."""
        name = dotted or ""
        for _ in range(_MOST_STEPS):
            module, _, last = name.rpartition(".")
            file = self.module(module)
            bindings = [] if file is None else self._top(file, last)
            if file is None or not bindings:
                return name
            if bindings[0].imported is None:
                return f"{file.names.module}.{last}"
            name = bindings[0].imported
        return name

    def task(self, file: CodeFile, expr: ast.expr) -> OldTask | None:
        """Return the task that a name leads to."""
        return self.tasks.get(self.canonical(file.names.dotted(expr)))

    def keep(self, task: OldTask, file: CodeFile, use: ast.AST) -> None:
        """Let the decorator of a task stay, since a use of it is not rewritten."""
        if task.stays is None:
            self.kept.add(id(task.node))
            task.file.edits.decorators.discard(task.file.places.span(task.decorator))
            task.file.note(
                task.decorator,
                Level.BY_HAND,
                "decorator-stays",
                f"the decorator of {task.node.name} stays for {file.names.module}, line {getattr(use, 'lineno', 0)}; take it out after that",
            )

    def value(self, file: CodeFile, expr: ast.expr) -> tuple[CodeFile, ast.expr]:
        """Return what was assigned to a name, here or where it was imported from; and the file of that."""
        for _ in range(_MOST_STEPS):
            found = file.names.value(expr)
            if isinstance(found, ast.Call):
                returned = self._returned(file, found)
                if returned is not None:
                    return returned
            if not isinstance(found, ast.Name | ast.Attribute):
                return file, found
            module, _, last = self.canonical(file.names.dotted(found)).rpartition(".")
            home = self._modules.get(module)
            bindings = [] if home is None else self._top(home, last)
            if home is None or len(bindings) != 1 or bindings[0].value is None or bindings[0].value is found:
                return file, found
            file, expr = home, bindings[0].value
        return file, expr

    def _returned(self, file: CodeFile, call: ast.Call) -> tuple[CodeFile, ast.expr] | None:
        """Return what a function of these files returns, if that is one expression: ``def get_queue(): return Queue(...)``."""
        module, _, last = self.canonical(file.names.dotted(call.func)).rpartition(".")
        home = self._modules.get(module)
        node = self._top(home, last)[0].node if home is not None and self._top(home, last) else None
        if home is None or not isinstance(node, ast.FunctionDef) or call.args or call.keywords:
            return None
        returns = [each.value for each in ast.walk(node) if isinstance(each, ast.Return)]
        return (home, home.names.value(returns[0])) if len(returns) == 1 and returns[0] is not None else None

    @staticmethod
    def _top(file: CodeFile, name: str) -> list[Binding]:
        return file.names.bindings.get(file.names.tree, {}).get(name, [])


def _naive_properties(names: Names) -> Iterator[str]:
    for node in ast.walk(names.tree):
        if (
            isinstance(node, ast.Assign)
            and isinstance(names.scope(node), ast.ClassDef)
            and isinstance(node.value, ast.Call)
            and is_naive_property(names, node.value)
        ):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
