"""The ledger: which tasks run now and which have ended, so that no task runs twice knowingly.

A ledger entry is named by the pair (``aud``, ``jti``) and keeps the SHA-256 digest of the task's
token, its state, and who runs it until when. A task that ended in any way does not run again, until
its ``exp`` is past and the token itself is refused.

Ledgers carry opaque values: nothing here can decode, import or run a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol, TypeAlias


class Admission(StrEnum):
    """What the ledger says of a task that wants to run."""

    RUN = "run"
    """It may run; the entry is now ours until the lease ends."""
    DUPLICATE = "duplicate"
    """It succeeded, failed or was cancelled already."""
    RUNNING = "running"
    """Somebody else runs it, and that lease is alive."""
    EARLY = "early"
    """It failed, and the time of its retry has not come."""
    UNSETTLED = "unsettled"
    """Its run failed, and the delivery is not settled yet: nothing says when, or whether, it is tried again."""
    CONFLICT = "conflict"
    """The id is known with another digest: not the same task."""


class EndState(StrEnum):
    """How one run leaves the entry."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    RETRY = "retry"
    """Not ended: the run is over, and the task may run again."""


class Execution(NamedTuple):
    """One permission to run a task. ``owner`` fences it: a later run has another owner."""

    audience: str
    task_id: str
    digest: bytes
    """SHA-256 of the task's token; of the stored token where the task is oversize."""
    owner: str
    """A random text that names this run."""
    expires: int
    """The token's ``exp``, in seconds since the epoch: the entry is kept until then plus leeway."""


class VerifiedLetter(NamedTuple):
    """What the verified token of a dead letter says of it: nothing here is the storage's.

    Where a new task replaces the letter, the ledger notes the old one as cancelled: it does not run, and is not replaced
    again. The ledger keeps its entry of a task for as long as there is a dead letter of it.
    """

    audience: str
    digest: bytes
    """SHA-256 of the token."""
    expires: int
    expired: bool
    """Whether its time is over: then the ledger must know that it died."""


class AttemptRecord(NamedTuple):
    """What is remembered of one attempt, for dead letters and for whoever asks what went wrong."""

    task_id: str
    audience: str
    started: float
    """Seconds since the epoch."""
    ended: float
    outcome: str
    """The ``Safedefer-Outcome`` of the attempt, such as ``succeeded`` or ``retry``."""
    status: int | None
    """The HTTP status; None where no response came."""
    reason: str | None = None
    """A slug: the error's, or ``exception``."""
    exception_type: str | None = None
    traceback: str | None = None
    """Redacted: frames and the exception's type and text, never local values."""


RunEnd: TypeAlias = tuple[Execution, EndState, AttemptRecord]
"""How a run ended: what ``Ledger.finish_many`` takes."""


class LedgerCalls(Protocol):
    """``Ledger.begin_many`` and ``Ledger.finish_many``, awaited."""

    async def begin_many(self, executions: Sequence[Execution], *, now: float, lease: float) -> Sequence[Admission]:
        """Ask to run."""
        ...

    async def finish_many(self, ends: Sequence[RunEnd]) -> Sequence[bool]:
        """Store the ends of runs."""
        ...


class PushedCalls(Protocol):
    """What a store answers under a push engine in one step, where ``Ledger`` and ``Keep`` take several; awaited.

    With ``synced`` a change survives a crash of the database's server, or machine, when the call returns. Without it a crash
    of this process cannot undo it, and one of the server can until the next ``sync`` of the store has returned.
    """

    async def begin_first(
        self,
        executions: Sequence[Execution],
        keys: Sequence[Sequence[str]],
        *,
        now: float,
        lease: float,
        synced: bool,
    ) -> Sequence[Mapping[str, bytes] | None]:
        """Admit those runs whose tasks the ledger does not know; for each of them return what is kept under its keys.

        None stands for one that was not admitted: the ledger knows its task, and is to be asked by ``Ledger.begin_many``.
        """
        ...

    async def finish_many(self, ends: Sequence[RunEnd], *, synced: bool) -> Sequence[bool]:
        """Store the ends of runs, as ``Ledger.finish_many``; also those whose begin a crash has undone."""
        ...


class Ledger(Protocol):
    """Where runs are admitted and their ends are remembered.

    Every method is thread-safe, does all that it is given in one transaction, and may raise ``QueueUnavailable``.
    """

    @property
    def here(self) -> LedgerCalls | None:
        """The calls of the running loop, if the queue has connections of it now; None: use a thread."""
        ...

    def begin_many(self, executions: Sequence[Execution], *, now: float, lease: float) -> Sequence[Admission]:
        """Ask to run; ``lease`` is seconds."""
        ...

    def extend_many(self, executions: Sequence[Execution], *, now: float, lease: float) -> Sequence[bool]:
        """Prolong runs to ``lease`` seconds from now; False stands for one that is no longer ours.

        A run that was taken for lost, and asks for more time, lives: the losses of its task are forgotten.
        """
        ...

    def lost_many(self, executions: Sequence[Execution], *, now: float) -> Sequence[bool]:
        """Return for which of these tasks a run began and neither ended nor is extended any more; changes nothing."""
        ...

    def cancelled_many(self, executions: Sequence[Execution]) -> Sequence[bool]:
        """Return which of these runs belong to tasks that were cancelled; changes nothing."""
        ...

    def finish_many(self, ends: Sequence[RunEnd]) -> Sequence[bool]:
        """Store the ends of runs; False stands for one that does not count. Every record is stored.

        The first end counts that is not RETRY, also of an owner whose lease has lapsed; RETRY counts only from the
        current owner. Any end, also one that does not count, makes the ledger forget the losses of the task.
        """
        ...

    def record_many(self, records: Sequence[AttemptRecord]) -> None:
        """Store attempts that never came to run (a rejected token)."""
        ...
