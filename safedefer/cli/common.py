"""Shared by the commands: loading the App, and printing tasks, times and untrusted text."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from importlib import import_module
from typing import Any, Final

import click

from safedefer.app import App
from safedefer.cli.options import TEXT
from safedefer.cli.text import plain, time_text
from safedefer.deferred import made_app, makes_of_settings
from safedefer.errors import ConfigurationError, DeferError
from safedefer.queues import open_queue
from safedefer.queues.base import DeadFilter, TaskState, TaskView

_APP_HELP: Final = "module:name of the App; without it, SAFEDEFER_* settings make one."

NO_ENVIRONMENT: Final = (
    "no environment was given, so it is 'default', as in every other deployment that gives none: tasks of staging would run in "
    "production if they share a key; give App(environment=...), or set SAFEDEFER_ENVIRONMENT where the App is made of settings; the same for "
    "whoever defers and whoever runs"
)
"""What is said where an App has no environment of its own."""

MOST_LISTED: Final = 100_000
"""The most rows of a list: each may have megabytes."""

_MOST_SECONDS: Final = 3650 * 86_400.0
#: Objects and lists in each other in what is printed of a task: itself, its attempts, one of them.
_LEVELS: Final = 3


class Seconds(click.FloatRange):
    """A number from ``min`` to ten years of seconds. ``click.FloatRange`` takes NaN, for which no comparison holds."""

    def __init__(self, smallest: float = 0.0) -> None:
        super().__init__(min=smallest, max=_MOST_SECONDS)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        found = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value} is no number", param, ctx)
        return found


app_option: Final = click.option("--app", default=None, type=TEXT, metavar="MODULE:APP", help=_APP_HELP)


def load_app(spec: str | None) -> App:
    """Import ``module:name``, or build an App from the environment.

    Raises:
        ConfigurationError: There is no such module or App.
    """
    sys.path.insert(0, os.getcwd())  # noqa: PTH109  # as `python -m` does
    _set_django_up()
    if spec is None:
        app = made_app()  # of Django's settings, where it is set up
        context = click.get_current_context(silent=True)
        if context is not None:  # nobody else has it
            context.call_on_close(app.close)
        return app
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise ConfigurationError(f"{spec!a} is not module:name; write for example shop.tasks:app")
    try:
        found: object = import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"the module {error.name} is not found; run from the folder that has it") from error
    except Exception as error:
        if type(error).__name__ not in _DJANGO_IS_NOT_READY:
            raise
        raise ConfigurationError(
            f"{module} needs Django, which is not set up; set DJANGO_SETTINGS_MODULE, as for manage.py"
        ) from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, App):
        raise ConfigurationError(f"{spec} is not a safedefer.App; name the object that App(...) made")
    return found


def is_of_settings() -> bool:
    """Whether an App that nobody names is made of ``SAFEDEFER_*``: no framework has one. Sets Django up, as ``load_app``."""
    sys.path.insert(0, os.getcwd())  # noqa: PTH109  # as load_app
    try:
        _set_django_up()
    except ConfigurationError:  # load_app says it again
        return False
    return makes_of_settings()


#: What Django raises where a module uses it before ``django.setup()``.
_DJANGO_IS_NOT_READY: Final = frozenset({"AppRegistryNotReady", "ImproperlyConfigured"})


def _set_django_up() -> None:
    """Do what ``manage.py`` does before it imports an application, where the environment names Django's settings.

    Raises:
        ConfigurationError: There are no such settings, or they are wrong.
    """
    settings = os.environ.get("DJANGO_SETTINGS_MODULE")
    if not settings:
        return
    try:
        django: Any = import_module("django")
    except ModuleNotFoundError:  # the variable is another program's
        return
    try:
        django.setup()
    except Exception as error:
        raise ConfigurationError(
            f"Django cannot be set up with DJANGO_SETTINGS_MODULE={settings!a} ({type(error).__name__}: {error}); correct it"
        ) from error


#: How else a command finds the queue's file, by whether no application was named.
_TO_FIND_IT: Final = {
    True: "name the application that they use (--app shop.tasks:app), or set SAFEDEFER_QUEUE to an absolute path (sqlite:////...)",
    False: "or give the application an absolute path (sqlite:////...)",
}


def load_app_to_look(spec: str | None) -> App:
    """Load the App for a command that makes no file: a SQLite file that does not exist is said, and is an empty queue.

    Raises:
        ConfigurationError: As ``load_app``.
    """
    app = load_app(spec)
    missing = missing_file(app)
    if missing is not None and os.path.isdir(os.path.dirname(missing)):  # noqa: PTH112, PTH120  # else opening it says what is wrong
        click.echo(
            f"the queue's file {plain(missing)} does not exist, so no task was deferred into it; run this in the folder of the "
            f"processes that use it, {_TO_FIND_IT[spec is None]}",
            err=True,
        )
        app._queue = open_queue("memory://")  # noqa: SLF001  # for this one command
    return app


def check_filter(app: App, *queues: str | None) -> None:
    """Check that the queues that a command is to look into are declared, or hold what is left of a time when they were.

    Raises:
        DeferError: One is neither: its name is a slip, and nothing found would say that all is well.
    """
    for name in filter(None, queues):
        try:
            app.check_queue(name)
        except DeferError:
            if not _is_left(app, name):
                raise


def _is_left(app: App, name: str) -> bool:
    """Whether a queue that is not declared holds a task, has one that ended or died, or has an archived dead letter."""
    queue = app.queue
    return (
        any(each.queue == name for each in queue.stats(now=time.time()))
        or bool(queue.dead_letters(DeadFilter(queue=name, archived=True), limit=1))
        or bool(queue.tasks(states=[TaskState.SUCCEEDED, TaskState.CANCELLED], queue=name, limit=1))
    )


def missing_file(app: App) -> str | None:
    """Return the absolute path of the App's SQLite file if there is none; makes nothing."""
    file = app.queue.file
    return None if file is None or os.path.exists(file.path) else file.path  # noqa: PTH110  # a text, as in the queue


def summary(view: TaskView) -> dict[str, Any]:
    """Return what is printed of a task, as JSON."""
    return {
        "id": view.id,
        "state": str(view.state),
        "queue": view.queue,
        "name": view.name,
        "callable": view.callable_name,
        "url": view.url,
        "target": view.target,
        "eta": time_text(view.eta),
        "due": None if view.due is None else time_text(view.due),
        "created": time_text(view.created),
        "ended": None if view.ended is None else time_text(view.ended),
        "attempt_count": view.attempts,
        "reason": view.reason,
        "token": view.token.decode("ascii", "backslashreplace"),
    }


def json_text(document: dict[str, Any], *, indent: int | None = None) -> str:
    """Return JSON that every parser reads: numbers that it has none for are null.

    Headers and options are texts and numbers. What is nested in them is null: somebody wrote it into the storage, and it grows
    when it is indented.
    """
    return json.dumps(_shown(document, _LEVELS), indent=indent, allow_nan=False)


def _shown(value: Any, levels: int) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _shown(each, levels - 1) for name, each in value.items()} if levels else None
    if isinstance(value, list):
        return [_shown(each, levels - 1) for each in value] if levels else None
    return value
