"""Tags of containers of the standard library, and ``$ref``. Named tuples are in ``objects``.

Lists and dicts with plain keys need no tag. Mutable containers are counted for ``$ref``: one that is shared arrives
as one. Tuples, frozensets and slices are not counted.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import Any, Final

from safedefer.codecs.decoder import Decoder, array, check_callee
from safedefer.codecs.encoder import Encoder
from safedefer.codecs.inspect_safely import dict_getter
from safedefer.codecs.shared import Json, Refusal, VersionSkew, is_text, step
from safedefer.errors import NotDeferrable
from safedefer.gadgets import HARMLESS_TYPES

_DEQUE_MAX: Final = 2**53 - 1


def _encode_list(enc: Encoder, value: list[Any], depth: int) -> Json:
    return enc.enter(value) or enc.sequence(value, depth + 1)


def _encode_tuple(enc: Encoder, value: tuple[Any, ...], depth: int) -> Json:
    return {"$tuple": enc.sequence(value, depth + 1)}


def _decode_tuple(dec: Decoder, payload: Json, depth: int) -> tuple[object, ...]:
    return tuple(dec.items(payload, depth + 1))


def _encode_slice(enc: Encoder, value: slice, depth: int) -> Json:
    return {"$slice": enc.sequence((value.start, value.stop, value.step), depth + 1)}


def _decode_slice(dec: Decoder, payload: Json, depth: int) -> slice:
    return slice(*dec.items(array(payload, least=3, most=3), depth + 1))


# --- Sets -----------------------------------------------------------------------------------------


def members(enc: Encoder, values: Iterable[Any], size: int, depth: int) -> list[Json]:
    """Return the trees of set members or dict keys, which the decoder hashes."""
    enc.add(size)
    out: list[Json] = []
    try:
        for value in values:
            out.append(enc.key(value, depth))  # noqa: PERF401 - the length of `out` is the path
    except Refusal as refusal:
        refusal.trail.append(f"{{{len(out)}}}")
        raise
    if not enc.looks_only:
        _check_hashes(values, size)
    return out


def set_members(enc: Encoder, values: Iterable[Any], size: int, depth: int) -> list[Json]:
    """Return the trees of the members of a set, in the order that all equal sets have, whatever Python's hashes are."""
    ordered = list(values)
    if size > 1:
        kind = type(ordered[0])
        if (kind is str or kind is int) and all(type(value) is kind for value in ordered):
            ordered.sort()
        else:
            texts = [enc.alone(value, depth) for value in ordered]
            ordered = [ordered[i] for i in sorted(range(size), key=texts.__getitem__)]
    return members(enc, ordered, size, depth)


def read_members(dec: Decoder, payload: Json, depth: int) -> list[Any]:
    """Return the values of set members or dict keys."""
    trees = array(payload)
    dec.add(len(trees))
    out: list[Any] = []
    try:
        for tree in trees:
            out.append(dec.key(tree, depth))  # noqa: PERF401 - the length of `out` is the path
    except Refusal as refusal:
        refusal.trail.append(f"{{{len(out)}}}")
        raise
    return out


#: Types whose equality no deployment changes.
_FINAL: Final = frozenset({int, str, float, bool, bytes, complex, type(None)})
#: The most set members or dict keys with one hash: each is compared with all before it.
MAX_EQUAL_HASHES: Final = 64


def _check_hashes(values: Iterable[Any], size: int) -> None:
    """Bound the comparisons of set members or dict keys. An attacker finds numbers of equal hash: multiples of ``2**61 - 1``.

    Raises:
        Refusal: Too many have one hash.
    """
    if size <= MAX_EQUAL_HASHES:
        return
    try:
        most = max(Counter(map(hash, values)).values())
    except Exception as error:  # an admitted class's own __hash__ may raise anything
        raise Refusal("a set member or dict key cannot be hashed; correct the __hash__ of its class") from error
    if most > MAX_EQUAL_HASHES:
        raise Refusal(
            f"more than {MAX_EQUAL_HASHES} set members or dict keys have the same hash; pass them as a list, "
            "or give their class a better __hash__"
        )


def hashed(make: Any, values: Sequence[Any], keys: Iterable[Any]) -> Any:
    """Return ``make(values)``, a set or dict that hashes ``keys``.

    Raises:
        Refusal: A key cannot be hashed, or too many have the same hash.
    """
    try:
        _check_hashes(keys, len(values))
        made = make(values)
    except Refusal:
        raise
    except Exception as error:  # an admitted class's own __hash__ or __eq__ may raise anything
        raise VersionSkew(
            "a set member or dict key cannot be hashed; deploy the code that the task was made for"
        ) from error
    return made


