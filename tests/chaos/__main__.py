"""``python -m tests.chaos [names] [--seeds N] [--tasks N] [--queue postgres]``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

from tests.chaos import brokers, cloud_tasks, deaths, machines, places, storage, workers
from tests.queues.brokers import RABBITMQ


def long_forms(seeds: int, tasks: int, store: str) -> dict[str, list[Callable[[], str]]]:
    """Return the scenarios by name, as they are run before a release."""
    if store == "sqlite":
        return of_any_queue(seeds, tasks, store) | of_sqlite() | of_brokers(seeds, tasks) | of_cloud_tasks()
    return of_any_queue(seeds, tasks, store) | of_postgres(seeds, tasks)


def of_any_queue(seeds: int, tasks: int, store: str) -> dict[str, list[Callable[[], str]]]:
    """Return those that know nothing of what the queue is stored in."""
    return {
        "kills": [partial(deaths.kills, seed=seed, tasks=tasks, store=store) for seed in range(1, seeds + 1)],
        "workers": [partial(workers.kills, seed=seed, tasks=tasks, store=store) for seed in range(1, seeds + 1)],
        "calm": [partial(deaths.calm, tasks=tasks, store=store)],
        "down": [partial(deaths.down, store=store)],
        "stopped": [partial(deaths.stopped, store=store)],
        "terms": [partial(deaths.terms, store=store)],
        "exits": [partial(deaths.exits, store=store)],
        "orders": [partial(deaths.orders, store=store)],
        "replay": [partial(places.replay, store=store)],
        "rates": [partial(places.rates, store=store)],
        "forks": [partial(places.forks, store=store)],
    }


def of_sqlite() -> dict[str, list[Callable[[], str]]]:
    """Return those of the file and its disk."""
    return {
        "full": [storage.full, storage.limited],
        "locked": [storage.locked],
        "clock": [
            partial(places.clock, shift=shift, who=who)
            for who in ("dispatcher", "handler")
            for shift in (3600.0, -3600.0)
        ],
        "cut": [storage.cut],
        "million": [storage.million],
    }


def of_brokers(seeds: int, tasks: int) -> dict[str, list[Callable[[], str]]]:
    """Return those of a Celery broker, whose tasks take a hundred times as long as those of a queue of ours to kill around."""
    kinds = ["valkey", "rabbitmq"] if RABBITMQ.exists() else ["valkey"]
    return {
        "brokers": [
            partial(brokers.kills, kind, seed=seed, tasks=max(tasks // 20, 100))
            for kind in kinds
            for seed in range(1, min(seeds, 3) + 1)
        ],
        "redelivery": [
            partial(brokers.redelivery, kind, what)
            for kind in kinds
            for what in ("child", "parent", "worker", "broker")
        ],
    }


def of_cloud_tasks() -> dict[str, list[Callable[[], str]]]:
    """Return that of the service that pushes, which the emulator stands for."""
    return {"cloud-tasks": [partial(cloud_tasks.kills, tasks=400, rounds=20)]}


def of_postgres(seeds: int, tasks: int) -> dict[str, list[Callable[[], str]]]:
    """Return those of a server that several machines share."""
    return {
        "machines": [partial(machines.several, seed=seed, tasks=tasks) for seed in range(1, seeds + 1)],
        "pair": [machines.calm],
        "outage": [machines.outage],
        "rescue": [machines.rescue],
    }


def main() -> int:
    """Run, and print one line for each scenario."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--queue", choices=("sqlite", "postgres"), default="sqlite")
    chosen = parser.parse_args()
    forms = long_forms(chosen.seeds, chosen.tasks, chosen.queue)
    failures = 0
    for name in chosen.names or forms:
        for form in forms[name]:
            began = time.monotonic()
            try:
                line = form()
            except Exception as error:
                failures += 1
                line = f"FAILED {type(error).__name__}: {error}"
            print(f"{name:8} {time.monotonic() - began:6.1f} s  {line}", flush=True)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
