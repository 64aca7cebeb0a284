"""Connections to the queue's SQLite file: opened per process, migrated, closed around a fork; how they wait for a locked file.

SQLite keeps the locks of a file in memory shared by all connections of a process. A child that
inherits that memory believes that it holds locks which only its parent has, also for connections
that it opens itself, and then one of the two may remove a write-ahead log under the other. So every
connection is closed before a fork, while nobody uses it, and both sides open new ones when they
need them.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from typing import TYPE_CHECKING, Final

import apsw

from safedefer.errors import QueueUnavailable
from safedefer.queues.sql import load_statements
from safedefer.queues.sqlite.trust import check_file, check_schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


SQL: Final = load_statements(__file__)
"""The statements of ``sqlite.sql`` by name."""

MIGRATIONS: Final = ("migration_1", "migration_2", "migration_3", "migration_4", "migration_5", "migration_6")
"""Step n brings the schema from version n - 1 to n. Steps are added, never changed."""

_FULL: Final = "the disk is full; free some space and try again"
#: SQLite says `disk I/O error` where it makes or extends the write-ahead log's index, of 32 KiB, on a disk that is full.
_WRITES: Final = frozenset({
    apsw.SQLITE_IOERR_SHMSIZE, apsw.SQLITE_IOERR_SHMMAP, apsw.SQLITE_IOERR_WRITE, apsw.SQLITE_IOERR_FSYNC,
    apsw.SQLITE_IOERR_TRUNCATE,
})  # fmt: skip
_FULL_BELOW: Final = 65_536

_REMEDIES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (apsw.BusyError, "another process kept it locked; look for a long transaction, or raise busy_timeout"),
    (apsw.LockedError, "another connection of this process kept it locked; look for a long transaction"),
    (apsw.FullError, _FULL),
    (apsw.IOError, "the disk did not read or write; look at the system's log"),
    (apsw.CorruptError, "the file is damaged; restore it from a backup"),
    (apsw.NotADBError, "the file is not a SQLite database; check the path of the queue"),
    (apsw.ReadOnlyError, "the file cannot be written; give this user write access to it and its directory"),
    (apsw.PermissionsError, "access is denied; give this user access to the file and its directory"),
    (apsw.CantOpenError, "the file cannot be opened; check that its directory exists and is writable"),
    (apsw.TooBigError, "a value is larger than SQLite takes; lower the limit on the size of tokens"),
    (apsw.NoMemError, "there is no memory; give the process more"),
    # Of making the file.
    (FileNotFoundError, "its folder does not exist; make it, or correct the path of the queue"),
    (NotADirectoryError, "its folder is a file; correct the path of the queue"),
    (IsADirectoryError, "it is a folder; name a file in it"),
    (PermissionError, "access is denied; give this user access to the file and its directory"),
    (OSError, "see that its folder can be written and that the disk is not full"),
)

_EAGER_TRIES: Final = 200
#: The most statements that are kept ready: those of several rows are others for each number of rows.
_STATEMENTS: Final = 300

_creating = threading.Lock()


def unavailable(path: str, cause: BaseException) -> QueueUnavailable:
    """Return the ``QueueUnavailable`` that says what failed and what to do about it."""
    remedy = next((text for kind, text in _REMEDIES if isinstance(cause, kind)), "look at the system's log")
    if isinstance(cause, apsw.IOError) and getattr(cause, "extendedresult", 0) in _WRITES and _is_full(path):
        remedy = _FULL
    error = QueueUnavailable(f"the queue's file {path} failed ({cause}): {remedy}")
    error.__cause__ = cause
    return error


def _is_full(path: str) -> bool:
    try:
        disk = os.statvfs(os.path.dirname(path) or ".")  # noqa: PTH120  # a text, as everywhere in the queue
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < _FULL_BELOW


def forked(path: str) -> QueueUnavailable:
    """Return the error of a process that was forked behind Python's back while the file was open."""
    return QueueUnavailable(
        f"the queue's file {path} was open when a program that is not Python forked this process; "
        "use the queue only after the fork (uWSGI: lazy-apps)"
    )


def _create_file(path: str) -> None:
    # Without opening it: to close a file that a connection of this process has open would drop its locks (POSIX). Mode 0600,
    # because signed tokens are worth stealing; SQLite gives its mode to the write-ahead log.
    with contextlib.suppress(FileExistsError):
        try:
            os.mknod(path, stat.S_IFREG | 0o600)
        except PermissionError:  # macOS lets only root do this
            with _creating:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))


