"""The supervisor of ``run`` and ``serve --processes N``: starts worker processes, watches their beats, replaces them.

It loads no application. Workers are exec'ed with the command line of the supervisor, and inherit the listening
socket and one end of a pair of sockets each, over which they say (``cli.worker`` writes, this reads):

============  ==================================================================
``ready``     the worker serves
``beat s``    it lives, and its event loop last turned ``s`` seconds ago
``banner t``  what it is, as a text
``recycle``   it drains now, and asks to be replaced
============  ==================================================================

Two more, and what this writes to a worker, are in ``cli.fleet``; besides that it writes ``stop``: a task may have made its
process deaf to signals.

A worker whose loop stands for ``hang_seconds`` is killed. One whose interpreter is held for so long, by a loop of C, ends
itself, by a timer that needs no interpreter; if it cannot, it is killed too. What it leaves in its process group ends
with it. The end of the pair that closes tells a worker that the supervisor has died.

Over 450 lines, since the start, the signs of life and the end of a worker are one account.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Final, Protocol

#: The environment variable that tells a worker the descriptors of its pair and of the listening socket, ``hang_seconds``,
#: the owner of its leases, and the owners of leases whose workers are dead.
WORKER_VARIABLE: Final = "SAFEDEFER_WORKER"
#: Seconds before the first restart after a crash; doubled with each crash in a row, up to the second number.
_BACKOFF: Final = (0.1, 10.0)
#: A worker that lived for so many seconds has not crashed in a row.
_STEADY_SECONDS: Final = 30.0
#: Seconds that a worker gets beyond ``drain_seconds``, before it is killed.
_GRACE_SECONDS: Final = 10.0
#: Seconds that the interpreter of a worker may take to come up, where ``hang_seconds`` are fewer.
_START_SECONDS: Final = 60.0
#: Seconds beyond ``hang_seconds`` that a worker's own timer gets.
_TIMER_SECONDS: Final = 2.0
_BACKLOG: Final = 1_024
#: Bytes of the longest line of a worker's: its counts.
_LINE_BYTES: Final = 4 * 2**20
#: The dead workers of one place whose leases its next worker releases: one may die before it did so.
_DEAD_KEPT: Final = 8
#: The exit status of a worker that a signal ended is the signal's number above this, as shells say it.
_SIGNALLED: Final = 128

_log: Final = logging.getLogger("safedefer")


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorOptions:
    """How worker processes are kept."""

    processes: int = 1
    hang_seconds: float = 60.0
    """Seconds without a beat, or without a turn of a worker's event loop, after which it is killed and replaced."""
    drain_seconds: float = 30.0
    """Seconds that a worker's running tasks get when it stops."""


class Shows(Protocol):
    """Shows what a supervisor and its workers do: to people, to systemd, and on pages of health."""

    def say(self, text: str) -> None:
        """Tell people what the processes are."""
        ...

    def all_ready(self) -> None:
        """Note that all workers serve."""
        ...

    def stopping(self) -> None:
        """Note that they were asked to stop."""
        ...

    def joined(self, worker: object, line: socket.socket) -> None:
        """Note that a worker serves."""
        ...

    def left(self, worker: object) -> None:
        """Note that a worker has ended."""
        ...

    def heard(self, worker: object, word: bytes, argument: bytes) -> bool:
        """Take a line of a worker's; False if it is for the supervisor."""
        ...

    def shown(self) -> AbstractAsyncContextManager[None]:
        """Show all that while the context lasts."""
        ...


@dataclass(slots=True, eq=False)
class _Worker:
    number: int
    owner: str
    process: asyncio.subprocess.Process
    pair: socket.socket
    started: float
    heard: float
    """When it last showed that its loop turns."""
    spoke: float
    """When it last said anything."""
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    began: bool = False
    """It has said something: its interpreter is up."""
    recycles: bool = False
    hangs: bool = False
    """It was killed because it hung."""
    malformed: bool = False
    """It has written a malformed beat, and that was logged."""
    rest: bytes = b""


