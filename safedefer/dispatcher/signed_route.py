"""Before a task is sent by HTTP: its token is one of ours, and what the storage says of the request is what was signed.

Whoever writes the storage, without a key, could otherwise post any body, on any path and with any headers, to the hosts
that the operator listed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from safedefer.claims import Claims, split_audience
from safedefer.queues.base import QueuedTask, TaskView

#: Tokens of more bytes are verified in a thread: one of a megabyte takes up to a second.
_LARGE: Final = 65_536
_TRACE_HEADER: Final = "traceparent"


class StorageMismatch(Exception):
    """What is stored beside a token is not what was signed. The text names what differs, and quotes nothing."""


class SignedRoute:
    """Checks tasks before they are sent.

    Args:
        authenticate: Returns the claims of a token that one of our keys signed; raises ``RejectedTask``.
    """

    def __init__(self, authenticate: Callable[[bytes], Claims]) -> None:
        self._authenticate = authenticate

    async def check(self, task: QueuedTask) -> Claims:
        """Check one task, and return what was signed.

        Raises:
            RejectedTask: One of its subclasses: no key of ours signed the token, or it cannot be read.
            StorageMismatch: The row says something else than the token.
        """
        claims = await self._claims(task.token)
        # The pointer of an oversize task has the headers that the stored token has.
        if (what := difference(task, claims)) is not None:
            raise StorageMismatch(what)
        return claims

    async def _claims(self, token: bytes) -> Claims:
        if len(token) <= _LARGE:
            return self._authenticate(token)
        return await asyncio.to_thread(self._authenticate, token)


def signed_headers(claims: Claims) -> Mapping[str, str]:
    """Return the headers of a request by the claims of its task, without those that every delivery has."""
    headers = claims.get("headers", {})
    trace = claims.get("trace")
    return headers if trace is None else {**headers, _TRACE_HEADER: trace}


def difference(task: QueuedTask | TaskView, claims: Claims) -> str | None:
    """Return which part of a stored task is not what was signed; None if all that a request is made of agrees."""
    _, queue, target, url = split_audience(claims["aud"])
    stored = (task.url, task.queue, task.target, task.id, task.name, task.headers)
    signed = (url, queue, target, claims["jti"], claims.get("name"), signed_headers(claims))
    return next((what for what, one, other in zip(_PARTS, stored, signed, strict=True) if one != other), None)


_PARTS: Final = ("url", "queue", "target", "id", "name", "headers")
