"""Files of Python below paths: found, read, and written as they were but for the text."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import stat
import symtable
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_SKIPPED: Final = frozenset(
    {"__pycache__", "node_modules", "site-packages", "venv", "env", "build", "dist", "egg-info", "__pypackages__"}
)
_MOST_BYTES: Final = 4 * 1024 * 1024
#: What Python 2 reads and Python 3 does not.
_PYTHON_2: Final = re.compile(
    r"""^\s*print\s+["'\w%]|^\s*print\s*>>|^\s*except\s+[\w.()]+(\s*,\s*[\w.()]+\))?\s*,\s*\w+\s*:|^\s*raise\s+\w+\s*,|^\s*exec\s+["'\w]"""
    r"""|\b0[0-7]{2,}\b|<>|\bur["']|^\s*print\s*$|`[^`]+`|\b\d+[lL]\b|lambda\s*\([\w, ]+\)\s*:|^\s*def\s+\w+\([^)]*\([\w, ]+\)""",
    re.MULTILINE,
)


class FoundFile(NamedTuple):
    """A file, or what is wrong with a path."""

    path: Path
    module: str
    is_package: bool
    problem: str = ""


class Unreadable(Exception):
    """A file that stays as it is. ``code`` is a slug."""

    def __init__(self, code: str, text: str, line: int = 0) -> None:
        super().__init__(text)
        self.code = code
        self.line = line


def find_files(paths: tuple[str, ...]) -> Iterator[FoundFile]:
    """Give each file of Python once: those that are named, and those below folders that are.

    Hidden folders, virtual environments and what installers make are left out, and links that lead out of a folder.
    """
    seen: set[str] = set()
    for text in paths:
        root = Path(text)
        if root.is_dir():
            for path in _below(root):
                real = os.path.realpath(path)
                if real in seen:
                    continue
                outside = path.is_symlink() and not Path(real).is_relative_to(os.path.realpath(root))
                if not outside:
                    seen.add(real)
                problem = "a link that leads out of the folder is left as it is; name its file" if outside else ""
                yield FoundFile(path, *_module(path, root), problem)
        elif root.exists():
            if os.path.realpath(root) not in seen:
                seen.add(os.path.realpath(root))
                yield FoundFile(root, *_module(root, root.parent))
        else:
            yield FoundFile(root, "", is_package=False, problem="there is no such file or folder")


def _below(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            name for name in folders
            if not name.startswith(".") and name not in _SKIPPED and not name.endswith(".egg-info") and not Path(folder, name, "pyvenv.cfg").exists()
        )  # fmt: skip
        yield from (Path(folder, name) for name in sorted(names) if name.endswith((".py", ".pyw")))


def _module(path: Path, root: Path) -> tuple[str, bool]:
    """Return the dotted name of a file as its packages say it, else as it stands below the root; and whether it is a package."""
    path, root = path.absolute(), root.absolute()
    base = path.parent
    while (base / "__init__.py").exists() and base != base.parent:
        base = base.parent
    if base.is_relative_to(root):
        base = root
    parts = [*path.relative_to(base).with_suffix("").parts]
    is_package = parts[-1] == "__init__"
    return ".".join(parts[:-1] if is_package and len(parts) > 1 else parts), is_package


def read(path: Path) -> tuple[bytes, str]:
    """Return the bytes and the text of a file.

    Raises:
        Unreadable: It is no text, no regular file, too large, or no Python 3.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Unreadable("no-file", "it is no regular file")
        if path.stat().st_size > _MOST_BYTES:
            raise Unreadable("too-large", "it has over 4 MiB; rewrite it by hand")
        data = path.read_bytes()
    except OSError as error:
        raise Unreadable("unreadable", f"it cannot be read: {error.strerror}") from error
    text = _decoded(data)
    problem = syntax_problem(text)
    if problem is not None:
        line, said = problem
        if _PYTHON_2.search(text):
            raise Unreadable("python-2", f"it is Python 2 ({said}); convert it first, with 2to3 or by hand", line)
        raise Unreadable("syntax", f"it does not parse: {said}", line)
    return data, text


def _decoded(data: bytes) -> str:
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data.replace(b"\0", b"")).readline)  # a NUL is bad syntax
        return data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError) as error:
        raise Unreadable("encoding", f"its encoding is not what it says: {error}; correct the coding line") from error


def syntax_problem(text: str) -> tuple[int, str] | None:
    """Return the line and the text of what keeps a module from being compiled, symbols included; None if nothing does."""
    try:
        symtable.symtable(text, "<code>", "exec")
    except SyntaxError as error:
        return error.lineno or 0, error.msg
    except (ValueError, RecursionError, MemoryError) as error:  # a NUL; too deep
        return 0, str(error) or "it nests too deeply"
    return None


def write(path: Path, data: bytes) -> None:
    """Replace what a file has, at once and with its mode. A link stays one, and what it leads to is replaced."""
    real = os.path.realpath(path)
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(real), prefix=".safedefer-")  # noqa: PTH120  # a text
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        shutil.copymode(real, temporary)
        with contextlib.suppress(PermissionError):  # the owner stays who ran the command
            os.chown(temporary, os.stat(real).st_uid, os.stat(real).st_gid)  # noqa: PTH116  # a text
        os.replace(temporary, real)  # noqa: PTH105  # a text
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)  # noqa: PTH108  # a text
        raise
