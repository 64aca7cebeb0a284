"""Scenarios in which processes die, stop, or are told to stop."""

from __future__ import annotations

import contextlib
import random
import signal
import sqlite3
import time
from typing import Any

from tests.chaos.cast import Cast, Failed
from tests.chaos.tasks import die, mark

_ELSEWHERE = "was delivered elsewhere meanwhile"


def kills(
    *, seed: int = 1, tasks: int = 10_000, least: int = 15, per_second: float = 700.0, store: str = "sqlite"
) -> str:
    """SIGKILL over producer, dispatcher and handler."""
    rng = random.Random(seed)
    with Cast(lease=2.0, store=store) as cast:
        running = {"handler": cast.handler(), "dispatcher": cast.dispatcher()}
        cast.ready()
        running["producer"] = cast.producer(0, tasks, per_second)
        count, deadline = 0, time.monotonic() + 300
        spacing, stop = tasks / per_second / (least + 3), tasks
        while time.monotonic() < deadline:
            time.sleep(rng.uniform(0.3, 1.7) * spacing)
            if running["producer"].poll() == 0 and count >= least:
                break
            if (
                running["producer"].poll() == 0 and not cast.left()
            ):  # on a busy machine kills come late: there is more to do
                first, stop = stop, stop + tasks
                running["producer"] = cast.producer(first, stop, per_second)
            if count >= 3 * least:  # on a busy machine a producer would be killed for ever before it has begun
                continue
            name = rng.choice(("producer", "dispatcher", "handler"))
            if name == "producer" and running[name].poll() == 0:
                continue
            cast.kill(running[name])
            count += 1
            time.sleep(rng.choice((0.0, 0.0, 0.5)))
            if name == "producer":
                following = max(cast.account().attempted, default=-1) + 1
                running[name] = cast.producer(following, stop, per_second)
            else:
                running[name] = cast.handler() if name == "handler" else cast.dispatcher()
        cast.drained()
        account = cast.account()
        account.check()
        cast.check_store()
        return f"seed={seed} kills={count} {account.line()}"


def calm(*, tasks: int = 10_000, store: str = "sqlite") -> str:
    """No kills: nothing runs twice, and every attempt is the first."""
    with Cast(lease=60.0, store=store) as cast:
        cast.handler()
        cast.dispatcher()
        cast.ready()
        cast.producer(0, tasks).wait()
        cast.drained()
        account, attempts = cast.account(), cast.attempts()
        account.check(duplicates=False)
        cast.check_store()
        if attempts != {1: tasks} or len(account.ok) != tasks:
            raise Failed(f"attempts {dict(attempts)}")
        return f"{account.line()} attempts={dict(attempts)}"


def down(*, tasks: int = 500, seconds: float = 30.0, store: str = "sqlite") -> str:
    """A handler that is down charges no attempt."""
    with Cast(lease=60.0, store=store) as cast:
        cast.dispatcher()
        cast.producer(0, tasks).wait()
        cast.until(lambda: cast.store.charged()[1], 120, "nothing is delivered")
        time.sleep(seconds)
        charged = cast.store.charged()
        cast.handler()
        cast.drained()
        account, attempts = cast.account(), cast.attempts()
        account.check(duplicates=False)
        if charged[0] != 0 or not charged[1] or attempts != {1: tasks}:
            raise Failed(f"charged while down: {charged}; in the end {dict(attempts)}")
        return f"{account.line()} charged_while_down={charged[0]} deliveries_while_down={charged[1]}"


def stopped(*, tasks: int = 200, lease: float = 2.0, store: str = "sqlite") -> str:
    """A dispatcher that was stopped for two leases settles nothing of what others have by then."""
    # The lease is that of deliveries; the handler's runs have a long one, or a busy machine would run tasks twice.
    with Cast(lease=lease, store=store, SAFEDEFER_LEASE_SECONDS="60") as cast:
        cast.handler()
        cast.ready()
        app, stale, made, held = cast.app(), cast.dispatcher(), 0, 0
        while not held:  # on a busy machine all may be done before it is stopped
            stale.send_signal(signal.SIGCONT)
            for number in range(made, made + tasks):
                defer(app, number, 0.1)
            done, made = len(cast.account().ok), made + tasks
            cast.until(lambda done=done: len(cast.account().ok) > done, 120, "nothing runs")
            stop_between_transactions(cast, stale)
            held = cast.store.held()
        cast.dispatcher()
        time.sleep(2 * lease)
        cast.until(lambda: not cast.left(), 120, "the other dispatcher does not take over")
        before = cast.store.everything()
        stale.send_signal(signal.SIGCONT)
        cast.until(lambda: _ELSEWHERE in cast.output(), 120, "the stale dispatcher had nothing to settle")
        stale.terminate()
        app.close()
        code, after = stale.wait(), cast.store.everything()
        account, attempts = cast.account(), cast.attempts()
        account.check(duplicates=False)
        if code or before != after:
            raise Failed(f"exit {code}; the stale dispatcher changed {len(before ^ after)} rows")
        if sum(attempts.values()) != made or set(attempts) - {1, 2}:
            raise Failed(f"attempts {dict(attempts)}, held {held}")
        lost = cast.output().count(_ELSEWHERE)
        return f"{account.line()} held_when_stopped={held} stale_settles={lost} rows_changed=0"


def stop_between_transactions(cast: Cast, process: Any) -> None:
    """Stop a process that does not hold the lock of SQLite's file: while it did, nobody could write, by SQLite's design."""
    for attempt in range(200):
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.05)  # the other ones end what they write
        if any(cast.store.is_free() or time.sleep(0.02) for _ in range(50)):
            return
        process.send_signal(signal.SIGCONT)
        # Longer and longer: where the disk is slow, each short while ends in the next transaction.
        time.sleep(0.01 * (1 + attempt % 50))
    raise Failed("it holds the lock all the time")


