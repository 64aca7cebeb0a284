"""Claims: the signed facts about a task, as one JSON object, and its one spelling.

The payload of a token is one JSON object (RFC 7519, section 4), which pydantic parses and validates in one
step: unknown members, null for an absent claim, floats for integers and strings for numbers are refused.
Duplicate members are refused at every depth: what we wrote is known by writing it again, and other
spellings are parsed by jiter with every name compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from gc import get_referents
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Required, cast

import jiter
import orjson
from pydantic import ConfigDict, Field, ValidationError, with_config
from typing_extensions import TypedDict

from safedefer.errors import InvalidClaims
from safedefer.refs import KindName, MemberName, ModuleName, Qualname

if TYPE_CHECKING:
    from pydantic import TypeAdapter

#: Clocks of two machines may differ by this many seconds (RFC 7519, sections 4.1.4 and 4.1.5).
LEEWAY: Final = 10
#: No task lives longer than this many seconds after its eta.
MAX_LIFETIME: Final = 92 * 86_400
#: No attempt of a task may take longer than this many seconds.
MAX_DEADLINE: Final = 86_400
#: The largest number of a task's retry options.
MAX_NUMBER: Final = 2**31 - 1

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
KeyId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# The last second of the year 9999; what no datetime can say is no time.
NumericDate = Annotated[int, Field(ge=0, le=253_402_300_799)]
Count = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
# An integer stays one: read as a float, it would be written otherwise.
Seconds = Count | Annotated[float, Field(ge=0, le=MAX_NUMBER)]
Deadline = Annotated[int, Field(ge=1, le=MAX_DEADLINE)] | Annotated[float, Field(ge=1, le=MAX_DEADLINE)]

_STRICT: Final = ConfigDict(strict=True, frozen=True, extra="forbid", hide_input_in_errors=True)


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
class Retry(TypedDict, total=False):
    """The ``retry`` claim: those of the task's ``TaskRetryOptions`` that were given."""

    min_backoff_seconds: Seconds
    max_backoff_seconds: Seconds
    task_age_limit: Seconds
    max_doublings: Count
    task_retry_limit: Count


@with_config(_STRICT)
class Root(TypedDict):
    """The ``root`` claim: the first task of a chain of re-runs, and the key that signed it."""

    id: TaskId
    kid: KeyId


@with_config(_STRICT)
class Claims(TypedDict, total=False):
    """The payload of a task token: either ``call``, ``args`` and ``kwargs``, or ``blob``."""

    # In the order in which they are written. An absent claim is an absent member, never null.
    # The version of the claims: the only one so far.
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
    retry: Retry
    deadline: Deadline
    retry_of: TaskId
    root: Root
    headers: dict[HeaderName, HeaderValue]
    trace: TraceParent


#: The adapter that validates the claims of every token.
@cache
def adapter() -> TypeAdapter[Claims]:
    """Return what validates claims; made when it is first asked for, which takes as long as a third of ``import pydantic``."""
    from pydantic import TypeAdapter  # noqa: PLC0415  # as above

    return TypeAdapter(Claims)


#: By kind, whether a call has a ``member``, and whether it has a ``bound``.
_MEMBERS: Final = {
    "function": (False, False),
    "class": (False, False),
    "instance": (False, True),
    "method": (True, True),
    "classmethod": (True, False),
    "builtin": (False, False),
    "builtin_method": (True, True),
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
        validator = adapter().validator
        claims = (
            validator.validate_json(payload) if len(payload) <= SHORT else validator.validate_python(_load(payload))
        )
        # If writing what was read gives back the text, no member of it was a duplicate and no number was rounded.
        if orjson.dumps(claims, None, _WRITE) == payload:
            _check_shape(claims)
            return claims, True
    except (ValueError, TypeError):  # a ValidationError is a ValueError; an InvalidClaims is not
        pass
    claims = _read_strictly(payload)
    _check_shape(claims)
    return claims, False


# Jiter with every name compared would do alone (6.3 us for a small task, where pydantic's own parser takes 4.6 of the 28
# that the whole path takes; 1.54 ms for 160 kB of rows, where orjson takes 0.96 of 1.8). The faster two are believed
# only if writing what they read gives back the text.
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
        return cast("Claims", adapter().validator.validate_python(raw))
    except ValidationError as error:
        # `from None`: the error holds the claims.
        raise InvalidClaims(f"claims are wrong: {_summary(error)}; see schema/README.md") from None


def _check_shape(claims: Claims) -> None:
    """Check what spans several claims.

    Raises:
        InvalidClaims: Times are out of order or too far apart, call and blob are not alternatives, a call
            lacks what its kind needs, root comes without retry_of, or the backoffs contradict each other.
    """
    if "call" in claims and "args" in claims and "kwargs" in claims and "blob" not in claims:
        call = claims["call"]
        member, bound = _MEMBERS[call["kind"]]
        if ("member" in call) is not member:
            raise InvalidClaims(
                "call.member is for methods, class methods and built-in methods; add it there, drop it elsewhere"
            )
        if ("bound" in call) is not bound:
            raise InvalidClaims(
                "call.bound is for instances, methods and built-in methods; add it there, drop it elsewhere"
            )
        if bound and call["bound"] is None:
            raise InvalidClaims("the call has a null member; leave absent members out")
    elif "blob" not in claims or not _TASK.isdisjoint(claims):
        raise InvalidClaims("claims need either call, args and kwargs, or blob alone; write one of the two")
    if not claims["nbf"] <= claims["exp"] <= claims["nbf"] + MAX_LIFETIME:
        raise InvalidClaims("exp must lie between nbf and 92 days after it; mint a token with such times")
    if "root" in claims and "retry_of" not in claims:
        raise InvalidClaims("root is for tasks that re-run another; write retry_of too, or leave root out")
    if "retry" in claims:
        retry = claims["retry"]
        if retry.get("min_backoff_seconds", 0) > retry.get("max_backoff_seconds", MAX_NUMBER):
            raise InvalidClaims("retry.min_backoff_seconds is above max_backoff_seconds; swap them")


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
