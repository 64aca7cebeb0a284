"""A budget of bytes for the bodies of requests that are not verified yet."""

from __future__ import annotations

from threading import Lock
from typing import Final

#: The default of the bytes that the bodies of all unverified requests may take together.
UNVERIFIED_BYTES: Final = 32 * 1_048_576


class ByteBudget:
    """Counts the bytes of bodies that are being read, in all event loops of a process.

    Args:
        most: Bytes at most, of all bodies together.
    """

    def __init__(self, most: int) -> None:
        self._left = most
        self._lock = Lock()

    def take(self, size: int) -> bool:
        """Take ``size`` bytes and return True; if fewer are left, take none and return False."""
        with self._lock:
            if size > self._left:
                return False
            self._left -= size
            return True

    def give_back(self, size: int) -> None:
        """Give back ``size`` bytes that ``take`` took."""
        with self._lock:
            self._left += size