def defer(app: object, number: int, pause: float = 0.0) -> None:
    """Defer one task, as a producer does."""
    from tests.chaos.tasks import note

    note("try", number)
    app.defer(mark, number, pause)  # type: ignore[attr-defined]
    note("ack", number)


def terms(*, times: int = 50, seed: int = 1, store: str = "sqlite") -> str:
    """SIGTERM at random: exit 0, nothing runs twice, nothing stays claimed."""
    rng = random.Random(seed)
    with Cast(lease=30.0, store=store) as cast:
        cast.handler()
        cast.ready()
        app, number, claimed = cast.app(), 0, 0
        for _ in range(times):
            for _ in range(60):
                defer(app, number, rng.choice((0.0, 0.02)))
                number += 1
            dispatcher = cast.dispatcher()
            began = len(cast.account().runs)
            cast.until(lambda began=began: len(cast.account().runs) > began, 120, "nothing runs")
            time.sleep(rng.uniform(0.0, 0.25))
            dispatcher.terminate()
            if dispatcher.wait(120) != 0:
                raise Failed(f"exit {dispatcher.returncode}: {cast.output()[-500:]}")
            claimed += cast.store.held()
        cast.dispatcher()
        cast.drained()
        app.close()
        account, attempts = cast.account(), cast.attempts()
        account.check(duplicates=False)
        if claimed or attempts != {1: number}:
            raise Failed(f"claimed after the end: {claimed}; attempts {dict(attempts)}")
        return f"sigterms={times} {account.line()} claimed_after={claimed}"


def exits(*, dying: int = 3, neighbours: int = 300, lease: float = 2.0, store: str = "sqlite") -> str:
    """A task whose process dies every time it runs becomes a dead letter at its limit; its neighbours run on."""
    from safedefer import TaskRetryOptions

    with Cast(lease=lease, store=store) as cast:
        app = cast.app()
        for number in range(neighbours):
            defer(app, number)
            if number % (neighbours // dying) == 0:
                options = TaskRetryOptions(task_retry_limit=2, min_backoff_seconds=0.1)
                app.options(retry_options=options).defer(die, -1 - number)
        cast.dispatcher(concurrency=2)
        handler, deaths, deadline = cast.handler(), 0, time.monotonic() + 240
        while cast.left():
            if handler.poll() is not None:
                cast.kills[handler.pid] = time.clock_gettime(time.CLOCK_MONOTONIC)
                deaths += 1
                handler = cast.handler()
            if time.monotonic() > deadline:
                raise Failed(f"tasks are left; {cast.output()[-1500:]}")
            time.sleep(0.05)
        app.close()
        account = cast.account()
        died = {number: runs for number, runs in account.runs.items() if number < 0}
        for number in died:
            del account.runs[number]
        account.check()
        dead = cast.store.dead("die")
        if (
            len(dead) != dying
            or {attempts for _, attempts in dead} != {3}
            or {len(r) for r in died.values()} - {1, 2, 3}
        ):
            raise Failed(f"dead letters {dead}, runs {died}")
        return f"{account.line()} process_deaths={deaths} dead_letters={len(dead)} of {sorted(set(dead))}"


def orders(*, orders: int = 3_000, least: int = 15, seed: int = 1, spacing: float = 0.5, store: str = "sqlite") -> str:
    """SIGKILL over a producer of transactional tasks: a task runs if, and only if, its order is in the database."""
    rng = random.Random(seed)
    # No handler is killed: its runs have a long lease, or a busy machine would run tasks twice.
    with Cast(lease=2.0, store=store, SAFEDEFER_LEASE_SECONDS="60") as cast:
        database = cast.folder / "shop.db"
        cast.environment["SAFEDEFER_OUTBOXES"] = f"sqlite:///{database}"
        cast.handler()
        cast.ready()
        running = {"dispatcher": cast.dispatcher()}
        arguments = ("tests.chaos.orders", str(database))
        running["producer"] = cast.start(*arguments, "0", str(orders))
        count = 0
        while running["producer"].poll() is None:
            time.sleep(rng.uniform(0.3, 1.7) * spacing)
            name = "dispatcher" if rng.random() < 0.2 else "producer"
            if count >= least or running["producer"].poll() is not None:
                continue
            cast.kill(running[name])
            count += 1
            if name == "dispatcher":
                running[name] = cast.dispatcher()
            else:
                following = max(cast.account().attempted, default=-1) + 1
                running[name] = cast.start(*arguments, str(following), str(orders))
        if running["producer"].wait():
            raise Failed(f"the producer failed: {cast.output()[-1500:]}")

        def committed() -> set[int]:
            with contextlib.closing(sqlite3.connect(database, timeout=30.0)) as connection:
                return {number for (number,) in connection.execute("SELECT id FROM orders")}

        cast.until(lambda: not cast.left() and len(cast.account().ok) >= len(committed()), 200, "tasks are missing")
        account, wanted = cast.account(), committed()
        account.check()
        cast.check_store()
        missing, unwanted = wanted - account.ok, set(account.runs) - wanted
        if missing or unwanted:
            raise Failed(f"missing {sorted(missing)[:5]}, unwanted {sorted(unwanted)[:5]}")
        undone = len(account.attempted - wanted)
        return f"kills={count} tried={len(account.attempted)} committed={len(wanted)} undone={undone} ran={len(account.ok)} missing=0 unwanted=0"
