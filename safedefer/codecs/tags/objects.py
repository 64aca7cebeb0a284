"""Tags of objects of classes: enums, named tuples, dataclasses, objects, callables, classes.

The gate (the policy) names every class and finds it again: this module imports nothing and looks up no names. The
encoder first looks at the class (``class_layout``), then asks the gate, and only then runs a hook.

Over 450 lines, since each kind of object is written and read by a pair of functions that are read together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Flag, IntFlag
from types import BuiltinFunctionType, FunctionType, MappingProxyType, MethodType
from typing import Any, Final, cast
from uuid import UUID

from pydantic import ValidationError

from safedefer.codecs import inspect_safely
from safedefer.codecs.class_families import ClassFamily
from safedefer.codecs.class_layout import CONTENTS, MUTABLE, REMEDY, Plan, hash_definers
from safedefer.codecs.decoder import Decoder, array, record, string
from safedefer.codecs.encoder import Encoder
from safedefer.codecs.object_state import (
    attributes,
    begin,
    begin_decoded,
    hook_state,
    planned,
    planned_class,
    restore,
    run,
)
from safedefer.codecs.packs import PackedType
from safedefer.codecs.registry import RegisteredType
from safedefer.codecs.shared import Json, Refusal, VersionSkew, is_text
from safedefer.codecs.tags.containers import (
    check_distinct,
    fill_dict,
    fill_set,
    hashed,
    members,
    read_members,
    set_members,
)
from safedefer.codecs.tags.exceptions import decode_exception, encode_exception
from safedefer.codecs.tags.models import decode_model, encode_model
from safedefer.errors import NotDeferrable
from safedefer.refs import UNBOUND, CallableRef, bound_object, class_path, loud_hooks, reference

_UUID_INT: Final = cast("Any", vars(UUID)["int"]).__get__
_UUID_SAFE: Final = cast("Any", vars(UUID)["is_safe"]).__get__
_CALLABLES: Final = (FunctionType, BuiltinFunctionType, MethodType)


def encode_other(enc: Encoder, value: Any, depth: int) -> Json:
    """Encode values that no tag claims by exact type: registered types, classes, objects of classes."""
    cls = type(value)
    entry = enc.registry.by_class(cls)
    if entry is not None:
        return _encode_registered(enc, value, depth, entry)
    if inspect_safely.derives(cls, type):
        return {"$class": enc.name(value)}
    plan = planned(enc, cls)
    enc.note_hash(plan.hash_definers)
    return _BY_TAG.get(plan.tag, _encode_family)(enc, value, depth, plan)


# --- Names ----------------------------------------------------------------------------------------


def _encode_callable(enc: Encoder, value: Any, depth: int) -> Json:
    try:
        ref = enc.gate.callable_ref(value)
    except NotDeferrable as error:
        raise Refusal(str(error)) from error
    tree: dict[str, Json] = ref.model_dump(exclude_none=True)
    bound = bound_object(value)
    if bound is not UNBOUND:
        try:
            tree["bound"] = enc.value(bound, depth + 1)
        except Refusal as refusal:
            refusal.trail.append(".__self__")
            raise
    return {"$callable": tree}


def _decode_callable(dec: Decoder, payload: Json, depth: int) -> object:
    parts = dict(record(payload))
    bound: object = UNBOUND
    if "bound" in parts:
        bound = dec.value(parts.pop("bound"), depth + 1)
    try:
        ref = reference(*CallableRef.model_validate(parts).parts)
    except ValidationError:
        raise Refusal("$callable is the reference of a callable, as in the claim `call`") from None
    if ref.kind in ("class", "instance") or (parts.get("member", "") is None):
        raise Refusal("a class is written as $class, and an instance as an object")
    return dec.gate.load_callable(ref, bound)


def _decode_class(dec: Decoder, payload: Json, _depth: int) -> type:
    return dec.gate.load_class(string(payload))


# --- Enums and named tuples -----------------------------------------------------------------------


def _encode_enum(enc: Encoder, value: Any, depth: int, plan: Plan) -> Json:
    cls = plan.cls
    name = _name_of(value)
    if type(name) is str and _members_of(cls).get(name) is value and is_text(name):
        return {"$enum": [enc.name(cls), name]}
    number = _value_of(value)
    if type(number) is int and _flag_by_value(cls):
        return {"$enum": [enc.name(cls), enc.value(number, depth + 1)]}
    raise Refusal(f"the member is not found by its name; {REMEDY}")


def _name_of(member: object) -> object:
    return _own_dict(member).get("_name_")


def _value_of(member: object) -> object:
    return _own_dict(member).get("_value_")


def _own_dict(member: object) -> dict[str, object]:
    getter = inspect_safely.dict_getter(type(member))
    return getter(member) if getter is not None else {}


def _members_of(cls: type) -> dict[str, object]:
    return cast("dict[str, object]", inspect_safely.namespace(cls).get("_member_map_", {}))


def _flag_by_value(cls: type) -> bool:
    """Whether ``enum`` itself makes combinations of flags, not code of the class, of its data type or of its metaclass."""
    missing = inspect_safely.lookup(cls, "_missing_")
    held = inspect_safely.namespace(cls).get("_member_type_")
    plain = (held is object or held is int) and missing is not None and missing[0] is Flag
    return plain and inspect_safely.derives(cls, Flag) and not loud_hooks(cls)


#: The most combinations of flags of one class: an enum keeps all that were ever made, and two that are equal are one object.
_MOST_COMBINATIONS: Final = 4_096
#: Where they are equal as integers are, one more than these is made and not kept.
_KEPT_COMBINATIONS: Final = 256


def _decode_enum(dec: Decoder, payload: Json, depth: int) -> object:
    name, key = array(payload, least=2, most=2)
    cls = planned_class(dec, name, "$enum").cls
    if type(key) is str:
        if (member := _members_of(cls).get(key)) is None or _name_of(member) != key:
            raise VersionSkew("the enum has no member of that name; deploy the code that has it")
        return member
    number = dec.value(key, depth + 1) if type(key) is int or type(key) is dict else None
    if type(number) is not int:
        raise Refusal("here must be a name or an integer")
    if not _flag_by_value(cls):
        raise VersionSkew("$enum is [class, name], or [class, number] for a combination of flags")
    known = inspect_safely.namespace(cls).get("_value2member_map_", {})
    passing = number not in known and len(known) >= _KEPT_COMBINATIONS and inspect_safely.derives(cls, IntFlag)
    if number not in known and len(known) >= _MOST_COMBINATIONS and not passing:
        # Another process, or this one started again, has room.
        raise VersionSkew(f"more than {_MOST_COMBINATIONS} combinations of these flags were made here; pass the number")
    made = _made_in_passing(cls, number, known) if passing else run(cls, number)
    if type(made) is not cls or _value_of(made) != number or _members_of(cls).get(cast("str", _name_of(made))) is made:
        raise VersionSkew("$enum is [class, number] only for a combination of flags that has no name")
    return made


def _made_in_passing(cls: type, number: int, known: dict[object, object]) -> object:
    """Return a combination of flags that its class does not keep."""
    before = len(known)
    made = run(cls, number)
    # A negative number and the positive one that it stands for are two keys; the latter may have been there before.
    for key in (number, _value_of(made)):
        is_named = _members_of(cls).get(cast("str", _name_of(made))) is made
        if len(known) > before and known.get(key) is made and not (is_named and key == _value_of(made)):
            del known[key]
    return made


def _encode_namedtuple(enc: Encoder, value: Any, depth: int, plan: Plan) -> Json:
    if plan.state_of is not None and plan.state_of(value):
        raise Refusal("attributes were added to the named tuple; pass them as arguments of their own")
    return {"$namedtuple": [enc.name(plan.cls), *enc.sequence(tuple(tuple.__iter__(value)), depth + 1)]}


def _decode_namedtuple(dec: Decoder, payload: Json, depth: int) -> object:
    name, *items = array(payload, least=1)
    cls = planned_class(dec, name, "$namedtuple").cls
    values = dec.items(items, depth + 1)
    found = inspect_safely.lookup(cls, "_fields")
    defaults = inspect_safely.lookup(cls, "_field_defaults")
    if found is not None and defaults is not None and type(defaults[1]) is dict:
        for field in found[1][len(values) :]:  # added since, each with a default
            if field not in defaults[1]:
                break
            dec.add(1)
            values.append(defaults[1][field])
    if found is None or len(found[1]) != len(values):
        raise VersionSkew("the named tuple has another number of fields; deploy the code that the task was made for")
    return tuple.__new__(cls, values)


# --- Dataclasses, and families of libraries that make classes -------------------------------------


def _encode_family(enc: Encoder, value: Any, depth: int, plan: Plan) -> Json:
    name = enc.name(plan.cls)
    ref = enc.enter(value)
    if ref is not None:
        return ref
    begin(enc, value, plan)
    tree = {plan.tag: [name, enc.attributes(attributes(enc, value, plan), depth + 1)]}
    enc.open.discard(id(value))
    return tree


def _decode_family(dec: Decoder, tag: str, payload: Json, depth: int) -> object:
    name, state = array(payload, least=2, most=2)
    plan = planned_class(dec, name, tag)
    value = run(object.__new__, plan.cls)
    number = dec.share(value)
    begin_decoded(dec, number, plan)
    restore(dec, value, plan, state, depth + 1)
    dec.open.discard(number)
    return value


def _decode_dataclass(dec: Decoder, payload: Json, depth: int) -> object:
    return _decode_family(dec, "$dataclass", payload, depth)


# --- Types of third parties -----------------------------------------------------------------------


def _encode_registered(enc: Encoder, value: Any, depth: int, entry: RegisteredType | PackedType) -> Json:
    if type(entry) is RegisteredType:
        enc.name(entry.cls)
    ref = enc.enter(value)
    if ref is not None:
        return ref
    enc.note_hash(_heirs_hash(entry, type(value)))
    inner = run(entry.encode, value)
    enc.hold(inner)
    enc.opaque.add(id(value))
    try:
        tree = {entry.tag: enc.value(inner, depth + 1)}
    except Refusal as refusal:
        if type(entry) is PackedType and refusal.trail and refusal.trail[-1] in entry.own:
            refusal.trail[-1] = ""
            if len(refusal.trail) == 1:
                refusal.kind = inspect_safely.type_name(type(value))
        raise
    enc.opaque.discard(id(value))
    return tree


def _heirs_hash(entry: RegisteredType | PackedType, cls: type) -> tuple[type, ...]:
    """Return the classes from which a user's class that belongs to a pack inherits ``__hash__`` or ``__eq__``."""
    base = entry.base if type(entry) is PackedType else None
    if base is None or cls is base:
        return ()
    return tuple(each for each in hash_definers(cls) if not inspect_safely.derives(base, each))


