"""Ends: moves tasks out of the queue, into the history or the dead letters, by a settlement, a cancel or a purge."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Final

from safedefer.errors import ReplayedTask
from safedefer.ledger import EndState, VerifiedLetter
from safedefer.queues.base import QueuedTask, task_digest
from safedefer.queues.postgres.pgqueuer import STATEMENTS
from safedefer.queues.postgres.progress import read_progress
from safedefer.queues.postgres.rows import dead_values, ledger_keys, read_task, write_hints
from safedefer.queues.postgres.statements import SQL, changed_rows, interval, to_json
from safedefer.queues.rules import Ending, Known, check_replacement, may_cancel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safedefer.queues.postgres.connection import Connection

#: The status under which pgqueuer logs the end of a job. It keeps the rows of failed jobs, and deletes the others.
_LOGGED: Final = {EndState.SUCCEEDED: "successful", EndState.CANCELLED: "canceled", EndState.FAILED: "failed"}


@dataclass(frozen=True, slots=True)
class End:
    """The end of one task."""

    task: QueuedTask
    job_id: int
    ending: Ending
    attempts: int
    known: Known | None
    """What the ledger knows of it."""
    has_progress: bool
    """Whether ``progress`` may have a row of it."""


async def end(connection: Connection, ends: Sequence[End], *, now: float, tombstone_seconds: float) -> None:
    """End tasks: write history or dead letter, tombstone and ledger entry; delete jobs and blobs."""
    history: list[dict[str, object]] = [
        {
            "id": item.task.id,
            "queue": item.task.queue,
            "headers": write_hints(item.task._replace(headers={}, retry_options={}, unique_key=None)),
            "attempts": item.attempts,
            "state": str(item.ending.state),
            "reason": item.ending.reason,
        }
        for item in ends
        if item.ending.state is not EndState.FAILED
    ]
    if history:
        await connection.execute(SQL["ended_insert"], to_json(history), now)
    for item in ends:
        if item.ending.state is EndState.FAILED:
            values = dead_values(
                item.task,
                item.job_id,
                reason=item.ending.reason,
                last_reason=item.ending.by_record,
                attempts=item.attempts,
                now=now,
            )
            await connection.execute(SQL["dead_insert"], *values)
    statuses = [_LOGGED[item.ending.state] for item in ends]
    await connection.execute(STATEMENTS.log, [item.job_id for item in ends], statuses, list(repeat(None, len(ends))))
    await _free(connection, ends, now=now, tombstone_seconds=tombstone_seconds)
    unknown = [item for item in ends if item.known is None or not item.known.ended]
    if unknown:
        entries = [
            {
                "audience": item.task.audience,
                "task_id": item.task.id,
                "digest": task_digest(item.task).hex(),
                "state": str(item.ending.state),
                "expires": item.task.expires,
            }
            for item in unknown
        ]
        await connection.execute(SQL["ledger_end"], to_json(entries))


async def _free(connection: Connection, ends: Sequence[End], *, now: float, tombstone_seconds: float) -> None:
    """Turn names into tombstones, and delete unique keys, blobs and counters."""
    tasks = [item.task for item in ends]
    names = [(task.queue, task.name) for task in tasks if task.name is not None]
    if names:
        await connection.execute(
            SQL["names_bury"], [queue for queue, _ in names], [name for _, name in names], now + tombstone_seconds
        )
    unique = [task for task in tasks if task.unique_key is not None]
    if unique:
        await free_unique(connection, unique)
    blobs = [task.blob_id for task in tasks if task.blob_id is not None]
    if blobs:
        await connection.execute(SQL["blobs_drop"], blobs)
    counted = [item.job_id for item in ends if item.has_progress]
    if counted:
        await connection.execute(SQL["progress_delete"], counted)


async def cancel(
    connection: Connection, task_ids: Sequence[str], *, now: float, seconds: float, tombstone_seconds: float
) -> int:
    """Cancel tasks that wait or whose lease has run out, unless by the ledger they run or have ended.

    Args:
        connection: In a transaction.
        task_ids: The tasks.
        now: By the caller's clock.
        seconds: The length of a lease.
        tombstone_seconds: How long their names stay taken.

    Returns:
        How many were cancelled.
    """
    jobs = await connection.fetch(SQL["waiting_of"], task_ids, interval(seconds))
    tasks = {job["id"]: read_task(job) for job in jobs}
    found = await connection.fetch(SQL["ledger_find"], ledger_keys(tasks.values()))
    entries = {(row["audience"], row["task_id"]): row for row in found}
    progress = await read_progress(connection, list(tasks))
    ends = []
    for job_id, task in tasks.items():
        entry = entries.get((task.audience, task.id))
        known = None if entry is None else Known(entry["state"], entry["uncharged"], entry["alive"])
        if not may_cancel(known):
            continue
        attempts = progress[job_id].attempts if job_id in progress else 0
        ending = Ending(EndState.CANCELLED)
        ends.append(End(task, job_id, ending, attempts, known, has_progress=job_id in progress))
    if ends:
        await end(connection, ends, now=now, tombstone_seconds=tombstone_seconds)
    return len(ends)


async def note_replacement(connection: Connection, task_id: str, letter: VerifiedLetter) -> None:
    """Note in the ledger that a dead letter was replaced by a new task.

    Raises:
        ReplayedTask: By the ledger it runs, has succeeded, or was cancelled or replaced, or is another task.
        ExpiredTask: Its time is over, and the ledger does not know that it died.
    """
    found = await connection.fetch(SQL["ledger_lock"], letter.audience, task_id)
    digest, known = None, None
    for row in found:
        digest, known = bytes(row["digest"]), Known(row["state"], row["uncharged"], bool(row["alive"]))
    check_replacement(letter, digest=digest, entry=known)
    values = letter.audience, task_id, letter.digest, letter.expires
    if changed_rows(await connection.execute(SQL["ledger_replace"], *values)) == 0:
        raise ReplayedTask("the task runs now; wait for its end, or defer it anew")


async def stop(connection: Connection, task_id: str) -> bool:
    """Mark a task as cancelled that is leased or runs; False if there is none, or it has ended by the ledger.

    Args:
        connection: In a transaction.
        task_id: The task.
    """
    tasks = [read_task(job) for job in await connection.fetch(SQL["living_of"], [task_id])]
    entries = [
        {"audience": task.audience, "task_id": task.id, "digest": task_digest(task).hex(), "expires": task.expires}
        for task in tasks
    ]
    return bool(entries) and changed_rows(await connection.execute(SQL["ledger_cancel"], to_json(entries))) > 0


async def drop_dead(connection: Connection, task_ids: Sequence[str]) -> int:
    """Delete dead letters and their failed jobs; returns how many. Their records are pruned by age."""
    dropped = await connection.fetch(SQL["dead_delete"], list(task_ids))
    if dropped:
        await connection.execute(SQL["attempts_become_stray"], [row["id"] for row in dropped])
        jobs = [row["job_id"] for row in dropped]
        await connection.execute(STATEMENTS.log, jobs, ["deleted"] * len(jobs), [None] * len(jobs))
    return len(dropped)


async def free_unique(connection: Connection, tasks: Sequence[QueuedTask]) -> None:
    """Delete the unique keys of tasks; one that another task has since is that one's."""
    values = [task.id for task in tasks], [task.queue for task in tasks], [task.unique_key for task in tasks]
    await connection.execute(SQL["uniques_delete"], *values)
