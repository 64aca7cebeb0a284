"""Every exception of safedefer, in one tree grouped by who can act.

* ``DeferError`` goes to the caller of ``defer()``: the call, the arguments or the options are wrong.
* ``RejectedTask`` is the handler's verdict on a token, reached before any user code runs. It never
  quotes the payload: the text reaches logs and dead letters.
* ``QueueError`` goes to the operator: the queue's storage misbehaves.
* ``ConfigurationError`` goes to whoever starts the process.
* ``PermanentTaskFailure`` and ``SingularTaskFailure`` are raised by user code (App Engine's names).

Every message ends with the remedy, and every class has a ``slug``, its name in kebab case, that is
stable: logs, dead letters and the test vectors use it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

__all__ = [
    "BadSignature", "BadTransactionStateError", "CapabilityExceeded", "ConfigurationError", "DeferError", "Error",
    "ExpiredTask", "InvalidArguments", "InvalidClaims", "InvalidEtaError", "InvalidTaskError",
    "InvalidTaskNameError", "InvalidTaskRetryOptionsError", "InvalidUrlError", "LeaseLost", "MalformedToken",
    "MissingExtra", "NotDeferrable", "NotYetValid", "PermanentTaskFailure", "PolicyViolation", "QueueError",
    "QueueUnavailable", "RejectedTask", "ReplayedTask", "RevokedKey", "SingularTaskFailure",
    "TaskAlreadyExistsError", "TaskTooLargeError", "TombstonedTaskError", "UnencodableArgument", "UnknownKey",
    "UnknownQueueError", "UnresolvableCallable", "WeakKey", "WrongAudience",
]  # fmt: skip


class Error(Exception):
    """Base class for exceptions in this library (App Engine: ``deferred.Error``)."""

    slug: ClassVar[str] = "error"

    def __init_subclass__(cls) -> None:
        """Derive the slug from the name of the class: ``BadSignature`` is ``bad-signature``."""
        super().__init_subclass__()
        cls.slug = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()


# --- To the caller of defer() ---------------------------------------------------------------------


class DeferError(Error):
    """The call cannot be deferred; nothing was enqueued."""


class NotDeferrable(DeferError, TypeError):
    """The object is not one of the documented kinds of callable, or the policy does not admit it.

    ``reason`` (str) is a stable slug such as ``nested-function``, ``lambda`` or ``policy``. ``missing`` (tuple[str, ...]):
    the exact patterns that the policy lacks for the whole call, as far as it could be looked at.
    """

    def __init__(self, message: str, *, reason: str = "unsupported", missing: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.reason = reason
        self.missing = missing


class UnencodableArgument(DeferError, TypeError):
    """An argument cannot arrive equal, of the same type and with the same sharing.

    ``path`` (str) names the value: ``$.args[0].items[3]``. ``missing`` (tuple[str, ...]): as of ``NotDeferrable``.
    """

    def __init__(self, message: str, *, path: str = "$") -> None:
        super().__init__(message)
        self.path = path
        self.missing: tuple[str, ...] = ()


class InvalidTaskError(DeferError, ValueError):
    """An option of the task is wrong (App Engine: ``taskqueue.InvalidTaskError``)."""


class InvalidTaskNameError(InvalidTaskError):
    """The name does not match ``[a-zA-Z0-9_-]{1,500}``."""


class InvalidEtaError(InvalidTaskError):
    """The eta or countdown is naive, not finite, in conflict, or over 30 days ahead."""


class InvalidUrlError(InvalidTaskError):
    """The URL is not a path on this application."""


class InvalidTaskRetryOptionsError(InvalidTaskError):
    """The retry options contradict each other or are out of range."""


class BadTransactionStateError(InvalidTaskError):
    """A transactional task outside a transaction, or one with a name where that cannot be."""


class TaskTooLargeError(DeferError):
    """The token is larger than the limit. ``size`` and ``limit`` (int) are bytes."""

    def __init__(self, message: str, *, size: int = 0, limit: int = 0) -> None:
        super().__init__(message)
        self.size = size
        self.limit = limit


class TaskAlreadyExistsError(DeferError):
    """A task of this name is waiting or running in this queue."""


class TombstonedTaskError(DeferError):
    """A task of this name ended in this queue, and its name is not free again yet."""


class UnknownQueueError(DeferError):
    """The queue is not one of the declared ones."""


# --- In the handler, before any user code ---------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskIdentity:
    """Which task it was, as far as a verified signature says."""

    task_id: str
    audience: str
    kid: str
    callable_name: str = ""


class RejectedTask(Error):
    """The token was refused.

    ``authentic`` (bool): a holder of one of our keys wrote it. ``identity``: which task it was, once
    the signature and the claims have been read; None before. ``is_final`` (bool): it is refused for ever,
    whatever is deployed, and so is a dead letter at once.
    """

    authentic: ClassVar[bool] = False
    identity: TaskIdentity | None = None
    is_final: bool = False


class MalformedToken(RejectedTask):
    """Not three canonical base64url segments, or over the size limit."""


class UnknownKey(RejectedTask):
    """The header is none of the keyring's."""


