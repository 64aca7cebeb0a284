"""What an engine cannot do is refused at ``defer()``, loudly, before anything is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safedefer.errors import InvalidTaskError, TaskTooLargeError
from safedefer.options import DEFAULT_TARGET

if TYPE_CHECKING:
    from safedefer.queues.base import Capabilities, QueuedTask


def refuse_gaps(capabilities: Capabilities, task: QueuedTask) -> None:
    """Check that an engine can do all that is asked of it for a task.

    Raises:
        InvalidTaskError: It cannot.
        TaskTooLargeError: The task is oversize, and the engine keeps no blobs.
    """
    asked = (
        (capabilities.names or task.name is None, "names of tasks", "leave out _name"),
        (capabilities.unique or task.unique_key is None, "unique tasks", "leave out unique"),
        (capabilities.eta or task.eta <= task.created, "eta and countdown", "leave them out"),
        (capabilities.headers or not task.headers, "headers of tasks", "leave out _headers"),
        (capabilities.retry_options or not task.retry_options, "retry options of tasks", "declare them of the queue"),
        (capabilities.targets or task.target == DEFAULT_TARGET, "targets", "leave out _target"),
    )
    for possible, what, remedy in asked:
        if not possible:
            raise InvalidTaskError(f"the engine of this queue has no {what}; {remedy}, or use another engine")
    if task.blob is not None and not capabilities.oversize:
        raise TaskTooLargeError(
            f"the task is {len(task.blob.data)} bytes signed, and the engine of this queue keeps no blobs; "
            "store the data and pass its id",
            size=len(task.blob.data),
            limit=len(task.token),
        )
