"""Push engines: an engine delivers, a store remembers, and the handler judges by ``safedefer.queues.rules``.

An engine such as Cloud Tasks or a Celery broker takes tasks and delivers them to the handler. It cannot be asked what it
has, and what it counts decides nothing. The store is any pull engine: it has the ledger, the stored tokens of oversize tasks,
the counters of tasks that are tried again, the dead letters, and what waits longer than the engine would hold it. ::

    App(queue="cloudtasks://…", store="postgresql://…")

``PushQueue`` puts the two together, and is the queue of such an App.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NoReturn

from safedefer.errors import ConfigurationError, Error, QueueError, QueueUnavailable
from safedefer.queues.base import (
    BLOB_KEY,
    AttemptTime,
    Copies,
    DeadFilter,
    EndCount,
    Keep,
    Lease,
    NotAllStored,
    Notice,
    Position,
    PullQueue,
    QueuedTask,
    QueueStats,
    TaskPage,
    TaskState,
    TaskView,
)
from safedefer.queues.hand_over import HandingOver, HandOver
from safedefer.queues.pushed import PushedBlobs, PushedLedger, cancel_key

if TYPE_CHECKING:
    from safedefer.blobs import BlobStore
    from safedefer.ledger import Ledger, PushedCalls, VerifiedLetter
    from safedefer.queues.base import LeaseCalls
    from safedefer.queues.capabilities import Capabilities
    from safedefer.queues.push_engine import PushEngine
    from safedefer.queues.rates import QueueControl, QueueLimits

_log: Final = logging.getLogger("safedefer")

#: How long a mark of a cancelled task is kept: no token lives longer (``claims.MAX_LIFETIME``).
_MARK_SECONDS: Final = 92 * 86_400


class PushQueue:
    """A push engine and its store.

    Args:
        engine: Delivers.
        store: A pull engine: remembers. What waits in it is handed over to the engine when it is due; no dispatcher empties it.
        name: What people call the engine.
    """

    def __init__(self, engine: PushEngine, store: PullQueue, *, name: str = "") -> None:
        self.engine = engine
        self.store = store
        self.name: str = name or type(engine).__name__
        self._ledger = PushedLedger(engine, store)
        self._blobs = PushedBlobs(store)
        self._hand_over = HandOver(engine, store, self.name)
        self._handing: HandingOver | None = None

    def __repr__(self) -> str:
        """Show engine and store."""
        return f"<{self.name} with {self.store!r}>"

    @property
    def capabilities(self) -> Capabilities:
        """The engine's; the store keeps the tokens of oversize tasks, and waits for those that the engine would not hold."""
        return replace(self.engine.capabilities, oversize=True, streams=False, unique=False)

    @property
    def statements(self) -> None:
        """None: a transaction of the user's cannot hold the engine's tasks. The outbox does."""
        return None

    @property
    def file(self) -> None:
        """None, as ``statements``."""
        return None

    @property
    def ledger(self) -> Ledger:
        """The store's; what was cancelled by its id alone counts as cancelled too."""
        return self._ledger

    @property
    def pushed_calls(self) -> PushedCalls | None:
        """What begins and ends runs in fewer steps than the ledger, on the running loop; None: the store has no such calls."""
        return self._ledger.calls

    @property
    def synced(self) -> bool:
        """Whether each change of the ledger is to be synced by the call that makes it."""
        return self._ledger.synced

    @property
    def blobs(self) -> BlobStore:
        """The stored tokens of oversize tasks, which wait in the store or are with the engine."""
        return self._blobs

    @property
    def keep(self) -> Keep:
        """What the store keeps of pushed tasks."""
        return self.store.keep

    @property
    def copies(self) -> Copies:
        """Copies of tasks that the engine may lose."""
        return self.store.copies

    # --- Producers --------------------------------------------------------------------------------

    def enqueue_many(self, tasks: Iterable[QueuedTask], /) -> None:
        """Hand tasks to the engine, and what is due later than it would hold them to the store.

        Raises:
            NotAllStored: Some of several were not stored.
            DeferError: As ``PushEngine.enqueue_many``.
        """
        longest = self.engine.capabilities.longest_wait
        now: list[QueuedTask] = []
        later: list[QueuedTask] = []
        for task in tasks:
            waits = longest is not None and task.eta - task.created > longest
            (later if waits else now).append(task)
        if later:
            self.store.enqueue_many(later)
        if not now:
            return
        try:
            self._hand_over.publish([self._without_blob(task) for task in now])
        except NotAllStored:
            raise
        except Error as error:
            if not later:
                raise
            raise NotAllStored(dict.fromkeys([task.id for task in now], error)) from error

    def _without_blob(self, task: QueuedTask) -> QueuedTask:
        if task.blob is None:
            return task
        self.keep.put(f"{BLOB_KEY}{task.blob.id}", task.blob.data, expires=task.expires)
        return task._replace(blob=None, blob_id=task.blob.id)

    def cancel(self, task_id: str, *, now: float) -> bool:
        """Cancel a task: end one that waits in the store; mark any other, which then does not begin, or is stopped.

        Which tasks the engine has nobody can say: True says that a task of this id does not run from now on. False if it is a
        dead letter.
        """
        found = self.store.find(task_id)
        if found is not None and found.state is TaskState.DEAD:
            return False
        if found is not None and found.state is TaskState.WAITING:
            self.store.cancel(task_id, now=now)
        self.keep.put(cancel_key(task_id), b"", expires=int(now) + _MARK_SECONDS)
        try:
            self.engine.cancel(task_id, now=now)
        except QueueError as error:  # the mark counts
            _log.warning("%s did not take task %a back (%s); it does not run", self.name, task_id, error.slug)
        return True

    def stats(self, *, now: float) -> Sequence[QueueStats]:
        """Counts of queues: what the engine says, and what waits or is dead in the store."""
        found: dict[str, QueueStats] = {}
        for each in (*self.store.stats(now=now), *self.engine.stats(now=now)):
            other = found.get(each.queue)
            found[each.queue] = each if other is None else _sum(other, each)
        return [found[queue] for queue in sorted(found)]

    def close(self) -> None:
        """Stop handing over, and let go of the engine and the store."""
        if self._handing is not None:
            self._handing.stop()
            self._handing = None
        self.engine.close()
        self.store.close()

    # --- What waits in the store ------------------------------------------------------------------

    def start(self, clock: Callable[[], float] = time.time) -> None:
        """Hand over in a thread, from now on, what falls due in the store, or is lost: for processes that handle tasks."""
        if self._handing is None:
            self._handing = HandingOver(self._hand_over, clock)
            self._handing.start()

    def hand_over_due(self, *, now: float) -> int:
        """Hand over to the engine what is due in the store, up to a hundred tasks; returns how many.

        Raises:
            QueueUnavailable: The store or the engine does not answer. What is left is tried again.
        """
        return self._hand_over.due(now=now)

    def hand_over_lost(self, *, now: float) -> int:
        """Look for tasks that the engine seems to have lost, up to a hundred, and hand them over again; returns the looks.

        Raises:
            QueueUnavailable: The store or the engine does not answer. What is left is tried again.
        """
        return self._hand_over.lost(now=now)

    # --- The store --------------------------------------------------------------------------------

    def find(self, task_id: str) -> TaskView | None:
        """Return what the store knows of a task: one that waits there, or a dead letter."""
        return self.store.find(task_id)

    def tasks(
        self, *, states: Sequence[TaskState] = (), queue: str | None = None, limit: int = 100
    ) -> Sequence[TaskView]:
        """List what the store knows."""
        return self.store.tasks(states=states, queue=queue, limit=limit)

    def live_tasks(
        self, *, queue: str | None = None, after: int = 0, limit: int = 100
    ) -> Sequence[tuple[int, TaskView]]:
        """List what waits in the store."""
        return self.store.live_tasks(queue=queue, after=after, limit=limit)

    def page(
        self, state: TaskState, *, queue: str | None = None, after: Position | None = None, look: int = 100
    ) -> TaskPage:
        """List tasks of one state that the store knows."""
        return self.store.page(state, queue=queue, after=after, look=look)

    def ends(self, *, since: float, step: float, most: int = 100_000) -> Sequence[EndCount]:
        """Count what ended and is known to the store."""
        return self.store.ends(since=since, step=step, most=most)

    def attempt_times(self, *, since: float, most: int = 1_000) -> Sequence[AttemptTime]:
        """Return how long the newest attempts took."""
        return self.store.attempt_times(since=since, most=most)

    def put_notice(self, process: str, text: str, *, now: float) -> None:
        """Store what a process says of itself."""
        self.store.put_notice(process, text, now=now)

    def notices(self, *, since: float) -> Sequence[Notice]:
        """Return the newest notices."""
        return self.store.notices(since=since)

    def dead_letters(
        self, where: DeadFilter, *, after: tuple[float, str] | None = None, limit: int = 100
    ) -> Sequence[TaskView]:
        """List dead letters."""
        return self.store.dead_letters(where, after=after, limit=limit)

    def drop_dead(self, task_ids: Sequence[str]) -> int:
        """Delete dead letters."""
        return self.store.drop_dead(task_ids)

    def bury(self, task: QueuedTask, *, reason: str | None, attempts: int, now: float, verified: bool) -> bool:
        """Make a dead letter of a pushed task."""
        return self.store.bury(task, reason=reason, attempts=attempts, now=now, verified=verified)

    def replace_dead(self, task_id: str, task: QueuedTask, letter: VerifiedLetter, *, now: float) -> bool:
        """Store ``task`` for the dead letter, in one transaction, and hand it over, now or when the engine is back."""
        replaced = self.store.replace_dead(task_id, task, letter, now=now)
        if replaced:
            try:
                self.hand_over_due(now=now)
            except QueueUnavailable as error:
                _log.warning("%s does not take the re-run of %a now (%s); it waits", self.name, task_id, error.slug)
        return replaced

    def next_due(self, *, now: float, queues: Sequence[str] | None = None) -> float | None:
        """Return when the next task of those that wait in the store is due; None if there is none."""
        return self.store.next_due(now=now, queues=queues)

    def hand_over(self, leases: Sequence[Lease], *, now: float) -> Sequence[bool]:
        """Forget tasks of the store that the engine has taken."""
        return self.store.hand_over(leases, now=now)

    def prune(self, *, now: float) -> int:
        """Delete what is too old."""
        return self.store.prune(now=now)

    def on_loop(self) -> AbstractAsyncContextManager[LeaseCalls | None]:
        """Keep the store's connections of the running loop."""
        return self.store.on_loop()

    # --- What only a pull engine does -------------------------------------------------------------

    def configure(self, limits: Sequence[QueueLimits], *, now: float) -> None:
        """Let the engine keep the limits of queues."""
        self._throttle("configure")(limits, now=now)

    def controls(self, *, now: float) -> Sequence[QueueControl]:
        """Return what holds the engine's queues back, as far as it can say."""
        ask = getattr(self.engine, "controls", None)
        controls: Sequence[QueueControl] = () if ask is None else ask(now=now)
        return controls

    def pause(self, queue: str, *, paused: bool, now: float) -> None:
        """Pause a queue of the engine."""
        self._throttle("pause")(queue, paused=paused, now=now)

    def hold(self, queue: str, *, until: float, now: float) -> None:
        """Refuse: the engine slows down by the answers that it gets."""
        self._throttle("hold")(queue, until=until, now=now)

    def purge(self, queue: str, *, now: float) -> int:
        """Purge a queue of the engine, and what waits for it in the store."""
        purge = self._throttle("purge")
        return self.store.purge(queue, now=now) + int(purge(queue, now=now))

    def _throttle(self, what: str) -> Callable[..., Any]:
        does: Callable[..., Any] | None = getattr(self.engine, what, None)
        if does is None:
            raise ConfigurationError(f"{self.name} has no {what} here; use its own tools")
        return does

    def lease(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: as ``extend_many``, ``release``, ``settle_many``, ``wait`` and ``wake``."""
        raise ConfigurationError(f"{self.name} pushes its tasks: there is nothing to dispatch; run `safedefer serve`")

    extend_many: Callable[..., NoReturn] = lease
    release: Callable[..., NoReturn] = lease
    settle_many: Callable[..., NoReturn] = lease
    wait: Callable[..., NoReturn] = lease
    wake: Callable[..., NoReturn] = lease


def _sum(one: QueueStats, other: QueueStats) -> QueueStats:
    oldest = min((each for each in (one.oldest, other.oldest) if each is not None), default=None)
    return QueueStats(
        queue=one.queue,
        waiting=one.waiting + other.waiting,
        running=one.running + other.running,
        dead=one.dead + other.dead,
        oldest=oldest,
    )
