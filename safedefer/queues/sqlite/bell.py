"""A bell beside the queue's file: who enqueues rings it, and a thread of another process that waits hears it at once.

It is a named pipe, ``.<file>-wake``. Nothing that it carries means anything: hearing it is a reason to look into the file, so
a bell that somebody rings without cause costs looks, which ``FileWatch`` bounds. Ringing costs one system call where nobody
listens, some 3 us, and six where somebody does. Nothing stays behind but the name: what nobody listens to is dropped, and the kernel
closes the ends of a process that was killed. Where the pipe cannot be made or opened (a read-only folder, another user's pipe, a
system that is not Linux), the file is looked at often instead.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import stat
import sys
import threading
from typing import Final, Protocol

#: No reader is kept waiting, nor a writer; no link is followed; no program that this one starts inherits the pipe.
_FLAGS: Final = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOCTTY
#: The capacity of a pipe.
_ALL: Final = 65_536


def bell_path(path: str) -> str:
    """Return the path of a file's bell. It begins with a dot, so that ``*`` of a shell leaves it out."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}-wake")  # noqa: PTH118 - a text, as everything here


def ring(path: str) -> None:
    """Let those hear who listen to the bell, in any process. Never raises, and never waits."""
    try:
        pipe = os.open(path, os.O_WRONLY | _FLAGS)  # an error where nobody listens
    except OSError:
        return
    try:
        if stat.S_ISFIFO(os.fstat(pipe).st_mode):
            # With a reader of its own, this process gets no SIGPIPE if the last other one leaves now.
            reader = os.open(path, os.O_RDONLY | _FLAGS)
            try:
                os.write(pipe, b"\0")
            finally:
                os.close(reader)
    except OSError:  # it is full of what nobody has heard yet, or gone
        pass
    finally:
        os.close(pipe)


def _open(path: str) -> int | None:
    # To read and write: without a writer, a reader would hear the end of the file again and again.
    try:
        pipe = os.open(path, os.O_RDWR | _FLAGS)
    except OSError:
        return None
    if stat.S_ISFIFO(os.fstat(pipe).st_mode):
        return pipe
    os.close(pipe)
    return None


class Ear(Protocol):
    """What one thread waits with."""

    @property
    def is_deaf(self) -> bool:
        """Whether other processes cannot be heard."""
        ...

    def wake(self) -> None:
        """End the wait, from any thread of this process."""
        ...

    def wait(self, seconds: float, *, others: bool) -> bool:
        """Wait. Return whether another process rang.

        Args:
            seconds: At most.
            others: Whether to listen to other processes.
        """
        ...

    def close(self) -> None:
        """Listen no more."""
        ...


class _PipeEar:
    """Hears other processes too."""

    def __init__(self, path: str) -> None:
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._pipe = _open(path)
        if self._pipe is None:
            with contextlib.suppress(OSError):
                os.mkfifo(path, 0o600)
                self._pipe = _open(path)

    @property
    def is_deaf(self) -> bool:
        return self._pipe is None

    def wake(self) -> None:
        os.eventfd_write(self._wake, 1)

    def wait(self, seconds: float, *, others: bool) -> bool:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if others and self._pipe is not None:
            poll.register(self._pipe, select.POLLIN)
        heard = {descriptor for descriptor, _ in poll.poll(math.ceil(seconds * 1_000))}
        if self._wake in heard:
            os.eventfd_read(self._wake)
        if self._pipe is None or self._pipe not in heard:
            return False
        with contextlib.suppress(OSError):  # another listener has read it meanwhile
            os.read(self._pipe, _ALL)
        return True

    def close(self) -> None:
        os.close(self._wake)
        if self._pipe is not None:
            os.close(self._pipe)


class _LockEar:
    """Hears this process alone."""

    def __init__(self) -> None:
        self._bell = threading.Lock()
        self._bell.acquire()

    @property
    def is_deaf(self) -> bool:
        return True

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # it was woken already
            self._bell.release()

    def wait(self, seconds: float, *, others: bool) -> bool:  # noqa: ARG002 - as the protocol says
        self._bell.acquire(timeout=seconds)
        return False

    def close(self) -> None:
        pass


def listen(path: str) -> Ear:
    """Return what the calling thread waits with, from now on. The caller closes it.

    Args:
        path: The bell's. It is made if there is none.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # there are no descriptors left
            return _PipeEar(path)
    return _LockEar()
