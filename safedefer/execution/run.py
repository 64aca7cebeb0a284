"""Execution: a verified task becomes an outcome.

The order is import, decode, bind, call. Coroutine functions are awaited on the loop, other callables
run in a thread, and an awaitable that any of them returns is awaited.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache, partial
from types import CoroutineType, FunctionType, MethodType
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeVar, cast, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from safedefer.codecs.fast_path import may_hold_tags
from safedefer.codecs.shared import Values
from safedefer.concurrency.threads import InThread
from safedefer.errors import (
    ExpiredTask,
    InvalidArguments,
    PermanentTaskFailure,
    RejectedTask,
    SingularTaskFailure,
    UnresolvableCallable,
)
from safedefer.execution.binding import check_binds
from safedefer.policy import Gate
from safedefer.refs import UNBOUND
from safedefer.task import VerifiedTask

_T = TypeVar("_T")
_tuple: Final = tuple.__new__
Validate = Literal["annotations"] | None


class Result(StrEnum):
    """The outcomes of a run, as ``Safedefer-Outcome`` spells them."""

    SUCCEEDED = "succeeded"
    RETRY = "retry"
    FAILED = "failed"
    REJECTED = "rejected"


class Interrupted(asyncio.CancelledError):
    """The caller was cancelled while a coroutine ran: it has ended, where a thread would go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended. ``error`` is what was raised, for the record of the attempt only."""

    result: Result
    reason: str | None = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskContext:
    """What a running task may know of itself: ``safedefer.current_task()``."""

    id: str
    name: str | None
    queue_name: str
    url: str
    headers: Mapping[str, str]
    """The task's own headers, as they were signed."""
    retry_count: int = 0
    """Deliveries before this one (``X-AppEngine-TaskRetryCount``); a hint, it is not signed."""
    trace: str | None = None
    retry_of: str | None = None
    """The dead letter that this task re-runs."""


_current: Final[ContextVar[TaskContext | None]] = ContextVar("safedefer_task", default=None)


def current_task() -> TaskContext | None:
    """Return the context of the task that runs here, or None outside one."""
    return _current.get()


class Codec(Protocol):
    """Turns the arguments of a call into JSON and back."""

    def encode(self, call: Values, gate: Gate) -> Values:
        """Return trees of JSON. Raises ``UnencodableArgument``."""
        ...

    def write(self, call: Values, gate: Gate) -> Values:
        """Return what ``claims.write_json`` writes: trees of JSON, or text. Raises ``UnencodableArgument``."""
        ...

    def decode(self, call: Values, gate: Gate, text: bytes, canonical: bool = False) -> Values:  # noqa: FBT002  # a keyword costs
        """Return the values. Raises a ``RejectedTask``."""
        ...


class Prepared(NamedTuple):
    """A callable and its arguments, ready to be called."""

    target: Callable[..., object]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def __repr__(self) -> str:
        """Show how many arguments there are: logs identify, they do not quote."""
        return f"<Prepared with {len(self.args)} and {len(self.kwargs)} named arguments>"

    def __call__(self) -> object:
        """Call it."""
        return self.target(*self.args, **self.kwargs)


def prepare(task: VerifiedTask, codecs: Mapping[str, Codec], *, validate: Validate = None) -> Prepared:
    """Import, decode and bind.

    Raises:
        UnresolvableCallable: The callable is not there, or takes other arguments.
        InvalidArguments: The arguments do not decode, or not to what the annotations say.
        PolicyViolation: The policy does not admit what was found, or a class inside the arguments.
        CapabilityExceeded: The key that signed may not name it.
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
        _check_annotations(prepared)
    return prepared


def to_thread(call: Callable[[], _T], /) -> asyncio.Future[_T]:
    """Run a call in a thread of the loop's own executor; its context is the call's own affair."""
    return asyncio.get_running_loop().run_in_executor(None, call)


async def execute(
    task: VerifiedTask,
    codecs: Mapping[str, Codec],
    context: TaskContext,
    *,
    in_thread: InThread = to_thread,
    validate: Validate = None,
) -> Outcome:
    """Run a task and say how it ended.

    Args:
        task: The task.
        codecs: By ``cty``.
        context: What the task may know of itself.
        in_thread: Where plain callables run, and what may block before a coroutine function is called.
        validate: Whether arguments are checked against annotations.

    Raises:
        asyncio.CancelledError: The caller was cancelled; ``Interrupted`` if nothing of the task runs on.
    """
    token = _current.set(context)
    in_a_thread = False
    result: object = None
    try:
        prepared = _prepare_at_once(task, codecs) if validate is None and _is_at_hand(task) else None
        if prepared is None:
            # Imports, decoding of large arguments and __setstate__ of admitted classes may block: not on the loop.
            in_a_thread = True
            begin = partial(_begin, task, codecs, validate)
            step: _Step = await in_thread(partial(copy_context().run, begin))
            in_a_thread = False
            if step.error is not None:
                return _outcome(step.error, started=step.started)
            prepared, result = step.coroutine_function, step.result
        if prepared is not None:
            result = prepared()
        if result is not None and (type(result) is CoroutineType or inspect.isawaitable(result)):
            await cast("Awaitable[object]", result)
    except BaseException as error:  # a task's SystemExit must not end the handler
        current = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and current is not None and current.cancelling():
            if in_a_thread:
                raise
            raise Interrupted from error
        return _outcome(error, started=True)
    finally:
        _current.reset(token)
    return _SUCCEEDED


#: References of coroutine functions that a thread has found.
_known: Final[set[tuple[str, str, str, str | None]]] = set()
_MOST_KNOWN: Final = 4096
#: The longest payload whose arguments are decoded on the loop, in bytes.
_SHORT: Final = 16_384


def _is_at_hand(task: VerifiedTask) -> bool:
    """Whether a task needs no thread before the call: nothing to import, and arguments that run no code.

    A thread has found its coroutine function before, and its few arguments hold no tags, which name classes.
    """
    claims, ref, text = task.claims, task.ref, task.text
    return (
        ref.parts in _known
        and ref.module in sys.modules
        and len(text) <= _SHORT
        and claims["cty"] == "typed"
        and not may_hold_tags(text)
        and "bound" not in claims["call"]
    )


def _prepare_at_once(task: VerifiedTask, codecs: Mapping[str, Codec]) -> Prepared | None:
    """Prepare a task on the loop; None if a thread should, which then says what is wrong with it."""
    try:
        prepared = prepare(task, codecs)
    except RejectedTask:
        return None
    return prepared if is_async(prepared.target) else None


async def call_in_thread(call: Callable[[], object]) -> object:
    """Run a plain callable in a thread and return or raise what it does, a ``StopIteration`` too."""

    def step() -> _Step:
        try:
            return _Step(result=call())
        except BaseException as error:  # noqa: BLE001  # a future cannot carry a StopIteration
            return _Step(error=error)

    done = await asyncio.to_thread(step)
    if done.error is None:
        return done.result
    if isinstance(done.error, StopIteration):  # nor can a coroutine raise one (PEP 479)
        raise RuntimeError("the callable raised StopIteration") from done.error  # noqa: TRY004
    raise done.error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What the thread has done: called a plain callable, prepared a coroutine function, or failed."""

    started: bool = False
    result: object = None
    coroutine_function: Prepared | None = None
    error: BaseException | None = None


