"""The dashboard as a server of its own, for ``safedefer dashboard`` and ``safedefer demo --serve``."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from urllib.parse import quote

from safedefer.dashboard.access import LOGIN_SECONDS, Access
from safedefer.dashboard.managed import Managed
from safedefer.dashboard.site import Site
from safedefer.web.server import serving_application


def login_link(url: str, token: str) -> str:
    """Return the URL that logs in at the dashboard of ``url``, once."""
    return f"{url.rstrip('/')}/login?token={quote(token)}"


async def serve_dashboard(
    app: Managed, host: str, port: int, access: Access, say: Callable[[str], object], *, trace_url: str | None = None
) -> None:
    """Serve the dashboard until SIGINT or SIGTERM.

    Args:
        app: The application that it shows.
        host: The address to listen on.
        port: 0 takes a free one.
        access: What the person who follows the link may do.
        say: Told the address and the link.
        trace_url: As ``App(trace_url=...)``: where a trace is shown.

    Raises:
        OSError: The address cannot be listened on.
    """
    site = Site(app, None, time.time, trace_url=trace_url)
    async with serving_application(site.application(), host, port) as url:
        say(f"the dashboard is at {url}/; log in within {LOGIN_SECONDS // 60} minutes, once, by")
        say(login_link(url, site.sessions.new_login(access)))
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()
