"""Scenarios of ``run --processes``: a supervisor, its workers, and tasks that pass their deadlines."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

from tests.chaos.cast import Cast, Failed

#: Seconds between two looks at the processes.
_LOOK = 0.02
#: Tasks that are added where all are done before there were kills enough.
_MORE = 500
#: A supervisor replaces a worker that stands for so long, in seconds.
_HANG = 2.0
#: A worker that a busy machine lets stand is ended before what it ran is leased again, and so explains the second run.
_LEASE = 2 * _HANG


def workers_of(supervisor: Any) -> list[int]:
    """Return the ids of a supervisor's worker processes."""
    try:
        return [int(pid) for pid in Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()]
    except OSError:
        return []


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):  # it vanished, or vanishes
        return True


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):  # it vanished
        return False


class Watch:
    """Notes when worker processes ended, whoever ended them: killed here, replaced by the supervisor, or by themselves."""

    def __init__(self, cast: Cast) -> None:
        self.supervisor: Any = None
        self.seen: set[int] = set()
        self._cast = cast
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        for pid in self.seen:  # what outlived its supervisor
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _look(self) -> None:
        while not self._stop.wait(_LOOK):
            if self.supervisor is not None:
                self.seen.update(workers_of(self.supervisor))
            for pid in self.seen - self._cast.kills.keys():
                if _is_gone(pid):
                    self._cast.kills[pid] = time.clock_gettime(time.CLOCK_MONOTONIC)


def kills(
    *, seed: int = 1, tasks: int = 10_000, least: int = 15, per_second: float = 700.0, store: str = "sqlite"
) -> str:
    """SIGKILL and SIGSTOP over workers, SIGKILL over their supervisor and the producer, while tasks pass their deadlines."""
    rng = random.Random(seed)
    every = ("--overrun-every", "100", "--outlast-every", "500")
    options = ("--processes", "2", "--hang-seconds", str(_HANG))
    with Cast(lease=_LEASE, store=store) as cast, Watch(cast) as watch:
        watch.supervisor = cast.supervised(*options)
        cast.until(lambda: workers_of(watch.supervisor), 30, "no worker starts")
        producer = cast.producer(0, tasks, per_second, *every)
        count, deadline = 0, time.monotonic() + 300
        spacing = tasks / per_second / (least + 3)
        while time.monotonic() < deadline:
            time.sleep(rng.uniform(0.3, 1.7) * spacing)
            if producer.poll() == 0 and count >= least and cast.account().over:
                break
            if producer.poll() == 0 and not cast.left():  # more tasks, until kills and deadlines were enough
                first, tasks = tasks, tasks + _MORE
                producer = cast.producer(first, tasks, per_second, *every)
            if count >= 3 * least:
                continue
            what = rng.choice(("worker", "worker", "worker", "stop", "supervisor", "producer"))
            alive = [pid for pid in workers_of(watch.supervisor) if not _is_gone(pid)]
            if (what == "producer" and producer.poll() == 0) or (what in {"worker", "stop"} and not alive):
                continue
            count += 1
            done = len(cast.account().ok)
            if what == "producer":
                cast.kill(producer)
                following = max(cast.account().attempted, default=-1) + 1
                producer = cast.producer(following, tasks, per_second, *every)
            elif what == "supervisor":
                cast.kill(watch.supervisor)
                for pid in alive:  # nobody else would let one go on that was stopped
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
                    if pid in cast.kills:  # it lives, and its end is still to come
                        cast.stops.append((pid, cast.kills.pop(pid)))
                watch.supervisor = cast.supervised(*options)
            else:
                pid = rng.choice(alive)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if what == "worker" else signal.SIGSTOP)
                until = time.monotonic() + 1  # its threads take a moment to notice
                while not (_is_gone(pid) or _is_stopped(pid)) and time.monotonic() < until:
                    time.sleep(0.001)
                # One that was stopped runs nothing more: its leases lapse before the supervisor ends it.
                cast.kills.setdefault(pid, time.clock_gettime(time.CLOCK_MONOTONIC))
            # On a busy machine workers would be killed for ever before they have begun.
            with contextlib.suppress(Failed):
                cast.until(lambda done=done: len(cast.account().ok) > done, 20, "nothing runs")
        if count < least:
            raise Failed(f"only {count} kills in time")
        cast.drained()
        account = cast.account()
        account.check()
        cast.check_store()
        if not account.over:
            raise Failed("no task passed its deadline: the scenario shows nothing")
        return (
            f"seed={seed} kills={count} workers={len(watch.seen)} deadlines={sum(map(len, account.over.values()))} "
            f"{account.line()} {account.explanations}"
        )