def _begin(task: VerifiedTask, codecs: Mapping[str, Codec], validate: Validate) -> _Step:
    # Errors are returned, not raised: a future cannot carry a StopIteration.
    try:
        prepared = prepare(task, codecs, validate=validate)
    except BaseException as error:  # noqa: BLE001  # a module that exits when imported, say
        return _Step(error=error)
    if is_async(prepared.target):
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known.add(task.ref.parts)
        return _Step(coroutine_function=prepared, started=True)
    try:
        return _Step(result=prepared(), started=True)
    except BaseException as error:  # noqa: BLE001  # a task's SystemExit must not end the handler
        return _Step(error=error, started=True)


_SUCCEEDED: Final = Outcome(result=Result.SUCCEEDED)


def _outcome(error: BaseException, *, started: bool) -> Outcome:
    # The slugs of these two classes, not of a subclass that the user made: handlers and logs know them.
    if isinstance(error, PermanentTaskFailure):
        return Outcome(result=Result.FAILED, reason=PermanentTaskFailure.slug, error=error)
    if isinstance(error, SingularTaskFailure):
        return Outcome(result=Result.RETRY, reason=SingularTaskFailure.slug, error=error)
    if started or not isinstance(error, RejectedTask):
        return Outcome(result=Result.RETRY, reason="exception", error=error)
    result = Result.FAILED if isinstance(error, InvalidArguments | ExpiredTask) else Result.REJECTED
    return Outcome(result=result, reason=error.slug, error=error)


def is_async(target: object) -> bool:
    """Whether calling it makes a coroutine: a coroutine function, or an object with an async ``__call__``."""
    kind = type(target)
    if kind is FunctionType and cast("FunctionType", target).__code__.co_flags & inspect.CO_COROUTINE:
        return True  # what inspect would find, in a tenth of the time
    if inspect.iscoroutinefunction(target):
        return True
    plain = kind is FunctionType or kind is MethodType or issubclass(kind, type)
    return not plain and inspect.iscoroutinefunction(getattr(kind, "__call__", None))  # noqa: B004  # not a test of callability


def _check_annotations(prepared: Prepared) -> None:
    try:
        # Of what is wrapped, if something is: that is where the annotations are.
        signature = inspect.signature(prepared.target)
        bound = signature.bind(*prepared.args, **prepared.kwargs)
    except (ValueError, TypeError):  # a built-in without a signature, or a wrapper that takes other arguments
        return
    hints = _hints(prepared.target)
    for name, value in bound.arguments.items():
        adapter = hints.get(name)
        if adapter is None:
            continue
        kind = signature.parameters[name].kind
        values = value if kind is inspect.Parameter.VAR_POSITIONAL else (value,)
        values = tuple(value.values()) if kind is inspect.Parameter.VAR_KEYWORD else values
        for item in values:
            try:
                adapter.validate_python(item, strict=True)
            except ValidationError as error:
                what = error.errors(include_input=False, include_url=False)[0]["type"]
                raise InvalidArguments(
                    f"the argument {name} is not what its annotation says ({what}); send the annotated type",
                    path=f"$.kwargs.{name}",
                ) from None


def _hints(target: Callable[..., object]) -> Mapping[str, TypeAdapter[Any]]:
    kind = type(target)
    if kind is MethodType:
        return _function_hints(cast("MethodType", target).__func__)
    if kind is FunctionType:
        return _function_hints(target)
    return _function_hints(cast("Any", target).__init__ if issubclass(kind, type) else cast("Any", kind).__call__)


@lru_cache(maxsize=1024)
def _function_hints(function: Callable[..., object]) -> Mapping[str, TypeAdapter[Any]]:
    adapters = {}
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):  # annotations for type checkers only, or a C function
        return {}
    for name, hint in hints.items():
        try:
            adapters[name] = TypeAdapter(hint)
        except PydanticUserError:  # a type that takes no part in validation
            adapters[name] = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    return adapters
