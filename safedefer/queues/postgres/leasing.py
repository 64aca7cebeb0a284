"""Leasing: picks due jobs, within the limits of their queues, and charges the deliveries that nobody settled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from safedefer.ledger import EndState
from safedefer.queues.base import Lease, QueuedTask, is_free_when_leased
from safedefer.queues.poison_log import log_burial
from safedefer.queues.postgres.connection import in_transaction
from safedefer.queues.postgres.controls import put_control, read_controls
from safedefer.queues.postgres.ends import End, end, free_unique
from safedefer.queues.postgres.pgqueuer import STATEMENTS
from safedefer.queues.postgres.progress import read_progress, write_progress
from safedefer.queues.postgres.records import add_records
from safedefer.queues.postgres.rows import Hold, ledger_keys, read_task, write_holds
from safedefer.queues.postgres.statements import SQL, interval, to_json
from safedefer.queues.rules import (
    PUT_OFF,
    Counters,
    Ending,
    Known,
    LostDelivery,
    after_lost_lease,
    after_lost_run,
    has_lost_run,
    waits_for_run,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safedefer.queues.postgres.connection import Connection, RunOnOwnLoop

#: Parked jobs of each queue that are promoted before a lease.
_PROMOTED_AT_ONCE: Final = 1_000


@dataclass(frozen=True, slots=True)
class _Look:
    """The state of the queues before a lease."""

    queues: list[str]
    """Those that have jobs."""
    fallen_due: list[str]
    """Entrypoints (``queue@later``) with parked jobs that are due."""
    lost: dict[int, float]
    """Jobs whose lease has run out, or will within a second: when they were leased."""
    controlled: bool
    """Whether any queue has a control."""
    now: float
    """By the database's clock."""


def manager_of(owner: str) -> UUID:
    """Return pgqueuer's ``queue_manager_id`` of a dispatcher."""
    return UUID(bytes=sha256(owner.encode()).digest()[:16])


def _look(row: Mapping[str, Any]) -> _Look:
    lost = dict(zip(row["stale"], row["leased"], strict=True))
    return _Look(row["queues"], row["fallen_due"], lost, row["controlled"], row["now"])


async def lease(
    connection: Connection,
    *,
    own_loop: RunOnOwnLoop | None,
    owner: str,
    manager: UUID,
    limit: int,
    seconds: float,
    now: float,
    queues: Sequence[str] | None,
    tombstone_seconds: float,
) -> list[Lease]:
    """Claim due tasks, in the order in which they were enqueued.

    Args:
        connection: Not in a transaction.
        own_loop: Runs the steps that take several statements, see ``in_transaction``.
        owner: Becomes the beginning of each ``Lease.owner``.
        manager: pgqueuer's ``queue_manager_id``.
        limit: Tasks at most.
        seconds: The length of a lease.
        now: By the dispatcher's clock.
        queues: Only these; None: all.
        tombstone_seconds: How long the names of tasks that are buried stay taken.
    """
    if limit < 1:
        return []
    seen, jobs = await _look_and_pick(connection, own_loop, queues, limit=limit, seconds=seconds, manager=manager)
    tasks = {job["id"]: read_task(job) for job in jobs}
    if begun := [task for task in tasks.values() if is_free_when_leased(task.unique_key)]:
        await free_unique(connection, begun)
    # Only jobs that were retried or lost have a row in progress.
    again = [job["id"] for job in jobs if job["attempts"] or job["id"] in seen.lost]
    progress = await read_progress(connection, again) if again else {}
    retried = {job_id: tasks[job_id] for job_id in again if job_id not in seen.lost}
    jobs, losses, died = await _look_at_retried(connection, jobs, retried, progress)
    lost: dict[int, float | None] = {job_id: seen.lost[job_id] for job_id in again if job_id in seen.lost}
    lost |= dict.fromkeys(died)
    if lost:
        charging = partial(
            _charge_lost_leases,
            tasks=tasks,
            lost=lost,
            progress=progress,
            now=now,
            tombstone_seconds=tombstone_seconds,
        )
        deliveries = await in_transaction(connection, own_loop, charging)
        progress |= {job_id: delivery.counters for job_id, delivery in deliveries.items()}
        losses |= {job_id: delivery.losses for job_id, delivery in deliveries.items()}
        jobs = [job for job in jobs if job["id"] not in lost or deliveries[job["id"]].end_reason(now) is None]
    leases = []
    jobs, until = sorted(jobs, key=_number), now + seconds
    for job, name in zip(jobs, write_holds(owner, manager.hex, jobs, leased=now), strict=True):
        task, counters = tasks[job["id"]], progress.get(job["id"])
        made = Lease(task, name, until) if counters is None else Lease(task, name, until, *counters)
        leases.append(made._replace(losses=losses[job["id"]]) if losses.get(job["id"]) else made)
    return leases


