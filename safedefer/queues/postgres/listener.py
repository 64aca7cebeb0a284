"""Listener: hears pgqueuer's NOTIFY of inserted jobs, and reports them to a ``Watch``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import Final

import asyncpg

from safedefer.queues.postgres import errors
from safedefer.queues.postgres.errors import CONNECT_SECONDS
from safedefer.queues.postgres.pgqueuer import NAMES
from safedefer.queues.postgres.watch import Watch

_log: Final = logging.getLogger("safedefer.postgres")

#: Between checks that the connection still answers, and the timeout of such a check.
_ALIVE_SECONDS: Final = 15.0
_RECONNECT_SECONDS: Final = 0.5


class Listener:
    """Holds one connection that LISTENs on pgqueuer's channel.

    Args:
        dsn: The database.
        watch: Told of each inserted job.
    """

    def __init__(self, dsn: str, watch: Watch) -> None:
        self._dsn = dsn
        self._watch = watch

    async def run(self) -> None:
        """Listen until cancelled; a connection that ends is replaced. The first of several failures is logged."""
        failed = False
        while True:
            try:
                await self._listen_once()
                failed = False
            except Exception as error:  # noqa: BLE001  # a listener that stops for any error leaves the dispatcher polling
                if not failed:
                    _log.warning(
                        "LISTEN failed (%s): new tasks are found by polling; reconnecting", type(error).__name__
                    )
                failed = True
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _listen_once(self) -> None:
        connection = await asyncpg.connect(
            self._dsn, timeout=CONNECT_SECONDS, command_timeout=_ALIVE_SECONDS,
            server_settings={"application_name": "safedefer-listen", "search_path": errors.SEARCH_PATH},
        )  # fmt: skip
        try:
            gone = asyncio.Event()
            connection.add_termination_listener(lambda _: gone.set())
            await connection.add_listener(NAMES.channel, self._hear)
            self._watch.changed()  # tasks inserted before LISTEN were not notified
            while not gone.is_set():
                with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                    await asyncio.wait_for(gone.wait(), _ALIVE_SECONDS)
                    break
                await connection.execute("SELECT 1")
        finally:
            connection.terminate()

    def _hear(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        """Report an insert. Other operations, and payloads that are not pgqueuer's, are ignored: any role can notify."""
        try:
            operation = json.loads(str(payload)).get("operation")
        except (ValueError, AttributeError, RecursionError):
            return
        if operation == "insert":
            self._watch.changed()
