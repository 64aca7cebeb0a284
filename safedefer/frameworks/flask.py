"""Flask: the extension ``Safedefer(app)``, with ``init_app``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from flask import Flask, current_app

from safedefer.app import App
from safedefer.errors import ConfigurationError
from safedefer.web.asgi import is_served

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["Safedefer", "current_safedefer"]

_NAME: Final = "safedefer"


class Safedefer:
    """Lets Flask applications receive the tasks of an App.

    Requests for the App's URL and ``/_ah/queue/<queue>`` go to ``app.wsgi``, and all others to Flask: a task's request is
    authenticated by its signature, so that no ``before_request``, login or CSRF extension sees it, and nothing reads its body.

    Args:
        app: The App. ``flask_app.extensions["safedefer"]`` is it.
        flask_app: The application, where there is one already.

    Raises:
        ConfigurationError: As ``init_app``.
    """

    def __init__(self, app: App, flask_app: Flask | None = None) -> None:
        self._app = app
        if flask_app is not None:
            self.init_app(flask_app)

    def init_app(self, flask_app: Flask) -> None:
        """Let an application receive the tasks.

        Call it before what wraps ``flask_app.wsgi_app``, such as ``ProxyFix``.

        Raises:
            ConfigurationError: The application has an App already.
        """
        if _NAME in flask_app.extensions:
            raise ConfigurationError("this Flask application has an App already; call init_app once")
        flask_app.extensions[_NAME] = self._app
        flask_app.wsgi_app = _Fork(self._app, flask_app.wsgi_app)  # type: ignore[method-assign]  # Flask's own way


class _Fork:
    """Sends the requests of tasks to the handler, and the others on."""

    def __init__(self, app: App, other: WSGIApplication) -> None:
        self._app = app
        self._other = other

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        mount = str(environ.get("SCRIPT_NAME", ""))
        if is_served(self._app, f"{mount}{environ.get('PATH_INFO', '')}", mount):
            return self._app.wsgi(environ, start_response)
        return self._other(environ, start_response)


def current_safedefer() -> App:
    """Return the App of the Flask application that handles the request, for applications that a factory makes.

    Raises:
        ConfigurationError: ``init_app`` was not called for it.
        RuntimeError: There is no application context.
    """
    found: Any = current_app.extensions.get(_NAME)
    if not isinstance(found, App):
        raise ConfigurationError("this Flask application has no App; call Safedefer(app).init_app(flask_app)")
    return found
