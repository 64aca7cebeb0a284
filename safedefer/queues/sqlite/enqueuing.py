"""Enqueueing for several callers in a transaction. What is stored in the usual way is stored together, in one statement."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from safedefer.queues.sqlite.batch import Joint
from safedefer.queues.sqlite.connection import SQL
from safedefer.queues.sqlite.many import execute_rows
from safedefer.queues.sqlite.operations import enqueue, newest_seq
from safedefer.queues.sqlite.rows import plain_task_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    import apsw

    from safedefer.queues.base import QueuedTask

#: The most tasks of one statement. SQLite keeps statements ready: those of 1 to 256 tasks, all of them, take 24 MB.
_PART: Final = 64


class Enqueue(Joint):
    """Stores tasks of one caller, all or none; returns the number of a task that is not older than these.

    Args:
        tasks: Those.
        blob_limit: The most bytes of all stored blobs.
    """

    def __init__(self, tasks: Sequence[QueuedTask], blob_limit: int) -> None:
        self.tasks = tasks
        self.blob_limit = blob_limit

    def __call__(self, connection: apsw.Connection) -> int:
        """Do it within a transaction. Raises what ``operations.enqueue`` raises."""
        return self.run_together(connection, [self])[0]

    def run_together(self, connection: apsw.Connection, actions: Sequence[Enqueue]) -> list[int]:
        """Do it for several callers; what is raised says nothing of whose tasks are wrong.

        Raises:
            BadValue, DeferError: As ``operations.enqueue``.
        """
        newest = newest_seq(connection)
        plain: list[QueuedTask] = []
        others: list[Enqueue] = []
        for action in actions:
            if all(map(_is_plain, action.tasks)):
                plain += action.tasks
            else:
                others.append(action)
        for first in range(0, len(plain), _PART):
            newest = _store_plain(connection, plain[first : first + _PART])
        for action in others:
            for task in action.tasks:
                newest = enqueue(connection, task, blob_limit=action.blob_limit)
        return [newest] * len(actions)


def _store_plain(connection: apsw.Connection, tasks: Sequence[QueuedTask]) -> int:
    if len(tasks) == 1 or _is_taken(connection, tasks):  # one by one, to say which it is
        return [enqueue(connection, task, blob_limit=0) for task in tasks][-1]
    execute_rows(connection, "tasks_insert", [plain_task_values(task) for task in tasks])
    return connection.last_insert_rowid()


def _is_plain(task: QueuedTask) -> bool:
    """Whether nothing but the id of a task must be looked up before it is stored."""
    return task.name is None and task.unique_key is None and task.blob is None


def _is_taken(connection: apsw.Connection, tasks: Sequence[QueuedTask]) -> bool:
    """Whether one of these ids is known, or given twice."""
    ids = {task.id for task in tasks}
    known = connection.execute(SQL["ids_taken"], {"ids": json.dumps(list(ids))}).get
    return len(ids) < len(tasks) or known is not None
