"""Views: counts of queues and lists of tasks, for people who look."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from safedefer.queues.base import (
    NOTICE_SECONDS,
    NOTICES,
    AttemptTime,
    EndCount,
    ListedTask,
    Notice,
    QueueStats,
    TaskPage,
    TaskState,
    TaskView,
    queue_of,
)
from safedefer.queues.postgres.records import recorded_success, records_of
from safedefer.queues.postgres.rows import read_task
from safedefer.queues.postgres.statements import SQL, interval, moment
from safedefer.queues.rules import UNREADABLE, stored_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safedefer.ledger import AttemptRecord
    from safedefer.queues.base import DeadFilter, Position
    from safedefer.queues.postgres.connection import Connection

_EARLIEST: Final = float("-inf")
#: The largest number of a job.
_LAST: Final = 2**63 - 1
#: Seconds by which the clock of another process may be ahead.
_AHEAD: Final = 60.0
_DEFAULT_STATES: Final = (TaskState.WAITING, TaskState.RUNNING, TaskState.DEAD)


async def stats(connection: Connection, *, seconds: float) -> list[QueueStats]:
    """Return the counts of every queue that has a task or a dead letter, sorted by name.

    A task whose lease ran out (no heartbeat for ``seconds``) counts as waiting.
    """
    tasks = await connection.fetch(SQL["stats"], interval(seconds))
    put_off = {row["queue"]: row["eta"] for row in await connection.fetch(SQL["stats_put_off"], interval(seconds))}
    dead = await connection.fetch(SQL["stats_dead"])
    counts = {
        row["queue"]: (row["waiting"], row["running"], None if row["oldest"] is None else moment(row["oldest"]))
        for row in tasks
    }
    deaths = {row["queue"]: row["dead"] for row in dead}
    found = []
    for queue in sorted({*counts, *deaths}):
        waiting, running, oldest = counts.get(queue, (0, 0, None))
        if oldest is not None:
            oldest = min(oldest, put_off.get(queue, oldest))
        found.append(
            QueueStats(queue=queue, waiting=waiting, running=running, dead=deaths.get(queue, 0), oldest=oldest)
        )
    return found


async def tasks(
    connection: Connection, *, states: Sequence[TaskState], queue: str | None, limit: int
) -> list[TaskView]:
    """Return tasks, newest first, without records; without ``states``: waiting, running and dead."""
    found: list[TaskView] = []
    for state in dict.fromkeys(states or _DEFAULT_STATES):
        found += await _of_state(connection, state, queue, limit)
    found.sort(key=lambda task: task.created, reverse=True)
    return found[:limit]


async def _of_state(connection: Connection, state: TaskState, queue: str | None, limit: int) -> list[TaskView]:
    if state in {TaskState.WAITING, TaskState.RUNNING}:
        status = "queued" if state is TaskState.WAITING else "picked"
        condition = f"WHERE job.status = '{status}' AND ($1::text IS NULL OR job.entrypoint IN ($1, $1 || '@later'))"
        statement = f"{SQL['view_jobs']} {condition} ORDER BY job.id DESC LIMIT $2"
        return await _job_views(connection, await connection.fetch(statement, queue, limit))
    if state is TaskState.DEAD:
        statement = f"{SQL['view_dead']} WHERE archived IS NULL AND ($1::text IS NULL OR queue = $1)"
        rows = await connection.fetch(f"{statement} ORDER BY ended DESC LIMIT $2", queue, limit)
        return [_dead_view(row) for row in rows]
    statement = f"{SQL['view_ended']} WHERE state = $3 AND ($1::text IS NULL OR queue = $1)"
    rows = await connection.fetch(f"{statement} ORDER BY id DESC LIMIT $2", queue, limit, str(state))
    return [_ended_view(row) for row in rows]


async def live_tasks(
    connection: Connection, *, queue: str | None, after: int, limit: int
) -> list[tuple[int, TaskView]]:
    """Return waiting and running tasks with the ids of their jobs, from the one behind ``after`` on."""
    condition = "WHERE job.status IN ('queued', 'picked') AND job.id > $1"
    of_queue = "AND ($2::text IS NULL OR job.entrypoint IN ($2, $2 || '@later'))"
    statement = f"{SQL['view_jobs']} {condition} {of_queue} ORDER BY job.id LIMIT $3"
    jobs = await connection.fetch(statement, after, queue, limit)
    return [(job["id"], view) for job, view in zip(jobs, await _job_views(connection, jobs), strict=True)]


async def page(
    connection: Connection, *, state: TaskState, queue: str | None, after: Position | None, look: int
) -> TaskPage:
    """Return tasks of one state, newest first, from the one behind ``after`` on; ``look`` rows are looked at."""
    number, task_id = after or (0.0, "")
    if state in {TaskState.WAITING, TaskState.RUNNING}:
        # Somebody may have written any number into a link, and any into a row.
        last = _LAST if after is None else int(min(max(number, 1 - _LAST), _LAST)) - 1
        status = "queued" if state is TaskState.WAITING else "picked"
        condition = "AND job.id <= $1 AND ($2::text IS NULL OR job.entrypoint IN ($2, $2 || '@later'))"
        statement = f"{SQL['view_jobs']} WHERE job.status = '{status}' {condition} ORDER BY job.id DESC LIMIT $3"
        jobs = await connection.fetch(statement, last, queue, look)
        waiting = await _job_views(connection, jobs)
        listed = [ListedTask((job["id"], view.id), view) for job, view in zip(jobs, waiting, strict=True)]
    else:
        name, view = ("dead", _dead_view) if state is TaskState.DEAD else ("ended", _ended_view)
        current = "archived IS NULL" if state is TaskState.DEAD else "true"
        # A text of its own for each: an OR would keep the index from being used. The parameters are in it both times.
        behind = 'ended <= $1 AND (ended, id COLLATE "C") < ($1, $2)'
        first = "$1::double precision IS NOT NULL AND $2::text IS NOT NULL"
        condition = f"{current} AND {first if after is None else behind}"
        statement = f'{SQL[f"view_{name}"]} WHERE {condition} ORDER BY ended DESC, id COLLATE "C" DESC LIMIT $3'
        rows = await connection.fetch(statement, float(number), task_id.replace("\0", ""), look)
        listed = [ListedTask((row["ended"], row["id"]), view(row)) for row in rows]
    found = [task for task in listed if task.view.state is state and queue in {None, task.view.queue}]
    return TaskPage(found, listed[-1].position if len(listed) == look else None)


async def ends(connection: Connection, *, since: float, step: float, most: int) -> list[EndCount]:
    """Count what ended since a time, in steps of ``step`` seconds."""
    states = {str(state): state for state in TaskState}
    rows = await connection.fetch(SQL["ends"], since, step, most)
    # Of another state than ours is a row that somebody else wrote.
    return [
        EndCount(row["queue"], states[row["state"]], row["number"], row["count"])
        for row in rows
        if row["state"] in states
    ]


async def attempt_times(connection: Connection, *, since: float, most: int) -> list[AttemptTime]:
    """Return how long the newest attempts took."""
    rows = await connection.fetch(SQL["attempt_times"], since, most)
    return [AttemptTime(queue_of(row["audience"]), max(row["seconds"], 0.0)) for row in rows]


async def put_notice(connection: Connection, *, process: str, text: str, now: float) -> None:
    """Store what a process says of itself, and delete what is old."""
    await connection.execute(SQL["notices_prune"], now - NOTICE_SECONDS, now + _AHEAD)
    if text:
        await connection.execute(SQL["notice_put"], process, text, now)
    else:
        await connection.execute(SQL["notice_delete"], process)


async def notices(connection: Connection, *, since: float) -> list[Notice]:
    """Return the newest notices."""
    return [Notice(**dict(row)) for row in await connection.fetch(SQL["notices"], since, NOTICES)]


async def dead_letters(
    connection: Connection, *, where: DeadFilter, after: tuple[float, str] | None, limit: int
) -> list[TaskView]:
    """Return dead letters with their records, oldest first, from the one behind ``after`` (``(ended, id)``) on."""
    ended, task_id = after or (_EARLIEST, "")
    since = _EARLIEST if where.since is None else where.since
    values = (
        where.archived,
        where.queue,
        where.reason,
        where.callable_name,
        since,
        where.before,
        ended,
        task_id,
        limit,
    )
    rows = await connection.fetch(SQL["dead_letters"], *values)
    records = await records_of(connection, [row["id"] for row in rows])
    return [_dead_view(row, records.get(row["id"], ())) for row in rows]


async def find(connection: Connection, *, task_id: str) -> TaskView | None:
    """Return one task in whatever state, with the records of its attempts; an ended one without its token."""
    records = (await records_of(connection, [task_id])).get(task_id, [])
    condition = "WHERE job.dedupe_key = $1 AND job.status IN ('queued', 'picked')"
    jobs = await connection.fetch(f"{SQL['view_jobs']} {condition}", task_id)
    if jobs:
        return await _with_success(connection, (await _job_views(connection, jobs, records))[0])
    for statement, view in (("view_dead", _dead_view), ("view_ended", _ended_view)):
        rows = await connection.fetch(f"{SQL[statement]} WHERE id = $1", task_id)
        if rows:
            return await _with_success(connection, view(rows[0], records))
    return None


async def _with_success(connection: Connection, view: TaskView) -> TaskView:
    """Return a view with the record of the success that the ledger holds, in its place among the others by time."""
    success = await recorded_success(connection, audience=view.audience, task_id=view.id)
    if not success:
        return view
    ended = success[0].ended
    before = [record for record in view.records if record.started < ended]
    after = [record for record in view.records if record.started >= ended]
    return replace(view, records=[*before, *success, *after])


async def _job_views(
    connection: Connection, jobs: Sequence[Mapping[str, Any]], records: Sequence[AttemptRecord] = ()
) -> list[TaskView]:
    tasks = [read_task(job) for job in jobs]
    wanted = [task.blob_id for task in tasks if task.blob_id is not None]
    found = await connection.fetch(SQL["blobs_of"], wanted) if wanted else ()
    blobs = {(row["id"], row["task_id"]): bytes(row["data"]) for row in found}
    return [
        _job_view(job, blobs.get((task.blob_id or "", task.id)), records) for job, task in zip(jobs, tasks, strict=True)
    ]


def _job_view(job: Mapping[str, Any], blob: bytes | None, records: Sequence[AttemptRecord]) -> TaskView:
    """Return the view of a row of ``view_jobs``; ``blob`` is the stored token of an oversize task."""
    task = read_task(job)
    return TaskView(
        id=task.id,
        queue=task.queue,
        state=TaskState.WAITING if job["status"] == "queued" else TaskState.RUNNING,
        name=task.name,
        callable_name=task.callable_name,
        url=task.url,
        target=task.target,
        audience=task.audience,
        headers=task.headers,
        eta=task.eta,
        created=task.created,
        expires=task.expires,
        attempts=job["attempts"],
        token=task.token if blob is None else blob,
        reason=job["retry_reason"] if task.token else UNREADABLE,
        retry_options=task.retry_options,
        records=records,
        due=moment(job["due"]),
    )


def _ended_view(row: Mapping[str, Any], records: Sequence[AttemptRecord] = ()) -> TaskView:
    """Return the view of a row of ``view_ended``, which keeps neither token, headers nor options."""
    hints = {"id": 0, "dedupe_key": row["id"], "entrypoint": row["queue"], "headers": row["headers"], "payload": None}
    task = read_task(hints)
    return TaskView(
        id=task.id,
        queue=task.queue,
        state=TaskState.CANCELLED if row["state"] == TaskState.CANCELLED else TaskState.SUCCEEDED,
        name=task.name,
        callable_name=task.callable_name,
        url=task.url,
        target=task.target,
        audience=task.audience,
        headers={},
        eta=task.eta,
        created=task.created,
        expires=task.expires,
        attempts=row["attempts"],
        token=b"",
        reason=row["reason"],
        ended=row["ended"],
        records=records,
    )


def _dead_view(row: Mapping[str, Any], records: Sequence[AttemptRecord] = ()) -> TaskView:
    """Return the view of a row of ``view_dead``."""
    values = {**row, "headers": stored_mapping(row["headers"]), "retry_options": stored_mapping(row["retry_options"])}
    if not row["token"]:
        values |= {"token": b"", "reason": UNREADABLE}
    return TaskView(**{**values, "state": TaskState(values["state"]), "records": records})
