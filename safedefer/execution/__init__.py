"""A verified task becomes an outcome."""

from __future__ import annotations

from safedefer.execution.run import (
    Codec,
    Interrupted,
    Outcome,
    Result,
    TaskContext,
    Validate,
    call_in_thread,
    current_task,
    execute,
    is_async,
    prepare,
)

__all__ = [
    "Codec",
    "Interrupted",
    "Outcome",
    "Result",
    "TaskContext",
    "Validate",
    "call_in_thread",
    "current_task",
    "execute",
    "is_async",
    "prepare",
]
