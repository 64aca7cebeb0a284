"""``safedefer queues``: lists and counts queues, pauses, resumes and purges them, and puts queue.yaml in force."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Final

import click

from safedefer.app import App
from safedefer.cli.common import app_option, json_text, load_app, load_app_to_look, plain, time_text

_queue_argument: Final = click.argument("queue")


@click.group()
def queues() -> None:
    """Look at queues, pause, resume and purge them. Takes effect at once, in every dispatcher."""


@queues.command("list")
@app_option
def queues_list(*, app: str | None) -> None:
    """List the queues that are declared, limited or have tasks."""
    loaded = load_app_to_look(app)
    now = time.time()
    controls = {control.queue: control for control in loaded.queue.controls(now=now)}
    declared = {section.name for section in loaded.queue_file.queue} if loaded.queue_file else set()
    counted = {stats.queue for stats in loaded.queue.stats(now=now)}
    for name in sorted({"default", *declared, *controls, *counted, *(loaded.queues or ())}):
        control = controls.get(name)
        words = [plain(name)]
        if control is None:
            words.append("no limits in force")
        else:
            limits = control.limits
            words.append("no rate" if limits.rate is None else f"rate {limits.rate:g}/s, bucket {limits.bucket_size}")
            words += [] if limits.max_concurrent is None else [f"at most {limits.max_concurrent} at once"]
            words += ["paused"] if control.paused or limits.rate == 0 else []
            words += [f"held until {time_text(control.held_until)}"] if control.held_until > now else []
        click.echo("  ".join(words))


@queues.command("stats")
@app_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def queues_stats(*, app: str | None, as_json: bool) -> None:
    """Count the tasks of every queue."""
    now = time.time()
    found = load_app_to_look(app).queue.stats(now=now)
    for stats in found:
        if as_json:
            click.echo(json_text(asdict(stats)))
        else:
            late = 0.0 if stats.oldest is None else max(now - stats.oldest, 0.0)
            click.echo(
                f"{plain(stats.queue)}  {stats.waiting} waiting  {stats.running} running  {stats.dead} dead  "
                f"the oldest is due for {late:.1f} s"
            )
    if not found and not as_json:
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
@click.confirmation_option(prompt="Cancel every waiting task of the queue?")
def queues_purge(*, app: str | None, queue: str) -> None:
    """Cancel what waits in QUEUE; what runs goes on."""
    loaded = load_app_to_look(app)
    loaded.check_queue(queue)
    click.echo(f"cancelled {loaded.queue.purge(queue, now=time.time())} tasks of {plain(queue)}")


@queues.command("update")
@app_option
def queues_update(*, app: str | None) -> None:
    """Put the limits of queue.yaml in force now; dispatchers do so when they start."""
    loaded = load_app(app)
    limits = () if loaded.queue_file is None else loaded.queue_file.limits
    loaded.queue.configure(limits, now=time.time())
    click.echo(f"{len(limits)} queues have limits")
