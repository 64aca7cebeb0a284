"""What the SQLite engine does within a transaction: one function for each step of a task's life.

Every function takes the connection first, and leaves BEGIN, COMMIT and undoing to the writer.
"""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Any

from safedefer.errors import TaskAlreadyExistsError, TombstonedTaskError
from safedefer.ledger import AttemptRecord, EndState, VerifiedLetter
from safedefer.queues import rules
from safedefer.queues.base import (
    AlreadyWaiting,
    BlobsFull,
    BlobTaken,
    Lease,
    QueuedTask,
    Settlement,
    is_free_when_leased,
)
from safedefer.queues.poison_log import log_burial
from safedefer.queues.sqlite.connection import SQL
from safedefer.queues.sqlite.controls import due_under_control, in_force
from safedefer.queues.sqlite.repair import MOST_SEQ, BadValue, count_blobs
from safedefer.queues.sqlite.rows import (
    LEDGER,
    STANDING,
    LedgerRow,
    Standing,
    TaskRow,
    first_row,
    leased_task,
    task_values,
    tasks_by_seq,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import apsw


def newest_seq(connection: apsw.Connection) -> int:
    """Return the number of the newest task that was ever enqueued.

    Raises:
        BadValue: It is none of ours: ``mend`` numbers anew.
    """
    newest = connection.execute(SQL["newest_seq"]).get
    if type(newest) is not int or not 0 <= newest <= MOST_SEQ:
        raise BadValue
    return newest


# --- Enqueue --------------------------------------------------------------------------------------


def take_write_lock(connection: apsw.Connection) -> None:
    """Wait for the write lock in a transaction that somebody else began, before it reads.

    SQLite lets a transaction that has read not wait for another writer: ``BusyError`` at once, whatever its busy timeout.
    """
    connection.execute(SQL["write_lock"])


def enqueue(connection: apsw.Connection, task: QueuedTask, *, blob_limit: int) -> int:
    """Store a task, its name and its blob, as long as all blobs together have at most ``blob_limit`` bytes; return its number.

    After ``newest_seq``, which raises ``BadValue`` where somebody has used up the numbers of rows.

    Raises ``TaskAlreadyExistsError``, ``TombstonedTaskError`` and ``QueueUnavailable``.
    """
    values = task_values(task)
    state = connection.execute(SQL["id_taken"], values).get
    if state == "ended":
        raise TombstonedTaskError(f"the task {task.id} ended in this queue; defer it anew, with a new id")
    if state is not None:
        raise TaskAlreadyExistsError(f"the task {task.id} is in this queue already; enqueue it once")
    if task.unique_key is not None:
        waiting = connection.execute(SQL["unique_taken"], values).get
        if waiting is not None:
            raise AlreadyWaiting(waiting)
    if task.name is not None:
        _take_name(connection, task, task.name)
    connection.execute(SQL["task_insert"], values)
    seq = connection.last_insert_rowid()
    if task.blob is not None:
        if connection.execute(SQL["blob_taken"], values).get is not None:
            raise BlobTaken(task.blob.id)
        small = {"small": blob_limit // 2}
        stored = connection.execute(SQL["blob_bytes"], small).get
        if type(stored) is not int:  # somebody else wrote it
            count_blobs(connection)
            stored = connection.execute(SQL["blob_bytes"], small).get
        if stored + len(task.blob.data) > blob_limit:
            raise BlobsFull(blob_limit)
        connection.execute(SQL["blob_insert"], (task.blob.id, seq, task.blob.data))
    return seq


def _take_name(connection: apsw.Connection, task: QueuedTask, name: str) -> None:
    key = {"queue": task.queue, "name": name}
    row = first_row(connection.execute(SQL["name_until"], key))
    if row is not None and row[0] is None:
        raise TaskAlreadyExistsError(
            f"a task named {name!r} is waiting or running in the queue {task.queue!r}; choose another name"
        )
    if row is not None and row[0] > task.created:
        raise TombstonedTaskError(
            f"a task named {name!r} ended in the queue {task.queue!r}, and its name is free again in "
            f"{row[0] - task.created:.0f} s; choose another name"
        )
    connection.execute(SQL["name_take"], key)


# --- Lease ----------------------------------------------------------------------------------------


def lease(
    connection: apsw.Connection,
    *,
    owner: str,
    limit: int,
    seconds: float,
    now: float,
    queues: Sequence[str] | None,
    tombstone_seconds: float,
) -> list[Lease]:
    """Claim what is due, in the order in which it fell due; bury what is poison."""
    leases, leased = [], []
    prefix, until = f"{owner}:{secrets.token_hex(8)}-", now + seconds
    due = _due(connection, limit=limit, now=now, queues=queues)
    rows = tasks_by_seq(connection, due)
    for seq in due:
        row, losses = rows[seq], 0
        # A row that is leased for the first time has no entry but that of a stranger with its token.
        entry = known(connection, row.audience, row.id, now=now) if row.deliveries else None
        if row.owner is None and rules.waits_for_run(row.retry_reason, entry):
            connection.execute(SQL["task_wait"], {"seq": seq, "at": now + rules.PUT_OFF})
            continue
        if row.owner is not None or rules.has_lost_run(row.retry_reason, entry):
            lost = _after_lost_lease(connection, row, now=now)
            if (reason := lost.end_reason(now)) is not None:
                _bury(connection, row, lost, reason, now=now, tombstone_seconds=tombstone_seconds)
                continue
            row, losses = _counted(connection, row, lost), lost.losses
        elif entry is not None:
            losses = entry.losses
        leased.append(seq)
        if is_free_when_leased(row.unique_key):
            connection.execute(SQL["unique_free"], {"seq": seq})
        leases.append(leased_task(row, owner=f"{prefix}{seq}", until=until, losses=losses))
    if leased:
        values: dict[str, str | float] = {"seqs": json.dumps(leased), "prefix": prefix, "now": now, "until": until}
        connection.execute(SQL["tasks_lease"], values)
    return leases


def _due(connection: apsw.Connection, *, limit: int, now: float, queues: Sequence[str] | None) -> list[int]:
    if limit < 1:
        return []
    controls = in_force(connection, now=now, queues=queues)
    if controls:
        return due_under_control(connection, controls, limit=limit, now=now, queues=queues)
    if queues is None:
        found = connection.execute(SQL["due_of_all"], {"now": now, "limit": limit}).get
        due: list[int] = json.loads(str(found))
        return due
    of_queues: list[tuple[float, int]] = []
    for queue in dict.fromkeys(queues):
        of_queues += connection.execute(SQL["due_of_queue"], {"queue": queue, "now": now, "limit": limit})
    return [seq for _, seq in sorted(of_queues)[:limit]]


def _after_lost_lease(connection: apsw.Connection, row: TaskRow, *, now: float) -> rules.LostDelivery:
    """Count a delivery that nobody settled: as an attempt if its run had begun."""
    # The delivery that was lost is counted in the row since it was leased.
    before = row.counters._replace(retries=row.deliveries - 1)
    task, entry = (row.audience, row.id), known(connection, row.audience, row.id, now=now)
    if row.owner is None:
        options, all_counted = rules.stored_mapping(row.retry_options), row.counters._replace(retries=row.deliveries)
        lost = rules.after_lost_run(all_counted, task, entry, now=now, retry_options=options, eta=row.eta)
    else:
        lost = rules.after_lost_lease(before, task, entry, leased_at=row.leased_at, now=now)
    if lost.charged:
        values = {
            "audience": row.audience,
            "task_id": row.id,
            "attempts": lost.counters.attempts,
            "losses": lost.losses,
            "first_loss": lost.first_loss,
        }
        connection.execute(SQL["ledger_lost"], values)
    if lost.record is not None:
        add_record(connection, lost.record, trim=row.deliveries >= rules.RECORDS_KEPT)
    return lost


def _counted(connection: apsw.Connection, row: TaskRow, lost: rules.LostDelivery) -> TaskRow:
    """Store what a lost delivery leaves in the counters of its row, and return the row with it."""
    left: dict[str, Any] = {
        "attempts": lost.counters.attempts,
        "first_attempt": lost.counters.first_attempt,
        "previous_response": lost.counters.previous_response,
        "retry_reason": lost.counters.retry_reason,
    }
    connection.execute(SQL["task_count"], {"seq": row.seq, **left})
    return row._replace(**left)


def _bury(
    connection: apsw.Connection,
    row: TaskRow,
    lost: rules.LostDelivery,
    reason: str,
    *,
    now: float,
    tombstone_seconds: float,
) -> None:
    """Make a dead letter of a task whose run ended its process once too often."""
    there = standing(connection, row.id)
    assert there is not None  # the row was read in this transaction
    ending = rules.Ending(EndState.FAILED, reason, lost.charged)
    end(connection, row.id, there, ending, now=now, tombstone_seconds=tombstone_seconds)
    log_burial(row.id, reason, lost)


def release(connection: apsw.Connection, owners: Sequence[str], *, now: float) -> int:
    """Let leases of dead dispatchers fall due whose run has not begun; returns how many."""
    released = 0
    for owner in owners:
        connection.execute(SQL["leases_release"], {"prefix": f"{owner}:", "now": now})
        released += connection.changes()
    return released


def extend(connection: apsw.Connection, held: Lease, *, until: float) -> bool:
    """Prolong a lease; False if it was lost."""
    connection.execute(SQL["task_extend"], {"id": held.task.id, "owner": held.owner, "until": until})
    return connection.changes() > 0


# --- Settle ---------------------------------------------------------------------------------------


def retry(
    connection: apsw.Connection,
    task_id: str,
    row: Standing,
    settlement: Settlement,
    entry: rules.Known | None,
    *,
    now: float,
) -> None:
    """Let a task wait for its retry, and note it in the ledger's entry, if there is one."""
    at = now if settlement.at is None else settlement.at
    connection.execute(
        SQL["task_retry"],
        {
            "seq": row.seq,
            "at": at,
            "now": now,
            "charged": int(settlement.charged),
            "executed": int(settlement.executed),
            "rejected": int(settlement.rejected),
            "status": settlement.status,
            "reason": settlement.reason,
        },
    )
    if entry is not None:
        owed = int(not rules.retry_charges(settlement, entry))
        key = {"audience": row.audience, "task_id": task_id}
        not_before = at if rules.sets_time(settlement) else None
        connection.execute(SQL["ledger_retry"], {**key, "seq": row.seq, "not_before": not_before, "owed": owed})


def end(
    connection: apsw.Connection,
    task_id: str,
    row: Standing,
    how: rules.Ending,
    entry: rules.Known | None = None,
    *,
    now: float,
    tombstone_seconds: float,
) -> None:
    """End a task: history or dead letter, tombstone, ledger; its row goes, and with it its blob and its unique key.

    ``entry`` is the ledger's, if it was read: what has ended there stays as it is.
    """
    recorded = connection.execute(SQL["attempts_last_reason"], (task_id,)).get if how.by_record else None
    state, reason = str(how.state), recorded or how.reason
    values = {"seq": row.seq, "state": state, "now": now, "reason": reason, "charged": int(how.charged)}
    connection.execute(SQL["task_to_dead" if how.state is EndState.FAILED else "task_to_ended"], values)
    if row.name is not None:
        connection.execute(SQL["name_bury"], {"queue": row.queue, "name": row.name, "until": now + tombstone_seconds})
    connection.execute(SQL["task_delete"], (row.seq,))
    if entry is not None and entry.ended:
        return
    connection.execute(
        SQL["ledger_end"],
        {
            "audience": row.audience,
            "task_id": task_id,
            "digest": row.digest,
            "state": state,
            "expires": row.expires,
        },
    )


def cancel(connection: apsw.Connection, task_id: str, *, now: float, tombstone_seconds: float) -> bool:
    """End a waiting task unrun; False if it does not wait, runs now, or has ended by the ledger."""
    row = standing(connection, task_id)
    if row is None or (row.owner is not None and row.due > now):
        return False
    if not rules.may_cancel(known(connection, row.audience, task_id, now=now)):
        return False
    end(connection, task_id, row, rules.Ending(EndState.CANCELLED), now=now, tombstone_seconds=tombstone_seconds)
    return True


def stop(connection: apsw.Connection, task_id: str, *, now: float) -> bool:
    """Mark a task as cancelled that is leased or runs; False if there is none, or it has ended by the ledger."""
    row = standing(connection, task_id)
    if row is None or not rules.may_stop(known(connection, row.audience, task_id, now=now)):
        return False
    values = {"audience": row.audience, "task_id": task_id, "digest": row.digest, "expires": row.expires}
    connection.execute(SQL["ledger_cancel"], values)
    return True


def replace_dead(
    connection: apsw.Connection,
    task_id: str,
    task: QueuedTask,
    letter: VerifiedLetter,
    *,
    now: float,
    blob_limit: int,
) -> bool:
    """Enqueue ``task`` in the place of a dead letter; False if there is none."""
    connection.execute(SQL["dead_delete"], (task_id,))
    if not connection.changes():
        return False
    entry = find_ledger(connection, letter.audience, task_id)
    digest, known_entry = (None, None) if entry is None else (entry.digest, entry.known(now))
    rules.check_replacement(letter, digest=digest, entry=known_entry)
    values = {"audience": letter.audience, "task_id": task_id, "digest": letter.digest, "expires": letter.expires}
    connection.execute(SQL["ledger_replace"], values)
    connection.execute(SQL["attempts_become_stray"], (task_id,))
    newest_seq(connection)
    enqueue(connection, task, blob_limit=blob_limit)
    return True


def drop_dead(connection: apsw.Connection, task_ids: Sequence[str]) -> int:
    """Delete dead letters; their records go with time. Returns how many there were."""
    dropped = 0
    for task_id in task_ids:
        connection.execute(SQL["dead_delete"], (task_id,))
        if connection.changes():
            dropped += 1
            connection.execute(SQL["attempts_become_stray"], (task_id,))
    return dropped


def purge(
    connection: apsw.Connection,
    queue: str,
    *,
    after: int,
    newest: int,
    limit: int,
    now: float,
    tombstone_seconds: float,
) -> tuple[int | None, int]:
    """Cancel what waits among the next ``limit`` tasks of a queue.

    Returns the ``seq`` to go on after, None at the end, and how many were cancelled.
    """
    values: dict[str, str | int] = {"queue": queue, "after": after, "newest": newest, "limit": limit}
    rows = connection.execute(SQL["purge_next"], values).fetchall()
    cancelled = sum(
        cancel(connection, str(task_id), now=now, tombstone_seconds=tombstone_seconds) for _, task_id in rows
    )
    return (int(rows[-1][0]) if rows else None), cancelled  # type: ignore[arg-type]  # a row has any values


# --- Shared ---------------------------------------------------------------------------------------


def standing(connection: apsw.Connection, task_id: str) -> Standing | None:
    """Return how a task that has not ended stands."""
    row = first_row(connection.execute(SQL["task_standing"], (task_id,)))
    return None if row is None else Standing._make(STANDING.check(row))


def find_ledger(connection: apsw.Connection, audience: str, task_id: str) -> LedgerRow | None:
    """Return the ledger's entry of a task."""
    row = first_row(connection.execute(SQL["ledger_find"], {"audience": audience, "task_id": task_id}))
    return None if row is None else LedgerRow._make(LEDGER.check(row))


def known(connection: apsw.Connection, audience: str, task_id: str, *, now: float) -> rules.Known | None:
    """Return the ledger's facts that admission and settlement depend on."""
    row = find_ledger(connection, audience, task_id)
    return None if row is None else row.known(now)


def add_record(connection: apsw.Connection, record: AttemptRecord, *, trim: bool = True) -> None:
    """Store the record of an attempt; ``trim`` drops the oldest of more than are kept.

    Looking for them takes longer than storing the record, so who knows that there are few does not ask for it.
    """
    connection.execute(SQL["attempt_insert"], record)
    if trim:
        connection.execute(SQL["attempts_trim"], (record.task_id, rules.RECORDS_KEPT))


def archive(connection: apsw.Connection, *, now: float, dead_seconds: float, dead_limit: int, limit: int) -> int:
    """Put aside dead letters that are too old or too many, up to ``limit`` of either; returns how many."""
    values = {"now": now, "before": now - dead_seconds, "keep": dead_limit, "limit": limit}
    archived = 0
    for name in ("dead_archive_old", "dead_archive_excess"):
        connection.execute(SQL[name], values)
        archived += connection.changes()
    return archived


def prune(connection: apsw.Connection, *, now: float, history_seconds: float, limit: int) -> int:
    """Forget tombstones, history and stray records by age, up to ``limit`` of each."""
    values = {"now": now, "before": now - history_seconds, "limit": limit}
    removed = 0
    for name in ("names_prune", "attempts_of_ended_prune", "ended_prune", "attempts_stray_prune"):
        connection.execute(SQL[name], values)
        removed += connection.changes()
    return removed
