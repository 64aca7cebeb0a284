"""Scenarios of Cloud Tasks: the handler's server, or the emulator that stands for Google's service, dies in the middle of tasks."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safedefer import App
from safedefer.queues.base import DeadFilter
from safedefer.settings import Settings
from tests.cloudtasks.emulated import new_client, wait_for
from tests.cloudtasks.killed_tasks import lines, note
from tests.cloudtasks.test_killed import QUEUE, Place

_SECONDS = 300.0


def kills(tasks: int, rounds: int) -> str:
    """Kill the handler and the emulator in turns, each time while tasks run; say what became of all, and how fast they ran again."""
    with _placed() as (place, app):
        ran = place.path / "ran.txt"
        acknowledged = 0
        next_begin: dict[str, list[float]] = {"handler": [], "emulator": []}
        all_again: dict[str, list[float]] = {"handler": [], "emulator": []}
        for number in range(rounds):
            who = ("handler", "emulator")[number % 2]
            share = range(acknowledged, acknowledged + tasks // rounds)
            app.defer_many([(note, (str(ran), task), {}) for task in share], atomic=False)
            acknowledged = share.stop
            wait_for(lambda: _cut(ran), "a task that runs", _SECONDS)
            before = len(lines(ran))
            place.kill(who)
            killed = time.monotonic()
            cut = _cut(ran) if who == "handler" else set()
            place.start(who)
            wait_for(lambda before=before: _begun(ran, before), "another run", _SECONDS)
            next_begin[who].append(time.monotonic() - killed)
            if cut:
                wait_for(lambda cut=cut, before=before: cut <= _begun(ran, before), "the cut tasks", _SECONDS)
                all_again[who].append(time.monotonic() - killed)
        client = new_client(place.emulator_url)
        wait_for(lambda: not list(client.list_tasks(parent=QUEUE)), "the end of all tasks", _SECONDS)
        client.transport.close()
        ends = [line.split()[1] for line in lines(ran) if line.startswith("end ")]
        begins = [line.split()[1] for line in lines(ran) if line.startswith("begin ")]
        lost = {str(task) for task in range(acknowledged)} - set(ends)
        assert not lost, f"lost: {sorted(lost)}"
        dead = list(app.queue.dead_letters(DeadFilter()))
        assert not dead, f"dead letters: {dead}"
        return (
            f"{acknowledged} acknowledged, {rounds} kills: lost 0, dead 0, run again {len(begins) - len(set(begins))}, ended twice "
            f"{len(ends) - len(set(ends))}; next run after the handler's death {_times(next_begin['handler'])}, all that it cut "
            f"{_times(all_again['handler'])}; next run after the emulator's {_times(next_begin['emulator'])}"
        )


def _times(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return f"{ordered[len(ordered) // 2]:.1f} s ({ordered[0]:.1f} to {ordered[-1]:.1f})" if ordered else "-"


def _cut(path: Path) -> set[str]:
    """Return the tasks that began and did not end."""
    running: set[str] = set()
    for line in lines(path):
        what, task = line.split()
        (running.add if what == "begin" else running.discard)(task)
    return running


def _begun(path: Path, after: int) -> set[str]:
    return {line.split()[1] for line in lines(path)[after:] if line.startswith("begin ")}


@contextmanager
def _placed() -> Iterator[tuple[Place, App]]:
    """The two processes, and an App of this process that uses their queue."""
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        os.environ.update(place.settings)
        app = App.from_settings(Settings.load())
        try:
            place.start("emulator")
            place.start("handler")
            yield place, app
        finally:
            place.close()
            app.close()