class RevokedKey(RejectedTask):
    """The signature is right, but its key is revoked."""


class BadSignature(RejectedTask):
    """The MAC does not match (RFC 7515, section 5.2)."""


class WrongAudience(RejectedTask):
    """The token is for another environment, queue, target or URL (RFC 7519, section 4.1.3)."""


class CapabilityExceeded(RejectedTask):
    """The key that signed the token may not sign this queue, callable or content type."""


class ReplayedTask(RejectedTask):
    """The task id is known with another token."""


class _AuthenticRejection(RejectedTask):
    authentic: ClassVar[bool] = True


class InvalidClaims(_AuthenticRejection):
    """The payload is not a valid claims object of this version."""


class NotYetValid(_AuthenticRejection):
    """``nbf`` is in the future (RFC 7519, section 4.1.5). ``retry_after`` (int) is seconds."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ExpiredTask(_AuthenticRejection):
    """``exp`` is past (RFC 7519, section 4.1.4)."""

    is_final = True


class PolicyViolation(_AuthenticRejection):
    """The policy does not admit a callable or class that the token names."""


class UnresolvableCallable(_AuthenticRejection):
    """The reference does not lead back to the same callable of the same kind."""


class InvalidArguments(_AuthenticRejection):
    """The arguments cannot be decoded. ``path`` (str) names the place: ``$.kwargs.when``.

    Made with ``skew``, it may be that another version of the code at this end decodes them, and is not final.
    """

    def __init__(self, message: str, *, path: str = "$", skew: bool = False) -> None:
        super().__init__(message)
        self.path = path
        self.is_final: bool = not skew


# --- To the operator ------------------------------------------------------------------------------


class QueueError(Error):
    """The queue's storage misbehaves."""


class QueueUnavailable(QueueError):
    """The storage cannot be opened, read or written now; nothing was acknowledged."""


class LeaseLost(QueueError):
    """Another dispatcher has the task now; what this one says of it is not taken."""


class ConfigurationError(Error, ValueError):
    """The application is configured wrongly and does not start."""


class WeakKey(ConfigurationError):
    """The secret of a key is too short or looks guessable."""


class MissingExtra(ConfigurationError):
    """An optional dependency is not installed; the message says what to install."""

    def __init__(self, extra: str, purpose: str = "this feature") -> None:
        super().__init__(f"{purpose} needs an optional dependency: pip install 'safedefer[{extra}]'")
        self.extra = extra


# --- Raised by user code --------------------------------------------------------------------------


class PermanentTaskFailure(Error):
    """The task failed and will never succeed (App Engine): it is not tried again."""


class SingularTaskFailure(Error):
    """The task failed once (App Engine): it is tried again, and logged at debug only."""
