"""Claims: the signed facts about a task, as one JSON object, and its one spelling.

The payload of a token is one JSON object (RFC 7519, section 4), which pydantic parses and validates in one
step: unknown members, null for an absent claim, floats for integers and strings for numbers are refused.
Duplicate members are refused at every depth: what we wrote is known by writing it again, and other
spellings are parsed with every name compared. The parser is jiter, pydantic's own, for both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import lru_cache
from gc import get_referents
from typing import Annotated, Any, Final, Literal, NoReturn, Required, Self

import jiter
import orjson
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from safedefer.errors import (
    InvalidClaims,
    InvalidEtaError,
    InvalidTaskError,
    InvalidTaskNameError,
    InvalidTaskRetryOptionsError,
    InvalidUrlError,
)
from safedefer.refs import UNBOUND, KindName, MemberName, ModuleName, Qualname

#: The version of the claims that this library writes and reads.
VERSION: Final = 1
#: Clocks of two machines may differ by this many seconds (RFC 7519, sections 4.1.4 and 4.1.5).
LEEWAY: Final = 10
#: A task expires this many seconds after its eta, unless its ``task_age_limit`` is longer.
LIFETIME: Final = 31 * 86_400
#: No task lives longer than this many seconds after its eta.
MAX_LIFETIME: Final = 92 * 86_400

#: No task may be due later than this many seconds from now (App Engine: 30 days).
MAX_ETA: Final = 30 * 86_400
#: Where tasks are posted unless told otherwise (App Engine ``deferred``).
DEFAULT_URL: Final = "/_ah/queue/deferred"
DEFAULT_QUEUE: Final = "default"
DEFAULT_TARGET: Final = "default"

TaskId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{16,64}$")]
TaskName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,500}$")]
AudiencePart = Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]{1,100}$")]
Audience = Annotated[
    str,
    Field(
        # A path of printable ASCII, without ? and #, that cannot be taken for another host ("//host/path").
        pattern=(
            r"^[A-Za-z0-9.-]{1,100}:[A-Za-z0-9.-]{1,100}:[A-Za-z0-9.-]{1,100}"
            # \x22 is a quotation mark, which ECMAScript does not let a backslash stand before.
            r":/([!\x22$-.0->@-~][!\x22$->@-~]{0,2046})?$"
        )
    ),
]
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}$")]
HeaderValue = Annotated[str, Field(pattern=r"^[\t -~]{0,4096}$")]
TraceParent = Annotated[str, Field(pattern=r"^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# The last second of the year 9999; what no datetime can say is no time.
NumericDate = Annotated[int, Field(ge=0, le=253_402_300_799)]

_STRICT: Final = ConfigDict(strict=True, frozen=True, extra="forbid", hide_input_in_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds that are checked before the work is done, on both ends."""

    token_bytes: int = 1_048_576
    """Length of a token, in bytes."""
    depth: int = 64
    """How deep values may nest."""
    items: int = 100_000
    """How many values a task's arguments may hold, at all depths together."""
    int_digits: int = 4_300
    """Decimal digits of an integer."""


@with_config(_STRICT)
class Call(TypedDict, total=False):
    """The ``call`` claim: a reference, and the typed value of the object that it is bound to."""

    kind: Required[KindName]
    module: Required[ModuleName]
    qualname: Required[Qualname]
    member: MemberName
    bound: Annotated[Any, Field(description="A typed value; absent where the kind needs none.")]


@with_config(_STRICT)
class BlobPointer(TypedDict):
    """The ``blob`` claim: where the token of an oversize task is, and what it must be."""

    id: TaskId
    sha256: Sha256
    length: Annotated[int, Field(ge=1)]


@with_config(_STRICT)
class Claims(TypedDict, total=False):
    """The payload of a task token: either ``call``, ``args`` and ``kwargs``, or ``blob``."""

    # In the order in which they are written. An absent claim is an absent member, never null.
    v: Required[Literal[1]]
    jti: Required[TaskId]
    iat: Required[NumericDate]
    nbf: Required[NumericDate]
    exp: Required[NumericDate]
    aud: Required[Audience]
    cty: Required[Literal["typed", "pickle"]]
    name: TaskName
    call: Call
    args: list[Any]
    kwargs: dict[str, Any]
    blob: BlobPointer
    retry_of: TaskId
    headers: dict[HeaderName, HeaderValue]
    trace: TraceParent


