"""Prepare a verified task: import the callable, decode the arguments, bind them. Nothing is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any, Final, Literal, NamedTuple, cast

from safedefer.codecs.protocol import Codec
from safedefer.errors import UnresolvableCallable
from safedefer.execution.annotations import check_annotations
from safedefer.execution.binding import check_binds
from safedefer.refs import UNBOUND
from safedefer.task import VerifiedTask

_tuple: Final = tuple.__new__
Validate = Literal["annotations"] | None


class Prepared(NamedTuple):
    """A callable and its arguments, ready to be called."""

    target: Callable[..., object]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def __repr__(self) -> str:
        """Show the numbers of arguments only: logs identify, they do not quote."""
        return f"<Prepared with {len(self.args)} and {len(self.kwargs)} named arguments>"

    def __call__(self) -> object:
        """Call it."""
        return self.target(*self.args, **self.kwargs)


def prepare(task: VerifiedTask, codecs: Mapping[str, Codec], *, validate: Validate = None) -> Prepared:
    """Import the callable, decode the arguments, and check that they bind.

    Raises:
        UnresolvableCallable: The callable does not exist here, or takes other arguments.
        InvalidArguments: The arguments do not decode, or their types contradict the annotations.
        PolicyViolation: The policy does not admit the callable, or a class inside the arguments.
        CapabilityExceeded: The key that signed the task may not name it.
    """
    claims, ref, gate, _, _, text, canonical = task
    try:
        codec = codecs[claims["cty"]]
    except KeyError:
        raise UnresolvableCallable(
            f"no codec for {claims['cty']} arguments; configure the handler as the sender"
        ) from None
    call = claims["call"]
    if "bound" in call:
        sent = call["bound"], claims["args"], claims["kwargs"]
        bound, args, kwargs = codec.decode(sent, gate, text, canonical)
        target = gate.load_callable(ref, bound)
    else:
        target = gate.load_callable(ref)
        _, args, kwargs = codec.decode((UNBOUND, claims["args"], claims["kwargs"]), gate, text, canonical)
    try:
        check_binds(target, args, kwargs)
    except TypeError as error:
        raise UnresolvableCallable(f"{task.ref} takes other arguments now: {error}; deploy both ends alike") from error
    prepared = _tuple(Prepared, (target, args, kwargs))
    if validate is not None:
        check_annotations(target, args, kwargs)
    return prepared


def is_async(target: object) -> bool:
    """Whether calling the target makes a coroutine: a coroutine function, or an object with an async ``__call__``."""
    kind = type(target)
    if kind is FunctionType and cast("FunctionType", target).__code__.co_flags & inspect.CO_COROUTINE:
        return True  # as inspect would say, in a tenth of the time
    if inspect.iscoroutinefunction(target):
        return True
    plain = kind is FunctionType or kind is MethodType or issubclass(kind, type)
    return not plain and inspect.iscoroutinefunction(getattr(kind, "__call__", None))  # noqa: B004  # not a test of callability
