"""The ledger and the stored tokens of a store, as a push engine's queue and its handler use them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from safedefer.queues.base import BLOB_KEY

if TYPE_CHECKING:
    from safedefer.ledger import Admission, AttemptRecord, Execution, LedgerCalls, PushedCalls, RunEnd
    from safedefer.queues.base import PullQueue
    from safedefer.queues.push_engine import PushEngine


def progress_key(audience: str, task_id: str) -> str:
    """Return the key under which the store keeps what was counted of a task."""
    return f"task:{audience}:{task_id}"


def cancel_key(task_id: str) -> str:
    """Return the key under which the store keeps that a task was cancelled."""
    return f"cancel:{task_id}"


class PushedBlobs:
    """The stored tokens of oversize tasks, which wait in the store or are with the engine."""

    def __init__(self, store: PullQueue) -> None:
        self._store = store

    def get(self, blob_id: str) -> bytes | None:
        """Return the bytes, or None if there are none."""
        key = f"{BLOB_KEY}{blob_id}"
        data = self._store.keep.get_many((key,)).get(key)
        return self._store.blobs.get(blob_id) if data is None else data

    def delete(self, blob_id: str) -> None:
        """Delete a blob of a task that is with the engine."""
        self._store.keep.delete((f"{BLOB_KEY}{blob_id}",))


class PushedLedger:
    """The store's ledger. A task is marked as cancelled by its id alone: nobody knows its audience then."""

    def __init__(self, engine: PushEngine, store: PullQueue) -> None:
        self._engine = engine
        self._store = store

    def begin_many(self, executions: Sequence[Execution], *, now: float, lease: float) -> Sequence[Admission]:
        """Ask to run; ``lease`` is seconds."""
        return self._store.ledger.begin_many(executions, now=now, lease=lease)

    def extend_many(self, executions: Sequence[Execution], *, now: float, lease: float) -> Sequence[bool]:
        """Extend the leases of runs."""
        return self._store.ledger.extend_many(executions, now=now, lease=lease)

    def lost_many(self, executions: Sequence[Execution], *, now: float) -> Sequence[bool]:
        """Return for which of these tasks a run began and neither ended nor is extended any more."""
        return self._store.ledger.lost_many(executions, now=now)

    def finish_many(self, ends: Sequence[RunEnd]) -> Sequence[bool]:
        """Store the ends of runs."""
        return self._store.ledger.finish_many(ends)

    def record_many(self, records: Sequence[AttemptRecord]) -> None:
        """Store attempts that never came to run."""
        self._store.ledger.record_many(records)

    @property
    def calls(self) -> PushedCalls | None:
        """The store's calls for push engines, of the running loop; None if it has none, or another object is the store."""
        calls: PushedCalls | None = getattr(self._store, "pushed_calls", None)
        return calls

    @property
    def synced(self) -> bool:
        """Whether a change is to be synced by the call that makes it; else the engine has the store sync it later."""
        return not getattr(self._engine, "syncs_before_ack", False)

    @property
    def here(self) -> LedgerCalls | None:
        """The calls of the running loop."""
        here = self._store.ledger.here
        if here is None or self.synced or (calls := self.calls) is None:
            return here
        return _SyncedLater(here, calls)

    def cancelled_many(self, executions: Sequence[Execution]) -> Sequence[bool]:
        """Return which of these runs belong to tasks that were cancelled."""
        marks = self._store.keep.get_many([cancel_key(run.task_id) for run in executions])
        stored = self._store.ledger.cancelled_many(executions)
        return [known or cancel_key(run.task_id) in marks for run, known in zip(executions, stored, strict=True)]


class _SyncedLater:
    """``LedgerCalls`` whose ends the engine has the store sync before it acknowledges the task to its broker."""

    def __init__(self, calls: LedgerCalls, pushed: PushedCalls) -> None:
        self._calls = calls
        self._pushed = pushed

    async def begin_many(self, executions: Sequence[Execution], *, now: float, lease: float) -> Sequence[Admission]:
        """Ask to run."""
        return await self._calls.begin_many(executions, now=now, lease=lease)

    async def finish_many(self, ends: Sequence[RunEnd]) -> Sequence[bool]:
        """Store the ends of runs."""
        return await self._pushed.finish_many(ends, synced=False)
