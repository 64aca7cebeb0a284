"""Copies of tasks that a push engine has taken and may lose, in the queue's PostgreSQL database."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from safedefer.queues import copies
from safedefer.queues.base import Copy
from safedefer.queues.postgres.statements import SQL, to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safedefer.queues.base import QueuedTask
    from safedefer.queues.postgres.connection import Connection
    from safedefer.queues.postgres.store import PostgresStore


class PostgresCopies:
    """``Copies`` in the queue's database. Every method may raise ``QueueUnavailable``."""

    def __init__(self, store: PostgresStore) -> None:
        self._store = store

    def put_many(self, tasks: Sequence[QueuedTask], /) -> None:
        """Store copies."""
        rows = [
            {"audience": task.audience, "task_id": task.id, "due": copies.first_look(task), "task": copies.dump(task)}
            for task in sorted(tasks, key=lambda task: (task.audience, task.id))
        ]
        self._store.run(lambda connection: connection.execute(SQL["copies_put"], to_json(rows)), idempotent=True)

    def look(self, *, now: float, limit: int) -> tuple[int, Sequence[Copy]]:
        """Look at copies that are due."""
        return self._store.run(partial(_look, now=now, limit=limit), purpose="relaxed")

    def put_off(self, keys: Sequence[tuple[str, str]], /, *, until: float) -> None:
        """Look at copies again at a time."""
        rows = _rows(keys)
        self._store.run(lambda connection: connection.execute(SQL["copies_put_off"], rows, until), purpose="relaxed")

    def delete(self, keys: Sequence[tuple[str, str]], /) -> None:
        """Delete copies."""
        rows = _rows(keys)
        self._store.run(lambda connection: connection.execute(SQL["copies_delete"], rows))


async def _look(connection: Connection, *, now: float, limit: int) -> tuple[int, list[Copy]]:
    rows = await connection.fetch(SQL["copies_look"], now, limit)
    if gone := [(row["audience"], row["task_id"]) for row in rows if row["state"] in {"ended", "odd"}]:
        await connection.execute(SQL["copies_delete"], _rows(gone))
    found = [row for row in rows if row["state"] == "open"]
    return len(rows), [Copy(row["audience"], row["task_id"], row["looks"], row["task"]) for row in found]


def _rows(keys: Sequence[tuple[str, str]]) -> str:
    return to_json([{"audience": audience, "task_id": task_id} for audience, task_id in sorted(keys)])
