"""The tasks of the chaos scenarios: each says when it begins and when it has ended."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path


def note(kind: str, *fields: object) -> None:
    """Append one line to the common log: a single write, so that lines of several processes do not mix."""
    line = " ".join(map(str, (kind, *fields, os.getpid(), f"{time.clock_gettime(time.CLOCK_MONOTONIC):.6f}")))
    with Path(os.environ["CHAOS_LOG"]).open("ab", buffering=0) as log:
        log.write(f"{line}\n".encode())


def mark(number: int, pause: float = 0.0, padding: str = "") -> None:
    """Run once, if all goes well."""
    note("run", number)
    if pause:
        time.sleep(pause)
    note("end", number)


def _is_first(number: int) -> bool:
    mark = Path(f"{os.environ['CHAOS_LOG']}-{number}")
    first = not mark.exists()
    mark.touch()
    return first


def hang(number: int) -> None:
    """Take ten minutes in the first attempt, and no time in the next."""
    note("run", number)
    if _is_first(number):
        time.sleep(600.0)
    note("end", number)


async def overrun(number: int) -> None:
    """Pass its deadline in the first attempt, be cancelled, and end at once in the next."""
    note("run", number)
    if _is_first(number):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            note("over", number)
            raise
    note("end", number)


def due(number: int, eta: float) -> None:
    """Say how many seconds too early it runs, by the clock of the machine."""
    note("early", number, f"{eta - time.clock_gettime(time.CLOCK_REALTIME):.3f}")
    mark(number)


def die(number: int) -> None:
    """Take the process along."""
    note("run", number)
    os._exit(9)
