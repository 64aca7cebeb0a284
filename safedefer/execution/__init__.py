"""Execution: runs a verified task and returns its outcome."""

from __future__ import annotations

from safedefer.codecs.protocol import Codec
from safedefer.execution.context import TaskContext, current_task
from safedefer.execution.run import (
    CoroutineCancelled,
    Outcome,
    Result,
    Validate,
    call_in_thread,
    execute,
    is_async,
    prepare,
)

__all__ = [
    "Codec",
    "CoroutineCancelled",
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
