"""Verified values: what a handler may run, or fetch, because its signature was verified."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple

from safedefer.claims import BlobPointer, Claims, callable_name
from safedefer.errors import TaskIdentity
from safedefer.policy_cache import Gate
from safedefer.refs import CallableRef


def identify(claims: Claims, kid: str) -> TaskIdentity:
    """Say which task some claims are of, for logs and records."""
    return TaskIdentity(
        task_id=claims["jti"],
        audience=claims["aud"],
        kid=kid,
        callable_name=callable_name(claims["call"]) if "call" in claims else "",
    )


@dataclass(frozen=True, slots=True)
class VerifiedPointer:
    """A verified claim that the task is a stored token. Only ``Verifier`` makes one."""

    claims: Claims = field(repr=False)
    blob: BlobPointer
    kid: str

    @property
    def identity(self) -> TaskIdentity:
        """Which task it is."""
        return identify(self.claims, self.kid)


class VerifiedTask(NamedTuple):
    """A task that a holder of one of our keys signed for us, now, within the policy. Only ``Verifier`` makes one."""

    claims: Claims
    ref: CallableRef
    """What it calls."""
    gate: Gate
    """The policy, within the limits of the key that signed."""
    kid: str
    """The name of that key."""
    token: bytes
    """The token itself."""
    text: bytes
    """The payload as it was signed."""
    canonical: bool
    """Whether it is spelled as ``claims.write_json`` spells it."""

    def __repr__(self) -> str:
        """Show which task it is: logs identify, they do not quote."""
        return f"<VerifiedTask {self.claims['jti']} {self.ref}>"

    @property
    def identity(self) -> TaskIdentity:
        """Which task it is."""
        return identify(self.claims, self.kid)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the token: what the ledger knows it by."""
        return sha256(self.token).digest()
