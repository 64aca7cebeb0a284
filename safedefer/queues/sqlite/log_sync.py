"""Syncs of the log beside the queue's file, outside of transactions: meanwhile others commit."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import apsw

from safedefer.queues.sqlite.connection import unavailable

if TYPE_CHECKING:
    from safedefer.queues.sqlite.connection import Handle
    from safedefer.queues.sqlite.writer import Writer

#: Without the times of the file, where the system has such a call.
_sync: Final = getattr(os, "fdatasync", os.fsync)


class LogSync:
    """Syncs the log of a queue's file: what any process has committed to it without a sync is on the disk then.

    A commit is in the log, or in the file: SQLite syncs the log before it copies it into the file, and the file before it
    writes over the log. So no lock is needed, and no writer waits. SQLite takes its locks on the file and its ``-shm``:
    closing this descriptor of the log ends none of them.

    What a sync could not write the system may drop, and it says so once. The next sync would succeed, with a hole in the log,
    and nothing behind a hole survives a power cut. So after an error, ours or the writer's, the log is copied into the file.

    Args:
        path: The queue's file.
        writer: Whoever commits.
        reader: Copies the log.
    """

    def __init__(self, path: str, writer: Writer, reader: Handle) -> None:
        self._log = Path(f"{path}-wal")
        self._writer = writer
        self._reader = reader
        self._known: tuple[int, int, int] | None = None
        self._failures = 0
        """The failures of the writer, and ours, after which the log was copied."""
        self._own_failures = 0

    def __call__(self) -> None:
        """Sync the log. Raises ``QueueUnavailable``."""
        try:
            # Without a log: the last process that closed the file has copied all of it.
            with suppress(FileNotFoundError):
                self._sync()
            failures = self._own_failures + self._writer.failures
            if failures != self._failures:
                self._copy()
                self._failures = failures  # another may have come meanwhile
        except OSError as error:
            self._own_failures += 1
            raise unavailable(str(self._log), error) from error

    def _sync(self) -> None:
        log = os.open(self._log, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _sync(log)
            status = os.fstat(log)
        finally:
            os.close(log)
        # A log of a new connection may be a new one, though it has the number of one that was deleted.
        which = status.st_dev, status.st_ino, self._writer.connections
        if self._known != which:  # its name is to be on the disk too
            folder = os.open(self._log.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            self._known = which

    def _copy(self) -> None:
        with self._reader.use() as connection:
            connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_FULL)
