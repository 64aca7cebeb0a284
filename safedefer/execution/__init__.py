"""A verified task becomes an outcome. The modules that need an event loop are imported by those who have one."""

from __future__ import annotations

from safedefer.execution.context import TaskContext, current_task

__all__ = ["TaskContext", "current_task"]
