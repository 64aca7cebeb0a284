"""``safedefer dashboard``: serves the dashboard on this machine, or prints a login link for one that is mounted elsewhere."""

from __future__ import annotations

import asyncio
import getpass
import time
from urllib.parse import quote, urlsplit

import click

from safedefer.cli.common import app_option, load_app_to_look
from safedefer.dashboard.access import Access, Sessions


@click.command()
@app_option
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="The address to listen on; put https before any other."
)
@click.option("--port", default=8765, show_default=True, type=click.IntRange(0, 65_535), help="0 takes a free one.")
@click.option(
    "--link", "url", default=None, metavar="URL", help="Serve nothing: print a login link for the dashboard at URL."
)
@click.option("--user", default=None, help="The name in the audit log; without it, that of your account.")
@click.option("--read-only", is_flag=True, help="The link lets people look, and do nothing.")
def dashboard(*, app: str | None, host: str, port: int, url: str | None, user: str | None, read_only: bool) -> None:
    """Show queues, tasks and dead letters in a browser, and act on them. Prints a link that logs in once."""
    loaded = load_app_to_look(app)
    access = Access(user=user or _account(), read=True, act=not read_only)
    if url is not None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.netloc:
            raise click.UsageError("--link is the URL of the dashboard, such as https://shop.example/tasks/")
        sessions = Sessions(loaded.keyring, environment=loaded.environment, clock=time.time)
        click.echo(f"{url.rstrip('/')}/login?token={quote(sessions.new_login(access))}")
        return
    # Here: whoever only prints a link, or runs another command, needs neither aiohttp nor jinja2.
    from safedefer.dashboard.standalone import serve_dashboard  # noqa: PLC0415

    asyncio.run(serve_dashboard(loaded, host, port, access, click.echo))


def _account() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an account without a name
        return "operator"
