"""One request on its way through the handler: what is known of it, and what is written down of it."""

from __future__ import annotations

from dataclasses import dataclass

from safedefer.claims import split_audience
from safedefer.delivery.redaction import exception_type, redacted_traceback
from safedefer.errors import TaskIdentity
from safedefer.events import TaskHandled
from safedefer.execution.run import TaskContext
from safedefer.ledger import AttemptRecord, Execution
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
    refused: TaskIdentity | None = None
    """Which task it was, as far as the verifier could tell before it refused it."""
    execution: Execution | None = None
    """What the ledger was asked for."""

    @property
    def identity(self) -> TaskIdentity | None:
        """Which task it is: known as soon as a signature was verified."""
        if self.refused is not None:
            return self.refused
        verified = self.pointer if self.task is None else self.task  # a pointer names no callable
        return None if verified is None else verified.identity

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
        if self.task is not None and self.refused is None:
            task_id, audience = self.task.claims["jti"], self.task.claims["aud"]
        else:
            identity = self.identity
            assert identity is not None  # nothing is remembered of what nobody signed
            task_id, audience = identity.task_id, identity.audience
        return AttemptRecord(
            task_id=task_id,
            audience=audience,
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
