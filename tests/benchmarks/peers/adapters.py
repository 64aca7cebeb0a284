"""The systems that ``python -m tests.benchmarks.peers`` compares, and the part of it that runs in their processes.

A system's own packages are imported inside its methods: each runs in the environment that has them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

#: What a task appends to the file ``PEERS_STAMPS``: when it was sent (0: not said) and when it began, on one clock.
STAMP = struct.Struct("dd")
MODULE = "tests.benchmarks.peers.adapters"
AT_MOST_ONCE = "at most once: a task leaves the queue before it runs"
AT_LEAST_ONCE = "at least once"
AOF = "a power cut loses up to 1 s (AOF, fsync each second)"
FSYNC = "each commit is on the disk"
SIGNED = "each task is signed, verified against a policy and entered in a ledger"
_stamps: list[int] = []


def noop_def(sent: float) -> None:
    """Note when this began."""
    if not _stamps:
        _stamps.append(os.open(os.environ["PEERS_STAMPS"], os.O_WRONLY | os.O_APPEND))
    os.write(_stamps[0], STAMP.pack(sent, time.monotonic()))


async def noop_async(sent: float) -> None:
    """Note when this began."""
    noop_def(sent)


NOOPS = {"async": noop_async, "def": noop_def}


class System:
    """One of the compared: a producer (``one``, ``many``) and a worker process (``work``) for the place of its queue."""

    name: str
    packages: tuple[str, ...]
    #: What it promises with the settings that are measured.
    guarantees: tuple[str, ...]
    #: How many tasks its worker process runs at once.
    at_once: str
    #: "sqlite", "redis" or "postgres": what its place is in.
    place_in: str
    #: requirements-<environment>.txt is what its environment is made of.
    environment = "main"
    kinds: tuple[str, ...] = ("async", "def")
    #: It gets this fraction of the tasks, so that rounds are of similar lengths.
    slow = 1

    def __init__(self, place: str) -> None:
        self.place = place

    @classmethod
    def tasks_of(cls, tasks: int) -> int:
        """Return how many no-op tasks of a round it gets."""
        return max(tasks // cls.slow, 20)

    def prepare(self) -> None:
        """Make the schema, where there is one."""

    def connect(self) -> None:
        """Make what both producer and worker need."""

    def one(self, kind: str, sent: float):
        """Enqueue a task; an awaitable is run on the producer's loop."""
        raise NotImplementedError

    #: Enqueue ``count`` tasks at once; ``None``: it has no such call.
    many = None

    def work(self) -> None:
        """Run tasks until SIGTERM."""
        raise NotImplementedError


class Safedefer(System):
    name = "safedefer, SQLite"
    packages = ("safedefer", "apsw")
    guarantees = (AT_LEAST_ONCE, FSYNC, SIGNED)
    at_once = "16"
    place_in = "sqlite"

    def connect(self) -> None:
        os.environ |= {
            "SAFEDEFER_KEYS": "bench:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8",
            "SAFEDEFER_POLICY": MODULE,
            "SAFEDEFER_QUEUE": self.url,
            "SAFEDEFER_ENVIRONMENT": "bench",
        }
        import safedefer

        self._app = safedefer.App.from_settings()

    @property
    def url(self) -> str:
        return f"sqlite:///{self.place}"

    def one(self, kind: str, sent: float) -> None:
        self._app.defer(NOOPS[kind], sent)

    def many(self, kind: str, count: int) -> None:
        self._app.defer_many([(NOOPS[kind], (0.0,), {})] * count)

    def work(self) -> None:
        from safedefer.cli import main

        main(["run", "--port", "0"])


class SafedeferHttp(Safedefer):
    name = "safedefer, SQLite, over HTTP"
    at_once = "16; `serve` and `dispatch`, two processes"

    def work(self) -> None:
        from safedefer.cli import main

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with subprocess.Popen([sys.executable, "-m", "safedefer", "serve", "--port", str(port)]) as handler:
            try:
                while handler.poll() is None:
                    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                        break
                    time.sleep(0.05)
                main(["dispatch", "--to", f"http://127.0.0.1:{port}"])
            finally:
                handler.terminate()


