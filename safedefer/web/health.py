"""The server of ``--health``: ``/healthz``, ``/readyz`` and ``/metrics`` on an address of their own."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

from safedefer.observe.health import Page, Pages
from safedefer.web.server import server_log

#: Seconds that an idle connection is kept.
_KEEPALIVE: Final = 30.0
#: Bytes of a request's line, of a header, and of a body: none has any.
_LINE_BYTES: Final = 2_048


@asynccontextmanager
async def serving_pages(pages: Pages, listener: socket.socket) -> AsyncIterator[None]:
    """Serve the pages while the context lasts. They take GET and HEAD, and nothing else.

    Args:
        pages: What is shown.
        listener: A socket that listens.
    """
    web_app = web.Application(client_max_size=1)
    for path, page in (("/healthz", pages.alive), ("/readyz", pages.ready), ("/metrics", pages.metrics)):
        web_app.router.add_get(path, _answering(page))
    runner = web.AppRunner(
        web_app,
        access_log=None,
        logger=server_log,
        keepalive_timeout=_KEEPALIVE,
        max_line_size=_LINE_BYTES,
        max_field_size=_LINE_BYTES,
        shutdown_timeout=0.5,
        lingering_time=0.0,
    )
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        yield
    finally:
        await runner.cleanup()


def _answering(page: Callable[[], Awaitable[Page]]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(_: web.Request) -> web.Response:
        made = await page()
        headers = {"Content-Type": made.type, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return web.Response(status=made.status, body=made.text, headers=headers)

    return answer
