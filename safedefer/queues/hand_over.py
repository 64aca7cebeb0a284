"""Hands tasks of a store over to its push engine: those that fall due, and those again that the engine may have lost."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from safedefer.errors import Error, QueueUnavailable
from safedefer.options import TaskRetryOptions
from safedefer.queues import copies
from safedefer.queues.base import (
    BLOB_KEY,
    Copy,
    Lease,
    NotAllStored,
    PullQueue,
    QueuedTask,
    Settlement,
    TaskState,
    Verdict,
)
from safedefer.queues.progress import Progress
from safedefer.queues.pushed import progress_key
from safedefer.queues.rules import MAX_PUT_OFF, backoff

if TYPE_CHECKING:
    from safedefer.queues.push_engine import PushEngine

_log: Final = logging.getLogger("safedefer")

#: Tasks that are handed over at once, the seconds that this may take, and those between two looks for what is due.
AT_ONCE: Final = 100
_LEASE_SECONDS: Final = 60.0
LOOK_SECONDS: Final = 1.0
#: Copies that are in memory at once: somebody may have made each as large as any.
_IN_MEMORY: Final = 20
_OWNER: Final = "hand-over"
_PAUSE_SECONDS: Final = 0.001
#: How long a fork waits at most.
_FORK_SECONDS: Final = 1.0
#: Queues of an engine that are tried in one look while it answers for none.
_MOST_FAILING: Final = 3


class HandOver:
    """Hands tasks over to an engine, each with a copy in the store until it has ended, where the engine may lose it.

    Args:
        engine: Takes tasks.
        store: Has what waits, the copies, and the ledger.
        name: What people call the engine.
    """

    def __init__(self, engine: PushEngine, store: PullQueue, name: str) -> None:
        self._engine = engine
        self._store = store
        self._name = name

    def publish(self, tasks: Sequence[QueuedTask]) -> None:
        """Hand tasks over now. Their copies are stored before: a crash in between has them handed over later.

        Raises:
            NotAllStored: The engine took some of several.
            DeferError: As ``PushEngine.enqueue_many``, or the store does not take the copies. The engine has none then.
        """
        if self._engine.capabilities.lossless:
            self._engine.enqueue_many(tasks)
            return
        self._store.copies.put_many(tasks)
        try:
            self._engine.enqueue_many(tasks)
        except NotAllStored as error:
            self._forget([task for task in tasks if task.id in error.failed])
            raise
        except Exception:  # whatever it is, the caller hears it
            self._forget(tasks)
            raise

    def _forget(self, tasks: Sequence[QueuedTask]) -> None:
        """Delete the copies of tasks that the engine has refused, which the caller hears."""
        try:
            self._store.copies.delete([_key(task) for task in tasks])
        except QueueUnavailable as error:
            _log.warning(
                "%s refused %d tasks, and the store does not let go of their copies (%s): they may run later although their "
                "callers heard an error", self._name, len(tasks), error.slug,
            )  # fmt: skip

    def due(self, *, now: float) -> int:
        """Hand over what is due in the store, up to a hundred tasks; returns how many.

        The engine takes a task before the store forgets it: a crash in between hands it over twice, and the ledger lets it run
        once.

        Raises:
            QueueUnavailable: The store or the engine does not answer. What is left is tried again.
        """
        leases = self._store.lease(owner=_OWNER, limit=AT_ONCE, seconds=_LEASE_SECONDS, now=now)
        taken: list[Lease] = []
        failure: QueueUnavailable | None = None
        refused: list[tuple[Lease, Settlement]] = []
        for lease in leases:
            try:
                self.publish((self._with_kept_blob(lease.task),))
            except QueueUnavailable as error:
                failure = error
                refused.append((lease, _later(lease, now)))
            except Error as error:
                # Its name is taken, or something of it is refused: by the engine it is there, or will never be.
                _log.error("%s refuses task %a (%s); it stays in the store", self._name, lease.task.id, error.slug)
                refused.append((lease, _later(lease, now)))
            else:
                taken.append(lease)
        if taken:
            self._store.hand_over(taken, now=now)
        if refused:
            self._store.settle_many(refused, now=now)
        if failure is not None:
            raise failure
        return len(taken)

    def _with_kept_blob(self, task: QueuedTask) -> QueuedTask:
        if task.blob_id is not None and (data := self._store.blobs.get(task.blob_id)) is not None:
            self._store.keep.put(f"{BLOB_KEY}{task.blob_id}", data, expires=task.expires)
        return task

    def lost(self, *, now: float) -> int:
        """Look at copies that are due, up to a hundred, and hand over again what the engine seems to have lost; returns the looks.

        Raises:
            QueueUnavailable: The store or the engine does not answer. What is left is tried again.
        """
        if self._engine.capabilities.lossless:
            return 0
        look, looked = _LostLook(now), 0
        for _ in range(AT_ONCE // _IN_MEMORY):
            some = self._look(look)
            looked += some
            if some < _IN_MEMORY:
                break
        return looked

    def _look(self, look: _LostLook) -> int:
        looked, found = self._store.copies.look(now=look.now, limit=_IN_MEMORY)
        overdue = [each for each in found if copies.is_overdue(each.looks)]
        if not overdue:
            return looked
        look.progress = self._store.keep.get_many([progress_key(each.audience, each.task_id) for each in overdue])
        again = sum(self._look_at(copy, look) for copy in overdue)
        if again:
            _log.info("%s may have lost %d tasks, or is late with them; they are handed over again", self._name, again)
        if look.failure is not None:
            if not look.answered:  # all of it is away: what is lost comes soon after it
                self._store.copies.put_off(look.untried, until=look.now + copies.FIRST_LOOK)
                self._store.copies.put_off(look.tried, until=look.now + 2 * copies.FIRST_LOOK)
            raise look.failure
        return looked

    def _look_at(self, copy: Copy, look: _LostLook) -> bool:
        """Hand a task over again if it is time for that; return whether it was."""
        key = copy.audience, copy.task_id
        task = copies.load(copy)
        if task is None:
            _log.error("the copy of task %a is none of ours; it is deleted", copy.task_id)
            self._store.copies.delete([key])
            return False
        is_last = copies.is_last_look(task, look.now)
        retry = Progress.load(look.progress.get(progress_key(*key))).not_before
        if retry > look.now and not is_last:
            self._store.copies.put_off([key], until=retry + copies.FIRST_LOOK)
            return False
        if look.gives_up(task.queue):
            look.untried.append(key)
            return False
        try:
            waiting = self._count(task.queue, look)
        except QueueUnavailable as error:
            look.failed(task, error)
            return False
        if not copies.is_time(copy.looks, waiting):
            return False
        if self._is_buried(task):
            self._store.copies.delete([key])
            return False
        try:
            self._engine.enqueue_many((task,))
        except QueueUnavailable as error:
            look.failed(task, error)
            return False
        except Error as error:
            _log.error("%s refuses task %a (%s); it is tried again", self._name, task.id, error.slug)
            return False
        look.answered = True
        look.waiting[task.queue] = None if waiting is None else waiting + 1
        if is_last:
            self._store.copies.delete([key])
        return True

    def _count(self, queue: str, look: _LostLook) -> int | None:
        """Return how many messages wait in a queue; None if the engine cannot say. It is asked once in a look."""
        if queue not in look.waiting:
            count: Callable[[str], int | None] | None = getattr(self._engine, "messages", None)
            look.waiting[queue] = None if count is None else count(queue)
        return look.waiting[queue]

    def _is_buried(self, task: QueuedTask) -> bool:
        """Whether a task is a dead letter of which the ledger knows nothing, since no key of ours signed its token."""
        # The second id is that of a letter whose own one another task has (``PushedDelivery``).
        for letter_id in (task.id, sha256(task.token).hexdigest()[:32]):
            found = self._store.find(letter_id)
            if found is not None and found.state is TaskState.DEAD and found.token == task.token:
                return True
        return False


class _LostLook:
    """What is known in one look at copies.

    Args:
        now: The time.
    """

    def __init__(self, now: float) -> None:
        self.now = now
        self.progress: Mapping[str, bytes] = {}
        """What was counted of the tasks."""
        self.waiting: dict[str, int | None] = {}
        """By queue."""
        self.answered = False
        """The engine has taken a task."""
        self.failure: QueueUnavailable | None = None
        self.tried: list[tuple[str, str]] = []
        self.untried: list[tuple[str, str]] = []
        self._failing: set[str] = set()

    def failed(self, task: QueuedTask, error: QueueUnavailable) -> None:
        """Note that the engine does not take tasks of a queue now: it is away, or does not know this queue."""
        self.failure = error
        self._failing.add(task.queue)
        self.tried.append(_key(task))

    def gives_up(self, queue: str) -> bool:
        """Whether tasks of a queue are not tried any more: each try may take seconds."""
        return queue in self._failing or (not self.answered and len(self._failing) >= _MOST_FAILING)


class _Forks:
    """Puts forks off while a thread is in the middle of calls of libraries: the child would have their locks, held for ever.

    A parent of Celery's worker processes forks whenever one of them has ended.
    """

    def __init__(self) -> None:
        self._at_work = threading.Lock()
        self._forking = threading.local()
        os.register_at_fork(before=self._before, after_in_parent=self._after, after_in_child=self._in_child)

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """Put forks of other threads off, each for a second at most: a broker may not answer."""
        with self._at_work:
            yield

    def _before(self) -> None:
        self._forking.waited = self._at_work.acquire(timeout=_FORK_SECONDS)

    def _after(self) -> None:
        if self._forking.waited:
            self._at_work.release()

    def _in_child(self) -> None:
        self._at_work = threading.Lock()


_forks: Final = _Forks()


class HandingOver(threading.Thread):
    """Hands over what has fallen due in the store, and what is lost, once a second."""

    def __init__(self, hand_over: HandOver, clock: Callable[[], float]) -> None:
        super().__init__(name="safedefer-hand-over", daemon=True)
        self._hand_over = hand_over
        self._clock = clock
        self._stopped = threading.Event()
        self._failing = False

    def run(self) -> None:
        """Look until ``stop``."""
        while not self._stopped.wait(LOOK_SECONDS):
            failed = [some for some in (self._hand_over.due, self._hand_over.lost) if not self._does(some)]
            self._failing = bool(failed)

    def _does(self, some: Callable[..., int]) -> bool:
        """Hand over until nothing is left; return whether it could. What fails does not keep the other from being done."""
        try:
            while not self._stopped.is_set() and self._do(some) == AT_ONCE:
                time.sleep(_PAUSE_SECONDS)  # whoever forks has a turn
        except Exception as error:  # noqa: BLE001  # after any error the next look tries again
            if not self._failing:
                name = error.slug if isinstance(error, Error) else type(error).__name__
                _log.warning("what is due in the store cannot be handed over now (%s); trying again", name)
            return False
        return True

    def _do(self, some: Callable[..., int]) -> int:
        with _forks.put_off():
            return some(now=self._clock())

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(LOOK_SECONDS * 10)


def _key(task: QueuedTask) -> tuple[str, str]:
    return task.audience, task.id


def _later(lease: Lease, now: float) -> Settlement:
    wait = min(backoff(TaskRetryOptions(), min(lease.retries + 1, 16)), MAX_PUT_OFF)
    return Settlement(verdict=Verdict.RETRY, at=now + wait, charged=False, reason="unreachable")
