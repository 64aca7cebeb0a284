"""Acknowledgements of a Celery worker that wait for one sync of the store, for all that its children have ended meanwhile.

A child whose task has ended commits that to the store without a sync, and takes the next task. Its parent acknowledges the
message to the broker, once a sync that began after the child's answer has returned. So a message that is gone has an end that
survives a power cut, as if the child had waited, and several ends share a sync.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from kombu.asynchronous import get_event_loop

from safedefer.errors import Error

_log: Final = logging.getLogger("safedefer.celery")

#: Seconds between two tries of a sync.
_AGAIN_SECONDS: Final = 0.5


class Acknowledgements:
    """Those of one parent of worker processes. All methods but the thread's are called in the parent's main thread.

    Args:
        sync: Has the store sync what was committed so far.
    """

    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync = sync
        self._waiting: deque[Callable[[], None]] = deque()
        self._syncing: deque[Callable[[], None]] = deque()
        self._synced: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def add(self, acknowledge: Callable[[], None], *, last: bool = False) -> None:
        """Call a function in this thread, once a sync that begins from now on has returned; at once where it is one of the last."""
        hub: Any = get_event_loop()
        with self._changed:
            self._waiting.append(acknowledge)
            if hub is not None and not last:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name="safedefer-sync", daemon=True)
                    self._thread.start()
                self._changed.notify()
                if self._read not in hub.readers:  # a new connection to the broker has the hub forget it
                    hub.add_reader(self._read, self._on_synced)
                return
        self.flush()  # no event loop, or its end: there is no later

    def flush(self) -> None:
        """Sync, and acknowledge all that waits; without a sync nothing, and the broker delivers it again."""
        with self._changed:
            # What the thread has a sync for is in this one too: it may be over before.
            waiting = [*self._syncing, *self._waiting]
            self._syncing.clear()
            self._waiting.clear()
        if waiting:
            try:
                self._sync()
            except Exception as error:  # noqa: BLE001  # whatever the store's library raises
                _log.error("the store does not sync (%s); the broker delivers its tasks again", _name(error))
                return
        with self._changed:
            self._synced.extend(waiting)
        self._acknowledge()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                self._syncing, self._waiting = self._waiting, deque()
            self._sync_at_last()
            with self._changed:
                self._synced.extend(self._syncing)
                self._syncing = deque()
            with contextlib.suppress(BlockingIOError):  # the main thread has enough to read
                os.write(self._write, b"x")

    def _sync_at_last(self) -> None:
        failing = False
        while True:
            try:
                self._sync()
            except Exception as error:  # noqa: BLE001  # as in flush
                if not failing:
                    _log.warning("the store does not sync (%s); trying again", _name(error))
                failing = True
                time.sleep(_AGAIN_SECONDS)
            else:
                return

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


def _name(error: Exception) -> str:
    return error.slug if isinstance(error, Error) else type(error).__name__
