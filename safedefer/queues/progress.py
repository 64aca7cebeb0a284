"""What is remembered of a task between the deliveries of a push engine, and what the rules make of a delivery.

A pull queue counts in the task's row. A task that is pushed has none: its counters are in the store, under its audience and
id, as JSON that is not trusted to be well formed. What the engine's headers say is counted nowhere here: whoever forges
them, with a token of ours, changes no limit and no time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from safedefer.ledger import AttemptRecord
from safedefer.queues.base import Lease, QueuedTask, Settlement
from safedefer.queues.rules import (
    MOST_COUNTED,
    OUTLASTED,
    REJECT_LIMIT,
    REJECT_SECONDS,
    RUNNING,
    Counters,
    Known,
    LostDelivery,
    after_lost_lease,
    after_retry,
    gives_up,
    options_that_count,
    sets_time,
)

#: More bytes than any value of ours has.
_MOST_BYTES: Final = 4_096
#: The year 9999.
_LATEST: Final = 253_402_300_799.0
_COUNTERS: Final = ("attempts", "retries", "executions", "rejections", "losses")
_TIMES: Final = ("first_attempt", "first_rejection", "first_loss", "not_before")


class Progress(NamedTuple):
    """What was counted of a task that a push engine delivers, before the delivery under way."""

    counters: Counters = Counters()
    not_before: float = 0.0
    """No run begins before: the time of the retry."""
    losses: int = 0
    """Deliveries in a row whose run began and never ended, and when the first of them was counted."""
    first_loss: float | None = None

    def dump(self) -> bytes:
        """Return it as it is stored."""
        values = {
            **self.counters._asdict(),
            "not_before": self.not_before,
            "losses": self.losses,
            "first_loss": self.first_loss,
        }
        return json.dumps({name: value for name, value in values.items() if value}, separators=(",", ":")).encode()

    @classmethod
    def load(cls, data: bytes | None) -> Progress:
        """Read what ``dump`` wrote. What is no value of ours counts as not stored."""
        if data is None or len(data) > _MOST_BYTES:
            return cls()
        try:
            values = json.loads(data)
        except (ValueError, RecursionError):
            return cls()
        return cls() if type(values) is not dict else cls._of(values)

    @classmethod
    def _of(cls, values: Mapping[str, Any]) -> Progress:
        counts = {name: _count(values.get(name)) for name in _COUNTERS}
        times = {name: _time(values.get(name)) for name in _TIMES}
        status, reason = values.get("previous_response"), values.get("retry_reason")
        counters = Counters(
            attempts=counts["attempts"],
            retries=counts["retries"],
            executions=counts["executions"],
            first_attempt=times["first_attempt"],
            rejections=counts["rejections"],
            first_rejection=times["first_rejection"],
            previous_response=status if type(status) is int else None,
            retry_reason=reason if type(reason) is str else None,
        )
        return cls(counters, times["not_before"] or 0.0, counts["losses"], times["first_loss"])

    def lease(self, task: QueuedTask) -> Lease:
        """Return the delivery under way as the rules judge it: a lease of no row."""
        return Lease(task, "", 0.0, *self.counters, losses=self.losses)

    def after(self, settlement: Settlement, *, started: float, now: float) -> Progress:
        """Return what is counted after a delivery whose run ended, or that never ran one, and is tried again."""
        counters = after_retry(self.counters, settlement, leased_at=started, now=now)
        at = now if settlement.at is None else settlement.at
        return Progress(counters, at if sets_time(settlement) else self.not_before)

    def after_loss(self, audience: str, task_id: str, *, now: float) -> tuple[Progress, LostDelivery]:
        """Return what is counted of a run whose process is gone, and that loss."""
        known = Known(RUNNING, uncharged=True, losses=self.losses, first_loss=self.first_loss)
        lost = after_lost_lease(self.counters, (audience, task_id), known, leased_at=None, now=now)
        return Progress(lost.counters, self.not_before, lost.losses, lost.first_loss), lost

    def given_up(self, task: QueuedTask, queues_own: Mapping[str, float] | None, *, now: float) -> str | None:
        """Return why a task is tried no more whose last run outlasted its deadline, and has ended since.

        ``queues_own`` are the retry options of its queue, for what the task has no option of its own.
        """
        if self.counters.retry_reason != OUTLASTED:
            return None
        options = options_that_count(task.retry_options, queues_own)
        return gives_up(options, attempts=self.counters.attempts, age=now - task.eta)


#: What is counted of a task before its first delivery.
NO_PROGRESS: Final = Progress()


def engine_gives_up(deliveries: int, since: float | None, *, now: float) -> bool:
    """Whether a request is given up that no key of ours signed, by the count of an engine that proved to have sent it.

    Nothing of such a token is believed, so nothing can be counted under its id.

    Args:
        deliveries: With this one.
        since: When the engine had it to deliver first; None if it does not say.
        now: The time.
    """
    return deliveries >= REJECT_LIMIT and since is not None and now - since >= REJECT_SECONDS


def lost_record(lost: LostDelivery) -> tuple[AttemptRecord, ...]:
    """Return the record of a lost delivery, if it has one."""
    return () if lost.record is None else (lost.record,)


def _count(value: object) -> int:
    return min(max(value, 0), MOST_COUNTED) if type(value) is int else 0


def _time(value: Any) -> float | None:
    return float(value) if type(value) in {int, float} and 0 <= value < _LATEST else None
