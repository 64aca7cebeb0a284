"""Whether a callable takes some arguments, said without calling it.

Python's own ``inspect.signature`` decides. What is common, positional and keyword arguments that fit a
function's parameters, is recognized beforehand from a cached summary of the signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import Parameter, Signature
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, cast

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_MAX_FITTING = 64
_BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


@dataclass(frozen=True, slots=True)
class _Shape:
    """A signature, and what is needed to see at once that arguments fit it."""

    fitting: set[tuple[object, ...]]
    """What fitted already: how many by position, those before the caller's own included, and the names."""

    signature: Signature
    positional: tuple[str, ...]
    """Names of the parameters that may be given by position."""
    required: int
    """How many of them have no default."""
    by_name: frozenset[str]
    """Names of the parameters that may be given by keyword."""
    named_required: frozenset[str]
    """Keyword-only parameters without a default."""
    rest: bool
    """It has ``*args``."""
    named: bool
    """It has ``**kwargs``."""

    @classmethod
    def of(cls, signature: Signature) -> _Shape:
        parameters = signature.parameters.values()
        kinds = {p.kind for p in parameters}
        positional = [p for p in parameters if p.kind in _POSITIONAL]
        return cls(
            fitting=set(),
            signature=signature,
            positional=tuple(p.name for p in positional),
            required=sum(p.default is Parameter.empty for p in positional),
            by_name=frozenset(p.name for p in parameters if p.kind in _BY_NAME),
            named_required=frozenset(
                p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY and p.default is Parameter.empty
            ),
            rest=Parameter.VAR_POSITIONAL in kinds,
            named=Parameter.VAR_KEYWORD in kinds,
        )

    def surely_binds(self, before: int, count: int, names: Mapping[str, object]) -> bool:
        """Whether the arguments fit beyond doubt; False is only "ask the signature"."""
        given = before + count
        if not self.rest and given > len(self.positional):
            return False
        if not names:
            return given >= self.required and not self.named_required
        by_position, missing = self.positional[:given], self.positional[given : self.required]
        return (
            (self.named or names.keys() <= self.by_name)
            and self.named_required <= names.keys()
            and not any(name in names for name in by_position)
            and all(name in names and name in self.by_name for name in missing)
        )


def signature_of(target: Callable[..., object]) -> tuple[Signature | None, int]:
    """Return a callable's signature, and how many parameters stand before the caller's own.

    None: a built-in that does not say what it takes.
    """
    shape, before = _shape_of(target)
    return (None if shape is None else shape.signature), before


def check_binds(target: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that a callable takes these arguments, without calling it.

    Raises:
        TypeError: It does not; the message is Python's own.
    """
    shape, before = (_shape(target), 0) if type(target) is FunctionType else _shape_of(target)
    if shape is None:
        return
    given = (before + len(args), *kwargs)
    if given in shape.fitting:
        return
    if not shape.surely_binds(before, len(args), kwargs):
        shape.signature.bind(*(None,) * before, *args, **kwargs)
    # Exact texts only: what equals one need not be it.
    if len(shape.fitting) < _MAX_FITTING and all(type(name) is str for name in kwargs):
        shape.fitting.add(given)


def _shape_of(target: Callable[..., object]) -> tuple[_Shape | None, int]:
    kind = type(target)
    if kind is FunctionType or issubclass(kind, type):
        return _shape(target), 0
    if kind is MethodType:
        return _shape(cast("Callable[..., object]", cast("MethodType", target).__func__)), 1
    if kind is BuiltinFunctionType:
        return _read(target), 0  # bound to an object, which a cache would keep alive
    return _shape(cast("Any", kind).__call__), 1


def _read(target: Callable[..., object]) -> _Shape | None:
    try:
        # A wrapper may take other arguments than what it wraps, and it is the wrapper that is called.
        return _Shape.of(inspect.signature(target, follow_wrapped=False))
    except ValueError:  # some built-ins have no signature
        return None


_shape = lru_cache(maxsize=1024)(_read)
