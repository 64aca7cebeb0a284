"""An emulator in a thread of its own, with a clock that tests set, a target that notes requests, and Google's own client."""

import asyncio
import contextlib
import socket
import threading
import time
from dataclasses import dataclass, field

from aiohttp import web
from google.auth.credentials import AnonymousCredentials
from google.cloud import tasks_v2
from google.cloud.tasks_v2.services.cloud_tasks.transports import CloudTasksRestTransport

from safedefer.queues.cloudtasks.emulator.server import EmulatorOptions, serving_emulator
from safedefer.queues.cloudtasks.emulator.tokens import TokenSigner

PARENT = "projects/p-1/locations/europe-west1"
QUEUE = f"{PARENT}/queues/mail"
#: Made once: it takes a while.
KEY = TokenSigner().pem()
T0 = 1_800_000_000.0
#: Seconds that any wait may take on a slow machine.
DEADLINE = 60.0


@dataclass
class Clock:
    """Seconds since the epoch; they go on by themselves unless they are stopped."""

    moment: float = T0

    def __call__(self):
        return self.moment


def wait_for(condition, text="the condition", seconds=DEADLINE):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{text} did not come true"
        time.sleep(0.005)
    return found


class Loop:
    """An event loop in a thread."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(DEADLINE)

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(DEADLINE)
        self.loop.close()


@dataclass
class Target:
    """Answers each request with the next status of ``answers``, or 200, and notes it."""

    answers: list = field(default_factory=list)
    headers: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    held: asyncio.Event | None = None

    async def answer(self, request):
        self.requests.append((request.method, request.raw_path, request.headers.copy(), await request.read()))
        if self.held is not None:
            await self.held.wait()
        return web.Response(status=self.answers.pop(0) if self.answers else 200, headers=self.headers)


@contextlib.asynccontextmanager
async def _serving(target):
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", target.answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class Emulated:
    """A running emulator. ``tick`` moves the clock, and has the dispatcher look at it."""

    def __init__(self, **options):
        self.clock = options.pop("clock", None) or Clock()
        self.target = Target()
        self.loop = Loop()
        self._stack = contextlib.AsyncExitStack()
        self.target_url = self.loop.call(self._stack.enter_async_context(_serving(self.target)))
        self._listener = socket.create_server(("127.0.0.1", options.pop("port", 0)))
        options.setdefault("key", KEY)
        setup = EmulatorOptions(clock=self.clock, **{"app_engine": self.target_url, **options})
        self.url = self.loop.call(self._stack.enter_async_context(serving_emulator(self._listener, setup)))
        self.client = new_client(self.url)

    def close(self):
        self.loop.call(self._stack.aclose())
        self._listener.close()
        self.loop.close()
        self.client.transport.close()

    def tick(self, seconds):
        self.clock.moment += seconds
        # Any change of a queue wakes the dispatcher.
        self.client.resume_queue(name=QUEUE)

    def http(self, **members):
        request = {"url": f"{self.target_url}/run", "body": b"token", **members.pop("request", {})}
        return tasks_v2.Task({"http_request": request, **members})

    def requests(self, number):
        """Wait for so many requests, and return them."""
        wait_for(lambda: len(self.target.requests) >= number, f"request {number}")
        assert len(self.target.requests) == number
        return self.target.requests

    def settled(self, name, responses):
        """Wait until an attempt of a task is settled."""
        return wait_for(
            lambda: (task := self.client.get_task(name=name)).response_count >= responses and task, "the attempt's end"
        )


def new_client(url):
    transport = CloudTasksRestTransport(host=url, credentials=AnonymousCredentials())
    return tasks_v2.CloudTasksClient(transport=transport)
