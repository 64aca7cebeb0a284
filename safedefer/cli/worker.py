"""A worker process's end of the line to its supervisor: beats from a thread of its own, that say how the loop does."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import logging
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

from safedefer.cli.fleet import READY
from safedefer.cli.supervisor import WORKER_VARIABLE
from safedefer.concurrency.forks import register_fork
from safedefer.observe.counts import Counts, dump_gauges
from safedefer.observe.health import Health

_log: Final = logging.getLogger("safedefer")

#: Beats in the time after which a worker without one is killed.
_BEATS: Final = 8
_LONGEST_BEAT: Final = 1.0
#: Seconds that a process may take to end when its loop has, before that counts as hanging; ``hang_seconds`` if they are fewer.
_LEAVE_SECONDS: Final = 10.0


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
        self.recycles = False
        """Whether this process asked to be replaced."""
        self._writing = threading.Lock()
        self._counts: Counts | None = None
        self._health: Health | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._answers: set[asyncio.Task[None]] = set()
        self._turned: float | None = None
        """When the loop last turned; None while there is none."""
        self._loop_thread = 0
        self._stop: Callable[[], None] = lambda: os._exit(1)
        self._alone = False
        """Whether the supervisor has died."""
        self._errors = _standard_error()
        register_fork(self)
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
        loop = self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()

        def stop_soon() -> None:
            with contextlib.suppress(RuntimeError):  # it was closed meanwhile
                loop.call_soon_threadsafe(stop.set)

        async def turn() -> None:
            while True:
                self._turned = time.monotonic()
                if not self.recycles and recycle():
                    self.recycles = True
                    self._say("recycle")
                    stop.set()
                await asyncio.sleep(self._every / 2)

        self._stop = stop_soon
        turning = loop.create_task(turn())
        try:
            yield
        finally:
            turning.cancel()
            self._loop = None
            # A thread that a task has started, or what it had called at the exit, may keep the process from ending.
            self._turned = time.monotonic() + min(_LEAVE_SECONDS, self._hang_seconds)
            self.say_counts()

    def count(self, counts: Counts, health: Health) -> None:
        """Send the supervisor what is counted, with each beat, and answer what it asks of this process's health."""
        self._counts, self._health = counts, health

    def say_counts(self) -> None:
        """Send what was counted since the last time."""
        if self._counts is not None:
            document = {**self._counts.take().dump(), "gauges": dump_gauges(self._counts.gauges())}
            self._say(f"counts {json.dumps(document)}")

    def ready(self) -> None:
        """Tell the supervisor that this process serves."""
        self._say("ready")

    def say_banner(self, text: str) -> None:
        """Tell the supervisor what this process is: it says so once for all workers."""
        self._say(f"banner {text}")

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError), self._writing:  # the supervisor has died: `_listen` hears of it
            self._line.sendall(f"{line}\n".encode())

    def _beat(self) -> None:
        told = False
        while True:
            # Its clock is a thread of C, which needs no interpreter: if this thread gets none for so long, that one names
            # the functions at fault and ends the process, also where there is no supervisor any more.
            # To a descriptor of our own: a task may put something else in the place of sys.stderr.
            faulthandler.dump_traceback_later(self._hang_seconds, exit=True, file=self._errors)
            turned = self._turned
            stands = 0.0 if turned is None else max(0.0, time.monotonic() - turned)
            if self._alone and stands > self._hang_seconds:  # nobody else ends it
                os._exit(1)
            if self._has_room():
                self._say(f"beat {stands:.3f}")
                self.say_counts()
            if stands > self._hang_seconds / 2 and not told:
                told = True
                _log.error("the event loop stands for %.1f s, in %s", stands, self._where())
            elif stands < self._hang_seconds / 2:
                told = False
            time.sleep(self._every)

    def _has_room(self) -> bool:
        """Whether the line takes a beat at once: a supervisor that stands still reads none, and must not take this with it."""
        try:
            poll = select.poll()
            poll.register(self._line, select.POLLOUT)
            return bool(poll.poll(0))
        except (OSError, ValueError):  # a task has closed it
            return False

    def _where(self) -> str:
        """Name the functions that the loop's thread is in, innermost last; no value of theirs."""
        frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001  # documented, for this
        stack = traceback.extract_stack(frame)[-3:] if frame is not None else []
        return " > ".join(f"{entry.name} ({os.path.basename(entry.filename)}:{entry.lineno})" for entry in stack)  # noqa: PTH119

    def _listen(self) -> None:
        rest = b""
        with contextlib.suppress(OSError):
            while data := self._line.recv(4_096):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if line == b"stop":
                        self._stop()
                        continue
                    _, number, what = line.decode().split()
                    self._pass_on(int(number), what)
        self._alone = True
        self._stop()

    # --- Forks ---

    def before_fork(self) -> None:
        """Nothing need rest: the child closes its copies."""

    def after_fork_in_parent(self) -> None:
        """Go on."""

    def after_fork_in_child(self) -> None:
        """Be no worker: keep neither the port nor the line, and end where the coroutine of a task lets the loop go on.

        The loop of a child would lease and run tasks beside its parent, as the same owner.
        """
        self._line.close()
        self.listener.close()
        if self._loop is not None and threading.get_ident() == self._loop_thread:
            self._loop.call_soon(os._exit, 1)
            ready = getattr(self._loop, "_ready", None)
            if isinstance(ready, deque):  # to the front: what is ready are steps of other tasks, which the parent runs
                ready.rotate(1)

    # --- Questions ---

    def _pass_on(self, number: int, what: str) -> None:
        """Let the event loop answer: while it stands, nothing answers."""
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it was closed meanwhile
                loop.call_soon_threadsafe(self._begin_answer, number, what)

    def _begin_answer(self, number: int, what: str) -> None:
        if self._health is not None:
            task = asyncio.get_running_loop().create_task(self._answer(self._health, number, what))
            self._answers.add(task)
            task.add_done_callback(self._answers.discard)

    async def _answer(self, health: Health, number: int, what: str) -> None:
        said: Any
        if what == READY:
            said = await health.reasons()
        else:
            reading = await health.reading()
            said = None if reading is None else reading.dump()
        self._say(f"answer {number} {json.dumps(said)}")


def _standard_error() -> int:
    """Return a copy of the descriptor of standard error, which tasks do not know; of nothing where there is none."""
    try:
        return os.dup(2)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


def _inherited(descriptor: int) -> socket.socket:
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)
