"""Producers: the psycopg connections of threads that enqueue, and the retry of a commit whose answer was lost."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import deque
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from psycopg.types.array import ListBinaryDumper
from psycopg.types.datetime import TimedeltaBinaryDumper
from psycopg.types.numeric import FloatBinaryDumper, IntBinaryDumper
from psycopg.types.string import BytesBinaryDumper, StrBinaryDumper

from safedefer.errors import TaskAlreadyExistsError, TombstonedTaskError
from safedefer.queues.base import AlreadyWaiting
from safedefer.queues.postgres import errors
from safedefer.queues.postgres.errors import about, closed, failure, is_gone, refusal
from safedefer.queues.postgres.statements import SQL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

#: Seconds that a producer waits for a connection that another thread uses, or for a server that restarts; and once more,
#: when the answer to a commit was lost, to find out whether its tasks were stored.
PATIENCE: Final = 5.0
_CONNECT_SECONDS: Final = 5
_STATEMENT_SECONDS: Final = 60
#: Seconds between two attempts to connect.
AGAIN_SECONDS: Final = 0.1
#: A connection that was idle for so long is closed.
_IDLE_SECONDS: Final = 300.0

_Connection: TypeAlias = psycopg.Connection[Any]

#: Arrays of these types are sent in binary. As text, each element is quoted and parsed: a batch took twice as long.
_BINARY: Final = (
    (list, ListBinaryDumper),
    (str, StrBinaryDumper),
    (bytes, BytesBinaryDumper),
    (int, IntBinaryDumper),
    (float, FloatBinaryDumper),
    (timedelta, TimedeltaBinaryDumper),
)


#: Numbers of two parameters of the statement.
_UNIQUE_KEYS: Final = 9
_QUEUES: Final = 13
#: Numbers of the parameters that are arrays of a value per task, never NULL. For a single task they are sent as plain values:
#: making the arrays took psycopg half as long as all the rest of the call.
_OF_EACH: Final = frozenset({1, 2, 3, 4, 5, 6, 13})
_EACH: Final = re.compile(rf"\$({'|'.join(map(str, sorted(_OF_EACH)))})::([a-z]+)\[\]")


class _Exhausted(Exception):
    """All connections are in use by other threads, and none became free in time."""


class Producers:
    """Enqueues tasks for any number of threads, on connections that are made when they are needed.

    Args:
        dsn: The database.
        most: Connections at most.
        statement: Enqueues a batch of tasks.
        stored: Counts the given ids that are stored.
        free: Deletes those of the given queues' unique keys whose task is gone.
    """

    def __init__(self, dsn: str, most: int, statement: str, stored: str, free: str) -> None:
        self._dsn = dsn
        self._most = most
        self._statement = statement.encode()
        self._statement_of_one = _EACH.sub(r"ARRAY[$\1::\2]", statement).encode()
        self._stored = stored.encode()
        self._free = free.encode()
        self._changed = threading.Condition()
        self._idle: deque[tuple[float, _Connection]] = deque()
        """Each with the time when it became idle; the one used last is at the end, and taken first."""
        self._open = 0
        self._closed = False

    def close(self) -> None:
        """Disconnect; connections in use are closed when their threads give them back."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._drop_idle()

    # --- Connections ---

    def _take(self, deadline: float) -> _Connection:
        with self._changed:
            while not self._closed:
                with contextlib.suppress(IndexError):  # asked for at once: a signal handler may take the last one
                    return self._idle.pop()[1]
                if self._open < self._most:
                    self._open += 1
                    break
                if not self._changed.wait(deadline - time.monotonic()):
                    raise _Exhausted(f"other threads have all {self._most} connections")
            else:
                raise closed(self._dsn)
        try:
            return self._connect()
        except BaseException:
            self._one_less()
            raise

    def _connect(self) -> _Connection:
        given = conninfo_to_dict(self._dsn)
        # Defaults that detect a vanished server; parameters in the user's DSN override them.
        alive = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}
        own = f"-c jit=off -c statement_timeout={_STATEMENT_SECONDS}s"
        # The last of two settings of one name counts: the path of the DSN does not.
        options = f"{own} {given.get('options', '')} -c search_path={errors.SEARCH_PATH}"
        parameters = {"connect_timeout": _CONNECT_SECONDS, **alive, **given, "options": options}
        connection = psycopg.connect("", autocommit=True, **{**parameters, "application_name": "safedefer"})  # type: ignore[arg-type]  # libpq's, by name
        try:
            connection.execute(SQL["sync_commits"].encode())
        except BaseException:
            connection.close()
            raise
        for kind, dumper in _BINARY:
            connection.adapters.register_dumper(kind, dumper)
        return connection

    def _give(self, connection: _Connection) -> None:
        """Take a connection back; one that is broken, or in a transaction, is closed."""
        usable = not connection.closed and connection.info.transaction_status is TransactionStatus.IDLE
        with self._changed:
            if usable and not self._closed:
                self._idle.append((time.monotonic(), connection))
                self._changed.notify()
                connection = self._oldest()
        if connection is not None:
            connection.close()
            self._one_less()

    def _oldest(self) -> Any:
        """Remove the connection that was idle longest and return it, if that was ``_IDLE_SECONDS`` or more; else None."""
        if not self._idle or time.monotonic() - self._idle[0][0] < _IDLE_SECONDS:
            return None
        return self._idle.popleft()[1]

    def _one_less(self) -> None:
        with self._changed:
            self._open -= 1
            self._changed.notify()

    def _drop_idle(self) -> None:
        with self._changed:
            idle, self._idle = self._idle, deque()
            self._open -= len(idle)
            self._changed.notify(len(idle))
        for _, connection in idle:
            connection.close()

    # --- Storing ---

    def store(self, batches: Iterator[tuple[tuple[object, ...], set[str]]]) -> bool:
        """Enqueue batches of tasks in one transaction.

        When the connection breaks, the transaction is repeated on another one. If the first commit had succeeded and only
        its answer was lost, the repetition is refused because the ids exist; if all of the ids exist, they were stored.

        Args:
            batches: The parameters and ids of each batch.

        Returns:
            Whether there were any batches.

        Raises:
            QueueUnavailable: The database failed. A refusal, and an exception of the iterator, are raised as they are.
        """
        attempt = _Attempt(_Made(batches), time.monotonic() + PATIENCE)
        while True:
            connection = None
            try:
                connection = self._take(attempt.deadline)
                return self._store(connection, attempt.made)
            except _Exhausted as error:
                raise failure(self._dsn, error, in_doubt=attempt.in_doubt) from error
            except psycopg.Error as error:
                if error is attempt.made.failure:
                    raise
                if connection is not None and not connection.closed and not is_gone(error):
                    stored = partial(self._are_stored, connection)
                    if attempt.was_done(self._dsn, error, stored, partial(self._free_keys, connection)):
                        return True
                elif attempt.may_go_on(sent=connection is not None):
                    self._recover(connection)
                else:
                    raise failure(self._dsn, error, in_doubt=attempt.in_doubt) from error
            finally:
                if connection is not None:
                    self._give(connection)

    def _recover(self, connection: _Connection | None) -> None:
        """Prepare another attempt: wait a little if there was no connection, else close this one and all idle ones."""
        if connection is None:
            time.sleep(AGAIN_SECONDS)
            return
        with contextlib.suppress(psycopg.Error):
            connection.close()
        self._drop_idle()  # a restart of the server breaks all of them

    def _store(self, connection: _Connection, made: _Made) -> bool:
        batches = iter(made)
        first = next(batches, None)
        if first is None:
            return False
        following = next(batches, None)
        if following is None:  # one statement is one transaction
            self._insert(connection, first)
            return True
        # Pipeline mode: the server stores a batch while this thread makes the next one.
        with connection.pipeline(), connection.transaction():
            for batch in chain((first, following), batches):
                self._insert(connection, batch)
        return True

    def _are_stored(self, connection: _Connection, ids: set[str]) -> bool:
        try:
            cursor = psycopg.RawCursor(connection).execute(self._stored, ([*ids],))
            (number,) = cursor.fetchone() or (0,)
        except psycopg.Error as error:
            raise failure(self._dsn, error, in_doubt=True) from error
        return bool(number == len(ids))

    def _free_keys(self, connection: _Connection, batches: Sequence[tuple[Any, ...]]) -> bool:
        """Delete the unique keys of batches whose task is gone; whether there were any."""
        freed = 0
        for values in batches:
            queues, keys = values[_QUEUES - 1], values[_UNIQUE_KEYS - 1]
            if keys is not None:
                freed += psycopg.RawCursor(connection).execute(self._free, (queues, keys)).rowcount
        return freed > 0

    def _insert(self, connection: _Connection, values: tuple[Any, ...]) -> None:
        statement = self._statement
        if len(values[0]) == 1:
            statement = self._statement_of_one
            values = tuple(value[0] if number in _OF_EACH else value for number, value in enumerate(values, start=1))
        psycopg.RawCursor(connection).execute(statement, values)


