"""The handler of an App for a push engine whose workers run in this process, such as Celery's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safedefer.headers import Response
    from safedefer.web.wsgi import Wsgi


class PushService:
    """What an engine calls in its workers.

    Args:
        wsgi: Returns what holds the event loop of this process, one for all of its workers.
        start: Hands over what falls due in the store, and sweeps outboxes, from then on.
    """

    def __init__(self, wsgi: Callable[[], Wsgi], start: Callable[[], None]) -> None:
        self._wsgi = wsgi
        self._start = start

    def submit(self, headers: Mapping[str, str], token: bytes, url: str, /) -> Future[Response]:
        """Hand a token to the handler, in the event loop of this process."""
        return self._wsgi().submit(headers, token, url)

    def start(self) -> None:
        """Begin what one process does for all: for the parent of worker processes."""
        self._start()
