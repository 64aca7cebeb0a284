"""The context of a running task: ``safedefer.current_task()``."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

from safedefer.execution.deadline import RunControl, Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskContext:
    """What a running task may know of itself: ``safedefer.current_task()``."""

    id: str
    name: str | None
    queue_name: str
    url: str
    headers: Mapping[str, str]
    """The task's own headers, as they were signed."""
    retry_count: int = 0
    """Deliveries before this one (``X-AppEngine-TaskRetryCount``); a hint, it is not signed."""
    trace: str | None = None
    retry_of: str | None = None
    """The dead letter that this task re-runs."""
    root: str | None = None
    """The id of the first task of the chain of re-runs that this one is of."""
    callable: str = ""
    """What is called, as the token names it: ``shop.tasks:send_receipt``."""
    control: RunControl = field(default_factory=RunControl, repr=False, compare=False)
    """Shared with the handler, which stops the run by it."""

    @property
    def cancelled(self) -> bool:
        """Whether the task was cancelled while it runs. A plain function may look, and return early."""
        return self.control.stop is Stop.CANCELLED


CURRENT: Final[ContextVar[TaskContext | None]] = ContextVar("safedefer_task", default=None)
"""The task that runs in this thread or coroutine; ``execute`` sets it."""


def current_task() -> TaskContext | None:
    """Return the context of the task that runs in this thread or coroutine, or None outside one."""
    return CURRENT.get()
