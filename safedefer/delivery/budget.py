"""The bytes that requests may hold before anything of them was verified."""

from __future__ import annotations

from typing import Final

#: Bytes that the bodies of all unverified requests may take together, by default.
UNVERIFIED_BYTES: Final = 32 * 1_048_576


class ByteBudget:
    """Counts the bytes of bodies that are being read. Used on one event loop at a time, or under the caller's lock.

    Args:
        most: Bytes at most, of all bodies together.
    """

    def __init__(self, most: int) -> None:
        self._left = most

    def take(self, size: int) -> bool:
        """Take ``size`` bytes; False, and nothing is taken, if there are not so many left."""
        if size > self._left:
            return False
        self._left -= size
        return True

    def give_back(self, size: int) -> None:
        """Give back what was taken."""
        self._left += size
