"""Dead letters that are run again together: counted first, then one by one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import click

from safedefer.app import App
from safedefer.cli.options import Patterns, confirm, dead_pages
from safedefer.cli.terminal import for_people, progress
from safedefer.cli.text import many, plain
from safedefer.errors import DeferError, Error, RejectedTask
from safedefer.queues.base import BlobsFull, DeadFilter

#: What keeps one letter from running again, and no other.
REFUSALS = RejectedTask, DeferError, BlobsFull


def retry_matching(
    app: App, where: DeadFilter, patterns: Patterns, *, to_queue: str | None, dry_run: bool, yes: bool
) -> None:
    """Run all that are meant again. A person is told how many there are, and asked.

    Raises:
        click.ClickException: Some may not run again.
    """
    if to_queue is not None:
        app.check_queue(to_queue)
    # Those that die again meanwhile are left for the next call.
    started = time.time()
    where = replace(where, before=min(started, started if where.before is None else where.before))
    if dry_run:
        click.echo(f"{many(_count(app, where, patterns, show=True), 'dead letter')} would run again")
        return
    count = _count(app, where, patterns, show=False) if for_people() and not yes else None
    if count:
        confirm(f"Run {many(count, 'dead letter')} again?", yes=yes)
    again, refused = 0, dict[str, Error]()
    with progress("running again", count) as advance:
        for page in dead_pages(app.queue, where, patterns):
            for view in page:
                try:
                    again += app.retry(view.id, queue=to_queue) is not None
                except REFUSALS as error:
                    refused[view.id] = error
                advance()
    click.echo(f"{again} run again")
    say_refused(refused)


def _count(app: App, where: DeadFilter, patterns: Patterns, *, show: bool) -> int:
    count = 0
    for page in dead_pages(app.queue, where, patterns):
        count += len(page)
        for view in page if show else ():
            columns = view.id, view.queue, view.callable_name, view.reason or ""
            click.echo("  ".join(map(plain, columns)).rstrip())
    return count


def say_refused(refused: Mapping[str, Error]) -> None:
    """Say why letters stay.

    Raises:
        click.ClickException: There are some.
    """
    for task_id, rejection in refused.items():
        click.echo(f"{plain(task_id)} stays: {rejection.slug}: {plain(rejection)}", err=True)
    if refused:
        raise click.ClickException(
            f"{len(refused)} may not run again now; correct keys, policy or environment, or defer the tasks anew and purge them"
        )
