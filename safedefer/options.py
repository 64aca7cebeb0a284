"""Options of ``defer()`` and the task that it returns; ``Limits`` of tokens and arguments at both ends, and how far ahead an eta is."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Final, Literal, Self, TypeAlias

from safedefer.errors import (
    ConfigurationError,
    InvalidEtaError,
    InvalidTaskError,
    InvalidTaskNameError,
    InvalidTaskRetryOptionsError,
    InvalidUrlError,
)

#: No task may be due later than this many seconds from now (App Engine: 30 days).
MAX_ETA: Final = 30 * 86_400
#: No attempt may take longer than this many seconds.
MAX_DEADLINE: Final = 86_400
#: Bytes of a token above which it is stored as a blob beside the queue.
INLINE_LIMIT: Final = 10 * 1024
#: Where tasks are posted unless told otherwise (App Engine ``deferred``).
DEFAULT_URL: Final = "/_ah/queue/deferred"
DEFAULT_QUEUE: Final = "default"
DEFAULT_TARGET: Final = "default"
#: Begins the URL of a queue, which its name ends (App Engine: ``/_ah/queue/<queue>``).
QUEUE_URLS: Final = "/_ah/queue/"
#: How long a unique task is looked for.
UniqueUntil: TypeAlias = Literal["end", "start"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds that are checked before the work is done, on both ends."""

    token_bytes: int = 1_048_576
    """Length of a token, in bytes; an App takes at most 2 MiB."""
    depth: int = 64
    """How deep values may nest."""
    items: int = 100_000
    """How many values a task's arguments may hold, at all depths together."""
    int_digits: int = 4_300
    """Decimal digits of an integer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serves:
    """What a handler answers to. ``None`` is "any": no list was configured.

    Raises:
        ConfigurationError: ``queues`` or ``targets`` is one text.
    """

    environment: str
    queues: Collection[str] | None = None
    targets: Collection[str] | None = None

    def __post_init__(self) -> None:
        """Refuse a text in place of a list: ``in`` would look for parts of it."""
        if isinstance(self.queues, str) or isinstance(self.targets, str):
            raise ConfigurationError("queues and targets are lists of names, not one text; write ['default']")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRetryOptions:
    """When a failed task is tried again, and when it no longer is (App Engine ``TaskRetryOptions``).

    None stands for "not given": the queue's own value, then the default, is used.

    Raises:
        InvalidTaskRetryOptionsError: A value is negative, not a number, or the two backoffs contradict.
    """

    min_backoff_seconds: float | None = None
    """Seconds before the first retry; 0.1 by default."""
    max_backoff_seconds: float | None = None
    """Seconds before any retry at most; 3,600 by default."""
    task_age_limit: float | None = None
    """Seconds from the task's eta; with a retry limit too, both must be exceeded."""
    max_doublings: int | None = None
    """How often the interval doubles before it grows linearly; 16 by default."""
    task_retry_limit: int | None = None
    """Retries after the first attempt; 0 is none."""

    def __post_init__(self) -> None:
        """Check every value, and the values against each other."""
        for item in fields(self):
            _check_number(item.name, getattr(self, item.name), whole=item.name in _WHOLE)
        low, high = self.min_backoff_seconds, self.max_backoff_seconds
        if low is not None and high is not None and low > high:
            raise InvalidTaskRetryOptionsError("min_backoff_seconds is above max_backoff_seconds; swap them")

    def given(self) -> dict[str, float]:
        """Return the values that were given, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    @classmethod
    def from_given(cls, values: Mapping[str, float]) -> Self:
        """Build from what ``given`` returned.

        Raises:
            InvalidTaskRetryOptionsError: A name is unknown or a value wrong.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise InvalidTaskRetryOptionsError("retry options have an unknown name; use those of TaskRetryOptions")
        return cls(**values)  # type: ignore[arg-type]  # whole numbers are checked in __post_init__


_MAX_NUMBER: Final = 2**31 - 1
_WHOLE: Final = frozenset({"max_doublings", "task_retry_limit"})


