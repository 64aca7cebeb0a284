"""Measure and read the raw body of a request; the statuses (408, 413, 503) are in ``delivery/handler``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import cache
from typing import TYPE_CHECKING, Final

from safedefer.delivery.budget import ByteBudget

if TYPE_CHECKING:
    from safedefer.delivery.handler import Delivery
    from safedefer.headers import Response

_log: Final = logging.getLogger("safedefer")

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


def answer_incomplete(delivery: Delivery, body: bytes | bytearray, length: int | None) -> Response | None:
    """Return the answer to a body that lacks bytes which its request announced; None if it lacks none.

    A client whose connection was cut hears no answer. One that hears it sent the bytes, and a middleware took them: the answer
    must charge nothing.
    """
    if length is None or len(body) >= length:
        return None
    if body:
        delivery.broken()  # for the observer
    else:
        warn_of_taken_body()
    return delivery.busy()


@cache
def warn_of_taken_body() -> None:
    """Log, once in a process, that bytes of a body were taken before the handler: no one can get them again."""
    _log.error(
        "a middleware takes the bytes of requests before the handler, so that no task can be verified; all wait, uncharged, until "
        "it leaves them (with aiohttp `await request.read()` keeps the body, request.content does not)"
    )
