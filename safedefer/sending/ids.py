"""Ids of tasks and of stored tokens: no two are the same, in no process."""

from __future__ import annotations

import os
from typing import Final


def new_task_id(now: float) -> str:
    """Return a UUID of version 7 in hex (RFC 9562, section 5.7): ids sort by time."""
    try:
        noise = _noise.pop()
    except IndexError:
        noise = _more_noise()
    return (int(now * 1000) & 0xFFFF_FFFF_FFFF).to_bytes(6, "big").hex() + noise


def new_blob_id() -> str:
    """Return 128 random bits in hex: nobody guesses the id of a stored token."""
    return os.urandom(16).hex()


#: The parts of ids that are not the time, made many at once: to ask the system for each would take half of their cost.
_noise: Final[list[str]] = []
# A forked process must not draw the ids that its parent will draw.
os.register_at_fork(after_in_child=_noise.clear)


def _more_noise() -> str:
    noise = bytearray(os.urandom(_NOISE_BYTES * _NOISES))
    noise[0::_NOISE_BYTES] = noise[0::_NOISE_BYTES].translate(_VERSION_7)
    noise[2::_NOISE_BYTES] = noise[2::_NOISE_BYTES].translate(_VARIANT_10)
    digits = noise.hex()
    _noise.extend(digits[at : at + 2 * _NOISE_BYTES] for at in range(0, len(digits), 2 * _NOISE_BYTES))
    return _noise.pop()


_NOISE_BYTES: Final = 10
_NOISES: Final = 64
_VERSION_7: Final = bytes(0x70 | byte & 0x0F for byte in range(256))
_VARIANT_10: Final = bytes(0x80 | byte & 0x3F for byte in range(256))
