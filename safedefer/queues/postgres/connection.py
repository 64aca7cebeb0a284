"""The asyncpg connection as the operations use it, and the choice of the loop on which a transaction runs."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

_T = TypeVar("_T")


class Connection(Protocol):
    """The methods of an asyncpg connection that the operations call. Placeholders are ``$1``."""

    async def execute(self, statement: str, /, *values: Any) -> object:
        """Run a statement and return its command status."""
        ...

    async def executemany(self, statement: str, values: Sequence[Sequence[Any]], /) -> object:
        """Run a statement once for each row of values."""
        ...

    async def fetch(self, statement: str, /, *values: Any) -> Sequence[Mapping[str, Any]]:
        """Run a query and return its rows."""
        ...

    def transaction(self) -> AbstractAsyncContextManager[Any]:
        """Open a transaction, or a savepoint within one."""
        ...


class RunOnOwnLoop(Protocol):
    """Runs an action in a transaction on the store's own event loop, which no task blocks."""

    async def __call__(self, action: Callable[[Connection], Awaitable[_T]], /) -> _T:
        """Return the result of the action."""
        ...


async def in_transaction(
    connection: Connection, own_loop: RunOnOwnLoop | None, action: Callable[[Connection], Awaitable[_T]], /
) -> _T:
    """Run an action of several statements in one transaction and return its result.

    Args:
        connection: The connection to use without ``own_loop``.
        own_loop: Given by callers on the dispatcher's or handler's loop. A task can block that loop, and a transaction
            open on it would hold its row locks for as long.
        action: The statements.
    """
    if own_loop is not None:
        return await own_loop(action)
    async with connection.transaction():
        return await action(connection)
