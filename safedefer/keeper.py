"""The keeper of what runs: prolongs every run in the ledger while it lasts, all of them with one timer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from safedefer.errors import QueueUnavailable
from safedefer.ledger import Execution, Ledger
from safedefer.threads import InThread

#: Beats in the length of a lease: a run is prolonged at every second one.
_BEATS: Final = 6


class Keeper:
    """Prolongs runs. Most are over before the first beat, and cost two entries in a dictionary.

    Args:
        ledger: Where they are prolonged.
        in_thread: How it is called.
        clock: Seconds since the epoch.
        seconds: How long the ledger believes in a silent run.
    """

    def __init__(
        self, ledger: Callable[[], Ledger], in_thread: InThread, *, clock: Callable[[], float], seconds: float
    ) -> None:
        self._ledger = ledger
        self._in_thread = in_thread
        self._clock = clock
        self._seconds = seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forget()

    def _forget(self) -> None:
        self._runs: dict[str, tuple[Execution, int]] = {}
        """By owner, with the beat after which it was admitted or prolonged."""
        self._beat = 0
        self._timer: asyncio.TimerHandle | None = None
        self._beating: asyncio.Task[None] | None = None

    def add(self, execution: Execution) -> None:
        """Keep a run from now on; within a running loop."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # what another loop left behind, it left for good
            self._loop = loop
            self._forget()
        self._runs[execution.owner] = execution, self._beat
        if self._timer is None:
            self._timer = loop.call_later(self._seconds / _BEATS, self._tick, loop)

    def remove(self, execution: Execution) -> None:
        """Keep it no more."""
        self._runs.pop(execution.owner, None)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._runs:
            self._timer = None
            return
        self._timer = loop.call_later(self._seconds / _BEATS, self._tick, loop)
        self._beat += 1
        due = [execution for execution, beat in self._runs.values() if self._beat - beat > 1]
        if due and (self._beating is None or self._beating.done()):
            self._runs.update((execution.owner, (execution, self._beat)) for execution in due)
            self._beating = loop.create_task(self._prolong(due))

    async def _prolong(self, due: list[Execution]) -> None:
        def extend() -> None:
            for execution in due:
                with contextlib.suppress(QueueUnavailable):  # tried again at the next turn
                    self._ledger().extend(execution, now=self._clock(), lease=self._seconds)

        await self._in_thread(extend)
