"""Check that a callable takes some arguments, without calling it.

Python's own ``inspect.signature`` decides. A cached summary of the signature recognizes the common case:
positional and keyword arguments that fit the parameters of a function.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import Parameter, Signature
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Final, cast

from safedefer.codecs.inspect_safely import without_annotations

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_MAX_FITTING = 64
_BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
#: From Python 3.14 on, annotations are evaluated when they are asked for (PEP 649); names that only type checkers see stay names.
_LAZY: Final[dict[str, Any]] = {}
if sys.version_info >= (3, 14):
    from annotationlib import Format

    _LAZY["annotation_format"] = Format.FORWARDREF


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class _Shape:
    """A signature, and a summary from which most arguments are known to fit."""

    fitting: set[tuple[object, ...]]
    """Arguments that fitted before: the number by position (``before`` included), and the names."""

    signature: Signature
    positional: tuple[str, ...]
    """Names of the parameters that may be given by position."""
    required: int
    """The number of them without a default."""
    by_name: frozenset[str]
    """Names of the parameters that may be given by keyword."""
    named_required: frozenset[str]
    """Keyword-only parameters without a default."""
    rest: bool
    """Whether it has ``*args``."""
    named: bool
    """Whether it has ``**kwargs``."""

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
        """Whether the arguments certainly fit. After False, the signature must decide."""
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


def read_signature(target: Callable[..., object], *, follow_wrapped: bool = True) -> Signature:
    """Return ``inspect.signature``, whatever the annotations of the callable name.

    Raises:
        ValueError: It has none: some built-ins, and what raises when its annotations are evaluated.
    """
    try:
        return inspect.signature(target, follow_wrapped=follow_wrapped, **_LAZY)
    except (ValueError, RecursionError, MemoryError):  # the last two tell of the caller
        raise
    except Exception as error:  # an annotation is code, and may raise anything
        if type(target) is FunctionType and not follow_wrapped and "__signature__" not in target.__dict__:
            return inspect.signature(without_annotations(target))
        raise ValueError(f"its signature cannot be read: {type(error).__name__}") from error


def signature_of(target: Callable[..., object]) -> tuple[Signature | None, int]:
    """Return the signature of a callable, and the number of its parameters that the binding fills (``self``).

    The signature is None for a built-in that has none.
    """
    shape, before = _shape_of(target)
    return (None if shape is None else shape.signature), before


def check_binds(target: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that a callable takes these arguments, without calling it.

    Raises:
        TypeError: The arguments do not fit; the message is Python's own.
    """
    shape, before = (_shape(target), 0) if type(target) is FunctionType else _shape_of(target)
    if shape is None:
        return
    given = (before + len(args), *kwargs)
    if given in shape.fitting:
        return
    if not shape.surely_binds(before, len(args), kwargs):
        shape.signature.bind(*(None,) * before, *args, **kwargs)
    # Exact str only: an instance of a subclass may equal a name and yet bind differently.
    if len(shape.fitting) < _MAX_FITTING and all(type(name) is str for name in kwargs):
        shape.fitting.add(given)


def named_arguments(
    target: Callable[..., object], names: Iterable[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of some parameters, in order of their names, however they are given; defaults count.

    What ``**kwargs`` takes may be named too.

    Raises:
        LookupError: The callable has no signature, or the call no argument of that name; the message says which.
    """
    signature, before = signature_of(target)
    if signature is None:
        raise LookupError("it has no signature")
    bound = signature.bind(*(None,) * before, *args, **kwargs)
    bound.apply_defaults()
    given = dict(list(bound.arguments.items())[before:])
    for parameter in signature.parameters.values():
        if parameter.kind is Parameter.VAR_KEYWORD:
            given = {**given.pop(parameter.name), **given}
    for name in names:
        if name not in given:
            raise LookupError(f"the call has no argument {name!r}; it has {', '.join(given) or 'none'}")
    return {name: given[name] for name in sorted(names)}


def _shape_of(target: Callable[..., object]) -> tuple[_Shape | None, int]:
    kind = type(target)
    if kind is FunctionType or issubclass(kind, type):
        return _shape(target), 0
    if kind is MethodType:
        return _shape(cast("Callable[..., object]", cast("MethodType", target).__func__)), 1
    if kind is BuiltinFunctionType:
        return _read(target), 0  # a cache would keep the object alive that the method is bound to
    return _shape(cast("Any", kind).__call__), 1


def _read(target: Callable[..., object]) -> _Shape | None:
    try:
        # The wrapper is called, and may take other arguments than the function that it wraps.
        return _Shape.of(read_signature(target, follow_wrapped=False))
    except ValueError:  # some built-ins have no signature
        return None


_shape = lru_cache(maxsize=1024)(_read)
