"""Deadlines of attempts: the default, which one counts, how a handler stops a run, and its time to clean up. No IO, no clock.

A coroutine is cancelled at its deadline. A thread cannot be, nor a coroutine that suppresses its cancellation: the
handler answers, and the run goes on until it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from asyncio import Task

#: Seconds that one attempt may take where neither the task nor its queue says so (App Engine's push queues).
DEFAULT_DEADLINE: Final = 600.0
#: The longest deadline, in seconds.
MAX_DEADLINE: Final = 86_400
#: The reason of an attempt that did not end in time.
DEADLINE_EXCEEDED: Final = "deadline-exceeded"
#: Seconds that a cancelled coroutine has for its ``finally`` blocks before the handler answers without it.
GRACE: Final = 5.0
#: Seconds that a sender waits for the answer after the deadline: the grace, the ledger and the network take time.
ANSWER_SECONDS: Final = 30.0

_LEAST_STUCK: Final = 2


class Stop(StrEnum):
    """Why a handler stops a run: the reason of its outcome."""

    DEADLINE = DEADLINE_EXCEEDED
    CANCELLED = "cancelled"


class RunControl:
    """The state that a run shares with its handler: what it is doing, and whether it is to stop."""

    __slots__ = ("_returned", "_then", "_unclaimed", "cancelled_with_caller", "in_thread", "spawned", "stop")

    def __init__(self) -> None:
        self.in_thread: bool = False
        """Whether a call of the run was handed to a thread that has not returned."""
        self.stop: Stop | None = None
        """Why the run is to stop; None while it may go on."""
        self.cancelled_with_caller: bool = False
        """Whether the run ended with the cancellation of its caller, and nothing of it runs any more."""
        self.spawned: set[Task[Any]] = set()
        """The asyncio tasks that the run has made, and those have made, and that have not ended."""
        self._unclaimed: list[None] = []
        self._returned: object = None
        self._then: Callable[[object], None] | None = None

    def hand_over(self) -> None:
        """Note that a call is handed to a thread."""
        self.in_thread = True
        self._unclaimed = [None]

    def withdraw(self) -> bool:
        """Take back the call that was handed to a thread; False if the thread has begun it."""
        if self.in_thread and self.claim():
            self.in_thread = False
        return not self.in_thread

    def note_return(self, result: object) -> None:
        """Note, in the thread, what the call that was handed to it came to: not None."""
        with _handing:
            self._returned, then = result, self._then
        if then is not None:
            then(result)

    def take_return(self) -> None:
        """Note that the caller has what the thread returned."""
        self.in_thread, self._returned = False, None

    def when_returned(self, then: Callable[[object], None]) -> None:
        """Call ``then`` once with what the thread returns: in the thread, or at once if it has returned."""
        with _handing:
            self._then, returned = then, self._returned
        if returned is not None:
            then(returned)

    def claim(self) -> bool:
        """Claim the call that was handed to a thread: True for the first caller, the thread or the handler."""
        try:
            self._unclaimed.pop()  # atomic: a lock for a call that is claimed once would cost more
        except IndexError:
            return False
        return True


#: Between a thread that returns and an event loop that lets go of it: one for all, held for two assignments.
_handing: Final = Lock()


def deadline_of(own: float | None, queues: float | None, default: float) -> float | None:
    """Return the seconds that an attempt may take; None is no deadline.

    Args:
        own: The task's signed ``deadline``; None without one.
        queues: The ``attempt_deadline`` of its queue; 0 is none, None is not declared.
        default: Seconds where neither says so; 0 is none.
    """
    if own is not None:
        return own
    return (default if queues is None else queues) or None


def stuck_limit(concurrency: int) -> int:
    """Return how many runs past their deadlines a process may hold before it should be replaced."""
    return max(_LEAST_STUCK, concurrency // 4)
