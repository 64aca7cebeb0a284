"""Reports exceptions of tasks to Sentry, each with its task as context. See README.md."""

from __future__ import annotations

from typing import Any

import sentry_sdk
from sentry_sdk.integrations.logging import ignore_logger

from safedefer.events import Event, TaskHandled


def init(**options: Any) -> None:
    """Start Sentry. Without ``include_local_variables=False`` it sends the arguments of every function on the stack."""
    ignore_logger("safedefer")  # else the log line of a failed task is one more issue
    sentry_sdk.init(**{"include_local_variables": False, **options})


def report(event: Event) -> None:
    """Send a task's exception: ``App(observers=[report])``. Sentry's own thread sends it, so this does not wait."""
    if not isinstance(event, TaskHandled) or event.error is None:
        return
    with sentry_sdk.new_scope() as scope:
        scope.set_tag("task.callable", event.callable)
        scope.set_tag("task.queue", event.queue)
        scope.set_context(
            "task",
            {
                "id": event.task_id,
                "callable": event.callable,
                "queue": event.queue,
                "attempt": event.attempt,
                "outcome": event.outcome,
            },
        )
        sentry_sdk.capture_exception(event.error)
