"""Task objects that another library's decorator leaves in a module in place of the function.

A look-up by name that ends at such an object gives the function that it wraps, if the function says that name. Only exact
types count: those that were registered, and those of six libraries, which are known by name and never imported here. Only
celery's proxies are asked, by celery's own code; of all others the attribute is read where the object keeps it.
"""

from __future__ import annotations

import sys
from types import FunctionType, GetSetDescriptorType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, Final, cast

from safedefer.callables.getters import class_dict, class_mro, module_dict
from safedefer.errors import ConfigurationError

#: Module and name of each type, and the attribute of its objects that is the function.
_KNOWN: Final = (
    ("django.tasks.base", "Task", "func"),
    ("django_tasks.base", "Task", "func"),
    ("dramatiq.actor", "Actor", "fn"),
    ("huey.api", "TaskWrapper", "func"),
    ("taskiq.decor", "AsyncTaskiqDecoratedTask", "original_func"),
    ("procrastinate.tasks", "Task", "func"),
)
_CELERY_PROXIES: Final = ("PromiseProxy", "Proxy")
#: By id of the type, which the entry keeps alive.
_REGISTERED: Final[dict[int, tuple[type, str]]] = {}


def register_wrapper(cls: type, attribute: str) -> None:
    """Let tasks of another library's decorator be deferred: look-ups give the function that they wrap.

    Args:
        cls: The exact type of the objects that the decorator leaves in the module.
        attribute: The attribute of such an object, in its ``__dict__`` or a slot, that is the function.

    Raises:
        ConfigurationError: It is no class of such objects, or no name.
    """
    if not issubclass(type(cls), type) or issubclass(cls, (FunctionType, type)) or not attribute.isidentifier():
        raise ConfigurationError(
            "register_wrapper takes the type of a decorator's objects and the name of an attribute"
        )
    _REGISTERED[id(cls)] = cls, attribute


def unwrapped(obj: object) -> object:
    """Return the function that a task object of a known library wraps; else the object itself. Imports nothing."""
    kind = type(obj)
    if kind is FunctionType:
        function: Any = obj
        return _coroutine_function(function) if "__wrapped__" in function.__dict__ else obj
    if issubclass(kind, type):
        return obj
    inner = _celery_function(obj, kind)
    if inner is None:
        _, attribute = _REGISTERED.get(id(kind)) or (kind, _known_attribute(kind))
        inner = _read(obj, attribute) if attribute else None
    return _coroutine_function(inner) if type(inner) is FunctionType else obj


def _coroutine_function(function: FunctionType) -> FunctionType:
    """Return the coroutine function that dramatiq keeps behind one which needs a loop of dramatiq's worker."""
    if function.__globals__.get("__name__") == "dramatiq.asyncio":
        inner = function.__dict__.get("__wrapped__")
        return inner if type(inner) is FunctionType else function
    return function


def _is(kind: type, module: str, name: str) -> bool:
    loaded = sys.modules.get(module)
    return type(loaded) is ModuleType and module_dict(loaded).get(name) is kind


def _known_attribute(kind: type) -> str | None:
    return next((attribute for module, name, attribute in _KNOWN if _is(kind, module, name)), None)


def _read(obj: object, attribute: str) -> object:
    for cls in class_mro(type(obj)):
        own = class_dict(cls)
        if type(own.get("__dict__")) is GetSetDescriptorType and attribute in (held := own["__dict__"].__get__(obj)):
            return held[attribute]
        if type(own.get(attribute)) is MemberDescriptorType:
            try:
                return cast("object", own[attribute].__get__(obj))
            except AttributeError:  # a slot that nothing was put into
                return None
    return None


def _is_celerys(proxy: object) -> bool:
    """Whether celery's code alone runs if a proxy is asked: a program may make one of any function of its own."""
    try:
        made_by: object = object.__getattribute__(proxy, "_Proxy__local")
    except AttributeError:  # a promise that was kept: it holds its task
        return True
    function: object = made_by.__func__ if type(made_by) is MethodType else made_by
    home = cast("Any", function).__globals__.get("__name__") if type(function) is FunctionType else None
    return type(home) is str and home.partition(".")[0] == "celery"


def _celery_task_class(obj: object, kind: type) -> type | None:
    """Return the class of a celery task, or of that which a proxy stands for; None of everything else."""
    if any(_is(kind, "celery.local", name) for name in _CELERY_PROXIES):
        if not _is_celerys(obj):
            return None
        try:
            kind = type(object.__getattribute__(obj, "_get_current_object")())
        except Exception:  # noqa: BLE001 - whatever making the task raises: it is no task then
            return None
    base = module_dict(sys.modules["celery.app.task"]).get("Task") if "celery.app.task" in sys.modules else None
    return kind if any(each is base for each in class_mro(kind)) else None


def _celery_function(obj: object, kind: type) -> object:
    """Return the function of a celery task, or of the proxy of one; None of a bound task, whose function needs the task."""
    task_class = _celery_task_class(obj, kind)
    raw = None if task_class is None else class_dict(task_class).get("run")
    return raw.__func__ if type(raw) is staticmethod else None


def is_bound_task(obj: object) -> bool:
    """Whether this is a celery task, or the proxy of one, whose function takes the task (``bind=True``, or ``run`` of a class)."""
    task_class = _celery_task_class(obj, type(obj))
    if task_class is None:
        return False
    # That of celery's own Task is the last.
    run = next(class_dict(each)["run"] for each in class_mro(task_class) if "run" in class_dict(each))
    return type(run) is FunctionType
