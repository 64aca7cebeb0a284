"""Read the raw body of a request within limits: of its size, its time, and the bytes of all bodies that are being read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from safedefer.delivery.budget import ByteBudget

#: Seconds for a body to arrive. A token has a megabyte at most.
BODY_TIMEOUT: Final = 30.0


class OverBudgetError(Exception):
    """The bodies that are being read use up the budget of unverified bytes."""


async def read_body(chunks: AsyncIterator[bytes], limit: int, budget: ByteBudget) -> bytes | None:
    """Return the raw body; None if it is over the limit. Reading stops there, also for a chunked body.

    Args:
        chunks: Gives what has arrived.
        limit: Bytes at most.
        budget: That of the handler.

    Raises:
        OverBudgetError: The budget has no bytes left for it now.
        TimeoutError: The body did not arrive in time.
    """
    body = bytearray()
    taken = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for chunk in chunks:
                if not budget.take(len(chunk)):
                    raise OverBudgetError
                taken += len(chunk)
                body += chunk
                if len(body) > limit:
                    return None
        return bytes(body)
    finally:
        budget.give_back(taken)
