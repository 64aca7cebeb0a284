"""Run the validators of pydantic models that arrived without them: their state is what a key holder wrote.

Each model and pydantic dataclass that the arguments hold, by whatever way, is validated once by its own class, in strict mode,
from its fields. The result is compared and thrown away: the callable gets the object that arrived, so that sharing, private
attributes and identity stay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final

from pydantic import BaseModel, RootModel, ValidationError
from pydantic_core import ArgsKwargs

from safedefer.codecs.inspect_safely import lookup, mro, namespace
from safedefer.codecs.registry import REGISTRY
from safedefer.errors import InvalidArguments

#: What no argument holds by itself: what these lead to is the program's.
_OURS: Final = (type, FunctionType, BuiltinFunctionType, ModuleType)
_PLAIN: Final = frozenset({str, int, float, bool, bytes, bytearray, type(None)})


def revalidate(values: Iterable[object]) -> None:
    """Validate every model in the values.

    Raises:
        InvalidArguments: One does not pass, or its validators would change it; the message names its class.
    """
    pending, seen = [*values], set[int]()
    while pending:
        value = pending.pop()
        kind = type(value)
        if kind in _PLAIN or id(value) in seen or issubclass(kind, _OURS):
            continue
        seen.add(id(value))
        if issubclass(kind, BaseModel):
            _check_model(value)
        elif lookup(kind, "__pydantic_validator__") is not None:
            _check_dataclass(value)
        pending += _parts(value)


def _parts(value: Any) -> Iterator[object]:
    """Give the values that a container or an object holds."""
    kind = type(value)
    if issubclass(kind, MethodType):
        yield value.__self__
    elif issubclass(kind, dict):
        yield from dict.keys(value)
        yield from dict.values(value)
    elif issubclass(kind, list | tuple | set | frozenset | deque):
        base = next(each for each in (list, tuple, set, frozenset, deque) if issubclass(kind, each))
        yield from base.__iter__(value)
    if REGISTRY.by_class(kind) is not None:
        return  # its decoder made it, and what it leads to may be the program's
    for cls in mro(kind):
        slots = namespace(cls)
        for name, slot in slots.items():
            if type(slot) is _SLOT:
                try:
                    yield slot.__get__(value)
                except AttributeError:
                    continue
            elif name == "__dict__" and type(slot) is _DICT:
                yield slot.__get__(value)


class _Slotted:
    __slots__ = ("__dict__", "slot")


_SLOT: Final = type(vars(_Slotted)["slot"])
_DICT: Final = type(vars(_Slotted)["__dict__"])


def _check_model(model: Any) -> None:
    kind = type(model)
    state = _state(model)
    extra = getattr(model, "__pydantic_extra__", None)
    data: Any = {name: state[name] for name in kind.model_fields if name in state}
    if issubclass(kind, RootModel):
        data = data.get("root")
    elif extra:
        data = {**extra, **data}
    fresh = object.__new__(kind)
    _validate(kind, data, fresh)
    _compare(kind, state, _state(fresh), kind.model_fields)


def _check_dataclass(value: Any) -> None:
    kind = type(value)
    state = _state(value)
    fields = {name: field for name, field in kind.__pydantic_fields__.items() if field.init is not False}
    fresh = object.__new__(kind)
    _validate(kind, ArgsKwargs((), {name: state[name] for name in fields if name in state}), fresh)
    _compare(kind, state, _state(fresh), fields)


def _validate(kind: Any, data: object, fresh: object) -> None:
    try:
        # By name: a model keeps its fields by name, whatever their aliases are.
        kind.__pydantic_validator__.validate_python(
            data, strict=True, self_instance=fresh, by_name=True, by_alias=False
        )
    except ValidationError as error:
        raise _refused(kind, str(error.errors(include_input=False, include_url=False)[0]["type"])) from None


def _compare(kind: type, was: Mapping[str, object], now: Mapping[str, object], fields: Iterable[str]) -> None:
    for name in fields:
        if not _same(was.get(name), now.get(name)):
            raise _refused(kind, f"they change {name}")


def _same(was: Any, now: Any) -> bool:
    # Equal, and not of one type: a default is not validated, and 1 stands for 1.0. Other values that are of another type are
    # refused by strict mode before.
    return was is now or bool(was == now or (was != was and now != now))  # noqa: PLR0124 - NaN


def _state(value: Any) -> dict[str, Any]:
    """Return fields by name; those of a dataclass with slots too."""
    state: dict[str, Any] = {}
    for cls in reversed(mro(type(value))):
        for name, slot in namespace(cls).items():
            if type(slot) is _SLOT:
                try:
                    state[name] = slot.__get__(value)
                except AttributeError:
                    continue
            elif name == "__dict__" and type(slot) is _DICT:
                state.update(slot.__get__(value))
    return state


def _refused(kind: type, why: str) -> InvalidArguments:
    return InvalidArguments(
        f"a {kind.__module__}:{kind.__qualname__} in the arguments does not pass its own validators ({why}); send one that was validated",
        path="$",
    )
