"""What a process of ``run``, ``serve`` or ``dispatch`` shows of itself: banners, events, health, and its state to systemd."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import click

from safedefer.app import App
from safedefer.cli.fleet import Fleet
from safedefer.cli.supervisor import listen
from safedefer.cli.text import plain
from safedefer.cli.worker import Worker
from safedefer.errors import ConfigurationError
from safedefer.events import ProcessStarted, ProcessStopping, banner, notify
from safedefer.observe.counts import Counts
from safedefer.observe.health import Health, Subject
from safedefer.observe.logs import is_json
from safedefer.observe.notices import ProcessRole
from safedefer.observe.systemd import Systemd
from safedefer.queues.addresses import full_place
from safedefer.web.health import serving_pages

_log: Final = logging.getLogger("safedefer.process")

_LOOPBACK: Final = "127.0.0.1"
_ADDRESS: Final = re.compile(r"(?:(?P<host>[^:\[\]\s]*|\[[0-9A-Fa-f:.]+\]):)?(?P<port>[0-9]{1,5})")


def health_address(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``. A port alone is on the loopback address, as ``:PORT`` is.

    Raises:
        ConfigurationError: It is no address.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match["port"]) > 65_535:  # noqa: PLR2004  # the highest port
        raise ConfigurationError(
            f"--health {text!a} is no address; write a port, or HOST:PORT such as 127.0.0.1:9090 or [::1]:9090"
        )
    return (match["host"] or _LOOPBACK).strip("[]"), int(match["port"])


@contextlib.contextmanager
def health_listener(text: str | None) -> Iterator[socket.socket | None]:
    """Give a socket that listens for health requests, and say where; None without an address.

    Raises:
        ConfigurationError: It is no address.
        OSError: It cannot be bound.
    """
    if text is None:
        yield None
        return
    listener, url = listen(*health_address(text))
    with listener:
        say(f"health: {url}/healthz, {url}/readyz and {url}/metrics")
        yield listener


def say(text: str) -> None:
    """Tell people something, once: a line on standard error, or a line of the log where that is JSON."""
    if is_json():
        _log.info("%s", text)
    else:
        click.echo(text, err=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """What a process is of."""

    command: str
    processes: int = 1
    drain_seconds: float = 30.0
    health: str | None = None
    """The address of ``--health``, as given."""


class FleetShows(Fleet):
    """What a supervisor shows of itself and its workers.

    Args:
        options: What they are of.
        systemd: Where this process says how they are.
    """

    def __init__(self, options: ServiceOptions, systemd: Systemd) -> None:
        super().__init__(options.processes)
        self.options = options
        self._systemd = systemd

    def say(self, text: str) -> None:
        """Tell people what the processes are."""
        say(text)

    def all_ready(self) -> None:
        """Note that all workers serve."""
        self._systemd.ready()

    def stopping(self) -> None:
        """Note that they were asked to stop."""
        self.draining = True
        self._systemd.stopping()

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Serve the pages, and feed systemd's watchdog, while the context lasts."""
        async with contextlib.AsyncExitStack() as stack:
            listener = stack.enter_context(health_listener(self.options.health))
            if listener is not None:
                await stack.enter_async_context(serving_pages(self, listener))
            await stack.enter_async_context(self._systemd.service())
            yield


class Service:
    """What one process shows of itself.

    Args:
        app: The application.
        options: What the process is of.
        worker: Its line to a supervisor, which serves the pages and speaks with systemd; None: this process does.
        systemd: Where this process says how it is, unless it is a worker.
    """

    def __init__(self, app: App, options: ServiceOptions, worker: Worker | None, systemd: Systemd) -> None:
        self._app = app
        self._options = options
        self._worker = worker
        self._systemd = systemd if worker is None else Systemd()
        self._health: Health | None = None
        self._queues: Sequence[str] | None = None
        self._takes = False
        if options.health is not None:
            counts = Counts()
            app.observers.add(counts)
            self._health = Health(Subject(queue=lambda: app.queue, outbox=app.outbox), counts)
            if worker is not None:
                worker.count(counts, self._health)

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Serve the pages, and feed systemd's watchdog, while the context lasts."""
        async with contextlib.AsyncExitStack() as stack:
            if self._worker is None:
                listener = stack.enter_context(health_listener(self._options.health))
                if listener is not None and self._health is not None:
                    await stack.enter_async_context(serving_pages(self._health, listener))
                await stack.enter_async_context(self._systemd.service())
            if self._health is not None:
                stack.callback(self._health.close)
            yield

    def watch_dispatcher(self, leased_at: Callable[[], float | None], queues: Sequence[str] | None) -> None:
        """Let readiness depend on when the dispatcher of some queues (None: of all) looked at the queue last."""
        self._takes, self._queues = True, queues
        if self._health is not None:
            self._health.leased_at = leased_at

    def started(self) -> None:
        """Say that this process takes tasks."""
        app, options = self._app, self._options
        event = ProcessStarted(
            command=options.command,
            pid=os.getpid(),
            queue=plain(full_place(app.queue, app.queue_place)),
            environment=app.environment,
            policy=app.policy.patterns,
            keys=[f"{key.kid} ({key.state})" for key in app.keyring.keys],
            concurrency=app.delivery_options.concurrency,
            processes=options.processes,
        )
        notify(app.observers, event)
        served = None if self._queues is None else tuple(self._queues)
        app.notices.start(ProcessRole(command=options.command, beats=True, takes=self._takes, queues=served))
        if self._worker is None:
            say(banner(event))
        else:
            self._worker.say_banner(banner(event))
        if self._health is not None:
            self._health.started = True
        self._systemd.ready()

    def stopping(self, running: int) -> None:
        """Say that this process takes no more tasks, and how many it waits for, unless it is only replaced."""
        seconds = self._options.drain_seconds
        event = ProcessStopping(command=self._options.command, pid=os.getpid(), running=running, seconds=seconds)
        notify(self._app.observers, event)
        if running and not (self._worker is not None and self._worker.recycles):
            of = "" if self._worker is None else f" in worker process {os.getpid()}"
            say(f"waiting for {running} task{'s' if running > 1 else ''}{of}, {seconds:g} s at most")
        if self._health is not None:
            self._health.draining = True
        self._systemd.stopping()
