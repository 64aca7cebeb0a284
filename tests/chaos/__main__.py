"""``python -m tests.chaos [names] [--seeds N] [--tasks N]``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

from tests.chaos import deaths, places, storage


def long_forms(seeds: int, tasks: int) -> dict[str, list[Callable[[], str]]]:
    """Return the scenarios by name, as they are run before a release."""
    return {
        "kills": [partial(deaths.kills, seed=seed, tasks=tasks) for seed in range(1, seeds + 1)],
        "calm": [partial(deaths.calm, tasks=tasks)],
        "down": [deaths.down],
        "stopped": [deaths.stopped],
        "terms": [deaths.terms],
        "exits": [deaths.exits],
        "orders": [deaths.orders],
        "full": [storage.full, storage.limited],
        "locked": [storage.locked],
        "clock": [
            partial(places.clock, shift=shift, who=who)
            for who in ("dispatcher", "handler")
            for shift in (3600.0, -3600.0)
        ],
        "cut": [storage.cut],
        "replay": [places.replay],
        "rates": [places.rates],
        "forks": [places.forks],
        "million": [storage.million],
    }


def main() -> int:
    """Run, and print one line for each scenario."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tasks", type=int, default=10_000)
    chosen = parser.parse_args()
    forms = long_forms(chosen.seeds, chosen.tasks)
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
