"""Tasks whose code turns against the handler that runs it: each attempt ends, is answered, and is charged."""

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor

import pytest

from safedefer.policy import Policy
from safedefer.queues.config import QueueFile
from tests.unit.apps import JOSE, make_app, until


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


# --- Asyncio tasks that outlive their run -----------------------------------------------------------------------------

SHORT = QueueFile.parse("queue:\n- name: default\n  rate: 100/s\n  attempt_deadline: 0.05\n")
GATES = []
MADE = []
REACHED = []


async def shield():
    REACHED.append("shield")
    await asyncio.shield(GATES[-1].wait())


async def spawn_and_wait():
    REACHED.append("spawn_and_wait")
    MADE.append(asyncio.create_task(_grandchild()))
    await asyncio.sleep(60)


async def _grandchild():
    MADE.append(asyncio.get_running_loop().create_task(GATES[-1].wait()))


async def leave_one_that_leaves_another():
    REACHED.append("leave_one_that_leaves_another")
    await asyncio.shield(_wait_and_spawn())


async def _wait_and_spawn():
    await GATES[0].wait()
    MADE.append(asyncio.create_task(GATES[-1].wait()))


async def from_a_thread():
    REACHED.append("from_a_thread")
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as pool:  # awaited, the thread might begin after the deadline
        context = contextvars.copy_context()
        MADE.append(pool.submit(context.run, asyncio.run_coroutine_threadsafe, GATES[-1].wait(), loop).result(60))
    await asyncio.sleep(60)


async def stopped(app, task):
    """Let a task run into its deadline: again, where a busy machine let it pass before the task began."""
    REACHED.clear()
    while not REACHED:
        answer = await app.handle(JOSE, app.serialize(task))
        assert (answer.status, answer.headers["Safedefer-Outcome"]) == (500, "retry")


async def in_a_group():
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.sleep(60))


@pytest.mark.parametrize("task", [shield, spawn_and_wait, from_a_thread])
async def test_asyncio_tasks_that_outlive_a_stopped_run_are_counted_like_threads(task, caplog):
    """They went on in any number, beside the next attempts of their tasks, and nobody counted them."""
    GATES[:] = [asyncio.Event()]
    app = make_app(policy=Policy(__name__), concurrency=4, queue_yaml=SHORT)
    for number in (1, 2):
        await stopped(app, task)
        assert (app.delivery.stuck, app.delivery.running) == (number, number)
    assert app.delivery.is_clogged
    assert not await app.delivery.drained(0.0)
    assert "1 asyncio tasks that it made go on beside its next attempt" in caplog.text
    assert all(not made.cancelled() for made in MADE)
    GATES[-1].set()
    await until(lambda: not app.delivery.stuck)
    MADE.clear()
    app.close()


async def test_asyncio_tasks_are_counted_with_those_that_they_make_later_and_no_longer_than_they_go_on():
    """A run was counted for ever: one more such, and its process was replaced for nothing that went on."""
    GATES[:] = [asyncio.Event(), asyncio.Event()]
    app = make_app(policy=Policy(__name__), queue_yaml=SHORT)
    await stopped(app, leave_one_that_leaves_another)
    GATES[0].set()
    await until(lambda: MADE)
    await asyncio.sleep(0)
    assert app.delivery.stuck == 1
    GATES[-1].set()
    await until(lambda: not app.delivery.stuck)
    MADE.clear()
    app.close()


async def test_asyncio_tasks_that_end_with_their_run_are_not_counted(caplog):
    app = make_app(policy=Policy(__name__), queue_yaml=SHORT)
    answer = await app.handle(JOSE, app.serialize(in_a_group))
    assert (answer.status, app.delivery.stuck) == (500, 0)
    assert "go on beside" not in caplog.text
    app.close()


async def test_a_task_factory_of_the_users_stays():
    loop = asyncio.get_running_loop()
    made = []

    def factory(loop, coroutine, **options):
        made.append(coroutine)
        return asyncio.Task(coroutine, loop=loop, **options)

    loop.set_task_factory(factory)
    try:
        app = make_app(policy=Policy(__name__), queue_yaml=SHORT)
        assert (await app.handle(JOSE, app.serialize(in_a_group))).status == 500
        app.close()
    finally:
        loop.set_task_factory(None)
    assert made
