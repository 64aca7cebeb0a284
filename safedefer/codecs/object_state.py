"""Read and restore the state of an object by the plan of its class."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from itertools import chain
from types import MemberDescriptorType
from typing import Any

from safedefer.codecs import inspect_safely
from safedefer.codecs.class_layout import REMEDY, Plan, make_plan
from safedefer.codecs.decoder import Decoder, record, string
from safedefer.codecs.encoder import Encoder
from safedefer.codecs.field_defaults import check_complete, complete
from safedefer.codecs.registry import TypeRegistry
from safedefer.codecs.shared import Json, Refusal, VersionSkew, step
from safedefer.refs import generic_origin

_Pairs = chain[tuple[Any, Any]]


def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a hook of an admitted class, or a registered function.

    Raises:
        Refusal: The function raised.
    """
    try:
        return function(*args, **kwargs)
    except Refusal:
        raise
    except Exception as error:
        name = getattr(function, "__qualname__", "a hook of the class")
        raise VersionSkew(f"{name} raised {type(error).__name__}; correct the class") from error


def _plan(cls: type, registry: TypeRegistry) -> Plan:
    plan: Plan | None = registry.plans.get(id(cls))
    if plan is None:
        try:
            plan = make_plan(cls, registry)
        except ValueError as error:
            raise VersionSkew(str(error)) from None
    return plan


def planned(enc: Encoder, cls: type) -> Plan:
    """Return the plan of an admitted class.

    Raises:
        Refusal: Its objects cannot be carried, or the gate does not admit the class.
    """
    plan = _plan(cls, enc.registry)
    enc.name(generic_origin(cls))
    # Only after the gate: the classes that a policy admits are found by name, which bounds the number of plans.
    enc.registry.plans[id(cls)] = plan
    enc.registry.keep_unpacked(cls)
    return plan


def planned_class(dec: Decoder, name: Json, tag: str) -> Plan:
    """Return the plan of a class that a token names.

    Raises:
        Refusal: Its objects have another tag, or cannot be carried.
        RejectedTask: The gate does not admit or find the class.
    """
    return plan_of(dec, dec.gate.load_class(string(name)), tag)


def plan_of(dec: Decoder, cls: type, tag: str) -> Plan:
    """Return the plan of a class that the gate has admitted.

    Raises:
        Refusal: Its objects have another tag, or cannot be carried.
    """
    plan = _plan(cls, dec.registry)
    if plan.tag != tag:
        raise VersionSkew(f"objects of this class are not written as {tag}; deploy the code that the task was made for")
    dec.registry.plans[id(cls)] = plan
    dec.note_hash(plan.hash_definers)
    return plan


def begin(enc: Encoder, value: object, plan: Plan) -> None:
    """Note that the decoder will not have finished this object while it makes the values inside it."""
    if not plan.identity_hash:
        enc.open.add(id(value))


def begin_decoded(dec: Decoder, number: int, plan: Plan) -> None:
    """Note that the object of a number is unfinished."""
    if not plan.identity_hash:
        dec.open.add(number)


def slot_value(slot: MemberDescriptorType, value: object) -> Any:
    """Return the value of a slot, or ``MISSING``."""
    try:
        return slot.__get__(value)
    except AttributeError:
        return inspect_safely.MISSING


def attributes(enc: Encoder, value: object, plan: Plan) -> _Pairs:
    """Return the attributes of an object: those of its ``__dict__``, then its slots.

    Raises:
        Refusal: ``__dict__`` and slots share a name, or ``__getstate__`` returns another shape.
    """
    if plan.getstate is not None:
        own, held = _halves(enc, hook_state(enc, value, plan), plan)
    else:
        own, held = _own_dict(enc, value, plan), _slots(value, plan)
        if plan.defaults:
            check_complete(plan.defaults, own.keys() | held.keys())
    if plan.slots or held:
        _check_apart(own, plan.slots.keys() | held.keys())
    check_names(own, plan)
    return chain(own.items(), held.items())


