"""What a dispatcher tells its observer: tasks that are put off or given up, handlers that are down, storage that fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Final

from safedefer.dispatcher.unreachable import UnreachableTarget
from safedefer.errors import Error, QueueError
from safedefer.events import Observer, QueueTrouble, TargetDown, TargetUp, TaskDead, TaskRetried, notify
from safedefer.queues.base import Lease, Settlement, Verdict

#: Seconds between two events about one trouble.
_TROUBLE_EVERY: Final = 60.0
#: The most characters of an error's text.
_MOST_TEXT: Final = 500


@dataclass(slots=True)
class _Trouble:
    """Failures of one thing that a dispatcher does, since it worked."""

    began: float
    told: float | None = None
    """When the last event was."""
    count: int = 0
    """Failures since then."""


class Reports:
    """Makes the events of one dispatcher.

    Args:
        observer: Gets them.
        clock: Returns seconds since the epoch, as in the times of settlements.
        ticks: Returns seconds that only grow.
    """

    def __init__(
        self, observer: Observer, *, clock: Callable[[], float], ticks: Callable[[], float] = time.monotonic
    ) -> None:
        self._observer = observer
        self._clock = clock
        self._ticks = ticks
        self._lock = Lock()  # leases are extended from a thread
        self._troubles: dict[str, _Trouble] = {}

    def settled(self, batch: Sequence[tuple[Lease, Settlement]], kept: Sequence[bool]) -> None:
        """Tell what became of tasks that were still this dispatcher's, unless they ended well: the handler told that."""
        for (lease, settlement), ours in zip(batch, kept, strict=True):
            if ours and settlement.verdict is not Verdict.DONE:
                self._tell(lease, settlement)

    def _tell(self, lease: Lease, settlement: Settlement) -> None:
        task = lease.task
        attempts = lease.attempts + settlement.charged
        if settlement.verdict is Verdict.DEAD:
            if not settlement.answered:  # by the ledger it may run still, or have succeeded
                return
            notify(
                self._observer,
                TaskDead(
                    task_id=task.id,
                    queue=task.queue,
                    callable=task.callable_name,
                    reason=settlement.reason,
                    attempts=attempts,
                ),
            )
            return
        now = self._clock()
        notify(
            self._observer,
            TaskRetried(
                task_id=task.id,
                queue=task.queue,
                callable=task.callable_name,
                reason=settlement.reason,
                status=settlement.status,
                attempts=attempts,
                seconds=max(0.0, (now if settlement.at is None else settlement.at) - now),
            ),
        )

    def down(self, address: str, error: BaseException) -> None:
        """Tell that a handler took no connection."""
        notify(self._observer, TargetDown(address=address, reason=str(error) or type(error).__name__))

    def up(self, address: str, target: UnreachableTarget | None, *, now: float) -> None:
        """Tell that a handler takes connections again, if it was down."""
        if target is not None:
            down = max(0.0, now - target.since)
            notify(self._observer, TargetUp(address=address, seconds=down, waited=target.postponed + target.failures))

    def failed(self, doing: str, error: BaseException) -> None:
        """Tell of a failure of the storage: the first one at once, then their number each minute."""
        now = self._ticks()
        with self._lock:
            trouble = self._troubles.setdefault(doing, _Trouble(now))
            trouble.count += 1
            if trouble.told is not None and now - trouble.told < _TROUBLE_EVERY:
                return
            count, trouble.count, trouble.told = trouble.count, 0, now
        event = QueueTrouble(doing=doing, reason=_text_of(error), count=count, seconds=now - trouble.began)
        notify(self._observer, event)

    def worked(self, doing: str) -> None:
        """Tell that something works again, if it had failed."""
        if not self._troubles:
            return
        with self._lock:
            trouble = self._troubles.pop(doing, None)
        if trouble is not None:
            seconds = self._ticks() - trouble.began
            notify(self._observer, QueueTrouble(doing=doing, reason="", count=0, seconds=seconds))


def _text_of(error: BaseException) -> str:
    """Return what may be logged of an error: the texts of others may quote a task."""
    if isinstance(error, QueueError):
        return str(error)[:_MOST_TEXT].encode("unicode_escape").decode("ascii")
    return name_of(error)


def name_of(error: BaseException) -> str:
    """Return the name of an exception for the log: its text may quote a task."""
    return error.slug if isinstance(error, Error) else type(error).__name__
