"""Tasks a second of one process that leases, delivers in process, runs and settles no-ops.

    python -m tests.benchmarks.bench_dispatch [--queue none memory sqlite] [--tasks N] [--concurrency 16 64 256]

With ``none`` nothing is stored, and what is left is the work of the dispatcher and the handler.

The peer is the least that asyncio can do: a loop that takes from a list, makes a task of each item, awaits a no-op and
collects. Rounds are interleaved, so that whatever else the machine does falls on all, and the fastest round of each
counts. CPU time is that of the process, its threads included. The parts are measured alone, in the same rounds:

    peer        the loop described above
    storage     the queue's and the ledger's own work in batches of 64, with nothing in between
    verify      signature, claims and policy
    dispatcher  everything, with a handler that answers at once
    handler     the handler alone, called by the peer
    async, def  everything, of ``async def`` and ``def``
    counted     as async, with metrics
    awaited     as async, with an async observer of all events
    watched     as async, with metrics and that observer
    traced      as async, with OpenTelemetry's SDK and its batch processor, which throws the spans away
    everything  as async, with all of them

The ratio of CPU times to those of ``async`` says what watching costs: the least of the rounds of each.
"""

import argparse
import asyncio
import logging
import os
import tempfile
import time
from pathlib import Path

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

import safedefer
from safedefer.delivery.handler import Response
from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions, InProcessDelivery
from safedefer.ledger import Admission, AttemptRecord, EndState, Execution
from safedefer.observe.counts import Counts
from safedefer.observe.tracing import Tracing
from safedefer.queues import open_queue
from safedefer.queues.base import Settlement, Verdict
from safedefer.queues.capabilities import FULL
from safedefer.queues.loop_calls import no_connections


class Nothing:
    """A queue, a ledger and no storage: what is left is the work of the dispatcher and the handler."""

    capabilities = FULL

    def __init__(self):
        self.memory = open_queue("memory://")
        self.ledger = self
        self.blobs = None
        self.here = None
        self.leases = None

    def on_loop(self):
        return no_connections()

    def enqueue_many(self, tasks):
        self.memory.enqueue_many(tasks)

    def lease(self, *, limit, **more):
        if self.leases is None:
            self.leases = list(self.memory.lease(limit=10**9, **more))
        found, self.leases = self.leases[:limit], self.leases[limit:]
        return found

    def begin_many(self, executions, **more):
        return [Admission.RUN] * len(executions)

    def finish_many(self, ends):
        return [True] * len(ends)

    def settle_many(self, settlements, **more):
        return [True] * len(settlements)

    def next_due(self, **more):
        return None

    def wait(self, timeout):
        time.sleep(0.001)
        return False

    def wake(self):
        pass

    def stats(self, **more):
        return []

    def close(self):
        self.memory.close()


DONE = Settlement(verdict=Verdict.DONE, status=200, executed=True)
BATCH = 64


async def noop(number):
    """What the workers of the first column run."""


def plain(number):
    """What the workers of the second column run."""


def make_app(kind, concurrency, folder, **more):
    sqlite = f"sqlite:///{Path(folder, f'{time.monotonic_ns()}.db')}"
    queue = {"none": Nothing, "memory": lambda: "memory://", "sqlite": lambda: sqlite}[kind]()
    return safedefer.App(
        keyring=safedefer.Keyring(safedefer.Key("bench", os.urandom(32))),
        policy=safedefer.Policy("tests.benchmarks.bench_dispatch"),
        queue=queue,
        concurrency=concurrency,
        **more,
    )


async def observe(event):
    """What an async observer does here."""


class NoExporter(SpanExporter):
    """Takes spans and does nothing with them."""

    def export(self, spans):
        return SpanExportResult.SUCCESS


def tracing():
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(NoExporter()))
    return Tracing(tracer_provider=provider)


def fill(app, function, count):
    from tests.benchmarks import bench_dispatch  # and not __main__

    call = getattr(bench_dispatch, function.__name__)
    return [
        task
        for first in range(0, count, 500)
        for task in app.defer_many([(call, (n,), {}) for n in range(first, min(first + 500, count))])
    ]


class Clock:
    """Seconds and CPU seconds of a block."""

    def __enter__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exception):
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu


async def peer(items, concurrency, call):
    """Call ``call`` with every item, ``concurrency`` at once, a task for each."""
    waiting, running, done = list(reversed(items)), set(), []
    while waiting or running:
        while waiting and len(running) < concurrency:
            running.add(asyncio.create_task(call(waiting.pop())))
        ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        done += [task.result() for task in ended]
    return done


def measure_peer(kind, concurrency, count, folder):
    with Clock() as clock:
        asyncio.run(peer(range(count), concurrency, noop))
    return clock


