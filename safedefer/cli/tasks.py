"""``safedefer tasks``: lists, shows, cancels and re-runs tasks."""

from __future__ import annotations

from collections.abc import Sequence

import click

from safedefer.cli.common import MOST_LISTED, app_option, json_text, load_app_to_look, plain, summary, time_text
from safedefer.queues.base import TaskState


@click.group()
def tasks() -> None:
    """Look at tasks, cancel them, re-run dead letters."""


@tasks.command("list")
@app_option
@click.option(
    "--state", "states", multiple=True, type=click.Choice([str(state) for state in TaskState]), help="Repeatable."
)
@click.option("--queue", default=None, help="Only this queue.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, MOST_LISTED), help="How many at most.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def tasks_list(*, app: str | None, states: Sequence[str], queue: str | None, limit: int, as_json: bool) -> None:
    """List waiting, running and dead tasks, newest first."""
    found = load_app_to_look(app).queue.tasks(states=[TaskState(state) for state in states], queue=queue, limit=limit)
    for view in found:
        if as_json:
            click.echo(json_text(summary(view)))
        else:
            columns = (
                view.id,
                view.state,
                view.queue,
                time_text(view.eta),
                f"{view.attempts} attempts",
                view.callable_name,
            )
            click.echo("  ".join(plain(column) for column in (*columns, view.reason or "")).rstrip())
    if not found and not as_json:
        click.echo("no tasks")


@tasks.command("show")
@app_option
@click.argument("task_id")
def tasks_show(*, app: str | None, task_id: str) -> None:
    """Show one task with its attempts, as JSON."""
    view = load_app_to_look(app).queue.find(task_id)
    if view is None:
        raise click.ClickException(f"there is no task {plain(task_id)}; `safedefer tasks list` shows those there are")
    document = {**summary(view), "headers": dict(view.headers), "attempts": [r._asdict() for r in view.records]}
    click.echo(json_text(document, indent=2))


@tasks.command("cancel")
@app_option
@click.argument("task_id")
def tasks_cancel(*, app: str | None, task_id: str) -> None:
    """End a waiting task unrun, or stop one that runs."""
    if not load_app_to_look(app).cancel(task_id):
        raise click.ClickException(f"no task {plain(task_id)} waits or runs; it has ended, or never was")
    click.echo(f"cancelled {plain(task_id)}")


@tasks.command("retry")
@app_option
@click.argument("task_id")
def tasks_retry(*, app: str | None, task_id: str) -> None:
    """Re-run a dead letter as a new task."""
    task = load_app_to_look(app).retry(task_id)
    if task is None:
        raise click.ClickException(f"there is no dead letter {plain(task_id)}; see `safedefer tasks list --state dead`")
    click.echo(f"{plain(task_id)} runs again as {task.id}")
