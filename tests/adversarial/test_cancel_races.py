"""A cancellation that meets a run while it begins, ends, or is tried again: it runs no more often, and has one end."""

import asyncio
import contextlib
import inspect
import time

import pytest

from safedefer.delivery import ledger_client
from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions, InProcessDelivery
from safedefer.options import TaskRetryOptions
from safedefer.policy import Policy
from safedefer.queues.base import TaskState
from safedefer.queues.memory.queue import MemoryQueue
from safedefer.queues.sqlite.queue import SQLiteQueue
from tests.unit.apps import JOSE, make_app, until

RAN = []
#: Where the cancellation comes: before or after which call of the ledger or the queue.
PLACES = [
    (owner, name, when)
    for owner, name in (
        ("ledger", "begin_many"),
        ("ledger", "finish_many"),
        ("queue", "settle_many"),
        ("queue", "lease"),
    )
    for when in ("before", "after")
]


def note(*, fails):
    RAN.append(time.monotonic())
    if fails:
        raise ValueError("again")


@pytest.fixture(params=["memory", "sqlite"])
def queue(request, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_client, "_LOOK_SECONDS", 0.1)
    RAN.clear()
    if request.param == "memory":
        yield MemoryQueue()
    else:
        yield SQLiteQueue(tmp_path / "tasks.db")


class Meeting:
    """Cancels a task once, before or after the first call of a method, wherever it is called."""

    def __init__(self, app, owner, name, when):
        self.app, self.task, self.cancelled = app, None, None
        # The calls of event loops, where the engine has such.
        if owner == "ledger":
            target = app.queue.ledger.here or app.queue.ledger
        else:
            target = getattr(app.queue.on_loop(), "enter_result", None) or app.queue
            if target is not app.queue:
                app.queue.on_loop = lambda: contextlib.nullcontext(target)
        call = getattr(target, name)

        def meet(*args, **kwargs):
            if when == "before":
                self.cancel()
            result = call(*args, **kwargs)
            if when == "after":
                self.cancel()
            return result

        async def meet_on_loop(*args, **kwargs):
            if when == "before":
                self.cancel()
            result = await call(*args, **kwargs)
            if when == "after":
                self.cancel()
            return result

        setattr(target, name, meet_on_loop if inspect.iscoroutinefunction(call) else meet)

    def cancel(self):
        if self.task is not None and self.cancelled is None:
            self.cancelled = False
            self.cancelled = self.app.queue.cancel(self.task.id, now=time.time())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("owner", "name", "when"), PLACES)
async def test_a_task_that_was_cancelled_meanwhile_has_one_end_and_runs_no_more(queue, owner, name, when, fails):
    app = make_app(queue=queue, policy=Policy(__name__))
    meeting = Meeting(app, owner, name, when)
    options = app.options(retry_options=TaskRetryOptions(min_backoff_seconds=0.05, task_retry_limit=3))
    meeting.task = await options.defer_async(note, fails=fails)
    dispatcher = Dispatcher(
        app.queue, InProcessDelivery(app.handle), clock=time.time, options=DispatcherOptions(poll_seconds=0.05)
    )
    running = asyncio.create_task(dispatcher.run())
    ends = {TaskState.SUCCEEDED, TaskState.DEAD, TaskState.CANCELLED}
    await until(lambda: meeting.cancelled is not None and app.queue.find(meeting.task.id).state in ends)
    found = app.queue.find(meeting.task.id)
    ran = len(RAN)
    dispatcher.stop()
    await running
    if meeting.cancelled:
        assert found.state is TaskState.CANCELLED
        assert ran <= 1, "it was tried again"
        assert not app.cancel(meeting.task.id)
    else:
        assert found.state is (TaskState.DEAD if fails else TaskState.SUCCEEDED)
    assert (await app.handle({"Content-Type": "application/jose"}, meeting.task.payload)).headers[
        "Safedefer-Outcome"
    ] == "duplicate"
    assert len(RAN) == ran
    app.close()


async def test_a_run_that_was_admitted_for_a_request_cancelled_meanwhile_is_given_back(queue):
    """Until its lease expired no other delivery could begin, and who cancels each request again keeps the task for ever."""
    app = make_app(queue=queue, policy=Policy(__name__))
    token = app.serialize(note, fails=False)
    request = asyncio.create_task(app.handle(JOSE, token))
    for _ in range(3):  # now it waits for the ledger
        await asyncio.sleep(0)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert not RAN
    async with asyncio.timeout(30):
        while (answer := await app.handle(JOSE, token)).status == 409:  # noqa: ASYNC110  # it has no event
            await asyncio.sleep(0.01)
    assert (answer.status, answer.headers["Safedefer-Outcome"], len(RAN)) == (200, "succeeded", 1)
    app.close()
