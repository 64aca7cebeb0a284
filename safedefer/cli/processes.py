"""``safedefer serve``, ``dispatch`` and ``run``: the processes that receive, deliver and run tasks; their options and defaults."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, NoReturn

import click

from safedefer.app import App
from safedefer.cli.common import NO_ENVIRONMENT, Seconds, load_app
from safedefer.cli.options import TEXT
from safedefer.cli.service import FleetShows, Service, ServiceOptions, health_address
from safedefer.cli.supervisor import SupervisorOptions, naming_the_address, supervise
from safedefer.cli.text import many
from safedefer.cli.worker import Worker
from safedefer.concurrency.beat import HANG_SECONDS
from safedefer.deferred import configure
from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions, HttpDelivery, InProcessDelivery
from safedefer.dispatcher.signed_route import SignedRoute
from safedefer.errors import ConfigurationError, QueueUnavailable
from safedefer.observe.systemd import Systemd
from safedefer.sending.addresses import check_address
from safedefer.settings import take_keys_from_environment
from safedefer.web.lifespan import DRAIN_SECONDS
from safedefer.web.server import serving

_log: Final = logging.getLogger("safedefer")

_app_argument = click.argument("app", required=False, default=None, type=TEXT, metavar="[MODULE:APP]")
_host = click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
_port = click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: a free one.")
_drain = click.option(
    "--drain",
    default=DRAIN_SECONDS,
    show_default=True,
    type=Seconds(),
    help="Seconds that a stop waits for running tasks.",
)
_concurrency = click.option(
    "--concurrency",
    default=None,
    show_default="the App's: SAFEDEFER_CONCURRENCY, 16",
    type=click.IntRange(1, 10_000),
    help="Tasks at once: the handler's slots and the dispatcher's deliveries.",
)
_queues = click.option("--queue", "queues", multiple=True, type=TEXT, help="Only this queue; repeatable.")
_lease = click.option(
    "--lease",
    default=60.0,
    show_default=True,
    type=Seconds(0.5),
    help="Seconds until a silent dispatcher's tasks are due again.",
)


_processes = click.option(
    "--processes", default=1, show_default=True, type=click.IntRange(1, 1_000), help="Worker processes, supervised."
)
_hang = click.option(
    "--hang-seconds",
    default=HANG_SECONDS,
    show_default=True,
    type=Seconds(0.5),
    help="Seconds without a turn of its event loop after which a worker process is killed and replaced.",
)
_max_tasks = click.option(
    "--max-tasks", default=None, type=click.IntRange(min=1), help="Tasks after which a worker process is replaced."
)


def _check_health(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        health_address(value)
    return value


_health = click.option(
    "--health",
    default=None,
    metavar="HOST:PORT",
    callback=_check_health,
    help="Serve /healthz, /readyz and /metrics there; a port alone is on the loopback address.",
)


@click.command()
@_app_argument
@_host
@_port
@_concurrency
@_processes
@_hang
@_max_tasks
@_drain
@_health
@click.pass_context
def serve(
    ctx: click.Context,
    *,
    app: str | None,
    host: str,
    port: int,
    concurrency: int | None,
    processes: int,
    hang_seconds: float,
    max_tasks: int | None,
    drain: float,
    health: str | None,
) -> None:
    """Run the handler: receive tasks by HTTP. Prints its URL when it is ready.

    With more than one process, or --max-tasks, a supervisor keeps them.
    """
    worker, systemd = Worker.from_environment(), Systemd.take_from(os.environ)
    shown = ServiceOptions(command="serve", processes=processes, drain_seconds=drain, health=health)
    if worker is None and (processes > 1 or max_tasks is not None):
        _supervise(ctx, host, port, hang_seconds=hang_seconds, shows=FleetShows(shown, systemd))
    loaded = _load(app, concurrency)
    service = Service(loaded, shown, worker, systemd)

    async def work() -> None:
        loaded.delivery.stop_renewal_after(hang_seconds)
        async with _serving(loaded, service, worker, host, port, max_tasks) as stop:
            service.started()
            await stop.wait()
            service.stopping(loaded.delivery.running)
            await _drain_handler(loaded, drain, worker)

    _run(loaded, work)


@click.command()
@_app_argument
@click.option("--to", "address", required=True, help="The handler's address, such as http://127.0.0.1:8080.")
@_queues
@_concurrency
@_lease
@_drain
@_health
@click.option(
    "--timeout",
    default=None,
    show_default="the queue's deadline and 30 s",
    type=Seconds(0.1),
    help="Seconds to wait for the answer to one task.",
)
def dispatch(
    *,
    app: str | None,
    address: str,
    queues: Sequence[str],
    concurrency: int | None,
    lease: float,
    drain: float,
    health: str | None,
    timeout: float | None,
) -> None:
    """Run the dispatcher: lease due tasks and POST them to a handler."""
    systemd = Systemd.take_from(os.environ)
    loaded = _load_to_dispatch(app, concurrency, queues)
    check_address("--to", address)
    service = Service(loaded, ServiceOptions(command="dispatch", drain_seconds=drain, health=health), None, systemd)

    async def work() -> None:
        verify = SignedRoute(loaded.authenticate)
        deadlines = None if loaded.queue_file is None else loaded.queue_file.deadlines
        http = HttpDelivery(
            address,
            targets=loaded.targets,
            timeout=timeout,
            deadlines=deadlines,
            concurrency=loaded.delivery_options.concurrency,
            verify=verify,
        )
        async with _signals() as stop, http as deliver, service.shown():
            options = _dispatcher_options(loaded, lease, drain, queues)
            await asyncio.to_thread(_check_tables, loaded)
            _keep_what_is_loaded()
            dispatcher = Dispatcher(loaded.queue, deliver, clock=time.time, options=options, observer=loaded.observers)
            service.watch_dispatcher(lambda: dispatcher.leased_at, options.queues)
            service.started()
            await _dispatch(dispatcher, stop, service)

    _run(loaded, work)


@click.command()
@_app_argument
@_host
@_port
@_queues
@_concurrency
@_lease
@_processes
@_hang
@_max_tasks
@_drain
@_health
@click.pass_context
def run(
    ctx: click.Context,
    *,
    app: str | None,
    host: str,
    port: int,
    queues: Sequence[str],
    concurrency: int | None,
    lease: float,
    processes: int,
    hang_seconds: float,
    max_tasks: int | None,
    drain: float,
    health: str | None,
) -> None:
    """Run handler and dispatcher together, in worker processes that a supervisor keeps.

    Prints its URL when all are ready. SIGTERM and Ctrl-C let running tasks end; the second one does not wait.
    """
    worker, systemd = Worker.from_environment(), Systemd.take_from(os.environ)
    shown = ServiceOptions(command="run", processes=processes, drain_seconds=drain, health=health)
    if worker is None:
        _supervise(ctx, host, port, hang_seconds=hang_seconds, shows=FleetShows(shown, systemd))
    loaded = _load_to_dispatch(app, concurrency, queues)
    service = Service(loaded, shown, worker, systemd)

    async def work() -> None:
        loaded.delivery.stop_renewal_after(hang_seconds)
        async with _serving(loaded, service, worker, host, port, max_tasks) as stop:
            options = replace(_dispatcher_options(loaded, lease, drain, queues), hang_seconds=hang_seconds)
            if worker is not None:
                options = replace(options, owner=worker.owner, dead_owners=worker.dead_owners)
            deliver = InProcessDelivery(loaded.handle)
            dispatcher = Dispatcher(loaded.queue, deliver, clock=time.time, options=options, observer=loaded.observers)
            service.watch_dispatcher(lambda: dispatcher.leased_at, options.queues)
            service.started()
            await _dispatch(
                dispatcher, stop, service, loaded.delivery.drain
            )  # what is posted from now on is answered busy
            await _drain_handler(loaded, 1.0, worker)

    _run(loaded, work)


def _supervise(ctx: click.Context, host: str, port: int, *, hang_seconds: float, shows: FleetShows) -> NoReturn:
    """Be the supervisor of worker processes with this command line, and end with it."""
    options = SupervisorOptions(
        processes=shows.options.processes, hang_seconds=hang_seconds, drain_seconds=shows.options.drain_seconds
    )
    sys.exit(supervise(_command_line(ctx), host, port, options, shows))


def _command_line(ctx: click.Context) -> list[str]:
    """Return the command line of a worker: what was parsed, written again."""
    parents = [] if ctx.parent is None else _command_line(ctx.parent)
    words = [*parents, *([] if ctx.parent is None else [str(ctx.info_name)])]
    for parameter in ctx.command.params:
        value = ctx.params.get(str(parameter.name))
        if isinstance(parameter, click.Option) and parameter.is_flag:
            words += [parameter.opts[0]] if value else []
        elif isinstance(parameter, click.Option) and value is not None:
            for each in value if parameter.multiple else (value,):
                words += [parameter.opts[0], str(each)]
        elif value is not None:
            words += [str(value)]
    return words


@contextlib.asynccontextmanager
async def _serving(
    app: App, service: Service, worker: Worker | None, host: str, port: int, max_tasks: int | None
) -> AsyncIterator[asyncio.Event]:
    """Serve the handler, by itself or as a worker of a supervisor; give the event that says when to stop."""
    async with contextlib.AsyncExitStack() as stack:
        stop = await stack.enter_async_context(_signals())
        await stack.enter_async_context(app.on_loop())
        await asyncio.to_thread(_check_tables, app)
        if app.pushes:
            app.outbox.start()  # no dispatcher does
        await stack.enter_async_context(service.shown())
        if worker is None:
            with naming_the_address(host, port):
                url = await stack.enter_async_context(serving(app, host, port))
            print(url, flush=True)
        else:
            enough = partial(_is_used_up, app, max_tasks)
            await stack.enter_async_context(worker.watched(stop, recycle=enough))
            await stack.enter_async_context(serving(app, listener=worker.listener))
            worker.ready()
        _keep_what_is_loaded()
        yield stop


def _check_tables(app: App) -> None:
    """Raise ``ConfigurationError`` if the queue cannot be used as it is, before the process says that it is ready."""
    with contextlib.suppress(QueueUnavailable):  # one that is away comes back
        app.queue.next_due(now=time.time())


def _load(spec: str | None, concurrency: int | None, queues: Sequence[str] = ()) -> App:
    """Load the App of a process that delivers or runs tasks.

    Args:
        spec: ``module:app``; None is the App of the settings.
        concurrency: Replaces its own, for slots and deliveries.
        queues: Those that it dispatches.

    Raises:
        UnknownQueueError: One of ``queues`` is not declared.
    """
    app = load_app(spec)
    for queue in queues:
        app.check_queue(queue)
    if spec is None:
        configure(app)  # the functions of `deferred` use this one, and need not make another
    take_keys_from_environment()
    if concurrency is not None:
        app.delivery_options = replace(app.delivery_options, concurrency=concurrency)
    if not app.environment_given:
        _log.warning("%s", NO_ENVIRONMENT)
    return app


def _is_used_up(app: App, tasks: int | None) -> bool:
    """Whether a worker process asks to be replaced: it handled its tasks, or too many do not return."""
    return app.delivery.is_clogged or (tasks is not None and app.delivery.handled >= tasks)


def _dispatcher_options(app: App, lease: float, drain: float, queues: Sequence[str]) -> DispatcherOptions:
    file = app.queue_file
    sections = () if file is None else file.queue
    app.outbox.start()
    return DispatcherOptions(
        concurrency=app.delivery_options.concurrency,
        lease_seconds=lease,
        drain_seconds=drain,
        queues=queues or None,
        limits=() if file is None else file.limits,  # limits that no file declares any more end
        retry_options={section.name: section.retry_parameters.given() for section in sections},
    )


def _load_to_dispatch(spec: str | None, concurrency: int | None, queues: Sequence[str]) -> App:
    """Load as ``_load``; raise ``ConfigurationError`` if its queue has nothing to dispatch, before anything is served."""
    app = _load(spec, concurrency, queues)
    if app.pushes:
        command = getattr(app.push_queue.engine, "worker_command", None)
        remedy = (
            "`safedefer serve`" if command is None else f"Celery's workers, `{command((spec or '').partition(':')[0])}`"
        )
        raise ConfigurationError(
            f"{app.queue_place} pushes its tasks to the handler: there is nothing to dispatch; run {remedy}"
        )
    return app


@contextlib.asynccontextmanager
async def _signals() -> AsyncIterator[asyncio.Event]:
    """Set the event at SIGTERM or SIGINT; at the second one, end at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    asked = False

    def on_signal(number: int) -> None:
        nonlocal asked
        if asked:
            os._exit(128 + number)
        asked = True
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield stop
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _dispatch(
    dispatcher: Dispatcher, stop: asyncio.Event, service: Service, then: Callable[[], None] = lambda: None
) -> None:
    running = asyncio.create_task(dispatcher.run())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    dispatcher.stop()
    service.stopping(dispatcher.delivering)
    then()
    await running


async def _drain_handler(app: App, seconds: float, worker: Worker | None) -> None:
    app.delivery.drain()
    if not await app.delivery.drained(seconds):
        # Threads cannot be stopped, and Python would wait for them. Their runs stay in the ledger
        # until the lease is over, and are then tried again.
        click.echo(f"{many(app.delivery.running, 'task')} still running; will be tried again", err=True)
        sys.stdout.flush()
        if worker is not None:
            worker.say_counts()
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