def decode_other(dec: Decoder, tag: str, payload: Json, depth: int) -> object:
    """Decode the payload of a tag that is not of the wire format itself: a registered type or family."""
    entry = dec.registry.by_tag(tag)
    if entry is None:
        raise VersionSkew("there is no such tag; register the type, or import its library, at this end too")
    if type(entry) is ClassFamily:
        return _decode_family(dec, tag, payload, depth)
    entry = cast("RegisteredType | PackedType", entry)
    # The decoder is the user's code, but which keys may reach it the policy says, as of every class. A pack's is ours.
    if type(entry) is RegisteredType and dec.gate.load_class(class_path(entry.cls)) is not entry.cls:
        raise VersionSkew(
            f"{class_path(entry.cls)} is another class than the registered one; register it after it is defined"
        )
    number = dec.reserve()
    value = run(entry.decode, dec.value(payload, depth + 1))
    if not entry.carries(type(value)):
        raise VersionSkew("the registered decoder returned an object of another type; correct it")
    dec.note_hash(_heirs_hash(entry, type(value)))
    dec.settle(number, value)
    return value


# --- Other objects --------------------------------------------------------------------------------


def _encode_object(enc: Encoder, value: Any, depth: int, plan: Plan) -> Json:
    tree: dict[str, Json] = {"class": enc.name(plan.cls)}
    for definer in plan.definers:
        enc.name_definer(definer)
    ref = enc.enter(value)
    if ref is not None:
        return ref
    begin(enc, value, plan)
    enc.opaque.add(id(value))
    _encode_making(enc, value, plan, tree, depth)
    enc.opaque.discard(id(value))
    if plan.base in MUTABLE:
        _encode_contents(enc, value, plan, tree, depth)
    if plan.setstate is not None:
        state = hook_state(enc, value, plan)
        if state is not None:
            tree["setstate"] = enc.value(state, depth + 1)
    elif attrs := enc.attributes(attributes(enc, value, plan), depth + 1):
        tree["state"] = attrs
    enc.open.discard(id(value))
    return {"$object": tree}


