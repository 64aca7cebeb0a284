"""What traces tasks: a Protocol, which ``safedefer.observe.tracing`` fills and ``App`` hands to sending and execution."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from safedefer.execution.context import TaskContext

if TYPE_CHECKING:
    from safedefer.execution.run import Outcome


class Sending(Protocol):
    """The span of one call that defers."""

    def sent(self, task_ids: Sequence[str], /) -> None:
        """Note the tasks that were stored."""
        ...


class Running(Protocol):
    """The span of one run."""

    def ended(self, outcome: Outcome, /) -> None:
        """Note how it ended."""
        ...


class TaskTracing(Protocol):
    """Makes spans. No method raises, and no exception of the code within a span is kept from its caller."""

    def traceparent(self) -> str | None:
        """Return the active span as a W3C ``traceparent``; None if there is none."""
        ...

    def sending(self, queue: str, *, batch: bool = False) -> AbstractContextManager[Sending]:
        """Make the span of deferring one task to ``queue``, or several, active."""
        ...

    def running(self, context: TaskContext, *, attempt: int) -> AbstractContextManager[Running]:
        """Make the span of one run active."""
        ...


async def traced(tracing: TaskTracing, context: TaskContext, run: Awaitable[Outcome], *, attempt: int) -> Outcome:
    """Await a run within its span, in an asyncio task of its own.

    Args:
        tracing: Makes the span.
        context: The task that runs.
        run: The run: ``execute(...)``.
        attempt: Which attempt of the task this is, from 1.

    Raises:
        asyncio.CancelledError: As ``execute``.
    """
    with tracing.running(context, attempt=attempt) as span:
        outcome = await run
        span.ended(outcome)
        return outcome
