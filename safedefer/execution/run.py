"""Run a verified task: import, decode, bind, call, in this order.

Coroutine functions are awaited on the event loop, other callables run in a thread, and an awaitable that
any of them returns is awaited.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Final, TypeVar, cast

from safedefer.codecs.fast_path import may_hold_tags
from safedefer.codecs.protocol import Codec
from safedefer.concurrency.threads import InThread
from safedefer.errors import (
    PermanentTaskFailure,
    RejectedTask,
    SingularTaskFailure,
)
from safedefer.execution import django
from safedefer.execution.around import Around, SyncManager, await_within, call_within, managers
from safedefer.execution.context import CURRENT, TaskContext
from safedefer.execution.deadline import RunControl, Stop
from safedefer.execution.prepare import Prepared, Validate, is_async, prepare
from safedefer.task import VerifiedTask

_T = TypeVar("_T")


class Result(StrEnum):
    """The outcomes of a run, as ``Safedefer-Outcome`` spells them."""

    SUCCEEDED = "succeeded"
    RETRY = "retry"
    FAILED = "failed"
    REJECTED = "rejected"
    CANCELLED = "cancelled"


class CoroutineCancelled(asyncio.CancelledError):
    """The caller was cancelled while a coroutine of the task ran. The coroutine has ended; a thread would go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    result: Result
    reason: str | None = None
    """A slug, unless the run succeeded."""
    error: BaseException | None = None
    """The exception, for the record of the attempt only."""


def to_thread(call: Callable[[], _T], /) -> asyncio.Future[_T]:
    """Run a call in a thread of the loop's default executor. The call copies its context itself."""
    return asyncio.get_running_loop().run_in_executor(None, call)


async def execute(
    task: VerifiedTask,
    codecs: Mapping[str, Codec],
    context: TaskContext,
    *,
    in_thread: InThread = to_thread,
    validate: Validate = None,
    around: Sequence[Around] = (),
) -> Outcome:
    """Run a task and say how it ended.

    Args:
        task: The task.
        codecs: Codecs by ``cty``.
        context: What ``current_task()`` returns while the task runs. The caller stops the run by its ``control``:
            it sets ``stop``, and cancels the asyncio task unless a thread runs.
        in_thread: Runs plain callables, and the steps before a coroutine function is called that may block.
        validate: ``"annotations"``: check the arguments against the annotations.
        around: Return context managers that are entered around the call.

    Raises:
        asyncio.CancelledError: The caller was cancelled; ``CoroutineCancelled`` if nothing of the task runs any more.
    """
    token = CURRENT.set(context)
    control = context.control
    try:
        if not around:
            return await _execute(task, codecs, control, in_thread, validate, ())
        outer, inner = managers(around)
        return await _within(outer, control, lambda: _execute(task, codecs, control, in_thread, validate, inner))
    except BaseException as error:  # noqa: BLE001  # a task's SystemExit must not end the handler
        return _raised(error, control)
    finally:
        CURRENT.reset(token)


async def _within(
    outer: Sequence[AbstractAsyncContextManager[object]], control: RunControl, run: Callable[[], Awaitable[Outcome]]
) -> Outcome:
    """Run within async context managers, which see the error of the run, and may suppress it."""
    outcome = None
    async with AsyncExitStack() as stack:
        for manager in outer:
            await stack.enter_async_context(manager)
        outcome = await run()
        # Not raised: the outcome of an error depends on where it came from.
        error = outcome.error
        leave = stack.pop_all()
        if error is None:
            await leave.__aexit__(None, None, None)
        elif await leave.__aexit__(type(error), error, error.__traceback__) and outcome.reason == _RAISED:
            outcome = None
    if outcome is not None:
        return outcome
    return _SUCCEEDED if control.stop is not Stop.CANCELLED else _stopped(control.stop, None)  # it was suppressed


async def _execute(
    task: VerifiedTask,
    codecs: Mapping[str, Codec],
    control: RunControl,
    in_thread: InThread,
    validate: Validate,
    inner: Sequence[SyncManager],
) -> Outcome:
    result: object = None
    prepared = _prepare_at_once(task, codecs) if validate is None and _is_at_hand(task) else None
    if prepared is None:
        # Imports, decoding of large arguments and __setstate__ of admitted classes may block the loop.
        control.hand_over()
        begin = partial(_begin, task, codecs, validate, control, inner)
        step: _Step = await in_thread(partial(copy_context().run, begin))
        control.take_return()
        if control.stop is Stop.CANCELLED and step.coroutine_function is None and not inspect.isawaitable(step.result):
            return _stopped(control.stop, step.error)
        if step.error is not None:
            return _outcome(step.error, started=step.started)
        prepared, result = step.coroutine_function, step.result
        if control.stop is not None and (prepared is not None or inspect.isawaitable(result)):
            if inspect.iscoroutine(result):
                result.close()
            return _stopped(control.stop, None)  # the coroutine does not begin any more
    if prepared is not None or (result is not None and inspect.isawaitable(result)):
        await django.close_old_async()
        try:
            result = await _await_call(prepared, result, inner)
        finally:
            await django.close_old_async()
    if control.stop is Stop.CANCELLED:
        return _stopped(control.stop, None)
    return _SUCCEEDED if result is None or type(result) not in _NOT_RUN else _returned_generator()


