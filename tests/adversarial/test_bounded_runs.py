"""Tasks whose code turns against the handler that runs it: each attempt ends, is answered, and is charged."""

import asyncio

import pytest

from safedefer.policy import Policy
from tests.unit.apps import JOSE, make_app


async def cancel_myself():
    asyncio.current_task().cancel()
    await asyncio.sleep(10)


async def cancel_myself_in_a_group():
    asyncio.current_task().cancel()
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.sleep(10))


async def raise_a_cancellation():
    raise asyncio.CancelledError


@pytest.mark.parametrize("task", [cancel_myself, cancel_myself_in_a_group, raise_a_cancellation])
async def test_a_coroutine_that_cancels_itself_does_not_cancel_the_request(task):
    """The dispatcher would take it for its own end: it gave the lease back, uncharged, and so again for ever."""
    app = make_app(policy=Policy(__name__))
    answer = await app.handle(JOSE, app.serialize(task))
    assert (answer.status, answer.headers["Safedefer-Outcome"]) == (500, "retry")
    assert app.delivery.running == 0
