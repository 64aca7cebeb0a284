"""An aiohttp application inside a process of another framework: asked over pairs of sockets, so that nothing listens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from http.client import HTTPConnection
from typing import Final, NamedTuple

from aiohttp import web

from safedefer.web.server import server_log

#: Seconds to wait for an answer.
_TIMEOUT: Final = 60.0
#: Headers of one connection; the framework writes its own.
_HOP: Final = frozenset({"connection", "content-length", "date", "keep-alive", "server", "transfer-encoding"})


class EmbeddedAnswer(NamedTuple):
    """What the application answered."""

    status: int
    headers: Sequence[tuple[str, str]]
    """Without those of the connection."""
    body: bytes


class Embedded:
    """Runs an aiohttp application on an event loop in a thread, which the first request of a process starts.

    Args:
        make: Makes the application; called in every process that is asked.
    """

    def __init__(self, make: Callable[[], web.Application]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._running: _EmbeddedLoop | None = None

    def ask(self, method: str, target: str, headers: Mapping[str, str], body: bytes = b"") -> EmbeddedAnswer:
        """Ask for a page.

        Args:
            method: The method.
            target: Path and query, quoted.
            headers: Headers of the request; no others are added, but the length.
            body: The body.

        Raises:
            OSError: The application does not answer in time.
            ValueError: The target or a header has a control character.
            Error: The application cannot be made.
        """
        ours, theirs = socket.socketpair()
        ours.settimeout(_TIMEOUT)
        with contextlib.closing(HTTPConnection("embedded")) as connection:
            connection.sock = ours
            self._loop().accept(theirs)
            connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            kept = [(name, value) for name, value in response.getheaders() if name.lower() not in _HOP]
            return EmbeddedAnswer(response.status, kept, response.read())

    def _loop(self) -> _EmbeddedLoop:
        with self._lock:
            if self._running is None or self._running.pid != os.getpid():
                self._running = _EmbeddedLoop(self._make())
            return self._running


class _EmbeddedLoop:
    def __init__(self, web_app: web.Application) -> None:
        self.pid = os.getpid()
        self._runner = web.AppRunner(web_app, access_log=None, logger=server_log)
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        live = threading.Thread(target=lambda: asyncio.run(self._live()), name="safedefer-embedded", daemon=True)
        live.start()
        self._loop = self._started.result()

    async def _live(self) -> None:
        try:
            await self._runner.setup()
        except Exception as error:  # noqa: BLE001  # raised by whoever waits for the start
            self._started.set_exception(error)
            return
        self._started.set_result(asyncio.get_running_loop())
        await asyncio.Event().wait()  # as long as the process

    def accept(self, theirs: socket.socket) -> None:
        """Serve a connection."""
        factory = self._runner.server
        assert factory is not None, "it was set up"
        accepting = self._loop.connect_accepted_socket(factory, theirs)
        asyncio.run_coroutine_threadsafe(accepting, self._loop).result(_TIMEOUT)
