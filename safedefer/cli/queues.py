"""``safedefer queues``: lists and counts queues, pauses, resumes and purges them, and puts queue.yaml in force."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import click

from safedefer.app import App
from safedefer.cli.common import app_option, json_text, load_app, load_app_to_look
from safedefer.cli.options import TEXT, confirm, json_option, yes_option
from safedefer.cli.terminal import Column, show_table
from safedefer.cli.text import many, plain, relative, span, time_text
from safedefer.queues.rates import QueueControl

_queue_argument: Final = click.argument("queue", type=TEXT)

_LISTED: Final = (
    Column("QUEUE"),
    Column("RATE", right=True, whole=True),
    Column("BUCKET", right=True),
    Column("AT ONCE", right=True),
    Column("STATE"),
)
_COUNTED: Final = (
    Column("QUEUE"),
    Column("WAITING", right=True),
    Column("RUNNING", right=True),
    Column("DEAD", right=True),
    Column("LAG", right=True, whole=True),
)


@click.group()
def queues() -> None:
    """Look at queues, pause, resume and purge them. Takes effect at once, in every dispatcher."""


@dataclass(frozen=True, slots=True)
class _Listed:
    """A queue, and the limits in force."""

    name: str
    control: QueueControl | None
    now: float

    @property
    def is_paused(self) -> bool:
        return self.control is not None and (self.control.paused or self.control.limits.rate == 0)

    @property
    def held_until(self) -> float | None:
        return self.control.held_until if self.control is not None and self.control.held_until > self.now else None

    def document(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        limits = None if self.control is None else self.control.limits
        return {
            "queue": self.name,
            "rate": None if limits is None else limits.rate,
            "bucket_size": None if limits is None or limits.rate is None else limits.bucket_size,
            "max_concurrent": None if limits is None else limits.max_concurrent,
            "paused": self.is_paused,
            "held_until": None if self.held_until is None else time_text(self.held_until),
        }

    def row(self) -> tuple[object, ...]:
        """Return the row of the table."""
        limits = None if self.control is None else self.control.limits
        state = "paused" if self.is_paused else ""
        if self.held_until is not None:
            state = f"{state} held, goes on {relative(self.held_until, self.now)}".strip()
        if limits is None:
            return self.name, "no limit", "", "", state
        rated = limits.rate is not None
        rate, bucket = (f"{limits.rate:g}/s", limits.bucket_size) if rated else ("no limit", "")
        return self.name, rate, bucket, "" if limits.max_concurrent is None else limits.max_concurrent, state

    def line(self) -> str:
        """Return the plain line."""
        words = [plain(self.name)]
        if self.control is None:
            words.append("no limits in force")
        else:
            limits = self.control.limits
            words.append("no rate" if limits.rate is None else f"rate {limits.rate:g}/s, bucket {limits.bucket_size}")
            words += [] if limits.max_concurrent is None else [f"at most {limits.max_concurrent} at once"]
            words += ["paused"] if self.is_paused else []
            words += [] if self.held_until is None else [f"held until {time_text(self.held_until)}"]
        return "  ".join(words)


def _listed(app: App) -> Iterator[_Listed]:
    now = time.time()
    controls = {control.queue: control for control in app.queue.controls(now=now)}
    declared = {section.name for section in app.queue_file.queue} if app.queue_file else set()
    counted = {stats.queue for stats in app.queue.stats(now=now)}
    for name in sorted({"default", *declared, *controls, *counted, *(app.queues or ())}):
        yield _Listed(name, controls.get(name), now)


@queues.command("list")
@app_option
@json_option
def queues_list(*, app: str | None, as_json: bool) -> None:
    """List the queues that are declared, limited or have tasks."""
    found = [*_listed(load_app_to_look(app))]
    if as_json:
        for each in found:
            click.echo(json_text(each.document()))
        return
    totals = f"{many(len(found), 'queue')}, {sum(each.is_paused for each in found)} paused"
    if not show_table(_LISTED, [each.row() for each in found], totals):
        for each in found:
            click.echo(each.line())


@queues.command("stats")
@app_option
@json_option
def queues_stats(*, app: str | None, as_json: bool) -> None:
    """Count the tasks of every queue."""
    now = time.time()
    found = load_app_to_look(app).queue.stats(now=now)
    if as_json:
        for stats in found:
            click.echo(json_text(asdict(stats)))
        return
    late = {stats.queue: 0.0 if stats.oldest is None else max(now - stats.oldest, 0.0) for stats in found}
    rows = [(one.queue, one.waiting, one.running, one.dead, span(late[one.queue])) for one in found]
    totals = (
        f"{sum(one.waiting for one in found)} waiting, {sum(one.running for one in found)} running, "
        f"{sum(one.dead for one in found)} dead in {many(len(found), 'queue')}"
    )
    if found and show_table(_COUNTED, rows, totals):
        return
    for stats in found:
        click.echo(
            f"{plain(stats.queue)}  {stats.waiting} waiting  {stats.running} running  {stats.dead} dead  "
            f"the oldest is due for {late[stats.queue]:.1f} s"
        )
    if not found:
        click.echo("no tasks")


@queues.command("pause")
@app_option
@_queue_argument
def queues_pause(*, app: str | None, queue: str) -> None:
    """Deliver nothing of QUEUE until it is resumed; what runs goes on."""
    _pause(load_app(app), queue, paused=True)
    click.echo(f"{plain(queue)} is paused")


@queues.command("resume")
@app_option
@_queue_argument
def queues_resume(*, app: str | None, queue: str) -> None:
    """End a pause."""
    _pause(load_app(app), queue, paused=False)
    click.echo(f"{plain(queue)} goes on")


def _pause(app: App, queue: str, *, paused: bool) -> None:
    app.check_queue(queue)
    app.queue.pause(queue, paused=paused, now=time.time())


@queues.command("purge")
@app_option
@_queue_argument
@click.option("--dry-run", is_flag=True, help="Say how many; change nothing.")
@yes_option
def queues_purge(*, app: str | None, queue: str, dry_run: bool, yes: bool) -> None:
    """Cancel what waits in QUEUE; what runs goes on."""
    loaded = load_app_to_look(app)
    loaded.check_queue(queue)
    if dry_run or not yes:
        count = sum(stats.waiting for stats in loaded.queue.stats(now=time.time()) if stats.queue == queue)
        if dry_run:
            click.echo(f"{many(count, 'task')} of {plain(queue)} would be cancelled")
            return
        confirm(f"Cancel {many(count, 'waiting task')} of {plain(queue)}?", yes=yes)
    click.echo(f"cancelled {many(loaded.queue.purge(queue, now=time.time()), 'task')} of {plain(queue)}")


@queues.command("update")
@app_option
def queues_update(*, app: str | None) -> None:
    """Put the limits of queue.yaml in force now; dispatchers do so when they start."""
    loaded = load_app(app)
    limits = () if loaded.queue_file is None else loaded.queue_file.limits
    loaded.queue.configure(limits, now=time.time())
    click.echo(f"{len(limits)} queues have limits")
