"""``safedefer top``: what each queue does now, live on a terminal."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import click

from safedefer.app import App
from safedefer.cli.common import Seconds, app_option, json_text, load_app, load_app_to_look, missing_file
from safedefer.cli.terminal import Column, for_people, keep_showing
from safedefer.cli.text import plain, span
from safedefer.errors import QueueUnavailable
from safedefer.queues.addresses import full_place
from safedefer.queues.base import PullQueue, QueueStats, TaskState

_COLUMNS: Final = (
    Column("QUEUE"),
    Column("WAITING", right=True),
    Column("RUNNING", right=True),
    Column("DEAD", right=True),
    Column("LAG", right=True, whole=True),
    Column("DONE/S", right=True),
    Column("DIED", right=True),
)
#: Queues that are shown; those with the most to do come first.
_MOST: Final = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What a queue does."""

    queue: str
    waiting: int
    running: int
    dead: int
    lag: float
    """Seconds by which the oldest task that waits is late."""
    done_per_second: float
    """Tasks that succeeded or were cancelled since the look before, in a second."""
    died: int
    """Dead letters more than at the look before."""


class Looks:
    """Consecutive looks at a store.

    Args:
        queue: The store.
    """

    def __init__(self, queue: PullQueue) -> None:
        self._queue = queue
        self._at: float | None = None
        self._dead: dict[str, int] = {}

    def look(self, now: float) -> list[Activity]:
        """Return what each queue does, the busiest first. The first look knows no rates, and says 0."""
        stats = {each.queue: each for each in self._queue.stats(now=now)}
        seconds = max(now - (now if self._at is None else self._at), 0.001)
        ended = Counter[str]()
        if self._at is not None:
            for count in self._queue.ends(since=self._at, step=seconds + 1.0):
                if count.state is not TaskState.DEAD:
                    ended[count.queue] += count.number
        found = []
        for name in {*stats, *ended}:
            one = stats.get(name, QueueStats(queue=name, waiting=0, running=0, dead=0, oldest=None))
            before = one.dead if self._at is None else self._dead.get(name, 0)
            found.append(
                Activity(
                    queue=name,
                    waiting=one.waiting,
                    running=one.running,
                    dead=one.dead,
                    lag=0.0 if one.oldest is None else max(now - one.oldest, 0.0),
                    done_per_second=ended.get(name, 0) / seconds,
                    died=max(one.dead - before, 0),
                )
            )
        self._at, self._dead = now, {name: one.dead for name, one in stats.items()}
        return sorted(found, key=lambda each: (-each.running, -each.waiting, each.queue))


@click.command()
@app_option
@click.option("--every", default=2.0, show_default=True, type=Seconds(0.1), help="Seconds between two looks.")
@click.option(
    "--once", is_flag=True, help="Print the numbers of one interval and end, as where the output is no terminal."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line and queue, once.")
def top(*, app: str | None, every: float, once: bool, as_json: bool) -> None:
    """Show what each queue does now: waiting, running, dead, lag, and tasks a second. Ctrl-C ends it."""
    if not once and not as_json and for_people():
        _live(load_app(app), every)
        return
    looks = Looks(load_app_to_look(app).queue)
    looks.look(time.time())
    time.sleep(every)
    found = looks.look(time.time())
    for each in found:
        click.echo(json_text(asdict(each)) if as_json else _line(each))
    if not found and not as_json:
        click.echo("no tasks")


def _live(app: App, every: float) -> None:
    looks = Looks(app.queue)

    def draw() -> tuple[Sequence[Column], list[tuple[Any, ...]], str]:
        missing = missing_file(app)
        if missing is not None:  # it is shown as soon as it is there, and a look would make it
            return (
                _COLUMNS,
                [],
                (
                    f"{missing} does not exist yet: no process has used it, or they use another one; compare the path that "
                    "`safedefer run` says when it starts"
                ),
            )
        try:
            found = looks.look(time.time())
        except QueueUnavailable as error:
            return _COLUMNS, [], f"{full_place(app.queue, app.queue_place)}: {error}"
        rows = [_row(each) for each in found[:_MOST]]
        more = f", {len(found) - _MOST} queues more" if len(found) > _MOST else ""
        done = sum(each.done_per_second for each in found)
        totals = (
            f"{sum(each.waiting for each in found)} waiting, {sum(each.running for each in found)} running, "
            f"{sum(each.dead for each in found)} dead, {done:.1f} done a second{more}; every {every:g} s, Ctrl-C ends"
        )
        return _COLUMNS, rows, f"{full_place(app.queue, app.queue_place)}: {totals}"

    def wait() -> bool:
        time.sleep(every)
        return True

    try:
        keep_showing(draw, wait)
    except KeyboardInterrupt:
        sys.exit(0)


def _row(each: Activity) -> tuple[object, ...]:
    return each.queue, each.waiting, each.running, each.dead, span(each.lag), f"{each.done_per_second:.1f}", each.died


def _line(each: Activity) -> str:
    return (
        f"{plain(each.queue)}  {each.waiting} waiting  {each.running} running  {each.dead} dead  "
        f"lag {each.lag:.1f} s  {each.done_per_second:.1f} done a second  {each.died} died"
    )
