"""Check arguments against the annotations of a callable, with pydantic in strict mode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, cast, get_type_hints

from pydantic import ConfigDict, ValidationError
from pydantic.errors import PydanticUserError

from safedefer.errors import InvalidArguments
from safedefer.execution.bounded_validation import TooMuchWork, bounded, counting
from safedefer.execution.revalidation import revalidate

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def check_annotations(target: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that each argument is of the type that its annotation says. Arguments without one pass.

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
    try:
        # The signature of the wrapped function, if there is one: it has the annotations.
        signature = inspect.signature(target)
        bound = signature.bind(*args, **kwargs)
    except (ValueError, TypeError):  # a built-in without a signature, or a wrapper that takes other arguments
        return
    hints = _hints(target)
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
    from pydantic import TypeAdapter  # noqa: PLC0415  # only handlers that validate need it

    validators = {}
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):  # annotations for type checkers only, or a C function
        return {}
    for name, hint in hints.items():
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(hint)
        except PydanticUserError:  # a type that pydantic cannot validate: isinstance decides
            adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        validators[name] = counting(adapter.validator, adapter.core_schema)
    return validators
