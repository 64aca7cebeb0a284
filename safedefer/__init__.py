"""safedefer: call a Python function later, without pickle and without a registry.

    from safedefer import deferred

    deferred.defer(send_receipt, order.id, _countdown=60)

``defer`` and its companions are in ``safedefer.deferred``, with App Engine's names; ``App`` is the
typed form. Public are the names in ``__all__`` here and in ``safedefer.deferred``, ``errors``, ``events``
and ``testing``, ``delivery.Response``, and ``DeadFilter``, ``TaskState`` and ``TaskView`` of ``queues.base``;
nothing else is.
"""

from __future__ import annotations

import os

if os.name != "posix":  # os.register_at_fork, signal handlers of a loop: an AttributeError later would not say so
    raise ImportError(
        f"safedefer runs on POSIX systems only (Linux, macOS, BSD), and this is {os.name!r}: its processes need signals "
        "and its queue file needs POSIX locks; on Windows, run it in WSL 2 or in a Linux container"
    )

from typing import TYPE_CHECKING, Any

from safedefer import deferred, errors
from safedefer.app import App, Deferral
from safedefer.codecs.registry import register_type
from safedefer.deferred import (
    configure,
    defer,
    defer_async,
    invoke_member,
    run,
    run_async,
    run_from_datastore,
    serialize,
    set_log_level,
)
from safedefer.errors import *  # noqa: F403  # errors.__all__ is the whole tree
from safedefer.execution.context import TaskContext, current_task
from safedefer.keys import Key, Keyring, KeyState
from safedefer.options import DEFAULT_URL, Limits, Options, Serves, Task, TaskRetryOptions
from safedefer.policy import Policy, deferrable
from safedefer.refs import CallableRef
from safedefer.signing import Signer, Verifier
from safedefer.task import VerifiedPointer, VerifiedTask
from safedefer.wrappers import register_wrapper

if TYPE_CHECKING:
    from safedefer.deferred import TaskHandler

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_URL",
    "App",
    "CallableRef",
    "Deferral",
    "Key",
    "KeyState",
    "Keyring",
    "Limits",
    "Options",
    "Policy",
    "Serves",
    "Signer",
    "Task",
    "TaskContext",
    "TaskHandler",
    "TaskRetryOptions",
    "VerifiedPointer",
    "VerifiedTask",
    "Verifier",
    "configure",
    "current_task",
    "defer",
    "defer_async",
    "deferrable",
    "deferred",
    "errors",
    "invoke_member",
    "register_type",
    "register_wrapper",
    "run",
    "run_async",
    "run_from_datastore",
    "serialize",
    "set_log_level",
]
__all__ += errors.__all__


def __getattr__(name: str) -> Any:
    if name == "TaskHandler":  # imports aiohttp, so only when asked for
        return deferred.TaskHandler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