def _number(job: Mapping[str, Any]) -> int:
    return int(job["id"])


async def _look_and_pick(
    connection: Connection,
    own_loop: RunOnOwnLoop | None,
    queues: Sequence[str] | None,
    *,
    limit: int,
    seconds: float,
    manager: UUID,
) -> tuple[_Look, Sequence[Mapping[str, Any]]]:
    """Return the state of the queues, and the due jobs that were picked: at once if no more statements are needed."""
    looked, *jobs = await STATEMENTS.pick_free(connection, queues, limit=limit, seconds=seconds, manager=manager)
    seen = _look(looked)
    if not (seen.controlled or seen.fallen_due):
        return seen, jobs
    names = seen.queues if queues is None else [queue for queue in dict.fromkeys(queues) if queue in set(seen.queues)]
    if not names:
        return seen, []
    return seen, await _pick(connection, own_loop, seen, names, limit=limit, seconds=seconds, manager=manager)


async def _pick(
    connection: Connection,
    own_loop: RunOnOwnLoop | None,
    seen: _Look,
    names: Sequence[str],
    *,
    limit: int,
    seconds: float,
    manager: UUID,
) -> Sequence[Mapping[str, Any]]:
    """Promote parked jobs that are due, and pick due jobs of the queues."""
    fallen_due = [parked for parked in seen.fallen_due if parked.partition("@")[0] in names]
    if fallen_due:
        await connection.execute(SQL["promote"], fallen_due, _PROMOTED_AT_ONCE)
    if seen.controlled:
        picking = partial(_dequeue_under_control, queues=names, limit=limit, seconds=seconds, now=seen.now)
        return await in_transaction(connection, own_loop, partial(picking, manager=manager))
    free = dict.fromkeys(names, 0)
    return await STATEMENTS.dequeue(connection, free, limit=limit, seconds=seconds, manager=manager)


async def extend_many(connection: Connection, *, leases: Sequence[Lease]) -> list[bool]:
    """Prolong leases: set the heartbeats of their jobs to now. False stands for a lost lease."""
    holds = [Hold.read(lease.owner) for lease in leases]
    asked = [{"id": hold.job, "manager": hold.manager, "updated": hold.updated} for hold in holds if hold is not None]
    held = {(row["id"], row["updated"]) for row in await connection.fetch(SQL["extend"], to_json(asked))}
    return [hold is not None and (hold.job, hold.updated) in held for hold in holds]


async def release(connection: Connection, *, managers: Sequence[UUID], seconds: float) -> int:
    """Let the leases of dead dispatchers run out whose run has not begun; returns how many.

    Args:
        connection: In a transaction.
        managers: The ``manager_of`` each dispatcher.
        seconds: The length of a lease.
    """
    jobs = await connection.fetch(SQL["leased_by"], list(managers))
    tasks = {job["id"]: read_task(job) for job in jobs}
    begun = {
        (row["audience"], row["task_id"])
        for row in await connection.fetch(SQL["ledger_find"], ledger_keys(tasks.values()))
        if row["uncharged"]
    }
    waiting = [job_id for job_id, task in tasks.items() if (task.audience, task.id) not in begun]
    return len(await connection.fetch(SQL["leases_release"], waiting, list(managers), interval(seconds)))


async def _look_at_retried(
    connection: Connection,
    jobs: Sequence[Mapping[str, Any]],
    tasks: Mapping[int, QueuedTask],
    progress: Mapping[int, Counters],
) -> tuple[Sequence[Mapping[str, Any]], dict[int, int], list[int]]:
    """Return the jobs to deliver, how many deliveries in a row of each were lost, by its id, and those with a lost run.

    Jobs that wait for a run that goes on are given back.
    """
    if not tasks:
        return jobs, {}, []
    rows = await connection.fetch(SQL["ledger_find"], ledger_keys(tasks.values()))
    found = {(row["audience"], row["task_id"]): row for row in rows}
    losses, died, waiting = {}, [], set()
    for job_id, task in tasks.items():
        entry = found.get((task.audience, task.id))
        losses[job_id] = 0 if entry is None else entry["losses"]
        known = None if entry is None else Known(entry["state"], entry["uncharged"], entry["alive"])
        reason = (progress.get(job_id) or Counters()).retry_reason
        if has_lost_run(reason, known):
            died.append(job_id)
        elif waits_for_run(reason, known):
            waiting.add(job_id)
    if waiting:
        await connection.executemany(STATEMENTS.retry, [(job_id, interval(PUT_OFF), None) for job_id in waiting])
        jobs = [job for job in jobs if job["id"] not in waiting]
    return jobs, losses, died


