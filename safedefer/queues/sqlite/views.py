"""Pages of the tasks of one state, and counts of what ended, for people who look: bounded work, however many tasks there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from safedefer.queues.base import EndCount, ListedTask, Position, TaskPage, TaskState
from safedefer.queues.sqlite.connection import SQL
from safedefer.queues.sqlite.repair import MOST_SEQ
from safedefer.queues.sqlite.rows import task_view

if TYPE_CHECKING:
    import apsw

_CONDITIONS: Final = {
    TaskState.WAITING: ("view_tasks", "page_waiting"),
    TaskState.RUNNING: ("view_tasks", "page_running"),
    TaskState.DEAD: ("view_dead", "page_dead"),
    TaskState.SUCCEEDED: ("view_ended", "page_ended"),
    TaskState.CANCELLED: ("view_ended", "page_ended"),
}


def page(
    connection: apsw.Connection, state: TaskState, *, queue: str | None, after: Position | None, look: int
) -> TaskPage:
    """Return tasks of one state by the numbers of their rows, which fall, from the one behind ``after`` on."""
    view, condition = _CONDITIONS[state]
    if state is TaskState.WAITING and queue is not None:
        condition = "page_waiting_of_queue"
    # Somebody may have written any number into a link. Where none is given, none is too large.
    before = MOST_SEQ + 1 if after is None else int(min(max(after[0], 0), MOST_SEQ + 1))
    values = {"after": before, "look": look, "queue": queue, "state": str(state)}
    statement = f"SELECT seq, {SQL[view].removeprefix('SELECT ')} {SQL[condition]}"
    rows: list[tuple[Any, ...]] = connection.execute(statement, values).fetchall()
    listed = [ListedTask((row[0], str(row[1])), task_view(row[1:])) for row in rows]
    found = [task for task in listed if queue in {None, task.view.queue}]
    return TaskPage(found, listed[-1].position if len(listed) == look else None)


def ends(connection: apsw.Connection, *, since: float, step: float, most: int) -> list[EndCount]:
    """Count what ended since a time, in steps of ``step`` seconds."""
    values = {"since": since, "step": step, "most": most}
    rows: list[tuple[Any, ...]] = connection.execute(SQL["ends"], values).fetchall()
    return [EndCount(str(queue), TaskState(state), number, count) for queue, state, number, count in rows]
