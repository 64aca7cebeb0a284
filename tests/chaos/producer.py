"""Defers numbered tasks, and notes every attempt before and every acknowledgement after."""

from __future__ import annotations

import argparse
import itertools
import threading
import time
import traceback

from safedefer import App
from safedefer.errors import QueueUnavailable, TaskAlreadyExistsError, TombstonedTaskError
from tests.chaos.tasks import mark, note, overrun


def produce(
    app: App,
    first: int,
    stop: int,
    *,
    threads: int = 4,
    per_second: float = 1e9,
    large_every: int = 50,
    slow_every: int = 10**9,
    later_every: int = 10**9,
    in_doubt: bool = False,
    once: bool = False,
    overrun_every: int = 10**9,
    outlast_every: int = 10**9,
) -> None:
    """Defer ``mark(n)`` for ``first <= n < stop``; every ``large_every``-th is oversize, every ``slow_every``-th slow, and
    every ``later_every``-th falls due some seconds later. Every ``overrun_every``-th is a coroutine that is cancelled at its
    deadline once, every ``outlast_every``-th a function that returns half a second after its own.

    With ``once`` each is tried once: there are no names, and whether a refused task was stored is not known.
    Where a refusal may be wrong (the connection broke, and whether the task was stored is not known), every second
    task has a name, under which it is deferred until it is known to be there; the others are tried once.
    """
    numbers = itertools.count(first)
    started = time.monotonic()

    def defer(number: int) -> None:
        padding = "x" * 20_000 if number % large_every == 0 else ""
        pause = 0.2 if number % slow_every == slow_every - 1 else 0.0
        options = {"countdown": 6.0} if number % later_every == later_every - 1 else {}
        if number % overrun_every == overrun_every - 1:
            app.options(deadline=1.0).defer(overrun, number)
        elif number % outlast_every == outlast_every - 2:
            app.options(deadline=1.0).defer(mark, number, 1.5)
        elif in_doubt and number % 2:
            try:
                app.options(name=f"n{number}", **options).defer(mark, number, pause, padding=padding)
            except (TaskAlreadyExistsError, TombstonedTaskError):
                if number not in refused:
                    raise
        else:
            app.options(**options).defer(mark, number, pause, padding=padding)

    refused: set[int] = set()

    def work() -> None:
        while (number := next(numbers)) < stop:
            time.sleep(max(0.0, started + (number - first) / per_second - time.monotonic()))
            while True:
                note("try", number)
                try:
                    defer(number)
                except QueueUnavailable:
                    refused.add(number)
                    note("refused", number)
                    time.sleep(0.1)
                    if once or (in_doubt and not number % 2):
                        break
                    continue
                except Exception:
                    traceback.print_exc()
                    note("failed", number)
                    break
                note("ack", number)
                break

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("first", type=int)
    parser.add_argument("stop", type=int)
    parser.add_argument("per_second", type=float)
    parser.add_argument("--slow-every", type=int, default=10**9)
    parser.add_argument("--later-every", type=int, default=10**9)
    parser.add_argument("--in-doubt", action="store_true")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--overrun-every", type=int, default=10**9)
    parser.add_argument("--outlast-every", type=int, default=10**9)
    chosen = parser.parse_args()
    own = App.from_settings()
    produce(
        own, chosen.first, chosen.stop,
        per_second=chosen.per_second, slow_every=chosen.slow_every, later_every=chosen.later_every,
        in_doubt=chosen.in_doubt, once=chosen.once, overrun_every=chosen.overrun_every, outlast_every=chosen.outlast_every,
    )  # fmt: skip
    own.close()
