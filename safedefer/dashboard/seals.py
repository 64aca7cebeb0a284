"""Texts that are no tasks, sealed by a key ring for one purpose: a text of one purpose is not taken for one of another.

What is signed begins with the purpose and a zero byte, as no token does. Keys with limits neither seal nor are believed:
whoever may sign for one queue must not make themselves a session. Does no IO.
"""

from __future__ import annotations

import secrets
from typing import Final

from safedefer.errors import ConfigurationError
from safedefer.keys import Key, Keyring, KeyState, end_mac
from safedefer.token import decode_segment, encode_segment

#: Segments behind the kid.
_PARTS: Final = 2


def seal(keyring: Keyring, purpose: bytes, text: bytes) -> bytes:
    """Return ``kid.text.mac``, signed with the active key.

    Args:
        keyring: The keys.
        purpose: Printable ASCII, the same for ``unseal``.
        text: Any bytes.

    Raises:
        ConfigurationError: The active key is limited to queues or patterns.
    """
    key = keyring.active
    if _is_limited(key):
        raise ConfigurationError(
            f"key {key.kid} is limited to queues or patterns; the dashboard needs one without limits"
        )
    segment = encode_segment(text)
    return b"%b.%b.%b" % (key.kid.encode(), segment, end_mac(key.begin_mac(purpose + b"\0"), segment))


def unseal(keyring: Keyring, purpose: bytes, sealed: bytes) -> bytes | None:
    """Return the text that ``seal`` was given; None unless a key of the ring without limits signed it for the purpose.

    Raises:
        MalformedToken: It was signed, and is not canonical: ``seal`` has not written it.
    """
    kid, *rest = sealed.split(b".")
    key = next((key for key in keyring.keys if key.kid.encode() == kid), None)
    if key is None or key.state is KeyState.REVOKED or _is_limited(key) or len(rest) != _PARTS:
        return None
    if not secrets.compare_digest(end_mac(key.begin_mac(purpose + b"\0"), rest[0]), rest[1]):
        return None
    return decode_segment(rest[0])


def _is_limited(key: Key) -> bool:
    return key.queues is not None or key.patterns is not None
