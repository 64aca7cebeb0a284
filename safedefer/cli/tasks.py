"""``safedefer tasks``: lists, shows, cancels and re-runs tasks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

import click

from safedefer.app import App
from safedefer.cli import retrying
from safedefer.cli.common import MOST_LISTED, app_option, check_filter, json_text, load_app_to_look, summary
from safedefer.cli.options import (
    TEXT,
    Patterns,
    confirm,
    dry_run_option,
    json_option,
    living,
    pattern_options,
    yes_option,
)
from safedefer.cli.show import document, lines, wants_text
from safedefer.cli.terminal import Column, progress, show_table
from safedefer.cli.text import many, plain, relative, time_text
from safedefer.queues.base import DeadFilter, TaskState, TaskView

_COLUMNS: Final = (
    Column("ID", whole=True),
    Column("STATE", whole=True),
    Column("QUEUE", whole=True),
    Column("TRIES", right=True, whole=True),
    Column("CALLABLE"),
)


@click.group()
def tasks() -> None:
    """Look at tasks, cancel them, re-run dead letters."""


@tasks.command("list")
@app_option
@click.option(
    "--state", "states", multiple=True, type=click.Choice([str(state) for state in TaskState]), help="Repeatable."
)
@click.option("--queue", default=None, type=TEXT, help="Only this queue.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, MOST_LISTED), help="How many at most.")
@json_option
def tasks_list(*, app: str | None, states: Sequence[str], queue: str | None, limit: int, as_json: bool) -> None:
    """List waiting, running and dead tasks, newest first."""
    loaded = load_app_to_look(app)
    check_filter(loaded, queue)
    found = loaded.queue.tasks(states=[TaskState(state) for state in states], queue=queue, limit=limit)
    if as_json:
        for view in found:
            click.echo(json_text(summary(view)))
        return
    now = time.time()
    rows = [
        (view.id, _state(view, now), view.queue, view.attempts, f"{view.callable_name}  {view.reason or ''}".rstrip())
        for view in found
    ]
    counted = Counter(str(view.state) for view in found)
    totals = f"{many(len(found), 'task')}: {', '.join(f'{count} {state}' for state, count in counted.items())}"
    if len(found) == limit:
        totals += "; the newest, --limit shows more"
    if found and show_table(_COLUMNS, rows, totals):
        return
    for view in found:
        columns = (
            view.id,
            view.state,
            view.queue,
            time_text(view.eta),
            many(view.attempts, "attempt"),
            view.callable_name,
        )
        click.echo("  ".join(plain(column) for column in (*columns, view.reason or "")).rstrip())
    if not found:
        click.echo("no tasks")


def _state(view: TaskView, now: float) -> str:
    if view.state is TaskState.WAITING and view.due is not None:
        return f"due {relative(view.due, now)}"
    return str(view.state) if view.ended is None else f"{view.state} {relative(view.ended, now)}"


@tasks.command("show")
@app_option
@click.argument("task_id", type=TEXT)
@click.option("--json", "as_json", is_flag=True, help="As JSON; so it is shown where the output is no terminal.")
@click.option("--text", "as_text", is_flag=True, help="As text; so it is shown on a terminal.")
def tasks_show(*, app: str | None, task_id: str, as_json: bool, as_text: bool) -> None:
    """Show one task with its arguments and attempts."""
    loaded = load_app_to_look(app)
    view = loaded.queue.find(task_id)
    if view is None:
        raise click.ClickException(f"there is no task {plain(task_id)}; `safedefer tasks list` shows those there are")
    if wants_text(as_json=as_json, as_text=as_text):
        for line in lines(loaded, view):
            click.echo(line)
    else:
        click.echo(json_text(document(view, dead=False), indent=2))


@tasks.command("cancel")
@app_option
@click.argument("task_ids", nargs=-1, type=TEXT)
@pattern_options
@click.option("--queue", default=None, type=TEXT, help="Only of this queue.")
@dry_run_option
@yes_option
def tasks_cancel(
    *,
    app: str | None,
    task_ids: Sequence[str],
    name: str | None,
    callable_name: str | None,
    queue: str | None,
    dry_run: bool,
    yes: bool,
) -> None:
    """End waiting tasks unrun, or stop those that run: by id, or by --name or --callable."""
    patterns = Patterns(name, callable_name)
    if bool(patterns) == bool(task_ids) or (task_ids and (queue is not None or dry_run)):
        raise click.UsageError("name tasks, or say --name or --callable, with --queue or --dry-run if you like")
    loaded = load_app_to_look(app)
    check_filter(loaded, queue)
    if patterns:
        _cancel_matching(loaded, patterns, queue, dry_run=dry_run, yes=yes)
    for task_id in task_ids:
        if not loaded.cancel(task_id):
            raise click.ClickException(f"no task {plain(task_id)} waits or runs; it has ended, or never was")
        click.echo(f"cancelled {plain(task_id)}")


def _cancel_matching(app: App, patterns: Patterns, queue: str | None, *, dry_run: bool, yes: bool) -> None:
    counted: Counter[str] = Counter()
    for view in living(app.queue, patterns, of_queue=queue):
        counted[view.state] += 1
        if dry_run:
            click.echo("  ".join(map(plain, (view.id, view.state, view.queue, view.callable_name))).rstrip())
    count = counted.total()
    said = f"{many(count, 'task')} ({counted[TaskState.WAITING]} waiting, {counted[TaskState.RUNNING]} running)"
    if dry_run or not count:
        click.echo(f"{said} would be cancelled")
        return
    confirm(f"Cancel {said}?", yes=yes)
    cancelled = 0
    with progress("cancelling", count) as advance:
        for view in living(app.queue, patterns, of_queue=queue):
            cancelled += app.cancel(view.id)
            advance()
    click.echo(f"cancelled {many(cancelled, 'task')}")


@tasks.command("retry")
@app_option
@click.argument("task_ids", nargs=-1, type=TEXT)
@pattern_options
@dry_run_option
@yes_option
def tasks_retry(
    *, app: str | None, task_ids: Sequence[str], name: str | None, callable_name: str | None, dry_run: bool, yes: bool
) -> None:
    """Re-run dead letters as new tasks: by id, or by --name or --callable. `safedefer dead retry` has more filters."""
    patterns = Patterns(name, callable_name)
    if bool(patterns) == bool(task_ids) or (task_ids and dry_run):
        raise click.UsageError("name tasks, or say --name or --callable, with --dry-run if you like")
    loaded = load_app_to_look(app)
    if patterns:
        where = DeadFilter(callable_name=patterns.exact_callable)
        retrying.retry_matching(loaded, where, patterns, to_queue=None, dry_run=dry_run, yes=yes)
    for task_id in task_ids:
        task = loaded.retry(task_id)
        if task is None:
            raise click.ClickException(
                f"there is no dead letter {plain(task_id)}; see `safedefer tasks list --state dead`"
            )
        click.echo(f"{plain(task_id)} runs again as {task.id}")
