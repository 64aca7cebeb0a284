"""The emulator as an HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from safedefer.queues.cloudtasks.emulator.api import Api
from safedefer.queues.cloudtasks.emulator.errors import ApiError, invalid
from safedefer.queues.cloudtasks.emulator.journal import Journal
from safedefer.queues.cloudtasks.emulator.pusher import Pusher
from safedefer.queues.cloudtasks.emulator.resources import QueueEntry, RetryConfig
from safedefer.queues.cloudtasks.emulator.state import State
from safedefer.queues.cloudtasks.emulator.tokens import TokenSigner
from safedefer.queues.cloudtasks.emulator.values import queue_name

if TYPE_CHECKING:
    import socket

    from safedefer.queues.config import QueueFile, QueueSection

#: Where Google serves its keys, below another host.
CERTS_PATH: Final = "/oauth2/v3/certs"
#: Bytes of a request: a batch holds a hundred tasks.
_MAX_BYTES: Final = 120 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatorOptions:
    """How an emulator is set up."""

    data: str | Path | None = None
    """The file that keeps queues and tasks; None: they end with the process."""
    app_engine: str | None = None
    """The address of the application that App Engine tasks are sent to."""
    queues: Sequence[str] = ()
    """Full names of queues that are made at the start, unless they are there."""
    queue_file: QueueFile | None = None
    """A queue.yaml: its queues are made at the start, as App Engine makes them."""
    location: str = "projects/local/locations/local"
    """Where the queues of ``queue_file`` are."""
    key: str | None = None
    """The private key of OIDC tokens, as PEM, where ``data`` has none; None makes one."""
    clock: Callable[[], float] = time.time


@contextlib.asynccontextmanager
async def serving_emulator(listener: socket.socket, options: EmulatorOptions) -> AsyncIterator[str]:
    """Serve and dispatch while the context lasts.

    Args:
        listener: A bound socket.
        options: The setup.

    Yields:
        The address, which is also the issuer of the OIDC tokens.
    """
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    state = State(Journal(options.data), options.clock)
    signer = TokenSigner(state.key or options.key)
    if state.key is None:
        state.keep_key(signer.pem())
    _make_queues(state, options)

    def token(email: str, audience: str) -> str:
        return signer.token(email=email, audience=audience, issuer=address, now=options.clock())

    dispatcher = Pusher(state, token, options.app_engine)
    api = Api(state, dispatcher.force)
    web_app = web.Application(client_max_size=_MAX_BYTES)

    async def certs(_: web.Request) -> web.Response:
        return await _answer(signer.jwks())

    web_app.router.add_get(CERTS_PATH, certs)
    web_app.router.add_route("*", "/v2/{path:.+}", _answering(api))
    runner = web.AppRunner(web_app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    dispatching = asyncio.create_task(dispatcher.run())
    try:
        await web.SockSite(runner, listener).start()
        yield address
    finally:
        dispatching.cancel()
        await asyncio.gather(dispatching, return_exceptions=True)
        await runner.cleanup()
        state.journal.close()


def _answering(api: Api) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(request: web.Request) -> web.Response:
        body = await request.read()
        try:
            document = api.call(request.method, request.match_info["path"], request.query, _json(body))
        except ApiError as error:
            return await _answer(error.document(), error.code)
        return await _answer(document)

    return answer


def _json(body: bytes) -> Any:
    try:
        return json.loads(body) if body else None
    except (ValueError, RecursionError):
        raise invalid("Invalid JSON payload received") from None


async def _answer(document: dict[str, Any], status: int = 200) -> web.Response:
    return web.json_response(document, status=status)


def _make_queues(state: State, options: EmulatorOptions) -> None:
    for name in options.queues:
        if queue_name(name) not in state.lines:
            state.put_queue(QueueEntry(name=name))
    for section in options.queue_file.queue if options.queue_file is not None else ():
        state.put_queue(_declared(section, f"{options.location}/queues/{section.name}"))


def _declared(section: QueueSection, name: str) -> QueueEntry:
    """Return the queue of an entry of queue.yaml; its values count as they are, fractions of seconds too."""
    given, fresh = section.retry_parameters, RetryConfig()
    limit = given.task_retry_limit
    retry = RetryConfig(
        max_attempts=-1 if limit is None else limit + 1,
        max_retry_duration=given.task_age_limit or 0.0,
        min_backoff=fresh.min_backoff if given.min_backoff_seconds is None else given.min_backoff_seconds,
        max_backoff=fresh.max_backoff if given.max_backoff_seconds is None else given.max_backoff_seconds,
        max_doublings=fresh.max_doublings if given.max_doublings is None else given.max_doublings,
    )
    rate = 500.0 if section.rate is None else section.rate
    return QueueEntry(
        name=queue_name(name),
        rate=min(rate, 500.0) or 1.0,
        state="RUNNING" if rate else "PAUSED",
        burst=section.bucket_size,
        concurrent=section.max_concurrent_requests or 1_000,
        retry=retry,
        from_yaml=True,
    )
