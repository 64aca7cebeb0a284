"""The ledger and the blobs of the queue in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safedefer.ledger import Admission, AttemptRecord, EndState, Execution, RunEnd
from safedefer.queues import rules
from safedefer.queues.base import task_digest

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence
    from collections.abc import Set as AbstractSet

    from safedefer.queues.base import QueuedTask


@dataclass(slots=True)
class Entry:
    """What the ledger knows of a task. ``uncharged``: its run began, and its delivery is not settled."""

    digest: bytes
    state: str
    owner: str | None
    until: float
    expires: int
    uncharged: bool

    def known(self, now: float) -> rules.Entry:
        """Return what decides something."""
        return rules.Entry(self.state, self.uncharged, self.until > now)


class MemoryLedger:
    """A ``Ledger`` in memory, under the lock of its queue."""

    def __init__(self, lock: threading.Condition) -> None:
        self._lock = lock
        self._entries: dict[tuple[str, str], Entry] = {}
        self._records: dict[str, list[AttemptRecord]] = {}

    def begin(self, execution: Execution, *, now: float, lease: float) -> Admission:
        """Ask to run; ``lease`` is seconds."""
        with self._lock:
            entry = self._entries.get((execution.audience, execution.task_id))
            if entry is not None:
                known = entry.known(now)
                admission = rules.admit(execution, digest=entry.digest, owner=entry.owner, entry=known)
                if admission is not Admission.RUN:
                    return admission
            self._entries[execution.audience, execution.task_id] = Entry(
                digest=execution.digest,
                state=rules.RUNNING,
                owner=execution.owner,
                until=now + lease,
                expires=execution.expires if entry is None else entry.expires,
                uncharged=True,
            )
            return Admission.RUN

    def begin_many(self, executions: Sequence[Execution], *, now: float, lease: float) -> Sequence[Admission]:
        """Do what ``begin`` does for each."""
        return [self.begin(execution, now=now, lease=lease) for execution in executions]

    def extend(self, execution: Execution, *, now: float, lease: float) -> bool:
        """Prolong the run; False if it is no longer ours."""
        with self._lock:
            entry = self._ours(execution)
            if entry is not None:
                entry.until = now + lease
            return entry is not None

    def finish(self, execution: Execution, state: EndState, record: AttemptRecord) -> bool:
        """Store the end of a run and its record; False if it is no longer ours."""
        with self._lock:
            self.record(record)
            entry = self._ours(execution)
            if entry is not None:
                entry.state, entry.owner, entry.until = str(state), None, 0.0
            return entry is not None

    def finish_many(self, ends: Sequence[RunEnd]) -> Sequence[bool]:
        """Do what ``finish`` does for each."""
        return [self.finish(*end) for end in ends]

    def record(self, record: AttemptRecord) -> None:
        """Store an attempt that never came to run."""
        with self._lock:
            records = self._records.setdefault(record.task_id, [])
            records.append(record)
            del records[: -rules.RECORDS_KEPT]

    def prune(self, *, now: float) -> int:
        """Forget entries whose ``expires`` is over an hour past; returns how many."""
        with self._lock:
            old = [
                key
                for key, entry in self._entries.items()
                if entry.expires < now - rules.LEDGER_LEEWAY and not entry.known(now).running
            ]
            for key in old:
                del self._entries[key]
            return len(old)

    # --- For the queue, which holds the lock ------------------------------------------------------

    def entry(self, task: QueuedTask) -> Entry | None:
        """Return the entry of a task."""
        return self._entries.get((task.audience, task.id))

    def end(self, task: QueuedTask, state: EndState) -> None:
        """Note how a task ended, unless it has ended already."""
        entry = self.entry(task)
        if entry is None or not entry.known(0.0).ended:
            self._entries[task.audience, task.id] = Entry(
                digest=task_digest(task) if entry is None else entry.digest,
                state=str(state),
                owner=None,
                until=0.0,
                expires=task.expires if entry is None else entry.expires,
                uncharged=False,
            )

    def records_of(self, task_id: str) -> list[AttemptRecord]:
        """Return the records of a task, oldest first."""
        return list(self._records.get(task_id, ()))

    def last_reason(self, task_id: str) -> str | None:
        """Return the reason of the newest record of a task."""
        records = self._records.get(task_id)
        return records[-1].reason if records else None

    def prune_all(self, *, now: float, before: float, known: AbstractSet[str]) -> int:
        """Forget old entries, and the records from before ``before`` of tasks that are not ``known``."""
        old = [
            task_id for task_id, records in self._records.items() if task_id not in known and records[-1].ended < before
        ]
        for task_id in old:
            del self._records[task_id]
        return len(old) + self.prune(now=now)

    def _ours(self, execution: Execution) -> Entry | None:
        entry = self._entries.get((execution.audience, execution.task_id))
        running = entry is not None and entry.state == rules.RUNNING and entry.owner == execution.owner
        return entry if running else None


class MemoryBlobs:
    """A ``BlobStore`` in memory, under the lock of its queue."""

    def __init__(self, lock: threading.Condition, points_to: Callable[[str], bool]) -> None:
        self._lock = lock
        self._points_to = points_to
        self._data: dict[str, bytes] = {}

    @property
    def total(self) -> int:
        """Bytes of all blobs together."""
        return sum(map(len, self._data.values()))

    def get(self, blob_id: str) -> bytes | None:
        """Return the bytes, or None if there are none."""
        return self._data.get(blob_id)

    def put(self, blob_id: str, data: bytes) -> None:
        """Store a blob; ``enqueue`` does it together with its task."""
        self._data[blob_id] = data

    def delete(self, blob_id: str) -> None:
        """Delete a blob; nothing happens if there is none."""
        self._data.pop(blob_id, None)

    def collect(self, *, now: float) -> int:  # noqa: ARG002 - other stores need the time
        """Delete blobs that no waiting task points to; returns how many."""
        with self._lock:
            old = [blob_id for blob_id in self._data if not self._points_to(blob_id)]
            for blob_id in old:
                del self._data[blob_id]
            return len(old)
