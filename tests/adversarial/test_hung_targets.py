"""Targets that hang, over HTTP: they accept connections and do not answer, or not to the end. The others are delivered to."""

import asyncio
import contextlib
import time

import pytest

from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions, HttpDelivery
from safedefer.queues.base import TaskState
from safedefer.queues.memory.queue import MemoryQueue
from tests.queues.contract import make_task
from tests.unit.apps import until

OK = b"HTTP/1.1 200 OK\r\nSafedefer-Outcome: succeeded\r\nContent-Length: 0\r\n\r\n"
#: What each hung target sends before it hangs.
HUNG = {"silent": b"", "line": b"HTTP/1.1 200 OK\r\n", "header": b"HTTP/1.1 200 OK\r\nSafedefer-Outcome: "}


def task_for(target):
    now = time.time()
    times = {"eta": now, "created": now, "expires": int(now) + 1_000}
    return make_task(target=target, headers={}, retry_options={}, **times)


class Server:
    """Answers each request with some bytes, and hangs if they are not a whole answer."""

    def __init__(self, sent):
        self.sent = sent
        self.requests = 0
        self.over = asyncio.Event()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *exception):
        self.over.set()
        self.server.close()
        await self.server.wait_closed()

    async def serve(self, reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while not self.over.is_set():
                await reader.readuntil(b"\r\n\r\n")
                self.requests += 1
                writer.write(self.sent)
                await writer.drain()
                if self.sent != OK:
                    await self.over.wait()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize("concurrency", [2, 16])
async def test_three_targets_that_hang_do_not_keep_a_fourth_from_its_tasks(concurrency):
    """They held all slots, and all connections, until the timeout of their tasks: 630 s."""
    queue = MemoryQueue()
    servers = {name: Server(sent) for name, sent in {**HUNG, "good": OK}.items()}
    async with contextlib.AsyncExitStack() as stack:
        targets = {name: await stack.enter_async_context(server) for name, server in servers.items()}
        delivery = await stack.enter_async_context(
            HttpDelivery("http://127.0.0.1:9", targets=targets, concurrency=concurrency)
        )
        names = list(HUNG)
        queue.enqueue_many([task_for(names[n % 3]) for n in range(30)])
        options = DispatcherOptions(concurrency=concurrency, poll_seconds=0.2, drain_seconds=0.1)
        dispatcher = Dispatcher(queue, delivery, clock=time.time, options=options)
        running = asyncio.create_task(dispatcher.run())
        await until(lambda: all(servers[name].requests for name in HUNG))
        good = [task_for("good") for _ in range(20)]
        queue.enqueue_many(good)
        await until(lambda: all(queue.find(task.id).state is TaskState.SUCCEEDED for task in good))
        assert sum(servers[name].requests for name in HUNG) <= concurrency + 3
        dispatcher.stop()
        await running
    assert {view.attempts for view in queue.tasks(states=[TaskState.WAITING], limit=100)} <= {0, 1}
