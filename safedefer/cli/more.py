"""``safedefer migrate``, ``inspect`` and ``demo``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import Any

import click

from safedefer.cli.common import app_option, load_app, missing_file
from safedefer.cli.text import plain, time_text
from safedefer.errors import PermanentTaskFailure, RejectedTask
from safedefer.queues import migrate_queue
from safedefer.queues.addresses import is_push_address
from safedefer.task import VerifiedPointer


@click.command()
@click.option(
    "--queue", "url", envvar="SAFEDEFER_QUEUE", default="sqlite:///safedefer.db", show_default=True,
    help="The queue's URL; without it, SAFEDEFER_QUEUE.",
)  # fmt: skip
@click.option(
    "--store", envvar="SAFEDEFER_STORE", default=None,
    help="The URL of a push engine's store, which has the tables; without it, SAFEDEFER_STORE.",
)  # fmt: skip
def migrate(*, url: str, store: str | None) -> None:
    """Make the tables of a queue's database, or bring them up to date.

    Needed once before a PostgreSQL queue is used, and after an upgrade of safedefer or pgqueuer that asks for it.
    """
    if is_push_address(url):
        if store is None:
            raise click.UsageError(
                "a push engine has no tables; give --store, the URL of its store, or SAFEDEFER_STORE"
            )
        url = store
    done = migrate_queue(url)
    for step in done or ["nothing to do"]:
        click.echo(plain(step))


@click.command()
@app_option
@click.argument("token")
@click.option("--json", "_", is_flag=True, help="As JSON; so it is printed in any case.")
def inspect(*, app: str | None, token: str, _: bool) -> None:
    """Verify TOKEN (- reads it from standard input) and print what it would do. Runs nothing.

    Exit status 1 if it would not run: the callable is not here, or takes other arguments.
    """
    from_stdin = token == "-"  # noqa: S105  # the usual sign, not a password
    data = sys.stdin.buffer.read().strip() if from_stdin else os.fsencode(token)
    loaded = load_app(app)
    try:
        verified = loaded.verify(data, expired=True)
        pointer = verified.blob if isinstance(verified, VerifiedPointer) else None
        if pointer is not None and missing_file(loaded) is None:
            with contextlib.suppress(PermanentTaskFailure):
                verified = loaded.follow(verified, expired=True)
    except RejectedTask as error:
        raise click.ClickException(f"{error.slug}: {plain(error)}") from error
    claims = verified.claims
    document: dict[str, Any] = dict(claims)
    if pointer is not None:
        document["blob"] = {**pointer, "found": not isinstance(verified, VerifiedPointer)}
    document["signed_by"] = verified.identity.kid
    document["calls"] = verified.identity.callable_name or None
    document.update({name: time_text(document[name]) for name in ("iat", "nbf", "exp")})
    document["expired"] = claims["exp"] < time.time()
    click.echo(json.dumps(document, indent=2))
    if not isinstance(verified, VerifiedPointer):
        try:
            loaded.check_call(verified)
        except RejectedTask as error:
            raise click.ClickException(f"{error.slug}: {plain(error)}") from error


@click.command()
@click.option("--tasks", "limit", default=None, type=click.IntRange(min=1), help="At most this many files.")
@click.option("--keep", is_flag=True, help="Keep the temporary folder.")
@click.option("--kill", is_flag=True, help="Kill both processes in the middle of the work.")
def demo(*, limit: int | None, keep: bool, kill: bool) -> None:
    """Defer one task for every file of Python's standard library, and attack the handler."""
    # Here: nobody else needs the demonstration's modules.
    from safedefer.demo.show import run_demo  # noqa: PLC0415

    sys.exit(run_demo(limit=limit, keep=keep, kill=kill))
