"""App Engine's ``deferred`` library: the same names, options and errors, without unpickling anything.

    from safedefer import deferred

    def do_something_later(key, amount):
        ...

    # Use default URL and queue name, no task name, execute ASAP.
    deferred.defer(do_something_later, my_key, 20)

    # Providing non-default task queue arguments
    deferred.defer(do_something_later, my_key, 20, _queue="foo", _countdown=60)

The functions here use one application: the one given to ``configure``, else one that is built from
``SAFEDEFER_*`` in the environment when it is first needed.

These callables can be tasks: functions and classes at the top level of a module, objects of such
classes that implement ``__call__``, their instance methods and class methods, built-in functions and
built-in methods. These can not: nested functions and closures, nested classes and their objects,
lambdas, static methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from inspect import Parameter
from threading import RLock
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Final

from safedefer.app import App
from safedefer.callables.wrappers import unwrapped
from safedefer.errors import (
    BadTransactionStateError,
    DeferError,
    Error,
    InvalidEtaError,
    InvalidTaskError,
    InvalidTaskNameError,
    InvalidTaskRetryOptionsError,
    InvalidUrlError,
    PermanentTaskFailure,
    QueueUnavailable,
    SingularTaskFailure,
    TaskAlreadyExistsError,
    TaskTooLargeError,
    TombstonedTaskError,
    UnknownQueueError,
)
from safedefer.execution.binding import read_signature
from safedefer.options import DEFAULT_QUEUE, DEFAULT_URL, Task, TaskRetryOptions
from safedefer.sending.advice import tell_more
from safedefer.sending.sender import Deferral
from safedefer.sending.signatures import takes

if TYPE_CHECKING:
    from aiohttp import web

    class TaskHandler(web.View):
        """A view that processes deferred invocations; made by ``web.handler.task_view``."""

        async def post(self) -> web.Response:
            """Default behavior for POST requests to deferred handler."""
            ...


__all__ = [
    "BadTransactionStateError",
    "DeferError",
    "Error",
    "InvalidEtaError",
    "InvalidTaskError",
    "InvalidTaskNameError",
    "InvalidTaskRetryOptionsError",
    "InvalidUrlError",
    "PermanentTaskFailure",
    "QueueUnavailable",
    "SingularTaskFailure",
    "Task",
    "TaskAlreadyExistsError",
    "TaskHandler",
    "TaskRetryOptions",
    "TaskTooLargeError",
    "TombstonedTaskError",
    "UnknownQueueError",
    "configure",
    "configured_app",
    "current_app",
    "defer",
    "defer_async",
    "invoke_member",
    "run",
    "run_async",
    "run_from_datastore",
    "serialize",
    "set_log_level",
]


class _Current:
    def __init__(self) -> None:
        self.app: App | None = None
        self.make: Callable[[], App] = App.from_settings
        self.lock = RLock()  # building an App imports modules, and one of them may ask for it


_current: Final = _Current()


def configure(app: App | None) -> None:
    """Set the application that the functions of this module use; None forgets it."""
    with _current.lock:
        _current.app = app


def configured_app() -> App | None:
    """Return the application that was given to ``configure`` or built since; None if there is none."""
    with _current.lock:
        return _current.app


def current_app() -> App:
    """Return the application in use; built from ``SAFEDEFER_*`` if none was configured.

    Raises:
        ConfigurationError: There is none, and the environment lacks keys or policy.
    """
    with _current.lock:
        if _current.app is None:
            _current.app = _current.make()
        return _current.app


def make_by(make: Callable[[], App]) -> None:
    """Set what makes the application where none is configured, in place of ``App.from_settings``: for frameworks."""
    _current.make = make


def makes_of_settings() -> bool:
    """Whether that is ``App.from_settings``."""
    return _current.make == App.from_settings


def made_app() -> App:
    """Return the application where none is named: what a framework has, or a new one that is built from ``SAFEDEFER_*``.

    Raises:
        ConfigurationError: Keys or policy are missing, or a setting is wrong.
    """
    return _current.make()


def defer(
    obj: Callable[..., object],
    /,
    *args: Any,
    _countdown: float | None = None,
    _eta: datetime | None = None,
    _headers: Mapping[str, str] | None = None,
    _name: str | None = None,
    _queue: str = DEFAULT_QUEUE,
    _retry_options: TaskRetryOptions | None = None,
    _target: str | None = None,
    _transactional: bool = False,
    _url: str | None = DEFAULT_URL,
    _deadline: float | None = None,
    _pickle: bool = False,
    **kwargs: Any,
) -> Task:
    """Defer a callable for execution later (App Engine ``deferred.defer``).

    Args:
        obj: The callable to execute; see the module docstring for restrictions.
        args: Positional arguments to call it with.
        _countdown: Seconds from now.
        _eta: When, an aware datetime; not together with ``_countdown``.
        _headers: Further headers of the request that delivers the task.
        _name: A name that no other task of the queue has, or had in the last days.
        _queue: The queue's name.
        _retry_options: When it is tried again.
        _target: Which handler.
        _transactional: Enqueue if, and only if, the current transaction commits, that of the innermost
            ``app.transaction(connection)``, or of ``@ndb.transactional()``. Where the connection is awaited, the task
            is written at the block's end.
        _url: The path that the task is posted to, or a URL below the address of a target; None: the queue's own URL.
        _deadline: Seconds that one attempt may take, from 1 to 86,400.
        _pickle: Carry the arguments as a pickle; both ends and the key must allow it.
        kwargs: Any other keyword arguments are passed through to the callable.

    Returns:
        The task, enqueued.

    Raises:
        TypeError: An unknown ``_option``, or arguments that the callable does not take.
        DeferError: One of its subclasses says what is wrong; see ``App.defer``.
    """
    given: dict[str, Any] = {
        "countdown": _countdown,
        "eta": _eta,
        "headers": {} if _headers is None else _headers,
        "name": _name,
        "queue": _queue,
        "retry_options": _retry_options,
        "target": _target,
        "transactional": _transactional,
        "url": _url,
        "deadline": _deadline,
        "pickle": _pickle,
    }
    return _front(given, obj, args, kwargs).defer(obj, *args, **kwargs)


OPTIONS: Final = tuple(sorted(defer.__kwdefaults__ or ()))
#: What to do in place of options that other versions of ``defer`` have, or that people take it to have.
OPTION_HINTS: Final = {
    "_delay": "use _countdown, in seconds",
    "_dispatch_deadline": "use _deadline, in seconds",
    "_instance": "use _target, which names a handler",
    "_method": "a task is always POSTed; leave it out",
    "_module": "use _target, which names a handler",
    "_params": "pass arguments to the callable",
    "_queue_name": "use _queue",
    "_retries": "use _retry_options=TaskRetryOptions(task_retry_limit=...)",
    "_retry": "use _retry_options=TaskRetryOptions(task_retry_limit=...)",
    "_retry_limit": "use _retry_options=TaskRetryOptions(task_retry_limit=...)",
    "_service": "use _target, which names a handler",
    "_small_task": "every task is stored in its queue's transaction, whatever its size; leave it out",
    "_task_name": "use _name",
    "_timeout": "use _deadline, in seconds",
    "_unique": "use app.options(unique=True).defer(...)",
    "_uri": "use _url",
    "_using": "a transaction is that of a connection: with app.transaction(connection); leave it out",
    "_version": "use _target, which names a handler",
    "_wipe_related_caches": "pass the key of a model, and get it in the task; leave it out",
}


#: How much of a name must be an option's to be taken for it: _start is not _target.
_ALIKE: Final = 0.81


@takes(defer)
async def defer_async(obj: Callable[..., object], /, *args: Any, **kwargs: Any) -> Task:
    """Do what ``defer`` does, with the same options, without blocking the event loop."""
    given = {name.removeprefix("_"): kwargs.pop(name) for name in OPTIONS if name in kwargs}
    import asyncio  # noqa: PLC0415  # loaded already, where there is a loop

    try:
        _check_unknown(obj, kwargs)
        if (app := configured_app()) is None:
            # To build an App reads files and imports modules.
            app = await asyncio.to_thread(current_app)
        deferral = app.options(**given)
    except (TypeError, InvalidTaskError) as error:
        # To look at a call takes as long as to defer it.
        await asyncio.to_thread(_tell_front, error, given, obj, args, kwargs)
        raise
    return await deferral.defer_async(obj, *args, **kwargs)


def serialize(obj: Callable[..., object], /, *args: Any, **kwargs: Any) -> bytes:
    """Serialize a callable into a format recognized by the deferred executor: a signed token.

    Args:
        obj: The callable; see the module docstring for restrictions.
        args: Positional arguments to call it with.
        kwargs: Keyword arguments to call it with.

    Returns:
        The token, for the default queue and URL.

    Raises:
        DeferError: As ``defer``.
    """
    return current_app().serialize(obj, *args, **kwargs)


def run(data: bytes) -> object:
    """Verify and execute a task (App Engine: "unpickles and executes a task").

    Args:
        data: A token.

    Returns:
        The return value of the function invocation.

    Raises:
        RejectedTask: The token is refused. What the callable raises passes through.
        RuntimeError: An event loop runs here; use ``run_async``.
    """
    return current_app().run(data)


async def run_async(data: bytes) -> object:
    """Do what ``run`` does inside a running event loop."""
    return await current_app().run_async(data)


def run_from_datastore(key: str) -> object:
    """Retrieve an oversize task from the blobs and execute it.

    Args:
        key: The id of its blob.

    Returns:
        The return value of the function invocation.

    Raises:
        PermanentTaskFailure: There is no such blob. Else as ``run``.
    """
    return current_app().run_from_datastore(key)


def invoke_member(obj: object, membername: str, /, *args: Any, **kwargs: Any) -> object:
    """Retrieve a member of an object, then call it with the provided arguments.

    A plain helper for the caller's own use. No token can name it: safedefer's own functions are never tasks.

    Args:
        obj: The object to operate on.
        membername: The name of the member to retrieve from ``obj``.
        args: Positional arguments to pass to the method.
        kwargs: Keyword arguments to pass to the method.

    Returns:
        The return value of the method invocation.

    Raises:
        AttributeError: There is no such member. What the method raises passes through.
    """
    result: object = getattr(obj, membername)(*args, **kwargs)
    return result


def set_log_level(log_level: int) -> None:
    """Set the log level deferred will log to in normal circumstances.

    Args:
        log_level: One of logging's levels, e.g. ``logging.DEBUG``, ``logging.INFO``.
    """
    current_app().set_log_level(log_level)


def _front(
    given: dict[str, Any], obj: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Deferral:
    """Return what defers with these options. The refusal of one says what else is refused of the call.

    Raises:
        TypeError: An option does not exist.
        InvalidTaskError: One is wrong.
    """
    try:
        _check_unknown(obj, kwargs)
        return current_app().options(**given)
    except (TypeError, InvalidTaskError) as error:
        _tell_front(error, given, obj, args, kwargs)
        raise


def _tell_front(
    error: TypeError | InvalidTaskError,
    given: dict[str, Any],
    obj: Callable[..., object],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    parameters = _parameters(obj)
    own = {name: value for name, value in kwargs.items() if name[:1] != "_" or name in parameters}
    if not isinstance(error, InvalidTaskError):
        tell_more(error, lambda: current_app().options(**given))
    if given.get("pickle", False) is False:  # what a pickle takes is another question
        tell_more(error, lambda: current_app().serialize(obj, *args, **own))


def _check_unknown(obj: object, kwargs: Mapping[str, Any]) -> None:
    """Refuse options that do not exist. A parameter of the callable that begins with ``_`` is none of them.

    Raises:
        TypeError: It is neither.
    """
    unknown = [name for name in kwargs if name[:1] == "_"]
    if unknown and (told := [_said_of(name) for name in unknown if name not in _parameters(obj)]):
        raise TypeError(f"defer() has {', and '.join(told)}")


def _parameters(obj: object) -> tuple[str, ...]:
    """Return the names of the parameters of a function or method, of what ``functools.wraps`` wrapped; ``**kwargs`` has none."""
    target: Any = unwrapped(obj)
    function = target.__func__ if type(target) is MethodType else target
    if type(function) is not FunctionType:
        return ()
    try:
        parameters = read_signature(function).parameters.values()
    except ValueError:  # wrappers in a circle, a __signature__ that is none
        return ()
    return tuple(each.name for each in parameters if each.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD))


def _said_of(name: str) -> str:
    """Return what is said of an option that does not exist: what to do in its place, or the one that was meant."""
    if name in OPTION_HINTS:
        return f"no option {name!a}: {OPTION_HINTS[name]}"
    import difflib  # noqa: PLC0415  # for this message only

    near = difflib.get_close_matches(name.lower(), OPTIONS, n=1, cutoff=_ALIKE)
    meant = f"did you mean {near[0]}? A" if near else "a"
    return (
        f"no option {name!a}; {meant} keyword of your own that begins with _ is passed with app.options(...).defer(...)"
    )


def __getattr__(name: str) -> Any:
    # Made when asked for: importing safedefer must not import aiohttp.
    if name != "TaskHandler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from safedefer.web.handler import task_view  # noqa: PLC0415

    view = globals()["TaskHandler"] = task_view(current_app)
    return view
