"""The command line: the ``safedefer`` group, its version and log, and its small commands."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from typing import Any

import click

from safedefer import __version__
from safedefer.cli.common import app_option, load_app, missing_file, plain, time_text
from safedefer.cli.dashboard import dashboard
from safedefer.cli.dead import dead
from safedefer.cli.doctor import doctor
from safedefer.cli.keys import keys
from safedefer.cli.processes import dispatch, run, serve
from safedefer.cli.queues import queues
from safedefer.cli.tasks import tasks
from safedefer.errors import Error, PermanentTaskFailure, RejectedTask
from safedefer.observe.logs import configure_log
from safedefer.queues import migrate_queue
from safedefer.task import VerifiedPointer


class _Group(click.Group):
    """Shows our errors as one line: the message says what to do."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Error as error:
            # A database quotes what is in it: names of tables, texts of triggers.
            raise click.ClickException(plain(" ".join(str(error).splitlines()))) from error
        except OSError as error:  # the port is taken, the host is not ours, the disk is full
            if isinstance(error, BrokenPipeError) and _output_is_closed():
                raise  # click ends the process without a word
            raise click.ClickException(f"{error.strerror or error}; correct that and start again") from error


def _output_is_closed() -> bool:
    """Whether the reader of standard output has left, as ``head`` does; a socket breaks with the same error."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # it is no file
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # errors are reported unasked
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="safedefer")
@click.option("--verbose", "-v", is_flag=True, help="Log every task.")
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True,
    help="The log on standard error: lines for people, or one JSON object a line.",
)  # fmt: skip
def main(*, verbose: bool, log_format: str) -> None:
    """Call Python functions later: signed tasks, a queue, and a handler."""
    configure_log(verbose=verbose, as_json=log_format == "json")


for _command in (keys, serve, dispatch, run, tasks, queues, dead, doctor, dashboard):
    main.add_command(_command)


@main.command()
@click.option(
    "--queue", "url", envvar="SAFEDEFER_QUEUE", default="sqlite:///safedefer.db", show_default=True,
    help="The queue's URL; without it, SAFEDEFER_QUEUE.",
)  # fmt: skip
def migrate(*, url: str) -> None:
    """Make the tables of a queue's database, or bring them up to date.

    Needed once before a PostgreSQL queue is used, and after an upgrade of safedefer or pgqueuer that asks for it.
    """
    done = migrate_queue(url)
    for step in done or ["nothing to do"]:
        click.echo(step)


@main.command()
@app_option
@click.argument("token")
def inspect(*, app: str | None, token: str) -> None:
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
        raise click.ClickException(f"{error.slug}: {error}") from error
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
            raise click.ClickException(f"{error.slug}: {error}") from error


@main.command()
@click.option("--tasks", "limit", default=None, type=click.IntRange(min=1), help="At most this many files.")
@click.option("--keep", is_flag=True, help="Keep the temporary folder.")
@click.option("--kill", is_flag=True, help="Kill both processes in the middle of the work.")
def demo(*, limit: int | None, keep: bool, kill: bool) -> None:
    """Defer one task for every file of Python's standard library, and attack the handler."""
    # Here: nobody else needs the demonstration's modules.
    from safedefer.demo.show import run_demo  # noqa: PLC0415

    sys.exit(run_demo(limit=limit, keep=keep, kill=kill))
