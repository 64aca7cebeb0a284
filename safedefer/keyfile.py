"""Key files: what the texts say that keys are configured by, and what no random secret looks like. Does no IO.

Two formats: ``kid:base64url[,kid:base64url...]``, and a JWK Set (RFC 7517) of ``oct`` keys with members ``safedefer_*``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Annotated, Any, Final, Literal, Required, TypedDict, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from safedefer.errors import ConfigurationError, MalformedToken, WeakKey
from safedefer.token import decode_segment, encode_segment

_T = TypeVar("_T")
_K = TypeVar("_K")

MAKE_ONE: Final = "make one with `safedefer keys new`"
#: What `safedefer keys new` prints in front of a key.
_VARIABLE: Final = "SAFEDEFER_KEYS="
_LOOKS_WRONG: Final = rb"^\s*(-----begin|\{|\[|ssh-|ecdsa-)|change[-_ ]?(me|it|this)|placeholder|example|password|insecure|your[-_ ]?secret|default"
"""Finds what no random secret looks like, in one that is text."""
_TOLD: Final = (
    f"a kid has a part of a secret in it, and every token and log shows it; give the key another kid, and {MAKE_ONE}"
)
#: Of 32 random bytes some 30 differ.
_MIN_DIFFERENT: Final = 8
#: No kid has so many characters of a secret by chance.
_TOLD_CHARACTERS: Final = 16
_State = Literal["active", "verify_only", "revoked"]


class KeyFields(TypedDict, total=False):
    """The arguments of a ``keys.Key``, which are checked there."""

    kid: Required[str]
    secret: Required[bytes]
    state: Required[_State]
    queues: Iterable[str] | None
    patterns: Iterable[str] | None
    pickle: bool


#: Our members of a key, by their letters; without the prefix too: no other program gives these names to members.
_MEMBERS: Final = {
    prefix + name: f"safedefer_{name}"
    for name in ("state", "queues", "patterns", "pickle")
    for prefix in ("safedefer", "")
}
#: Characters of the shortest secret.
_LEAST_SECRET: Final = 43
_ALIKE: Final = 0.75
_MISSPELLED: Final = "misspelled"


class _Jwk(BaseModel):
    """One key of a JWK Set. Members that we do not know are ignored (RFC 7517, section 4)."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", hide_input_in_errors=True, defer_build=True)

    kty: Literal["oct"]
    kid: Annotated[str, Field(min_length=1)]
    k: str = Field(repr=False)
    alg: Literal["HS256"] = "HS256"
    safedefer_state: _State = "verify_only"
    safedefer_queues: list[str] | None = None
    safedefer_patterns: list[str] | None = None
    safedefer_pickle: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_misspelled(cls, members: Any) -> Any:
        # Ignored, a limit that was misspelled would be none.
        for name in members if isinstance(members, dict) else ():
            meant = None if name in cls.model_fields else _meant(name)
            if meant is not None:
                raise _misspelled(f"the member {name[:64]!a} is unknown; did you mean {meant}?")
        return members


