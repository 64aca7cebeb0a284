"""``safedefer migrate-code``: reads files, decides, rewrites and reports."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from safedefer.migrate import app_engine_code, celery_code, rq_code
from safedefer.migrate.edits import Places
from safedefer.migrate.files import FoundFile, Unreadable, find_files, read, syntax_problem, write
from safedefer.migrate.names import Names
from safedefer.migrate.notes import FileReport, Level
from safedefer.migrate.project import CodeFile, Project

_LIBRARIES: Final = ("celery", "rq", "app_engine")


def migrate_code(paths: Sequence[str], *, write_files: bool) -> list[FileReport]:
    """Rewrite what can be, and report what a person must look at.

    Args:
        paths: Files, and folders whose files of Python are taken.
        write_files: Whether the files are written; else the reports have diffs alone.

    Returns:
        A report for each file that has one, or was rewritten.

    Raises:
        MissingExtra: libcst is not installed.
    """
    import safedefer.migrate.edit as _edit  # noqa: F401, PLC0415  # before anything is written: libcst may be missing

    reports: list[FileReport] = []
    files: list[CodeFile] = []
    for found in find_files(tuple(paths)):
        report = FileReport(str(found.path))
        reports.append(report)
        file = _parsed(found, report)
        if file is not None:
            files.append(file)
    project = Project(files)
    rq_code.collect(project)
    celery_code.collect(project)
    for file in files:
        app_engine_code.visit(project, file)
        rq_code.visit(project, file)
        celery_code.visit(project, file)
    # Only now: what one file says may change another.
    for file in files:
        _rewrite(file, write_file=write_files)
    for report in reports:
        report.notes.sort()
    return [report for report in reports if report.notes or report.changed]


def _parsed(found: FoundFile, report: FileReport) -> CodeFile | None:
    if found.problem:
        report.add(0, 0, Level.ERROR, "path", found.problem)
        return None
    try:
        data, text = read(found.path)
        # As `ast` and libcst count: the mark at the beginning is no character of the first line.
        text = text.removeprefix("\ufeff")
        return CodeFile(report, data, Names(found.module, ast.parse(text), found.is_package), Places(text))
    except Unreadable as error:
        report.add(error.line, 0, Level.ERROR, error.code, str(error))
    except RecursionError:
        report.add(0, 0, Level.ERROR, "syntax", "it nests too deeply; rewrite it by hand")
    return None


def _rewrite(file: CodeFile, *, write_file: bool) -> None:
    """Carry the edits of a file out. It stays as it is if they cannot be, or the outcome would not compile."""
    from safedefer.migrate.edit import Unapplied, rewrite  # noqa: PLC0415  # libcst, imported when used

    edits, report = file.edits, file.report
    if not (edits.calls or edits.names or edits.decorators or edits.statements):
        return
    try:
        data, count = rewrite(file.data, edits)
        text = data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else _encoding(file.data))
        problem = syntax_problem(text)
    except Unapplied as error:
        report.add(0, 0, Level.ERROR, "unapplied", f"it cannot be rewritten: {error}; do it by hand")
        return
    except Exception as error:  # noqa: BLE001  # libcst refuses a file that Python takes: the others go on
        report.add(0, 0, Level.ERROR, "unapplied", f"libcst cannot rewrite it ({type(error).__name__}); do it by hand")
        return
    if problem is not None:
        report.add(0, 0, Level.ERROR, "unapplied", f"rewritten it would not compile ({problem[1]}); do it by hand")
        return
    if data == file.data:
        return
    report.changed = True
    report.rewrites = count
    report.diff = "".join(_diff(file.data, data, report.path))
    if write_file:
        try:
            write(Path(report.path), data)
            report.written = True
        except OSError as error:
            report.add(0, 0, Level.ERROR, "unwritable", f"it cannot be written: {error.strerror}")


def _encoding(data: bytes) -> str:
    import io  # noqa: PLC0415  # with tokenize, for a file that was rewritten
    import tokenize  # noqa: PLC0415

    return tokenize.detect_encoding(io.BytesIO(data).readline)[0]


def _diff(old: bytes, new: bytes, path: str) -> Iterator[str]:
    """Give a unified diff that ``patch`` takes; line ends are those of the file."""
    encoding = _encoding(old)
    before, after = (_kept_lines(each.decode(encoding)) for each in (old, new))
    for line in difflib.unified_diff(before, after, f"a/{path.lstrip('/')}", f"b/{path.lstrip('/')}"):
        yield line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"


def _kept_lines(text: str) -> list[str]:
    return re.findall(r"[^\n]*\n|[^\n]+\Z", text)


def as_json(reports: Sequence[FileReport]) -> dict[str, Any]:
    """Return the reports as one JSON object."""
    return {
        "files": [
            {
                "path": each.path,
                "changed": each.changed,
                "written": each.written,
                "rewrites": each.rewrites,
                "diff": each.diff,
                "notes": [
                    {"line": n.line, "column": n.column, "level": str(n.level), "code": n.code, "text": n.text}
                    for n in each.notes
                ],
            }
            for each in reports
        ],
        "totals": totals(reports),
    }


def totals(reports: Sequence[FileReport]) -> dict[str, int]:
    """Return how many files, rewrites and notes of each level there are."""
    counts = {"files": len(reports), "changed": 0, "written": 0, "rewrites": 0, **{str(level): 0 for level in Level}}
    for each in reports:
        counts["changed"] += each.changed
        counts["written"] += each.written
        counts["rewrites"] += each.rewrites
        for note in each.notes:
            counts[str(note.level)] += 1
    return counts
