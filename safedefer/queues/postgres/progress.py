"""Progress: the counters of tasks whose first delivery was not the last (table ``progress``)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from safedefer.queues.base import Lease
from safedefer.queues.postgres.statements import SQL, to_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from safedefer.queues.base import QueuedTask, Settlement
    from safedefer.queues.postgres.connection import Connection
    from safedefer.queues.postgres.rows import Hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A row of ``progress``: the counters of a task that was delivered before."""

    job_id: int
    attempts: int = 0
    deliveries: int = 0
    executions: int = 0
    first_attempt: float | None = None
    rejections: int = 0
    first_rejection: float | None = None
    previous_response: int | None = None
    retry_reason: str | None = None

    @classmethod
    def after(cls, lease: Lease, settlement: Settlement, hold: Hold, *, now: float) -> Progress:
        """Return the counters after a delivery that ended in a retry."""
        return cls(
            job_id=hold.job,
            attempts=lease.attempts + settlement.charged,
            deliveries=lease.retries + 1,
            executions=lease.executions + settlement.executed,
            first_attempt=hold.leased if settlement.charged and lease.first_attempt is None else lease.first_attempt,
            rejections=lease.rejections + settlement.rejected,
            first_rejection=now if settlement.rejected and lease.first_rejection is None else lease.first_rejection,
            previous_response=settlement.status,
            retry_reason=settlement.reason,
        )

    def leased(self, task: QueuedTask, *, owner: str, until: float) -> Lease:
        """Return the lease of a task with these counters."""
        return Lease(
            task=task,
            owner=owner,
            until=until,
            attempts=self.attempts,
            retries=self.deliveries,
            executions=self.executions,
            first_attempt=self.first_attempt,
            rejections=self.rejections,
            first_rejection=self.first_rejection,
            previous_response=self.previous_response,
            retry_reason=self.retry_reason,
        )


async def read_progress(connection: Connection, jobs: Sequence[int]) -> dict[int, Progress]:
    """Return the counters of jobs by id; a job that was not delivered before has none."""
    return {row["job_id"]: Progress(**row) for row in await connection.fetch(SQL["progress"], jobs)}


async def write_progress(connection: Connection, rows: Iterable[Progress]) -> None:
    """Store counters of jobs, new ones or in place of those before."""
    await connection.execute(SQL["progress_set"], to_json([asdict(row) for row in rows]))
