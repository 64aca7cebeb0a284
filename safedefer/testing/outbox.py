"""The outbox of a test: tasks of a transaction are also read by the connection that has written them.

A test's database is often in memory, or inside a transaction that the test never commits: Django's ``TestCase`` puts one
around every test. No other connection sees what is written there.
"""

from __future__ import annotations

import sys
from typing import Any

from safedefer.errors import BadTransactionStateError
from safedefer.testing.caller import is_sensitive
from safedefer.transactions.databases import Opener, Source, run_now
from safedefer.transactions.databases.django import DjangoSource
from safedefer.transactions.outbox import Outbox
from safedefer.transactions.relay import is_open


class OwnOutbox(Outbox):
    """An ``Outbox`` that remembers connections where no other one would do."""

    reads_own = True

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._own: list[tuple[Source, str | None]] = []

    def relay_after(self, source: Source, identity: str | None, opener: Opener | None, schema: str | None) -> None:
        """Relay the tasks by the block's connection, now or when its transaction has ended, or as in production."""
        if identity is None or opener is None or isinstance(source, DjangoSource):
            self._own.append((source, schema))
            self._sweep_own()
        else:
            super().relay_after(source, identity, opener, schema)

    def sweep(self) -> int:
        """Relay the tasks of transactions that have ended; returns how many.

        Raises:
            BadTransactionStateError: A connection to a database in memory was closed before.
        """
        return super().sweep() + self._sweep_own()

    def _sweep_own(self) -> int:
        return sum(run_now(self._move(source, schema)) for source, schema in self._ended(is_async=False))

    async def _move(self, source: Source, schema: str | None) -> int:
        try:
            return await self._transfer.move(source, self.queue(), (schema,)) or 0  # all: no time was given
        except Exception as error:
            raise BadTransactionStateError(
                "tasks of a transaction cannot be read by its connection any more; close a connection to a database in memory "
                "after run_due() or an assertion"
            ) from error

    async def sweep_async(self) -> int:
        """Do the same in a running loop, for connections that are awaited too."""
        moved = 0
        if is_sensitive():
            moved += await sys.modules["asgiref.sync"].sync_to_async(self.sweep, thread_sensitive=True)()
        else:
            moved += self.sweep()
        for source, schema in self._ended(is_async=True):
            moved += await self._move(source, schema)
        return moved

    def _ended(self, *, is_async: bool) -> list[tuple[Source, str | None]]:
        """Take those that have no transaction open any more."""
        ended = [own for own in self._own if own[0].is_async == is_async and not is_open(own[0])]
        self._own = [own for own in self._own if own not in ended]
        return ended
