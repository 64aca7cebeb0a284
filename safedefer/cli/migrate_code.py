"""``safedefer migrate-code``: rewrite code of App Engine's deferred, RQ and Celery, and report what will be refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import click

from safedefer.cli.terminal import is_terminal
from safedefer.cli.text import many, plain
from safedefer.migrate import code
from safedefer.migrate.notes import FileReport, Level


@click.command("migrate-code")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=click.Path())
@click.option(
    "--diff/--write", "diff", default=True, help="Show what would change, and write nothing (the default); or write."
)
@click.option("--json", "json_", is_flag=True, help="As one JSON object, diffs included.")
def migrate_code(*, paths: Sequence[str], diff: bool, json_: bool) -> None:
    """Rewrite code that uses App Engine's deferred, RQ or Celery, and say what a person must look at.

    PATH is a file or a folder; give all of a program at once. Nothing of it is imported or runs. A file that does not parse is
    reported, and the others go on. A second run changes nothing.

    Exit status 0 if nothing is left to do, 1 if something of the report will be refused, is to be rewritten by hand, or could
    not be read; 2 for a wrong command line. Notes alone are 0.
    """
    reports = code.migrate_code(paths, write_files=not diff)
    if json_:
        click.echo(json.dumps(code.as_json(reports)))
    else:
        _show(reports, diff=diff)
    if any(note.level is not Level.NOTE for report in reports for note in report.notes):
        sys.exit(1)


def _show(reports: Sequence[FileReport], *, diff: bool) -> None:
    terminal = is_terminal(sys.stdout)
    for report in reports if diff else ():
        click.echo(_harmless(report.diff) if terminal else report.diff, nl=False)
    for report in reports:
        for note in report.notes:
            place = f"{report.path}:{note.line}:{note.column}" if note.line else report.path
            click.echo(plain(f"{place}: {note.level} {note.code}: {note.text}"))
    counts = code.totals(reports)
    done = "rewritten" if not diff else "would be rewritten; --write writes them"
    click.echo(
        f"{many(counts['changed'], 'file')} {done} ({many(counts['rewrites'], 'place')}); {counts['refused']} refused, "
        f"{counts['by-hand']} by hand, {many(counts['note'], 'note')}, {many(counts['error'], 'error')}"
    )


def _harmless(diff: str) -> str:
    return "\n".join("\t".join(map(plain, line.rstrip("\r").split("\t"))) for line in diff.split("\n"))
