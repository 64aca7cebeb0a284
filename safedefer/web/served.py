"""The part of an ``App`` that the web handlers use."""

from __future__ import annotations

from collections.abc import Container, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from safedefer.delivery.handler import Delivery
from safedefer.headers import Response


class Handles(Protocol):
    """What receives tasks: an ``App``."""

    @property
    def url(self) -> str:
        """The path that dispatchers post tasks to by default."""
        ...

    @property
    def prefix(self) -> str:
        """The path in front of ``url`` that a mount or proxy adds."""
        ...

    @property
    def delivery(self) -> Delivery:
        """The handler without a framework."""
        ...

    def accepts(self, path: str | None, mount: str = "") -> str | Container[str]:
        """Return the paths that a token may name if its request came on ``path``."""
        ...

    async def handle(
        self, headers: Mapping[str, str], body: bytes, *, path: str | None = None, mount: str = "", method: str = "POST"
    ) -> Response:
        """Handle one request."""
        ...

    def on_loop(self) -> AbstractAsyncContextManager[None]:
        """Keep the queue's connections of the running loop while the context lasts."""
        ...
