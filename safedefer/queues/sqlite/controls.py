"""Rates, caps, pauses and holds in the queue's SQLite file: decided inside the transaction of ``lease``.

Every function takes the connection first, and leaves BEGIN, COMMIT and undoing to the writer.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from safedefer.queues.rates import DEFAULT_BUCKET, QueueControl, QueueLimits
from safedefer.queues.sqlite.connection import SQL
from safedefer.queues.sqlite.repair import number

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import apsw


def read(connection: apsw.Connection) -> dict[str, QueueControl]:
    """Return all controls by queue, sorted: for people. Anybody who writes the file may have added any number."""
    return _by_queue(connection.execute(SQL["controls"]))


def in_force(connection: apsw.Connection, *, now: float, queues: Sequence[str] | None) -> dict[str, QueueControl]:
    """Return the controls that may hold one of ``queues`` back now, as they are stored; None: of the queues with tasks."""
    if connection.execute(SQL["any_control"]).get is None:
        return {}
    if queues is None:
        found = _by_queue(connection.execute(SQL["controls_with_tasks"]))
    else:
        found = _by_queue(row for queue in queues for row in connection.execute(SQL["control_of"], (queue,)))
    return {queue: control for queue, control in found.items() if control.binds(now)}


def _by_queue(rows: Iterable[tuple[Any, ...]]) -> dict[str, QueueControl]:
    controls = {}
    for queue, rate, bucket, most, paused, held, tokens, refilled in rows:
        controls[queue] = QueueControl.stored(
            queue=queue,
            rate=rate,
            bucket_size=bucket,
            max_concurrent=most,
            paused=paused,
            held_until=held,
            tokens=tokens,
            refilled=refilled,
        )
    return controls


def write(connection: apsw.Connection, control: QueueControl) -> None:
    """Store a control."""
    limits = control.limits
    connection.execute(
        SQL["control_set"],
        {
            "queue": control.queue,
            "rate": limits.rate,
            "bucket_size": limits.bucket_size,
            "max_concurrent": limits.max_concurrent,
            "paused": int(control.paused),
            "held_until": control.held_until,
            "tokens": control.tokens,
            "refilled": control.refilled,
        },
    )


def configure(connection: apsw.Connection, limits: Sequence[QueueLimits], *, now: float) -> None:
    """Put the declared limits in force; the other queues keep a pause or a hold at most."""
    declared = {item.queue: item for item in limits}
    for queue, item in declared.items():
        control = _stored(connection, queue)
        changed = QueueControl.new(item, now=now) if control is None else control.configured(item, now=now)
        if changed is not control:
            write(connection, changed)
    values = {"declared": json.dumps(list(declared)), "now": now}
    connection.execute(SQL["controls_end_limits"], {**values, "bucket_size": DEFAULT_BUCKET})
    connection.execute(SQL["controls_end"], values)


def pause(connection: apsw.Connection, queue: str, *, paused: bool, now: float) -> None:
    """Pause or resume a queue."""
    _put(connection, replace(_control(connection, queue, now=now), paused=paused), now=now)


def hold(connection: apsw.Connection, queue: str, *, until: float, now: float) -> None:
    """Hold a queue until a time, or longer if it is held already."""
    control = _control(connection, queue, now=now)
    _put(connection, replace(control, held_until=max(until, control.held_until)), now=now)


def _control(connection: apsw.Connection, queue: str, *, now: float) -> QueueControl:
    return _stored(connection, queue) or QueueControl.new(QueueLimits(queue=queue), now=now)


def _stored(connection: apsw.Connection, queue: str) -> QueueControl | None:
    return _by_queue(connection.execute(SQL["control_of"], (queue,))).get(queue)


def _put(connection: apsw.Connection, control: QueueControl, *, now: float) -> None:
    if control.binds(now):
        write(connection, control)
    else:
        connection.execute(SQL["control_delete"], (control.queue,))


def due_under_control(
    connection: apsw.Connection,
    controls: Mapping[str, QueueControl],
    *,
    limit: int,
    now: float,
    queues: Sequence[str] | None,
) -> list[int]:
    """Return what is due and may be leased now, what fell due first first, and take the tokens for it."""
    found: list[tuple[float, int, str]] = []
    for queue in _names(connection, queues):
        control = controls.get(queue)
        allowed = None if control is None else _allowance(connection, control, now=now)
        most = limit if allowed is None else min(limit, allowed)
        if most > 0:
            rows = connection.execute(SQL["due_of_queue"], {"queue": queue, "now": now, "limit": most})
            found += ((due, seq, queue) for due, seq in rows)
    chosen = heapq.nsmallest(limit, found)
    for queue, count in Counter(queue for _, _, queue in chosen).items():
        if queue in controls and controls[queue].limits.rate is not None:
            write(connection, controls[queue].refill(now).spend(count))
    return [seq for _, seq, _ in chosen]


def next_due(
    connection: apsw.Connection, controls: Mapping[str, QueueControl], *, now: float, queues: Sequence[str] | None
) -> float | None:
    """When the next task falls due, or its queue lets it."""
    found = []
    for queue in _names(connection, queues):
        due = number(connection.execute(SQL["next_due_of_queue"], (queue,)).get)
        if due is None:
            continue
        control = controls.get(queue)
        running = 0 if control is None else _running(connection, control, now=now)
        found.append(due if control is None else control.refill(now).opens(due, now=now, running=running))
    return min(found, default=None)


def _allowance(connection: apsw.Connection, control: QueueControl, *, now: float) -> int | None:
    filled = control.refill(now)
    if control.refilled > now and control.limits.rate is not None:
        write(connection, filled)  # the clock was set back: from here the bucket gains again
    return filled.allowance(now=now, running=_running(connection, control, now=now))


def _names(connection: apsw.Connection, queues: Sequence[str] | None) -> Iterable[str]:
    if queues is not None:
        return dict.fromkeys(queues)
    return [str(queue) for (queue,) in connection.execute(SQL["queues_with_tasks"]).fetchall()]


def _running(connection: apsw.Connection, control: QueueControl, *, now: float) -> int:
    if control.limits.max_concurrent is None:
        return 0
    return int(connection.execute(SQL["running_of_queue"], {"queue": control.queue, "now": now}).get)
