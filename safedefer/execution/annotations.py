"""Check arguments against the annotations of a callable, with pydantic in strict mode."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import FunctionType, MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast, get_type_hints

from pydantic import ValidationError

from safedefer.errors import InvalidArguments
from safedefer.execution.binding import read_signature
from safedefer.execution.bounded_validation import TooMuchWork, bounded, counting
from safedefer.execution.revalidation import revalidate

if sys.version_info >= (3, 14):
    from annotationlib import Format, get_annotations

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_log: Final = logging.getLogger("safedefer")


def check_annotations(target: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that each argument is of the type that its annotation says.

    Arguments without one pass, and those of which pydantic makes no validator; the log names these once.

    Models in the arguments, annotated or not, and the object of a method are validated again first.

    Raises:
        InvalidArguments: One is of another type, or a model does not pass its validators; the message names it and does not quote its value.
    """
    owner = getattr(target, "__self__", None) if type(target) is MethodType else target
    try:
        with bounded(revalidate([owner, *args, *kwargs.values()])):
            _check(target, args, kwargs)
    except TooMuchWork:
        raise InvalidArguments(
            "the arguments take too much work to validate; give the union in their recursive type a discriminator"
        ) from None


def _check(target: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    hints = _hints(target)
    try:
        # The signature of the wrapped function, if there is one: it has the annotations.
        signature = read_signature(target)
        bound = signature.bind(*args, **kwargs)
    except (ValueError, TypeError):  # a built-in without a signature, or a wrapper that takes other arguments
        return
    for name, value in bound.arguments.items():
        validator = hints.get(name)
        if validator is None:
            continue
        kind = signature.parameters[name].kind
        values = value if kind is inspect.Parameter.VAR_POSITIONAL else (value,)
        values = tuple(value.values()) if kind is inspect.Parameter.VAR_KEYWORD else values
        for item in values:
            try:
                validator.validate_python(item, strict=True)
            except ValidationError as error:
                what = error.errors(include_input=False, include_url=False)[0]["type"]
                raise InvalidArguments(
                    f"the argument {name} is not what its annotation says ({what}); send the annotated type",
                    path=f"$.kwargs.{name}",
                ) from None


def _hints(target: Callable[..., object]) -> Mapping[str, Any]:
    kind = type(target)
    if kind is MethodType:
        return _function_hints(cast("MethodType", target).__func__)
    if kind is FunctionType:
        return _function_hints(target)
    return _function_hints(cast("Any", target).__init__ if issubclass(kind, type) else cast("Any", kind).__call__)


@lru_cache(maxsize=1024)
def _function_hints(function: Callable[..., object]) -> Mapping[str, Any]:
    validators = {}
    unchecked = []
    try:
        annotations = _annotations(function)
    except (RecursionError, MemoryError):  # they tell of the caller
        raise
    except Exception:  # noqa: BLE001  # an annotation is code, and may raise anything
        annotations = {}
        unchecked.append("all")
    for name, annotation in annotations.items():
        if name == "return":
            continue
        # One by one: a name that only type checkers see concerns its own argument alone.
        try:
            hint = get_type_hints(
                SimpleNamespace(__annotations__={name: annotation}),
                globalns=getattr(inspect.unwrap(function), "__globals__", {}),
                include_extras=True,
            )[name]
        except (RecursionError, MemoryError):
            raise
        except Exception:  # noqa: BLE001  # an annotation is code, and may raise anything
            unchecked.append(name)
            continue
        adapter = _adapter(hint)
        if adapter is None:
            unchecked.append(name)
        else:
            validators[name] = counting(adapter.validator, adapter.core_schema)
    if unchecked:
        _log.warning(
            "arguments of %s.%s are not checked: %s; their annotations cannot be evaluated here, or pydantic has no "
            "validator of them (import the names outside TYPE_CHECKING, or use types that pydantic knows)",
            function.__module__, function.__qualname__, ", ".join(unchecked),
        )  # fmt: skip
    return validators


def _annotations(function: Callable[..., object]) -> Mapping[str, Any]:
    if sys.version_info >= (3, 14) and type(function) is FunctionType:
        # Evaluated only now: names that only type checkers see are forward references.
        return get_annotations(function, format=Format.FORWARDREF)
    return cast("Mapping[str, Any]", getattr(function, "__annotations__", {}))


def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    """Return what validates values of a type: pydantic's validator, else ``isinstance``; None if there is neither."""
    from pydantic import ConfigDict, InstanceOf, TypeAdapter  # noqa: PLC0415  # only handlers that validate need it

    kinds: list[Callable[[], TypeAdapter[Any]]] = [
        lambda: TypeAdapter(hint),
        lambda: TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)),
    ]
    if issubclass(type(hint), type):
        kinds.append(lambda: TypeAdapter(cast("Any", InstanceOf)[hint]))
    for make in kinds:
        # A protocol that isinstance does not take is a SchemaError; a type's own __get_pydantic_core_schema__ may raise anything.
        with contextlib.suppress(Exception):
            adapter = make()
            if adapter.pydantic_complete:
                return adapter
    return None