def _encode_making(enc: Encoder, value: object, plan: Plan, tree: dict[str, Json], depth: int) -> None:
    """Add what an object is made from: the arguments of ``__new__``, or what an immutable built-in base holds."""
    if plan.newargs is not None or plan.newargs_ex is not None:
        args, kwargs = _new_args(enc, value, plan)
        _new(plan, args, kwargs)
        tree["args"] = enc.sequence(args, depth + 1)
        if kwargs:
            tree["kwargs"] = enc.attributes(kwargs.items(), depth + 1)
    elif plan.base in CONTENTS and plan.base not in MUTABLE:
        _encode_contents(enc, value, plan, tree, depth)
    elif plan.new is not None:
        _new(plan)


def _new_args(enc: Encoder, value: object, plan: Plan) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if plan.newargs_ex is not None:
        result = run(plan.newargs_ex, value)
        if type(result) is tuple and len(result) == 2:  # noqa: PLR2004 - (args, kwargs)
            args, kwargs = result
        else:
            args = kwargs = None
    else:
        args, kwargs = run(cast("FunctionType", plan.newargs), value), {}
    if type(args) is not tuple or type(kwargs) is not dict:
        raise Refusal("its __getnewargs__ or __getnewargs_ex__ returns another shape than Python's data model says")
    enc.hold((args, kwargs))
    return args, kwargs


