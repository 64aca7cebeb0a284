"""The handler for as long as a server lives: what it opens at the start, and how long its end waits for running tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from safedefer.web.served import Handles

#: Seconds that the end of the server waits for tasks that run.
DRAIN_SECONDS: Final = 30.0


@asynccontextmanager
async def lifespan(app: Handles) -> AsyncIterator[None]:
    """Keep the queue's connections of the running loop; at the end take no more tasks, and let those end that run.

    Args:
        app: The App, which is not closed: another server of the process may use it after this one.

    Raises:
        ConfigurationError: On entering: a module that the policy names cannot be imported.
        QueueUnavailable: On entering: the queue cannot be opened.
    """
    delivery = app.delivery
    delivery.resume()
    async with app.on_loop():
        try:
            yield
        finally:
            delivery.drain()
            await delivery.drained(DRAIN_SECONDS)
