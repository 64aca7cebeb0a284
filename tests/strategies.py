"""Hypothesis strategies for everything that travels."""

import re
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import timezone
from pathlib import PurePosixPath, PureWindowsPath
from typing import get_args
from zoneinfo import ZoneInfo

from hypothesis import strategies as st

from safedefer.claims import MAX_LIFETIME
from safedefer.options import MAX_ETA, Options, TaskRetryOptions
from safedefer.refs import KindName
from tests.zoo import callables
from tests.zoo import values as zoo

# --- Values ---------------------------------------------------------------------------------------

ZONES = ("UTC", "Europe/Paris", "America/Argentina/Buenos_Aires", "Etc/GMT+5", "Asia/Kathmandu")

#: Text of any code points, lone surrogates and tag-like beginnings included.
texts = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=12),
    st.sampled_from(["$", "$ref", "$tuple", "\ud800", "\udfff$", "", "a b", "\0", "é", "e\u0301", "__proto__"]),
)
integers = st.one_of(
    st.integers(), st.integers(-(2**200), 2**200), st.sampled_from([2**53 - 1, 2**53, -(2**53), 2**63])
)
offsets = st.timedeltas(
    min_value=-__import__("datetime").timedelta(hours=23), max_value=__import__("datetime").timedelta(hours=23)
)
zones = st.one_of(
    st.sampled_from(ZONES).map(ZoneInfo), offsets.map(timezone), st.builds(timezone, offsets, st.text(max_size=5))
)
datetimes = st.one_of(
    st.datetimes(), st.builds(lambda d, z, f: d.replace(tzinfo=z, fold=f), st.datetimes(), zones, st.integers(0, 1))
)
times = st.builds(lambda t, z, f: t.replace(tzinfo=z, fold=f), st.times(), st.none() | zones, st.integers(0, 1))

#: What has no parts that could be shared, and can be a set member or a key.
hashable_scalars = st.one_of(
    st.none(),
    st.booleans(),
    integers,
    st.floats(),
    texts,
    st.binary(max_size=12),
    st.complex_numbers(),
    datetimes,
    times,
    st.dates(),
    st.timedeltas(),
    zones,
    st.decimals().filter(lambda d: not d.is_snan()),
    st.fractions(),
    st.builds(lambda i, s: uuid.UUID(int=i, is_safe=s), st.integers(0, 2**128 - 1), st.sampled_from(uuid.SafeUUID)),
    st.ip_addresses(),
    st.text(max_size=8).map(PurePosixPath),
    st.from_regex(re.compile(r"[A-Z]:\\[a-z]{0,3}(\\[a-z]{1,3}){0,2}"), fullmatch=True).map(PureWindowsPath),
    st.builds(range, integers, integers, integers.filter(bool)),
    st.just(...),
    st.sampled_from(
        [*zoo.Color, *zoo.Level, *zoo.Mode, *zoo.Perm, zoo.Perm(5), zoo.Perm(0), zoo.IntPerm(6), zoo.IntPerm(64)]
    ),
    st.sampled_from([zoo.Order, list, dict, zoo.Outer.Inner, zoo.top, print, zoo.Worker.build]),
    st.sampled_from([re.compile("a+", re.IGNORECASE), re.compile(rb"\d")]),
    texts.map(zoo.MyStr),
    integers.map(zoo.MyInt),
    st.binary(max_size=5).map(zoo.MyBytes),
)
_scalars = st.one_of(hashable_scalars, st.binary(max_size=12).map(bytearray))
_hashables = st.recursive(
    hashable_scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(frozenset),
        st.builds(zoo.Point, inner, inner),
        st.builds(zoo.Money, inner),
        st.lists(inner, max_size=3).map(zoo.MyTuple),
    ),
    max_leaves=4,
)


# Composites, and lists in place of sets: strategies that filter print themselves, and hypothesis warns of long reprs.


@st.composite
def _any_hashable(draw):
    return draw(_hashables)


@st.composite
def _any_scalar(draw):
    return draw(_scalars)


hashables = _any_hashable()
scalars = _any_scalar()
names = st.from_regex(re.compile("[a-z_é][a-z0-9_]{0,6}"), fullmatch=True).filter(lambda n: not n.startswith("__"))


def _object(cls, attributes):
    obj = cls.__new__(cls)
    vars(obj).update(attributes)
    return obj


def _exception(args, note):
    error = ValueError(*args)
    if note is not None:
        error.note = note
    return error