def _encode_contents(enc: Encoder, value: Any, plan: Plan, tree: dict[str, Json], depth: int) -> None:
    """Add the contents of the built-in base, read by its own methods."""
    base: Any = plan.base
    match CONTENTS[base]:
        case "value" if base is UUID:
            tree["value"] = enc.value(UUID(int=_UUID_INT(value), is_safe=_UUID_SAFE(value)), depth + 1)
        case "value":
            parts = base.__getnewargs__(value)
            tree["value"] = enc.value(complex(*parts) if base is complex else parts[0], depth + 1)
        case "keys":
            tree["keys"] = members(enc, dict.keys(value), dict.__len__(value), depth + 1)
            tree["values"] = enc.sequence(list(dict.values(value)), depth + 1)
        case _ if base is set or base is frozenset:
            tree["items"] = set_members(enc, base.__iter__(value), base.__len__(value), depth + 1)
        case _:
            tree["items"] = enc.sequence(tuple(base.__iter__(value)), depth + 1)


def _decode_object(dec: Decoder, payload: Json, depth: int) -> object:
    parts = record(payload)
    plan = planned_class(dec, parts.get("class"), "$object")
    for definer in plan.definers:
        dec.admit(definer)
    _check_parts(parts, plan)
    number = dec.reserve()
    value: Any = _make(dec, parts, plan, depth)
    if type(value) is not plan.cls:
        raise VersionSkew("its __new__ returned an object of another type")
    dec.settle(number, value)
    begin_decoded(dec, number, plan)
    _fill(dec, value, parts, plan, depth)
    if "setstate" in parts:
        run(cast("FunctionType", plan.setstate), value, dec.value(parts["setstate"], depth + 1))
    elif "state" in parts:
        restore(dec, value, plan, parts["state"], depth + 1)
    dec.open.discard(number)
    return value


