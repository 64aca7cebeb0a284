"""What benchmarks run."""

import time

STARTED: list[tuple[float, float]] = []


async def noop(_value: object) -> None:
    """Do nothing."""


def stamp(sent: float) -> None:
    """Note when this ran."""
    STARTED.append((sent, time.perf_counter()))
