"""The queue in memory: for tests and for programs of one process that may lose what waits.

Over 450 lines, since every operation reads and changes the same few dicts under one lock.
"""

from __future__ import annotations

import heapq
import itertools
import secrets
import threading
import time
from collections import ChainMap, Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from safedefer.errors import QueueUnavailable, TaskAlreadyExistsError, TombstonedTaskError
from safedefer.ledger import EndState, VerifiedLetter
from safedefer.queues import rules
from safedefer.queues.base import (
    HISTORY_SECONDS,
    NOTICE_BYTES,
    NOTICE_SECONDS,
    NOTICES,
    AlreadyWaiting,
    AttemptTime,
    BlobsFull,
    BlobTaken,
    DeadFilter,
    EndCount,
    Lease,
    ListedTask,
    Notice,
    Position,
    QueuedTask,
    QueueStats,
    Settlement,
    TaskPage,
    TaskState,
    TaskView,
    Verdict,
    is_free_when_leased,
    queue_of,
    task_digest,
)
from safedefer.queues.capabilities import FULL, Capabilities
from safedefer.queues.loop_calls import no_connections
from safedefer.queues.memory.copies import MemoryCopies
from safedefer.queues.memory.ledger import MemoryBlobs, MemoryKeep, MemoryLedger
from safedefer.queues.poison_log import log_burial
from safedefer.queues.rates import QueueControl, QueueLimits
from safedefer.queues.rules import Counters

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

_PRUNE_EVERY: Final = 60.0
_NEW: Final = Counters()
_DEFAULT_STATES: Final = (TaskState.WAITING, TaskState.RUNNING, TaskState.DEAD)
_VIEW_STATES: Final = {
    EndState.SUCCEEDED: TaskState.SUCCEEDED,
    EndState.CANCELLED: TaskState.CANCELLED,
    EndState.FAILED: TaskState.DEAD,
}


@dataclass(slots=True)
class _Row:
    """A task that has not ended. ``due`` is the eta, the time of the retry, or the end of the lease."""

    seq: int
    task: QueuedTask
    due: float
    owner: str | None = None
    leased_at: float | None = None
    counters: Counters = _NEW
    """Before the delivery under way, if there is one."""


@dataclass(slots=True)
class _State:
    """All that the queue keeps, so that a batch can be checked before it changes anything."""

    rows: dict[str, _Row] = field(default_factory=dict)
    due: dict[str, list[tuple[float, int, str]]] = field(default_factory=dict)
    """By queue, a heap of (due, seq, id); entries of rows whose due time has changed are skipped."""
    ended: dict[str, TaskView] = field(default_factory=dict)
    """Dead letters and history."""
    names: dict[tuple[str, str], float | None] = field(default_factory=dict)
    """None while the task lives, then the end of its tombstone."""
    unique: dict[tuple[str, str], str] = field(default_factory=dict)
    """Ids of waiting and running tasks, by queue and unique key."""
    archived: set[str] = field(default_factory=set)
    """Ids of archived dead letters."""
    controls: dict[str, QueueControl] = field(default_factory=dict)
    notices: dict[str, Notice] = field(default_factory=dict)
    """By process."""


