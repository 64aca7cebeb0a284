"""Notices: a process writes what is wrong with it into the store, where a dashboard in another process reads it.

A process of ``safedefer run``, ``serve`` or ``dispatch`` writes one every two seconds, a handler in a web application only
while something is wrong. A thread writes: storage that hangs stops nothing else.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from safedefer.concurrency.forks import register_fork
from safedefer.dispatcher.reports import Reports
from safedefer.errors import ConfigurationError, Error, QueueError
from safedefer.events import Observers, QueueLate, notify
from safedefer.observe.troubles import ProcessReport, StoreTrouble, Troubles
from safedefer.queues.base import NOTICE_NAME

if TYPE_CHECKING:
    from safedefer.queues.base import PullQueue, QueueStats

_log: Final = logging.getLogger("safedefer")

WRITING: Final = "writing"
"""What fails where a notice cannot be written."""
BEAT_SECONDS: Final = 2.0
"""How often a process says that it lives."""
LATE_SECONDS: Final = 2.5
"""A queue whose next task has been due for longer is late."""
#: It is no longer late below this.
_IN_TIME_SECONDS: Final = 1.0
#: Seconds between two events about a queue that is late.
_TELL_EVERY: Final = 60.0
#: Seconds that the end of a process waits for its last notice.
_CLOSE_SECONDS: Final = 2.0
#: How often a process that does not beat tries to write a notice.
_TRIES: Final = 5
#: Seconds between two writes: a flood of refusals makes no flood of writes.
_PAUSE_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRole:
    """What a process is."""

    command: str
    """``run``, ``serve``, ``dispatch``, ``dashboard``, or ``handler`` in a web application."""
    beats: bool = False
    """Whether it says that it lives, also while nothing is wrong."""
    takes: bool = False
    """Whether it takes tasks from the queue."""
    queues: tuple[str, ...] | None = None
    """Those that it takes tasks of; None: all."""


_HANDLER: Final = ProcessRole(command="handler")
_DASHBOARD: Final = ProcessRole(command="dashboard", beats=True)


class Notices:
    """Writes the notices of this process.

    Args:
        queue: Returns the queue. May raise ``QueueUnavailable``.
        is_open: Whether the process has opened its queue. No notice opens one: what a handler refused must cause nothing.
        observers: Told of queues that are late; ``troubles`` is added to them.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        queue: Callable[[], PullQueue],
        observers: Observers,
        clock: Callable[[], float],
        *,
        is_open: Callable[[], bool] = lambda: True,
    ) -> None:
        self.troubles: Troubles = Troubles(clock, self._wake)
        self._queue, self._is_open = queue, is_open
        self._host = socket.gethostname()  # now, and not while a request is refused
        self._observers = observers
        self._clock = clock
        self._role, self._since = _HANDLER, clock()
        self._reports = Reports(observers, clock=clock)
        self._closed = False
        self._late_told: float | None = None
        """When a late queue was told of last, in seconds of the monotonic clock; None: none is late."""
        self._reset()
        observers.add(self.troubles)
        register_fork(self, early=True)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._woken = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: StoreTrouble | None = None
        self._began: float | None = None
        """When the write under way began."""
        self._written = ""

    @property
    def process(self) -> str:
        """The name of this process: its command, its number and its machine."""
        return f"{self._role.command} {os.getpid()} on {self._host}"[:NOTICE_NAME]

    @property
    def failure(self) -> StoreTrouble | None:
        """Why the last write failed, or that one does not end; None: the store takes writes."""
        began, now = self._began, self._clock()
        if self._failure is None and began is not None and now - began > BEAT_SECONDS:
            return StoreTrouble(WRITING, "a write does not end: something keeps the store locked", began)
        return self._failure

    def start(self, role: ProcessRole) -> None:
        """Say from now on what this process is, and what is wrong with it."""
        self._role, self._since = role, self._clock()
        self._wake()

    def look_on(self) -> None:
        """Say that this process has a dashboard, if it says nothing else: whether it can write the store shows there."""
        if not self._role.beats and not self._closed:
            self.start(_DASHBOARD)

    def look_away(self) -> None:
        """Say nothing any more, if that was all."""
        if self._role is _DASHBOARD:
            self._role = _HANDLER

    def report(self) -> ProcessReport:
        """Return what this process says of itself now."""
        role = self._role
        return self.troubles.report(
            process=self.process,
            since=self._since,
            command=role.command,
            beats=role.beats,
            takes=role.takes,
            queues=role.queues,
        )

    def close(self) -> None:
        """Say that this process has ended, or take its notice back, and end the thread."""
        self._closed = True
        thread = self._thread
        self._woken.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSE_SECONDS)

    def _wake(self) -> None:
        if self._woken.is_set() and self._thread is not None:
            return  # the thread looks once more, after this; anybody can send refused requests, and each comes here
        with self._lock:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._work, name="safedefer-notices", daemon=True)
                try:
                    self._thread.start()  # kept already: Ctrl-C may come when it runs
                except RuntimeError:  # the interpreter ends, or there is no room: the next event tries again
                    self._thread = None
                    return
            self._woken.set()

    def _work(self) -> None:
        tries = 0
        while not self._closed:
            self._woken.clear()
            if self._role.takes:
                self._look_for_late()
            self._write()
            time.sleep(0.0 if self._closed else _PAUSE_SECONDS)
            tries = 0 if self._failure is None else tries + 1
            with self._lock:
                if not (self._role.beats or self._woken.is_set() or 0 < tries < _TRIES or self._closed):
                    self._thread = None
                    return
            self._woken.wait(BEAT_SECONDS - _PAUSE_SECONDS)
        self._write()

    def _text(self) -> str:
        report = self.report()
        if self._closed:  # what was refused is still true; what is down or late is no longer known
            report = replace(report, ended=True, beats=False, takes=False, down=(), troubles=(), late=())
        return "" if report.is_empty and not report.beats else report.text()

    def _write(self) -> None:
        text = self._text()
        if not (text or self._written) or not self._is_open():
            self._failure = None
            return
        self._began = now = self._clock()
        try:
            self._queue().put_notice(self.process, text, now=now)
        except Exception as error:  # noqa: BLE001  # of the storage: it is tried again
            since = now if self._failure is None else self._failure.since
            said = (
                str(error)
                if isinstance(error, QueueError | ConfigurationError)
                else getattr(error, "slug", type(error).__name__)
            )
            self._failure = StoreTrouble(WRITING, said, since)
            if isinstance(error, QueueError | ConfigurationError):
                # A dispatcher that has nothing to do writes nothing else: nobody would hear of a disk that is full.
                self._reports.failed(WRITING, error)
            _log.debug("a notice was not written (%s)", type(error).__name__)
        else:
            self._failure, self._written = None, text
            self._reports.worked(WRITING)
        finally:
            self._began = None

    def _look_for_late(self) -> None:
        """Tell when the next task has been due for seconds and nobody takes it; once a minute while that lasts."""
        try:
            queue, now, queues = self._queue(), self._clock(), self._role.queues
            due = queue.next_due(now=now, queues=queues)
            late = 0.0 if due is None else now - due
            told, ticks = self._late_told, time.monotonic()
            if told is not None and late < _IN_TIME_SECONDS:
                # Each delivery that a handler does not take puts its task off: what is due later now is late all the same.
                if not self.troubles.is_handler_down:
                    self._late_told = None
                    notify(self._observers, QueueLate(queue="", seconds=0.0, waiting=0))
            # What waited for this process to start is not late by it.
            elif min(late, now - self._since) > LATE_SECONDS and (told is None or ticks - told > _TELL_EVERY):
                name, waiting = _most_late(queue.stats(now=now), queues)
                self._late_told = ticks
                notify(self._observers, QueueLate(queue=name, seconds=late, waiting=waiting))
        except Error as error:
            _log.debug("the queue does not say what is due (%s)", error.slug)
        except Exception as error:  # noqa: BLE001  # of a row that somebody wrote into the storage
            _log.debug("the queue does not say what is due (%s)", type(error).__name__)

    # --- Forks: the thread uses the queue, and the child has none ---

    def before_fork(self) -> None:
        """Wait until nothing is written."""
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Begin anew: the child has no thread, and another name."""
        self._role, self._since = _HANDLER, self._clock()
        self._reset()
        self.troubles.forget()


def _most_late(stats: Sequence[QueueStats], queues: Sequence[str] | None) -> tuple[str, int]:
    """Return the queue whose oldest task is the latest, and how many wait in it."""
    found = [
        each for each in stats if each.waiting and each.oldest is not None and (queues is None or each.queue in queues)
    ]
    one = min(found, key=lambda each: each.oldest or 0.0, default=None)
    return ("", 0) if one is None else (one.queue, one.waiting)
