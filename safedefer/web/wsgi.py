"""The handler as a WSGI application (PEP 3333): ``app.wsgi``, for gunicorn, mod_wsgi, and a mount in Flask or Django."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, Protocol

from safedefer.web.asgi import NOT_FOUND, is_served, length_of, status_line
from safedefer.web.body import answer_incomplete

if TYPE_CHECKING:
    from safedefer.headers import Response
    from safedefer.web.served import Handles


#: Bytes that are read at once: what has not arrived takes nothing from the budget.
_CHUNK: Final = 65_536


class StartResponse(Protocol):
    """What a WSGI server gives an application to begin its response with."""

    def __call__(self, status: str, headers: list[tuple[str, str]], /) -> Callable[[bytes], object]:
        """Begin."""
        ...


class Wsgi:
    """A WSGI application that receives the tasks of an ``App``.

    It serves the App's URL and ``/_ah/queue/<queue>``, below whatever it is mounted at; any other path is a 404. All requests
    of a process share one event loop, in a thread that the first of them starts: not one loop for each.

    Args:
        app: The App, which is not closed with the server.
    """

    def __init__(self, app: Handles) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._loop: _Loop | None = None

    def __call__(self, environ: Mapping[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request, as PEP 3333 says."""
        answer = self._respond(environ)
        headers = [*answer.headers.items(), ("Content-Type", "text/plain"), ("Content-Length", str(len(answer.body)))]
        start_response(status_line(answer.status), headers)
        return [answer.body]

    def _respond(self, environ: Mapping[str, Any]) -> Response:
        app, mount = self._app, str(environ.get("SCRIPT_NAME", ""))
        path = f"{mount}{environ.get('PATH_INFO', '')}"
        if not is_served(app, path, mount):
            return NOT_FOUND
        delivery, method, headers = app.delivery, str(environ["REQUEST_METHOD"]), _headers_of(environ)
        length = length_of(headers)
        answer = delivery.check_request(method, headers, length)
        if answer is not None:
            return answer
        # Without a length the body ends where a server that knows says so.
        left = length if length is not None else delivery.max_bytes + 1 if environ.get("wsgi.input_terminated") else 0
        body, taken = bytearray(), 0
        try:
            while left and (chunk := environ["wsgi.input"].read(min(left, _CHUNK))):
                if not delivery.budget.take(len(chunk)):
                    return delivery.busy()
                taken += len(chunk)
                left -= len(chunk)
                body += chunk
        except OSError:
            return delivery.broken()
        finally:
            delivery.budget.give_back(taken)
        if len(body) > delivery.max_bytes:
            return delivery.too_large()
        answer = answer_incomplete(delivery, body, length)
        if answer is not None:
            return answer
        handling = app.handle(headers, bytes(body), path=path, mount=mount, method=method)
        return asyncio.run_coroutine_threadsafe(handling, self._running_loop().loop).result()

    def submit(self, headers: Mapping[str, str], token: bytes, path: str) -> Future[Response]:
        """Hand a token to the handler in the event loop of this process: for a push engine's workers."""
        return asyncio.run_coroutine_threadsafe(self._app.handle(headers, token, path=path), self._running_loop().loop)

    def _running_loop(self) -> _Loop:
        with self._lock:
            if self._loop is None or self._loop.pid != os.getpid():  # a server that loads the application and forks
                self._loop = _Loop(self._app)
            return self._loop

    def close(self) -> None:
        """End the event loop, and the runs in it."""
        with self._lock:
            running, self._loop = self._loop, None
        if running is not None:
            running.close()


class _Loop:
    """An event loop in a thread of its own, with the queue's connections."""

    def __init__(self, app: Handles) -> None:
        self._app = app
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self.pid = os.getpid()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), name="safedefer-wsgi", daemon=True)
        self._thread.start()
        self.loop = self._started.result()

    async def _live(self) -> None:
        self._end = asyncio.Event()
        try:
            async with self._app.on_loop():
                self._started.set_result(asyncio.get_running_loop())
                await self._end.wait()
        except Exception as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    def close(self) -> None:
        """End the loop. In a child of the process that made it, it has no thread to end."""
        if self.pid == os.getpid():
            self.loop.call_soon_threadsafe(self._end.set)
            self._thread.join()


def _headers_of(environ: Mapping[str, Any]) -> dict[str, str]:
    headers = {name[5:].replace("_", "-").lower(): str(value) for name, value in environ.items() if name[:5] == "HTTP_"}
    for name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        if environ.get(name):
            headers[name.replace("_", "-").lower()] = str(environ[name])
    return headers
