"""What is said of a place in the user's code."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Level(StrEnum):
    """What a note asks of a person."""

    NOTE = "note"
    """It is rewritten, or stays, and behaves otherwise in the named point."""
    BY_HAND = "by-hand"
    """It is not rewritten; a person does."""
    REFUSED = "refused"
    """``defer()`` refuses it when it runs."""
    ERROR = "error"
    """The file is left as it is."""


@dataclass(frozen=True, slots=True, order=True)
class Note:
    """One line of the report."""

    line: int
    """From 1; 0 is the whole file."""
    column: int
    """From 1, in characters; 0 is the whole line."""
    level: Level
    code: str
    """A slug, stable: those of ``NotDeferrable.reason`` where ``defer()`` says the same."""
    text: str
    """What is wrong, and what to do."""


@dataclass(slots=True)
class FileReport:
    """What became of a file."""

    path: str
    notes: list[Note] = field(default_factory=list)
    rewrites: int = 0
    """Imports, calls, names and decorators that were rewritten."""
    diff: str = ""
    changed: bool = False
    written: bool = False

    def add(self, line: int, column: int, level: Level, code: str, text: str) -> None:
        """Add a note, once."""
        note = Note(line, column, level, code, text)
        if note not in self.notes:
            self.notes.append(note)
