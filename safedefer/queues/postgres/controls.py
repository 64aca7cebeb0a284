"""Controls: the limits, pauses and holds of queues, and when a queue's next task may be leased."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from safedefer.queues.postgres.statements import SQL, interval, moment
from safedefer.queues.rates import DEFAULT_BUCKET, QueueControl, QueueLimits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safedefer.queues.postgres.connection import Connection


async def clock(connection: Connection) -> float:
    """Return the time of the database, in seconds since the epoch."""
    (row,) = await connection.fetch(SQL["clock"])
    return float(row["now"])


async def read_controls(
    connection: Connection, queues: Sequence[str], *, lock: bool = False
) -> dict[str, QueueControl]:
    """Return the controls of some queues, sorted by name; ``lock`` locks their rows until the transaction ends."""
    rows = await connection.fetch(SQL["controls_lock" if lock else "controls_of"], list(queues))
    return {row["queue"]: QueueControl.stored(**dict(row)) for row in rows}


async def put_control(connection: Connection, control: QueueControl, *, now: float) -> None:
    """Store a control; one that limits nothing is deleted."""
    if not control.binds(now):
        await connection.execute(SQL["control_delete"], control.queue)
        return
    limits = control.limits
    await connection.execute(
        SQL["control_set"],
        control.queue,
        limits.rate,
        limits.bucket_size,
        limits.max_concurrent,
        control.paused,
        control.held_until,
        control.tokens,
        control.refilled,
    )


async def current_controls(connection: Connection) -> list[QueueControl]:
    """Return all controls with their buckets refilled up to now, sorted by name."""
    here = await clock(connection)
    return [QueueControl.stored(**dict(row)).refill(here) for row in await connection.fetch(SQL["controls"])]


async def configure(connection: Connection, limits: Sequence[QueueLimits]) -> None:
    """Put the declared limits in force. Other queues lose their limits, and keep a pause or a hold."""
    now = await clock(connection)
    declared = {item.queue: item for item in limits}
    await connection.fetch(SQL["controls_lock_all"])
    known = await read_controls(connection, list(declared))
    for queue, item in declared.items():
        control = known.get(queue)
        changed = QueueControl.new(item, now=now) if control is None else control.configured(item, now=now)
        if changed is not control:
            await put_control(connection, changed, now=now)
    await connection.execute(SQL["controls_end_limits"], list(declared), DEFAULT_BUCKET, now)
    await connection.execute(SQL["controls_end"], list(declared), now)


async def change_control(
    connection: Connection, queue: str, *, paused: bool | None = None, hold_for: float | None = None
) -> None:
    """Pause or resume a queue, or hold it for ``hold_for`` seconds; a longer hold stays in force."""
    now = await clock(connection)
    known = await read_controls(connection, [queue], lock=True)
    control = known.get(queue) or QueueControl.new(QueueLimits(queue=queue), now=now)
    if paused is not None:
        control = replace(control, paused=paused)
    if hold_for is not None:
        control = replace(control, held_until=max(now + hold_for, control.held_until))
    await put_control(connection, control, now=now)


async def next_due(connection: Connection, *, seconds: float, now: float, queues: Sequence[str] | None) -> float | None:
    """Return when the next task or lease falls due and its queue may give it, by the clock that reads ``now``.

    Args:
        connection: Where.
        seconds: The length of a lease.
        now: The caller's time.
        queues: Only these; None: all.
    """
    if queues is None:
        queues = [row["queue"] for row in await connection.fetch(SQL["queues_with_jobs"])]
    rows = await connection.fetch(SQL["next_due"], list(dict.fromkeys(queues)), interval(seconds))
    due = {row["queue"]: moment(row["due"]) for row in rows if row["due"] is not None}
    if not due:
        return None
    here = await clock(connection)
    known = await read_controls(connection, list(due))
    counts = await connection.fetch(SQL["running"], list(known), interval(seconds)) if known else ()
    running = {row["queue"]: row["running"] for row in counts}
    for queue, control in known.items():
        if control.binds(here):
            due[queue] = control.refill(here).opens(due[queue], now=here, running=running.get(queue, 0))
    return float(min(due.values())) - here + now
