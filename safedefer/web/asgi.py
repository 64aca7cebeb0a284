"""The handler as an ASGI 3 application: ``app.asgi``, for uvicorn, hypercorn, and a mount in FastAPI, Starlette or Django."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from safedefer.headers import Response
from safedefer.web.body import OverBudgetError, answer_incomplete, read_body
from safedefer.web.lifespan import lifespan

if TYPE_CHECKING:
    from safedefer.web.served import Handles

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

_QUEUE_PATH: Final = re.compile(r"/_ah/queue/[A-Za-z0-9.-]{1,100}")
_LENGTH: Final = re.compile("[0-9]{1,19}")
#: After these the rest of the body is not read, and the connection cannot be used again.
_UNREAD: Final = frozenset({400, 405, 408, 413, 415, 503})


class Asgi:
    """An ASGI application that receives the tasks of an ``App``.

    It serves the App's URL and ``/_ah/queue/<queue>``, below whatever it is mounted at; any other path is a 404. It enforces
    the limit on bodies while they arrive. As a whole server's application it also takes part in the lifespan: it keeps the
    queue's connections of the loop, and lets running tasks end.

    Args:
        app: The App, which is not closed with the server.
    """

    def __init__(self, app: Handles) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI 3 says."""
        if scope["type"] == "http":
            await _answer(send, await self._respond(scope, receive), version=str(scope.get("http_version", "1.1")))
        elif scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _respond(self, scope: Scope, receive: Receive) -> Response | None:
        """Return the answer; None if nobody waits for it any more."""
        app, method, headers = self._app, str(scope["method"]), headers_of(scope["headers"])
        raw, mount = scope.get("raw_path"), str(scope.get("root_path") or "")
        path = str(scope["path"]) if raw is None else raw.decode("latin-1")
        if not is_served(app, path, mount):
            return NOT_FOUND
        delivery = app.delivery
        length = length_of(headers)
        answer = delivery.check_request(method, headers, length)
        if answer is not None:
            return answer
        try:
            body = await read_body(_chunks(receive), delivery.max_bytes, delivery.budget)
        except OverBudgetError:
            return delivery.busy()
        except TimeoutError:
            return delivery.timed_out()
        except ConnectionError:
            delivery.broken()  # for the observer
            return None
        if body is None:
            return delivery.too_large()
        answer = answer_incomplete(delivery, body, length)
        if answer is not None:
            return answer
        return await app.handle(headers, body, path=path, mount=mount, method=method)

    async def _live(self, receive: Receive, send: Send) -> None:
        async with contextlib.AsyncExitStack() as stack:
            await receive()  # lifespan.startup
            try:
                await stack.enter_async_context(lifespan(self._app))
            except Exception as error:  # noqa: BLE001  # whatever it is, the server must not start
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
            await send({"type": "lifespan.startup.complete"})
            await receive()  # lifespan.shutdown
        await send({"type": "lifespan.shutdown.complete"})


#: The answer to a path that is none of the handler's.
NOT_FOUND: Final = Response(404, {}, b"not found\n")


def is_served(app: Handles, path: str, mount: str) -> bool:
    """Whether a path is the App's URL or that of a queue."""
    accepted = app.accepts(path, mount)
    paths = (accepted,) if isinstance(accepted, str) else accepted
    assert isinstance(paths, tuple)  # the paths of a request, see Routes.accepts
    return any(each == app.url or _QUEUE_PATH.fullmatch(each) for each in paths)


def headers_of(pairs: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return headers by name in lower case; the values of a repeated one are joined, and so agree with nothing."""
    found: dict[str, str] = {}
    for raw, text in pairs:
        name, value = raw.decode("latin-1").lower(), text.decode("latin-1")
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


def length_of(headers: Mapping[str, str]) -> int | None:
    """Return the length that a request announces; None if it says none, or nothing that is one."""
    text = headers.get("content-length", "")
    return int(text) if _LENGTH.fullmatch(text) else None


def status_line(status: int) -> str:
    """Return a status and its phrase."""
    return f"{status} {HTTPStatus(status).phrase}"


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        more = message.get("more_body", False)
        yield message.get("body", b"")


async def _answer(send: Send, answer: Response | None, *, version: str) -> None:
    if answer is None:
        return
    headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in answer.headers.items()]
    headers += [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(answer.body))]
    if answer.status in _UNREAD and version[:1] == "1":  # RFC 9113, section 8.2.2: no such header in HTTP/2
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})
