"""What ``run_due`` reports: deliveries, and the failure of a test by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

_WITHOUT_FAILURE: Final = frozenset({"succeeded", "duplicate", "early", "busy", "running", "cancelled"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One delivery that ``run_due`` made."""

    task_id: str
    callable: str
    """``shop.tasks:send_receipt``."""
    outcome: str
    """The ``Safedefer-Outcome``."""
    status: int
    reason: str | None
    traceback: str | None
    """Of what the task raised, as it is recorded: without tokens."""
    error: BaseException | None = field(default=None, repr=False, compare=False)
    """What the task raised."""

    @property
    def failed(self) -> bool:
        """Whether the task raised, or was refused."""
        return self.outcome not in _WITHOUT_FAILURE


class TaskFailed(AssertionError):
    """Tasks failed in ``run_due``. ``ran`` (list of ``Ran``) holds all deliveries, these among them."""

    def __init__(self, ran: Sequence[Ran]) -> None:
        failures = [one for one in ran if one.failed]
        lines = [
            f"{one.callable or one.task_id}: {one.outcome} ({one.reason})\n{one.traceback or ''}" for one in failures
        ]
        super().__init__(
            "\n".join([f"{len(failures)} of {len(ran)} deliveries failed; raises=False reports only", *lines])
        )
        self.ran: list[Ran] = list(ran)


def check(ran: Sequence[Ran]) -> None:
    """Raise ``TaskFailed``, from the first error of a task, if a delivery failed."""
    failures = [one for one in ran if one.failed]
    if failures:
        raise TaskFailed(ran) from failures[0].error
