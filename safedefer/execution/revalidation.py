"""Run the validators of pydantic models that arrived without them: their state is what a key holder wrote.

Each model and pydantic dataclass that the arguments hold, by whatever way, is validated once by its own class, in strict mode,
from its fields. The result is compared and thrown away: the callable gets the object that arrived, so that sharing, private
attributes and identity stay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final

from pydantic import BaseModel, RootModel, ValidationError
from pydantic_core import ArgsKwargs

from safedefer.codecs.inspect_safely import lookup, mro, namespace
from safedefer.codecs.registry import REGISTRY
from safedefer.errors import InvalidArguments
from safedefer.execution.bounded_validation import bounded, counting

#: What no argument holds by itself: what these lead to is the program's.
_OURS: Final = (type, FunctionType, ModuleType)
_PLAIN: Final = frozenset({str, int, float, bool, bytes, bytearray, type(None)})


def revalidate(values: Iterable[object]) -> int:
    """Validate every model in the values.

    Returns:
        The number of values, shared ones counted wherever they are met.

    Raises:
        InvalidArguments: One does not pass, or its validators would change it; the message names its class.
        TooMuchWork: The validators need more calls than the values explain.
    """
    pending, seen, count = [*values], set[int](), 0
    models: list[object] = []
    while pending:
        value = pending.pop()
        count += 1
        kind = type(value)
        if kind in _PLAIN or id(value) in seen or issubclass(kind, _OURS):
            continue
        seen.add(id(value))
        if lookup(kind, "__pydantic_validator__") is not None:
            models.append(value)
        pending += _parts(value)
    with bounded(count):
        for model in models:
            if issubclass(type(model), BaseModel):
                _check_model(model)
            else:
                _check_dataclass(model)
    return count


def _parts(value: Any) -> Iterator[object]:
    """Give the values that a container or an object holds."""
    kind = type(value)
    if kind is MethodType or kind is BuiltinFunctionType:
        # A module, for a built-in function: that is the program's.
        yield value.__self__
    elif issubclass(kind, dict):
        yield from dict.keys(value)
        yield from dict.values(value)
    elif issubclass(kind, list | tuple | set | frozenset | deque):
        base = next(each for each in (list, tuple, set, frozenset, deque) if issubclass(kind, each))
        yield from base.__iter__(value)
    elif issubclass(kind, BaseException):
        yield from (slot.__get__(value) for slot in _ERROR_PARTS)
    if REGISTRY.by_class(kind) is None:  # else its decoder made it, and what it leads to may be the program's
        yield from _attributes(value)


def _attributes(value: object) -> Iterator[object]:
    """Give the values of the slots of an object, and its ``__dict__``."""
    for cls in mro(type(value)):
        for name, slot in namespace(cls).items():
            if type(slot) is _SLOT:
                try:
                    yield slot.__get__(value)
                except AttributeError:
                    continue
            elif name == "__dict__" and type(slot) is _DICT:
                yield slot.__get__(value)


#: What exceptions keep in C, in descriptors that are no slots.
_ERROR_PARTS: Final[Any] = tuple(vars(BaseException)[name] for name in ("args", "__cause__", "__context__"))


class _Slotted:
    __slots__ = ("__dict__", "slot")


_SLOT: Final = type(vars(_Slotted)["slot"])
_DICT: Final = type(vars(_Slotted)["__dict__"])


def _check_model(model: Any) -> None:
    kind = type(model)
    _clean(model)
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


def _clean(model: Any) -> None:
    """Forget what properties cached, which the program computes again, and refuse what is no field: no validator sees it."""
    kind, own = type(model), vars(model)
    for name in own.keys() - kind.model_fields.keys():
        found = lookup(kind, name)
        if found is None or not issubclass(type(found[1]), cached_property):
            raise _refused(kind, "it has an attribute that is no field")
        del own[name]


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
        _validator(kind).validate_python(data, strict=True, self_instance=fresh, by_name=True, by_alias=False)
    except ValidationError as error:
        raise _refused(kind, str(error.errors(include_input=False, include_url=False)[0]["type"])) from None


@lru_cache(maxsize=1024)
def _validator(kind: Any) -> Any:
    made = kind.__pydantic_validator__
    _ = made.title  # completes a class whose annotations were not defined yet
    return counting(kind.__pydantic_validator__, kind.__pydantic_core_schema__)


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
