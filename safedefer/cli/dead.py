"""``safedefer dead``: lists, shows, re-runs, exports and deletes dead letters."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import chain, islice
from typing import Any, Final, TypeVar

import click

from safedefer.cli import retrying
from safedefer.cli.common import MOST_LISTED, Seconds, app_option, check_filter, json_text, load_app_to_look, summary
from safedefer.cli.options import (
    TEXT,
    Patterns,
    confirm,
    dead_pages,
    dry_run_option,
    json_option,
    pattern_options,
    yes_option,
)
from safedefer.cli.show import document, lines, wants_text
from safedefer.cli.terminal import Column, progress, show_table
from safedefer.cli.text import many, plain, relative, time_text
from safedefer.errors import Error
from safedefer.queues.base import DeadFilter, TaskState

_F = TypeVar("_F", bound=Callable[..., Any])

_COLUMNS: Final = (
    Column("ID", whole=True),
    Column("DIED", whole=True),
    Column("QUEUE", whole=True),
    Column("TRIES", right=True, whole=True),
    Column("CALLABLE"),
)


@click.group()
def dead() -> None:
    """Look at dead letters, run them again, export and delete them."""


def _filters(command: _F) -> _F:
    options = (
        click.option("--queue", default=None, type=TEXT, help="Only of this queue."),
        click.option("--reason", default=None, type=TEXT, help="Only those that died of this, such as retry-limit."),
        pattern_options,
        click.option("--days", default=None, type=Seconds(), help="Only older than this many days."),
        click.option("--archived", is_flag=True, help="The archived ones instead."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _where(
    *,
    queue: str | None,
    reason: str | None,
    name: str | None,
    callable_name: str | None,
    days: float | None,
    archived: bool,
) -> tuple[DeadFilter, Patterns]:
    patterns = Patterns(name, callable_name)
    before = None if days is None else time.time() - days * 86_400
    exact = patterns.exact_callable
    return DeadFilter(queue=queue, reason=reason, callable_name=exact, before=before, archived=archived), patterns


@dead.command("list")
@app_option
@_filters
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, MOST_LISTED), help="How many at most.")
@json_option
def dead_list(*, app: str | None, limit: int, as_json: bool, **given: Any) -> None:
    """List dead letters, oldest first."""
    loaded = load_app_to_look(app)
    check_filter(loaded, given["queue"])
    pages = dead_pages(loaded.queue, *_where(**given))
    found = islice(chain.from_iterable(pages), limit)
    if as_json:
        for view in found:
            click.echo(json_text(summary(view)))
        return
    # Of each only what is shown is kept: it may have megabytes.
    views = [replace(view, token=b"", records=(), headers={}, retry_options={}) for view in found]
    now, reasons = time.time(), Counter(view.reason or "" for view in views)
    totals = f"{many(len(views), 'dead letter')}: {', '.join(f'{count} {reason}' for reason, count in reasons.most_common(5))}"
    if len(views) == limit:
        totals += "; the oldest, --limit shows more"
    rows = [
        (view.id, relative(view.ended, now), view.queue, view.attempts, f"{view.callable_name}  {view.reason or ''}")
        for view in views
    ]
    if views and show_table(_COLUMNS, rows, totals):
        return
    for view in views:
        columns = (
            view.id,
            view.queue,
            time_text(view.ended or 0.0),
            many(view.attempts, "attempt"),
            view.callable_name,
        )
        click.echo("  ".join(plain(column) for column in (*columns, view.reason or "")).rstrip())
    if not views:
        click.echo("no dead letters")


@dead.command("show")
@app_option
@click.argument("task_id", type=TEXT)
@click.option("--json", "as_json", is_flag=True, help="As JSON; so it is shown where the output is no terminal.")
@click.option("--text", "as_text", is_flag=True, help="As text; so it is shown on a terminal.")
def dead_show(*, app: str | None, task_id: str, as_json: bool, as_text: bool) -> None:
    """Show one dead letter: its reason, its arguments, its attempts with their tracebacks."""
    loaded = load_app_to_look(app)
    view = loaded.queue.find(task_id)
    if view is None or view.state is not TaskState.DEAD:
        raise click.ClickException(f"there is no dead letter {plain(task_id)}; see `safedefer dead list`")
    if wants_text(as_json=as_json, as_text=as_text):
        for line in lines(loaded, view):
            click.echo(line)
    else:
        click.echo(json_text(document(view, dead=True), indent=2))


@dead.command("retry")
@app_option
@click.argument("task_ids", nargs=-1, type=TEXT)
@_filters
@click.option("--all", "every", is_flag=True, help="All that the filters mean, instead of ids.")
@click.option("--to-queue", default=None, type=TEXT, help="Run them in this queue.")
@click.option("--in", "seconds", default=None, type=Seconds(), help="Run it so many seconds from now.")
@dry_run_option
@yes_option
def dead_retry(
    *,
    app: str | None,
    task_ids: tuple[str, ...],
    every: bool,
    to_queue: str | None,
    seconds: float | None,
    dry_run: bool,
    yes: bool,
    **given: Any,
) -> None:
    """Run dead letters again, as new tasks that are signed anew."""
    where, patterns = _where(**given)
    every = every or (bool(patterns) and not task_ids)
    if every == bool(task_ids) or (every and seconds is not None) or (task_ids and dry_run):
        raise click.UsageError("name tasks, with --in if you like, or say --all, with filters if you like")
    loaded = load_app_to_look(app)
    check_filter(loaded, where.queue)
    if every:
        retrying.retry_matching(loaded, where, patterns, to_queue=to_queue, dry_run=dry_run, yes=yes)
        return
    refused: dict[str, Error] = {}
    for task_id in task_ids:
        eta = None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)
        try:
            task = loaded.retry(task_id, queue=to_queue, eta=eta)
        except retrying.REFUSALS as error:
            refused[task_id] = error
            continue
        if task is None:
            raise click.ClickException(f"there is no dead letter {plain(task_id)}; see `safedefer dead list`")
        click.echo(f"{plain(task_id)} runs again as {task.id}")
    retrying.say_refused(refused)


@dead.command("purge")
@app_option
@_filters
@click.option("--dry-run", is_flag=True, help="Say how many; change nothing.")
@yes_option
def dead_purge(*, app: str | None, dry_run: bool, yes: bool, **given: Any) -> None:
    """Delete dead letters for good; export them first."""
    loaded = load_app_to_look(app)
    where, patterns = _where(**given)
    check_filter(loaded, where.queue)
    count = None
    if dry_run or not yes:
        count = sum(len(page) for page in dead_pages(loaded.queue, where, patterns))
        if dry_run:
            click.echo(f"{many(count, 'dead letter')} would be deleted")
            return
        confirm(f"Delete {many(count, 'dead letter')} for good?", yes=yes)
    dropped = 0
    with progress("deleting", count) as advance:
        # A page is a transaction. Each may have 2 MiB and its records; one that somebody else wrote may be shown, and not go.
        for page in dead_pages(loaded.queue, where, patterns):
            dropped += loaded.queue.drop_dead([view.id for view in page])
            for _ in page:
                advance()
    click.echo(f"deleted {many(dropped, 'dead letter')}")


@dead.command("export")
@app_option
@_filters
def dead_export(*, app: str | None, **given: Any) -> None:
    """Print dead letters as JSON, one a line, with attempts and tokens: whoever has them can read the arguments."""
    loaded = load_app_to_look(app)
    check_filter(loaded, given["queue"])
    pages = dead_pages(loaded.queue, *_where(**given))
    with progress("exporting", None) as advance:
        for view in chain.from_iterable(pages):
            click.echo(json_text(document(view, dead=True)))
            advance()