async def _charge_lost_leases(
    connection: Connection,
    *,
    tasks: Mapping[int, QueuedTask],
    lost: Mapping[int, float | None],
    progress: Mapping[int, Counters],
    now: float,
    tombstone_seconds: float,
) -> dict[int, LostDelivery]:
    """Count the deliveries that nobody settled, charge an attempt where the ledger saw the run begin, and bury poison.

    Args:
        connection: In a transaction.
        tasks: By the id of their job.
        lost: The jobs, and when they were leased; None for one that waited while its run was lost.
        progress: Their counters so far.
        now: By the dispatcher's clock.
        tombstone_seconds: How long the names of buried tasks stay taken.

    Returns:
        The deliveries with the new counters, which are stored too.
    """
    named = ledger_keys(tasks[job_id] for job_id in lost)
    entries = {(row["audience"], row["task_id"]): row for row in await connection.fetch(SQL["ledger_find"], named)}
    after: dict[int, LostDelivery] = {}
    charged: list[dict[str, object]] = []
    buried: list[End] = []
    for job_id, leased in lost.items():
        key = (tasks[job_id].audience, tasks[job_id].id)
        entry = entries.get(key)
        known = None
        if entry is not None:
            state, losses, since = entry["state"], entry["losses"], entry["first_loss"]
            known = Known(state, entry["uncharged"], entry["alive"], losses=losses, first_loss=since)
        before = progress.get(job_id) or Counters()
        if leased is None:
            options, eta = tasks[job_id].retry_options, tasks[job_id].eta
            delivery = after_lost_run(before, key, known, now=now, retry_options=options, eta=eta)
        else:
            delivery = after_lost_lease(before, key, known, leased_at=leased, now=now)
        after[job_id] = delivery
        if delivery.charged:
            values = {"attempts": delivery.counters.attempts, "losses": delivery.losses}
            charged.append({"audience": key[0], "task_id": key[1], **values, "first_loss": delivery.first_loss})
        if (reason := delivery.end_reason(now)) is not None:
            attempts = delivery.counters.attempts
            buried.append(
                End(tasks[job_id], job_id, Ending(EndState.FAILED, reason), attempts, known, has_progress=True)
            )
    if charged:
        await connection.execute(SQL["ledger_lost"], to_json(charged))
    await write_progress(connection, {job_id: delivery.counters for job_id, delivery in after.items()})
    await add_records(connection, [delivery.record for delivery in after.values() if delivery.record is not None])
    if buried:
        await end(connection, buried, now=now, tombstone_seconds=tombstone_seconds)
        for item in buried:
            log_burial(item.task.id, str(item.ending.reason), after[item.job_id])
    return after


async def _dequeue_under_control(
    connection: Connection,
    *,
    queues: Sequence[str],
    limit: int,
    seconds: float,
    now: float,
    manager: UUID,
) -> list[Mapping[str, Any]]:
    """Pick due jobs within the controls of their queues, and spend the tokens of rates.

    pgqueuer's statement counts the running jobs and keeps the cap on concurrency.
    """
    known = await read_controls(connection, queues, lock=True)
    found: list[Mapping[str, Any]] = []
    others: dict[str, int] = {}
    for queue in queues:
        control = known.get(queue)
        if control is None:
            others[queue] = 0
            continue
        filled = control.refill(now)
        # running=-limit: the cap must not lower the allowance here, as pgqueuer's statement applies it.
        allowed = filled.allowance(now=now, running=-limit)
        if control.refilled > now and control.limits.rate is not None:
            await put_control(connection, filled, now=now)  # the clock was set back: the bucket fills from here again
        cap = control.limits.max_concurrent or 0
        if allowed == 0 or control.limits.max_concurrent == 0:
            continue
        if control.limits.rate is None:
            others[queue] = cap
            continue
        most = min(limit - len(found), limit if allowed is None else allowed)
        if most > 0:
            jobs = await STATEMENTS.dequeue(connection, {queue: cap}, limit=most, seconds=seconds, manager=manager)
            found += jobs
            if jobs:
                await put_control(connection, filled.spend(len(jobs)), now=now)
    if others and limit > len(found):
        found += await STATEMENTS.dequeue(
            connection, others, limit=limit - len(found), seconds=seconds, manager=manager
        )
    return found