class SafedeferPostgres(Safedefer):
    name = "safedefer, PostgreSQL"
    packages = ("safedefer", "pgqueuer", "asyncpg")
    place_in = "postgres"

    @property
    def url(self) -> str:
        return self.place

    def prepare(self) -> None:
        from safedefer.queues import migrate_queue

        migrate_queue(self.place)


class Rq(System):
    name = "RQ"
    packages = ("rq",)
    guarantees = ("at most once: a task whose worker died is failed, not run again", AOF)
    at_once = "1, a new process for each task"
    place_in = "redis"
    slow = 40

    def connect(self) -> None:
        import redis
        import rq

        self._queue = rq.Queue(connection=redis.Redis.from_url(self.place))

    def one(self, kind: str, sent: float) -> None:
        self._queue.enqueue(NOOPS[kind], sent)

    def many(self, kind: str, count: int) -> None:
        self._queue.enqueue_many([self._queue.prepare_data(NOOPS[kind], (0.0,)) for _ in range(count)])

    def work(self) -> None:
        import rq

        rq.Worker([self._queue], connection=self._queue.connection).work(logging_level="ERROR")


class Celery(System):
    name = "Celery"
    packages = ("celery", "kombu")
    guarantees = (AT_LEAST_ONCE + " (`task_acks_late`, `task_reject_on_worker_lost`; not the default)", AOF)
    slow = 4
    at_once = "1 (prefork, `-c 1`; the default is one process for each core)"
    place_in = "redis"
    kinds = ("def",)

    def connect(self) -> None:
        import celery

        self._app = celery.Celery("peers", broker=self.place)
        self._app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True, task_ignore_result=True)
        self._task = self._app.task(name="noop")(noop_def)

    def one(self, kind: str, sent: float) -> None:
        self._task.delay(sent)

    def work(self) -> None:
        self._app.worker_main(["worker", "-c", "1", "--loglevel", "ERROR"])


class Dramatiq(System):
    name = "Dramatiq"
    packages = ("dramatiq",)
    guarantees = (AT_LEAST_ONCE, AOF)
    slow = 2
    at_once = "8 threads"
    place_in = "redis"

    def connect(self) -> None:
        import dramatiq
        from dramatiq.brokers.redis import RedisBroker
        from dramatiq.middleware import AsyncIO

        self._broker = RedisBroker(url=self.place)
        self._broker.add_middleware(AsyncIO())
        self._actors = {
            kind: dramatiq.actor(noop, actor_name=kind, broker=self._broker) for kind, noop in NOOPS.items()
        }

    def one(self, kind: str, sent: float) -> None:
        self._actors[kind].send(sent)

    def work(self) -> None:
        import dramatiq

        dramatiq.Worker(self._broker, worker_threads=8).start()
        signal.pause()


class Huey(System):
    name = "Huey, SQLite with fsync"
    packages = ("huey",)
    guarantees = (AT_MOST_ONCE, FSYNC)
    slow = 4
    at_once = "1 thread"
    place_in = "sqlite"
    kinds = ("def",)

    def make(self):
        import huey

        return huey.SqliteHuey(filename=self.place, fsync=True, results=False)

    def connect(self) -> None:
        self._huey = self.make()
        self._task = self._huey.task(name="noop")(noop_def)

    def one(self, kind: str, sent: float) -> None:
        self._task(sent)

    def work(self) -> None:
        self._huey.create_consumer().run()


class HueyNoSync(Huey):
    name = "Huey, SQLite without fsync"
    guarantees = (AT_MOST_ONCE, "a power cut may lose tasks or break the file (`synchronous=0`)")
    slow = 1

    def make(self):
        import huey

        return huey.SqliteHuey(filename=self.place, fsync=False, results=False)


class HueyRedis(Huey):
    name = "Huey, Redis"
    packages = ("huey", "redis")
    guarantees = (AT_MOST_ONCE, AOF)
    slow = 2
    place_in = "redis"

    def make(self):
        import huey

        return huey.RedisHuey(url=self.place, results=False)