class _Jwks(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", hide_input_in_errors=True, defer_build=True)

    keys: list[_Jwk]

    @model_validator(mode="before")
    @classmethod
    def _refuse_misplaced(cls, members: Any) -> Any:
        for name in members if isinstance(members, dict) else ():
            meant = None if name == "keys" else _meant(name)
            if meant is not None:
                raise _misspelled(
                    f"the member {name[:64]!a} is not inside a key; write {meant} into each that it is for"
                )
        return members


def _misspelled(text: str) -> PydanticCustomError:
    return PydanticCustomError(_MISSPELLED, "{text}", {"text": text})


def _meant(name: str) -> str | None:
    """Return which of our members a name that is none of them looks like; None if it looks like none."""
    import difflib  # noqa: PLC0415  # for the members that are not ours

    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    cutoff = 0.0 if letters.startswith("safedefer") else _ALIKE
    near = difflib.get_close_matches(letters, _MEMBERS, n=1, cutoff=cutoff)
    return _MEMBERS[near[0]] if near else None


def read_text(text: str) -> list[KeyFields]:
    """Read ``kid:base64url[,kid:base64url...]``; the first key is active, the others verify.

    Raises:
        ConfigurationError: The text is malformed. Frames of its traceback hold secrets.
    """
    if text.startswith(_VARIABLE):
        raise ConfigurationError(
            f"keys are written without {_VARIABLE} in front; `export $(safedefer keys new)` sets the variable"
        )
    keys: list[KeyFields] = []
    for item in (part.strip() for part in text.split(",")):
        kid, colon, secret = item.partition(":")
        if not colon:
            raise ConfigurationError(f"keys are written kid:base64url, separated by commas; {MAKE_ONE}")
        keys.append({"kid": kid, "secret": _decode_secret(kid, secret), "state": "verify_only" if keys else "active"})
    return _untold(keys)


def read_jwks(text: str | bytes) -> list[KeyFields]:
    """Read a JWK Set (RFC 7517) of ``oct`` keys with our members ``safedefer_*``.

    Raises:
        ConfigurationError: It is not one. Frames of its traceback hold secrets.
    """
    try:
        jwks = _Jwks.model_validate_json(text)
    except ValidationError as error:
        wrong = error.errors(include_input=False, include_url=False)
        for item in wrong:
            if item["type"] == _MISSPELLED:
                raise ConfigurationError(f"the key file is refused: {item['msg']}") from None
        places = ", ".join(".".join(map(str, item["loc"])) or "the text" for item in wrong[:3])
        raise ConfigurationError(f"the key file is not a JWK Set of oct keys (wrong: {places}); {MAKE_ONE}") from None
    return _untold(
        {
            "kid": jwk.kid,
            "secret": _decode_secret(jwk.kid, jwk.k),
            "state": jwk.safedefer_state,
            "queues": jwk.safedefer_queues,
            "patterns": jwk.safedefer_patterns,
            "pickle": jwk.safedefer_pickle,
        }
        for jwk in jwks.keys
    )


def _untold(keys: Iterable[KeyFields]) -> list[KeyFields]:
    """Return keys of which no kid has a part of any secret in it; one of its own ``keys.Key`` refuses too."""
    found = list(keys)
    if tells_secret((key["kid"] for key in found), (key["secret"] for key in found)):
        raise WeakKey(_TOLD)
    return found


def shown_kid(kid: str) -> str:
    """Return a kid as messages show it: not one that is as long as a secret, with which it may have been swapped."""
    if len(kid) >= _LEAST_SECRET:
        return f"of {len(kid)} characters"
    return ascii(kid)


def _decode_secret(kid: str, text: str) -> bytes:
    try:
        return decode_segment(text.encode())
    except (MalformedToken, UnicodeEncodeError):
        raise ConfigurationError(
            f"the secret of key {shown_kid(kid)} is not base64url without padding; {MAKE_ONE}"
        ) from None


def guessable(kid: str, secret: bytes) -> WeakKey | None:
    """Return why a secret that is long enough looks like none that was made at random; None if it does not."""
    if tells_secret((kid,), (secret,)):
        return WeakKey(_TOLD)
    periodic = any(secret[period:] == secret[:-period] for period in range(1, len(secret) // 2 + 1))
    if periodic or len(set(secret)) < _MIN_DIFFERENT:
        return WeakKey(f"the secret of key {shown_kid(kid)} repeats itself; {MAKE_ONE}")
    # Looks are judged of text only: one random key in 256 begins with a brace.
    if secret.isascii() and re.search(_LOOKS_WRONG, secret.lower()):
        return WeakKey(f"the secret of key {shown_kid(kid)} looks like a placeholder or a key file; {MAKE_ONE}")
    return None


def tells_secret(kids: Iterable[str], secrets: Iterable[bytes]) -> bool:
    """Whether a kid has a part of a secret in it, as it is or as base64url, base64 or hex spell it."""
    spelled = chain.from_iterable((secret, encode_segment(secret), secret.hex().encode()) for secret in secrets)
    parts = {part for text in spelled for part in _parts(text.lower())}
    return any(part in parts for kid in kids for part in _parts(kid.lower().encode()))


def _parts(text: bytes) -> Iterator[bytes]:
    return (text[at : at + _TOLD_CHARACTERS] for at in range(len(text) - _TOLD_CHARACTERS + 1))


def attempt(read: Callable[[_T], list[KeyFields]], text: _T, make: Callable[..., _K]) -> list[_K] | ConfigurationError:
    """Return the keys of a text, or why it has none, without the frames that held secrets."""
    try:
        return [make(**fields) for fields in read(text)]
    except ConfigurationError as error:
        error.__context__ = error.__cause__ = None
        return error.with_traceback(None)
    except (TypeError, AttributeError, UnicodeError):  # it is no text, or none that can be written in UTF-8
        return ConfigurationError(f"keys are read from a text in UTF-8; {MAKE_ONE}")


def unwrap(result: list[_K] | ConfigurationError) -> list[_K]:
    """Return the keys of a text, or raise why it has none."""
    if isinstance(result, ConfigurationError):
        raise result
    return result
