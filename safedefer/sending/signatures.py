"""The parameters of one callable given to another, so that they are spelled once.

Type checkers read them from the ``ParamSpec``, ``help()`` and editors from ``__signature__``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any, Concatenate, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


def takes(model: Callable[_P, object]) -> Callable[[Callable[..., _T]], Callable[_P, _T]]:
    """Give a function the parameters of ``model``."""

    def decorate(function: Callable[..., _T]) -> Callable[_P, _T]:
        _sign(function, inspect.signature(model).parameters.values())
        return function

    return decorate


def method_takes(model: Callable[_P, object]) -> Callable[[Callable[..., _T]], Callable[Concatenate[Any, _P], _T]]:
    """Give a method the parameters of ``model``, after ``self``."""

    def decorate(function: Callable[..., _T]) -> Callable[Concatenate[Any, _P], _T]:
        self = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
        _sign(function, [self, *inspect.signature(model).parameters.values()])
        return function

    return decorate


def _sign(function: Any, parameters: Any) -> None:
    returned = inspect.signature(function).return_annotation
    function.__signature__ = Signature(list(parameters), return_annotation=returned)
