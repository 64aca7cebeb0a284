"""Signing and verifying tasks.

``Verifier.verify`` is the one function that turns unverified bytes into a verified task. It reads in
the order in which it checks:

1. shape and size;
2. the key, by its ``kid``;
3. the MAC, over the raw bytes. From here on every byte was written by a holder of our key;
4. the claims;
5. the audience and the time, and what the key may sign (in a re-run, also what the first task's key may);
6. the policy, by name. Nothing was imported, and no argument decoded.
"""

from __future__ import annotations

from collections.abc import Container
from hashlib import sha256
from typing import Final, final

from safedefer.claims import LEEWAY, Claims, read_claims, split_audience, write_json
from safedefer.errors import (
    CapabilityExceeded,
    ExpiredTask,
    InvalidClaims,
    NotDeferrable,
    NotYetValid,
    PolicyViolation,
    RejectedTask,
    RevokedKey,
    TaskTooLargeError,
    UnknownKey,
    UnknownQueueError,
    WrongAudience,
)
from safedefer.keys import Key, Keyring, KeyState
from safedefer.options import Limits, Serves
from safedefer.policy import Policy
from safedefer.policy_cache import Gate, PolicyCache
from safedefer.refs import reference
from safedefer.task import VerifiedPointer, VerifiedTask, identify
from safedefer.token import Token

#: What a pointer and the stored token that it points to do not have in common.
_OF_ONE_TOKEN: Final = frozenset({"iat", "call", "args", "kwargs", "blob"})


@final
class Signer:
    """Signs claims with the active key, within what that key may sign.

    Args:
        keyring: The keys.
        policy: What may be deferred.
        limits: Bounds; ``token_bytes`` is checked here.
    """

    def __init__(self, keyring: Keyring, policy: Policy, *, limits: Limits) -> None:
        self._keyring = keyring
        self._max_bytes = limits.token_bytes
        self.gate: Gate = _gate(policy, keyring.active)
        """What codecs ask: the policy within the limits of the active key."""

    def sign(self, claims: Claims) -> bytes:
        """Return the token of some claims, which were put together from checked parts: their shape is not checked again.

        Raises:
            TaskTooLargeError: The token is over the limit.
            UnknownQueueError: The active key may not sign for the queue.
            NotDeferrable: The active key may not sign pickled arguments.
            CapabilityExceeded: The claims re-run a task, which the active key may not sign.
        """
        key = self._keyring.active
        if "root" in claims:
            _check_may_sign_root(key)
        if key.queues is not None and (queue := split_audience(claims["aud"])[1]) not in key.queues:
            raise UnknownQueueError(f"key {key.kid} may not sign for the queue {queue!a}; use another queue or key")
        if claims["cty"] == "pickle" and not key.pickle:
            raise NotDeferrable(
                f"key {key.kid} may not sign pickled arguments; make it Key(..., pickle=True), or send typed ones",
                reason="pickle-off",
            )
        try:
            payload = write_json(claims)
        except TypeError:  # deeper than the writer goes: the codec's limits are below this, unless they were raised
            raise TaskTooLargeError("the arguments nest too deeply; pass an id instead of the data") from None
        token = self._keyring.sign(payload)
        if len(token) > self._max_bytes:
            raise TaskTooLargeError(
                f"the task is {len(token)} bytes signed, over the limit of {self._max_bytes}; "
                "store the data and pass its id",
                size=len(token),
                limit=self._max_bytes,
            )
        return token


