"""Pages of the tasks of one state, and counts of what ended, for people who look: bounded work, however many tasks there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from safedefer.queues.base import (
    NOTICE_SECONDS,
    NOTICES,
    AttemptTime,
    EndCount,
    ListedTask,
    Notice,
    Position,
    TaskPage,
    TaskState,
    queue_of,
)
from safedefer.queues.sqlite.connection import SQL
from safedefer.queues.sqlite.repair import BadValue
from safedefer.queues.sqlite.rows import task_view

if TYPE_CHECKING:
    import apsw

#: The largest number of a row.
_LAST: Final = 2**63 - 1
_CONDITIONS: Final = {
    TaskState.WAITING: ("view_tasks", "WHERE owner IS NULL"),
    # Few tasks run at a time; without the hint SQLite looks for them among all that wait.
    TaskState.RUNNING: ("view_tasks", "INDEXED BY safedefer_tasks_leased WHERE owner IS NOT NULL"),
    TaskState.DEAD: ("view_dead", "WHERE archived IS NULL"),
    TaskState.SUCCEEDED: ("view_ended", "INDEXED BY safedefer_ended_state WHERE state = 'succeeded'"),
    TaskState.CANCELLED: ("view_ended", "INDEXED BY safedefer_ended_state WHERE state = 'cancelled'"),
}
#: Seconds by which the clock of another process may be ahead.
_AHEAD: Final = 60.0
_WAITING_IN_QUEUE: Final = "INDEXED BY safedefer_tasks_of_queue WHERE owner IS NULL AND queue = :queue"


def page(
    connection: apsw.Connection, state: TaskState, *, queue: str | None, after: Position | None, look: int
) -> TaskPage:
    """Return tasks of one state by the numbers of their rows, which fall, from the one behind ``after`` on."""
    view, condition = _CONDITIONS[state]
    if state is TaskState.WAITING and queue is not None:
        condition = _WAITING_IN_QUEUE
    # Somebody may have written any number into a link, and any into a row.
    last = _LAST if after is None else int(min(max(after[0], 1 - _LAST), _LAST)) - 1
    statement = (
        f"SELECT seq, {SQL[view].removeprefix('SELECT ')} {condition} AND seq <= :last ORDER BY seq DESC LIMIT :look"
    )
    values = {"last": last, "look": look, "queue": queue}
    rows: list[tuple[Any, ...]] = connection.execute(statement, values).fetchall()
    listed = [ListedTask((row[0], str(row[1])), task_view(row[1:])) for row in rows]
    found = [task for task in listed if queue in {None, task.view.queue}]
    return TaskPage(found, listed[-1].position if len(listed) == look else None)


def ends(connection: apsw.Connection, *, since: float, step: float, most: int) -> list[EndCount]:
    """Count what ended since a time, in steps of ``step`` seconds."""
    values = {"since": since, "step": step, "most": most}
    rows: list[tuple[Any, ...]] = connection.execute(SQL["ends"], values).fetchall()
    return [EndCount(str(queue), TaskState(state), number, count) for queue, state, number, count in rows]


def attempt_times(connection: apsw.Connection, *, since: float, most: int) -> list[AttemptTime]:
    """Return how long the newest attempts took."""
    rows: list[tuple[Any, ...]] = connection.execute(SQL["attempt_times"], {"since": since, "most": most}).fetchall()
    return [AttemptTime(queue_of(str(audience)), max(seconds, 0.0)) for audience, seconds in rows]


def put_notice(connection: apsw.Connection, *, process: str, text: str, now: float) -> None:
    """Store what a process says of itself, and delete what is old, within a transaction."""
    connection.execute(SQL["notices_prune"], {"before": now - NOTICE_SECONDS, "after": now + _AHEAD})
    values = {"process": process, "text": text, "now": now}
    if text:
        connection.execute(SQL["notice_put"], values)
    else:
        connection.execute(SQL["notice_delete"], {"process": process})


def notices(connection: apsw.Connection, *, since: float) -> list[Notice]:
    """Return the newest notices."""
    rows: list[tuple[Any, ...]] = connection.execute(SQL["notices"], {"since": since, "most": NOTICES}).fetchall()
    if not all(type(process) is type(text) is str and type(at) is float for process, text, at in rows):
        raise BadValue
    return [Notice(*row) for row in rows]
