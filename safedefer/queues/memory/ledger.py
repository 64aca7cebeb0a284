"""The ledger and the blobs of the queue in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safedefer.ledger import Admission, AttemptRecord, EndState, Execution, RunEnd, VerifiedLetter
from safedefer.queues import rules
from safedefer.queues.base import BLOB_KEY, BlobsFull, task_digest

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
    not_before: float = 0.0
    """The time of the retry."""
    attempts: int = 0
    """As the queue counted them when it settled the last delivery."""
    losses: int = 0
    first_loss: float | None = None

    def known(self, now: float) -> rules.Known:
        """Return the facts that admission and settlement depend on."""
        return rules.Known(
            self.state, self.uncharged, self.until > now, self.not_before > now, self.losses, self.first_loss
        )

    def forget_losses(self) -> None:
        """Reset the losses: the run gave a sign of life."""
        self.losses, self.first_loss = 0, None


class MemoryLedger:
    """A ``Ledger`` in memory, under the lock of its queue, which says whether a task waits or runs in it."""

    def __init__(self, lock: threading.Condition, is_live: Callable[[str], bool]) -> None:
        self._lock = lock
        self._is_live = is_live
        self._entries: dict[tuple[str, str], Entry] = {}
        self._records: dict[str, list[AttemptRecord]] = {}

    def records(self) -> list[AttemptRecord]:
        """Return all records."""
        with self._lock:
            return [record for records in self._records.values() for record in records]

    @property
    def here(self) -> None:
        """None: there are no connections."""
        return None

    def begin_many(self, executions: Sequence[Execution], *, now: float, lease: float) -> Sequence[Admission]:
        """Ask to run; ``lease`` is seconds."""
        return [self._begin(execution, now=now, lease=lease) for execution in executions]

    def _begin(self, execution: Execution, *, now: float, lease: float) -> Admission:
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
                attempts=0 if entry is None else entry.attempts,
                losses=0 if entry is None else entry.losses,
                first_loss=None if entry is None else entry.first_loss,
            )
            return Admission.RUN

    def extend_many(self, executions: Sequence[Execution], *, now: float, lease: float) -> Sequence[bool]:
        """Extend the leases of runs; False for each that another owner has."""
        with self._lock:
            entries = [self._ours(execution) for execution in executions]
            for execution, entry in zip(executions, entries, strict=True):
                if entry is not None:
                    entry.until = now + lease
                elif (other := self._same(execution)) is not None:
                    other.forget_losses()
            return [entry is not None for entry in entries]

    def lost_many(self, executions: Sequence[Execution], *, now: float) -> Sequence[bool]:
        """Return for which of these tasks a run began and neither ended nor is extended any more."""
        with self._lock:
            entries = [self._same(execution) for execution in executions]
            return [entry is not None and rules.is_lost(entry.known(now)) for entry in entries]

    def cancelled_many(self, executions: Sequence[Execution]) -> Sequence[bool]:
        """Return which of these runs belong to tasks that were cancelled."""
        with self._lock:
            entries = [self._entries.get((execution.audience, execution.task_id)) for execution in executions]
            return [entry is not None and entry.state == EndState.CANCELLED for entry in entries]

    def finish_many(self, ends: Sequence[RunEnd]) -> Sequence[bool]:
        """Store the ends of runs and their records; False stands for one that does not count any more."""
        return [self._finish(*end) for end in ends]

    def _finish(self, execution: Execution, state: EndState, record: AttemptRecord) -> bool:
        with self._lock:
            self.record(record)
            entry = self._same(execution)
            if entry is None:
                return False
            entry.forget_losses()
            if not rules.end_counts(state, entry.known(0.0), ours=entry.owner == execution.owner):
                return False
            entry.state, entry.owner, entry.until = str(state), None, 0.0
            entry.uncharged = entry.uncharged and rules.leaves_charge(state, record)
            if state is EndState.RETRY and not self._is_live(execution.task_id):
                entry.uncharged = False  # nobody settles it: whoever posts it tries again
            return True

    def record_many(self, records: Sequence[AttemptRecord]) -> None:
        """Store records of attempts that ran nothing."""
        with self._lock:
            for record in records:
                self.record(record)

    # --- For the queue, which holds the lock ------------------------------------------------------

    def record(self, record: AttemptRecord) -> None:
        """Store the record of an attempt."""
        records = self._records.setdefault(record.task_id, [])
        records.append(record)
        del records[: -rules.RECORDS_KEPT]

    def entry(self, task: QueuedTask) -> Entry | None:
        """Return the entry of a task."""
        return self._entries.get((task.audience, task.id))

    def known(self, key: tuple[str, str], now: float) -> rules.Known | None:
        """Return what is known of a task, by audience and id."""
        entry = self._entries.get(key)
        return None if entry is None else entry.known(now)

    def end(self, task: QueuedTask, state: EndState) -> None:
        """Note how a task ended, unless it has ended already."""
        entry = self.entry(task)
        if entry is None or entry.state in (rules.RUNNING, EndState.RETRY):
            self._entries[task.audience, task.id] = Entry(
                digest=task_digest(task) if entry is None else entry.digest,
                state=str(state),
                owner=None,
                until=0.0,
                expires=task.expires if entry is None else entry.expires,
                uncharged=False,
            )

    def check_replacement(self, task_id: str, letter: VerifiedLetter, *, now: float) -> None:
        """Check that a dead letter may be replaced."""
        entry = self._entries.get((letter.audience, task_id))
        digest, known = (None, None) if entry is None else (entry.digest, entry.known(now))
        rules.check_replacement(letter, digest=digest, entry=known)

    def replace(self, task_id: str, letter: VerifiedLetter) -> None:
        """Note that a dead letter was replaced."""
        self._entries[letter.audience, task_id] = Entry(
            digest=letter.digest,
            state=str(EndState.CANCELLED),
            owner=None,
            until=0.0,
            expires=letter.expires,
            uncharged=False,
        )

    def settle_retry(self, task: QueuedTask) -> None:
        """Note that the retry of a task is settled: its row goes, and a push engine delivers it."""
        entry = self.entry(task)
        if entry is not None and entry.state == EndState.RETRY:
            entry.uncharged = False

    def cancel(self, task: QueuedTask) -> None:
        """Mark a leased or running task as cancelled; its run stays uncharged."""
        entry = self.entry(task)
        if entry is None:
            self.end(task, EndState.CANCELLED)
        else:
            entry.state, entry.owner, entry.until = str(EndState.CANCELLED), None, 0.0

    def records_of(self, task_id: str) -> list[AttemptRecord]:
        """Return the records of a task, oldest first."""
        return list(self._records.get(task_id, ()))

    def last_reason(self, task_id: str) -> str | None:
        """Return the reason of the newest record of a task."""
        records = self._records.get(task_id)
        return records[-1].reason if records else None

    def prune(self, *, now: float, before: float, known: AbstractSet[str], dead: AbstractSet[str]) -> int:
        """Forget old entries but those of the ``dead``, and the records from before ``before`` of what is not ``known``."""
        old = [
            task_id for task_id, records in self._records.items() if task_id not in known and records[-1].ended < before
        ]
        for task_id in old:
            del self._records[task_id]
        expired = [
            key
            for key, entry in self._entries.items()
            if entry.expires < now - rules.LEDGER_LEEWAY and not entry.known(now).running and key[1] not in dead
        ]
        for key in expired:
            del self._entries[key]
        return len(old) + len(expired)

    def _same(self, execution: Execution) -> Entry | None:
        entry = self._entries.get((execution.audience, execution.task_id))
        return None if entry is None or entry.digest != execution.digest else entry

    def _ours(self, execution: Execution) -> Entry | None:
        entry = self._entries.get((execution.audience, execution.task_id))
        running = entry is not None and entry.state == rules.RUNNING and entry.owner == execution.owner
        return entry if running else None


class MemoryBlobs:
    """A ``BlobStore`` in memory. The queue writes it under its lock."""

    def __init__(self) -> None:
        self._data: dict[str, bytes] = {}

    @property
    def total(self) -> int:
        """Bytes of all blobs together."""
        return sum(map(len, self._data.values()))

    def get(self, blob_id: str) -> bytes | None:
        """Return the bytes, or None if there are none."""
        return self._data.get(blob_id)

    def put(self, blob_id: str, data: bytes) -> None:
        """Store a blob."""
        self._data[blob_id] = data

    def delete(self, blob_id: str) -> None:
        """Delete a blob; nothing happens if there is none."""
        self._data.pop(blob_id, None)


class MemoryKeep:
    """A ``Keep`` in memory, under the lock of its queue."""

    def __init__(self, lock: threading.Condition, limit: int) -> None:
        self._lock = lock
        self._limit = limit
        self._values: dict[str, tuple[bytes, int]] = {}

    def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return the values of those keys that have one."""
        with self._lock:
            return {key: self._values[key][0] for key in keys if key in self._values}

    def put(self, key: str, value: bytes, *, expires: int) -> None:
        """Store a value until a time."""
        with self._lock:
            if key.startswith(BLOB_KEY):
                others = [held for name, (held, _) in self._values.items() if name.startswith(BLOB_KEY) and name != key]
                if sum(map(len, others)) + len(value) > self._limit:
                    raise BlobsFull(self._limit)
            self._values[key] = value, expires

    def delete(self, keys: Sequence[str], /) -> None:
        """Delete values."""
        with self._lock:
            for key in keys:
                self._values.pop(key, None)

    def prune(self, now: float) -> int:
        """Delete what is over; returns how many. The queue holds the lock."""
        old = [key for key, (_, expires) in self._values.items() if expires < now - rules.LEDGER_LEEWAY]
        for key in old:
            del self._values[key]
        return len(old)