def containers(inner):
    """Every kind of container and object, around the values of another strategy."""
    few = st.lists(inner, max_size=3)
    pairs = st.lists(st.tuples(hashables, inner), max_size=3)
    attributes = st.lists(st.tuples(names, inner), max_size=3).map(dict)
    return st.one_of(
        few,
        st.lists(st.tuples(texts, inner), max_size=3).map(dict),
        pairs.map(dict),
        few.map(tuple),
        st.lists(hashables, max_size=3).map(set),
        st.lists(hashables, max_size=3).map(frozenset),
        pairs.map(OrderedDict),
        st.builds(defaultdict, st.sampled_from([None, list, zoo.top]), pairs.map(dict)),
        st.builds(deque, few, st.none() | st.integers(3, 9)),
        pairs.map(lambda p: Counter(dict(p))),
        st.builds(slice, inner, inner, inner),
        st.builds(zoo.Point, inner, inner),
        st.builds(zoo.Typed, texts, few),
        st.builds(zoo.Order, inner, few),
        st.builds(zoo.Money, inner),
        st.builds(zoo.Slotted, inner, inner),
        st.builds(zoo.SlottedMutable, inner),
        st.builds(zoo.AttrsSlotted, inner, inner),
        st.builds(zoo.AttrsDict, inner),
        st.builds(zoo.NewArgs, inner, inner),
        st.builds(zoo.TupleState, inner).map(_with_rest),
        attributes.map(lambda a: _object(zoo.Node, a)),
        attributes.map(lambda a: zoo.Model.model_construct(**a)),
        st.builds(lambda v: zoo.FrozenModel.model_construct(when=v), inner),
        few.map(zoo.MyList),
        pairs.map(lambda p: zoo.MyDict(dict(p))),
        few.map(zoo.MyTuple),
        st.builds(_exception, few, st.none() | inner),
    )


def _with_rest(state):
    state.rest = [1]
    return state


#: Every supported value, nested in every container.
_recursive = st.recursive(scalars, containers, max_leaves=12)


@st.composite
def _values(draw):
    """Only so that its repr is short: hypothesis warns of long ones."""
    return draw(_recursive)


values = _values()


@st.composite
def shared_values(draw):
    """Values that share containers, also in cycles."""
    pool = [draw(containers(scalars)) for _ in range(draw(st.integers(1, 4)))]
    members = st.sampled_from(pool) | values
    for _ in range(draw(st.integers(0, 6))):
        target = draw(st.sampled_from(pool))
        member = draw(members)
        kind = type(target)
        if kind in (list, zoo.MyList):
            target.append(member)
        elif kind in (dict, OrderedDict, defaultdict, Counter, zoo.MyDict):
            dict.__setitem__(target, draw(texts), member) if kind is not OrderedDict else target.update(k=member)
        elif kind in (zoo.Order, zoo.Node, zoo.AttrsDict, ValueError):
            vars(target)[draw(names)] = member
        elif kind is zoo.SlottedMutable:
            target.b = member
        elif kind is zoo.AttrsSlotted:
            target.b = member
        elif kind is zoo.Model:
            vars(target)["items"] = member
    return draw(st.lists(members, max_size=4)) + pool


# --- JSON -----------------------------------------------------------------------------------------

json_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
)
plain_trees = st.recursive(
    json_scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=20,
)
tags = st.sampled_from(
    "$tuple $set $frozenset $dict $bytes $bytearray $int $float $str $complex $datetime $date $time $timedelta "
    "$timezone $zoneinfo $decimal $fraction $uuid $path $ip $range $slice $ellipsis $enum $namedtuple $dataclass "
    "$model $object $callable $class $pattern $ordereddict $defaultdict $deque $counter $exception $ref $attrs $nope".split()
)
class_names = st.sampled_from(
    [f"tests.zoo.values:{name}" for name in vars(zoo) if name[0].isupper()]
    + [
        "builtins:ValueError",
        "builtins:OSError",
        "builtins:UnicodeDecodeError",
        "builtins:list",
        "os:system",
        "tests.zoo.values:top",
    ]
)
payload_scalars = st.one_of(
    json_scalars,
    class_names,
    st.integers(0, 5),
    st.sampled_from(
        ["YQ==", "nan", "2026-01-01", "2026-01-01T00:00:00", "UTC", "1.5", "RED", "12345678901234567890", "PosixPath"]
    ),
)
parts = st.sampled_from(
    ["class", "args", "kwargs", "items", "keys", "values", "value", "state", "setstate", "kind", "module", "a", "b"]
)
#: Trees that are likely to be wrong in ways that matter.
tagged_trees = st.recursive(
    payload_scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=4) | parts, inner, max_size=4),
        st.builds(lambda tag, payload: {tag: payload}, tags, inner),
        st.builds(lambda tag, payload: {tag: payload}, tags, st.lists(inner, max_size=4)),
        st.builds(lambda tag, name, rest: {tag: [name, *rest]}, tags, class_names, st.lists(inner, max_size=4)),
        st.builds(
            lambda name, rest: {"$object": {"class": name, **rest}},
            class_names,
            st.dictionaries(parts, inner, max_size=3),
        ),
    ),
    max_leaves=15,
)


