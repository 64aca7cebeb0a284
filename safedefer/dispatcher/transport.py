"""Transports: deliver a leased task to a handler, by HTTP POST or in this process.

Either way the token ends in ``Delivery.handle``, which verifies it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, Self

import aiohttp
from yarl import URL

from safedefer.delivery.request import signed_retry
from safedefer.dispatcher.signed_route import SignedRoute
from safedefer.execution.deadline import ANSWER_SECONDS, DEFAULT_DEADLINE
from safedefer.headers import AttemptHeaders, Response
from safedefer.queues.base import QueuedTask


class Unreachable(Exception):
    """No connection to the handler could be made; nothing was sent.

    ``address`` is the handler's, and ``everywhere`` says whether all tasks go to that address.
    """

    def __init__(self, message: str = "", *, address: str = "", everywhere: bool = True) -> None:
        super().__init__(message)
        self.address = address
        self.everywhere = everywhere


class Interrupted(Exception):
    """The request was sent and no answer came: the handler may have run the task."""


class Deliver(Protocol):
    """A transport: sends one request to a handler."""

    @property
    def several(self) -> bool:
        """Whether tasks go to more than one address."""
        ...

    def __call__(self, task: QueuedTask, headers: Mapping[str, str]) -> Awaitable[Response]:
        """POST the task's token. Raises ``Unreachable`` or ``Interrupted``."""
        ...

    def address(self, task: QueuedTask, /) -> str:
        """Return the address of a task. One unreachable handler postpones all tasks with its address."""
        ...


class HttpDelivery:
    """Delivers by HTTP POST, to the address of the task's target and to no other. Follows no redirect.

    Args:
        address: The address for tasks without a configured target: ``http://127.0.0.1:8080``, with a prefix if needed.
        targets: Addresses by target.
        timeout: The most seconds to wait for an answer; None is the task's deadline, else its queue's, and 30 s more.
        deadlines: The ``attempt_deadline`` of queues, in seconds; 0 is no deadline. Other queues have 600 s.
        concurrency: The most connections, and one for each target.
        verify: Checks a task before anything of it is sent. None sends what the storage says, unchecked: for
            tests, and for storage that nobody else can write.
    """

    def __init__(
        self,
        address: str,
        *,
        targets: Mapping[str, str] | None = None,
        timeout: float | None = None,
        deadlines: Mapping[str, float] | None = None,
        concurrency: int = 16,
        verify: SignedRoute | None = None,
    ) -> None:
        self._verify = verify
        self._address = address.rstrip("/")
        self._targets = {name: url.rstrip("/") for name, url in (targets or {}).items()}
        self.several: bool = any(target != self._address for target in self._targets.values())
        """Whether tasks go to more than one address."""
        self._fixed = timeout is not None
        self._timeout = _timeout(DEFAULT_DEADLINE + ANSWER_SECONDS if timeout is None else timeout)
        # A timeout that was given holds for all queues.
        queues = {} if timeout is not None or deadlines is None else deadlines
        self._timeouts = {
            queue: _timeout(seconds + ANSWER_SECONDS if seconds else None) for queue, seconds in queues.items()
        }
        self._concurrency = concurrency
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            timeout=self._timeout,
            # The dispatcher has a slot more for each target that hangs.
            connector=aiohttp.TCPConnector(limit=self._concurrency + len(self._targets) + 1),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            skip_auto_headers={"Accept", "Accept-Encoding"},
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def __call__(self, task: QueuedTask, headers: Mapping[str, str]) -> Response:
        """POST one task.

        Raises:
            Unreachable: No connection was made.
            Interrupted: No answer came.
            StorageMismatch: The storage says something else than the token; nothing was sent.
            RejectedTask: The token is not one of ours, or cannot be read here; nothing was sent.
            QueueError: The stored token of an oversize task cannot be read now; nothing was sent.
            aiohttp.ClientError: The request is impossible.
        """
        if self._session is None:
            raise Unreachable("the delivery is not open; enter it with `async with`")
        timeout = self._timeouts.get(task.queue, self._timeout)
        if self._verify is not None:
            claims = await self._verify.check(task)
            if type(headers) is AttemptHeaders:
                headers.retry = signed_retry(claims)
            if "deadline" in claims and not self._fixed:
                timeout = _timeout(claims["deadline"] + ANSWER_SECONDS)
        address = self.address(task)
        # The path as it was signed: a normalised one is another path, and the handler compares it.
        url = URL(address + task.url, encoded=True)
        try:
            async with self._session.post(
                url, data=task.token, headers=headers, allow_redirects=False, timeout=timeout
            ) as response:
                # The body adds nothing to the headers: it stays unread, and cannot fill the memory.
                return Response(response.status, dict(response.headers), b"")
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Unreachable(type(error).__name__, address=address, everywhere=not self.several) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Interrupted(type(error).__name__) from error

    def address(self, task: QueuedTask, /) -> str:
        """Return the address that a task is sent to."""
        return self._targets.get(task.target, self._address)


def _timeout(seconds: float | None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=seconds, connect=10.0)


class InProcessDelivery:
    """Delivers to a handler in this process, by the function that HTTP requests end in too."""

    @property
    def several(self) -> bool:
        """Whether tasks go to more than one address: they do not."""
        return False

    def __init__(self, handle: Callable[..., Awaitable[Response]]) -> None:
        self._handle = handle

    def __call__(self, task: QueuedTask, headers: Mapping[str, str]) -> Awaitable[Response]:
        """Hand one task to the handler."""
        return self._handle(headers, task.token, path=task.url)

    def address(self, task: QueuedTask, /) -> str:  # noqa: ARG002 - one handler takes all
        """Return the empty text: this process has one handler."""
        return ""
