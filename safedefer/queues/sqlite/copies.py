"""Copies of tasks that a push engine has taken and may lose, in the queue's SQLite file."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from safedefer.queues import copies
from safedefer.queues.base import Copy
from safedefer.queues.sqlite.connection import SQL
from safedefer.queues.sqlite.repair import TEXT, WHOLE, Kinds

if TYPE_CHECKING:
    from collections.abc import Sequence

    import apsw

    from safedefer.queues.base import QueuedTask
    from safedefer.queues.sqlite.writer import Writer

_DUE: Final = Kinds(WHOLE, TEXT, TEXT, WHOLE, TEXT)
_TASK: Final = Kinds(TEXT)


class SQLiteCopies:
    """``Copies`` in the queue's file."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def put_many(self, tasks: Sequence[QueuedTask], /) -> None:
        """Store copies."""
        self._writer.run(partial(_put_many, tasks=tasks))

    def look(self, *, now: float, limit: int) -> tuple[int, Sequence[Copy]]:
        """Look at copies that are due."""
        return self._writer.run(partial(_look, now=now, limit=limit), durable=False)

    def put_off(self, keys: Sequence[tuple[str, str]], /, *, until: float) -> None:
        """Look at copies again at a time."""
        values = [(until, *key) for key in keys]
        self._writer.run(
            lambda connection: connection.executemany(SQL["copies_put_off"], values).close(), durable=False
        )

    def delete(self, keys: Sequence[tuple[str, str]], /) -> None:
        """Delete copies."""
        self._writer.run(lambda connection: connection.executemany(SQL["copies_delete"], keys).close())


def _put_many(connection: apsw.Connection, *, tasks: Sequence[QueuedTask]) -> None:
    for task in tasks:
        values = {
            "audience": task.audience,
            "task_id": task.id,
            "due": copies.first_look(task),
            "task": copies.dump(task),
        }
        connection.execute(SQL["copies_put"], values)


def _look(connection: apsw.Connection, *, now: float, limit: int) -> tuple[int, list[Copy]]:
    due: list[tuple[Any, ...]] = connection.execute(SQL["copies_due"], {"now": now, "limit": limit}).fetchall()
    found = []
    for row in due:
        place, audience, task_id, stored, state = _DUE.check(row)
        looks = copies.count(stored)
        if state in {"ended", "odd"}:
            connection.execute(SQL["copies_forget"], (place,))
            continue
        connection.execute(SQL["copies_looked"], (now + copies.wait(looks), looks + 1, place))
        if state == "open":
            task: Any = connection.execute(SQL["copies_task"], (place,)).get
            _TASK.check((task,))
            found.append(Copy(audience, task_id, looks, task))
    return len(due), found
