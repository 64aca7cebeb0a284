"""The processes of a scenario, their common log, and the accounting."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from safedefer import App
from tests.chaos.stores import Store, make_store
from tests.ports import ReservedPort

KEYS = "chaos:" + "Zm9yIHRoZSBjaGFvcyBzY2VuYXJpb3Mgb25seSE" + "hISE"
ROOT = Path(__file__).absolute().parents[2]


class Failed(AssertionError):
    """A scenario found what must not be."""


@dataclass
class Account:
    """Who tried, who was told yes, what ran; as in Jepsen's total-queue."""

    attempted: set[int] = field(default_factory=set)
    acknowledged: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    """Told something else than yes, or that the queue is unavailable."""
    runs: dict[int, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    ends: dict[int, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    early: float = -1e9
    acknowledgements: list[float] = field(default_factory=list)
    refused: int = 0
    """How often the queue was unavailable."""
    kills: dict[int, float] = field(default_factory=dict)
    stops: list[tuple[int, float]] = field(default_factory=list)
    """Which processes were stopped, and went on later, and when: what they ran was taken for lost."""
    over: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """When runs were cancelled at their deadlines."""
    outages: list[tuple[float, float]] = field(default_factory=list)
    """When nothing could be written down: how a run ended, or that it still went on."""

    @property
    def ok(self) -> set[int]:
        return {number for number, ends in self.ends.items() if ends}

    @property
    def lost(self) -> set[int]:
        return self.acknowledged - self.ok

    @property
    def unexpected(self) -> set[int]:
        return set(self.runs) - self.attempted

    @property
    def recovered(self) -> set[int]:
        return self.ok - self.acknowledged

    @property
    def duplicated(self) -> set[int]:
        return {number for number, runs in self.runs.items() if len(runs) > 1}

    @property
    def unexplained(self) -> set[int]:
        """Those that ran again although the process that ran them before was not killed, nor the storage gone, meanwhile."""
        return {number for number in self.duplicated if not self._explanations(number)}

    @property
    def explanations(self) -> dict[str, int]:
        """How many of the duplicated have which explanation."""
        found = Counter(name for number in self.duplicated for name in self._explanations(number))
        return dict(sorted(found.items()))

    def _explanations(self, number: int) -> set[str]:
        found = set()
        for (began, pid), (again, _) in pairwise(sorted(self.runs[number])):
            if began <= self.kills.get(pid, -1.0) <= again:
                found.add("killed")
            elif any(began <= when <= again for stopped, when in self.stops if stopped == pid):
                found.add("stopped")
            elif any(began <= when <= again for when in self.over.get(number, ())):
                found.add("deadline")
            elif any(began <= until and since <= again for since, until in self.outages):
                found.add("outage")
            else:
                return set()
        return found

    def line(self) -> str:
        return (
            f"attempted={len(self.attempted)} acknowledged={len(self.acknowledged)} ok={len(self.ok)} "
            f"lost={len(self.lost)} unexpected={len(self.unexpected)} duplicated={len(self.duplicated)} "
            f"unexplained={len(self.unexplained)} recovered={len(self.recovered)}"
        )

    def check(self, *, duplicates: bool = True, explained: bool = True) -> None:
        """Fail if something was lost or came from nowhere, ran twice unexplained, or ran twice at all."""
        unexplained = self.unexplained if explained else ()
        if self.lost or self.unexpected or self.failed or unexplained or (self.duplicated and not duplicates):
            raise Failed(
                f"{self.line()} failed={sorted(self.failed)[:5]} lost={sorted(self.lost)[:5]} unexpected={sorted(self.unexpected)[:5]} "
                f"unexplained={[self._story(number) for number in sorted(self.unexplained)[:5]]}"
            )

    def _story(self, number: int) -> str:
        """Tell what is known of a task: its runs, its ends, and what became of their processes."""
        runs, ends = sorted(self.runs[number]), sorted(self.ends.get(number, ()))
        gone = {pid: self.kills[pid] for _, pid in runs if pid in self.kills}
        stopped = [stop for stop in self.stops if stop[0] in {pid for _, pid in runs}]
        return f"{number}: runs {runs}, ends {ends}, gone {gone}, stopped {stopped}"


class Cast:
    """A folder with a queue, and the processes around it. A context manager: at its end all are gone."""

    def __init__(
        self, *, lease: float = 2.0, folder: Path | None = None, store: str | Store = "sqlite", **settings: str
    ) -> None:
        self._temporary = TemporaryDirectory(prefix="safedefer-chaos-")
        self.folder = Path(self._temporary.name)
        self.store = make_store(store, folder or self.folder) if isinstance(store, str) else store
        self.lease = lease
        self._ports: list[ReservedPort] = []
        self.port = self.new_port()
        self.environment = {
            **os.environ,
            "CHAOS_LOG": str(self.folder / "log"),
            "SAFEDEFER_KEYS": KEYS,
            "SAFEDEFER_POLICY": "tests.chaos.tasks",
            "SAFEDEFER_QUEUE": self.store.url,
            "SAFEDEFER_LEASE_SECONDS": str(lease),
            **settings,
        }
        self.kills: dict[int, float] = {}
        self.stops: list[tuple[int, float]] = []
        self.outages: list[tuple[float, float]] = []
        self._all: list[subprocess.Popen[bytes]] = []
        (self.folder / "log").touch()

    def __enter__(self) -> Cast:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._all:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
        for port in self._ports:
            port.close()
        self.store.close()
        if exception[0] is not None and os.environ.get("CHAOS_KEEP"):
            print("kept:", subprocess.run(["cp", "-r", self.folder, f"{gettempdir()}/chaos-kept"], check=False))
        self._temporary.cleanup()

    # --- Processes ---

    def new_port(self) -> int:
        """Return a port for a handler, and for the next one that takes its place: nobody else is given it meanwhile."""
        self._ports.append(ReservedPort())
        return self._ports[-1].number

    def start(self, *arguments: str, file_limit: int | None = None) -> subprocess.Popen[bytes]:
        def limit() -> None:
            if file_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))

        with (self.folder / "output").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", *arguments],
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=output,
                preexec_fn=limit if file_limit else None,  # noqa: PLW1509 - nothing else runs here yet
            )
        self._all.append(process)
        return process

    def handler(self, *, port: int | None = None, wrapped: tuple[str, ...] = ("safedefer",), **more: Any) -> Any:
        return self.start(*wrapped, "serve", "--port", str(port or self.port), **more)

    def dispatcher(
        self,
        *,
        port: int | None = None,
        wrapped: tuple[str, ...] = ("safedefer",),
        concurrency: int = 8,
        **more: Any,
    ) -> Any:
        to = f"http://127.0.0.1:{port or self.port}"
        return self.start(
            *wrapped, "dispatch", "--to", to, "--lease", str(self.lease), "--concurrency", str(concurrency), **more
        )

    def supervised(self, *options: str) -> Any:
        """Start ``run``: a supervisor with worker processes that are handler and dispatcher."""
        return self.start("safedefer", "run", "--port", "0", "--lease", str(self.lease), *options)

    def producer(self, first: int, stop: int, per_second: float = 1e9, *options: str, **more: Any) -> Any:
        return self.start("tests.chaos.producer", str(first), str(stop), str(per_second), *options, **more)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        self.kills[process.pid] = time.clock_gettime(time.CLOCK_MONOTONIC)

    def app(self) -> App:
        """An App of this process, on the same queue."""
        from safedefer import Keyring, Policy

        os.environ["CHAOS_LOG"] = self.environment["CHAOS_LOG"]
        return App(
            keyring=Keyring.from_text(KEYS),
            policy=Policy("tests.chaos.tasks"),
            queue=self.store.url,
            lease_seconds=self.lease,
        )

    def ready(self, port: int | None = None, seconds: float = 120.0) -> None:
        """Wait for a handler."""
        self.until(lambda: _listens(port or self.port), seconds, "no handler listens")

    # --- Looking ---

    def until(self, condition: Any, seconds: float, complaint: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise Failed(f"{complaint}; {self.account().line()}; {self.output()[-1500:]}")
            time.sleep(0.1)

    def left(self) -> int:
        """How many tasks wait or run."""
        return self.store.left()

    def drained(self, seconds: float = 240.0) -> None:
        self.until(lambda: self.left() == 0, seconds, "tasks are left")

    def account(self) -> Account:
        account = Account(kills=dict(self.kills), stops=list(self.stops), outages=list(self.outages))
        for line in (self.folder / "log").read_text().splitlines():
            kind, number, *rest, pid, when = line.split()
            if kind == "try":
                account.attempted.add(int(number))
            elif kind == "ack":
                account.acknowledged.add(int(number))
                account.acknowledgements.append(float(when))
            elif kind == "refused":
                account.refused += 1
            elif kind == "failed":
                account.failed.add(int(number))
            elif kind == "run":
                account.runs[int(number)].append((float(when), int(pid)))
            elif kind == "end":
                account.ends[int(number)].append((float(when), int(pid)))
            elif kind == "over":
                account.over[int(number)].append(float(when))
            elif kind == "early":
                account.early = max(account.early, float(rest[0]))
        return account

    def attempts(self) -> Counter[int]:
        """How many tasks ended with how many charged attempts."""
        return self.store.attempts()

    def output(self) -> str:
        return (self.folder / "output").read_text(errors="replace")

    def check_store(self) -> None:
        """Nothing is left over in the storage, and nothing contradicts itself."""
        if wrong := self.store.wrong():
            raise Failed("; ".join(wrong))


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0
