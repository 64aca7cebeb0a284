"""Settling many deliveries in a transaction. What ends in the usual way ends together, in two statements."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from safedefer.queues import rules
from safedefer.queues.base import Verdict
from safedefer.queues.sqlite.connection import SQL
from safedefer.queues.sqlite.operations import add_record, end, retry
from safedefer.queues.sqlite.rows import LEDGER, STANDING, LedgerRow, Standing

if TYPE_CHECKING:
    from collections.abc import Sequence

    import apsw

    from safedefer.queues.base import Lease, Settlement


def settle_all(
    connection: apsw.Connection,
    settlements: Sequence[tuple[Lease, Settlement]],
    *,
    now: float,
    tombstone_seconds: float,
) -> list[bool]:
    """Apply what dispatchers say of deliveries; False, and nothing, for each whose task is not its own now.

    A statement that moves one row costs SQLite four times what the row costs in a statement that moves many: it is undone
    alone if it fails. So the tasks that succeeded, by the ledger too, are moved to the history together, before all others.
    """
    moved = _move_succeeded(connection, settlements, now=now)
    if len(moved) == len(settlements):
        return [True] * len(settlements)
    stand = _standings(connection, [held.task.id for held, _ in settlements if held.task.id not in moved], now=now)
    results = []
    for held, settlement in settlements:
        # Whoever settles a task twice has it no more the second time.
        row, entry = stand.pop(held.task.id, (None, None))
        ours = row is not None and row.owner == held.owner
        results.append(ours or held.task.id in moved)
        if row is not None and ours:
            _settle(connection, held, settlement, row, entry, now=now, tombstone_seconds=tombstone_seconds)
    return results


def _move_succeeded(
    connection: apsw.Connection, settlements: Sequence[tuple[Lease, Settlement]], *, now: float
) -> set[str]:
    """Move what has no name and succeeded, by the ledger too, with a run still to be charged; return the ids."""
    owners = {held.task.id: held.owner for held, settlement in settlements if _has_succeeded(settlement)}
    if not owners or len({held.task.id for held, _ in settlements}) < len(settlements):
        return set()
    found = str(connection.execute(SQL["tasks_succeeded"], {"owners": json.dumps(owners)}).get)
    if moved := set(json.loads(found)):
        connection.execute(SQL["tasks_to_ended"], {"ids": found, "now": now})
        connection.execute(SQL["tasks_delete"], {"ids": found})
    return moved


def _has_succeeded(settlement: Settlement) -> bool:
    """Whether a handler answered that a run succeeded, and there is nothing else to store: as ``rules.end_of`` says.

    Such an end is ``Ending(EndState.SUCCEEDED, charged=True)`` if the ledger knows it too, and that it is uncharged.
    """
    done = settlement.verdict is Verdict.DONE and settlement.answered and settlement.charged
    return done and settlement.reason is None and settlement.record is None


def _standings(
    connection: apsw.Connection, task_ids: Sequence[str], *, now: float
) -> dict[str, tuple[Standing, rules.Known | None]]:
    """Return how tasks stand that have not ended, and what the ledger knows of each, by id."""
    found = {}
    for task_id, *row in connection.execute(SQL["standings"], {"ids": json.dumps(task_ids)}):
        entry = tuple(row[len(STANDING) :])
        known = None if entry[0] is None else LedgerRow._make(LEDGER.check(entry)).known(now)
        found[str(task_id)] = Standing._make(STANDING.check(tuple(row[: len(STANDING)]))), known
    return found


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