def check_names(names: Iterable[Any], plan: Plan) -> None:
    """Refuse attributes that hide a function of the class: code would call them in its place.

    Raises:
        Refusal: A name, other than that of a slot or declared field, does.
    """
    for name in names:
        if type(name) is str and name in plan.functions:
            raise VersionSkew(f"the attribute {name} hides a function of the class; rename one of the two")


def hook_state(enc: Encoder, value: object, plan: Plan) -> Any:
    """Return the result of ``__getstate__``, or of ``object.__getstate__``."""
    if plan.getstate is not None:
        state = run(plan.getstate, value)
        enc.hold(state)
        return state
    own, held = dict(_own_dict(enc, value, plan)), _slots(value, plan)
    default = (own or None, held) if held else own or None
    enc.hold(default)
    return default


def _slots(value: object, plan: Plan) -> dict[str, Any]:
    if not plan.slots and not plan.shadowed:
        return {}
    if any(slot_value(slot, value) is not inspect_safely.MISSING for slot in plan.shadowed):
        raise Refusal(f"a base class has a slot of the same name; {REMEDY}")
    held = ((name, slot_value(slot, value)) for name, slot in plan.slots.items())
    return {name: each for name, each in held if each is not inspect_safely.MISSING}


def _own_dict(enc: Encoder, value: object, plan: Plan) -> dict[Any, Any]:
    if plan.state_of is None:
        return {}
    own = plan.state_of(value)
    if type(own) is not dict:
        raise Refusal(f"its __dict__ is not exactly a dict; {REMEDY}")
    enc.own_state(own)
    return own


def _check_apart(own: dict[Any, Any], slots: AbstractSet[str]) -> None:
    # Of a slot that is empty too: the decoder would put what the __dict__ has of its name into the slot.
    if any(type(name) is str and name in slots for name in own):
        raise Refusal(f"its __dict__ and its slots share a name; {REMEDY}")


def _halves(enc: Encoder, state: Any, plan: Plan) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Read a state as Python does for a class without ``__setstate__``: a dict, or a pair of dicts."""
    own, held = state if type(state) is tuple and len(state) == 2 else (state, None)  # noqa: PLR2004
    if own is not None and plan.state_of is None:
        raise Refusal("its __getstate__ returns a dict, and its objects have none; return (None, a dict of the slots)")
    own, held = ({} if each is None else each for each in (own, held))
    if type(own) is not dict or type(held) is not dict:
        raise Refusal("its __getstate__ returns no dict, and it has no __setstate__; define one")
    enc.own_state(own, held)
    return own, held


def _store(value: object, plan: Plan, own: Any, name: str, default: Any) -> None:
    slot = plan.slots.get(name)
    if slot is not None:
        slot.__set__(value, default)
    elif type(own) is dict:
        own[name] = default


def restore(dec: Decoder, value: object, plan: Plan, tree: Json, depth: int) -> None:
    """Set attributes as ``object.__setattr__`` would. Runs no code of the class.

    Raises:
        Refusal: The object can have no such attribute.
    """
    own = plan.state_of(value) if plan.state_of is not None else None
    trees = record(tree)
    dec.add(len(trees))
    if not plan.functions.isdisjoint(trees):
        check_names((name for name in trees if name not in plan.slots), plan)
    name = ""
    try:
        for name, each in trees.items():
            if name[:1] == "$":
                raise Refusal("no attribute begins with '$'")  # noqa: TRY301 - the path is added below
            slot = plan.slots.get(name)
            if slot is not None:
                slot.__set__(value, dec.value(each, depth))
            elif type(own) is dict:
                own[sys.intern(name)] = dec.value(each, depth)
            else:
                raise VersionSkew(
                    "objects of the class have no such attribute; deploy the code that the task was made for"
                )
    except Refusal as refusal:
        refusal.trail.append(step(name))
        raise
    if plan.defaults and plan.getstate is None:
        run(complete, plan.defaults, trees, lambda name, default: _store(value, plan, own, name, default), dec.add)
