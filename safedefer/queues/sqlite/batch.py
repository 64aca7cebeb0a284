"""Operations that share one transaction of the SQLite engine, and so one fsync.

If one of them fails, all are undone and run again, each in a savepoint, so that it does not spoil the others: savepoints cost a
copy of every page that changes. One that meets an unreadable value runs again, once the value is repaired. So an operation may
run twice; what it did before is undone. Success is reported only after COMMIT has returned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final

import apsw

from safedefer.errors import QueueUnavailable
from safedefer.queues.sqlite.connection import Handle, unavailable
from safedefer.queues.sqlite.repair import BadValue, mend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Somebody wrote a value that its column does not take, and now it would have been copied, or calculated with.
_OF_VALUES: Final = (apsw.SQLITE_CONSTRAINT_DATATYPE, apsw.SQLITE_CONSTRAINT_NOTNULL)
#: What is to be done, who takes its result or its error, and whether it must be synced.
Operation = tuple["Callable[[apsw.Connection], Any]", "Callable[[Any, BaseException | None], None]", bool]


class Joint(ABC):
    """An operation that several callers ask for at once, in fewer steps than one by one. There is one such kind."""

    @abstractmethod
    def __call__(self, connection: apsw.Connection) -> Any:
        """Do it for one caller."""

    @abstractmethod
    def run_together(self, connection: apsw.Connection, actions: Sequence[Any]) -> Sequence[Any]:
        """Do it for several callers, this one among them, and return their results."""


class Synced:
    """Whether commits of the writer's connection are synced: said to SQLite only where that changes."""

    def __init__(self) -> None:
        self._said: tuple[apsw.Connection | None, bool] = (None, False)

    def set(self, connection: apsw.Connection, *, durable: bool) -> None:
        """Sync the following commits, or do not. The caller has the connection to itself."""
        if self._said[0] is not connection or self._said[1] is not durable:
            self._said = (None, False)  # until it is done
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._said = (connection, durable)


class Batch:
    """Operations that share one transaction."""

    def __init__(self, handle: Handle, synced: Synced, operations: list[Operation]) -> None:
        self._handle = handle
        self._synced = synced
        self._operations = operations
        self._outcomes: list[tuple[Callable[[Any, BaseException | None], None], Any, BaseException | None]] = []

    def run(self) -> None:
        """Run, commit, and answer every caller. Never raises."""
        try:
            with self._handle.use() as connection:
                self._transact(connection)
        except BaseException as error:  # noqa: BLE001 - whatever it is, callers wait for an answer
            for _, answer, _ in self._operations:
                answer(None, self._failure(error))
            return
        for answer, result, failure in self._outcomes:
            answer(result, failure)

    def run_here(self) -> None:
        """Run, commit, and answer, in the thread of the only caller. ``KeyboardInterrupt`` and the like are raised."""
        try:
            with self._handle.use() as connection:
                self._transact(connection)
        except Exception as error:  # noqa: BLE001 - as `run`
            trouble = self._failure(error)
            raise trouble from trouble.__cause__
        for answer, result, failure in self._outcomes:
            answer(result, failure)

    def _failure(self, error: BaseException) -> QueueUnavailable:
        # One exception for each caller: a traceback belongs to one thread.
        failure = QueueUnavailable(str(error) if isinstance(error, QueueUnavailable) else f"the write failed: {error}")
        failure.__cause__ = error.__cause__ or error
        return failure

    def _transact(self, connection: apsw.Connection) -> None:
        durable = any(durable for _, _, durable in self._operations)
        self._synced.set(connection, durable=durable)
        self._commit(connection)

    def _commit(self, connection: apsw.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        try:
            if not self._run_together(connection):
                connection.execute("ROLLBACK")
                connection.execute("BEGIN IMMEDIATE")
                for action, answer, _ in self._operations:
                    self._outcomes.append((answer, *self._attempt(connection, action)))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _run_together(self, connection: apsw.Connection) -> bool:
        """Run all operations; return False if one failed, and the transaction is to be undone."""
        outcomes = []
        joint = []
        try:
            for action, answer, _ in self._operations:
                if isinstance(action, Joint):
                    joint.append((action, answer))
                else:
                    outcomes.append((answer, action(connection), None))
            if joint:
                results = joint[0][0].run_together(connection, [action for action, _ in joint])
                outcomes += [(answer, result, None) for (_, answer), result in zip(joint, results, strict=True)]
        except Exception:
            if not connection.in_transaction:
                raise  # Some errors (disk full, I/O) end the whole transaction.
            return False
        self._outcomes.extend(outcomes)
        return True

    def _attempt(
        self, connection: apsw.Connection, action: Callable[[apsw.Connection], Any]
    ) -> tuple[Any, BaseException | None]:
        result, failure = self._try(connection, action)
        if isinstance(failure, UnicodeDecodeError | BadValue):
            # One row that somebody wrote must not keep the others from being settled.
            result, failure = self._try(connection, mend)
            if failure is None:
                result, failure = self._try(connection, action)
            if isinstance(failure, BadValue):
                failure = QueueUnavailable(
                    "a row of the queue's file holds what its columns do not take; repair the file"
                )
        return result, failure

    def _try(
        self, connection: apsw.Connection, action: Callable[[apsw.Connection], Any]
    ) -> tuple[Any, BaseException | None]:
        connection.execute("SAVEPOINT operation")
        try:
            result = action(connection)
        except Exception as error:
            if not connection.in_transaction:
                raise  # Some errors (disk full, I/O) end the whole transaction.
            connection.execute("ROLLBACK TO operation")
            connection.execute("RELEASE operation")
            if getattr(error, "extendedresult", None) in _OF_VALUES:
                return None, BadValue()
            return None, unavailable(self._handle.path, error) if isinstance(error, apsw.Error) else error
        connection.execute("RELEASE operation")
        return result, None
