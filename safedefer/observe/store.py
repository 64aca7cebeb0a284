"""What the store says when it is asked: tasks, lag and dead letters by queue, and the rows of outboxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from safedefer.observe.counts import queue_label
from safedefer.queues.base import QueueStats

#: Queues that are told apart; the others are added up.
_QUEUES: Final = 1_000


class Outboxes(Protocol):
    """What knows the outboxes: ``transactions.outbox.Outbox``."""

    def count(self) -> int | None:
        """Rows of all outboxes; None if one cannot be read."""
        ...


class Counted(Protocol):
    """What can count its tasks: a queue."""

    def stats(self, *, now: float) -> Sequence[QueueStats]:
        """Counts of every queue."""
        ...


@dataclass(slots=True)
class QueueReading:
    """Numbers of one queue."""

    waiting: int = 0
    running: int = 0
    dead: int = 0
    lag: float = 0.0
    """Seconds by which the oldest task that waits is late."""


@dataclass(frozen=True, slots=True)
class StoreReading:
    """Numbers of a store."""

    queues: dict[str, QueueReading]
    outbox_rows: int | None
    """None if an outbox cannot be read."""

    def dump(self) -> dict[str, Any]:
        """Return this as JSON's values."""
        queues = {name: [one.waiting, one.running, one.dead, one.lag] for name, one in self.queues.items()}
        return {"queues": queues, "outbox_rows": self.outbox_rows}

    @classmethod
    def load(cls, document: Any) -> StoreReading:
        """Return what ``dump`` made. Raises ``ValueError``, ``TypeError``, ``KeyError`` or ``AttributeError`` else."""
        queues = {
            queue_label(str(name)): QueueReading(int(waiting), int(running), int(dead), float(lag))
            for name, (waiting, running, dead, lag) in document["queues"].items()
        }
        rows = document["outbox_rows"]
        return cls(queues, None if rows is None else int(rows))


def read_store(queue: Counted, outbox: Outboxes, *, now: float) -> StoreReading:
    """Ask a store. May block.

    Args:
        queue: The queue.
        outbox: The outboxes.
        now: Seconds since the epoch.

    Raises:
        QueueUnavailable: The queue does not answer.
    """
    queues: dict[str, QueueReading] = {}
    for stats in queue.stats(now=now):
        # Names in a storage may be those that somebody else wrote.
        name = queue_label(stats.queue) if len(queues) < _QUEUES else queue_label("")
        reading = queues.setdefault(name, QueueReading())
        reading.waiting += stats.waiting
        reading.running += stats.running
        reading.dead += stats.dead
        if stats.oldest is not None:
            reading.lag = max(reading.lag, now - stats.oldest)
    return StoreReading(queues, outbox.count())