def _migrate(connection: apsw.Connection, path: str) -> None:
    if _schema_version(connection, path) == len(MIGRATIONS):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute(SQL["schema_table"])
        # Asked again: another process may have migrated while this one waited for the lock.
        for version in range(_schema_version(connection, path) + 1, len(MIGRATIONS) + 1):
            connection.execute(SQL[MIGRATIONS[version - 1]])
            connection.execute(SQL["schema_set_version"], {"version": version})
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _make_tables(connection: apsw.Connection) -> None:
    """Make the tables of the current version in an empty database."""
    _migrate(connection, ":memory:")


def _schema_version(connection: apsw.Connection, path: str) -> int:
    if connection.execute(SQL["schema_has_table"]).get is None:
        return 0
    version = connection.execute(SQL["schema_version"]).get or 0
    if not isinstance(version, int):
        raise QueueUnavailable(
            f"the queue's file {path} has a schema version that is no number, which safedefer did not write; restore the file "
            "from a backup, or use another file"
        )
    if version > len(MIGRATIONS):
        raise QueueUnavailable(
            f"the queue's file {path} has schema version {version}, and this safedefer knows versions up to "
            f"{len(MIGRATIONS)}; upgrade safedefer, or use another file"
        )
    return version


def open_connection(path: str, *, busy_timeout: float) -> apsw.Connection:
    """Open the file, creating and migrating it as needed. ``busy_timeout`` is seconds.

    Raises ``QueueUnavailable``.
    """
    deadline = time.monotonic() + busy_timeout
    while True:
        try:
            return _try_to_open(path, busy_timeout=busy_timeout)
        except apsw.BusyError as error:
            # Not every lock is waited for: of two that make the same new file a write-ahead-log one,
            # SQLite turns one away at once, lest they wait for each other.
            if time.monotonic() >= deadline:
                raise unavailable(path, error) from error
            time.sleep(0.005)
        except (apsw.Error, OSError) as error:
            raise unavailable(path, error) from error


def _try_to_open(path: str, *, busy_timeout: float) -> apsw.Connection:
    connection: apsw.Connection | None = None
    try:
        _create_file(path)
        check_file(path)
        connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READWRITE, statementcachesize=_STATEMENTS)
        connection.set_busy_handler(_patience(busy_timeout))
        _configure(connection, path)
        _migrate(connection, path)
        check_schema(connection, path, _make_tables)
    except BaseException:
        _close_quietly(connection)
        raise
    return connection


def _patience(seconds: float) -> Callable[[int], bool]:
    """Return a busy handler that gives up after ``seconds``.

    SQLite's own sleeps up to 100 ms between two tries, and so hardly ever gets a lock that a busier
    process takes again within a millisecond.
    """
    deadline = 0.0

    def wait(tries: int) -> bool:
        nonlocal deadline
        now = time.monotonic()
        if tries == 0:
            deadline = now + seconds
        time.sleep(0.0005 if tries < _EAGER_TRIES else 0.005)
        return now < deadline

    return wait


def _configure(connection: apsw.Connection, path: str) -> None:
    # Before anything of the file is parsed: its schema calls no function that could do harm, and no statement changes it
    # by the back door.
    connection.config(apsw.SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0)
    connection.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 1)
    if connection.pragma("journal_mode", "wal") != "wal":
        raise QueueUnavailable(f"the file system of {path} cannot hold a write-ahead log; use a local disk")
    connection.pragma("synchronous", "FULL")
    connection.pragma("foreign_keys", value=True)
    connection.pragma("journal_size_limit", 64 * 2**20)
    # Copies of pages that a statement may have to restore, which would else be written to a temporary file.
    connection.pragma("temp_store", "MEMORY")
    # Kibibytes: the inner pages of the indexes of a million tasks. With SQLite's own 2 MB they are read again and again.
    connection.pragma("cache_size", -16 * 2**10)


def _close_quietly(connection: apsw.Connection | None) -> None:
    if connection is not None:
        # Closing checkpoints; when that fails the log stays, and the next to open the file replays it.
        with contextlib.suppress(apsw.Error):
            connection.close(force=True)


