"""What survives the end of the emulator: a file of JSON lines, each a change, written before a request is answered."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

_MODE: Final = 0o600  # it has the key that signs OIDC tokens, and the tokens of tasks


class Journal:
    """An append-only file. What was written survives ``kill -9``; a power cut may take the last lines.

    Args:
        path: The file; None keeps nothing.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._path = None if path is None else Path(path)
        self._file: int | None = None

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the changes in their order. A line that breaks off at the end of the file was not answered for."""
        if self._path is None or not self._path.exists():
            return
        for line in self._path.read_bytes().split(b"\n")[:-1]:
            yield json.loads(line)

    def rewrite(self, changes: Iterable[dict[str, Any]]) -> None:
        """Replace the file by one that holds these changes."""
        if self._path is None:
            return
        fresh = self._path.with_name(f"{self._path.name}.new")
        fresh.unlink(missing_ok=True)
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, _MODE)
        for change in changes:
            _write(file, change)
        fresh.replace(self._path)
        self.close()
        self._file = file

    def append(self, change: dict[str, Any]) -> None:
        """Add a change."""
        if self._file is not None:
            _write(self._file, change)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _write(file: int, change: dict[str, Any]) -> None:
    left = json.dumps(change, separators=(",", ":")).encode() + b"\n"
    while left:
        left = left[os.write(file, left) :]