def measure_storage(kind, concurrency, count, folder):
    app = make_app(kind, concurrency, folder)
    fill(app, noop, count)
    with Clock() as clock:
        while leases := app.queue.lease(owner="bench", limit=BATCH, seconds=60.0, now=time.time()):
            now = time.time()
            runs = [
                Execution(
                    audience=lease.task.audience,
                    task_id=lease.task.id,
                    digest=lease.task.digest,
                    owner="o",
                    expires=2**31,
                )
                for lease in leases
            ]
            app.queue.ledger.begin_many(runs, now=now, lease=60.0)
            app.queue.ledger.finish_many(
                [
                    (
                        run,
                        EndState.SUCCEEDED,
                        AttemptRecord(
                            task_id=run.task_id,
                            audience=run.audience,
                            started=now,
                            ended=now,
                            outcome="succeeded",
                            status=200,
                        ),
                    )
                    for run in runs
                ]
            )
            app.queue.settle_many([(lease, DONE) for lease in leases], now=now)
    app.close()
    return clock


def measure_verify(kind, concurrency, count, folder):
    app = make_app("memory", concurrency, folder)
    tokens = [task.payload for task in fill(app, noop, count)]
    app.verify(tokens[0])
    with Clock() as clock:
        for token in tokens:
            app.verify(token)
    app.close()
    return clock


def dispatch(app, deliver, concurrency, count):
    options = DispatcherOptions(concurrency=concurrency)

    async def work():
        app.delivery  # imports what the policy names
        dispatcher = Dispatcher(app.queue, counted, clock=time.time, options=options)
        stop.append(dispatcher.stop)
        await dispatcher.run()

    done, stop = [0], []

    async def counting(task, headers):
        answer = await deliver(task, headers)
        assert answer.status == 200, answer
        done[0] += 1
        if done[0] == count:
            stop[0]()
        return answer

    counting.address, counting.several = (lambda task: ""), False
    counted = counting
    with Clock() as clock:
        asyncio.run(work())
    return clock


def measure_dispatcher(kind, concurrency, count, folder):
    app = make_app(kind, concurrency, folder)
    fill(app, noop, count)

    async def deliver(task, headers):
        return Response(200, {"Safedefer-Outcome": "succeeded"}, b"succeeded\n")

    clock = dispatch(app, deliver, concurrency, count)
    app.close()
    return clock


def measure_handler(kind, concurrency, count, folder):
    app = make_app(kind, concurrency, folder)
    tokens = [task.payload for task in fill(app, noop, count)]
    headers = {
        "Content-Type": "application/jose",
        "X-AppEngine-QueueName": "default",
        "X-AppEngine-TaskRetryCount": "0",
    }

    async def call(token):
        return (await app.handle(headers, token)).status

    with Clock() as clock:
        statuses = asyncio.run(peer(tokens, concurrency, call))
    assert set(statuses) == {200}
    app.close()
    return clock


def whole(function, *observers, traced=False):
    def measure(kind, concurrency, count, folder):
        app = make_app(kind, concurrency, folder, tracing=tracing() if traced else None)
        for observer in observers:
            app.observers.add(observer())
        fill(app, function, count)
        clock = dispatch(app, InProcessDelivery(app.handle), concurrency, count)
        assert sum(stats.waiting + stats.running for stats in app.queue.stats(now=time.time())) == 0
        app.close()
        return clock

    return measure


PARTS = {
    "peer": measure_peer,
    "storage": measure_storage,
    "verify": measure_verify,
    "dispatcher": measure_dispatcher,
    "handler": measure_handler,
    "async": whole(noop),
    "def": whole(plain),
    "counted": whole(noop, Counts),
    "awaited": whole(noop, lambda: observe),
    "watched": whole(noop, Counts, lambda: observe),
    "traced": whole(noop, traced=True),
    "everything": whole(noop, Counts, lambda: observe, traced=True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queue", nargs="+", choices=["none", "memory", "sqlite"], default=["none", "memory"])
    parser.add_argument("--tasks", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    logging.getLogger("safedefer").addHandler(logging.NullHandler())
    print(
        f"{'queue':8}{'places':>7} {'part':12}{'tasks/s':>9}{'us/task':>9}{'CPU us':>8}{'of peer':>9}{'CPU to async':>13}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.queue:
            for concurrency in options.concurrency:
                best = {}
                for _ in range(options.rounds):
                    for part in options.parts:
                        clock = PARTS[part](kind, concurrency, options.tasks, folder)
                        wall, cpu = best.get(part, (float("inf"), float("inf")))
                        best[part] = min(wall, clock.wall), min(cpu, clock.cpu)
                for part, (wall, cpu) in best.items():
                    ratio = f"{best['peer'][0] / wall:9.3f}" if "peer" in best else ""
                    if "async" in best:
                        ratio = f"{ratio:9}{cpu / best['async'][1]:12.3f}"
                    each, used = wall / options.tasks * 1e6, cpu / options.tasks * 1e6
                    print(f"{kind:8}{concurrency:7} {part:12}{1e6 / each:9.0f}{each:9.1f}{used:8.1f}{ratio}")


if __name__ == "__main__":
    main()
