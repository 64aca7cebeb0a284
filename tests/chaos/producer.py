"""Defers numbered tasks, and notes every attempt before and every acknowledgement after."""

from __future__ import annotations

import itertools
import sys
import threading
import time

from safedefer import App
from safedefer.errors import QueueUnavailable
from tests.chaos.tasks import mark, note


def produce(
    app: App, first: int, stop: int, *, threads: int = 4, per_second: float = 1e9, large_every: int = 50
) -> None:
    """Defer ``mark(n)`` for ``first <= n < stop``; every ``large_every``-th is oversize."""
    numbers = itertools.count(first)
    started = time.monotonic()

    def work() -> None:
        while (number := next(numbers)) < stop:
            time.sleep(max(0.0, started + (number - first) / per_second - time.monotonic()))
            padding = "x" * 20_000 if number % large_every == 0 else ""
            while True:
                note("try", number)
                try:
                    app.defer(mark, number, padding=padding)
                except QueueUnavailable:
                    note("refused", number)
                    time.sleep(0.1)
                    continue
                note("ack", number)
                break

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    chosen = App.from_settings()
    produce(chosen, int(sys.argv[1]), int(sys.argv[2]), per_second=float(sys.argv[3]))
    chosen.close()
