"""A push engine, as ``safedefer.queues.push`` and the handler use it: it takes tasks, and delivers them until they are answered 2xx."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from safedefer.queues.base import QueuedTask, QueueStats
    from safedefer.queues.capabilities import Capabilities


class Attempt(NamedTuple):
    """What a push engine says of one delivery: hints for people and for the task, which decide nothing of a signed task.

    Of a request that no key of ours signed, the engine's word is all there is: from ten deliveries over an hour on it is a dead
    letter, if the engine proves to have sent it (``authenticate``).
    """

    retries: int = 0
    """Deliveries before this one (``X-AppEngine-TaskRetryCount``)."""
    executions: int = 0
    """Deliveries before this one that were answered."""
    since: float | None = None
    """When the engine had the task to deliver first, in seconds since the epoch; None: it does not say."""
    task_id: str = ""
    """The task's id, where the engine was told it."""
    previous_response: int | None = None
    retry_reason: str | None = None
    sent: float | None = None
    """When the engine was given the task, in seconds since the epoch; None: it does not say."""


class PushEngine(Protocol):
    """Takes tasks, and posts each token to the handler until it is answered 2xx. Every method is thread-safe.

    Three members may be left out. ``in_process``: its workers run in this process, so ``authenticate`` does not wait, and is
    called in the event loop. ``syncs_before_ack``: of each task that was answered 2xx it has the store sync what the handler
    changed (``sync``) before it lets go of the task, so the handler's own calls need not. ``messages(queue)``, of an engine that
    is not ``lossless``: how many messages wait in a queue, or None where it cannot say; it may raise ``QueueUnavailable``.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What the engine can do. A task that waits longer than ``longest_wait`` it is never given."""
        ...

    def enqueue_many(self, tasks: Iterable[QueuedTask], /) -> None:
        """Take tasks, without their blobs; what it has taken when this returns survives a crash of this process.

        Raises:
            TaskAlreadyExistsError: It has a task of the same name, or of the same id.
            TombstonedTaskError: It had one not long ago.
            NotAllStored: It took some of several.
            QueueUnavailable: It took none.
        """
        ...

    def cancel(self, task_id: str, *, now: float) -> bool:
        """Take a task back, if the engine can find it; False if not. The store's mark keeps it from running in any case."""
        ...

    def stats(self, *, now: float) -> Sequence[QueueStats]:
        """Counts of queues, as far as the engine can say."""
        ...

    def attempt(self, headers: Mapping[str, str], /) -> Attempt:
        """Read the headers of a delivery, whose names are in any case."""
        ...

    def authenticate(self, headers: Mapping[str, str], /) -> bool:
        """Whether the engine itself sent the request, by what it can prove. Called in a thread, after the token's MAC.

        Whatever is in the headers is a refusal, and no error, unless the answer cannot be known now.

        Raises:
            QueueUnavailable: The answer cannot be known now, and the request is to be sent again.
        """
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...
