"""Syncs of the log beside the queue's file, outside of transactions: meanwhile others commit."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from safedefer.queues.sqlite.connection import unavailable

#: Without the times of the file, where the system has such a call.
_sync: Final = getattr(os, "fdatasync", os.fsync)


class LogSync:
    """Syncs the log of a queue's file: what any process has committed to it without a sync is on the disk then.

    A commit is in the log, or in the file: SQLite syncs the log before it copies it into the file, and the file before it
    writes over the log. So no lock is needed, and no writer waits. SQLite takes its locks on the file and its ``-shm``:
    closing this descriptor of the log ends none of them.
    """

    def __init__(self, path: str) -> None:
        self._log = Path(f"{path}-wal")
        self._known: tuple[int, int] | None = None

    def __call__(self) -> None:
        """Sync the log. Raises ``QueueUnavailable``."""
        try:
            # Without a log: the last process that closed the file has copied all of it.
            with suppress(FileNotFoundError):
                self._sync()
        except OSError as error:
            raise unavailable(str(self._log), error) from error

    def _sync(self) -> None:
        log = os.open(self._log, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _sync(log)
            status = os.fstat(log)
        finally:
            os.close(log)
        if self._known != (which := (status.st_dev, status.st_ino)):  # a new file: its name is to be on the disk too
            folder = os.open(self._log.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            self._known = which
