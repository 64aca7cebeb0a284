"""A small server around the handler, for ``safedefer serve`` and ``safedefer run``."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

from safedefer.events import REFUSALS_EVERY
from safedefer.web.handler import routes
from safedefer.web.served import Handles

#: Seconds that an idle connection is kept: a dispatcher sends its next request soon, or never.
_KEEPALIVE: Final = 75.0
#: Seconds for which the rest of a refused body is read and dropped, so that the sender can read the answer.
_LINGERING: Final = 1.0


class _Discreet(logging.Filter):
    """Rewrites the log records of aiohttp's server, which may quote a malformed request.

    One record a minute of each kind of error passes, with the number of those before it: whoever reaches the port makes
    as many as they like.
    """

    def __init__(self) -> None:
        super().__init__()
        self._passed: dict[str, float] = {}
        """When a record of the kind passed last."""
        self._held: dict[str, int] = {}
        """The number of records since."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[0] if isinstance(record.exc_info, tuple) else None
        kind = "error" if error is None else error.__name__
        now = time.monotonic()
        if now - self._passed.get(kind, -REFUSALS_EVERY) < REFUSALS_EVERY:
            self._held[kind] = self._held.get(kind, 0) + 1
            return False
        self._passed[kind] = now
        record.msg, record.args = "a request could not be answered (%s)", (kind,)
        if held := self._held.pop(kind, 0):
            record.msg, record.args = f"{record.msg}, %d more since the last line", (kind, held)
        record.exc_info = record.exc_text = record.stack_info = None
        return True


server_log: Final = logging.getLogger("safedefer.web")
"""The log of aiohttp's servers."""
server_log.addFilter(_Discreet())


@asynccontextmanager
async def serving(
    app: Handles, host: str = "127.0.0.1", port: int = 0, *, listener: socket.socket | None = None
) -> AsyncIterator[str]:
    """Serve the handler's routes while the context lasts.

    Args:
        app: The application.
        host: The address to listen on.
        port: The port; 0 takes a free one.
        listener: A socket that listens already, in place of both.

    Yields:
        The URL that it listens on.

    Raises:
        OSError: The address cannot be bound.
    """
    web_app = web.Application(client_max_size=app.delivery.max_bytes)
    web_app.add_routes(routes(app))
    async with serving_application(web_app, host, port, listener=listener) as url:
        yield url


@asynccontextmanager
async def serving_application(
    web_app: web.Application, host: str, port: int, *, listener: socket.socket | None = None
) -> AsyncIterator[str]:
    """Serve an application while the context lasts: as ``serving``."""
    # auto_decompress: the handler refuses a body with an encoding unread, and nothing may inflate it before that.
    runner = web.AppRunner(
        web_app,
        auto_decompress=False,
        access_log=None,
        logger=server_log,
        keepalive_timeout=_KEEPALIVE,
        lingering_time=_LINGERING,
        shutdown_timeout=1.0,
    )
    await runner.setup()
    try:
        site: web.BaseSite = web.TCPSite(runner, host, port) if listener is None else web.SockSite(runner, listener)
        await site.start()
        address, bound = runner.addresses[0][:2]
        shown = f"[{address}]" if ":" in address else address
        yield f"http://{shown}:{bound}"
    finally:
        await runner.cleanup()
