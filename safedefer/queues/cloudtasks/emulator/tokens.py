"""OIDC tokens as Google's: RS256 by a key of our own, whose public half is served as a JWK Set."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any, Final

from safedefer.errors import MissingExtra

try:
    import jwt
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        load_pem_private_key,
    )
    from jwt.algorithms import RSAAlgorithm
except ModuleNotFoundError as _error:
    raise MissingExtra("gcp", "the Cloud Tasks emulator") from _error

#: Google's tokens are valid for an hour.
_SECONDS: Final = 3_600
_BITS: Final = 2_048


class TokenSigner:
    """Signs OIDC tokens of service accounts.

    Args:
        pem: The private key; None makes one.
    """

    def __init__(self, pem: str | None = None) -> None:
        if pem is None:
            self._key = rsa.generate_private_key(public_exponent=65_537, key_size=_BITS)
        else:
            loaded = load_pem_private_key(pem.encode(), password=None)
            assert isinstance(loaded, rsa.RSAPrivateKey)  # the journal holds what pem() returned
            self._key = loaded
        public: dict[str, Any] = json.loads(RSAAlgorithm.to_jwk(self._key.public_key()))
        self._kid = sha256(public["n"].encode()).hexdigest()[:40]
        self._jwk = {**public, "kid": self._kid, "alg": "RS256", "use": "sig"}

    def pem(self) -> str:
        """Return the private key."""
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()

    def jwks(self) -> dict[str, Any]:
        """Return the JWK Set (RFC 7517) of the public key."""
        return {"keys": [self._jwk]}

    def token(self, *, email: str, audience: str, issuer: str, now: float) -> str:
        """Return a token, valid for an hour.

        Args:
            email: The service account.
            audience: ``aud``.
            issuer: ``iss``.
            now: Seconds since the epoch.
        """
        subject = str(int(sha256(email.encode()).hexdigest(), 16))[:21]
        claims = {
            "aud": audience,
            "azp": subject,
            "email": email,
            "email_verified": True,
            "exp": int(now) + _SECONDS,
            "iat": int(now),
            "iss": issuer,
            "sub": subject,
        }
        return jwt.encode(claims, self._key, algorithm="RS256", headers={"kid": self._kid})
