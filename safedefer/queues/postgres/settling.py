"""Settling: applies what dispatchers report of deliveries; each job is checked to be held by the lease that settles it."""

from __future__ import annotations

import logging
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

from safedefer.queues import rules
from safedefer.queues.base import Verdict
from safedefer.queues.postgres.connection import in_transaction
from safedefer.queues.postgres.ends import End, end
from safedefer.queues.postgres.errors import is_of_a_value
from safedefer.queues.postgres.pgqueuer import STATEMENTS
from safedefer.queues.postgres.progress import write_progress
from safedefer.queues.postgres.records import add_records, trim_records
from safedefer.queues.postgres.rows import PARKED_AFTER, Hold
from safedefer.queues.postgres.statements import SQL, changed_rows, interval, joined, to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safedefer.queues.base import Lease, QueuedTask, Settlement
    from safedefer.queues.postgres.connection import Connection, RunOnOwnLoop

_log: Final = logging.getLogger("safedefer.queues")
_MICROSECOND: Final = timedelta(microseconds=1)


async def settle(
    connection: Connection,
    *,
    own_loop: RunOnOwnLoop | None,
    settlements: Sequence[tuple[Lease, Settlement]],
    now: float,
    tombstone_seconds: float,
) -> list[bool]:
    """Apply settlements in one transaction, or in one for each where a value that somebody stored breaks the batch.

    Args:
        connection: Not in a transaction.
        own_loop: Runs the steps that take several statements, see ``in_transaction``.
        settlements: Leases and how their deliveries ended.
        now: By the dispatcher's clock.
        tombstone_seconds: How long the names of ended tasks stay taken.

    Returns:
        For each, whether it was applied; False: the lease was lost, or what is stored of the task cannot be settled.
    """
    together = partial(_settle_together, connection, own_loop=own_loop, now=now, tombstone_seconds=tombstone_seconds)
    try:
        return await together(settlements=settlements)
    except Exception as error:
        if not is_of_a_value(error):
            raise
    settled = []
    for pair in settlements:
        try:
            settled += await together(settlements=[pair])
        except Exception as error:
            if not is_of_a_value(error):
                raise
            name = type(error.__cause__ or error).__name__
            _log.error("task %a cannot be settled (%s); look at what is stored of it", pair[0].task.id, name)
            settled.append(False)
    return settled


async def _settle_together(
    connection: Connection,
    *,
    own_loop: RunOnOwnLoop | None,
    settlements: Sequence[tuple[Lease, Settlement]],
    now: float,
    tombstone_seconds: float,
) -> list[bool]:
    """Do what ``settle`` does, in one transaction."""
    plain = [index for index, (lease, settlement) in enumerate(settlements) if _is_plain(lease, settlement)]
    if len({lease.owner for lease, _ in settlements}) != len(settlements):
        plain = []  # a lease is there twice: its first settlement counts, which only _settle_each keeps to
    if plain and len(plain) == len(settlements):
        ended = await _settle_plain(connection, settlements, now=now)
        if ended is not None:
            return ended
        plain = []
    mixed = partial(_settle_mixed, settlements=settlements, plain=plain, now=now, tombstone_seconds=tombstone_seconds)
    return await in_transaction(connection, own_loop, mixed)


def _is_plain(lease: Lease, settlement: Settlement) -> bool:
    """Whether a task succeeded at its first delivery, and has neither name, unique key nor blob."""
    task = lease.task
    return (
        settlement.verdict is Verdict.DONE
        and settlement.charged
        and settlement.reason is None
        and settlement.record is None
        and lease.retries == 0
        and task.name is None
        and task.unique_key is None
        and task.blob_id is None
    )


async def _settle_plain(
    connection: Connection, settlements: Sequence[tuple[Lease, Settlement]], *, now: float
) -> list[bool] | None:
    """End plain tasks in one statement; None, and no change, if one is not held or has not succeeded by the ledger."""
    held: dict[int, tuple[int, QueuedTask]] = {}
    managers = set()
    for lease, _ in settlements:
        hold = Hold.read(lease.owner)
        if hold is None:
            return None
        held[hold.job] = hold.updated, lease.task
        managers.add(hold.manager)
    if len(held) != len(settlements) or len(managers) != 1:
        return None
    jobs = sorted(held)  # lock order: two batches that lock jobs by ascending id cannot deadlock
    rows = await connection.execute(
        SQL["done"],
        *joined(
            [str(job) for job in jobs],
            [str(held[job][0]) for job in jobs],
            [held[job][1].audience for job in jobs],
            [held[job][1].id for job in jobs],
        ),
        managers.pop(),
        now,
    )
    if changed_rows(rows) in {0, len(jobs)}:
        return [True] * len(jobs) if changed_rows(rows) else None
    # Another dispatcher took over or ended some of the jobs while the statement ran.
    ids = [task.id for _, task in held.values()]
    ours = {row["id"] for row in await connection.fetch(SQL["done_now"], ids, now)}
    return [task_id in ours for task_id in ids]


