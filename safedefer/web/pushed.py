"""The handler of an App for a push engine whose workers run in this process, such as Celery's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safedefer.headers import Response
    from safedefer.queues.base import PullQueue
    from safedefer.web.wsgi import Wsgi


class PushService:
    """What an engine calls in its workers.

    Args:
        wsgi: Returns what holds the event loop of this process, one for all of its workers.
        start: Hands over what falls due in the store, and sweeps outboxes, from then on.
        store: Returns the store of the engine.
    """

    def __init__(self, wsgi: Callable[[], Wsgi], start: Callable[[], None], store: Callable[[], PullQueue]) -> None:
        self._wsgi = wsgi
        self._start = start
        self._store = store

    def submit(self, headers: Mapping[str, str], token: bytes, url: str, /) -> Future[Response]:
        """Hand a token to the handler, in the event loop of this process."""
        return self._wsgi().submit(headers, token, url)

    def start(self) -> None:
        """Begin what one process does for all: for the parent of worker processes."""
        self._start()

    def syncs(self) -> Callable[[], object] | None:
        """Return what has the store sync all that any process has committed to it; None: it syncs each change itself."""
        found: Callable[[], object] | None = getattr(self._store(), "sync", None)
        return found
