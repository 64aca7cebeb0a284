"""Keys: who may sign what. The only module that computes or compares a MAC. Does no IO.

HMAC-SHA-256 (RFC 2104; ``HS256`` of RFC 7518, section 3.2). The algorithm belongs to the key, never
to the token: a token's header is looked up, byte for byte, among the headers that the keyring's own
keys could have written, and is never parsed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from hashlib import sha256
from hmac import compare_digest
from itertools import chain, permutations
from types import MappingProxyType
from typing import Annotated, Final, Literal, NoReturn, Protocol, Self, TypeAlias, TypeVar, final

from pybase64 import b64encode
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safedefer.errors import BadSignature, ConfigurationError, MalformedToken, RevokedKey, UnknownKey, WeakKey
from safedefer.token import Token, decode_segment, encode_segment

#: RFC 7518, section 3.2: a key for HS256 is at least as long as the hash.
MIN_SECRET_BYTES: Final = 32
#: The explicit type of our tokens (RFC 8725, section 3.11).
TOKEN_TYPE: Final = "safedefer+jwt"  # noqa: S105  # a media type, not a secret

_T = TypeVar("_T")
_KID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_QUEUE = re.compile(r"[A-Za-z0-9.-]{1,100}")
_BLOCK: Final = 64
_MIN_DIFFERENT: Final = 8
_MAKE_ONE: Final = "make one with `safedefer keys new`"


class KeyState(StrEnum):
    """What a key may do now."""

    ACTIVE = "active"
    """Signs and verifies. Exactly one key of a ring is active."""
    VERIFY_ONLY = "verify_only"
    """Verifies: a key that is about to be promoted, or one whose tasks are still in flight."""
    REVOKED = "revoked"
    """Refused. Whoever has it can back-date a task, so no time bound would help."""


_REVOKED: Final = KeyState.REVOKED


class _Hash(Protocol):
    def copy(self) -> _Hash: ...
    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...


@final
class Key:
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

    __slots__ = ("_inner", "_outer", "kid", "patterns", "pickle", "queues", "state")

    kid: str
    state: KeyState
    queues: frozenset[str] | None
    patterns: tuple[str, ...] | None
    pickle: bool
    _inner: _Hash
    _outer: _Hash

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
            self._set("_inner", sha256(_block(secret, 0x36)))
            self._set("_outer", sha256(_block(secret, 0x5C)))
        # From here on no frame holds the secret: tracebacks with local variables reach logs.
        del secret
        if failure is not None:
            raise failure
        if state not in tuple(KeyState):
            raise ConfigurationError(f"the state of key {kid} is none of active, verify_only, revoked")
        if isinstance(queues, str) or isinstance(patterns, str):
            raise ConfigurationError(f"queues and patterns of key {kid} are lists of texts, not one text")
        limited = None if queues is None else frozenset(queues)
        if any(_QUEUE.fullmatch(queue) is None for queue in limited or ()):
            raise ConfigurationError(f"key {kid} is limited to a queue whose name is impossible")
        self._set("kid", kid)
        self._set("state", KeyState(state))
        self._set("queues", limited)
        self._set("patterns", None if patterns is None else tuple(patterns))
        self._set("pickle", pickle is True)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def mac_after(self, start: bytes) -> Callable[[bytes], bytes]:
        """Return what makes MACs of messages that begin with ``start`` of the rest of them.

        Returns:
            A function from the rest of a message to the encoded HMAC-SHA-256 of all of it: 43 characters of base64url.
        """
        # RFC 2104, and what is the same in every message hashed beforehand: a MAC is two copies and two updates.
        begun, last = self._inner.copy(), self._outer
        begun.update(start)

        def mac(rest: bytes) -> bytes:
            inner = begun.copy()
            inner.update(rest)
            outer = last.copy()
            outer.update(inner.digest())
            return b64encode(outer.digest(), b"-_").rstrip(b"=")

        return mac

    def __repr__(self) -> str:
        """Show what is not secret."""
        # One that was refused while it was made is shown in its traceback.
        return f"<Key {getattr(self, 'kid', '')} {getattr(self, 'state', 'unfinished')}>"

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a Key is immutable; make another one")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("a Key is immutable; make another one")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Key is not pickled or copied; load it where it is used")


@final
class Keyring:
    """The keys of an application: exactly one active, which signs; all others verify, or are revoked.

    Args:
        keys: The keys, or lists of them, in any order.

    Raises:
        ConfigurationError: None or several are active, two share a name, or one is no key.
        WeakKey: Two share a secret.
    """

    __slots__ = ("_active", "_decoy", "_headers", "_keys", "_mac", "_prefix")

    _active: Key
    _headers: Mapping[bytes, _Entry]
    _keys: tuple[Key, ...]

    def __init__(self, *keys: Key | Iterable[Key]) -> None:
        given = tuple(chain.from_iterable(item if isinstance(item, Iterable) else (item,) for item in keys))
        if not all(isinstance(key, Key) for key in given):
            raise ConfigurationError("a keyring is made of Key objects; use Keyring.from_text for their texts")
        self._check(given)
        self._keys = given
        self._active = next(key for key in given if key.state is KeyState.ACTIVE)
        self._prefix = _headers(self._active.kid)[0] + b"."
        self._mac = self._active.mac_after(self._prefix)
        self._headers = MappingProxyType(
            {header: (key, key.mac_after(header + b".")) for key in given for header in _headers(key.kid)}
        )
        decoy = Key("decoy", bytes(range(MIN_SECRET_BYTES)), KeyState.REVOKED)
        self._decoy: _Entry = None, decoy.mac_after(self._prefix)

    @staticmethod
    def _check(keys: tuple[Key, ...]) -> None:
        active = [key for key in keys if key.state is KeyState.ACTIVE]
        if len(active) != 1:
            raise ConfigurationError(f"a keyring needs exactly one active key and has {len(active)}; {_MAKE_ONE}")
        if len({key.kid for key in keys}) != len(keys):
            raise ConfigurationError("two keys have the same kid; give every key its own")
        if len({key.mac_after(b"")(b"") for key in keys}) != len(keys):
            raise WeakKey(f"two keys have the same secret; {_MAKE_ONE}")

    @property
    def active(self) -> Key:
        """The key that signs."""
        return self._active

    @property
    def keys(self) -> tuple[Key, ...]:
        """All keys."""
        return self._keys

    def sign(self, payload: bytes) -> bytes:
        """Return the token of a payload, signed with the active key."""
        segment = encode_segment(payload)
        return b"%b%b.%b" % (self._prefix, segment, self._mac(segment))

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
        key, right = self._headers.get(header, self._decoy)
        # The right MAC of a forged token is never a local variable: tracebacks with locals reach logs.
        matches = compare_digest(right(payload), mac)
        if key is None or not matches:
            token.check_spelling()
            if key is None:
                raise UnknownKey("no key of this ring wrote the token's header; add the key that signs, as verify_only")
            raise BadSignature("the signature does not match; the token was altered, or a key of the same kid differs")
        if key.state is _REVOKED:
            raise RevokedKey(f"key {key.kid} is revoked; re-run the task from its origin if it was wanted")
        return key, decode_segment(payload)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Build from ``kid:base64url[,kid:base64url...]``; the first key is active, the others verify.

        Raises:
            ConfigurationError: The text is malformed. WeakKey: a secret is.
        """
        ring = _attempt(_keys_of_text, text)
        del text
        return cls(*_unwrap(ring))

    @classmethod
    def from_jwks(cls, text: str | bytes) -> Self:
        """Build from a JWK Set (RFC 7517) of ``oct`` keys with our members ``safedefer_*``.

        Raises:
            ConfigurationError: It is not one. WeakKey: a secret is weak.
        """
        ring = _attempt(_keys_of_jwks, text)
        del text
        return cls(*_unwrap(ring))

    def __repr__(self) -> str:
        """Show what is not secret."""
        return f"Keyring({', '.join(map(repr, getattr(self, '_keys', ())))})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Keyring is not pickled or copied; load it where it is used")


