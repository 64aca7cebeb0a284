"""aiohttp: ``setup(web_app, app)``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from aiohttp import web

from safedefer.app import App
from safedefer.web.lifespan import lifespan

__all__ = ["APP", "setup"]

APP: Final = web.AppKey("safedefer", App)
"""The key of the App in an application that was set up: ``request.app[APP]``."""


def setup(web_app: web.Application, app: App) -> None:
    """Let an aiohttp application receive the tasks of an App.

    It adds ``app.routes()``. While the application lives it keeps the queue's connections of its loop; when it is shut down
    it takes no more tasks, and waits up to 30 seconds for those that run.

    Args:
        web_app: The application, or a sub-application, before it is started.
        app: The App, which is not closed with the application.

    Raises:
        RuntimeError: The application was started already.
    """
    web_app[APP] = app
    web_app.add_routes(app.routes())
    web_app.on_shutdown.append(_drain)  # before the server waits for its requests
    web_app.cleanup_ctx.append(_live)


async def _drain(web_app: web.Application) -> None:
    web_app[APP].delivery.drain()


async def _live(web_app: web.Application) -> AsyncIterator[None]:
    async with lifespan(web_app[APP]):
        yield
