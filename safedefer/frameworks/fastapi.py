"""FastAPI: ``setup(api, app)``, and ``Tasks``, whose ``add_task`` is that of ``BackgroundTasks`` and survives a crash."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final, ParamSpec, TypeAlias

from fastapi import Depends, FastAPI
from starlette.requests import HTTPConnection
from starlette.routing import Route

from safedefer.app import App
from safedefer.errors import ConfigurationError
from safedefer.options import DEFAULT_OPTIONS, Options, Task
from safedefer.sending.sender import Built
from safedefer.sending.signatures import method_takes
from safedefer.web.lifespan import lifespan

__all__ = ["DurableTasks", "Tasks", "setup"]

_P = ParamSpec("_P")
_STATE: Final = "safedefer"


def setup(api: FastAPI, app: App) -> None:
    """Let a FastAPI application receive the tasks of an App, and defer to it by ``Tasks``.

    It adds the routes of ``app.asgi``, which are in no schema. While the application lives it keeps the queue's connections
    of its loop; when the server stops it takes no more tasks, and waits up to 30 seconds for those that run. A lifespan of
    the application's own goes on within that.

    Args:
        api: The application, before it is started.
        app: The App, which is not closed with the application. ``api.state.safedefer`` is it.

    Raises:
        ConfigurationError: The application has an App already.
    """
    if getattr(api.state, _STATE, None) is not None:
        raise ConfigurationError("this FastAPI application has an App already; call setup once")
    setattr(api.state, _STATE, app)
    for path in dict.fromkeys([app.url, "/_ah/queue/{queue}"]):
        api.router.routes.append(Route(f"{app.prefix}{path}", app.asgi, include_in_schema=False))
    inner = api.router.lifespan_context

    @asynccontextmanager
    async def both(api: Any) -> AsyncIterator[Any]:
        async with lifespan(app), inner(api) as state:
            yield state

    api.router.lifespan_context = both


class DurableTasks:
    """The tasks of one request: ``BackgroundTasks``, but stored in the queue.

    Each is signed when it is added, and all are stored together when the path operation has returned, before the response is
    sent. If it raises, none is stored; if the queue does not take them, the response is an error.

    Args:
        app: The App.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._built: list[Built] = []

    def add_task(self, obj: Callable[_P, object], /, *args: _P.args, **kwargs: _P.kwargs) -> Task:
        """Call ``obj(*args, **kwargs)`` later, after the response.

        Returns:
            The task, which is not stored yet.

        Raises:
            DeferError: As ``App.defer``, without the errors of the queue, which come when the path operation has returned.
        """
        return self._add(DEFAULT_OPTIONS, obj, args, kwargs)

    @method_takes(Options)
    def options(self, **given: Any) -> AddTask:
        """Return a front of ``add_task`` with the options of ``App.options``, but ``transactional``.

        Raises:
            InvalidTaskError: An option is wrong.
        """
        return AddTask(self._add, self._app._options_of(given))  # noqa: SLF001  # of the App, for this

    def _add(self, options: Options, obj: Callable[..., object], args: Any, kwargs: Any) -> Task:
        built = self._app._build(options, obj, args, kwargs)  # noqa: SLF001  # as above
        self._built.append(built)
        return built[0]

    def store(self) -> list[Task]:
        """Store what was added since the last call; ``Tasks`` does it by itself.

        Raises:
            QueueUnavailable: The tasks were not stored.
            DeferError: As ``App.defer``: a name is taken.
        """
        built, self._built = self._built, []
        return self._app._store(built) if built else []  # noqa: SLF001  # as above


class AddTask:
    """``add_task`` with options: what ``DurableTasks.options`` returns."""

    def __init__(self, add: Callable[[Options, Callable[..., object], Any, Any], Task], options: Options) -> None:
        self._add = add
        self._options = options

    def add_task(self, obj: Callable[_P, object], /, *args: _P.args, **kwargs: _P.kwargs) -> Task:
        """Do what ``DurableTasks.add_task`` does, with these options."""
        return self._add(self._options, obj, args, kwargs)


async def durable_tasks(connection: HTTPConnection) -> AsyncIterator[DurableTasks]:
    """Give the tasks of a request, and store them when its path operation has returned.

    Raises:
        ConfigurationError: The application was not set up.
    """
    app = getattr(connection.app.state, _STATE, None)
    if not isinstance(app, App):
        raise ConfigurationError(
            "this FastAPI application has no App; call safedefer.frameworks.fastapi.setup(api, app)"
        )
    tasks = DurableTasks(app)
    yield tasks
    await asyncio.to_thread(tasks.store)


Tasks: TypeAlias = Annotated[DurableTasks, Depends(durable_tasks, scope="function")]
"""The type of a parameter of a path operation, or of a dependency of one: ``async def pay(tasks: Tasks)``."""
