"""One request on its way through the handler: what is known of it, and what is written down of it."""

from __future__ import annotations

from dataclasses import dataclass

from safedefer.claims import split_audience
from safedefer.errors import TaskIdentity
from safedefer.events import TaskHandled
from safedefer.execution import TaskContext
from safedefer.ledger import AttemptRecord, Execution
from safedefer.redaction import exception_type, redacted_traceback
from safedefer.task import VerifiedPointer, VerifiedTask


@dataclass(slots=True)
class Run:
    """A request, from its arrival to its answer."""

    started: float
    retries: int
    """What its header says; a hint."""
    pointer: VerifiedPointer | None = None
    """What was sent, where the task is oversize."""
    task: VerifiedTask | None = None
    identity: TaskIdentity | None = None
    """Known as soon as a signature was verified."""
    execution: Execution | None = None
    """What the ledger was asked for."""

    def ask(self, owner: str) -> Execution:
        """Return what the ledger is asked: whether ``owner`` may run the task."""
        if self.pointer is not None:
            claims, digest = self.pointer.claims, bytes.fromhex(self.pointer.blob["sha256"])
        else:
            assert self.task is not None  # verified, or pointed to
            claims, digest = self.task.claims, self.task.digest
        self.execution = Execution(
            audience=claims["aud"], task_id=claims["jti"], digest=digest, owner=owner, expires=claims["exp"]
        )
        return self.execution

    def context(self, task: VerifiedTask) -> TaskContext:
        """Return what the task may know of itself."""
        claims = task.claims
        _, queue, _, url = split_audience(claims["aud"])
        return TaskContext(
            id=claims["jti"],
            name=claims.get("name"),
            queue_name=queue,
            url=url,
            headers=claims.get("headers", {}),
            retry_count=self.retries,
            trace=claims.get("trace"),
            retry_of=claims.get("retry_of"),
        )

    def record(
        self, outcome: str, status: int | None, reason: str | None, error: BaseException | None, *, ended: float
    ) -> AttemptRecord:
        """Return what is remembered of the attempt."""
        assert self.identity is not None  # nothing is remembered of what nobody signed
        return AttemptRecord(
            task_id=self.identity.task_id,
            audience=self.identity.audience,
            started=self.started,
            ended=ended,
            outcome=outcome,
            status=status,
            reason=reason,
            exception_type=None if error is None else exception_type(error),
            traceback=None if error is None else redacted_traceback(error),
        )

    def event(
        self, identity: TaskIdentity, status: int, outcome: str, reason: str | None, *, ended: float
    ) -> TaskHandled:
        """Return what observers are told."""
        return TaskHandled(
            task_id=identity.task_id,
            queue=identity.audience.split(":")[1],
            callable=identity.callable_name,
            kid=identity.kid,
            outcome=outcome,
            status=status,
            reason=reason,
            attempt=self.retries + 1,
            seconds=ended - self.started,
        )
