"""What an engine can do; what it cannot is refused at ``defer()``, loudly, before anything is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from safedefer.errors import InvalidTaskError, TaskTooLargeError
from safedefer.options import DEFAULT_TARGET

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safedefer.blobs import Blob


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What an engine can do. A gap is refused at ``defer()`` with an error, never passed over."""

    names: bool = True
    unique: bool = True
    eta: bool = True
    headers: bool = True
    retry_options: bool = True
    targets: bool = True
    oversize: bool = True
    batch_atomic: bool = True
    """``enqueue_many`` takes all or none."""
    streams: bool = False
    """``enqueue_many`` stores tasks while those after them are made: it may be given an iterator."""
    longest_wait: float | None = None
    """Seconds that a push engine holds a task back; what is due later waits in the store. None: as long as it takes."""
    kept: float | None = None
    """Seconds after which a push engine deletes a task, whatever came of it. None: it does not."""
    lossless: bool = True
    """A push engine loses nothing that it has taken. Else the store keeps a copy of each task until it has ended, and hands it
    over again."""
    due_order: bool = True
    """What fell due first is leased first; without it, what was enqueued first."""
    exact_wake: bool = True
    """``wait`` ends for new tasks only; without it, now and then for nothing."""


#: What an engine without gaps has.
FULL: Final = Capabilities()


class _Wanted(Protocol):
    """What of a task an engine may be unable to do: a part of ``QueuedTask``."""

    @property
    def token(self) -> bytes: ...
    @property
    def target(self) -> str: ...
    @property
    def eta(self) -> float: ...
    @property
    def created(self) -> float: ...
    @property
    def name(self) -> str | None: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def retry_options(self) -> Mapping[str, float]: ...
    @property
    def blob(self) -> Blob | None: ...
    @property
    def unique_key(self) -> str | None: ...


def refuse_gaps(capabilities: Capabilities, task: _Wanted) -> None:
    """Check that an engine can do all that is asked of it for a task.

    Raises:
        InvalidTaskError: It cannot.
        TaskTooLargeError: The task is oversize, and the engine keeps no blobs.
    """
    asked = (
        (capabilities.names or task.name is None, "names of tasks", "leave out _name"),
        (capabilities.unique or task.unique_key is None, "unique tasks", "leave out unique"),
        (capabilities.eta or task.eta <= task.created, "eta and countdown", "leave out _eta and _countdown"),
        (capabilities.headers or not task.headers, "headers of tasks", "leave out _headers"),
        (
            capabilities.retry_options or not task.retry_options,
            "retry options of tasks",
            "declare _retry_options of the queue",
        ),
        (capabilities.targets or task.target == DEFAULT_TARGET, "targets", "leave out _target"),
    )
    gaps = {what: remedy for possible, what, remedy in asked if not possible}
    if gaps:
        raise InvalidTaskError(
            f"the engine of this queue has no {', '.join(gaps)}; {', '.join(gaps.values())}, or use another engine"
        )
    if task.blob is not None and not capabilities.oversize:
        raise TaskTooLargeError(
            f"the task is {len(task.blob.data)} bytes signed, and the engine of this queue keeps no blobs; "
            "store the data and pass its id",
            size=len(task.blob.data),
            limit=len(task.token),
        )
