"""The demonstration's tasks: each parses one file of Python's source and stores what it found.

One of every documented kind: a function, a coroutine function, a class method, a method of an object
that carries state. The built-in is ``operator.call``, which is handed one of these as an argument.
"""

from __future__ import annotations

import ast
import asyncio
import sqlite3
import time
import tokenize
from contextlib import closing
from dataclasses import dataclass, field

from safedefer import PermanentTaskFailure

SCHEMA = """
CREATE TABLE IF NOT EXISTS findings (
    path TEXT NOT NULL, kind TEXT NOT NULL, lines INTEGER NOT NULL, functions INTEGER NOT NULL,
    classes INTEGER NOT NULL, imports INTEGER NOT NULL, seconds REAL NOT NULL, stored REAL NOT NULL
)
"""


@dataclass(frozen=True)
class Findings:
    """What one file holds."""

    lines: int
    functions: int
    classes: int
    imports: int
    seconds: float = 0.0
    """Processor time that it took to parse the file."""


def examine(path: str) -> Findings:
    """Parse a file.

    Raises:
        PermanentTaskFailure: It is not Python of this version: trying again would not help.
    """
    begun = time.thread_time()
    try:
        with tokenize.open(path) as file:
            source = file.read()
        nodes = list(ast.walk(ast.parse(source, path)))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PermanentTaskFailure(f"{type(error).__name__}: {error}") from error
    return Findings(
        lines=source.count("\n"),
        functions=sum(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in nodes),
        classes=sum(isinstance(node, ast.ClassDef) for node in nodes),
        imports=sum(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes),
        seconds=time.thread_time() - begun,
    )


def store(database: str, path: str, kind: str, found: Findings) -> None:
    """Write the findings of one file."""
    with closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        connection.execute(
            "INSERT INTO findings VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (path, kind, found.lines, found.functions, found.classes, found.imports, found.seconds, time.time()),
        )


def by_function(path: str, database: str, kind: str = "function") -> int:
    """Examine a file, in a thread of the handler."""
    found = examine(path)
    store(database, path, kind, found)
    return found.lines


async def by_coroutine(path: str, *, database: str) -> None:
    """Examine a file, from the handler's event loop."""
    found = await asyncio.to_thread(examine, path)
    await asyncio.to_thread(store, database, path, "coroutine", found)


@dataclass
class Examiner:
    """An object that travels with its state."""

    database: str
    kind: str
    seen: set[str] = field(default_factory=set)

    def run(self, path: str) -> None:
        """Examine a file, unless this object has seen it."""
        if path not in self.seen:
            self.seen.add(path)
            store(self.database, path, self.kind, examine(path))

    @classmethod
    def for_database(cls, database: str, path: str) -> Examiner:
        """Make an examiner, and use it at once."""
        examiner = cls(database, "class method")
        examiner.run(path)
        return examiner


def ping(database: str, path: str) -> None:
    """Store the time, to measure how long a task takes from ``defer()`` until it runs."""
    store(database, path, "ping", Findings(0, 0, 0, 0))


def nothing() -> None:
    """Do nothing, to measure what the queue itself takes."""
