"""Defaults of declared fields: a token that was made before a field existed arrives with the field's default.

A default that is an attribute of the class needs nothing. Others (factories, slots, pydantic's, attrs') are set by the
decoder. An object that lacks such an attribute is refused by the encoder: it would arrive with it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Container
from types import MemberDescriptorType
from typing import Any

from pydantic_core import PydanticUndefined

from safedefer.codecs import inspect_safely
from safedefer.codecs.shared import Refusal, VersionSkew

Defaults = dict[str, Callable[[], Any]]


def of_class(cls: type) -> Defaults:
    """Return the defaults of the fields of a dataclass or attrs class, those that no attribute of the class gives."""
    found: Defaults = {}
    for field in dict.values(_declared(cls, "__dataclass_fields__", dict, {})):
        if field._field_type is not dataclasses._FIELD:  # type: ignore[attr-defined]  # noqa: SLF001 - ClassVar, InitVar
            continue
        if field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory
        elif field.default is not dataclasses.MISSING:
            found[field.name] = _constant(field.default)
    attr: Any = sys.modules.get("attr")
    if attr is not None:
        for each in tuple.__iter__(_declared(cls, "__attrs_attrs__", tuple, ())):
            if type(each.default) is attr.Factory:
                found[each.name] = each.default.factory if not each.default.takes_self else _unknown
            elif each.default is not attr.NOTHING:
                found[each.name] = _constant(each.default)
    return {name: default for name, default in found.items() if _is_unset_without(cls, name)}


def of_model(cls: type) -> tuple[Defaults, Defaults]:
    """Return the defaults of the fields of a pydantic model, and those of its private attributes."""
    fields: Defaults = {}
    for name, field in dict.items(_declared(cls, "__pydantic_fields__", dict, {})):
        if not field.is_required():
            takes = field.default_factory is not None and field.default_factory_takes_validated_data
            fields[name] = _unknown if takes else _model_default(field)
    private = _declared(cls, "__private_attributes__", dict, {})
    return fields, {name: each.get_default for name, each in dict.items(private) if _has_default(each)}


def complete(
    defaults: Defaults, names: Container[str], store: Callable[[str, Any], object], add: Callable[[int], object]
) -> None:
    """Store the defaults of the names that are missing. They count as values of the call: a token that omits them is short.

    Raises:
        Refusal: There are too many values.
        Exception: A factory raised, whatever it was.
    """
    missing = [name for name in defaults if name not in names]
    add(len(missing))
    for name in missing:
        store(name, defaults[name]())


def check_complete(defaults: Defaults, names: Container[str]) -> None:
    """Refuse an object that lacks an attribute with a default.

    Raises:
        Refusal: It does.
    """
    for name in defaults:
        if name not in names:
            raise Refusal(f"the field {name} is not set, and would arrive with its default; set it")


def _declared(cls: type, name: str, kind: type, none: Any) -> Any:
    found = inspect_safely.lookup(cls, name)
    return found[1] if found is not None and inspect_safely.derives(type(found[1]), kind) else none


def _constant(value: object) -> Callable[[], Any]:
    return lambda: value


def _unknown() -> Any:
    raise VersionSkew("the default of a new field needs the other fields; defer anew, or let the default need nothing")


def _model_default(field: Any) -> Callable[[], Any]:
    # pydantic looks at the signature of a factory whenever it is asked for a default, for 0.2 ms.
    return field.default_factory or field.get_default  # type: ignore[no-any-return]


def _has_default(private: Any) -> bool:
    return private.default is not PydanticUndefined or private.default_factory is not None


def _is_unset_without(cls: type, name: str) -> bool:
    """Whether an object without the attribute has none: neither the class nor a descriptor of it answers."""
    found = inspect_safely.lookup(cls, name)
    return found is None or type(found[1]) is MemberDescriptorType
