"""The tag ``$model``: pydantic models, by their fields, the set of given fields, extra and private attributes."""

from __future__ import annotations

from typing import Any, Final, cast

from pydantic import BaseModel, RootModel
from pydantic_core import PydanticUndefined

from safedefer.codecs import inspect_safely
from safedefer.codecs.class_layout import REMEDY, Plan
from safedefer.codecs.decoder import Decoder, array, record, string
from safedefer.codecs.encoder import Encoder
from safedefer.codecs.field_defaults import check_complete, complete
from safedefer.codecs.object_state import begin, begin_decoded, check_names, plan_of, run, slot_value
from safedefer.codecs.shared import Json, Refusal, VersionSkew, is_text
from safedefer.codecs.type_arguments import MOST_NEW, parametrize
from safedefer.refs import generic_origin

_FIELDS_SET, _EXTRA, _PRIVATE = (
    BaseModel.__dict__[name] for name in ("__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")
)
_MODEL_SLOTS: Final = frozenset({"__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__"})


def encode_model(enc: Encoder, value: Any, depth: int, plan: Plan) -> Json:
    """Encode a model of an admitted class: its fields, the set of given fields, extra and private attributes."""
    ref = enc.enter(value)
    if ref is not None:
        return ref
    name = _model_name(enc, plan.cls, depth)
    fields_set = slot_value(_FIELDS_SET, value)
    if not plan.slots.keys() <= _MODEL_SLOTS or type(fields_set) is not set or plan.state_of is None:
        raise Refusal(f"a model with slots of its own, or one that was not made completely; {REMEDY}")
    if not all(type(field) is str and is_text(field) for field in fields_set):
        raise Refusal("its set of given fields holds what is no name; correct it")
    begin(enc, value, plan)
    enc.own_state(fields_set)
    check_names(plan.state_of(value), plan)
    check_complete(plan.defaults, plan.state_of(value))
    tree: list[Json] = [name, _part(enc, plan.state_of(value), depth), sorted(fields_set)]
    enc.add(len(fields_set))
    tree.append(_part(enc, slot_value(_EXTRA, value), depth))
    private = slot_value(_PRIVATE, value)
    if type(private) is dict and any(each is PydanticUndefined for each in private.values()):
        # Declared and never set: pydantic leaves these out of its own state too.
        private = {key: each for key, each in private.items() if each is not PydanticUndefined}
    check_complete(plan.private_defaults, private if type(private) is dict else ())
    tree.append(_part(enc, private, depth))
    enc.open.discard(id(value))
    return {"$model": tree}


def _model_name(enc: Encoder, cls: type, depth: int) -> Json:
    """Return the name of a model, or that of a generic model and the arguments that it was given."""
    origin = generic_origin(cls)
    if origin is cls:
        return enc.name(cls)
    args = inspect_safely.namespace(cls)["__pydantic_generic_metadata__"].get("args")
    # Where the tree is thrown away, an argument may be a class that the gate refused.
    if not enc.looks_only and run(parametrize, enc.registry, origin, args) is not cls:
        raise Refusal(
            "the class is not what its generic model gives for its arguments; name it: class IntPage(Page[int])"
        )
    return [enc.name(origin), *(enc.value(arg, depth + 1) for arg in args)]


def _parametrized(dec: Decoder, name: Json, depth: int) -> type:
    origin, *args = array(name, least=2)
    cls = dec.gate.load_class(string(origin))
    values = tuple(dec.value(arg, depth + 1) for arg in args)

    def making() -> None:
        dec.generics += 1
        if dec.generics > MOST_NEW:
            raise VersionSkew(f"more than {MOST_NEW} generic models with new arguments; the next attempt makes more")

    return cast("type", run(parametrize, dec.registry, cls, values, making))


def _part(enc: Encoder, part: object, depth: int) -> Json:
    if part is None or part is inspect_safely.MISSING:
        return None
    if type(part) is not dict:
        raise Refusal(f"its fields are not kept in a dict; {REMEDY}")
    enc.own_state(part)
    return enc.attributes(part.items(), depth + 1)


def decode_model(dec: Decoder, payload: Json, depth: int) -> object:
    """Decode a model. No validator runs."""
    name, fields, names, extra, private = array(payload, least=5, most=5)
    number = dec.reserve()
    cls = _parametrized(dec, name, depth) if type(name) is list else dec.gate.load_class(string(name))
    plan = plan_of(dec, cls, "$model")
    value = run(object.__new__, plan.cls)
    dec.settle(number, value)
    begin_decoded(dec, number, plan)
    state = plan.state_of(value) if plan.state_of is not None else {}
    check_names(record(fields), plan)
    dec.members(state, record(fields), depth + 1)
    run(complete, plan.defaults, state, state.__setitem__, dec.add)
    dec.add(len(array(names)))
    given = {string(each) for each in names}
    if len(given) != len(names):
        raise Refusal("a field is given twice")
    _FIELDS_SET.__set__(value, given)
    if private is None and plan.private_defaults:
        private = {}
    for slot, part in ((_EXTRA, extra), (_PRIVATE, private)):
        if part is not None:
            members_of: dict[str, object] = {}
            dec.members(members_of, record(part), depth + 1)
            if slot is _PRIVATE:
                run(complete, plan.private_defaults, members_of, members_of.__setitem__, dec.add)
            slot.__set__(value, members_of)
        elif not inspect_safely.derives(plan.cls, RootModel):
            slot.__set__(value, None)
    dec.open.discard(number)
    return value