class Supervisor:
    """Keeps worker processes running.

    Args:
        arguments: What follows ``python -m safedefer`` on the command line of a worker.
        listener: The listening socket that they share.
        url: Its URL, printed when all of them are ready.
        options: How they are kept.
        shows: What is shown of them.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        listener: socket.socket,
        url: str,
        options: SupervisorOptions,
        shows: Shows,
    ) -> None:
        self._command = [sys.executable, "-m", "safedefer", *arguments]
        self._listener = listener
        self._url = url
        self._options = options
        self._shows = shows
        self._workers: set[_Worker] = set()
        self._stopping = asyncio.Event()
        self._signals = 0
        self._status = 0
        self._said_url = False
        self._said_banner = False

    async def run(self) -> int:
        """Keep the workers until a signal asks to stop; return the exit status."""
        with _handling(self._on_signal):
            keepers = [asyncio.create_task(self._keep(number)) for number in range(1, self._options.processes + 1)]
            watch = asyncio.create_task(self._watch())
            try:
                await asyncio.gather(*keepers)
            finally:
                for task in (*keepers, watch):
                    task.cancel()
                self._kill_all()
        return self._status

    def _on_signal(self, number: int) -> None:
        """Let the workers drain; at the second signal end at once."""
        self._signals += 1
        if self._signals > 1:
            self._kill_all()
            os._exit(128 + number)
        self._stopping.set()  # before it is shown
        self._shows.stopping()
        self._stop_others()

    # --- One worker after the other ---

    async def _keep(self, number: int) -> None:
        """Keep one place filled."""
        crashes = 0
        dead: list[str] = []
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            try:
                worker = await self._start(number, dead)
            except OSError as error:  # no process or descriptor is left: perhaps a task has used them up
                if not self._said_url:
                    raise
                _log.error("worker process %d cannot be started (%s); tried again soon", number, type(error).__name__)
                crashes += 1
                await self._pause(crashes)
                continue
            status = await self._ended(worker)
            dead = [*dead, worker.owner][-_DEAD_KEPT:]
            if self._stopping.is_set():
                return
            if not worker.hangs and loop.time() - worker.heard > 0.8 * self._options.hang_seconds:
                self._note_hang(worker, loop.time() - worker.heard)
            if worker.recycles and status == 0:
                crashes = 0
                continue
            never_began = not (self._said_url or worker.ready.is_set())
            if never_began and not worker.hangs and status < _SIGNALLED:
                # It never began: what is wrong, it has said, and another one would say it again.
                self._status = status or 1
                self._stop_others()
                return
            crashes = 0 if loop.time() - worker.started > _STEADY_SECONDS else crashes + 1
            if not worker.hangs:
                _log.error(
                    "worker process %d (pid %d) ended with status %d; another one starts in %.1f s",
                    number, worker.process.pid, status, _wait(crashes),
                )  # fmt: skip
            await self._pause(crashes)

    async def _pause(self, crashes: int) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), _wait(crashes))

    def _stop_others(self) -> None:
        self._stopping.set()
        for worker in self._workers:
            _stop(worker)

    async def _start(self, number: int, dead: Sequence[str]) -> _Worker:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        descriptors = theirs.fileno(), self._listener.fileno()
        owner = secrets.token_hex(8)
        told = *descriptors, self._options.hang_seconds, owner, *dead
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                env={**os.environ, WORKER_VARIABLE: ",".join(map(str, told))},
                pass_fds=descriptors,
                process_group=0,  # a Ctrl-C is for the supervisor alone, which lets them drain
            )
        finally:
            theirs.close()
        now = asyncio.get_running_loop().time()
        worker = _Worker(number, owner, process, ours, now, now, now)
        self._workers.add(worker)
        asyncio.get_running_loop().add_reader(ours, self._hear, worker)
        if self._stopping.is_set():  # asked meanwhile
            _stop(worker)
        return worker

    async def _ended(self, worker: _Worker) -> int:
        """Wait until a worker has ended, and return its exit status: 128 and the number of a signal."""
        waiting = asyncio.ensure_future(worker.process.wait())
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({waiting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                seconds = self._options.drain_seconds + _GRACE_SECONDS
                await asyncio.wait({waiting}, timeout=seconds)
                if not waiting.done():
                    _log.error(
                        "worker process %d (pid %d) did not end within %.0f s and is killed; its tasks run again",
                        worker.number, worker.process.pid, seconds,
                    )  # fmt: skip
                    _send(worker, signal.SIGKILL)
            status = await waiting
        finally:
            stopping.cancel()
            asyncio.get_running_loop().remove_reader(worker.pair)
            self._hear_the_rest(worker)
            worker.pair.close()
            _kill_group(worker)
            self._workers.discard(worker)
            self._shows.left(worker)
        return status if status >= 0 else _SIGNALLED - status

    # --- Beats ---

    def _hear_the_rest(self, worker: _Worker) -> None:
        """Read what a worker wrote before it ended."""
        while self._hear(worker):
            pass

    def _hear(self, worker: _Worker) -> bool:
        """Read what a worker wrote; False if there is nothing."""
        try:
            data = worker.pair.recv(65_536)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(worker.pair)
            return False
        *lines, worker.rest = (worker.rest + data).split(b"\n")
        if len(worker.rest) > _LINE_BYTES:  # a task has found the line: none of ours is so long
            worker.rest = b""
        for line in lines:
            self._say(worker, line)
        return True

    def _say(self, worker: _Worker, line: bytes) -> None:
        word, _, argument = line.partition(b" ")
        now = worker.spoke = asyncio.get_running_loop().time()
        if word == b"ready":
            worker.ready.set()
            self._shows.joined(worker, worker.pair)
            ready = sum(each.ready.is_set() for each in self._workers)
            if not self._said_url and ready == self._options.processes:
                self._said_url = True
                print(self._url, flush=True)
                self._shows.all_ready()
        elif word == b"banner":
            if not self._said_banner:
                self._said_banner = True
                self._shows.say(argument.decode(errors="replace"))
        elif self._shows.heard(worker, word, argument):
            return  # no sign of life: only beats are
        elif word == b"recycle":
            worker.recycles = True
        elif word == b"beat":
            seconds = _seconds(argument)
            if seconds is None:
                self._note_malformed(worker)
                return
            if seconds >= self._options.hang_seconds:
                return  # it says itself that its loop stands: that is no sign of life
        else:
            return  # no line of ours
        worker.heard, worker.began = now, True

    async def _watch(self) -> None:
        """Kill workers that hang."""
        seconds = self._options.hang_seconds
        while True:
            await asyncio.sleep(min(1.0, seconds / 4))
            now = asyncio.get_running_loop().time()
            if not self._listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                _log.error("a task has shut the listening socket down, which all workers share; it listens again")
                self._listener.listen(_BACKLOG)
            for worker in list(self._workers):
                # A beat says how long the loop stands already: what is left is the time that no beat came.
                # Where no beat comes at all, the worker's own timer is given the first word: it says where it hangs.
                silent = now - worker.spoke > seconds
                limit = seconds + silent * _TIMER_SECONDS if worker.began else max(seconds, _START_SECONDS)
                if not worker.hangs and now - worker.heard > limit:
                    self._note_hang(worker, limit)
                    _send(worker, signal.SIGKILL)

    def _note_hang(self, worker: _Worker, seconds: float) -> None:
        worker.hangs = True
        _log.error(
            "worker process %d (pid %d) gave no sign of life for %.0f s and is ended; its tasks run again",
            worker.number, worker.process.pid, seconds,
        )  # fmt: skip

    def _note_malformed(self, worker: _Worker) -> None:
        """Log the first malformed beat of a worker, without its text."""
        if not worker.malformed:
            worker.malformed = True
            _log.warning(
                "worker process %d (pid %d) wrote a malformed beat; such lines are ignored",
                worker.number, worker.process.pid,
            )  # fmt: skip

    def _kill_all(self) -> None:
        for worker in self._workers:
            _send(worker, signal.SIGKILL)
            _kill_group(worker)


def _seconds(argument: bytes) -> float | None:
    """Return the seconds of a beat; None if they are not a finite number, or negative."""
    try:
        seconds = float(argument)
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None


def _send(worker: _Worker, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        worker.process.send_signal(number)


def _stop(worker: _Worker) -> None:
    """Ask a worker to drain, in two ways: a task may have had it ignore or block the signal."""
    _send(worker, signal.SIGTERM)
    with contextlib.suppress(OSError):
        worker.pair.send(b"stop\n")


def _kill_group(worker: _Worker) -> None:
    """End what a worker has left: it was the first of its process group. The group of a session of its own is another."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.process.pid, signal.SIGKILL)