#: The adapter that validates the claims of every token.
CLAIMS: Final[TypeAdapter[Claims]] = TypeAdapter(Claims)
_validate: Final[Callable[[Any], Claims]] = CLAIMS.validator.validate_python
_parse: Final[Callable[[bytes], Claims]] = CLAIMS.validator.validate_json

_NAMES: Final = frozenset({"kind", "module", "qualname"})
#: By kind, the members that a call has.
_MEMBERS: Final = {
    "function": _NAMES,
    "class": _NAMES,
    "instance": _NAMES | {"bound"},
    "method": _NAMES | {"member", "bound"},
    "classmethod": _NAMES | {"member"},
    "builtin": _NAMES,
    "builtin_method": _NAMES | {"member", "bound"},
}
_TASK: Final = frozenset({"call", "args", "kwargs"})


def read_claims(payload: bytes) -> tuple[Claims, bool]:
    """Parse and validate a payload whose signature was verified: pydantic does both in one step.

    Returns:
        The claims, and whether the payload is canonical: spelled as ``write_json`` spells it, and not deep.

    Raises:
        InvalidClaims: It is not strict JSON, has a duplicate, unknown, missing or null member,
            or a member of another type or shape. The message names members, never values.
    """
    try:
        claims = _parse(payload) if len(payload) <= SHORT else _validate(_load(payload))
        # If writing what was read gives back the text, no member of it was a duplicate and no number was rounded.
        if orjson.dumps(claims, None, _WRITE) == payload:
            _check_shape(claims)
            return claims, True
    except (ValueError, TypeError):  # a ValidationError is a ValueError; an InvalidClaims is not
        pass
    claims = _read_strictly(payload)
    _check_shape(claims)
    return claims, False


#: Up to this many bytes pydantic's own parser is the faster one. What nests in so few, it reads; the codec judges how deep.
SHORT: Final = 512
#: How deep brackets nest in a longer text that is known as canonical: what 64 plain values and the claims take.
CANONICAL_BRACKETS: Final = 66
# In a longer text than this it costs as much to count brackets as to look at the document.
_LONG: Final = 16_384


def _load(payload: bytes) -> Any:
    """Parse a longer payload with orjson, which is believed only as far as its writer proves it.

    Raises:
        ValueError: It is not JSON, or is deep: jiter says how deep it may be.
    """
    document = orjson.loads(payload)
    many = len(payload) >= _LONG or payload.count(b"[") + payload.count(b"{") > CANONICAL_BRACKETS
    if many and is_deeper([document], CANONICAL_BRACKETS):
        raise ValueError("deep")
    return document


def is_deeper(values: Sequence[object], levels: int) -> bool:
    """Whether lists and dicts nest more than ``levels`` deep in a sequence of trees of JSON; those in it are the first."""
    level = values
    for _ in range(levels):
        # Lists and dicts show what they hold to the garbage collector: one step in C a level.
        level = get_referents(*level)
        if not level:
            return False
    return any(type(value) is list or type(value) is dict for value in level)