#: The key that wrote a header, None if none did, and what makes the MACs of tokens with it.
_Entry: TypeAlias = tuple[Key | None, Callable[[bytes], bytes]]


class _Jwk(BaseModel):
    """One key of a JWK Set. Members that we do not know are ignored (RFC 7517, section 4)."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", hide_input_in_errors=True)

    kty: Literal["oct"]
    kid: Annotated[str, Field(min_length=1)]
    k: str = Field(repr=False)
    alg: Literal["HS256"] = "HS256"
    safedefer_state: Literal["active", "verify_only", "revoked"] = "verify_only"
    safedefer_queues: list[str] | None = None
    safedefer_patterns: list[str] | None = None
    safedefer_pickle: bool = False


class _Jwks(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", hide_input_in_errors=True)

    keys: list[_Jwk]


def _headers(kid: str) -> list[bytes]:
    """Return the encoded header in each of its six orders; the first is the one that we write."""
    members = ('"alg":"HS256"', f'"kid":"{kid}"', f'"typ":"{TOKEN_TYPE}"')
    return [encode_segment(f"{{{','.join(order)}}}".encode()) for order in permutations(members)]


def _attempt(read: Callable[[_T], list[Key]], text: _T) -> list[Key] | ConfigurationError:
    """Return what ``read`` returned or raised, without the frames that held secrets."""
    try:
        return read(text)
    except ConfigurationError as error:
        error.__context__ = error.__cause__ = None
        return error.with_traceback(None)


def _unwrap(result: list[Key] | ConfigurationError) -> list[Key]:
    if isinstance(result, ConfigurationError):
        raise result
    return result


def _keys_of_text(text: str) -> list[Key]:
    keys: list[Key] = []
    for item in (part.strip() for part in text.split(",")):
        kid, colon, secret = item.partition(":")
        if not colon:
            raise ConfigurationError(f"keys are written kid:base64url, separated by commas; {_MAKE_ONE}")
        state = KeyState.VERIFY_ONLY if keys else KeyState.ACTIVE
        keys.append(Key(kid, _decode_secret(kid, secret), state))
    return keys


def _keys_of_jwks(text: str | bytes) -> list[Key]:
    try:
        jwks = _Jwks.model_validate_json(text)
    except ValidationError as error:
        places = ", ".join(".".join(map(str, item["loc"])) or "the text" for item in error.errors()[:3])
        raise ConfigurationError(f"the key file is not a JWK Set of oct keys (wrong: {places}); {_MAKE_ONE}") from None
    return [
        Key(
            jwk.kid,
            _decode_secret(jwk.kid, jwk.k),
            jwk.safedefer_state,
            queues=jwk.safedefer_queues,
            patterns=jwk.safedefer_patterns,
            pickle=jwk.safedefer_pickle,
        )
        for jwk in jwks.keys
    ]


def _decode_secret(kid: str, text: str) -> bytes:
    try:
        return decode_segment(text.encode())
    except (MalformedToken, UnicodeEncodeError):
        raise ConfigurationError(
            f"the secret of key {kid[:64]!a} is not base64url without padding; {_MAKE_ONE}"
        ) from None


def _block(secret: bytes, pad: int) -> bytes:
    """Return one of the two key blocks of RFC 2104."""
    block = (secret if len(secret) <= _BLOCK else sha256(secret).digest()).ljust(_BLOCK, b"\0")
    return bytes(byte ^ pad for byte in block)


def _weakness(kid: object, secret: object) -> ConfigurationError | None:
    if not isinstance(kid, str) or _KID.fullmatch(kid) is None:
        return ConfigurationError("a key's kid is 1 to 64 characters of A-Z a-z 0-9 _ -")
    if not isinstance(secret, bytes | bytearray):
        return ConfigurationError(f"the secret of key {kid} is bytes; use Keyring.from_text for base64url")
    if len(secret) < MIN_SECRET_BYTES:
        return WeakKey(f"the secret of key {kid} has {len(secret)} bytes and needs {MIN_SECRET_BYTES}; {_MAKE_ONE}")
    # Of 32 random bytes some 30 differ.
    periodic = any(secret[period:] == secret[:-period] for period in range(1, len(secret) // 2 + 1))
    if periodic or len(set(secret)) < _MIN_DIFFERENT:
        return WeakKey(f"the secret of key {kid} repeats itself; {_MAKE_ONE}")
    # Looks are judged of text only: one random key in 256 begins with a brace.
    if secret.isascii() and _LOOKS_WRONG.search(secret.lower()):
        return WeakKey(f"the secret of key {kid} looks like a placeholder or a key file; {_MAKE_ONE}")
    return None


_LOOKS_WRONG: Final = re.compile(
    rb"^\s*(-----begin|\{|\[|ssh-|ecdsa-)|change[-_ ]?(me|it|this)|placeholder|example|password|insecure|your[-_ ]?secret|default"
)
