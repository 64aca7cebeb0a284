"""The part of an ``App`` that the dashboard shows and manages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from safedefer.claims import Claims
from safedefer.keys import Keyring
from safedefer.observe.notices import Notices
from safedefer.options import Task
from safedefer.queues.base import PullQueue
from safedefer.queues.config import QueueFile
from safedefer.task import VerifiedPointer, VerifiedTask
from safedefer.transactions.outbox import Outbox


class Managed(Protocol):
    """What the dashboard needs of an ``App``."""

    @property
    def keyring(self) -> Keyring:
        """The keys."""
        ...

    @property
    def environment(self) -> str:
        """The environment's name."""
        ...

    @property
    def queue(self) -> PullQueue:
        """The queue. Raises ``QueueUnavailable``."""
        ...

    @property
    def queues(self) -> Iterable[str] | None:
        """The declared queues; None: any."""
        ...

    @property
    def queue_file(self) -> QueueFile | None:
        """What ``queue.yaml`` says."""
        ...

    @property
    def queue_place(self) -> str:
        """Where the queue is, without its password."""
        ...

    @property
    def outbox(self) -> Outbox:
        """The outboxes."""
        ...

    @property
    def notices(self) -> Notices:
        """What this process says of its troubles."""
        ...

    def authenticate(self, data: bytes) -> Claims:
        """Return the claims of a token that a key of ours signed."""
        ...

    def verify(self, data: bytes, *, expired: bool = False) -> VerifiedTask | VerifiedPointer:
        """Verify a token; imports nothing."""
        ...

    def cancel(self, task_id: str) -> bool:
        """Cancel a task."""
        ...

    def retry(self, task_id: str) -> Task | None:
        """Run a dead letter again."""
        ...

    def check_queue(self, name: str) -> None:
        """Check that a queue may exist."""
        ...