class Handle:
    """A connection that is opened when first used, by one thread at a time.

    Whoever makes one registers it, or something that passes the calls on, with ``register_fork``. ``make_file`` is called before it
    opens the file.
    """

    def __init__(self, path: str, *, busy_timeout: float, make_file: Callable[[], None] | None = None) -> None:
        self.path = path
        self._busy_timeout = busy_timeout
        self._make_file = make_file
        self._lock = threading.Lock()
        self._users: set[int] = set()
        """The threads that have the connection or wait for it, or fork the process."""
        self._connection: apsw.Connection | None = None
        self._pid = 0
        self._closed = False
        self._inode = (0, 0)
        self.connections: int = 0
        """How many were opened so far."""
        self.failures: int = 0
        """How many of them the disk made unusable."""

    @contextlib.contextmanager
    def use(self) -> Iterator[apsw.Connection]:
        """Give the connection to this thread alone; SQLite's errors become ``QueueUnavailable``."""
        user = threading.get_ident()
        if user in self._users:
            raise QueueUnavailable(
                "the queue was called from within one of its own operations, or a fork; call it later"
            )
        self._users.add(user)
        try:
            if self._connection is None and self._make_file is not None:
                self._make_file()
            with self._lock:
                try:
                    yield self._current()
                except apsw.Error as error:
                    self._discard_after(error)
                    raise unavailable(self.path, error) from error
        finally:
            self._users.discard(user)
            self._drop_if_closed()

    @property
    def is_unmade(self) -> bool:
        """Whether there is no file, or an empty one."""
        try:
            return os.stat(self.path).st_size == 0  # noqa: PTH116 - as in ``_stat``
        except OSError:
            return True

    @property
    def in_use(self) -> bool:
        """Whether a thread has the connection now."""
        return self._lock.locked()

    @property
    def in_use_here(self) -> bool:
        """Whether this thread has it, or waits for it, further up its stack: a signal handler or a finalizer asks."""
        return threading.get_ident() in self._users

    def wait(self) -> None:
        """Wait until no thread has the connection, once."""
        with self._lock:
            pass

    def close(self, *, wait: bool = True) -> None:
        """Close the connection; the handle cannot be used again.

        Without ``wait``, a connection that is used now is closed by who uses it: the garbage collector calls this
        in any thread, also in one that a fork waits for.
        """
        self._closed = True
        if wait:
            with self._lock:
                self._drop()
        else:
            self._drop_if_closed()

    def _drop_if_closed(self) -> None:
        if self._closed and self._lock.acquire(blocking=False):
            try:
                self._drop()
            finally:
                self._lock.release()

    def _current(self) -> apsw.Connection:
        if self._closed:
            raise QueueUnavailable("the queue is closed; open a new one")
        if self._connection is None:
            self._connection = open_connection(self.path, busy_timeout=self._busy_timeout)
            self._pid = os.getpid()
            self._inode = self._stat()
            self.connections += 1
        elif self._pid != os.getpid():
            raise forked(self.path)
        elif self._inode != self._stat():
            # What is written now would be in no file that anybody can open again.
            raise QueueUnavailable(
                f"the queue's file {self.path} was moved, deleted or replaced while open; restart this process"
            )
        return self._connection

    def _stat(self) -> tuple[int, int]:
        try:
            status = os.stat(self.path)  # noqa: PTH116 - once for every use, and Path costs twice as much
        except OSError:
            return (-1, -1)
        return status.st_dev, status.st_ino

    def _discard_after(self, error: apsw.Error) -> None:
        # A connection may stay unusable after these, and opening again costs little.
        if isinstance(error, (apsw.IOError, apsw.CorruptError, apsw.NotADBError, apsw.CantOpenError)):
            self.failures += 1
            self._drop()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if self._pid == os.getpid():
            _close_quietly(connection)

    def before_fork(self) -> None:
        """Wait until nobody uses the connection, and close it."""
        self._users.add(threading.get_ident())
        self._lock.acquire()
        self._drop()

    def after_fork_in_parent(self) -> None:
        """Let it be used again."""
        self._lock.release()
        self._users.discard(threading.get_ident())
        self._drop_if_closed()

    def after_fork_in_child(self) -> None:
        """Let it be used again."""
        self._lock.release()
        self._users.clear()
        self._drop_if_closed()
