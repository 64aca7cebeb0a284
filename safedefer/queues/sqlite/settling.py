"""Settling many deliveries in a transaction. What ends in the usual way ends together, in two statements."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from safedefer.ledger import EndState
from safedefer.queues import rules
from safedefer.queues.base import Verdict
from safedefer.queues.sqlite.connection import SQL
from safedefer.queues.sqlite.operations import add_record, end, retry
from safedefer.queues.sqlite.repair import checked
from safedefer.queues.sqlite.rows import LEDGER, STANDING, LedgerRow, Standing

if TYPE_CHECKING:
    from collections.abc import Sequence

    import apsw

    from safedefer.queues.base import Lease, Settlement

_SUCCEEDED: Final = rules.Ending(EndState.SUCCEEDED, charged=True)


def settle_all(
    connection: apsw.Connection,
    settlements: Sequence[tuple[Lease, Settlement]],
    *,
    now: float,
    tombstone_seconds: float,
) -> list[bool]:
    """Apply what dispatchers say of deliveries; False, and nothing, for each whose task is not its own now.

    A statement that moves one row costs SQLite four times what the row costs in a statement that moves many: it is undone
    alone if it fails. So the tasks that succeeded, by the ledger too, are moved to the history after all others.
    """
    stand = _standings(connection, [held.task.id for held, _ in settlements], now=now)
    results, ended = [], []
    for held, settlement in settlements:
        # Whoever settles a task twice has it no more the second time.
        row, entry = stand.pop(held.task.id, (None, None))
        ours = row is not None and row.owner == held.owner
        results.append(ours)
        if row is None or not ours:
            continue
        if entry is not None and entry.ended and row.name is None and _ends(settlement, entry) == _SUCCEEDED:
            ended.append(row.seq)
        else:
            _settle(connection, held, settlement, row, entry, now=now, tombstone_seconds=tombstone_seconds)
    if ended:
        seqs = json.dumps(ended)
        connection.execute(SQL["tasks_to_ended"], {"seqs": seqs, "now": now})
        connection.execute(SQL["tasks_delete"], {"seqs": seqs})
    return results


def _standings(
    connection: apsw.Connection, task_ids: Sequence[str], *, now: float
) -> dict[str, tuple[Standing, rules.Known | None]]:
    """Return how tasks stand that have not ended, and what the ledger knows of each, by id."""
    found = {}
    for task_id, *row in connection.execute(SQL["standings"], {"ids": json.dumps(task_ids)}):
        entry = tuple(row[len(STANDING) :])
        known = None if entry[0] is None else LedgerRow._make(checked(entry, LEDGER)).known(now)
        found[str(task_id)] = Standing._make(checked(tuple(row[: len(STANDING)]), STANDING)), known
    return found


def _ends(settlement: Settlement, entry: rules.Known) -> rules.Ending | None:
    """Return how a task ends that its handler answered for, and that leaves no record; None for any other."""
    if settlement.verdict is not Verdict.DONE or settlement.record is not None or not settlement.answered:
        return None
    return rules.end_of(settlement, entry)


def _settle(
    connection: apsw.Connection,
    held: Lease,
    settlement: Settlement,
    row: Standing,
    entry: rules.Known | None,
    *,
    now: float,
    tombstone_seconds: float,
) -> None:
    settlement = rules.by_ledger(held, settlement, entry, now=now)
    if settlement.record is not None:
        add_record(connection, settlement.record, trim=held.retries >= rules.RECORDS_KEPT)
    if settlement.verdict is Verdict.RETRY:
        retry(connection, held.task.id, row, settlement, entry, now=now)
    else:
        ending = rules.end_of(settlement, entry)
        end(connection, held.task.id, row, ending, entry, now=now, tombstone_seconds=tombstone_seconds)
