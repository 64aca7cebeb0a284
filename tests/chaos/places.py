"""Scenarios of clocks that jump, tokens that come a thousand times, and processes that fork."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter

import aiohttp
import apsw

from tests.chaos.cast import Cast, Failed
from tests.chaos.tasks import due, mark, note

#: Seconds by which a handler may find a task too early, and run it (``claims.LEEWAY``).
LEEWAY = 10.0


def clock(*, shift: float = 3600.0, who: str = "dispatcher", tasks: int = 300, seconds: float = 6.0) -> str:
    """One process's clock jumps: nothing is lost, and nothing runs before its time."""
    wrapped = ("tests.chaos.shifted", str(shift), "1.5")
    with Cast(lease=5.0) as cast:
        handler = cast.handler(wrapped=wrapped if who == "handler" else ("safedefer",))
        dispatcher = cast.dispatcher(wrapped=wrapped if who == "dispatcher" else ("safedefer",))
        cast.ready()
        app = cast.app()
        began = time.time()
        for number in range(tasks):
            note("try", number)
            eta = time.time() + (number % 3) * 2.0
            app.options(countdown=(number % 3) * 2.0).defer(due, number, eta)
            note("ack", number)
            time.sleep(max(0.0, began + number * seconds / tasks - time.time()))
        time.sleep(seconds / 2)
        wrong = len(cast.account().ok)
        cast.kill(dispatcher)
        cast.kill(handler)
        # The clock is right again. What was put off by the wrong one would be due in an hour: let that pass.
        connection = apsw.Connection(str(cast.store.path))
        connection.set_busy_timeout(30_000)
        connection.execute("UPDATE safedefer_tasks SET due = :now WHERE due > :now", {"now": time.time()})
        put_off = connection.changes()
        connection.execute("UPDATE safedefer_ledger SET until = 0 WHERE state = 'running'")
        connection.close()
        cast.handler()
        cast.dispatcher()
        cast.drained()
        app.close()
        account = cast.account()
        account.check()
        if account.early > LEEWAY:
            raise Failed(f"a task ran {account.early} s too early")
        return (
            f"{who} {shift:+.0f}s {account.line()} done_with_the_wrong_clock={wrong} put_off={put_off} "
            f"earliest={account.early:+.2f}s"
        )


def replay(*, posts: int = 1_000, store: str = "sqlite") -> str:
    """The same token posted many times at once to two handlers runs once."""
    with Cast(lease=30.0, store=store) as cast:
        ports = [cast.port, cast.new_port()]
        for port in ports:
            cast.handler(port=port)
            cast.ready(port)
        app = cast.app()
        note("try", 0)
        token = app.serialize(mark, 0, 0.2)
        answers = asyncio.run(_post(token, [f"http://127.0.0.1:{port}/_ah/queue/deferred" for port in ports], posts))
        app.close()
        account = cast.account()
        account.check(duplicates=False)
        if len(account.runs[0]) != 1 or answers["succeeded"] != 1 or sum(answers.values()) != posts:
            raise Failed(f"{len(account.runs[0])} runs, {dict(answers)}")
        return f"posts={posts} runs={len(account.runs[0])} answers={dict(sorted(answers.items()))}"


async def _post(token: bytes, urls: list[str], posts: int) -> Counter[str]:
    headers = {"Content-Type": "application/jose"}
    connector = aiohttp.TCPConnector(limit=200)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def post(number: int) -> str:
            async with session.post(urls[number % len(urls)], data=token, headers=headers) as response:
                return response.headers["Safedefer-Outcome"]

        return Counter(await asyncio.gather(*(post(number) for number in range(posts))))


def forks(*, children: int = 4, each: int = 250, store: str = "sqlite") -> str:
    """Producers and a handler with its dispatcher in forked children of one parent, which has the queue open."""
    with Cast(lease=10.0, store=store) as cast:
        app = cast.app()
        pids = []
        for child in range(children + 1):
            note("try", child)
            app.defer(mark, child)
            note("ack", child)
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    if child == children:
                        _handle_and_dispatch(app)
                    else:
                        _produce(app, 1000 * (child + 1), each)
                    code = 0
                finally:
                    os._exit(code)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids[:-1]]
        cast.drained()
        os.kill(pids[-1], 15)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pids[-1], 0)[1]))
        app.close()
        account = cast.account()
        account.check(duplicates=False)
        cast.check_store()
        if set(codes) != {0}:
            raise Failed(f"exit codes {codes}")
        return f"children={children + 1} exit_codes={sorted(set(codes))} {account.line()}"


def _produce(app: object, first: int, each: int) -> None:
    for number in range(first, first + each):
        note("try", number)
        app.defer(mark, number)  # type: ignore[attr-defined]
        note("ack", number)
    app.close()  # type: ignore[attr-defined]


def _handle_and_dispatch(app: object) -> None:
    import signal

    from safedefer.dispatcher.loop import Dispatcher, InProcessDelivery

    async def work() -> None:
        dispatcher = Dispatcher(app.queue, InProcessDelivery(app.handle), clock=time.time)  # type: ignore[attr-defined]
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, dispatcher.stop)
        await dispatcher.run()

    asyncio.run(work())
    app.close()  # type: ignore[attr-defined]


def rates(
    *,
    tasks: int = 300,
    rate: float = 60.0,
    bucket: int = 10,
    most: int = 3,
    dispatchers: int = 3,
    store: str = "sqlite",
) -> str:
    """One rate and one cap hold for several dispatcher processes together."""
    with Cast(lease=30.0, store=store) as cast:
        path = cast.folder / "queue.yaml"
        path.write_text(
            f"queue:\n- {{name: default, rate: {rate:g}/s, bucket_size: {bucket}, max_concurrent_requests: {most}}}\n"
        )
        cast.environment["SAFEDEFER_QUEUE_YAML"] = str(path)
        cast.handler()
        cast.ready()
        app = cast.app()
        for number in range(tasks):
            note("try", number)
            app.defer(mark, number, 0.03)
            note("ack", number)
        for _ in range(dispatchers):
            cast.dispatcher(concurrency=16)
        cast.drained()
        app.close()
        account = cast.account()
        account.check(duplicates=False)
        began = sorted(when for runs in account.runs.values() for when, _ in runs)
        ends = [when for runs in account.ends.values() for when, _ in runs]
        # In any stretch of time there are at most a bucket and what it gained, and one for the edge.
        excess = max(
            later - first + 1 - (bucket + rate * (began[later] - began[first]))
            for first in range(0, tasks, 5)
            for later in range(first, tasks)
        )
        changes = sorted([(when, 1) for when in began] + [(when, -1) for when in ends])
        at_once = highest = 0
        for _, change in changes:
            at_once += change
            highest = max(highest, at_once)
        if highest > most or excess > 0.1 * rate + 1:
            raise Failed(f"{highest} at once, {excess:.1f} above the rate")
        return (
            f"dispatchers={dispatchers} {account.line()} at_once={highest} (cap {most}) "
            f"measured={(tasks - bucket) / (began[-1] - began[0]):.1f}/s (rate {rate:g}/s) above_the_bucket={excess:.1f}"
        )
