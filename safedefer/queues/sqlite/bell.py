"""A bell beside the queue's file: who enqueues rings it, and threads of other processes hear it at once, on Linux.

It is a named pipe, ``.<file>-wake``. Nothing that it carries means anything: hearing it is a reason to look into the file, so
a bell that somebody rings without cause costs looks, which ``FileWatch`` bounds. All who listen hear each ring, since none of them
reads: each is told of a write, and who rings empties the pipe first. Ringing costs some 10 us, and one system call where no
bell was ever made. Nothing stays behind but the name: what nobody listens to is dropped, and the kernel closes the ends of a
process that was killed. Where the pipe cannot be made or opened (a read-only folder, another user's pipe or file, a system that is not
Linux or has no ``/proc``), the file is looked at often instead.
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

#: The capacity of a pipe.
_ALL: Final = 65_536


def bell_path(path: str) -> str:
    """Return the path of a file's bell. It begins with a dot, so that ``*`` of a shell leaves it out."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}-wake")  # noqa: PTH118 - a text, as everything here


def ring(path: str) -> None:
    """Let all hear who listen to the bell, in any process. Never raises, and never waits."""
    if sys.platform != "linux":
        return
    pipe = _open(path)
    if pipe is None:
        return
    try:
        with contextlib.suppress(BlockingIOError):  # nobody has rung before
            os.read(pipe, _ALL)
        os.write(pipe, b"\0")
    except OSError:  # others have filled it meanwhile, and so rung
        pass
    finally:
        os.close(pipe)


if sys.platform == "linux":

    def _open(path: str, *, owner: int | None = None) -> int | None:
        """Open a pipe to read and write: none of its ends ever finds the other one closed. None if it cannot be.

        Only what was seen to be a pipe is opened, and not what has its name by then: to close another file would drop the locks
        that this process has on it (POSIX), and somebody could have linked the queue's own files to this name.

        Args:
            path: Of the pipe. No link is followed, and a pipe that has another name is another program's.
            owner: Whose it must be, a user's number; None: anybody's.
        """
        try:
            place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            status = os.fstat(place)
            if not stat.S_ISFIFO(status.st_mode) or status.st_nlink != 1 or owner not in {None, status.st_uid}:
                return None
            # Nobody is kept waiting, and no program that this one starts inherits it.
            return os.open(f"/proc/self/fd/{place}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        finally:
            os.close(place)


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

    def __init__(self, path: str, owner: int) -> None:
        with contextlib.ExitStack() as opened:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            opened.callback(os.close, self._wake)
            self._both = opened.enter_context(select.epoll(2))
            self._both.register(self._wake, select.EPOLLIN)
            self._pipe = _open(path, owner=owner)
            if self._pipe is None and owner == os.geteuid():
                with contextlib.suppress(OSError):
                    os.mkfifo(path, 0o600)
                    self._pipe = _open(path, owner=owner)
            if self._pipe is not None:
                opened.callback(os.close, self._pipe)
                # Each write is told once, to each who listens, though nobody reads.
                self._both.register(self._pipe, select.EPOLLIN | select.EPOLLET)
            self._opened = opened.pop_all()

    @property
    def is_deaf(self) -> bool:
        return self._pipe is None

    def wake(self) -> None:
        os.eventfd_write(self._wake, 1)

    def wait(self, seconds: float, *, others: bool) -> bool:
        if others:
            heard = {descriptor for descriptor, _ in self._both.poll(seconds)}
        else:
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            heard = {descriptor for descriptor, _ in poll.poll(math.ceil(seconds * 1_000))}
        if self._wake in heard:
            os.eventfd_read(self._wake)
        return self._pipe in heard

    def close(self) -> None:
        self._opened.close()


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


def listen(path: str, owner: int) -> Ear:
    """Return what the calling thread waits with, from now on. The caller closes it.

    Args:
        path: The bell's. If there is none it is made by its owner.
        owner: Whose the queue's file is, a user's number. A bell of somebody else is not listened to: others who may write the
            file could not ring it, or whoever has it could take what was rung.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # there are no descriptors left
            return _PipeEar(path, owner)
    return _LockEar()