class Arq(System):
    name = "arq"
    packages = ("arq",)
    guarantees = (AT_LEAST_ONCE, AOF)
    at_once = "10"
    place_in = "redis"
    environment = "arq"
    kinds = ("async",)
    slow = 8

    async def one(self, kind: str, sent: float) -> None:
        import arq

        if not hasattr(self, "_pool"):
            self._pool = await arq.create_pool(arq.connections.RedisSettings.from_dsn(self.place))
        await self._pool.enqueue_job("noop", sent)

    def work(self) -> None:
        import arq

        async def noop(_context, sent: float) -> None:
            noop_def(sent)

        settings = arq.connections.RedisSettings.from_dsn(self.place)
        asyncio.set_event_loop(asyncio.new_event_loop())
        arq.Worker([arq.worker.func(noop, name="noop", keep_result=0)], redis_settings=settings).run()


class Saq(System):
    name = "SAQ"
    packages = ("saq",)
    guarantees = ("at least once for a task with `retries`; else failed when its worker died", AOF)
    slow = 4
    at_once = "10"
    place_in = "redis"

    def connect(self) -> None:
        import saq

        self._queue = saq.Queue.from_url(self.place)

    async def one(self, kind: str, sent: float) -> None:
        await self._queue.enqueue(kind, sent=sent)

    def work(self) -> None:
        import saq

        async def task(_context, *, sent: float) -> None:
            noop_def(sent)

        def thread_task(_context, *, sent: float) -> None:
            noop_def(sent)

        async def run() -> None:
            await saq.Worker(self._queue, functions=[("async", task), ("def", thread_task)]).start()

        asyncio.run(run())


class Taskiq(System):
    name = "taskiq"
    packages = ("taskiq", "taskiq-redis")
    guarantees = (AT_LEAST_ONCE + " (`RedisStreamBroker`)", AOF)
    slow = 4
    at_once = "100"
    place_in = "redis"
    environment = "taskiq"

    def connect(self) -> None:
        from taskiq_redis import RedisStreamBroker

        self._broker = RedisStreamBroker(self.place)
        self._tasks = {kind: self._broker.task(task_name=kind)(noop) for kind, noop in NOOPS.items()}
        self._started = False

    async def one(self, kind: str, sent: float) -> None:
        if not self._started:
            await self._broker.startup()
            self._started = True
        await self._tasks[kind].kiq(sent)

    def work(self) -> None:
        from taskiq.api import run_receiver_task

        self._broker.is_worker_process = True
        asyncio.run(run_receiver_task(self._broker, run_startup=True))


class Procrastinate(System):
    name = "procrastinate"
    packages = ("procrastinate",)
    guarantees = ("a task whose worker died is found as stalled, and run again by a task of your own", FSYNC)
    at_once = "1"
    place_in = "postgres"
    slow = 8

    def prepare(self) -> None:
        import procrastinate

        app = procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=self.place))
        with app.open():
            app.schema_manager.apply_schema()

    def connect(self) -> None:
        import procrastinate

        self._app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=self.place))
        sync = procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=self.place))
        sync.open()
        self._tasks = {kind: sync.task(name=kind)(noop) for kind, noop in NOOPS.items()}
        for kind, noop in NOOPS.items():
            self._app.task(name=kind)(noop)

    def one(self, kind: str, sent: float) -> None:
        self._tasks[kind].defer(sent=sent)

    def many(self, kind: str, count: int) -> None:
        self._tasks[kind].batch_defer(*({"sent": 0.0} for _ in range(count)))

    def work(self) -> None:
        async def run() -> None:
            async with self._app.open_async():
                await self._app.run_worker_async()

        asyncio.run(run())