def _wait(crashes: int) -> float:
    """Return the seconds before the next restart."""
    return min(_BACKOFF[0] * 2.0 ** min(crashes, 16), _BACKOFF[1])


@contextlib.contextmanager
def _handling(handler: Callable[[int], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, handler, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """Return a listening socket, and the URL of it.

    Args:
        host: The address or name to listen on.
        port: The port; 0 takes a free one.

    Raises:
        OSError: It cannot be bound.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"{host}:{port}: {error.strerror}") from error
    bound, number = listener.getsockname()[:2]
    shown = f"[{bound}]" if ":" in bound else bound
    return listener, f"http://{shown}:{number}"


def supervise(arguments: Sequence[str], host: str, port: int, options: SupervisorOptions, shows: Shows) -> int:
    """Run worker processes until a signal asks to stop; return the exit status.

    Args:
        arguments: What follows ``python -m safedefer`` on the command line of a worker.
        host: The address that the workers listen on.
        port: The port; 0 takes a free one.
        options: How they are kept.
        shows: What is shown of them.

    Raises:
        OSError: The address cannot be bound.
    """
    listener, url = listen(host, port)

    async def work() -> int:
        async with shows.shown():
            return await Supervisor(arguments, listener, url, options, shows).run()

    with listener:
        return asyncio.run(work())
