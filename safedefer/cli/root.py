"""The command line: ``safedefer``."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from safedefer import __version__
from safedefer.app import App
from safedefer.cli.common import app_option, load_app, plain, summary, time_text
from safedefer.cli.queues import dead, queues
from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions, HttpDelivery, InProcessDelivery
from safedefer.errors import ConfigurationError, Error, PermanentTaskFailure, RejectedTask
from safedefer.keys import MIN_SECRET_BYTES
from safedefer.queues import migrate_queue
from safedefer.queues.base import TaskState
from safedefer.task import VerifiedPointer
from safedefer.token import encode_segment
from safedefer.web.server import serving


class _Group(click.Group):
    """Shows our errors as one line: the message says what to do."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Error as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:  # the port is taken, the host is not ours, the disk is full
            raise click.ClickException(f"{error.strerror or error}; correct that and start again") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="safedefer")
@click.option("--verbose", "-v", is_flag=True, help="Log every task.")
def main(*, verbose: bool) -> None:
    """Call Python functions later: signed tasks, a queue, and a handler."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


# --- Keys -----------------------------------------------------------------------------------------


@main.group()
def keys() -> None:
    """Make keys."""


@keys.command("new")
@click.option("--kid", default=None, help="The key's name in tokens; not secret.")
@click.option("--jwk", is_flag=True, help="Print a JWK Set for SAFEDEFER_KEYS_FILE instead.")
def keys_new(*, kid: str | None, jwk: bool) -> None:
    """Print a new key, in the form that SAFEDEFER_KEYS takes."""
    kid = kid or f"{datetime.now(UTC):k%Y%m%d}-{secrets.token_hex(2)}"
    secret = encode_segment(secrets.token_bytes(MIN_SECRET_BYTES)).decode()
    if jwk:
        key = {"kty": "oct", "kid": kid, "alg": "HS256", "k": secret, "safedefer_state": "active"}
        click.echo(json.dumps({"keys": [key]}, indent=2))
    else:
        click.echo(f"SAFEDEFER_KEYS={kid}:{secret}")


# --- Storage --------------------------------------------------------------------------------------


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


# --- Processes ------------------------------------------------------------------------------------

_app_argument = click.argument("app", required=False, default=None, metavar="[MODULE:APP]")
_host = click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
_port = click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: a free one.")
_drain = click.option(
    "--drain",
    default=30.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Seconds that a stop waits for running tasks.",
)
_concurrency = click.option(
    "--concurrency", default=16, show_default=True, type=click.IntRange(1, 10_000), help="Deliveries at once."
)
_queues = click.option("--queue", "queues", multiple=True, help="Only this queue; repeatable.")
_lease = click.option(
    "--lease",
    default=60.0,
    show_default=True,
    type=click.FloatRange(min=0.5),
    help="Seconds until a silent dispatcher's tasks are due again.",
)


@main.command()
@_app_argument
@_host
@_port
@_drain
def serve(*, app: str | None, host: str, port: int, drain: float) -> None:
    """Run the handler: receive tasks by HTTP. Prints its URL when it is ready."""
    loaded = load_app(app)

    async def work() -> None:
        async with _signals() as stop, loaded.queue.on_loop(), serving(loaded, host, port) as url:
            print(url, flush=True)
            _keep_what_is_loaded()
            await stop.wait()
            await _drain_handler(loaded, drain)

    _run(loaded, work)


@main.command()
@_app_argument
@click.option("--to", "address", required=True, help="The handler's address, such as http://127.0.0.1:8080.")
@_queues
@_concurrency
@_lease
@_drain
@click.option(
    "--timeout",
    default=600.0,
    show_default=True,
    type=click.FloatRange(min=0.1),
    help="Seconds that a handler may take for one task.",
)
def dispatch(
    *,
    app: str | None,
    address: str,
    queues: Sequence[str],
    concurrency: int,
    lease: float,
    drain: float,
    timeout: float,
) -> None:
    """Run the dispatcher: lease due tasks and POST them to a handler."""
    loaded = load_app(app)
    if not address.startswith(("http://", "https://")):
        raise ConfigurationError("--to is an address that begins with http:// or https://")

    async def work() -> None:
        http = HttpDelivery(address, targets=loaded.targets, timeout=timeout, concurrency=concurrency)
        async with _signals() as stop, http as deliver:
            options = _dispatcher_options(loaded, concurrency, lease, drain, queues)
            _keep_what_is_loaded()
            await _dispatch(Dispatcher(loaded.queue, deliver, clock=time.time, options=options), stop)

    _run(loaded, work)


@main.command()
@_app_argument
@_host
@_port
@_queues
@_concurrency
@_lease
@_drain
def run(
    *, app: str | None, host: str, port: int, queues: Sequence[str], concurrency: int, lease: float, drain: float
) -> None:
    """Run handler and dispatcher together, in one process. Prints its URL when it is ready."""
    loaded = load_app(app)

    async def work() -> None:
        async with _signals() as stop, loaded.queue.on_loop(), serving(loaded, host, port) as url:
            print(url, flush=True)
            _keep_what_is_loaded()
            options = _dispatcher_options(loaded, concurrency, lease, drain, queues)
            deliver = InProcessDelivery(loaded.handle)
            dispatcher = Dispatcher(loaded.queue, deliver, clock=time.time, options=options)
            await _dispatch(dispatcher, stop, loaded.delivery.drain)  # what is posted from now on is answered busy
            await _drain_handler(loaded, 1.0)

    _run(loaded, work)


def _dispatcher_options(
    app: App, concurrency: int, lease: float, drain: float, queues: Sequence[str]
) -> DispatcherOptions:
    file = app.queue_file
    sections = () if file is None else file.queue
    app.outbox.start()
    return DispatcherOptions(
        concurrency=concurrency,
        lease_seconds=lease,
        drain_seconds=drain,
        queues=queues or None,
        limits=None if file is None else file.limits,
        retry_options={section.name: section.retry_parameters.given() for section in sections},
    )


@contextlib.asynccontextmanager
async def _signals() -> AsyncIterator[asyncio.Event]:
    """Set the event at SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _dispatch(dispatcher: Dispatcher, stop: asyncio.Event, then: Callable[[], None] = lambda: None) -> None:
    running = asyncio.create_task(dispatcher.run())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    dispatcher.stop()
    then()
    await running