# --- The trust core: callables, options, tokens ---------------------------------------------------

#: What may be deferred, and what may not, with its reason.
# By number: Hypothesis, too, looks closely at the values that it is given.
accepted_callables = st.integers(0, len(callables.ACCEPTED) - 1).map(lambda number: callables.ACCEPTED[number][1])
refused_callables = st.integers(0, len(callables.REFUSED) - 1).map(lambda number: callables.REFUSED[number][1:])

identifiers = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
dotted = st.lists(identifiers, min_size=1, max_size=3).map(".".join)
members = st.from_regex(r"_?[A-Za-z][A-Za-z0-9_]{0,8}", fullmatch=True)
task_ids = st.text("ABCxyz019_-", min_size=16, max_size=64)
task_names = st.text("ABCxyz019_-", min_size=1, max_size=500)
audience_parts = st.text("ABCxyz019.-", min_size=1, max_size=100)
paths = st.from_regex(r"/([!\"$-.0->@-~][!\"$->@-~]{0,30})?", fullmatch=True)
secrets = st.binary(min_size=32, max_size=100).filter(lambda secret: len(set(secret)) >= 16 and not secret.isascii())

retry_options = st.builds(
    TaskRetryOptions,
    min_backoff_seconds=st.none() | st.floats(0, 10),
    max_backoff_seconds=st.none() | st.floats(10, 1e6),
    task_age_limit=st.none() | st.integers(0, 10**6),
    max_doublings=st.none() | st.integers(0, 50),
    task_retry_limit=st.none() | st.integers(0, 50),
)
options = st.builds(
    Options,
    countdown=st.none() | st.integers(-100, MAX_ETA) | st.floats(-100, MAX_ETA),
    headers=st.dictionaries(
        st.text("Xab-", min_size=1, max_size=8).map(lambda t: f"x-{t.lower()}"),
        st.text("ab \t~", max_size=8),
        max_size=3,
    ),
    name=st.none() | task_names,
    queue=audience_parts,
    retry_options=st.none() | retry_options,
    target=st.none() | audience_parts,
    url=st.none() | paths,
)

#: JSON as any writer may put it into arguments: numbers beyond 2**53 and surrogates are the codec's business.
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(1 - 2**53, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def calls(draw):
    """Return a ``call`` claim of any kind."""
    kind = draw(st.sampled_from(get_args(KindName)))
    call = {"kind": kind, "module": draw(dotted), "qualname": draw(dotted)}
    if kind in {"method", "classmethod", "builtin_method"}:
        call["member"] = draw(members)
    if kind in {"instance", "method", "builtin_method"}:
        call["bound"] = draw(json_values.filter(lambda value: value is not None))
    return call


@st.composite
def payloads(draw):
    """Return the members of a right payload, as a dict."""
    nbf = draw(st.integers(0, 2**33))
    payload = {
        "v": 1,
        "jti": draw(task_ids),
        "iat": draw(st.integers(0, 2**33)),
        "nbf": nbf,
        "exp": nbf + draw(st.integers(0, MAX_LIFETIME)),
        "aud": ":".join([draw(audience_parts), draw(audience_parts), draw(audience_parts), draw(paths)]),
        "cty": draw(st.sampled_from(["typed", "pickle"])),
    }
    if draw(st.booleans()):
        payload |= {
            "call": draw(calls()),
            "args": draw(st.lists(json_values, max_size=3)),
            "kwargs": draw(st.dictionaries(st.text(max_size=5), json_values, max_size=3)),
        }
    else:
        payload["blob"] = {
            "id": draw(task_ids),
            "sha256": draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
            "length": draw(st.integers(1, 2**31)),
        }
    for name, strategy in (("name", task_names), ("retry_of", task_ids)):
        if draw(st.booleans()):
            payload[name] = draw(strategy)
    return payload
