"""Validators of pydantic whose work is bounded, whatever they validate.

A recursive type with a union tries each choice of the union at each level of a value: twenty levels of one value each are
millions of calls, in which the interpreter does nothing else. So the validators count the calls of what is recursive.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from pydantic_core import SchemaValidator

#: Calls of recursive types for any arguments, and more for each value in them.
LEAST_CALLS: Final = 20_000
CALLS_PER_VALUE: Final = 16

_left: Final[ContextVar[list[int]]] = ContextVar("safedefer_validations_left")


class TooMuchWork(Exception):
    """The validators of a recursive type were called more often than its values explain."""


@contextmanager
def bounded(values: int) -> Iterator[None]:
    """Bound the validation of so many values while the context lasts.

    Raises:
        TooMuchWork: From the validators, if they need more calls.
    """
    token = _left.set([LEAST_CALLS + CALLS_PER_VALUE * values])
    try:
        yield
    finally:
        _left.reset(token)


def counting(validator: Any, schema: Any) -> Any:
    """Return a validator that counts the calls of recursive types; the given one if its type has none.

    Args:
        validator: pydantic's own validator of the type.
        schema: The core schema of the type.
    """
    if type(schema) is not dict or schema["type"] != "definitions":
        return validator
    definitions = [
        {
            "type": "function-before",
            "function": {"type": "no-info", "function": _count},
            "schema": {name: part for name, part in each.items() if name != "ref"},
            "ref": each["ref"],
        }
        for each in schema["definitions"]
    ]
    counted: Any = {**schema, "definitions": definitions}
    # Prebuilt: the validator of a model that exists already, which does not count.
    return SchemaValidator(counted, _use_prebuilt=False)


def _count(value: object) -> object:
    left = _left.get()
    left[0] -= 1
    if left[0] < 0:
        raise TooMuchWork
    return value