async def _await_call(prepared: Prepared | None, result: object, inner: Sequence[SyncManager]) -> object:
    """Call a coroutine function, or go on with the awaitable that a plain callable returned."""
    if prepared is not None:
        result = await await_within(inner, prepared.__call__) if inner else prepared()
    if result is not None and (type(result) is CoroutineType or inspect.isawaitable(result)):
        awaited = cast("Awaitable[object]", result)
        result = await awaited if prepared is not None or not inner else await await_within(inner, lambda: awaited)
    return result


def _raised(error: BaseException, control: RunControl) -> Outcome:
    """Return the outcome of a run that raised; raise the cancellation of the caller again."""
    current = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and current is not None and current.cancelling():
        if not control.withdraw():
            raise error
        if control.stop is None:
            control.cancelled_with_caller = True  # an asyncio task does not keep the class of its cancellation
            raise CoroutineCancelled from error
    if control.stop is not None:  # the cancellation, or what the coroutine made of it
        return _stopped(control.stop, error)
    return _outcome(error, started=True)


#: References of coroutine functions that a thread has imported before.
_known: Final[set[tuple[str, str, str, str | None]]] = set()
_MOST_KNOWN: Final = 4096
#: The longest payload whose arguments are decoded on the loop, in bytes.
_SHORT: Final = 16_384


def _is_at_hand(task: VerifiedTask) -> bool:
    """Whether a task needs no thread before the call: its module is imported, and its arguments run no code.

    A thread has found its coroutine function before, and its short arguments hold no tags, which name classes.
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
    """Prepare a task on the loop. After an error return None: a thread then prepares the task again, and reports it."""
    try:
        prepared = prepare(task, codecs)
    except RejectedTask:
        return None
    return prepared if is_async(prepared.target) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """The thread's result: a plain callable was called, a coroutine function was prepared, or an error was raised."""

    started: bool = False
    result: object = None
    coroutine_function: Prepared | None = None
    error: BaseException | None = None


def _begin(
    task: VerifiedTask,
    codecs: Mapping[str, Codec],
    validate: Validate,
    control: RunControl,
    inner: Sequence[SyncManager],
) -> _Step:
    if not control.claim():  # the handler has stopped it, and does not wait
        return _Step(error=asyncio.CancelledError())
    django.close_old_connections()
    step = _begin_claimed(task, codecs, validate, inner)
    django.close_old_connections()
    control.note_return(step)
    return step


def _begin_claimed(
    task: VerifiedTask, codecs: Mapping[str, Codec], validate: Validate, inner: Sequence[SyncManager]
) -> _Step:
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
        return _Step(result=call_within(inner, prepared.__call__) if inner else prepared(), started=True)
    except BaseException as error:  # noqa: BLE001  # a task's SystemExit must not end the handler
        return _Step(error=error, started=True)


def outcome_of(returned: object) -> Outcome:
    """Return the outcome of a run by what its thread returned (``RunControl.when_returned``) after its loop was closed."""
    assert isinstance(returned, _Step)
    if returned.error is not None:
        return _outcome(returned.error, started=returned.started)
    result = returned.result
    if returned.coroutine_function is not None or inspect.isawaitable(result):  # no loop is left to await it
        if inspect.iscoroutine(result):
            result.close()
        return _stopped(Stop.DEADLINE, None)
    return _returned_generator() if type(result) in _NOT_RUN else _SUCCEEDED


#: The reason of an attempt that raised.
_RAISED: Final = "exception"
_SUCCEEDED: Final = Outcome(result=Result.SUCCEEDED)


@contextmanager
def _context() -> Iterator[None]:
    yield  # pragma: no cover  # made for its type alone


@asynccontextmanager
async def _async_context() -> AsyncIterator[None]:
    yield  # pragma: no cover  # as above


#: Types of results whose body has not run: of generator functions, and of what ``contextlib`` makes of them.
_NOT_RUN: Final = frozenset({GeneratorType, AsyncGeneratorType, type(_context()), type(_async_context())})


def _returned_generator() -> Outcome:
    error = PermanentTaskFailure(
        "the call returned a generator, whose body never ran; defer a function that exhausts it"
    )
    return Outcome(result=Result.FAILED, reason="returned-generator", error=error)


def _stopped(stop: Stop, error: BaseException | None) -> Outcome:
    result = Result.CANCELLED if stop is Stop.CANCELLED else Result.RETRY
    return Outcome(result=result, reason=str(stop), error=error)


def _outcome(error: BaseException, *, started: bool) -> Outcome:
    # A subclass of the user's has another slug, which handlers and logs do not know.
    if _is(error, PermanentTaskFailure):
        return Outcome(result=Result.FAILED, reason=PermanentTaskFailure.slug, error=error)
    if _is(error, SingularTaskFailure):
        return Outcome(result=Result.RETRY, reason=SingularTaskFailure.slug, error=error)
    if started or not isinstance(error, RejectedTask):
        return Outcome(result=Result.RETRY, reason=_RAISED, error=error)
    result = Result.FAILED if error.is_final else Result.REJECTED
    return Outcome(result=result, reason=error.slug, error=error)


#: Where App Engine's own ``deferred`` defines the two errors: code that was not ported yet raises those.
_ORIGINAL: Final = "google.appengine.ext.deferred.deferred"


def _is(error: BaseException, cls: type[Exception]) -> bool:
    return isinstance(error, cls) or any(
        each.__module__ == _ORIGINAL and each.__name__ == cls.__name__ for each in type(error).__mro__
    )
