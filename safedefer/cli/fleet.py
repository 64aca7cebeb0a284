"""What a supervisor shows of its worker processes: their counts added up, their health, and the store, asked through one.

The supervisor loads no application, so it has no store to ask. Over the pair of sockets of ``cli.supervisor``:

=============  ================================================================
``counts j``   from a worker: what was counted since the line before, as JSON
``ask n w``    to a worker: the question ``w`` with the number ``n``
``answer n j``  from it: the answer, as JSON
=============  ================================================================
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from functools import partial
from typing import Any, Final

from safedefer.observe.counts import Series, Sums, highest, load_gauges
from safedefer.observe.health import ALIVE, DRAINING, STARTING, STORE_SECONDS, Page, metrics_page, readiness
from safedefer.observe.store import StoreReading

#: What a worker is asked: why it takes no tasks, and the numbers of the store.
READY: Final = "ready"
STORE_NUMBERS: Final = "store"
#: Seconds that an answer is waited for: the worker itself waits for the store.
_ANSWER_SECONDS: Final = STORE_SECONDS + 1.0
_SILENT: Final = "a worker process does not answer"

_log: Final = logging.getLogger("safedefer")


class Fleet:
    """The pages of a supervisor. Used in its event loop.

    Args:
        wanted: How many worker processes there should be.
    """

    def __init__(self, wanted: int) -> None:
        self.draining = False
        self._wanted = wanted
        self._sums = Sums()
        self._gauges: dict[object, dict[Series, float]] = {}
        self._lines: dict[object, socket.socket] = {}
        """The sockets of the workers that serve."""
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._number = 0

    def joined(self, worker: object, line: socket.socket) -> None:
        """Note that a worker serves."""
        self._lines[worker] = line

    def left(self, worker: object) -> None:
        """Note that a worker has ended: what it counted stays."""
        self._lines.pop(worker, None)
        self._gauges.pop(worker, None)

    def heard(self, worker: object, word: bytes, argument: bytes) -> bool:
        """Take a line of a worker's; False if it is none of those above."""
        try:
            if word == b"counts":
                document = json.loads(argument)
                sums, self._gauges[worker] = Sums.load(document), load_gauges(document["gauges"])
                self._sums.merge(sums)
            elif word == b"answer":
                number, _, said = argument.partition(b" ")
                asked = self._asked.get(int(number))
                if asked is not None and not asked.done():
                    asked.set_result(json.loads(said))
            else:
                return False
        except (ValueError, TypeError, KeyError, IndexError):
            _log.error("a worker process wrote %a to its supervisor, which is no line of ours", word[:20])
        return True

    async def _ask(self, line: socket.socket, what: str) -> Any:
        """Ask a worker. Raises ``TimeoutError`` or ``OSError`` if it gives no answer."""
        self._number += 1
        number = self._number
        asked = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            line.send(f"ask {number} {what}\n".encode())
            return await asyncio.wait_for(asked, _ANSWER_SECONDS)
        finally:
            del self._asked[number]

    async def _reasons(self, line: socket.socket) -> list[str]:
        try:
            return [str(reason) for reason in await self._ask(line, READY)]
        except (TimeoutError, OSError, TypeError):
            return [_SILENT]

    async def _reading(self) -> StoreReading | None:
        """Ask one worker after the other for the numbers of the store, until one has them."""
        for line in list(self._lines.values()):
            try:
                said = await self._ask(line, STORE_NUMBERS)
                return None if said is None else StoreReading.load(said)
            except (TimeoutError, OSError, ValueError, TypeError, KeyError, AttributeError):
                continue
        return None

    # --- Pages ---

    async def alive(self) -> Page:
        """Return the page ``/healthz``: a worker that hangs is this process's business, and is replaced."""
        return ALIVE

    async def ready(self) -> Page:
        """Return the page ``/readyz``: one worker that takes tasks is enough."""
        if self.draining:
            return readiness([DRAINING])
        answers = await asyncio.gather(*map(self._reasons, list(self._lines.values())))
        ready = sum(not reasons for reasons in answers)
        reasons = sorted({each for reasons in answers for each in reasons}) or [STARTING]
        return readiness([] if ready else reasons, f"{ready} of {self._wanted} worker processes take tasks")

    async def metrics(self) -> Page:
        """Return the page ``/metrics``, of all workers."""
        reading = await self._reading()
        sums, gauges = Sums(), highest(self._gauges)
        sums.merge(self._sums)
        processes = (len(self._lines), self._wanted)
        return await asyncio.to_thread(partial(metrics_page, sums, gauges, reading, processes=processes))
