"""The outbox's seam to a user's connection, of blocking and of awaited libraries alike.

The methods of a ``Source`` are coroutines. Those of a connection that blocks never suspend, so ``run_now``
runs them to their end: what happens in a transaction is written once.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

_T = TypeVar("_T")


class Source(Protocol):
    """One connection of the user's. Statements have named parameters, ``:name``."""

    @property
    def is_async(self) -> bool:
        """Whether its methods suspend: then they run in the loop that the connection belongs to."""
        ...

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``: databases whose CREATE TABLE is part of a transaction."""
        ...

    @property
    def native(self) -> bool:
        """Whether ``run`` works."""
        ...

    @property
    def is_apsw(self) -> bool:
        """Whether the library is apsw, with which the SQLite queue opens its file."""
        ...

    @property
    def path(self) -> str | None:
        """The SQLite file, absolute; None if it has none."""
        ...

    @property
    def identity(self) -> str | None:
        """What names the database in this process; None for one that only this connection sees."""
        ...

    def in_transaction(self) -> bool:
        """Whether a transaction is open. Other threads ask, too."""
        ...

    async def begin(self) -> None:
        """Open a transaction."""
        ...

    async def check(self) -> None:
        """Check that an open transaction is one. Raises ``BadTransactionStateError``."""
        ...

    async def commit(self) -> None:
        """Commit what ``begin`` opened. Raises ``BadTransactionStateError`` where that would undo it."""
        ...

    async def rollback(self) -> None:
        """Roll back what ``begin`` opened."""
        ...

    async def execute(self, statement: str, values: Mapping[str, object] = ..., /) -> int:
        """Run a statement; return how many rows it changed."""
        ...

    async def rows(self, statement: str, values: Mapping[str, object] = ..., /) -> Sequence[Sequence[Any]]:
        """Run a query."""
        ...

    async def run(self, statement: str, values: Sequence[object], /) -> None:
        """Run a statement as PostgreSQL has it, with parameters ``$1``; errors are the driver's own."""
        ...

    def reopen(self) -> Opener | None:
        """How to open another connection to the same database by the same library; None if that cannot be."""
        ...


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Opener:
    """How to open a connection of our own."""

    connect: Callable[[], AbstractAsyncContextManager[Source]]
    is_async: bool = False
    """Whether it suspends."""

    def use(self, work: Callable[[Source], Coroutine[Any, Any, _T]]) -> _T:
        """Do something with a connection. Blocks; in a thread of its own where a loop runs in this one."""

        async def connected() -> _T:
            async with self.connect() as source:
                return await work(source)

        if not self.is_async:
            return run_now(connected())
        import asyncio  # noqa: PLC0415  # importing safedefer must not load it

        if asyncio._get_running_loop() is None:  # noqa: SLF001  # public in asyncio's words: in events.__all__
            return asyncio.run(connected())
        return _in_thread(lambda: asyncio.run(connected()))


class AwaitedConnection(Protocol):
    """A connection or session that is awaited: type checkers tell it from others by its ``close``."""

    def close(self) -> Awaitable[object]:
        """Close it."""
        ...


def run_now(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: _T = end.value
        return result
    coroutine.close()
    raise AssertionError("a connection that blocks has waited")


async def ready(value: Any) -> Any:
    """Return the result of a driver's method, awaited if it is awaitable."""
    return await value if inspect.isawaitable(value) else value


def _in_thread(work: Callable[[], _T]) -> _T:
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  # raised again below
            errors.append(error)

    thread = threading.Thread(target=run, name="safedefer-outbox-once")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
