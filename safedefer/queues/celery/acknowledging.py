"""Acknowledgements of a Celery worker that wait for one sync of the store, for all that its children have ended meanwhile.

A child whose task has ended commits that to the store without a sync, and takes the next task. Its parent acknowledges the
message to the broker, once a sync that began after the child's answer has returned. So a message that is gone has an end that
survives a power cut, as if the child had waited, and several ends share a sync.

A database server that crashes in between has undone ends, and syncs again when it is back. So a sync says a mark, which is
another one after a crash: a message that was received under another mark goes back to the broker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from safedefer.errors import Error

_log: Final = logging.getLogger("safedefer.celery")

#: Seconds between two tries of a sync.
_AGAIN_SECONDS: Final = 0.5
#: Seconds that a worker waits for the first sync before it takes messages.
_BEGIN_SECONDS: Final = 10.0


class Answered(NamedTuple):
    """A message that a child has answered."""

    acknowledge: Callable[[], None]
    put_back: Callable[[], None]
    """Gives the message back to the broker."""
    mark: object
    """Of the store, when the message was received."""


class Acknowledgements:
    """Those of one parent of worker processes. All methods but the thread's are called in the parent's main thread.

    Args:
        sync: Has the store sync what was committed so far; returns the store's mark.

    Attributes:
        mark: That of the last sync; one that no sync returns before the first.
    """

    def __init__(self, sync: Callable[[], object]) -> None:
        self._sync = sync
        self._hub: Any = None
        self.mark: object = object()
        self._waiting: deque[Answered] = deque()
        self._syncing: deque[Answered] = deque()
        self._synced: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def listen(self, hub: Any) -> None:
        """Acknowledge in the worker's event loop. A lost connection has the loop forget its readers, and kombu its current loop."""
        self._hub = hub
        if hub is not None and self._read not in hub.readers:
            hub.add_reader(self._read, self._on_synced)

    def begin(self) -> None:
        """Ask the store for its mark, and wait a while for it: messages that are received before it go back to the broker."""
        with self._changed:
            if self._thread is not None:
                return
            self._waiting.append(Answered(_nothing, _nothing, None))
            if self._is_started():
                self._changed.wait_for(lambda: not (self._waiting or self._syncing), _BEGIN_SECONDS)
                return
        self.flush()

    def add(self, answered: Answered, *, last: bool = False) -> None:
        """Acknowledge in this thread, once a sync that begins from now on has returned; at once where it is one of the last."""
        with self._changed:
            self._waiting.append(answered)
            if self._hub is not None and not last and self._is_started():
                self._changed.notify_all()
                return
        self.flush(ends=last)  # no event loop, or its end, or no thread: there is no later

    def _is_started(self) -> bool:
        """Start the thread unless it runs; False where the system gives none. Hold the lock."""
        if self._thread is None:
            # First: Ctrl-C may come when it runs, and two would take each other's messages.
            self._thread = threading.Thread(target=self._work, name="safedefer-sync", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:
                self._thread = None
                return False
        return True

    def end(self) -> None:
        """Sync, and acknowledge all that waits; from now on each message at once: the event loop has ended."""
        self._hub = None
        self.flush(ends=True)

    def flush(self, *, ends: bool = False) -> None:
        """Sync, and acknowledge all that waits; without a sync it goes back to the broker, by itself where the worker ends."""
        with self._changed:
            # What the thread has a sync for is in this one too: it may be over before.
            waiting = [*self._syncing, *self._waiting]
            self._syncing.clear()
            self._waiting.clear()
        if waiting:
            try:
                mark = self._sync()
            except Exception as error:  # noqa: BLE001  # whatever the store's library raises
                _log.error("the store does not sync (%s); the broker delivers its tasks again", _name(error))
                if not ends:
                    time.sleep(_AGAIN_SECONDS)  # they come again at once
                    with self._changed:
                        self._synced.extend(each.put_back for each in waiting)
            else:
                self._sort(waiting, mark)
        self._acknowledge()

    def _sort(self, synced: Iterable[Answered], mark: object) -> None:
        """Acknowledge what was received under the mark of its sync; give back the rest, whose end may be undone."""
        with self._changed:
            self.mark = mark
            self._synced.extend(each.acknowledge if each.mark == mark else each.put_back for each in synced)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                self._syncing, self._waiting = self._waiting, deque()
            mark = self._sync_at_last()
            with self._changed:
                self._sort(self._syncing, mark)
                self._syncing = deque()
                self._changed.notify_all()
            with contextlib.suppress(BlockingIOError):  # the main thread has enough to read
                os.write(self._write, b"x")

    def _sync_at_last(self) -> object:
        failing = False
        while True:
            try:
                return self._sync()
            except Exception as error:  # noqa: BLE001  # as in flush
                if not failing:
                    _log.warning("the store does not sync (%s); trying again", _name(error))
                failing = True
                time.sleep(_AGAIN_SECONDS)

    def _on_synced(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)
        self._acknowledge()

    def _acknowledge(self) -> None:
        while True:
            with self._changed:
                if not self._synced:
                    return
                acknowledge = self._synced.popleft()
            try:
                acknowledge()
            except Exception as error:  # noqa: BLE001  # the connection is gone: the broker delivers it again
                _log.warning("a message could not be acknowledged (%s); the broker delivers it again", _name(error))


def _nothing() -> None:
    pass


def _name(error: Exception) -> str:
    return error.slug if isinstance(error, Error) else type(error).__name__