class Pgqueuer(System):
    name = "pgqueuer"
    packages = ("pgqueuer", "asyncpg")
    guarantees = (AT_LEAST_ONCE, FSYNC)
    at_once = "no limit; fetched 10 at a time"
    place_in = "postgres"
    kinds = ("async",)

    def prepare(self) -> None:
        import asyncpg
        from pgqueuer.db import AsyncpgPoolDriver
        from pgqueuer.queries import Queries

        async def install() -> None:
            async with asyncpg.create_pool(self.place, min_size=1, max_size=2) as pool:
                await Queries(AsyncpgPoolDriver(pool)).install()

        asyncio.run(install())

    def connect(self) -> None:
        import psycopg
        from pgqueuer.db import SyncPsycopgDriver
        from pgqueuer.queries import SyncQueries

        self._queries = SyncQueries(SyncPsycopgDriver(psycopg.connect(self.place, autocommit=True)))

    def one(self, kind: str, sent: float) -> None:
        self._queries.enqueue(kind, repr(sent).encode())

    def many(self, kind: str, count: int) -> None:
        self._queries.enqueue([kind] * count, [b"0.0"] * count, [0] * count)

    def work(self) -> None:
        import asyncpg
        from pgqueuer.db import AsyncpgPoolDriver
        from pgqueuer.qm import QueueManager
        from pgqueuer.queries import Queries

        async def run() -> None:
            async with asyncpg.create_pool(self.place, min_size=2, max_size=6) as pool:
                manager = QueueManager(Queries(AsyncpgPoolDriver(pool)))

                @manager.entrypoint("async")
                async def _async(job) -> None:
                    noop_def(float(job.payload))

                await manager.run()

        asyncio.run(run())


SYSTEMS: dict[str, type[System]] = {
    system.name: system
    for system in (
        Safedefer, SafedeferHttp, SafedeferPostgres, Rq, Celery, Dramatiq, Huey, HueyNoSync, HueyRedis, Arq, Saq, Taskiq,
        Procrastinate, Pgqueuer,
    )
}  # fmt: skip


def fill(system: System, kind: str, tasks: int) -> dict[str, float]:
    """Enqueue no-ops, a quarter one by one and the rest in batches of 100, and return both rates."""
    call = caller()
    call(system.one, kind, 0.0)  # connects, imports
    one = tasks - 1 if system.many is None else max(tasks // 4, 1)
    started = time.perf_counter()
    for _ in range(one):
        call(system.one, kind, 0.0)
    rates = {"one": one / (time.perf_counter() - started)}
    left = tasks - 1 - one
    if left:
        started = time.perf_counter()
        for done in range(0, left, 100):
            call(system.many, kind, min(100, left - done))
        rates["many"] = left / (time.perf_counter() - started)
    return rates


def pace(system: System, kind: str, tasks: int) -> dict[str, float]:
    """Enqueue 50 tasks a second that say when they were sent."""
    call = caller()
    due = time.monotonic()
    for _ in range(tasks):
        time.sleep(max(due - time.monotonic(), 0.0))
        due += 0.02
        call(system.one, kind, time.monotonic())
    return {}


def caller():
    """Return a function that calls, on a loop of its own where the call gives a coroutine."""
    loop = asyncio.new_event_loop()

    def call(function, *arguments) -> None:
        result = function(*arguments)
        if result is not None and asyncio.iscoroutine(result):
            loop.run_until_complete(result)

    return call


def main() -> None:
    """Do one part in a process of its own: ``versions NAME PACKAGE...`` or ``ACTION NAME PLACE KIND TASKS``; prints JSON."""
    action, name, *rest = sys.argv[1:]
    if action == "versions":
        missing = [package for package in rest if find_spec(package.replace("-", "_")) is None]
        found = {}
        for package in rest:
            with contextlib.suppress(PackageNotFoundError):  # this project, run from a checkout
                found[package] = version(package)
        print(json.dumps({"missing": missing, "versions": found}))
        return
    place, kind, tasks = rest
    system = SYSTEMS[name](place)
    if action == "prepare":
        system.prepare()
        return
    system.connect()
    if action == "work":
        with contextlib.suppress(KeyboardInterrupt):
            system.work()
        return
    print(json.dumps({"fill": fill, "pace": pace}[action](system, kind, int(tasks))), flush=True)
    os._exit(0)  # connections of closed loops would complain
