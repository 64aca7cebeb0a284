"""Framing: a compact JWS (RFC 7515, section 7.1) as three segments. Knows no keys and parses no JSON.

Base64url is canonical here: no padding, no character outside the alphabet, no stray bits in the last
character. A decoder that ignores those bits gives one signature many spellings. Headers and MACs are
compared as they are spelled; payloads are decoded by ``decode_segment`` only.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Self

from pybase64 import b64decode, b64encode

from safedefer.errors import MalformedToken

#: A MAC of HS256 is 32 bytes, in base64url always this many characters.
MAC_CHARS: Final = 43
#: Headers are three short members; longer ones are nobody's.
_MAX_HEADER: Final = 512

_ALPHABET: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_PADDING: Final = (b"", b"", b"==", b"=")
_LETTERS: Final = [bytes([letter]) for letter in _ALPHABET]
#: By length modulo 4, what may end a segment: characters whose unused bits are zero, or nothing.
_LAST: Final = ({b"", *_LETTERS}, set[bytes](), set(_LETTERS[::16]), set(_LETTERS[::4]))
# Looked for as numbers: ``in`` is several times faster for them than for bytes.
_DOT, _PLUS, _SLASH = b".+/"


def encode_segment(data: bytes) -> bytes:
    """Return canonical base64url (RFC 4648, section 5, without padding)."""
    return b64encode(data, b"-_").rstrip(b"=")


def decode_segment(segment: bytes) -> bytes:
    """Return the bytes of a canonical segment.

    Raises:
        MalformedToken: It is not canonical base64url.
    """
    over = len(segment) % 4
    try:
        # The decoder takes the standard alphabet's own two characters as well, and any bits in the last one.
        if segment[-1:] in _LAST[over] and _PLUS not in segment and _SLASH not in segment:
            return b64decode(segment + _PADDING[over], b"-_", True)  # validate
    except ValueError:
        pass  # a character outside the alphabet
    raise MalformedToken("not canonical base64url; encode without padding and with zero unused bits")


def is_canonical(segment: bytes) -> bool:
    """Whether re-encoding what the segment decodes to would give back the same text."""
    return not segment.translate(None, _ALPHABET) and segment[-1:] in _LAST[len(segment) % 4]


class Token(NamedTuple):
    """The segments of a token of which nothing is known yet but its shape."""

    header: bytes
    """The encoded header, to be looked up among those of the keyring."""
    payload: bytes
    """The encoded payload: ``Keyring.verify`` decodes it when the MAC has matched."""
    mac: bytes
    """The encoded MAC of header, dot and payload (RFC 7515, section 5.1)."""

    def __repr__(self) -> str:
        """Show the header alone: logs identify, they do not quote."""
        return f"Token(header={self.header!r})"

    @classmethod
    def parse(cls, data: bytes, max_bytes: int) -> Self:
        """Split a token into its segments.

        Raises:
            MalformedToken: It is not bytes, is over ``max_bytes``, or is not three segments of possible lengths.
        """
        if type(data) is not bytes:
            raise MalformedToken("a token is bytes; send what serialize() returned")
        if len(data) > max_bytes:
            raise MalformedToken("the token is over the size limit; pass an id instead of the data")
        header, _, rest = data.partition(b".")
        payload, dot, mac = rest.rpartition(b".")
        if not dot or _DOT in payload:
            raise MalformedToken("a token is three segments joined by dots; send what serialize() returned")
        if len(header) > _MAX_HEADER or not payload or len(mac) != MAC_CHARS:
            raise MalformedToken("a segment of the token has an impossible length; send what serialize() returned")
        # By its names it would cost 2 % of all instructions from a small token to its call.
        return tuple.__new__(cls, (header, payload, mac))

    def check_spelling(self) -> None:
        """Say so if a token that no key wrote is not even base64url. What a key wrote is.

        Raises:
            MalformedToken: A segment is not canonical.
        """
        if not (is_canonical(self.header) and is_canonical(self.payload) and is_canonical(self.mac)):
            raise MalformedToken("a segment of the token is not canonical base64url; send what serialize() returned")