class _Made:
    """Batches taken from an iterator once, and kept so that they can be sent again."""

    def __init__(self, batches: Iterator[tuple[tuple[object, ...], set[str]]]) -> None:
        self._batches = batches
        self._made: list[tuple[object, ...]] = []
        self.ids: set[str] = set()
        self.complete = False
        """Whether the iterator is exhausted: before that no commit was sent."""
        self.failure: BaseException | None = None
        """The exception that the iterator raised."""

    @property
    def batches(self) -> Sequence[tuple[object, ...]]:
        """What was taken so far."""
        return self._made

    def __iter__(self) -> Iterator[tuple[object, ...]]:
        yield from list(self._made)
        try:
            for values, ids in self._batches:
                self._made.append(values)
                self.ids |= ids
                yield values
        except BaseException as error:
            self.failure = error
            raise
        self.complete = True


class _Attempt:
    """The state of one ``store`` call over its attempts."""

    def __init__(self, made: _Made, deadline: float) -> None:
        self.made = made
        self.deadline = deadline
        self.in_doubt = False
        """Whether the answer to a commit was lost."""
        self._looked = False
        self._freed = False

    def may_go_on(self, *, sent: bool) -> bool:
        """Whether to try again after a connection broke (``sent``), or could not be made."""
        if sent and self.made.complete and not self.in_doubt:
            self.in_doubt, self.deadline = True, time.monotonic() + PATIENCE
        return time.monotonic() < self.deadline

    def was_done(
        self,
        dsn: str,
        error: psycopg.Error,
        are_stored: Callable[[set[str]], bool],
        free_keys: Callable[[Sequence[tuple[object, ...]]], bool],
    ) -> bool:
        """Decide on an error that the server answered.

        Returns:
            True: an attempt before was committed. False: try again.

        Raises:
            Exception: The error of safedefer that a refusal stands for, or ``QueueUnavailable``.
        """
        if isinstance(error, psycopg.errors.DeadlockDetected) and time.monotonic() < self.deadline:
            return False
        refused = refusal(error)
        if isinstance(refused, AlreadyWaiting) and not self._freed:
            self._freed = True
            try:
                if free_keys(self.made.batches):
                    return False
            except psycopg.errors.InsufficientPrivilege:
                pass  # App says which row is in the way
        if self.in_doubt and isinstance(refused, TaskAlreadyExistsError | TombstonedTaskError):
            if about(error) in self.made.ids:
                # One of our ids exists. Only a committed attempt stores all of them; the one may be older than this call.
                if are_stored(self.made.ids):
                    return True
            elif not self._looked:
                # The name, key or blob in the way may be that of the attempt before, committed after its connection broke.
                self._looked = True
                return False
        raise (refused or failure(dsn, error, in_doubt=self.in_doubt)) from error
