"""The state of one request in the handler, and the records made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final, cast

from safedefer.claims import Claims, split_audience
from safedefer.delivery.redaction import exception_type, redacted_traceback
from safedefer.delivery.runs import RequestCount
from safedefer.errors import TaskIdentity
from safedefer.events import TaskHandled, TaskStarted
from safedefer.execution.context import TaskContext
from safedefer.ledger import AttemptRecord, Execution
from safedefer.queues.progress import NO_PROGRESS, Progress
from safedefer.task import VerifiedPointer, VerifiedTask

#: The most tasks whose code has ended and whose end is still to be stored, as a multiple of the places.
_STORING_PLACES: Final = 4


def signed_retry(claims: Claims) -> Mapping[str, float] | None:
    """Return the retry options that were signed with a task; None if none were."""
    return cast("Mapping[str, float] | None", claims.get("retry"))


@dataclass(slots=True)
class HandlerRequest:
    """A request, from its arrival to its answer."""

    started: float
    """When the request arrived, in seconds since the epoch."""
    retries: int
    """The retry count of its header; a hint, it is not signed."""
    attempt: int
    """Which attempt of the task this is, from 1; a hint too."""
    pushed: bool = False
    """Whether a push engine says that it sent it; a hint too."""
    pointer: VerifiedPointer | None = None
    """The token that was sent, if the task is oversize."""
    task: VerifiedTask | None = None
    refused: TaskIdentity | None = None
    """The identity of a task that the verifier refused, as far as it had been verified."""
    execution: Execution | None = None
    """The run that the ledger was asked to admit."""
    ran: Callable[[], None] | None = None
    """Called when the task's code has ended, and its end is still to be stored."""
    is_storing: bool = False
    """Whether it has, and this request holds no place meanwhile."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Those of the request, for a push engine that says more of the delivery than the hints."""
    body: bytes = b""
    claims: Claims | None = None
    """Those of a task that the verifier refused, if a key of ours signed it; under a push engine only."""
    progress: Progress = NO_PROGRESS
    """What was counted of a pushed task before this delivery."""

    @property
    def identity(self) -> TaskIdentity | None:
        """The identity of the task; None until a signature is verified."""
        if self.refused is not None:
            return self.refused
        verified = self.pointer if self.task is None else self.task  # a pointer names no callable
        return None if verified is None else verified.identity

    @property
    def signed(self) -> Claims | None:
        """What was signed, by a key of ours; the task's own claims where it is oversize and its stored token is verified."""
        verified = self.pointer if self.task is None else self.task
        return self.claims if verified is None else verified.claims

    @property
    def retry(self) -> Mapping[str, float] | None:
        """The retry options that were signed with the task."""
        claims = self.signed
        return None if claims is None else signed_retry(claims)

    def give_place_away(self, requests: RequestCount, *, places: int) -> None:
        """Let another task run while the end of this one is stored, so that the ends of many are stored together.

        Args:
            requests: The requests of the process.
            places: The tasks that run at once.
        """
        self.is_storing = requests.begin_storing(_STORING_PLACES * places)
        if self.is_storing and self.ran is not None:
            self.ran()

    def ask(self, owner: str) -> Execution:
        """Return the run that the ledger is asked to admit, with ``owner`` as its owner."""
        if self.pointer is not None:
            claims, digest = self.pointer.claims, bytes.fromhex(self.pointer.blob["sha256"])
        elif self.task is not None:
            claims, digest = self.task.claims, self.task.digest
        else:
            assert self.claims is not None  # signed, and refused for another reason
            claims = self.claims
            digest = bytes.fromhex(claims["blob"]["sha256"]) if "blob" in claims else sha256(self.body).digest()
        self.execution = Execution(
            audience=claims["aud"], task_id=claims["jti"], digest=digest, owner=owner, expires=claims["exp"]
        )
        return self.execution

    def context(self, task: VerifiedTask) -> TaskContext:
        """Return what ``current_task()`` returns in the task."""
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
            root=claims["root"]["id"] if "root" in claims else None,
            callable=task.identity.callable_name,
        )

    def record(
        self, outcome: str, status: int | None, reason: str | None, error: BaseException | None, *, ended: float
    ) -> AttemptRecord:
        """Return the record of the attempt, for the ledger."""
        if self.task is not None and self.refused is None:
            task_id, audience = self.task.claims["jti"], self.task.claims["aud"]
        else:
            identity = self.identity
            assert identity is not None  # the handler records only tasks with a verified signature
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

    def start_event(self, identity: TaskIdentity) -> TaskStarted:
        """Return the event for the observer: an attempt begins."""
        return TaskStarted(
            task_id=identity.task_id,
            queue=identity.audience.split(":")[1],
            callable=identity.callable_name,
            kid=identity.kid,
            attempt=self.attempt,
        )

    def event(
        self,
        identity: TaskIdentity,
        status: int,
        outcome: str,
        reason: str | None,
        error: BaseException | None,
        *,
        ended: float,
    ) -> TaskHandled:
        """Return the event for the observer."""
        return TaskHandled(
            task_id=identity.task_id,
            queue=identity.audience.split(":")[1],
            callable=identity.callable_name,
            kid=identity.kid,
            outcome=outcome,
            status=status,
            reason=reason,
            attempt=self.attempt,
            seconds=ended - self.started,
            error_type=None if error is None else exception_type(error),
            error=error,
        )
