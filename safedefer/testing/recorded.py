"""What was deferred while a test ran, with decoded arguments, and how it is compared with what a test expects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import EllipsisType
from typing import Any, Final

from safedefer.execution.binding import read_signature
from safedefer.options import TaskRetryOptions
from safedefer.queues.base import QueuedTask
from safedefer.queues.memory.queue import MemoryQueue
from safedefer.refs import UNBOUND, bound_object

#: Seconds that two countdowns may differ by: they are differences of large floats.
_EQUAL: Final = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class DeferredTask:
    """One task that was deferred, whether it is due, has run, or neither."""

    id: str
    callable: str
    """``shop.tasks:send_receipt``, or ``shop.models:Order.ship``."""
    function: Callable[..., object]
    """The callable itself, as the handler finds it: a method is bound to the decoded object."""
    args: tuple[Any, ...]
    """Decoded from the token, as the task gets them."""
    kwargs: dict[str, Any]
    queue: str
    name: str | None
    eta: datetime
    """When it is due, aware, in UTC."""
    countdown: float
    """Seconds from the call of ``defer`` to the eta."""
    url: str
    target: str
    headers: Mapping[str, str]
    retry_options: TaskRetryOptions | None

    def __str__(self) -> str:
        """Show the call and the options that are not the default."""
        shown = f"{self.callable}({shown_arguments(self.args, self.kwargs)})"
        options = {
            "queue": None if self.queue == "default" else self.queue,
            "name": self.name,
            "countdown": round(self.countdown, 3) or None,
        }
        return ", ".join([shown, *(f"{name}={value!r}" for name, value in options.items() if value is not None)])


class RecordingQueue(MemoryQueue):
    """A queue in memory that remembers what was enqueued. It stays open while the test mode lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[QueuedTask] = []

    def enqueue_many(self, tasks: Iterable[QueuedTask], /) -> None:
        """Store all tasks or none."""
        tasks = list(tasks)
        super().enqueue_many(tasks)
        self.recorded += tasks

    def close(self) -> None:
        """Do nothing: an application that closes itself, as at the end of a server, leaves its tasks to the test."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The call and the options that an assertion asks for; an ellipsis is anything."""

    callable: str
    function: Callable[..., object]
    args: Sequence[Any]
    kwargs: Mapping[str, Any] | None
    """None: whatever arguments."""
    options: Mapping[str, object]

    def __str__(self) -> str:
        """Show it like a ``DeferredTask``."""
        arguments = "..." if self.kwargs is None else shown_arguments(self.args, self.kwargs)
        given = [f"{name}={value!r}" for name, value in self.options.items() if value is not ...]
        return ", ".join([f"{self.callable}({arguments})", *given])

    def matches(self, task: DeferredTask) -> bool:
        """Whether a task is such a call."""
        return (
            task.callable == self.callable
            and _same_object(self.function, task.function)
            and all(_same_option(name, value, getattr(task, name)) for name, value in self.options.items())
            and self._are_same(task)
        )

    def check(self) -> None:
        """Check that the callable takes the arguments. Raises ``TypeError``: the assertion could never hold."""
        if self.kwargs is not None:
            try:
                self._arguments(self.args, self.kwargs)
            except TypeError as error:
                raise TypeError(
                    f"{self.callable} does not take these arguments: {error}; correct the assertion"
                ) from None

    def _are_same(self, task: DeferredTask) -> bool:
        if self.kwargs is None:
            return True
        ours, theirs = self._arguments(self.args, self.kwargs), self._arguments(task.args, task.kwargs)
        return ours.keys() == theirs.keys() and all(_alike(ours[name], theirs[name]) for name in ours)

    def _arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[Any, Any]:
        """Return arguments by the names of parameters, with defaults: ``f(1)`` and ``f(order_id=1)`` are one call."""
        try:
            signature = read_signature(self.function)
        except ValueError:  # a built-in that does not say
            return {**dict[Any, Any](enumerate(args)), **kwargs}
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)


def shown_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return arguments as they are written in a call."""
    return ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])


def _same_option(name: str, wanted: object, given: Any) -> bool:
    if wanted is ...:
        return True
    if name == "countdown" and (wanted is None or isinstance(wanted, int | float)):
        return bool(abs(given - (wanted or 0)) < _EQUAL)
    return bool(given == wanted)


def _same_object(wanted: Callable[..., object], given: Callable[..., object]) -> bool:
    """Whether two callables are bound to the same object, or to none."""
    ours, theirs = bound_object(wanted), bound_object(given)
    return ours is theirs if ours is UNBOUND or theirs is UNBOUND else _alike(ours, theirs)


def _alike(ours: Any, theirs: Any) -> bool:
    """Whether values are equal. Objects that are equal to themselves only are alike in the same state: one was decoded."""
    if ours == theirs:
        return True
    comparison: object = type(ours).__eq__
    return type(ours) is type(theirs) and comparison is object.__eq__ and _state(ours) == _state(theirs)


def _state(obj: object) -> object:
    slots = [name for cls in type(obj).__mro__ for name in vars(cls).get("__slots__", ())]
    return getattr(obj, "__dict__", None), [getattr(obj, name, ...) for name in slots if name != "__dict__"]


Anything = EllipsisType
"""The type of ``...``, which stands for anything in assertions."""
