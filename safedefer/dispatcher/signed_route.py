"""Before a task is sent by HTTP: its token is one of ours, and what the storage says of the request is what was signed.

Whoever writes the storage, without a key, could otherwise post any body, on any path and with any headers, to the hosts
that the operator listed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Final

from safedefer.claims import Claims, split_audience
from safedefer.errors import InvalidClaims
from safedefer.queues.base import QueuedTask

#: Tokens of more bytes are verified in a thread: one of a megabyte takes up to a second.
_LARGE: Final = 65_536
#: What a pointer and the stored token that it points to have in common.
_SHARED: Final = ("jti", "aud", "nbf", "exp", "name")
_TRACE_HEADER: Final = "traceparent"


class StorageMismatch(Exception):
    """What is stored beside a token is not what was signed. The text names what differs, and quotes nothing."""


class SignedRoute:
    """Checks tasks before they are sent.

    Args:
        authenticate: Returns the claims of a token that one of our keys signed; raises ``RejectedTask``.
        stored_token: Returns the stored token of an oversize task by its id, None if it is gone; called in a thread.
    """

    def __init__(self, authenticate: Callable[[bytes], Claims], stored_token: Callable[[str], bytes | None]) -> None:
        self._authenticate = authenticate
        self._stored_token = stored_token

    async def check(self, task: QueuedTask) -> None:
        """Check one task.

        Raises:
            RejectedTask: One of its subclasses: no key of ours signed the token, or it cannot be read.
            StorageMismatch: The row says something else than the token.
            QueueError: The stored token of an oversize task cannot be read now.
        """
        claims = await self._claims(task.token)
        if "blob" in claims and task.headers and not signed_headers(claims):
            # A pointer may leave the headers to the token that it points to.
            claims = await asyncio.to_thread(self._pointed_to, claims)
        if (what := difference(task, claims)) is not None:
            raise StorageMismatch(what)

    async def _claims(self, token: bytes) -> Claims:
        if len(token) <= _LARGE:
            return self._authenticate(token)
        return await asyncio.to_thread(self._authenticate, token)

    def _pointed_to(self, pointer: Claims) -> Claims:
        blob = pointer["blob"]
        data = self._stored_token(blob["id"])
        if data is None:
            raise InvalidClaims("the stored token is gone; restore the blobs from a backup")
        if len(data) != blob["length"] or sha256(data).hexdigest() != blob["sha256"]:
            raise InvalidClaims("the stored token is not the one that was pointed to; restore the blob from a backup")
        claims = self._authenticate(data)
        if any(claims.get(name) != pointer.get(name) for name in _SHARED):
            raise InvalidClaims("a stored token and its pointer disagree; sign both with the same claims")
        return claims


def signed_headers(claims: Claims) -> Mapping[str, str]:
    """Return the headers of a request by the claims of its task, without those that every delivery has."""
    headers = claims.get("headers", {})
    trace = claims.get("trace")
    return headers if trace is None else {**headers, _TRACE_HEADER: trace}


def difference(task: QueuedTask, claims: Claims) -> str | None:
    """Return which part of a stored task is not what was signed; None if all that a request is made of agrees."""
    _, queue, target, url = split_audience(claims["aud"])
    stored = (task.url, task.queue, task.target, task.id, task.name, task.headers)
    signed = (url, queue, target, claims["jti"], claims.get("name"), signed_headers(claims))
    return next((what for what, one, other in zip(_PARTS, stored, signed, strict=True) if one != other), None)


_PARTS: Final = ("url", "queue", "target", "id", "name", "headers")
