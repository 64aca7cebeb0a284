"""The messages of a service to systemd (``sd_notify(3)``): ready, stopping, and the watchdog. Nothing where it is not asked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, MutableMapping
from typing import Final, Self

_SOCKET: Final = "NOTIFY_SOCKET"
_WATCHDOG: Final = "WATCHDOG_USEC"
_WATCHDOG_PID: Final = "WATCHDOG_PID"
#: Messages in the time after which systemd takes the service for hung.
_BEATS: Final = 3
#: Seconds until a state that systemd's full socket did not take is sent again.
_AGAIN_SECONDS: Final = 0.2


class Systemd:
    """Where messages to systemd go.

    Args:
        address: The address of its socket, a path or, after ``@``, a name in Linux's abstract namespace; None: it is not asked.
        watchdog_seconds: After how many seconds without a message it ends the service; None: never.
    """

    def __init__(self, address: str | None = None, watchdog_seconds: float | None = None) -> None:
        self.address = address
        self.watchdog_seconds = watchdog_seconds
        self._unsent: tuple[str, ...] = ()

    @classmethod
    def take_from(cls, environment: MutableMapping[str, str]) -> Self:
        """Read what systemd says in the environment, and remove it: what this process starts is not the service."""
        address = environment.pop(_SOCKET, None)
        microseconds, pid = environment.pop(_WATCHDOG, ""), environment.pop(_WATCHDOG_PID, "")
        if address is None or not address.startswith(("/", "@")):  # others are of virtual machines
            return cls()
        mine = pid in {"", str(os.getpid())}
        watched = mine and microseconds.isascii() and microseconds.isdigit() and int(microseconds) > 0
        return cls(address, int(microseconds) / 1e6 if watched else None)

    def send(self, *fields: str) -> bool:
        """Send ``NAME=value`` fields in one datagram; False if systemd does not ask, or is not there. Raises nothing."""
        if self.address is None:
            return False
        address = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)  # the event loop must not wait for systemd
                sender.connect(address)
                sender.sendall("\n".join(fields).encode())
        except OSError:
            return False
        return True

    @contextlib.asynccontextmanager
    async def service(self) -> AsyncIterator[None]:
        """Feed the watchdog, and send again what its socket did not take, while the context lasts and the event loop turns."""
        beats = (
            [] if self.watchdog_seconds is None else [asyncio.create_task(self._feed(self.watchdog_seconds / _BEATS))]
        )
        if self.address is not None:
            beats.append(asyncio.create_task(self._send_again()))
        try:
            yield
        finally:
            for beat in beats:
                beat.cancel()
            self._send_unsent()

    async def _feed(self, seconds: float) -> None:
        while True:
            self.send("WATCHDOG=1")
            await asyncio.sleep(seconds)

    async def _send_again(self) -> None:
        while True:
            await asyncio.sleep(_AGAIN_SECONDS)
            self._send_unsent()

    def _send_unsent(self) -> None:
        if self._unsent and self.send(*self._unsent):
            self._unsent = ()

    def _say(self, *fields: str) -> None:
        """Send a state, which stays until the next one, where a beat that is lost is followed by another."""
        self._unsent = fields
        self._send_unsent()

    def ready(self) -> None:
        """Say that the service takes tasks."""
        self._say("READY=1", "STATUS=takes tasks")

    def stopping(self) -> None:
        """Say that the service stops."""
        self._say("STOPPING=1", "STATUS=stops, and waits for running tasks")