class MemoryQueue:
    """A ``PullQueue`` in the memory of one process, for any number of its threads.

    ``tombstone_seconds`` is how long the name of an ended task is not free (App Engine: 9 days).
    ``history_seconds`` is how long ``find`` and ``tasks`` know what succeeded or was cancelled.
    ``blob_limit`` is the bytes that all stored tokens of oversize tasks may take together. Dead letters
    older than ``dead_seconds``, and the oldest of more than ``dead_limit``, are archived.
    """

    def __init__(
        self,
        *,
        tombstone_seconds: float = 9 * 86400,
        history_seconds: float = HISTORY_SECONDS,
        blob_limit: int = 2**30,
        dead_seconds: float = 90 * 86400,
        dead_limit: int = 100_000,
    ) -> None:
        self._blob_limit = blob_limit
        self._dead_seconds = dead_seconds
        self._dead_limit = dead_limit
        self._tombstone_seconds = tombstone_seconds
        self._history_seconds = history_seconds
        self._changed = threading.Condition()
        self._state = _State()
        self._numbers = itertools.count(1)
        self._newest = self._seen = 0
        self._wakes = self._wakes_seen = 0
        self._closed = False
        self._next_prune = float("-inf")
        self._ledger = MemoryLedger(self._changed, lambda task_id: task_id in self._state.rows)
        self._blobs = MemoryBlobs()
        self._keep = MemoryKeep(self._changed, blob_limit)
        self._copies = MemoryCopies(self._changed, self._ledger)

    @property
    def capabilities(self) -> Capabilities:
        """All of them."""
        return FULL

    @property
    def statements(self) -> None:
        """None: the queue has no database."""
        return None

    @property
    def file(self) -> None:
        """None: the queue has no file."""
        return None

    @property
    def ledger(self) -> MemoryLedger:
        """The ledger of the same process."""
        return self._ledger

    @property
    def blobs(self) -> MemoryBlobs:
        """The blobs of the same process."""
        return self._blobs

    @property
    def keep(self) -> MemoryKeep:
        """What the same process keeps of tasks that a push engine delivers."""
        return self._keep

    @property
    def copies(self) -> MemoryCopies:
        """Copies of tasks that a push engine may lose."""
        return self._copies

    def close(self) -> None:
        """Refuse later tasks with ``QueueUnavailable``, and end every ``wait``."""
        self._closed = True
        self.wake()

    # --- Enqueue ----------------------------------------------------------------------------------

    def enqueue_many(self, tasks: Iterable[QueuedTask], /) -> None:
        """Store all tasks or none."""
        tasks = list(tasks)
        with self._changed:
            self._check(tasks)
            self._store(tasks)

    def _check(self, tasks: Sequence[QueuedTask], *, replaced: str | None = None) -> None:
        if self._closed:
            raise QueueUnavailable("the queue is closed; open a new one")
        ids: set[str] = set()
        names: set[tuple[str, str | None]] = set()
        unique = ChainMap[tuple[str, str], str]({}, self._state.unique)
        blobs: set[str] = set()
        room = self._blob_limit - self._blobs.total if any(task.blob for task in tasks) else 0
        for task in tasks:
            ended = None if task.id == replaced else self._state.ended.get(task.id)
            if ended is not None and ended.state is not TaskState.DEAD:
                raise TombstonedTaskError(f"the task {task.id} ended in this queue; defer it anew, with a new id")
            if ended is not None or task.id in ids or task.id in self._state.rows:
                raise TaskAlreadyExistsError(f"the task {task.id} is in this queue already; enqueue it once")
            if task.unique_key is not None:
                if (task.queue, task.unique_key) in unique:
                    raise AlreadyWaiting(unique[task.queue, task.unique_key])
                unique[task.queue, task.unique_key] = task.id
            self._check_name(task, names)
            if task.blob is not None and (task.blob.id in blobs or self._blobs.get(task.blob.id) is not None):
                raise BlobTaken(task.blob.id)
            room -= len(task.blob.data) if task.blob else 0
            if task.blob and room < 0:
                raise BlobsFull(self._blob_limit)
            ids.add(task.id)
            names.add((task.queue, task.name))
            blobs.update({task.blob.id} if task.blob else ())

    def _check_name(self, task: QueuedTask, taken: set[tuple[str, str | None]]) -> None:
        if task.name is None:
            return
        until = self._state.names.get((task.queue, task.name), 0.0)
        if until is None or (task.queue, task.name) in taken:
            raise TaskAlreadyExistsError(
                f"a task named {task.name!r} is waiting or running in the queue {task.queue!r}; choose another name"
            )
        if until > task.created:
            raise TombstonedTaskError(
                f"a task named {task.name!r} ended in the queue {task.queue!r}, and its name is free again in "
                f"{until - task.created:.0f} s; choose another name"
            )

    def _store(self, tasks: Sequence[QueuedTask]) -> None:
        for task in tasks:
            self._newest = next(self._numbers)
            blob_id = task.blob_id
            if task.blob is not None:
                blob_id = task.blob.id
                self._blobs.put(blob_id, task.blob.data)
            if task.name is not None:
                self._state.names[task.queue, task.name] = None
            if task.unique_key is not None:
                self._state.unique[task.queue, task.unique_key] = task.id
            stored = task._replace(blob=None, blob_id=blob_id, digest=task_digest(task))
            self._state.rows[task.id] = row = _Row(self._newest, stored, task.eta)
            self._schedule(row)
        self._changed.notify_all()

    def cancel(self, task_id: str, *, now: float) -> bool:
        """Cancel a task that waits, is leased or runs; False if there is none, or it has ended."""
        with self._changed:
            if self._cancel_waiting(task_id, now=now):
                return True
            row = self._state.rows.get(task_id)
            if row is None:
                return False
            entry = self._ledger.entry(row.task)
            stops = rules.may_stop(None if entry is None else entry.known(now))
            if stops:
                self._ledger.cancel(row.task)
            return stops

    def _cancel_waiting(self, task_id: str, *, now: float) -> bool:
        row = self._state.rows.get(task_id)
        if row is None or (row.owner is not None and row.due > now):
            return False
        entry = self._ledger.entry(row.task)
        if not rules.may_cancel(None if entry is None else entry.known(now)):
            return False
        self._end(row, rules.Ending(EndState.CANCELLED), now=now)
        return True

    def replace_dead(self, task_id: str, task: QueuedTask, letter: VerifiedLetter, *, now: float) -> bool:
        """Enqueue ``task`` and remove the dead letter; False if there is none."""
        with self._changed:
            dead = self._state.ended.get(task_id)
            if dead is None or dead.state is not TaskState.DEAD:
                return False
            self._ledger.check_replacement(task_id, letter, now=now)
            self._check((task,), replaced=task_id)
            self._ledger.replace(task_id, letter)
            self._forget_dead(task_id)
            self._store((task,))
            return True

    def bury(self, task: QueuedTask, *, reason: str | None, attempts: int, now: float, verified: bool) -> bool:
        """Make a dead letter of a task that the queue does not have."""
        with self._changed:
            if not verified and (task.id in self._state.ended or task.id in self._state.rows):
                return False
            view = self._view(_Row(0, task._replace(blob_id=None), task.eta))
            dead = replace(view, state=TaskState.DEAD, attempts=attempts, reason=reason, ended=now, due=None)
            self._state.ended[task.id] = dead
            self._state.archived.discard(task.id)
            return True

    def hand_over(self, leases: Sequence[Lease], *, now: float) -> Sequence[bool]:  # noqa: ARG002 - no tombstones
        """Forget tasks that a push engine has taken over; False for each lost lease."""
        with self._changed:
            held = [self._held(lease) for lease in leases]
            for row in held:
                if row is not None:
                    self._forget(row)
            return [row is not None for row in held]

    def _forget(self, row: _Row) -> None:
        task = row.task
        if task.name is not None:
            self._state.names.pop((task.queue, task.name), None)
        self._free_unique(task)
        if task.blob_id is not None:
            self._blobs.delete(task.blob_id)
        del self._state.rows[task.id]
        self._ledger.settle_retry(task)

    def drop_dead(self, task_ids: Sequence[str]) -> int:
        """Delete dead letters, archived ones too; returns how many there were."""
        with self._changed:
            found = [task_id for task_id in dict.fromkeys(task_ids) if self._is_dead(task_id)]
            for task_id in found:
                self._forget_dead(task_id)
            return len(found)

    def _is_dead(self, task_id: str) -> bool:
        view = self._state.ended.get(task_id)
        return view is not None and view.state is TaskState.DEAD

    def _forget_dead(self, task_id: str) -> None:
        del self._state.ended[task_id]
        self._state.archived.discard(task_id)

    # --- Rates, pauses, holds ---------------------------------------------------------------------

    def configure(self, limits: Sequence[QueueLimits], *, now: float) -> None:
        """Put the declared limits in force; a queue that is not among them has none."""
        declared = {item.queue: item for item in limits}
        with self._changed:
            for queue in {*declared, *self._state.controls}:
                control = self._control(queue, now=now)
                self._put(control.configured(declared.get(queue) or QueueLimits(queue=queue), now=now), now=now)

    def controls(self, *, now: float) -> Sequence[QueueControl]:
        """Return the current limits, pauses and holds, sorted by queue."""
        with self._changed:
            return [control.refill(now) for _, control in sorted(self._state.controls.items())]

    def pause(self, queue: str, *, paused: bool, now: float) -> None:
        """Lease nothing of a queue until it is resumed; what runs goes on."""
        with self._changed:
            self._put(replace(self._control(queue, now=now), paused=paused), now=now)
        self.wake()

    def hold(self, queue: str, *, until: float, now: float) -> None:
        """Lease nothing of a queue before ``until``; an earlier time changes nothing."""
        with self._changed:
            control = self._control(queue, now=now)
            self._put(replace(control, held_until=max(until, control.held_until)), now=now)

    def purge(self, queue: str, *, now: float) -> int:
        """Cancel all that waits in a queue; returns how many."""
        with self._changed:
            waiting = [row.task.id for row in self._state.rows.values() if row.task.queue == queue]
            return sum(self._cancel_waiting(task_id, now=now) for task_id in waiting)

    def _control(self, queue: str, *, now: float) -> QueueControl:
        return self._state.controls.get(queue) or QueueControl.new(QueueLimits(queue=queue), now=now)

    def _put(self, control: QueueControl, *, now: float) -> None:
        if control.binds(now):
            self._state.controls[control.queue] = control
        else:
            self._state.controls.pop(control.queue, None)

    def _running(self, queue: str, *, now: float) -> int:
        rows = self._state.rows.values()
        return sum(row.owner is not None and row.due > now for row in rows if row.task.queue == queue)

    def _open_queues(self, queues: Sequence[str] | None, *, now: float) -> dict[str, int | None]:
        """Return how many tasks of each queue may be leased now; a queue that gives none is left out."""
        allowed: dict[str, int | None] = {}
        for queue in self._state.due if queues is None else queues:
            control = self._state.controls.get(queue)
            if control is not None:
                control = self._state.controls[queue] = control.refill(now)
                allowed[queue] = control.allowance(now=now, running=self._running(queue, now=now))
            else:
                allowed[queue] = None
        return {queue: most for queue, most in allowed.items() if most != 0}

    # --- Lease and settle -------------------------------------------------------------------------

    def lease(
        self, *, owner: str, limit: int, seconds: float, now: float, queues: Sequence[str] | None = None
    ) -> Sequence[Lease]:
        """Claim up to ``limit`` due tasks for ``seconds``, the one that fell due first before the others."""
        leases: list[Lease] = []
        with self._changed:
            self._seen = self._newest
            allowed = self._open_queues(queues, now=now)
            taken = 0
            while taken < limit and (row := self._first([*allowed])) is not None and row.due <= now:
                lease = self._lease(row, owner=owner, until=now + seconds, now=now)
                taken += 1
                if lease is not None:
                    leases.append(lease)
                queue = row.task.queue
                if (most := allowed[queue]) is not None:
                    self._state.controls[queue] = self._state.controls[queue].spend(1)
                    allowed[queue] = most - 1
                    if most == 1:
                        del allowed[queue]
            if now >= self._next_prune:
                self._next_prune = now + _PRUNE_EVERY
                self.prune(now=now)
        return leases

    def _lease(self, row: _Row, *, owner: str, until: float, now: float) -> Lease | None:
        """Lease a task; None if it becomes a dead letter instead, or waits for its run."""
        entry = self._ledger.entry(row.task)
        known, reason = None if entry is None else entry.known(now), row.counters.retry_reason
        if row.owner is None and rules.waits_for_run(reason, known):
            row.due = now + rules.PUT_OFF
            self._schedule(row)
            return None
        if row.owner is not None or rules.has_lost_run(reason, known):
            lost = self._after_lost_lease(row, now=now)
            if (reason := lost.end_reason(now)) is not None:
                self._end(row, rules.Ending(EndState.FAILED, reason), now=now)
                log_burial(row.task.id, reason, lost)
                return None
        losses = 0 if entry is None else entry.losses
        lease = Lease(row.task, f"{owner}:{secrets.token_hex(8)}", until, *row.counters, losses=losses)
        row.owner, row.leased_at, row.due = lease.owner, now, until
        if is_free_when_leased(row.task.unique_key):
            self._free_unique(row.task)
        self._schedule(row)
        return lease

    def _after_lost_lease(self, row: _Row, *, now: float) -> rules.LostDelivery:
        task, entry = (row.task.audience, row.task.id), self._ledger.entry(row.task)
        known = None if entry is None else entry.known(now)
        if row.owner is None:
            options, eta = row.task.retry_options, row.task.eta
            lost = rules.after_lost_run(row.counters, task, known, now=now, retry_options=options, eta=eta)
        else:
            lost = rules.after_lost_lease(row.counters, task, known, leased_at=row.leased_at, now=now)
        row.counters = lost.counters
        if entry is not None and lost.charged:
            entry.uncharged, entry.attempts = False, lost.counters.attempts
            entry.losses, entry.first_loss = lost.losses, lost.first_loss
        if lost.record is not None:
            self._ledger.record(lost.record)
        return lost

    def extend_many(self, leases: Sequence[Lease], *, seconds: float, now: float) -> Sequence[bool]:
        """Extend leases; False for each lost one."""
        with self._changed:
            return [self._extend(lease, until=now + seconds) for lease in leases]

    def _extend(self, lease: Lease, *, until: float) -> bool:
        row = self._held(lease)
        if row is None:
            return False
        row.due = until
        self._schedule(row)
        return True

    def release(self, owners: Sequence[str], *, now: float) -> int:
        """Let leases of dead dispatchers fall due whose run has not begun; returns how many."""
        with self._changed:
            found = [
                row
                for row in self._state.rows.values()
                if row.owner is not None and row.due > now and row.owner.rpartition(":")[0] in owners
            ]
            entries = [self._ledger.entry(row.task) for row in found]
            released = [row for row, entry in zip(found, entries, strict=True) if entry is None or not entry.uncharged]
            for row in released:
                row.due = now
                self._schedule(row)
        self.wake()
        return len(released)

    def settle_many(self, settlements: Sequence[tuple[Lease, Settlement]], *, now: float) -> Sequence[bool]:
        """Settle deliveries at once; False for each lost lease."""
        with self._changed:
            return [self._settle(lease, settlement, now=now) for lease, settlement in settlements]

    def _settle(self, lease: Lease, settlement: Settlement, *, now: float) -> bool:
        row = self._held(lease)
        if row is None:
            return False
        entry = self._ledger.entry(row.task)
        known = None if entry is None else entry.known(now)
        settlement = rules.by_ledger(lease, settlement, known, now=now)
        if settlement.record is not None:
            self._ledger.record(settlement.record)
        if settlement.verdict is not Verdict.RETRY:
            self._end(row, rules.end_of(settlement, known), now=now)
            return True
        row.counters = rules.after_retry(row.counters, settlement, leased_at=row.leased_at, now=now)
        row.owner = row.leased_at = None
        row.due = now if settlement.at is None else settlement.at
        self._schedule(row)
        if entry is not None:
            entry.attempts = row.counters.attempts
            entry.not_before = row.due if rules.sets_time(settlement) else entry.not_before
            entry.uncharged = entry.uncharged and not rules.retry_charges(settlement, known)
        return True

    def _free_unique(self, task: QueuedTask) -> None:
        """Free the unique key of a task, unless another one has it since this one began."""
        key = task.queue, task.unique_key or ""
        if self._state.unique.get(key) == task.id:
            del self._state.unique[key]

    def _end(self, row: _Row, end: rules.Ending, *, now: float) -> None:
        task = row.task
        reason = (self._ledger.last_reason(task.id) if end.by_record else None) or end.reason
        attempts = rules.plus(row.counters.attempts, end.charged)
        view = replace(self._view(row), state=_VIEW_STATES[end.state], attempts=attempts, reason=reason, ended=now)
        if end.state is not EndState.FAILED:
            view = replace(view, token=b"", headers={}, retry_options={})
        self._state.ended[task.id] = view
        if task.name is not None:
            self._state.names[task.queue, task.name] = now + self._tombstone_seconds
        self._free_unique(task)
        if task.blob_id is not None:
            self._blobs.delete(task.blob_id)
        del self._state.rows[task.id]
        self._ledger.end(task, end.state)

    def next_due(self, *, now: float, queues: Sequence[str] | None = None) -> float | None:
        """When the next task or lease falls due, maybe in the past, or its queue lets it; None if there is none."""
        with self._changed:
            found = []
            for queue in self._state.due if queues is None else queues:
                row = self._first([queue])
                control = self._state.controls.get(queue)
                if row is not None and control is not None:
                    running = self._running(queue, now=now)
                    found.append(control.refill(now).opens(row.due, now=now, running=running))
                elif row is not None:
                    found.append(row.due)
            return min(found, default=None)

    def wait(self, timeout: float) -> bool:
        """Block until a task is enqueued or ``timeout`` seconds pass.

        True if there is a task that no ``lease`` or ``wait`` has seen yet, or after ``wake``.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            seen = (self._seen, self._wakes_seen)
            while self._newest <= seen[0] and self._wakes <= seen[1]:
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    return False
            self._seen, self._wakes_seen = self._newest, self._wakes
            return True

    def wake(self) -> None:
        """End a ``wait`` early."""
        with self._changed:
            self._wakes += 1
            self._changed.notify_all()

    def on_loop(self) -> AbstractAsyncContextManager[None]:
        """Have no connections of the running loop."""
        return no_connections()

    def prune(self, *, now: float) -> int:
        """Delete what is too old: tombstones, history with its records, ledger entries; returns how many."""
        with self._changed:
            before = now - self._history_seconds
            old_names = [name for name, until in self._state.names.items() if until is not None and until <= now]
            for name in old_names:
                del self._state.names[name]
            old = [
                view.id
                for view in self._state.ended.values()
                if view.state is not TaskState.DEAD and view.ended is not None and view.ended < before
            ]
            for task_id in old:
                del self._state.ended[task_id]
            known = {*self._state.rows, *self._state.ended}
            dead = {view.id for view in self._state.ended.values() if view.state is TaskState.DEAD}
            forgotten = self._ledger.prune(now=now, before=before, known=known, dead=dead)
            return len(old_names) + len(old) + self._archive(now) + forgotten + self._keep.prune(now)

    def _archive(self, now: float) -> int:
        dead = sorted((view for view in self._current_dead()), key=_dead_order, reverse=True)
        old = [view.id for view in dead if view.ended is not None and view.ended < now - self._dead_seconds]
        put_aside = {*old, *(view.id for view in dead[self._dead_limit :])}
        self._state.archived |= put_aside
        return len(put_aside)

    def _current_dead(self) -> list[TaskView]:
        archived = self._state.archived
        ended = self._state.ended.values()
        return [view for view in ended if view.state is TaskState.DEAD and view.id not in archived]

    # --- Views ------------------------------------------------------------------------------------

    def stats(self, *, now: float) -> Sequence[QueueStats]:
        """Return the counts of every queue that has a task or a dead letter, sorted by name."""
        with self._changed:
            rows = list(self._state.rows.values())
            dead = [view.queue for view in self._current_dead()]
        found = []
        for queue in sorted({*dead, *(row.task.queue for row in rows)}):
            mine = [row for row in rows if row.task.queue == queue]
            waiting = [row.task.eta for row in mine if row.owner is None or row.due <= now]
            found.append(
                QueueStats(
                    queue=queue,
                    waiting=len(waiting),
                    running=len(mine) - len(waiting),
                    dead=dead.count(queue),
                    oldest=min(waiting, default=None),
                )
            )
        return found

    def tasks(
        self, *, states: Sequence[TaskState] = (), queue: str | None = None, limit: int = 100
    ) -> Sequence[TaskView]:
        """List tasks, newest first, without records; without ``states``: waiting, running and dead."""
        with self._changed:
            ended = [view for view in self._state.ended.values() if view.id not in self._state.archived]
            views = [*map(self._view, reversed(self._state.rows.values())), *reversed(ended)]
        wanted = states or _DEFAULT_STATES
        found = [view for view in views if view.state in wanted and queue in (None, view.queue)]
        return sorted(found, key=lambda view: view.created, reverse=True)[:limit]

    def live_tasks(
        self, *, queue: str | None = None, after: int = 0, limit: int = 100
    ) -> Sequence[tuple[int, TaskView]]:
        """List waiting and running tasks with their places."""
        with self._changed:
            rows = [row for row in self._state.rows.values() if row.seq > after and queue in (None, row.task.queue)]
            rows.sort(key=lambda row: row.seq)
            return [(row.seq, self._view(row)) for row in rows[:limit]]

    def page(
        self, state: TaskState, *, queue: str | None = None, after: Position | None = None, look: int = 100
    ) -> TaskPage:
        """List tasks of one state, newest first, from the one behind ``after`` on."""
        before = (float("inf"), "") if after is None else after
        with self._changed:
            places = [place for place, in_queue in self._places(state) if place < before and queue in {None, in_queue}]
            places = heapq.nlargest(look + 1, places)
            found = [ListedTask(place, self._look(place[1])) for place in places[:look]]
        return TaskPage(found, found[-1].position if len(places) > look else None)

    def _places(self, state: TaskState) -> Iterator[tuple[Position, str]]:
        """Yield the positions of the tasks of a state, and their queues."""
        if state in {TaskState.WAITING, TaskState.RUNNING}:
            for row in self._state.rows.values():
                if (row.owner is None) is (state is TaskState.WAITING):
                    yield (row.task.created, row.task.id), row.task.queue
            return
        for view in self._state.ended.values():
            if view.state is state and view.id not in self._state.archived:
                yield (view.created, view.id), view.queue

    def _look(self, task_id: str) -> TaskView:
        row = self._state.rows.get(task_id)
        return self._state.ended[task_id] if row is None else self._view(row)

    def ends(self, *, since: float, step: float, most: int = 100_000) -> Sequence[EndCount]:
        """Count what ended since a time, in steps of ``step`` seconds."""
        with self._changed:
            archived = self._state.archived
            ended = [
                (view.ended, view) for view in self._state.ended.values() if view.ended and view.id not in archived
            ]
        newest = sorted(((at, view.queue, view.state) for at, view in ended if at >= since), reverse=True)[:most]
        counts = Counter((queue, state, int((at - since) // step)) for at, queue, state in newest)
        return [EndCount(queue, state, number, count) for (queue, state, number), count in counts.items()]

    def attempt_times(self, *, since: float, most: int = 1_000) -> Sequence[AttemptTime]:
        """Return how long the newest ``most`` attempts took that ended since a time."""
        newest = sorted((each for each in self._ledger.records() if each.ended >= since), key=lambda each: -each.ended)
        return [AttemptTime(queue_of(each.audience), max(each.ended - each.started, 0.0)) for each in newest[:most]]

    def put_notice(self, process: str, text: str, *, now: float) -> None:
        """Store what a process says of itself; an empty text deletes that."""
        with self._changed:
            known = self._state.notices
            for each in [each for each in known.values() if each.at < now - NOTICE_SECONDS]:
                del known[each.process]
            known.pop(process, None)
            if text:
                known[process] = Notice(process, text, now)

    def notices(self, *, since: float) -> Sequence[Notice]:
        """Return the newest notices that were written since a time."""
        with self._changed:
            found = [each for each in self._state.notices.values() if each.at >= since]
        found.sort(key=lambda each: -each.at)
        return [each if len(each.text.encode()) <= NOTICE_BYTES else each._replace(text="") for each in found[:NOTICES]]

    def dead_letters(
        self, where: DeadFilter, *, after: tuple[float, str] | None = None, limit: int = 100
    ) -> Sequence[TaskView]:
        """List dead letters with their records, oldest first; ``after`` is ``(ended, id)`` of the last one seen."""
        with self._changed:
            found = [
                replace(view, records=self._ledger.records_of(view.id))
                for view in self._state.ended.values()
                if view.state is TaskState.DEAD
                and (view.id in self._state.archived) == where.archived
                and _matches(view, where)
                and (after is None or _dead_order(view) > after)
            ]
        return sorted(found, key=_dead_order)[:limit]

    def find(self, task_id: str) -> TaskView | None:
        """Return one task in any state, with the records of its attempts; ended ones without a token."""
        with self._changed:
            row = self._state.rows.get(task_id)
            view = self._state.ended.get(task_id) if row is None else self._view(row)
            return None if view is None else replace(view, records=self._ledger.records_of(task_id))

    def _view(self, row: _Row) -> TaskView:
        task = row.task
        stored = None if task.blob_id is None else self._blobs.get(task.blob_id)
        return TaskView(
            id=task.id,
            queue=task.queue,
            state=TaskState.WAITING if row.owner is None else TaskState.RUNNING,
            name=task.name,
            callable_name=task.callable_name,
            url=task.url,
            target=task.target,
            audience=task.audience,
            headers=task.headers,
            eta=task.eta,
            created=task.created,
            expires=task.expires,
            attempts=row.counters.attempts,
            token=task.token if stored is None else stored,
            reason=row.counters.retry_reason,
            retry_options=task.retry_options,
            due=row.due,
        )

    # --- Shared -----------------------------------------------------------------------------------

    def _schedule(self, row: _Row) -> None:
        heapq.heappush(self._state.due.setdefault(row.task.queue, []), (row.due, row.seq, row.task.id))

    def _first(self, queues: Sequence[str] | None) -> _Row | None:
        """Return the row that falls due first."""
        names = self._state.due if queues is None else queues
        return min((row for name in names for row in self._top(name)), key=lambda row: (row.due, row.seq), default=None)

    def _top(self, queue: str) -> Iterator[_Row]:
        heap = self._state.due.get(queue, [])
        while heap:
            due, seq, task_id = heap[0]
            row = self._state.rows.get(task_id)
            if row is not None and (row.due, row.seq) == (due, seq):
                yield row
                return
            heapq.heappop(heap)

    def _held(self, lease: Lease) -> _Row | None:
        row = self._state.rows.get(lease.task.id)
        return row if row is not None and row.owner == lease.owner else None


def _dead_order(view: TaskView) -> tuple[float, str]:
    return (view.ended or 0.0, view.id)


def _matches(view: TaskView, where: DeadFilter) -> bool:
    ended = view.ended or 0.0
    return (
        where.queue in (None, view.queue)
        and where.reason in (None, view.reason)
        and where.callable_name in (None, view.callable_name)
        and (where.since is None or ended >= where.since)
        and (where.before is None or ended < where.before)
    )
