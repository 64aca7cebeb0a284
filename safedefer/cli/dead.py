"""``safedefer dead``: lists, shows, re-runs, exports and deletes dead letters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

import click

from safedefer.app import App
from safedefer.cli.common import (
    MOST_LISTED,
    Seconds,
    app_option,
    json_text,
    load_app_to_look,
    plain,
    summary,
    time_text,
)
from safedefer.errors import DeferError, Error, RejectedTask
from safedefer.queues.base import BlobsFull, DeadFilter, TaskState, TaskView

_F = TypeVar("_F", bound=Callable[..., Any])

_PURGED_AT_ONCE: Final = 50


@click.group()
def dead() -> None:
    """Look at dead letters, run them again, export and delete them."""


def _filters(command: _F) -> _F:
    options = (
        click.option("--queue", default=None, help="Only of this queue."),
        click.option("--reason", default=None, help="Only those that died of this, such as retry-limit."),
        click.option("--callable", "callable_name", default=None, help="Only of this callable, module:name."),
        click.option("--days", default=None, type=Seconds(), help="Only older than this many days."),
        click.option("--archived", is_flag=True, help="The archived ones instead."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _where(
    *, queue: str | None, reason: str | None, callable_name: str | None, days: float | None, archived: bool
) -> DeadFilter:
    before = None if days is None else time.time() - days * 86_400
    return DeadFilter(queue=queue, reason=reason, callable_name=callable_name, before=before, archived=archived)


def _all(app: App, where: DeadFilter) -> Iterator[TaskView]:
    after: tuple[float, str] | None = None
    while page := app.queue.dead_letters(where, after=after):
        yield from page
        after = (page[-1].ended or 0.0, page[-1].id)


@dead.command("list")
@app_option
@_filters
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, MOST_LISTED), help="How many at most.")
def dead_list(*, app: str | None, limit: int, **given: Any) -> None:
    """List dead letters, oldest first."""
    found = load_app_to_look(app).queue.dead_letters(_where(**given), limit=limit)
    for view in found:
        columns = (view.id, view.queue, time_text(view.ended or 0.0), f"{view.attempts} attempts", view.callable_name)
        click.echo("  ".join(plain(column) for column in (*columns, view.reason or "")).rstrip())
    if not found:
        click.echo("no dead letters")


@dead.command("show")
@app_option
@click.argument("task_id")
def dead_show(*, app: str | None, task_id: str) -> None:
    """Show one dead letter: its reason, its attempts with their tracebacks, its token."""
    view = load_app_to_look(app).queue.find(task_id)
    if view is None or view.state is not TaskState.DEAD:
        raise click.ClickException(f"there is no dead letter {plain(task_id)}; see `safedefer dead list`")
    click.echo(json_text(_document(view), indent=2))


@dead.command("retry")
@app_option
@click.argument("task_ids", nargs=-1)
@_filters
@click.option("--all", "every", is_flag=True, help="All that the filters mean, instead of ids.")
@click.option("--to-queue", default=None, help="Run them in this queue.")
@click.option("--in", "seconds", default=None, type=Seconds(), help="Run it so many seconds from now.")
def dead_retry(
    *,
    app: str | None,
    task_ids: tuple[str, ...],
    every: bool,
    to_queue: str | None,
    seconds: float | None,
    **given: Any,
) -> None:
    """Run dead letters again, as new tasks that are signed anew."""
    loaded = load_app_to_look(app)
    if every == bool(task_ids) or (every and seconds is not None):
        raise click.UsageError("name tasks, with --in if you like, or say --all, with filters if you like")
    refused: dict[str, Error] = {}
    if every:
        tasks, refused = loaded.retry_all(_where(**given), queue=to_queue)
        click.echo(f"{len(tasks)} run again")
    for task_id in task_ids:
        eta = None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)
        try:
            task = loaded.retry(task_id, queue=to_queue, eta=eta)
        except (RejectedTask, DeferError, BlobsFull) as error:
            refused[task_id] = error
            continue
        if task is None:
            raise click.ClickException(f"there is no dead letter {plain(task_id)}; see `safedefer dead list`")
        click.echo(f"{plain(task_id)} runs again as {task.id}")
    for task_id, rejection in refused.items():
        click.echo(f"{plain(task_id)} stays: {rejection.slug}: {plain(rejection)}", err=True)
    if refused:
        raise click.ClickException(
            f"{len(refused)} may not run again now; correct keys or policy, or defer the tasks anew and purge them"
        )


@dead.command("purge")
@app_option
@_filters
@click.confirmation_option(prompt="Delete these dead letters for good?")
def dead_purge(*, app: str | None, **given: Any) -> None:
    """Delete dead letters for good; export them first."""
    loaded = load_app_to_look(app)
    where, dropped = _where(**given), 0
    after: tuple[float, str] | None = None
    # A page is a transaction. Each may have 2 MiB and its records; one that somebody else wrote may be shown, and not go.
    while page := loaded.queue.dead_letters(where, after=after, limit=_PURGED_AT_ONCE):
        dropped += loaded.queue.drop_dead([view.id for view in page])
        after = (page[-1].ended or 0.0, page[-1].id)
    click.echo(f"deleted {dropped} dead letters")


@dead.command("export")
@app_option
@_filters
def dead_export(*, app: str | None, **given: Any) -> None:
    """Print dead letters as JSON, one a line, with attempts and tokens: whoever has them can read the arguments."""
    for view in _all(load_app_to_look(app), _where(**given)):
        click.echo(json_text(_document(view)))


def _document(view: TaskView) -> dict[str, Any]:
    return {
        **summary(view),
        "headers": dict(view.headers),
        "retry_options": dict(view.retry_options),
        "attempts": [record._asdict() for record in view.records],
    }
