"""Keys: who may sign what, and how long a secret must be. The only module that computes a token's MAC, or compares it. Does no IO.

HMAC-SHA-256 (RFC 2104; ``HS256`` of RFC 7518, section 3.2). The algorithm belongs to the key, never
to the token: a token's header is looked up, byte for byte, among the headers that the keyring's own
keys could have written, and is never parsed.
"""

from __future__ import annotations

import re

# The objects of OpenSSL that the module hmac wraps: its wrappers take 4,000 of the 120,000 instructions from a small token to its call.
from _hashlib import HMAC, compare_digest, hmac_new
from collections.abc import Callable, Iterable
from enum import StrEnum
from itertools import chain, permutations
from typing import Final, Literal, NoReturn, Self, TypeAlias, final

from safedefer.errors import BadSignature, ConfigurationError, RevokedKey, UnknownKey, WeakKey
from safedefer.keyfile import MAKE_ONE, attempt, guessable, read_jwks, read_text, shown_kid, unwrap
from safedefer.token import Token, decode_segment, encode_segment

#: RFC 7518, section 3.2: a key for HS256 is at least as long as the hash.
MIN_SECRET_BYTES: Final = 32
#: The explicit type of our tokens (RFC 8725, section 3.11).
TOKEN_TYPE: Final = "safedefer+jwt"  # noqa: S105  # a media type, not a secret

_KID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_QUEUE = re.compile(r"[A-Za-z0-9.-]{1,100}")


class Immutable:
    """Base class of keys, keyrings and policies: assignment, deletion, copies and pickles are refused.

    It keeps a program from changing its own keys and policies by mistake. What is in a token cannot assign attributes,
    so no check of a token depends on it. ``__init__`` sets the attributes by ``_set``.
    """

    __slots__ = ()

    def _set(self, **attributes: object) -> None:
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a {type(self).__name__} is immutable; make another one")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a {type(self).__name__} is immutable; make another one")

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} is not pickled or copied; make it where it is used")


class KeyState(StrEnum):
    """What a key may do now."""

    ACTIVE = "active"
    """Signs and verifies. Exactly one key of a ring is active."""
    VERIFY_ONLY = "verify_only"
    """Verifies: a key that is about to be promoted, or one whose tasks are still in flight."""
    REVOKED = "revoked"
    """Refused. Whoever has it can back-date a task, so no time bound would help."""


@final
class Key(Immutable):
    """A secret, its name, and what it may sign.

    Args:
        kid: Its name in the header, ``[A-Za-z0-9_-]{1,64}``; not secret.
        secret: At least 32 random bytes.
        state: ``active``, ``verify_only`` or ``revoked``.
        queues: The queues that it may sign for; None is all.
        patterns: Policy patterns within which it may name callables and classes; None is all that the policy admits.
        pickle: Whether it may sign pickled arguments.

    Raises:
        WeakKey: The secret is short, repeated, or looks like a placeholder or a key file.
        ConfigurationError: The name, the state or a limit is malformed.
    """

    __slots__ = ("_hmac", "kid", "patterns", "pickle", "queues", "state")

    kid: str
    state: KeyState
    queues: frozenset[str] | None
    patterns: tuple[str, ...] | None
    pickle: bool
    _hmac: HMAC

    def __init__(
        self,
        kid: str,
        secret: bytes,
        state: KeyState | Literal["active", "verify_only", "revoked"] = KeyState.ACTIVE,
        *,
        queues: Iterable[str] | None = None,
        patterns: Iterable[str] | None = None,
        pickle: bool = False,
    ) -> None:
        failure = _weakness(kid, secret)
        if failure is None:
            self._set(_hmac=hmac_new(secret, digestmod="sha256"))
        # From here on no frame holds the secret: tracebacks with local variables reach logs.
        del secret
        if failure is not None:
            del kid  # it may be the secret
            raise failure
        if state not in tuple(KeyState):
            raise ConfigurationError(f"the state of key {kid} is none of active, verify_only, revoked")
        if isinstance(queues, str) or isinstance(patterns, str):
            raise ConfigurationError(f"queues and patterns of key {kid} are lists of texts, not one text")
        limited = None if queues is None else frozenset(queues)
        if any(_QUEUE.fullmatch(queue) is None for queue in limited or ()):
            raise ConfigurationError(f"key {kid} is limited to a queue whose name is impossible")
        self._set(
            kid=kid,
            state=KeyState(state),
            queues=limited,
            patterns=None if patterns is None else tuple(patterns),
            pickle=pickle is True,
        )

    def begin_mac(self, start: bytes) -> HMAC:
        """Return the HMAC-SHA-256 of a message that begins so, to be ended by ``end_mac``."""
        # A copy of an HMAC that has its key takes 2.0 us for 500 bytes, hmac.digest() 2.9 us: it is given the secret
        # again at every call, so that a key had to hold it.
        begun = self._hmac.copy()
        begun.update(start)
        return begun

    def __repr__(self) -> str:
        """Show what is not secret."""
        # One that was refused while it was made is shown in its traceback.
        return f"<Key {getattr(self, 'kid', '')} {getattr(self, 'state', 'unfinished')}>"


