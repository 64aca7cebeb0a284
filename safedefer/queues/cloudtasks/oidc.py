"""Proof that Cloud Tasks sent a request: an OIDC token of an account that we know, verified by Google's public keys.

It is asked after a token of ours was verified: a stranger without a key causes no look at this one, and no fetch. Without it a
copy of a token, which its queue and its logs may hold, could be posted by anybody.

Whatever is in the header is a refusal, and no error. ``alg`` is RS256 whatever the token says. Claims are compared by type and
value; nothing is converted.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from safedefer.errors import MissingExtra, QueueUnavailable

try:
    import jwt
    import requests
except ModuleNotFoundError as _error:
    raise MissingExtra("gcp", "verifying who sent a task from Cloud Tasks") from _error

_log: Final = logging.getLogger("safedefer")

#: Seconds by which clocks may differ.
SKEW: Final = 10.0
#: Seconds between two fetches, whatever asks for them.
REFETCH: Final = 60.0
#: Seconds after which keys are fetched anew, and after which old ones verify nothing: Google changes them within days.
_FRESH: Final = 6 * 3_600.0
_STALE: Final = 86_400.0
_TIMEOUT: Final = (3.05, 5.0)
_MOST_BYTES: Final = 262_144
_MOST_KEYS: Final = 64
#: Characters of a token; Google's have about 1,200.
_LONGEST: Final = 8_192
_LEAST_BITS: Final = 2_048
_ALGORITHM: Final = "RS256"


class PublicKeys:
    """The signer's public keys, fetched when they are needed, at most once a minute.

    Args:
        fetch: Returns the JWK Set (RFC 7517); any exception is a failure.
        clock: Returns seconds since the epoch.
    """

    def __init__(self, fetch: Callable[[], Any], clock: Callable[[], float]) -> None:
        self._fetch = fetch
        self._clock = clock
        self._lock = threading.Lock()
        self._keys: dict[str, Any] = {}
        self._fetched = self._tried = float("-inf")

    def find(self, kid: str) -> Any | None:
        """Return the key of an id; None if the signer has none.

        Raises:
            QueueUnavailable: There are no keys, and none can be fetched now.
        """
        with self._lock:
            now = self._clock()
            if (kid not in self._keys or now - self._fetched > _FRESH) and now - self._tried >= REFETCH:
                self._refetch(now)
            key = self._keys.get(kid) if now - self._fetched <= _STALE else None
            # The last fetch failed: a key that is not here may be a new one.
            if key is None and self._fetched != self._tried:
                raise QueueUnavailable(
                    "the public keys of the sender's tokens cannot be fetched; let this host reach them"
                )
            return key

    def _refetch(self, now: float) -> None:
        self._tried = now
        try:
            self._keys = read_keys(self._fetch())
        except Exception as error:  # noqa: BLE001  # whatever it is, there are no new keys now
            _log.warning("the public keys of OIDC tokens cannot be fetched (%s); trying again", type(error).__name__)
        else:
            self._fetched = now


def read_keys(document: Any) -> dict[str, Any]:
    """Return the keys of a JWK Set that verify RS256, by id; others are left out.

    Raises:
        ValueError: It is no JWK Set, is too long, or has an id twice.
    """
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list) or len(entries) > _MOST_KEYS:
        raise ValueError("no JWK Set")
    keys: dict[str, Any] = {}
    for entry in entries:
        if not isinstance(entry, dict) or entry.get("kty") != "RSA" or entry.get("use", "sig") != "sig":
            continue
        kid = entry.get("kid")
        if not isinstance(kid, str) or entry.get("alg", _ALGORITHM) != _ALGORITHM:
            continue
        if kid in keys:
            raise ValueError("a key id is there twice")
        key = jwt.PyJWK(entry, _ALGORITHM)
        if key.key.key_size >= _LEAST_BITS:
            keys[kid] = key
    return keys


def fetch_keys(url: str) -> Any:
    """Return the JSON document at a URL: no redirects, 256 KiB at most.

    Raises:
        requests.RequestException: It cannot be fetched.
        ValueError: It is none.
    """
    with requests.get(url, timeout=_TIMEOUT, allow_redirects=False, stream=True) as response:
        if response.status_code != requests.codes.ok:
            raise ValueError("no answer of status 200")
        data = response.raw.read(_MOST_BYTES + 1, decode_content=True)
        if len(data) > _MOST_BYTES:
            raise ValueError("too long")
        return json.loads(data)


class SenderCheck:
    """Whether requests come from an account that we know.

    Args:
        keys: The signer's public keys.
        issuers: What ``iss`` may be.
        audiences: What ``aud`` may be.
        emails: What ``email`` may be, verified by the signer.
        clock: Returns seconds since the epoch.
    """

    def __init__(
        self,
        keys: PublicKeys,
        *,
        issuers: Collection[str],
        audiences: Collection[str],
        emails: Collection[str],
        clock: Callable[[], float],
    ) -> None:
        self._keys = keys
        self._issuers = frozenset(issuers)
        self._audiences = frozenset(audiences)
        self._emails = frozenset(emails)
        self._clock = clock

    def allows(self, headers: Mapping[str, str]) -> bool:
        """Whether the request of these headers, whose names are in any case, is such a one.

        Raises:
            QueueUnavailable: The signer's public keys are not known now.
        """
        given = [value for name, value in headers.items() if name.lower() == "authorization"]
        if len(given) != 1 or len(given[0]) > _LONGEST:
            return False
        scheme, _, token = given[0].partition(" ")
        if scheme.lower() != "bearer":
            return False
        claims = self._verified(token)
        return claims is not None and self._are_right(claims)

    def _verified(self, token: str) -> Any | None:
        """Return the payload of a token with a right signature."""
        try:
            header = jwt.get_unverified_header(token)
            kid = header.get("kid")
            if header.get("alg") != _ALGORITHM or not isinstance(kid, str):
                return None
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            return None
        key = self._keys.find(kid)
        if key is None:
            return None
        try:
            # The claims are judged below: this library takes the time from the system, and converts types.
            payload = jwt.PyJWS().decode(token, key, algorithms=[_ALGORITHM])
            return json.loads(payload)
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            return None

    def _are_right(self, claims: Any) -> bool:
        if type(claims) is not dict:
            return False
        now = self._clock()
        issued, expires = claims.get("iat"), claims.get("exp")
        # A bool is an int to isinstance, and 1e400 is inf to JSON: exact types.
        if type(issued) is not int or type(expires) is not int or claims.get("email_verified") is not True:
            return False
        if not issued - SKEW <= now < expires + SKEW:
            return False
        if "nbf" in claims and (type(claims["nbf"]) is not int or now < claims["nbf"] - SKEW):
            return False
        named = (("iss", self._issuers), ("aud", self._audiences), ("email", self._emails))
        return all(type(claims.get(name)) is str and claims[name] in right for name, right in named)
