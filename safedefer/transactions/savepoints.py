"""A savepoint of PostgreSQL's, by statements: each driver has its own way, and they do not mix."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from safedefer.transactions.databases.base import Source


class Savepoint:
    """``async with``: an error undoes the block, and leaves the transaction around it usable."""

    def __init__(self, source: Source) -> None:
        self._source = source

    async def __aenter__(self) -> None:
        await self._source.execute("SAVEPOINT safedefer")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self._source.execute("RELEASE SAVEPOINT safedefer")
            return
        with contextlib.suppress(Exception):  # a lost connection
            await self._source.execute("ROLLBACK TO SAVEPOINT safedefer")
            await self._source.execute("RELEASE SAVEPOINT safedefer")