@final
class Verifier:
    """Turns bytes into verified tasks.

    Args:
        keyring: The keys.
        policy: What may run.
        serves: The environment, queues and targets that this handler answers to.
        allow_pickle: Whether pickled arguments are let through to the pickle codec.
        limits: Bounds; ``token_bytes`` is checked here.
    """

    def __init__(
        self, keyring: Keyring, policy: Policy, *, serves: Serves, allow_pickle: bool = False, limits: Limits
    ) -> None:
        self._keyring = keyring
        self._serves = serves
        self._allow_pickle = allow_pickle
        self._max_bytes = limits.token_bytes
        # A revoked key's patterns may name what is gone: they are not read.
        keys = (key for key in keyring.keys if key.state is not KeyState.REVOKED)
        self._gates: dict[str, Gate] = {key.kid: _gate(policy, key) for key in keys}
        self._keys = {key.kid: key for key in keyring.keys}

    def load(self) -> None:
        """Load the policy and the patterns of the keys, when a handler starts. Raises ``ConfigurationError``."""
        for gate in self._gates.values():
            gate.load()

    def verify(
        self, data: bytes, url: str | Container[str], now: float, queue: str | None = None, *, expired: bool = False
    ) -> VerifiedTask | VerifiedPointer:
        """Verify a token.

        Args:
            data: The raw bytes.
            url: The path on which they came, or the paths that would do.
            now: Seconds since the epoch.
            queue: The queue that a request header names, if one does; it must agree.
            expired: Whether a task passes whose time is over, or has not come: it is looked at, not run.

        Returns:
            The task, or the pointer to it.

        Raises:
            RejectedTask: One of its subclasses, by the first check that fails.
        """
        # (1) Shape and size.
        token = Token.parse(data, self._max_bytes)
        # (2) The key, by its kid, and (3) the MAC over the raw bytes.
        key, payload = self._keyring.verify(token)
        # From here on every byte was written by a holder of our key. (4) The claims.
        claims, canonical = read_claims(payload)
        try:
            # (5) The audience, what the key may sign, and the time.
            environment, named, target, path = split_audience(claims["aud"])
            serves = self._serves
            if (
                environment != serves.environment
                or (serves.queues is not None and named not in serves.queues)
                or (serves.targets is not None and target not in serves.targets)
                or (path != url if isinstance(url, str) else path not in url)
                or (queue is not None and queue != named)
            ):
                raise WrongAudience("the token is for another environment, queue, target or URL; post it there")
            _check_key(key, named, claims["cty"])
            if claims["cty"] == "pickle" and not self._allow_pickle:
                raise PolicyViolation("pickled arguments are off; start the handler with allow_pickle=True if trusted")
            # Whose limits hold inside the task. A key that signs a root has none of its own.
            limits = key if "root" not in claims else self._root_key(key, claims, named)
            if not expired:
                check_begun(claims, now)
                if is_over(claims, now):
                    raise ExpiredTask("the task's time is over; re-run it from the dead letters if it is still wanted")
            if "call" not in claims:
                return VerifiedPointer(claims=claims, blob=claims["blob"], kid=key.kid)
            # (6) The policy, within the limits of the key.
            call, gate = claims["call"], self._gates[limits.kid]
            ref = reference(call["kind"], call["module"], call["qualname"], call.get("member"))
            gate.check(ref)
        except RejectedTask as error:
            error.identity = identify(claims, key.kid)
            raise
        # By __new__, for a call of the class packs the names into a dict first: 3,500 instructions of 100,000.
        return VerifiedTask.__new__(
            VerifiedTask, claims=claims, ref=ref, gate=gate, kid=key.kid, token=data, text=payload, canonical=canonical
        )

    def authenticate(self, data: bytes) -> Claims:
        """Return the claims of a token that one of our keys signed and may sign: steps 1 to 4, and the key's limits.

        It says nothing of audience, time and policy: nothing may run by it. A dispatcher learns from it what was
        signed, before it sends a request.

        Raises:
            RejectedTask: One of its subclasses, by the first check that fails.
        """
        token = Token.parse(data, self._max_bytes)
        key, payload = self._keyring.verify(token)
        claims, _ = read_claims(payload)
        try:
            _check_key(key, split_audience(claims["aud"])[1], claims["cty"])
        except CapabilityExceeded as error:
            error.identity = identify(claims, key.kid)
            raise
        return claims

    def verify_stored(
        self, pointer: VerifiedPointer, data: bytes, *, url: str | Container[str], now: float, expired: bool = False
    ) -> VerifiedTask:
        """Verify the stored token that a pointer names: length and hash first, then as any token.

        Raises:
            InvalidClaims: It is not the token that the pointer names, or is a pointer itself.
            RejectedTask: As ``verify``.
        """
        # Both are public to whoever writes the store, so a plain comparison gives nothing away.
        if len(data) != pointer.blob["length"] or sha256(data).hexdigest() != pointer.blob["sha256"]:
            raise InvalidClaims("the stored token is not the one that was pointed to; restore the blob from a backup")
        task = self.verify(data, url=url, now=now, expired=expired)
        if not isinstance(task, VerifiedTask):
            raise InvalidClaims("a stored token points to another one; store the task itself")
        if shared_claims(task.claims) != shared_claims(pointer.claims):
            raise InvalidClaims("a stored token and its pointer disagree; sign both with the same claims")
        return task

    def _root_key(self, key: Key, claims: Claims, queue: str) -> Key:
        """Return the key that signed the first task of a chain of re-runs, within whose limits all of them are.

        Raises:
            CapabilityExceeded: The key that signed the re-run is limited itself, or that of the root may not sign it.
            UnknownKey: The root's key is not in the ring: taking a key out must not lift its limits.
            RevokedKey: The root's key is revoked.
        """
        _check_may_sign_root(key)
        kid = claims["root"]["kid"]
        root = self._keys.get(kid)
        if root is None:
            raise UnknownKey(f"the root's key {kid} is not in this ring; add it, as verify_only")
        if root.state is KeyState.REVOKED:
            raise RevokedKey(f"the root's key {kid} is revoked; defer the task anew if it was wanted")
        _check_key(root, queue, claims["cty"])
        return root


def _check_key(key: Key, queue: str, cty: str) -> None:
    """Check what a key may sign. Raises ``CapabilityExceeded``."""
    if key.queues is not None and queue not in key.queues:
        raise CapabilityExceeded(f"key {key.kid} may not sign for this queue; use another key")
    if cty == "pickle" and not key.pickle:
        raise CapabilityExceeded(f"key {key.kid} may not sign pickled arguments; use another key")


def check_begun(claims: Claims, now: float) -> None:
    """Check that a task's time has come. Raises ``NotYetValid``, with the seconds until then."""
    soon = now + LEEWAY
    if claims["nbf"] > soon or claims["iat"] > soon:
        ahead = max(claims["nbf"], claims["iat"]) - soon
        raise NotYetValid("the task is not due yet; send it again later", retry_after=int(ahead) + 1)


def is_over(claims: Claims, now: float) -> bool:
    """Whether a task's time is over."""
    return now > claims["exp"] + LEEWAY


def shared_claims(claims: Claims) -> dict[str, object]:
    """Return what a pointer and the stored token that it points to have in common."""
    return {name: value for name, value in claims.items() if name not in _OF_ONE_TOKEN}


def _check_may_sign_root(key: Key) -> None:
    # Whoever signs a root says whose limits hold.
    if key.queues is not None or key.patterns is not None:
        raise CapabilityExceeded(
            f"key {key.kid} is limited to queues or patterns and may not sign re-runs; sign with a key without limits"
        )


def _gate(policy: Policy, key: Key) -> Gate:
    return PolicyCache(policy if key.patterns is None else policy.restricted(key.patterns))