def _read_strictly(payload: bytes) -> Claims:
    """Parse what others minted, who may spell it otherwise: with every name compared."""
    try:
        raw = jiter.from_json(payload, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError:
        # `from None`: the parser's message quotes a duplicate member's name.
        raise InvalidClaims("the payload is not strict JSON; mint tokens with a strict JSON writer") from None
    if type(raw) is not dict:
        raise InvalidClaims("the payload is not an object; mint tokens as schema/README.md says")
    if type(raw.get("v")) is not int:  # pydantic takes true and 1.0 for the Literal 1
        raise InvalidClaims("v is not an integer; write the version of the claims as 1")
    try:
        return _validate(raw)
    except ValidationError as error:
        # `from None`: the error holds the claims.
        raise InvalidClaims(f"claims are wrong: {_summary(error)}; see schema/README.md") from None


def _check_shape(claims: Claims) -> None:
    """Check what spans several claims.

    Raises:
        InvalidClaims: Times are out of order or too far apart, call and blob are not alternatives, or a call
            lacks what its kind needs.
    """
    if "call" in claims and "args" in claims and "kwargs" in claims and "blob" not in claims:
        call = claims["call"]
        if call.keys() != _MEMBERS[call["kind"]]:
            _refuse_members(call)
        if call.get("bound", UNBOUND) is None:
            raise InvalidClaims("the call has a null member; leave absent members out")
    elif "blob" not in claims or not _TASK.isdisjoint(claims):
        raise InvalidClaims("claims need either call, args and kwargs, or blob alone; write one of the two")
    if not claims["nbf"] <= claims["exp"] <= claims["nbf"] + MAX_LIFETIME:
        raise InvalidClaims("exp must lie between nbf and 92 days after it; mint a token with such times")


def _refuse_members(call: Call) -> NoReturn:
    if ("member" in call) is not ("member" in _MEMBERS[call["kind"]]):
        raise InvalidClaims(
            "call.member is for methods, class methods and built-in methods; add it there, drop it elsewhere"
        )
    raise InvalidClaims("call.bound is for instances, methods and built-in methods; add it there, drop it elsewhere")


@lru_cache(maxsize=256)
def split_audience(audience: str) -> tuple[str, str, str, str]:
    """Return the environment, queue, target and URL path of an ``aud`` claim."""
    environment, queue, target, url = audience.split(":", 3)
    return environment, queue, target, url


def callable_name(call: Call) -> str:
    """Return ``module:qualname`` or ``module:qualname.member``, as a reference says it."""
    name = f"{call['module']}:{call['qualname']}"
    return f"{name}.{call['member']}" if "member" in call else name


def write_json(document: Any) -> bytes:
    """Return the canonical text of a JSON document: compact, members in their order, shortest numbers.

    Raises:
        TypeError: Something in it is not plain JSON.
    """
    return orjson.dumps(document, None, _WRITE)


# Nothing but JSON's own types is written, and no integer that another parser could not keep.
_WRITE: Final = (
    orjson.OPT_PASSTHROUGH_DATACLASS
    | orjson.OPT_PASSTHROUGH_DATETIME
    | orjson.OPT_PASSTHROUGH_SUBCLASS
    | orjson.OPT_STRICT_INTEGER
)


def _summary(error: ValidationError) -> str:
    """Name what is wrong by place and kind; the input is not quoted, an unknown member's name neither."""
    found = []
    for item in error.errors(include_url=False, include_context=False, include_input=False)[:3]:
        place = ".".join(str(part) for part in item["loc"][:1]) if item["type"] != "extra_forbidden" else "a member"
        found.append(f"{place} ({item['type']})")
    return ", ".join(found)


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
    unique: bool = False
    """Return the task of the same call and destination that waits or runs already, if there is one."""
    url: str | None = DEFAULT_URL
    """The path that the task is posted to; None is the queue's own, ``/_ah/queue/<queue>``."""
    pickle: bool = False
    """Carry the arguments as a pickle. Both ends and the key must allow it."""

    def __post_init__(self) -> None:
        """Check every option by itself."""
        if self.name is not None and (type(self.name) is not str or _NAME.fullmatch(self.name) is None):
            raise InvalidTaskNameError("a task's name is 1 to 500 characters of A-Z a-z 0-9 _ -")
        for part, value in (("queue", self.queue), ("target", self.target)):
            if value is not None and (type(value) is not str or _PART.fullmatch(value) is None):
                raise InvalidTaskError(f"the {part} is 1 to 100 characters of A-Z a-z 0-9 . -")
        if self.retry_options is not None and not isinstance(self.retry_options, TaskRetryOptions):
            raise InvalidTaskRetryOptionsError("retry_options is a TaskRetryOptions object")
        for flag in ("transactional", "unique", "pickle"):
            if type(getattr(self, flag)) is not bool:
                raise InvalidTaskError(f"{flag} is True or False")
        if self.unique and self.name is not None:
            raise InvalidTaskError("a unique task has no name; leave one of the two out")
        _check_url(self.url)
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
        return f"/_ah/queue/{self.queue}" if self.url is None else self.url


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
