"""The PostgreSQL queue beside bare pgqueuer and procrastinate: ``python -m tests.benchmarks.bench_postgres``.

All in one process on one server that syncs every commit, round by round in turn, each in a database of its own. What
is compared is the ratio to the others of the same run; the absolute figures are of the machine and its neighbours.

Tasks are executed by one process. pgqueuer runs whatever it has fetched at once, in batches, and sets itself no limit; this
project and procrastinate have the places that they are given, four for each job of such a batch.

``pip install procrastinate`` for its rows; without it they are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import secrets
import statistics
import time
from importlib.util import find_spec

import asyncpg
import psycopg
from pgqueuer.db import AsyncpgPoolDriver, SyncPsycopgDriver
from pgqueuer.qm import QueueManager
from pgqueuer.queries import Queries, SyncQueries
from pgqueuer.types import QueueExecutionMode

from safedefer.app import App
from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions
from safedefer.dispatcher.transport import InProcessDelivery
from safedefer.keys import Key, Keyring
from safedefer.policy import Policy
from safedefer.queues import migrate_queue
from tests.benchmarks.noop import STARTED, noop, stamp
from tests.postgres.server import Server, fresh_database

#: What pgqueuer carries instead: as many bytes as a token has.
PAYLOAD_BYTES = 450
PLACES_PER_JOB = 4


class Safedefer:
    """This project: signed, verified, entered in the ledger."""

    name = "safedefer"

    def __init__(self, dsn: str, places: int) -> None:
        migrate_queue(dsn)
        self._places = places
        self._app = App(
            keyring=Keyring(Key("bench", secrets.token_bytes(32))),
            policy=Policy("tests.benchmarks.noop"),
            queue=dsn,
            concurrency=1000,
        )
        self._app.delivery  # noqa: B018 - imports what the policy names

    def one(self) -> None:
        self._app.defer(noop, 1)

    def many(self, count: int) -> None:
        self._app.defer_many([(noop, (1,), {})] * count)

    def _dispatcher(self) -> Dispatcher:
        options = DispatcherOptions(concurrency=self._places)
        return Dispatcher(self._app.queue, InProcessDelivery(self._app.handle), options=options, clock=time.time)

    async def drain(self, count: int) -> None:
        del count
        await self._dispatcher().run_until_empty()

    @contextlib.asynccontextmanager
    async def working(self):
        dispatcher = self._dispatcher()
        run = asyncio.create_task(dispatcher.run())
        await asyncio.sleep(0.5)
        yield
        dispatcher.stop()
        await run

    async def send(self) -> None:
        await self._app.defer_async(stamp, time.perf_counter())

    def close(self) -> None:
        self._app.close()


class Pgqueuer:
    """The engine alone."""

    name = "pgqueuer"

    def __init__(self, dsn: str, places: int) -> None:
        self._dsn = dsn
        self._batch = places // PLACES_PER_JOB
        self._payload = b"x" * PAYLOAD_BYTES
        asyncio.run(self._install())
        self._connection = psycopg.connect(dsn, autocommit=True)
        self._sync = SyncQueries(SyncPsycopgDriver(self._connection))

    async def _install(self) -> None:
        async with asyncpg.create_pool(self._dsn, min_size=1, max_size=2) as pool:
            queries = Queries(AsyncpgPoolDriver(pool))
            await queries.install()
            await queries.optimize_autovacuum()

    def one(self) -> None:
        self._sync.enqueue("noop", self._payload)

    def many(self, count: int) -> None:
        self._sync.enqueue(["noop"] * count, [self._payload] * count, [0] * count)

    def _manager(self, pool: asyncpg.Pool) -> QueueManager:
        manager = QueueManager(Queries(AsyncpgPoolDriver(pool)))

        @manager.entrypoint("noop")
        async def _noop(job) -> None:
            pass

        @manager.entrypoint("stamp")
        async def _stamp(job) -> None:
            stamp(float(job.payload))

        return manager

    async def drain(self, count: int) -> None:
        del count
        async with asyncpg.create_pool(self._dsn, min_size=2, max_size=6) as pool:
            await self._manager(pool).run(batch_size=self._batch, mode=QueueExecutionMode.drain)

    @contextlib.asynccontextmanager
    async def working(self):
        async with asyncpg.create_pool(self._dsn, min_size=2, max_size=6) as pool:
            self._queries = Queries(AsyncpgPoolDriver(pool))
            manager = self._manager(pool)
            run = asyncio.create_task(manager.run(batch_size=self._batch))
            await asyncio.sleep(0.5)
            yield
            manager.shutdown.set()
            await run

    async def send(self) -> None:
        await self._queries.enqueue("stamp", repr(time.perf_counter()).encode())

    def close(self) -> None:
        self._connection.close()


class Procrastinate:
    """Another queue in PostgreSQL."""

    name = "procrastinate"

    def __init__(self, dsn: str, places: int) -> None:
        import procrastinate

        self._places = places
        sync = procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=dsn))
        sync.open()
        sync.schema_manager.apply_schema()
        self._sync = sync
        self._app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=dsn, max_size=6))

        async def work(value) -> None:
            pass

        async def mark(value) -> None:
            stamp(value)

        self._deferred = sync.task(name="work")(work)
        self._app.task(name="work")(work)
        self._mark = self._app.task(name="mark")(mark)

    def one(self) -> None:
        self._deferred.defer(value=1)

    def many(self, count: int) -> None:
        self._deferred.batch_defer(*({"value": 1} for _ in range(count)))

    async def drain(self, count: int) -> None:
        async with self._app.open_async():
            await self._app.run_worker_async(concurrency=self._places, wait=False, install_signal_handlers=False)

    @contextlib.asynccontextmanager
    async def working(self):
        async with self._app.open_async():
            run = asyncio.create_task(
                self._app.run_worker_async(concurrency=self._places, install_signal_handlers=False)
            )
            await asyncio.sleep(0.5)
            yield
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)

    async def send(self) -> None:
        await self._mark.defer_async(value=time.perf_counter())

    def close(self) -> None:
        self._sync.close()


def rate(count: int, action) -> float:
    started = time.perf_counter()
    action()
    return count / (time.perf_counter() - started)


def enqueue_one(system, count: int) -> float:
    def action() -> None:
        for _ in range(count):
            system.one()

    return rate(count, action)


def enqueue_many(system, count: int) -> float:
    def action() -> None:
        for _ in range(count // 1000):
            system.many(1000)

    return rate(count, action)


def execute(system, waiting: int) -> float:
    return rate(waiting, lambda: asyncio.run(system.drain(waiting)))


async def latency(system, count: int) -> list[float]:
    STARTED.clear()
    async with system.working():
        for _ in range(count):
            await system.send()
            await asyncio.sleep(0.02)
        for _ in range(200):
            if len(STARTED) >= count:
                break
            await asyncio.sleep(0.05)
    return [after - before for before, after in STARTED]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=12_000, help="so many that starting to work is a small part")
    parser.add_argument("--places", type=int, default=400, help="tasks that run at once; pgqueuer's batch is a quarter")
    parser.add_argument("--only", nargs="*", default=None)
    options = parser.parse_args()
    kinds = [Safedefer, Pgqueuer, *([Procrastinate] if find_spec("procrastinate") else [])]
    kinds = [kind for kind in kinds if options.only is None or kind.name in options.only]
    server = Server(durable=True, settings=("shared_buffers=512MB", "max_wal_size=4GB")).start()
    figures: dict[tuple[str, str], list[float]] = {}
    spans: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        systems = []
        for kind in kinds:
            system = kind(server.dsn(stack.enter_context(fresh_database(server))), options.places)
            stack.callback(system.close)
            systems.append(system)
        for number in range(options.rounds + 1):  # the first warms up
            for system in systems[number % len(systems) :] + systems[: number % len(systems)]:
                # procrastinate runs a tenth as fast: fewer will do.
                tasks = options.tasks if system.name != "procrastinate" else max(options.tasks // 10, 1000)
                one = enqueue_one(system, 200)
                many = enqueue_many(system, tasks // 1000 * 1000)
                run = execute(system, tasks // 1000 * 1000 + 200)
                if number:
                    for what, value in (("enqueue one", one), ("enqueue 1,000", many), ("execute", run)):
                        figures.setdefault((what, system.name), []).append(value)
        for _ in range(2):
            for system in systems:
                spans.setdefault(system.name, []).extend(asyncio.run(latency(system, 150)))
    server.close()
    for what in ("enqueue one", "enqueue 1,000", "execute"):
        print(what)
        for system in systems:
            values = figures[what, system.name]
            line = f"  {system.name:14} {statistics.median(values):9.0f}/s  best {max(values):9.0f}/s"
            if system.name != "pgqueuer" and ("execute", "pgqueuer") in figures:
                ratios = [mine / bare for mine, bare in zip(values, figures[what, "pgqueuer"], strict=True)]
                line += f"  {statistics.median(ratios):6.2f} of pgqueuer"
            print(line)
    print("from enqueue to the first line of the task")
    for name, found in spans.items():
        found.sort()
        print(
            f"  {name:14} p50 {found[len(found) // 2] * 1000:7.2f} ms  p99 {found[int(len(found) * 0.99)] * 1000:7.2f} ms"
        )


if __name__ == "__main__":
    main()
