"""The argument ``context`` of ``@task(takes_context=True)``: it travels as a registered type, and is made anew for each run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from safedefer.codecs.registry import register_type
from safedefer.execution.context import current_task

_TAG: Final = "$django_task_context"
_MEMBERS: Final = {"task": str, "args": list, "kwargs": dict, "backend": str}


def carry_contexts(base: Any, task_class: type) -> None:
    """Register Django's ``TaskContext``. The policy must admit it, as every class.

    Args:
        base: The module ``base`` of ``django.tasks`` or ``django_tasks``.
        task_class: What a module may have under the name that a token says.
    """
    register_type(base.TaskContext, _TAG, _parts, _maker(base, task_class))


def _parts(context: Any) -> dict[str, object]:
    result = context.task_result
    function = result.task.func
    name = f"{function.__module__}:{function.__qualname__}"
    return {"task": name, "args": list(result.args), "kwargs": dict(result.kwargs), "backend": result.backend}


def _maker(base: Any, task_class: type) -> Callable[[Any], Any]:
    def make(parts: Any) -> Any:
        # Written by a holder of a key.
        if type(parts) is not dict or {name: type(value) for name, value in parts.items()} != _MEMBERS:
            raise ValueError("a context has a task, its args and kwargs, and a backend")
        module_name, _, name = parts["task"].partition(":")
        module = sys.modules.get(module_name)
        # Where it is kept: no __getattr__ of a module is asked.
        task = vars(module).get(name) if type(module) is ModuleType else None
        if type(task) is not task_class:
            raise ValueError("the context is of no task that this process knows")
        running = current_task()  # None where a token is only looked at
        result = base.TaskResult(
            task=task,
            id="" if running is None else running.id,
            status=base.TaskResultStatus.RUNNING,
            enqueued_at=None,
            started_at=None,
            finished_at=None,
            last_attempted_at=None,
            args=parts["args"],
            kwargs=parts["kwargs"],
            backend=parts["backend"],
            errors=[],
            worker_ids=["" for _ in range(1 if running is None else running.retry_count + 1)],
        )
        return base.TaskContext(task_result=result)

    return make
