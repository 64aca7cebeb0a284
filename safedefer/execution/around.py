"""Context managers around every run: a database session, a client's context, a tracer.

Async ones are entered on the event loop, outermost. Sync ones are entered within them: in the thread of a plain callable,
on the loop for a coroutine. Each kind keeps the order of the list. What is entered is left in any case; an error in
entering or leaving is an error of the attempt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack
from typing import Any, TypeAlias, cast

from safedefer.errors import ConfigurationError

#: Called before each run: returns the context manager of the run.
Around: TypeAlias = Callable[[], AbstractContextManager[object] | AbstractAsyncContextManager[object]]


def check_around(around: Sequence[object]) -> None:
    """Check that each item can be called. Raises ``ConfigurationError``."""
    for item in around:
        if not callable(item):
            raise ConfigurationError(
                "around is a list of callables that return a context manager: client.context, not client.context()"
            )


class SyncManager:
    """A sync context manager of one run: made again where the run has a second part, since most serve once."""

    __slots__ = ("_made", "_make")

    def __init__(self, make: Around, made: AbstractContextManager[object]) -> None:
        self._make = make
        self._made: AbstractContextManager[object] | None = made

    def take(self) -> AbstractContextManager[object]:
        """Return one that was not entered yet."""
        made, self._made = self._made, None
        return cast("AbstractContextManager[object]", self._make()) if made is None else made


def managers(around: Sequence[Around]) -> tuple[list[AbstractAsyncContextManager[object]], list[SyncManager]]:
    """Return new context managers: the async ones, and the sync ones. One that is both is sync."""
    outer: list[AbstractAsyncContextManager[object]] = []
    inner: list[SyncManager] = []
    for make in around:
        made: Any = make()
        if hasattr(type(made), "__enter__"):
            inner.append(SyncManager(make, made))
        else:
            outer.append(made)
    return outer, inner


def call_within(inner: Sequence[SyncManager], call: Callable[[], object]) -> object:
    """Call within sync context managers, in this thread."""
    result: object = None
    try:
        with ExitStack() as stack:
            for manager in inner:
                stack.enter_context(manager.take())
            result = call()
    except BaseException:
        if inspect.iscoroutine(result):  # nobody will await it
            result.close()
        raise
    return result


async def await_within(inner: Sequence[SyncManager], call: Callable[[], object]) -> object:
    """Call within sync context managers, and await what is awaitable there too."""
    result: object = None
    with ExitStack() as stack:
        for manager in inner:
            stack.enter_context(manager.take())
        made = call()
        result = await made if inspect.isawaitable(made) else made
    return result  # noqa: RET504  # None if the error was suppressed