def _fill(dec: Decoder, value: Any, parts: dict[str, Json], plan: Plan, depth: int) -> None:
    base: Any = plan.base
    if base is list:
        list.extend(value, dec.items(parts["items"], depth + 1))
    elif base is set:
        fill_set(value, read_members(dec, parts["items"], depth + 1))
    elif base is dict:
        keys = read_members(dec, parts["keys"], depth + 1)
        values = dec.items(parts["values"], depth + 1)
        if len(keys) != len(values):
            raise Refusal("$object has another number of keys than of values")
        fill_dict(value, list(zip(keys, values, strict=True)))


def _check_parts(parts: dict[str, Json], plan: Plan) -> None:
    """Refuse missing parts, and parts that the class does not use."""
    has_args = plan.newargs is not None or plan.newargs_ex is not None
    needed = {"class"} | ({"args"} if has_args else set())
    if plan.base in MUTABLE or (plan.base in CONTENTS and not has_args):
        contents = CONTENTS[plan.base]
        needed |= {"keys", "values"} if contents == "keys" else {contents}
    allowed = needed | {"setstate" if plan.setstate is not None else "state"}
    if plan.newargs_ex is not None:
        allowed |= {"kwargs"}
    if not needed <= parts.keys() <= allowed:
        raise VersionSkew("$object lacks a part, or has one that objects of the class have no use for")


def _make(dec: Decoder, parts: dict[str, Json], plan: Plan, depth: int) -> object:
    """Return the new object, before its state is restored."""
    base: Any = plan.base
    if "args" in parts:
        kwargs: dict[str, object] = {}
        args = dec.items(parts["args"], depth + 1)
        dec.members(kwargs, record(parts.get("kwargs", {})), depth + 1)
        return _new(plan, args, kwargs)
    if "value" in parts:
        value = dec.value(parts["value"], depth + 1)
        if type(value) is not base:
            raise VersionSkew("the value of $object is of another type than the class is built on")
        if base is UUID:
            return _uuid_of(plan.cls, value)
        return base.__new__(plan.cls, value)
    if base is tuple:
        return tuple.__new__(plan.cls, dec.items(parts["items"], depth + 1))
    if base is frozenset:
        values = read_members(dec, parts["items"], depth + 1)
        made: Any = hashed(lambda values: frozenset.__new__(plan.cls, values), values, values)
        check_distinct(frozenset.__len__(made), values)
        return made
    return _new(plan)


def _uuid_of(cls: type, value: UUID) -> object:
    made: Any = object.__new__(cls)
    for name in ("int", "is_safe"):
        vars(UUID)[name].__set__(made, vars(UUID)[name].__get__(value))
    return made


def _new(plan: Plan, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = MappingProxyType({})) -> object:
    """Call ``__new__`` and return the object.

    Raises:
        Refusal: ``__new__`` raised, or returns the same object twice: a token must not change the state of a singleton.
    """
    base: Any = plan.base
    if plan.new is None:
        return run(base.__new__, plan.cls, *args, **kwargs)
    made = run(plan.new, plan.cls, *args, **kwargs)
    if run(plan.new, plan.cls, *args, **kwargs) is made:
        raise VersionSkew(
            "its __new__ returns one object again and again, which a task must not change; "
            "pass what it is made from, and have the task ask for it"
        )
    return made


_BY_TAG: Final[dict[str, Any]] = {
    "$enum": _encode_enum,
    "$namedtuple": _encode_namedtuple,
    "$model": encode_model,
    "$exception": encode_exception,
    "$object": _encode_object,
}

ENCODERS: Final[dict[type, Any]] = dict.fromkeys(_CALLABLES, _encode_callable)

DECODERS: Final[dict[str, Any]] = {
    "$callable": _decode_callable,
    "$class": _decode_class,
    "$enum": _decode_enum,
    "$namedtuple": _decode_namedtuple,
    "$dataclass": _decode_dataclass,
    "$model": decode_model,
    "$exception": decode_exception,
    "$object": _decode_object,
}
