"""A worker process's end of the line to its supervisor: beats from a thread of its own, that say how the loop does."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from safedefer.cli.supervisor import WORKER_VARIABLE

_log: Final = logging.getLogger("safedefer")

#: Beats in the time after which a worker without one is killed.
_BEATS: Final = 8
_LONGEST_BEAT: Final = 1.0


class Worker:
    """The line of this process to its supervisor.

    Args:
        line: Its end of the pair of sockets.
        listener: The listening socket that all workers share.
        hang_seconds: After how long without a turn of its loop this process is killed.
        owner: The owner of its leases, which the supervisor knows when it has ended.
        dead_owners: Those of workers before it.
    """

    def __init__(
        self, line: socket.socket, listener: socket.socket, hang_seconds: float, owner: str, dead_owners: Sequence[str]
    ) -> None:
        self.owner = owner
        self.dead_owners = dead_owners
        self._line = line
        self.listener = listener
        self._hang_seconds = hang_seconds
        self._every = min(_LONGEST_BEAT, hang_seconds / _BEATS)
        self._turned: float | None = None
        """When the loop last turned; None while there is none."""
        self._loop_thread = 0
        self._orphaned: Callable[[], None] = lambda: os._exit(1)
        threading.Thread(target=self._beat, name="safedefer-beat", daemon=True).start()
        threading.Thread(target=self._listen, name="safedefer-supervisor", daemon=True).start()

    @classmethod
    def from_environment(cls) -> Worker | None:
        """Return the line that a supervisor gave to this process; None if none started it.

        Beats begin now, before the application is loaded.
        """
        # Taken out: what a task starts is no worker.
        text = os.environ.pop(WORKER_VARIABLE, None)
        if text is None:
            return None
        pair, listener, hang_seconds, owner, *dead_owners = text.split(",")
        return cls(_inherited(int(pair)), _inherited(int(listener)), float(hang_seconds), owner, dead_owners)

    @contextlib.asynccontextmanager
    async def watched(self, stop: asyncio.Event, *, recycle: Callable[[], bool]) -> AsyncIterator[None]:
        """Let the beats say how the running loop does, while the context lasts.

        Args:
            stop: Set when this process is to drain: its supervisor died, or ``recycle`` said so.
            recycle: Asked at every turn whether this process asks to be replaced.
        """
        loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()

        def orphaned() -> None:
            loop.call_soon_threadsafe(stop.set)

        async def turn() -> None:
            asked = False
            while True:
                self._turned = time.monotonic()
                if not asked and recycle():
                    asked = True
                    self._say("recycle")
                    stop.set()
                await asyncio.sleep(self._every / 2)

        self._orphaned = orphaned
        turning = loop.create_task(turn())
        try:
            yield
        finally:
            turning.cancel()
            self._turned = None

    def ready(self) -> None:
        """Tell the supervisor that this process serves."""
        self._say("ready")

    def say_queue(self, text: str | None) -> None:
        """Tell the supervisor where the queue is: it says so once for all workers."""
        if text is not None:
            self._say(f"queue {text}")

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the supervisor has died: `_listen` hears of it
            self._line.sendall(f"{line}\n".encode())

    def _beat(self) -> None:
        told = False
        while True:
            # Its clock is a thread of C, which needs no interpreter: if this thread gets none for so long, that one names
            # the functions at fault and ends the process, also where there is no supervisor any more.
            faulthandler.dump_traceback_later(self._hang_seconds, exit=True)
            turned = self._turned
            stands = 0.0 if turned is None else max(0.0, time.monotonic() - turned)
            self._say(f"beat {stands:.3f}")
            if stands > self._hang_seconds / 2 and not told:
                told = True
                _log.error("the event loop stands for %.1f s, in %s", stands, self._where())
            elif stands < self._hang_seconds / 2:
                told = False
            time.sleep(self._every)

    def _where(self) -> str:
        """Name the functions that the loop's thread is in, innermost last; no value of theirs."""
        frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001  # documented, for this
        stack = traceback.extract_stack(frame)[-3:] if frame is not None else []
        return " > ".join(f"{entry.name} ({os.path.basename(entry.filename)}:{entry.lineno})" for entry in stack)  # noqa: PTH119

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while self._line.recv(1):
                pass
        self._orphaned()


def _inherited(descriptor: int) -> socket.socket:
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)