async def _settle_mixed(
    connection: Connection,
    *,
    settlements: Sequence[tuple[Lease, Settlement]],
    plain: Sequence[int],
    now: float,
    tombstone_seconds: float,
) -> list[bool]:
    """Settle a batch of which the plain tasks (their indices) are ended together, the others one by one."""
    results, ended = [False] * len(settlements), None
    if plain:
        holds = (Hold.read(lease.owner) for lease, _ in settlements)
        await connection.fetch(SQL["lock_jobs"], [hold.job for hold in holds if hold is not None])
        ended = await _settle_plain(connection, [settlements[index] for index in plain], now=now)
    together = () if ended is None else plain
    others = sorted({*range(len(settlements))}.difference(together))
    kept = await _settle_each(
        connection, [settlements[index] for index in others], now=now, tombstone_seconds=tombstone_seconds
    )
    for index, ours in (*zip(together, ended or (), strict=True), *zip(others, kept, strict=True)):
        results[index] = ours
    return results


async def _settle_each(
    connection: Connection,
    settlements: Sequence[tuple[Lease, Settlement]],
    *,
    now: float,
    tombstone_seconds: float,
) -> list[bool]:
    """Settle tasks of any kind: lock their jobs, then store records, retries and ends."""
    holds = [Hold.read(lease.owner) for lease, _ in settlements]
    asked = {
        hold.job: {
            "id": hold.job,
            "manager": hold.manager,
            "updated": hold.updated,
            "audience": lease.task.audience,
            "task_id": lease.task.id,
        }
        for hold, (lease, _) in zip(holds, settlements, strict=True)
        if hold is not None
    }
    found = await connection.fetch(SQL["held"], to_json(list(asked.values())))
    held = {
        row["id"]: None if row["state"] is None else rules.Known(row["state"], row["uncharged"], row["alive"])
        for row in found
    }
    results, ends, retries, records = [], [], [], []
    for hold, (lease, settlement) in zip(holds, settlements, strict=True):
        ours = hold is not None and hold.job in held and asked[hold.job]["updated"] == hold.updated
        results.append(ours)
        if not ours or hold is None:
            continue
        known = held[hold.job]
        settlement = rules.by_ledger(lease, settlement, known, now=now)  # noqa: PLW2901  # only this one counts
        if settlement.record is not None:
            records.append(settlement.record)
        if settlement.verdict is Verdict.RETRY:
            retries.append((hold, lease, settlement, known))
        else:
            ending = rules.end_of(settlement, known)
            attempts = rules.plus(lease.attempts, ending.charged)
            ends.append(End(lease.task, hold.job, ending, attempts, known, has_progress=lease.retries > 0))
        del held[hold.job]
    await add_records(connection, records)
    if retries:
        await _retry(connection, retries, now=now)
    if ends:
        await end(connection, ends, now=now, tombstone_seconds=tombstone_seconds)
    return results


async def _retry(
    connection: Connection, retries: Sequence[tuple[Hold, Lease, Settlement, rules.Known | None]], *, now: float
) -> None:
    """Queue jobs again at the time of their retry, parked if that is far off; store it and the counters."""
    delays = [
        (hold.job, interval(max((now if settlement.at is None else settlement.at) - now, 0.0)), None)
        for hold, _, settlement, _ in retries
    ]
    await connection.executemany(STATEMENTS.retry, delays)
    parked = [job for job, delay, _ in delays if delay.total_seconds() > PARKED_AFTER]
    if parked:
        await connection.execute(SQL["park"], parked)
    after = {
        hold.job: rules.after_retry(rules.Counters.of(lease), settlement, leased_at=hold.leased, now=now)
        for hold, lease, settlement, _ in retries
    }
    await write_progress(connection, after)
    noted = [
        {
            "audience": lease.task.audience,
            "task_id": lease.task.id,
            "owed": not rules.retry_charges(settlement, known),
            "wait": delay // _MICROSECOND if rules.sets_time(settlement) else None,
            "attempts": after[hold.job].attempts,
        }
        for (hold, lease, settlement, known), (_, delay, _) in zip(retries, delays, strict=True)
        if known is not None
    ]
    if noted:
        await connection.execute(SQL["ledger_retry"], to_json(noted))
    for _, lease, _, _ in retries:
        if lease.retries >= rules.RECORDS_KEPT:
            await trim_records(connection, lease.task.id)