def check_distinct(size: int, values: Sequence[Any]) -> None:
    """Check that a set or dict of ``values`` has that many members.

    Raises:
        Refusal: Two of them are equal. Those of a class may differ where the code is that the task was made for.
    """
    if size != len(values):
        kind = Refusal if all(type(value) in _FINAL for value in values) else VersionSkew
        raise kind("two set members or dict keys are equal")


def _encode_set(enc: Encoder, value: set[Any], depth: int) -> Json:
    return enc.enter(value) or {"$set": set_members(enc, value, len(value), depth + 1)}


def _decode_set(dec: Decoder, payload: Json, depth: int) -> set[Any]:
    out: set[Any] = set()
    dec.share(out)
    fill_set(out, read_members(dec, payload, depth + 1))
    return out


def fill_set(out: set[Any], values: Sequence[Any]) -> None:
    """Add values to a set, or to an object of a subclass."""
    hashed(lambda values: set.update(out, values), values, values)
    check_distinct(set.__len__(out), values)


def _encode_frozenset(enc: Encoder, value: frozenset[Any], depth: int) -> Json:
    return {"$frozenset": set_members(enc, value, len(value), depth + 1)}


def _decode_frozenset(dec: Decoder, payload: Json, depth: int) -> frozenset[Any]:
    values = read_members(dec, payload, depth + 1)
    made: frozenset[Any] = hashed(frozenset, values, values)
    check_distinct(len(made), values)
    return made


# --- Dicts ----------------------------------------------------------------------------------------


def plain_names(keys: Iterable[Any]) -> bool:
    """Whether the keys may be the names of a JSON object: exactly str, text, and no tags."""
    # A loop rather than all(): most dicts are small.
    for key in keys:  # noqa: SIM110
        if type(key) is not str or key[:1] == "$" or not (key.isascii() or is_text(key)):
            return False
    return True


def _encode_dict(enc: Encoder, value: dict[Any, Any], depth: int) -> Json:
    ref = enc.enter(value)
    if ref is not None:
        return ref
    if plain_names(value):
        return enc.attributes(value.items(), depth + 1)
    return {"$dict": _pairs(enc, value.items(), len(value), depth + 1)}


def _decode_dict(dec: Decoder, payload: Json, depth: int) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    dec.share(out)
    _fill_pairs(dec, out, array(payload), depth + 1)
    if plain_names(out):
        raise Refusal("a dict whose keys are plain strings is written as a plain object")
    return out


def _pairs(enc: Encoder, pairs: Iterable[tuple[Any, Any]], size: int, depth: int) -> list[Json]:
    enc.add(2 * size)
    out: list[Json] = []
    where = ""
    try:
        for key, value in pairs:
            where = f"{{{len(out)}}}"
            tree = enc.key(key, depth)
            named = step(key)
            where = where if named == "{}" else named
            out.append([tree, enc.value(value, depth)])
    except Refusal as refusal:
        refusal.trail.append(where)
        raise
    if not enc.looks_only:
        _check_hashes((key for key, _ in pairs), size)
    return out


def _fill_pairs(dec: Decoder, out: dict[Any, Any], payload: list[Json], depth: int) -> None:
    dec.add(2 * len(payload))
    pairs: list[tuple[Any, Any]] = []
    try:
        for pair in payload:
            key, value = array(pair, least=2, most=2)
            pairs.append((dec.key(key, depth), dec.value(value, depth)))
    except Refusal as refusal:
        refusal.trail.append(f"{{{len(pairs)}}}")
        raise
    fill_dict(out, pairs)


def fill_dict(out: dict[Any, Any], pairs: Sequence[tuple[Any, Any]]) -> None:
    """Add pairs to a dict or an object of a subclass. No method of the subclass runs."""
    insert: Any = OrderedDict.__setitem__ if type(out) is OrderedDict else dict.__setitem__

    def fill(pairs: Sequence[tuple[Any, Any]]) -> None:
        for key, value in pairs:
            insert(out, key, value)

    hashed(fill, pairs, (key for key, _ in pairs))
    if dict.__len__(out) != len(pairs):
        check_distinct(dict.__len__(out), [key for key, _ in pairs])


def _no_attributes(value: object) -> None:
    getter = dict_getter(type(value))
    if getter is not None and getter(value):
        raise Refusal("attributes were added to it; pass them as arguments of their own")