def _check_number(name: str, value: object, *, whole: bool) -> None:
    if value is None:
        return
    right = type(value) is int or (not whole and type(value) is float)
    # A comparison with NaN is false, and one with a huge integer does not overflow.
    if not right or not 0 <= value <= _MAX_NUMBER:  # type: ignore[operator]  # a number, by the line above
        kind = "a whole number" if whole else "a number of seconds"
        raise InvalidTaskRetryOptionsError(f"{name} must be {kind} between 0 and {_MAX_NUMBER}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How and when a task is delivered: the ``_options`` of ``defer()``, without their underscore.

    Raises:
        InvalidTaskError: One of its subclasses names the option that is wrong.
    """

    countdown: float | None = None
    """Seconds from now; not together with ``eta``. At most 30 days."""
    eta: datetime | None = None
    """When the task is due, aware. A time in the past is now."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further request headers of the delivery."""
    name: str | None = None
    """``[a-zA-Z0-9_-]{1,500}``: no two tasks of a queue have the same, for days after the first ended."""
    queue: str = DEFAULT_QUEUE
    retry_options: TaskRetryOptions | None = None
    target: str | None = None
    """Which handler: a name that the dispatcher knows the address of."""
    transactional: bool = False
    """Enqueue with the current transaction, if it commits."""
    unique: bool | Sequence[str] = False
    """Return the task of the same call and destination that waits or runs already, if there is one. Names of parameters:
    calls with the same values of these arguments are the same."""
    unique_until: UniqueUntil = "end"
    """``start``: a unique task is looked for only until its first delivery begins."""
    url: str | None = DEFAULT_URL
    """The path that the task is posted to; None is the queue's own, ``/_ah/queue/<queue>``."""
    deadline: float | None = None
    """Seconds that one attempt may take, from 1 to 86,400; None is the queue's own."""
    pickle: bool = False
    """Carry the arguments as a pickle. Both ends and the key must allow it."""

    def __post_init__(self) -> None:
        """Check every option by itself."""
        if self.name is not None and (type(self.name) is not str or _NAME.fullmatch(self.name) is None):
            raise InvalidTaskNameError("a task's name is 1 to 500 characters of A-Z a-z 0-9 _ -")
        for part, value in (("queue", self.queue), ("target", self.target)):
            if value is not None and (type(value) is not str or _PART.fullmatch(value) is None):
                raise InvalidTaskError(f"the {part} is 1 to 100 characters of A-Z a-z 0-9 . -, not {value!a:.120}")
        if self.retry_options is not None and not isinstance(self.retry_options, TaskRetryOptions):
            raise InvalidTaskRetryOptionsError(
                f"retry_options is a {type(self.retry_options).__module__}.{type(self.retry_options).__qualname__}; "
                "use safedefer.TaskRetryOptions, which is deferred.TaskRetryOptions too"
            )
        for flag in ("transactional", "pickle"):
            if type(getattr(self, flag)) is not bool:
                raise InvalidTaskError(f"{flag} is True or False")
        object.__setattr__(self, "unique", _check_unique(self.unique, self.unique_until))
        if self.unique and self.name is not None:
            raise InvalidTaskError("a unique task has no name; leave one of the two out")
        _check_url(self.url)
        _check_deadline(self.deadline)
        _check_eta(self.countdown, self.eta)
        object.__setattr__(self, "headers", _check_headers(self.headers))

    def due(self, now: float) -> float:
        """Return when the task is due, in seconds since the epoch; ``now`` if that is past.

        Raises:
            InvalidEtaError: It is more than 30 days ahead.
        """
        eta = now + (self.countdown or 0) if self.eta is None else self.eta.timestamp()
        if eta > now + MAX_ETA:
            raise InvalidEtaError("a task is due within 30 days; let a task defer the next one for later times")
        return max(eta, now)

    @property
    def path(self) -> str:
        """The path that the task is posted to."""
        return f"{QUEUE_URLS}{self.queue}" if self.url is None else self.url


_NAME: Final = re.compile("[a-zA-Z0-9_-]{1,500}")
_PART: Final = re.compile("[A-Za-z0-9.-]{1,100}")
# Printable ASCII without # and ?: an audience names a path.
_PATH: Final = re.compile(r"/[!\"$->@-~]{0,2047}")
_HEADER_NAME: Final = re.compile("[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}")
_HEADER_VALUE: Final = re.compile("[\t -~]{0,4096}")
#: Headers that the delivery itself writes, or that would change where or how a request arrives.
_RESERVED_HEADERS: Final = frozenset(
    {"host", "connection", "content-length", "content-type", "content-encoding", "expect", "keep-alive", "te"}
    | {"trailer", "transfer-encoding", "upgrade", "proxy-authorization", "proxy-connection", "traceparent"}
)
_RESERVED_PREFIXES: Final = ("x-appengine-", "x-cloudtasks-", "x-google-", "safedefer-")


def _check_url(url: str | None) -> None:
    if url is None:
        return
    if type(url) is not str or not url.startswith("/") or url.startswith("//"):
        raise InvalidUrlError("a task's URL is a path of this application, such as /tasks/mail; use target for others")
    if _PATH.fullmatch(url) is None:
        raise InvalidUrlError("a task's URL is a path of printable ASCII without query or fragment; pass arguments")


def _check_unique(unique: object, until: object) -> bool | tuple[str, ...]:
    if until not in ("end", "start"):
        raise InvalidTaskError('unique_until is "end" or "start"')
    if until == "start" and not unique:
        raise InvalidTaskError('unique_until="start" is for a unique task; give unique, too')
    if isinstance(unique, bool):
        return unique
    names = [name for name in unique if isinstance(name, str)] if isinstance(unique, tuple | list) else []
    if not names or len(names) != len(unique) or not all(map(str.isidentifier, names)):  # type: ignore[arg-type]
        raise InvalidTaskError('unique is True, False, or names of parameters such as ("order_id",)')
    return tuple(sorted(set(names)))


def _check_deadline(deadline: object) -> None:
    if deadline is None:
        return
    number = type(deadline) is int or type(deadline) is float
    # A comparison with NaN is false, and one with a huge integer does not overflow.
    if not number or not 1 <= deadline <= MAX_DEADLINE:  # type: ignore[operator]  # a number, by the line above
        raise InvalidTaskError(
            f"deadline is a number of seconds from 1 to {MAX_DEADLINE}; split longer work into tasks"
        )


def _check_eta(countdown: object, eta: object) -> None:
    if countdown is not None and eta is not None:
        raise InvalidEtaError("give countdown or eta, not both")
    if countdown is not None:
        if type(countdown) is not int and type(countdown) is not float:
            raise InvalidEtaError("countdown is a number of seconds")
        # False for NaN, and no huge integer overflows. The lower bound is as arbitrary as any: the past is now.
        if not -MAX_ETA <= countdown <= MAX_ETA:
            raise InvalidEtaError("countdown is at most 30 days, in seconds; let a task defer the next one")
    if eta is not None:
        if not isinstance(eta, datetime):
            raise InvalidEtaError("eta is a datetime; use countdown for seconds from now")
        if eta.utcoffset() is None:
            raise InvalidEtaError(
                "eta has no time zone (App Engine took it for local time); "
                "write datetime.now(timezone.utc) + timedelta(...), or use countdown"
            )


def _check_headers(headers: object) -> dict[str, str]:
    if headers is None:
        return {}
    if not isinstance(headers, Mapping):
        raise InvalidTaskError("headers is a dict of str to str")
    for name, value in headers.items():
        if type(name) is not str or _HEADER_NAME.fullmatch(name) is None:
            raise InvalidTaskError("the name of a header is a token of RFC 9110, 1 to 256 characters")
        if type(value) is not str or _HEADER_VALUE.fullmatch(value) is None:
            raise InvalidTaskError(f"the value of the header {name} is printable ASCII, at most 4,096 characters")
        if name.lower() in _RESERVED_HEADERS or name.lower().startswith(_RESERVED_PREFIXES):
            raise InvalidTaskError(f"the header {name} is written by the delivery; choose another name")
    if len({name.lower() for name in headers}) != len(headers):
        raise InvalidTaskError("two headers differ in case only; give each one name")
    return dict(headers)


#: Those of a call that was given none.
DEFAULT_OPTIONS: Final = Options()


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One call to make later, as ``defer()`` accepted it (App Engine ``taskqueue.Task``)."""

    id: str
    """The task's id: the token's ``jti``."""
    name: str | None
    queue_name: str
    url: str
    target: str
    headers: Mapping[str, str]
    """The request headers that the dispatcher will send, without those of the attempt."""
    payload: bytes = field(repr=False)
    """What will be POSTed: the signed token, or the signed pointer to it."""
    eta: datetime
    """When the task is due, aware, in UTC."""
    retry_options: TaskRetryOptions | None
    was_enqueued: bool
    """False for a transactional task whose transaction has not been committed yet."""

    @property
    def size(self) -> int:
        """Length of the payload, in bytes."""
        return len(self.payload)

    @property
    def eta_posix(self) -> float:
        """The eta in seconds since the epoch (App Engine ``Task.eta_posix``)."""
        return self.eta.timestamp()
