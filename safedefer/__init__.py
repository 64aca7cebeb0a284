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

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from safedefer import errors
from safedefer.errors import *  # noqa: F403  # errors.__all__ is the whole tree

if TYPE_CHECKING:
    from safedefer import deferred
    from safedefer.app import App, Deferral
    from safedefer.callables.wrappers import register_wrapper
    from safedefer.codecs.registry import register_type
    from safedefer.deferred import (
        TaskHandler,
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
    from safedefer.execution.context import TaskContext, current_task
    from safedefer.keys import Key, Keyring, KeyState
    from safedefer.options import DEFAULT_URL, Limits, Options, Serves, Task, TaskRetryOptions
    from safedefer.policy import Policy, deferrable
    from safedefer.refs import CallableRef
    from safedefer.signing import Signer, Verifier
    from safedefer.task import VerifiedPointer, VerifiedTask

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


#: Where each name is. Its module is imported when the name is first used: `safedefer --help` needs none of them, and a
#: module that only marks its functions needs the policy alone.
_HOMES: Final = {
    **dict.fromkeys(("App", "Deferral"), "app"),
    "register_type": "codecs.registry",
    **dict.fromkeys(
        (
            "TaskHandler", "configure", "defer", "defer_async", "invoke_member", "run", "run_async", "run_from_datastore",
            "serialize", "set_log_level",
        ),
        "deferred",
    ),
    **dict.fromkeys(("TaskContext", "current_task"), "execution.context"),
    **dict.fromkeys(("Key", "KeyState", "Keyring"), "keys"),
    **dict.fromkeys(("DEFAULT_URL", "Limits", "Options", "Serves", "Task", "TaskRetryOptions"), "options"),
    **dict.fromkeys(("Policy", "deferrable"), "policy"),
    "CallableRef": "refs",
    **dict.fromkeys(("Signer", "Verifier"), "signing"),
    **dict.fromkeys(("VerifiedPointer", "VerifiedTask"), "task"),
    "register_wrapper": "callables.wrappers",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in {"deferred", "events"}:  # public modules, which `import safedefer` alone has always given
        return import_module(f"safedefer.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"safedefer.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