def _encode_ordereddict(enc: Encoder, value: OrderedDict[Any, Any], depth: int) -> Json:
    _no_attributes(value)
    # Its own items() asks each key for its hash; the order of a dict will do where the tree is thrown away.
    items = dict.items(value) if enc.looks_only else value.items()
    return enc.enter(value) or {"$ordereddict": _pairs(enc, items, len(value), depth + 1)}


def _decode_ordereddict(dec: Decoder, payload: Json, depth: int) -> OrderedDict[Any, Any]:
    out: OrderedDict[Any, Any] = OrderedDict()
    dec.share(out)
    _fill_pairs(dec, out, array(payload), depth + 1)
    return out


def _encode_counter(enc: Encoder, value: Counter[Any], depth: int) -> Json:
    _no_attributes(value)
    return enc.enter(value) or {"$counter": _pairs(enc, value.items(), len(value), depth + 1)}


def _decode_counter(dec: Decoder, payload: Json, depth: int) -> Counter[Any]:
    out: Counter[Any] = Counter()
    dec.share(out)
    _fill_pairs(dec, out, array(payload), depth + 1)
    return out


def _encode_defaultdict(enc: Encoder, value: defaultdict[Any, Any], depth: int) -> Json:
    ref = enc.enter(value)
    if ref is not None:
        return ref
    made = value.default_factory
    try:
        factory = enc.value(made, depth + 1)
        if made is not None and not (type(made) is type and made in HARMLESS_TYPES):
            _check_factory(enc, made)
    except Refusal as refusal:
        refusal.trail.append(".default_factory")
        raise
    return {"$defaultdict": [factory, *_pairs(enc, value.items(), len(value), depth + 1)]}


def _check_factory(enc: Encoder, factory: object) -> None:
    try:
        enc.gate.callable_ref(factory)
    except NotDeferrable as error:
        raise Refusal(f"whoever looks a missing key up calls it: {error}") from error


def _decode_defaultdict(dec: Decoder, payload: Json, depth: int) -> defaultdict[Any, Any]:
    out: defaultdict[Any, Any] = defaultdict()
    dec.share(out)
    factory, *pairs = array(payload, least=1)
    made = dec.value(factory, depth + 1)
    try:
        # The constructor checks in C that the factory is callable; the attribute takes any object.
        out.default_factory = defaultdict(made).default_factory
    except TypeError:
        raise Refusal("$defaultdict begins with a callable or null") from None
    # Whoever looks a missing key up calls it: what may be a value may not always be called.
    if made is not None and not (type(made) is type and made in HARMLESS_TYPES):
        check_callee(dec.gate, made)
    _fill_pairs(dec, out, pairs, depth + 1)
    return out


def _encode_deque(enc: Encoder, value: deque[Any], depth: int) -> Json:
    ref = enc.enter(value)
    if ref is not None:
        return ref
    return {"$deque": [value.maxlen, *enc.sequence(value, depth + 1)]}


def _decode_deque(dec: Decoder, payload: Json, depth: int) -> deque[Any]:
    maxlen, *items = array(payload, least=1)
    if maxlen is not None and (type(maxlen) is not int or not len(items) <= maxlen <= _DEQUE_MAX):
        raise Refusal("$deque begins with null or a length that its items fit in")
    out: deque[Any] = deque(maxlen=maxlen)
    dec.share(out)
    out.extend(dec.items(items, depth + 1))
    return out


def _decode_ref(dec: Decoder, payload: Json, depth: int) -> object:
    return dec.shared(payload, depth)


ENCODERS: Final[dict[type, Any]] = {
    list: _encode_list,
    dict: _encode_dict,
    tuple: _encode_tuple,
    slice: _encode_slice,
    set: _encode_set,
    frozenset: _encode_frozenset,
    OrderedDict: _encode_ordereddict,
    Counter: _encode_counter,
    defaultdict: _encode_defaultdict,
    deque: _encode_deque,
}

DECODERS: Final[dict[str, Any]] = {
    "$tuple": _decode_tuple,
    "$slice": _decode_slice,
    "$set": _decode_set,
    "$frozenset": _decode_frozenset,
    "$dict": _decode_dict,
    "$ordereddict": _decode_ordereddict,
    "$counter": _decode_counter,
    "$defaultdict": _decode_defaultdict,
    "$deque": _decode_deque,
    "$ref": _decode_ref,
}