@final
class Keyring(Immutable):
    """The keys of an application: exactly one active, which signs; all others verify, or are revoked.

    Args:
        keys: The keys, or lists of them, in any order.

    Raises:
        ConfigurationError: None or several are active, two share a name, or one is no key.
        WeakKey: Two share a secret.
    """

    __slots__ = ("_begun", "_decoy", "_start", "_writer_of", "active", "keys")

    active: Key
    """The key that signs."""
    keys: tuple[Key, ...]
    """All keys."""
    _start: bytes
    """What a token of ours begins with: the header of the active key, and a dot."""
    _begun: HMAC
    """The MAC of what a token of ours begins with."""
    _writer_of: Callable[[bytes, _Writer], _Writer]
    """Gives, by encoded header, the key that could have written it, and the MAC of the header and a dot."""
    _decoy: _Writer
    """What is computed with when no key could have written the header."""

    def __init__(self, *keys: Key | Iterable[Key]) -> None:
        given = tuple(chain.from_iterable(item if isinstance(item, Iterable) else (item,) for item in keys))
        if not all(isinstance(key, Key) for key in given):
            raise ConfigurationError("a keyring is made of Key objects; use Keyring.from_text for their texts")
        signing = [key for key in given if key.state is KeyState.ACTIVE]
        if len(signing) != 1:
            raise ConfigurationError(f"a keyring needs exactly one active key and has {len(signing)}; {MAKE_ONE}")
        if len({key.kid for key in given}) != len(given):
            raise ConfigurationError("two keys have the same kid; give every key its own")
        if len({end_mac(key.begin_mac(b""), b"") for key in given}) != len(given):
            raise WeakKey(f"two keys have the same secret; {MAKE_ONE}")
        active = signing[0]
        start = _headers(active.kid)[0] + b"."
        decoy = Key("decoy", bytes(range(MIN_SECRET_BYTES)), KeyState.REVOKED)
        self._set(
            keys=given,
            active=active,
            _start=start,
            _begun=active.begin_mac(start),
            _writer_of={
                header: (key, key.begin_mac(header + b".")) for key in given for header in _headers(key.kid)
            }.get,
            _decoy=(None, decoy.begin_mac(start)),
        )

    def sign(self, payload: bytes) -> bytes:
        """Return the token of a payload, signed with the active key."""
        segment = encode_segment(payload)
        return b"%b%b.%b" % (self._start, segment, end_mac(self._begun, segment))

    def verify(self, token: Token) -> tuple[Key, bytes]:
        """Verify the MAC over the raw segments, then decode the payload.

        An unknown key costs the same work as a known one.

        Returns:
            The key, and the payload, which a holder of it wrote.

        Raises:
            UnknownKey: No key of the ring could have written the header.
            BadSignature: The MAC does not match.
            RevokedKey: It matches, but the key is revoked.
            MalformedToken: A segment is not canonical base64url.
        """
        header, payload, mac = token
        key, begun = self._writer_of(header, self._decoy)
        # The right MAC of a forged token is never a local variable: tracebacks with locals reach logs.
        matches = compare_digest(end_mac(begun, payload), mac)
        if key is None or not matches:
            token.check_spelling()
            if key is None:
                raise UnknownKey("no key of this ring wrote the token's header; add the key that signs, as verify_only")
            raise BadSignature("the signature does not match; the token was altered, or a key of the same kid differs")
        if key.state == "revoked":
            raise RevokedKey(f"key {key.kid} is revoked; re-run the task from its origin if it was wanted")
        return key, decode_segment(payload)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Build from ``kid:base64url[,kid:base64url...]``; the first key is active, the others verify.

        Raises:
            ConfigurationError: The text is malformed. WeakKey: a secret is.
        """
        ring = attempt(read_text, text, Key)
        del text
        return cls(*unwrap(ring))

    @classmethod
    def from_jwks(cls, text: str | bytes) -> Self:
        """Build from a JWK Set (RFC 7517) of ``oct`` keys with our members ``safedefer_*``.

        Raises:
            ConfigurationError: It is not one. WeakKey: a secret is weak.
        """
        ring = attempt(read_jwks, text, Key)
        del text
        return cls(*unwrap(ring))

    def __repr__(self) -> str:
        """Show what is not secret."""
        return f"Keyring({', '.join(map(repr, getattr(self, 'keys', ())))})"


#: The key that could have written a header, None if none could, and the MAC of the header and a dot.
_Writer: TypeAlias = tuple[Key | None, HMAC]


def end_mac(begun: HMAC, rest: bytes) -> bytes:
    """Return the encoded MAC of a message whose start was taken in: 43 characters of base64url."""
    mac = begun.copy()
    mac.update(rest)
    return encode_segment(mac.digest())


def _headers(kid: str) -> list[bytes]:
    """Return the encoded header in each of its six orders; the first is the one that we write."""
    members = ('"alg":"HS256"', f'"kid":"{kid}"', f'"typ":"{TOKEN_TYPE}"')
    return [encode_segment(f"{{{','.join(order)}}}".encode()) for order in permutations(members)]


def _weakness(kid: object, secret: object) -> ConfigurationError | None:
    if not isinstance(kid, str) or _KID.fullmatch(kid) is None:
        return ConfigurationError("a key's kid is 1 to 64 characters of A-Z a-z 0-9 _ -")
    if not isinstance(secret, bytes | bytearray):
        return ConfigurationError(f"the secret of key {shown_kid(kid)} is bytes; use Keyring.from_text for base64url")
    if len(secret) < MIN_SECRET_BYTES:
        return WeakKey(
            f"the secret of key {shown_kid(kid)} has {len(secret)} bytes and needs {MIN_SECRET_BYTES}; {MAKE_ONE}"
        )
    return guessable(kid, bytes(secret))