async def _drain_handler(app: App, seconds: float) -> None:
    app.delivery.drain()
    if not await app.delivery.drained(seconds):
        # Threads cannot be stopped, and Python would wait for them. Their runs stay in the ledger
        # until the lease is over, and are then tried again.
        click.echo(f"{app.delivery.running} tasks were still running; they will be tried again", err=True)
        sys.stdout.flush()
        os._exit(0)


def _keep_what_is_loaded() -> None:
    """Spare the garbage collector what stays until the end: going through it took a sixth of a busy worker's time."""
    gc.collect()
    gc.freeze()


def _run(app: App, work: Callable[[], Any]) -> None:
    try:
        asyncio.run(work())
    finally:
        app.close()


# --- Tasks ----------------------------------------------------------------------------------------


@main.group()
def tasks() -> None:
    """Look at tasks, cancel them, re-run dead letters."""


@tasks.command("list")
@app_option
@click.option(
    "--state", "states", multiple=True, type=click.Choice([str(state) for state in TaskState]), help="Repeatable."
)
@click.option("--queue", default=None, help="Only this queue.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(min=1), help="How many at most.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def tasks_list(*, app: str | None, states: Sequence[str], queue: str | None, limit: int, as_json: bool) -> None:
    """List waiting, running and dead tasks, newest first."""
    found = load_app(app).queue.tasks(states=[TaskState(state) for state in states], queue=queue, limit=limit)
    for view in found:
        if as_json:
            click.echo(json.dumps(summary(view)))
        else:
            columns = (
                view.id,
                view.state,
                view.queue,
                time_text(view.eta),
                f"{view.attempts} attempts",
                view.callable_name,
            )
            click.echo("  ".join(plain(column) for column in (*columns, view.reason or "")).rstrip())
    if not found and not as_json:
        click.echo("no tasks")


@tasks.command("show")
@app_option
@click.argument("task_id")
def tasks_show(*, app: str | None, task_id: str) -> None:
    """Show one task with its attempts, as JSON."""
    view = load_app(app).queue.find(task_id)
    if view is None:
        raise click.ClickException(f"there is no task {plain(task_id)}; `safedefer tasks list` shows those there are")
    document = {**summary(view), "headers": dict(view.headers), "attempts": [r._asdict() for r in view.records]}
    click.echo(json.dumps(document, indent=2))


@tasks.command("cancel")
@app_option
@click.argument("task_id")
def tasks_cancel(*, app: str | None, task_id: str) -> None:
    """End a waiting task unrun."""
    if not load_app(app).cancel(task_id):
        raise click.ClickException(f"no task {plain(task_id)} waits; it runs, has ended, or never was")
    click.echo(f"cancelled {plain(task_id)}")


@tasks.command("retry")
@app_option
@click.argument("task_id")
def tasks_retry(*, app: str | None, task_id: str) -> None:
    """Re-run a dead letter as a new task."""
    task = load_app(app).retry(task_id)
    if task is None:
        raise click.ClickException(f"there is no dead letter {plain(task_id)}; see `safedefer tasks list --state dead`")
    click.echo(f"{plain(task_id)} runs again as {task.id}")


main.add_command(queues)
main.add_command(dead)


@main.command()
@app_option
@click.argument("token")
def inspect(*, app: str | None, token: str) -> None:
    """Verify TOKEN (- reads it from standard input) and print what it would do. Runs nothing."""
    from_stdin = token == "-"  # noqa: S105  # the usual sign, not a password
    data = sys.stdin.buffer.read().strip() if from_stdin else os.fsencode(token)
    loaded = load_app(app)
    try:
        verified = loaded.verify(data, expired=True)
        pointer = verified.blob if isinstance(verified, VerifiedPointer) else None
        if pointer is not None:
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


@main.command()
@click.option("--tasks", "limit", default=None, type=click.IntRange(min=1), help="At most this many files.")
@click.option("--keep", is_flag=True, help="Keep the temporary folder.")
@click.option("--kill", is_flag=True, help="Kill both processes in the middle of the work.")
def demo(*, limit: int | None, keep: bool, kill: bool) -> None:
    """Defer one task for every file of Python's standard library, and attack the handler."""
    # Here: nobody else needs the demonstration's modules.
    from safedefer.demo.show import run_demo  # noqa: PLC0415

    sys.exit(run_demo(limit=limit, keep=keep, kill=kill))
