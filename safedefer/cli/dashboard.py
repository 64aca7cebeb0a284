"""``safedefer dashboard``: serves the dashboard on this machine, or prints a login link for one that is mounted elsewhere."""

from __future__ import annotations

import asyncio
import getpass
import time
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlsplit

import click

from safedefer.app import App
from safedefer.cli.common import app_option, load_app, missing_file
from safedefer.cli.text import plain
from safedefer.dashboard.access import Access, Sessions
from safedefer.errors import QueueUnavailable
from safedefer.observe.trace_links import check_trace_url

if TYPE_CHECKING:
    from safedefer.dashboard.managed import Managed
    from safedefer.queues.base import PullQueue


class _Looked:
    """An App whose queue is not made by looking at it: while its SQLite file does not exist, pages say so.

    The file may come later: whoever starts a dashboard before the first task sees that task.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    def __getattr__(self, name: str) -> Any:
        return getattr(self._app, name)

    @property
    def queue(self) -> PullQueue:
        """The queue. Raises ``QueueUnavailable`` while its file does not exist."""
        missing = missing_file(self._app)
        if missing is not None:
            raise QueueUnavailable(
                f"the queue's file {plain(missing)} does not exist: no task was deferred into it yet, or the path is another one; "
                "run this in the folder of the processes that use it, or set SAFEDEFER_QUEUE to an absolute path"
            )
        return self._app.queue


@click.command()
@app_option
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="The address to listen on; put https before any other."
)
@click.option("--port", default=8765, show_default=True, type=click.IntRange(0, 65_535), help="0 takes a free one.")
@click.option(
    "--link", "url", default=None, metavar="URL", help="Serve nothing: print a login link for the dashboard at URL."
)
@click.option(
    "--trace-url",
    default=None,
    metavar="URL",
    show_default="SAFEDEFER_TRACE_URL",
    help="Where traces are shown: https://traces.example/trace/{trace_id}.",
)
@click.option("--user", default=None, help="The name in the audit log; without it, that of your account.")
@click.option("--read-only", is_flag=True, help="The link lets people look, and do nothing.")
def dashboard(
    *,
    app: str | None,
    host: str,
    port: int,
    url: str | None,
    trace_url: str | None,
    user: str | None,
    read_only: bool,
) -> None:
    """Show queues, tasks and dead letters in a browser, and act on them. Prints a link that logs in once."""
    loaded = load_app(app)
    access = Access(user=user or _account(), read=True, act=not read_only)
    if url is not None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.netloc:
            raise click.UsageError("--link is the URL of the dashboard, such as https://shop.example/tasks/")
        sessions = Sessions(loaded.keyring, environment=loaded.environment, clock=time.time)
        click.echo(f"{url.rstrip('/')}/login?token={quote(sessions.new_login(access))}")
        return
    if trace_url is not None:
        loaded.trace_url = check_trace_url(trace_url)
    asyncio.run(_serve(loaded, host, port, access))


def _account() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an account without a name
        return "operator"


async def _serve(app: App, host: str, port: int, access: Access) -> None:
    # Here: whoever only prints a link, or runs another command, needs neither aiohttp nor jinja2.
    from safedefer.dashboard.standalone import serve_dashboard  # noqa: PLC0415

    try:
        await serve_dashboard(cast("Managed", _Looked(app)), host, port, access, click.echo, trace_url=app.trace_url)
    finally:
        await asyncio.to_thread(app.close)
