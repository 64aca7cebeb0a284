"""Scenarios of several machines over one PostgreSQL: any of them dies, and so does the server."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import psycopg

from safedefer.queues.base import TaskState
from tests.chaos.cast import Cast, Failed
from tests.chaos.deaths import defer
from tests.chaos.stores import PostgresDatabase
from tests.postgres.server import Server


def now() -> float:
    return time.clock_gettime(time.CLOCK_MONOTONIC)


class Machines(Cast):
    """Two handlers, a dispatcher for each, and producers; whoever is in ``roles`` can be killed and started again."""

    def __init__(self, server: Server, *, lease: float, run_lease: float | None = None) -> None:
        super().__init__(
            lease=lease, store=PostgresDatabase(server), SAFEDEFER_LEASE_SECONDS=str(run_lease or max(lease, 1.0))
        )
        self.server = server
        self.ports = (self.port, self.new_port())
        self.roles: dict[str, Any] = {}

    def begin(self) -> None:
        for number in (1, 2):
            for name in (f"handler-{number}", f"dispatcher-{number}"):
                self.roles[name] = self._start_role(name)
        for port in self.ports:
            self.ready(port)

    def _start_role(self, name: str) -> Any:
        kind, number = name.split("-")
        port = self.ports[int(number) - 1]
        return self.handler(port=port) if kind == "handler" else self.dispatcher(port=port)

    def again(self, name: str) -> None:
        """Start what was killed."""
        self.roles[name] = self._start_role(name)

    def check_alive(self) -> None:
        """Nobody ended by itself."""
        for name, process in self.roles.items():
            if process.poll() is not None and (process.returncode or not name.startswith("producer")):
                raise Failed(f"{name} ended with {process.returncode}: {self.output()[-1500:]}")

    def check_output(self) -> None:
        """Nothing was said that only a defect says."""
        found = re.findall(r"Traceback.*|.*report it.*|.*never retrieved.*|.*never awaited.*", self.output())
        if found:
            raise Failed(f"{found[:3]}; {self.output()[-3000:]}")

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """Note when the storage was not there."""
        since = now()
        try:
            yield
        finally:
            self.outages.append((since, now()))


@contextlib.contextmanager
def machines(*, lease: float, run_lease: float | None = None, connections: int = 100) -> Iterator[Machines]:
    """Give the machines and their server, which syncs every commit."""
    server = Server(durable=True, settings=(f"max_connections={connections}",)).start()
    try:
        with Machines(server, lease=lease, run_lease=run_lease) as cast:
            yield cast
    finally:
        server.close()


# --- What happens to the server -------------------------------------------------------------------


def restart(cast: Machines, rng: random.Random) -> None:
    """Shut PostgreSQL down as a crash would, and start it again."""
    with cast.outage():
        cast.server.stop(immediate=True)
        time.sleep(rng.uniform(0.0, 1.5))
        cast.server.start()


_OURS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'safedefer%'"


def fill(cast: Machines, rng: random.Random, *, seconds: float = 3.0) -> None:
    """Take every connection that the server has, those of our processes too, and keep them for a while."""
    with cast.outage(), contextlib.ExitStack() as taken:
        first = taken.enter_context(cast.store.connect())
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            first.execute(_OURS)
            with contextlib.suppress(psycopg.OperationalError):
                while True:
                    taken.enter_context(cast.store.connect())
            time.sleep(0.02)


def silence(cast: Machines, rng: random.Random, *, seconds: float = 1.0) -> None:
    """Break connections after their commit, before it is answered: a commit waits for a standby that is not there."""
    with cast.store.connect() as connection:
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        connection.execute("SELECT pg_reload_conf()")
        try:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                time.sleep(rng.uniform(0.0, 0.1))
                connection.execute(f"{_OURS} AND wait_event = 'SyncRep'")
        finally:
            connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            connection.execute("SELECT pg_reload_conf()")


class Breaker(threading.Thread):
    """Ends connections of ours at random, every second one in the middle of what it does."""

    def __init__(self, cast: Machines, *, seed: int, every: float) -> None:
        super().__init__(name="breaker")
        self._cast = cast
        self._random = random.Random(seed)
        self._every = every
        self._over = threading.Event()
        self.broken = 0
        self.broken_within = 0

    def run(self) -> None:
        connection = None
        while not self._over.wait(self._random.uniform(0.3, 1.7) * self._every):
            try:
                if connection is None or connection.closed:
                    connection = self._cast.store.connect()
                self._break(connection)
            except psycopg.OperationalError:  # the server is down, or full
                connection = None
        if connection is not None:
            connection.close()

    def _break(self, connection: psycopg.Connection[Any]) -> None:
        within = self._random.random() < 0.5
        until = time.monotonic() + 0.3
        condition = " AND state <> 'idle'" if within else ""
        while time.monotonic() < until:
            if connection.execute(
                f"{_OURS}{condition} AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1"
            ).fetchall():
                self.broken += 1
                self.broken_within += within
                return
            time.sleep(0.001)

    def __enter__(self) -> Breaker:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self.join()


# --- Scenarios ------------------------------------------------------------------------------------


def several(
    *,
    seed: int = 1,
    tasks: int = 20_000,
    least: int = 15,
    restarts: int = 2,
    fills: int = 1,
    silences: int = 1,
    per_second: float = 250.0,
    break_every: float = 0.7,
    later_every: int = 25,
) -> str:
    """SIGKILL over all, immediate shutdowns of PostgreSQL, broken connections, and none to be had."""
    rng = random.Random(seed)
    with machines(lease=2.0, connections=60) as cast:
        cast.begin()
        ends = {"producer-1": tasks // 2, "producer-2": tasks}

        def produce(name: str, first: int) -> None:
            rate = str(per_second / 2)
            options = ("--slow-every", "20", "--later-every", str(later_every), "--in-doubt")
            cast.roles[name] = cast.producer(first, ends[name], float(rate), *options)

        produce("producer-1", 0)
        produce("producer-2", tasks // 2)

        def kill() -> None:
            name = rng.choice([name for name, process in cast.roles.items() if process.poll() is None])
            cast.kill(cast.roles[name])
            time.sleep(rng.choice((0.0, 0.0, 0.5)))
            if name.startswith("producer"):
                mine = [
                    n for n in cast.account().attempted if n < ends[name] and (n >= tasks // 2) == (name[-1] == "2")
                ]
                produce(name, max(mine, default=ends[name] - tasks // 2 - 1) + 1)
            else:
                cast.again(name)

        events: list[Callable[[], None]] = [kill] * least
        for event, count in ((restart, restarts), (fill, fills), (silence, silences)):
            events += [lambda event=event: event(cast, rng)] * count
        rng.shuffle(events)
        spacing = tasks / per_second / (len(events) + 2)
        with Breaker(cast, seed=seed, every=break_every) as breaker:
            for event in events:
                time.sleep(rng.uniform(0.3, 1.7) * spacing)
                cast.check_alive()
                event()
            cast.until(
                lambda: cast.roles["producer-1"].poll() == 0 == cast.roles["producer-2"].poll(), 600, "producers go on"
            )
        cast.drained(180.0)
        cast.check_alive()
        account, attempts = cast.account(), cast.attempts()
        account.check()
        cast.check_store()
        cast.check_output()
        log = cast.server.log()
        return (
            f"seed={seed} kills={len(cast.kills)} restarts={restarts} fills={fills} silences={silences} "
            f"broken={breaker.broken} (within a transaction or statement: {breaker.broken_within}) {account.line()} "
            f"explained={account.explanations} attempts={dict(sorted(attempts.items()))} "
            f"refused={account.refused} deadlocks={log.count('deadlock detected')}"
        )


def calm(*, tasks: int = 2_000) -> str:
    """Two handlers and two dispatchers, no kills: nothing runs twice, and every attempt is the first."""
    with machines(lease=60.0) as cast:
        cast.begin()
        producers = [cast.producer(0, tasks // 2), cast.producer(tasks // 2, tasks)]
        for producer in producers:
            producer.wait()
        cast.drained()
        cast.check_alive()
        account, attempts = cast.account(), cast.attempts()
        account.check(duplicates=False)
        cast.check_store()
        cast.check_output()
        pids = Counter(pid for runs in account.runs.values() for _, pid in runs)
        if attempts != {1: tasks} or len(account.ok) != tasks or len(pids) != 2:
            raise Failed(f"attempts {dict(attempts)}, runs by handler {dict(pids)}")
        return f"{account.line()} attempts={dict(attempts)} by_handler={sorted(pids.values())}"


def outage(*, seconds: float = 20.0, around: float = 5.0, per_second: float = 100.0, lease: float = 60.0) -> str:
    """PostgreSQL is down for a while: nothing is lost or charged, producers are told, all go on by themselves."""
    with machines(lease=lease) as cast:
        cast.begin()
        tasks = int((2 * around + seconds) * per_second)
        producer = cast.roles["producer-1"] = cast.producer(0, tasks, per_second, "--slow-every", "20", "--in-doubt")
        cast.until(lambda: len(cast.account().ok) > around * per_second, 60, "nothing runs")
        cast.server.stop(immediate=True)
        since = now()
        time.sleep(seconds)
        cast.until(lambda: cast.account().refused, 30, "no producer is told")
        until = now()
        cast.check_alive()
        cast.server.start()
        cast.until(lambda: producer.poll() is not None, 120, "the producer goes on")
        cast.drained()
        ended = now()
        cast.check_alive()
        account, attempts = cast.account(), cast.attempts()
        account.check(duplicates=False)
        cast.check_store()
        cast.check_output()
        lying = [when for when in account.acknowledgements if since < when < until]
        if lying or set(attempts) != {1} or not account.refused:
            raise Failed(
                f"acknowledged while down: {len(lying)}; attempts {dict(attempts)}; refused {account.refused}; "
                f"{cast.store.tried_again()}"
            )
        first_ack = min(when for when in account.acknowledgements if when > until) - until
        first_run = min(when for runs in account.runs.values() for when, _ in runs if when > until) - until
        last_run = max(when for ends in account.ends.values() for when, _ in ends)
        idle = ended - last_run
        return (
            f"down={seconds:g}s {account.line()} refused={account.refused} acknowledged_while_down=0 "
            f"attempts={dict(attempts)} first_acknowledged={first_ack:+.1f}s first_run={first_run:+.1f}s "
            f"drained={idle:.1f}s after the last run"
        )


def rescue(*, tasks: int = 8, lease: float = 2.0) -> str:
    """What a killed dispatcher held, and what a killed handler ran, is soon taken over by the other machine."""
    with machines(lease=lease, run_lease=lease) as cast:
        cast.begin()
        app = cast.app()
        # The handler of the first dispatcher hears nothing: what is leased for it is neither begun nor settled.
        cast.roles["dispatcher-2"].send_signal(signal.SIGSTOP)
        cast.roles["handler-1"].send_signal(signal.SIGSTOP)
        for number in range(tasks):
            defer(app, number)
        cast.until(lambda: cast.store.held() == tasks, 30, "not all is leased")
        cast.roles["dispatcher-2"].send_signal(signal.SIGCONT)
        time.sleep(2.5 * lease)  # the leases are prolonged meanwhile
        if cast.account().runs:
            raise Failed("leases that are prolonged were taken over")
        killed = now()
        cast.kill(cast.roles["dispatcher-1"])
        cast.drained(60)
        leased = max(when for runs in cast.account().runs.values() for when, _ in runs) - killed
        # And what runs, when its handler dies with it.
        cast.kill(cast.roles["handler-1"])
        cast.again("handler-1")
        cast.ready(cast.ports[0])
        cast.roles["dispatcher-2"].send_signal(signal.SIGSTOP)
        cast.again("dispatcher-1")
        for number in range(tasks, 2 * tasks):
            defer(app, number, 3.0)
        cast.until(lambda: len(cast.account().runs) == 2 * tasks, 30, "not all run")
        cast.roles["dispatcher-2"].send_signal(signal.SIGCONT)
        killed = now()
        cast.kill(cast.roles["handler-1"])
        cast.kill(cast.roles["dispatcher-1"])
        cast.drained(60)
        account = cast.account()
        account.check()
        cast.check_store()
        running = max(when for number, runs in account.runs.items() for when, _ in runs if number >= tasks) - killed
        dead = app.queue.tasks(states=[TaskState.DEAD])
        app.close()
        if max(leased, running) > lease + 4.0 or len(account.duplicated) != tasks or dead:
            raise Failed(f"after {leased:.1f} s and {running:.1f} s; {account.line()}")
        return f"lease={lease:g}s leased_again_after={leased:.1f}s run_again_after={running:.1f}s {account.line()}"
