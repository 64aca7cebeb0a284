"""Ports of the loopback that nobody else is given while a test needs them.

A port that was free a moment ago may be another process's when a server is started, or started again, on it, and then a
test that finds nobody there finds a stranger.
"""

from __future__ import annotations

import socket


class ReservedPort:
    """A port of 127.0.0.1. Connections to it are refused until a server listens there, which needs ``SO_REUSEADDR``.

    It is kept until ``close``: bound, and with no listener of its own. A context manager.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.number}"

    def close(self) -> None:
        """Give it back."""
        self._socket.close()

    def __enter__(self) -> ReservedPort:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
