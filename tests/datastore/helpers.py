"""What the tests of the outbox in Datastore look at, and a queue that refuses some tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from safedefer.errors import QueueUnavailable
from safedefer.queues.memory.queue import MemoryQueue

if TYPE_CHECKING:
    from safedefer.queues.base import QueuedTask
    from safedefer.transactions.outbox import Outbox
    from tests.datastore.server import DatastoreServer

KINDS = ("SafedeferOutbox", "SafedeferOutboxPiece")


class PickyQueue(MemoryQueue):
    """Refuses the tasks of some ids, and counts how often each was given to it by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.odd: set[str] = set()
        self.error: Exception = QueueUnavailable("the database does not take it")
        self.tried: list[str] = []

    def enqueue_many(self, tasks: Collection[QueuedTask]) -> None:
        if len(tasks) == 1:
            self.tried += [task.id for task in tasks]
        if self.odd & {task.id for task in tasks}:
            raise self.error
        super().enqueue_many(tasks)


class Outages(MemoryQueue):
    """Is away while ``away`` is true, or after it has taken so many batches."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.takes: int | None = None

    def enqueue_many(self, tasks: Collection[QueuedTask]) -> None:
        if self.away or self.takes == 0:
            self.away = True
            raise QueueUnavailable("away")
        self.takes = None if self.takes is None else self.takes - 1
        super().enqueue_many(tasks)

    def stats(self, **given: Any) -> Any:
        if self.away:
            raise QueueUnavailable("away")
        return super().stats(**given)


def rows(server: DatastoreServer) -> int:
    """Return how many entities the outbox has."""
    return sum(len(server.store.kind(kind)) for kind in KINDS)


def waiting(queue: MemoryQueue) -> set[str]:
    """Return the ids of the tasks in a queue."""
    return {view.id for view in queue.tasks()}


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def quiet(monkeypatch: Any, outbox: Outbox) -> None:
    """Without the relay's thread: the test sweeps."""
    monkeypatch.setattr(outbox._relay, "expect", lambda *_: None)


def forget(outbox: Outbox) -> None:
    """As if another process had died after its commit."""
    for outlet in outbox._datastores.values():
        outlet._expected.clear()
