"""``safedefer demo``: the main job on real input, with a summary that says whether everything held."""

from __future__ import annotations

import ast
import asyncio
import importlib
import operator
import secrets
import shutil
import sqlite3
import statistics
import sys
import sysconfig
import tempfile
import time
import tokenize
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import click

from safedefer.app import App, CallTuple
from safedefer.demo import tasks
from safedefer.demo.attacks import Attack, attack
from safedefer.demo.processes import LEASE, Processes
from safedefer.keys import Keyring
from safedefer.options import Task
from safedefer.policy import Policy
from safedefer.queues.base import TaskState, TaskView
from safedefer.token import encode_segment

#: What the demonstration's handler may run: exactly these, nothing else.
POLICY: Final = (
    "safedefer.demo.tasks:by_function",
    "safedefer.demo.tasks:by_coroutine",
    "safedefer.demo.tasks:Examiner",
    "safedefer.demo.tasks:ping",
    "safedefer.demo.tasks:nothing",
    "operator:call",
)
_PATIENCE: Final = 120.0
_PINGS: Final = 30
#: Tasks that do nothing, by which the queue itself is measured.
_EMPTY: Final = 500


@dataclass
class _Run:
    """The deferred tasks, and their outcomes."""

    deferred: list[Task] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)
    """The file of each task, by the task's id."""
    defer_seconds: float = 0.0
    work_seconds: float = 0.0
    empty_seconds: float = 0.0
    """What ``_EMPTY`` tasks that do nothing took, from the first ``defer()`` to the last end."""
    latencies: list[float] = field(default_factory=list)
    dead: list[TaskView] = field(default_factory=list)
    attacks: list[Attack] = field(default_factory=list)


def sources() -> list[str]:
    """Return the paths of all ``.py`` files of Python's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    return sorted(str(path) for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))


def calls_for(paths: list[str], database: str) -> list[CallTuple]:
    """Return one call for each file, the kinds of callables in turn."""
    examiner = tasks.Examiner(database, "method")
    forms: list[Callable[[str], CallTuple]] = [
        lambda path: (tasks.by_function, (path, database), {}),
        lambda path: (tasks.by_coroutine, (path,), {"database": database}),
        lambda path: (tasks.Examiner.for_database, (database, path), {}),
        lambda path: (examiner.run, (path,), {}),
        lambda path: (operator.call, (tasks.by_function, path, database), {"kind": "built-in"}),
    ]
    return [forms[number % len(forms)](path) for number, path in enumerate(paths)]


def run_demo(*, limit: int | None, keep: bool, kill: bool = False, port: int | None = None) -> int:
    """Run the demonstration; return 0 only if everything held.

    Args:
        limit: At most this many files.
        keep: Whether the temporary folder stays.
        kill: Whether both processes are killed in the middle of the work.
        port: Serve the dashboard there when the work is done, until Ctrl-C; 0 takes a free one, None serves none.

    Raises:
        MissingExtra: The dashboard is not installed.
    """
    if port is not None:
        importlib.import_module("safedefer.dashboard.standalone")  # says now, and not after the work, what is missing
    folder = Path(tempfile.mkdtemp(prefix="safedefer-demo-"))
    try:
        return _demo(folder, limit, kill, port)
    finally:
        if keep:
            click.echo(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _demo(folder: Path, limit: int | None, kill: bool, port: int | None) -> int:
    database = str(folder / "results.db")
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(tasks.SCHEMA)
    keys = f"demo:{encode_segment(secrets.token_bytes(32)).decode()}"
    settings = {
        "SAFEDEFER_KEYS": keys,
        "SAFEDEFER_POLICY": ",".join(POLICY),
        "SAFEDEFER_QUEUE": f"sqlite:///{folder / 'queue.db'}",
        "SAFEDEFER_ENVIRONMENT": "demo",
        "SAFEDEFER_LEASE_SECONDS": LEASE,
    }
    keyring = Keyring.from_text(keys)
    app = App(
        keyring=keyring,
        policy=Policy(*POLICY),
        queue=settings["SAFEDEFER_QUEUE"],
        environment="demo",
        lease_seconds=float(LEASE),
    )
    click.echo(f"folder      {folder}")
    processes = Processes(folder, settings, click.echo)
    try:
        click.echo(f"handler     {processes.url}, a process of its own; the dispatcher is another")
        run = _work(app, processes, database, limit, kill)
        genuine = run.deferred[0].payload
        run.attacks = attack(processes.url, keyring, genuine, folder, lambda: _count(database))
        held = _report(run, database)
        if port is not None:
            _serve(app, port)
    finally:
        stopped_well = processes.stop()
        app.close()
    if not stopped_well:
        click.echo(f"a process did not end well:\n{processes.log('handler')}{processes.log('dispatcher')}")
    click.echo("everything held" if held and stopped_well else "NOT everything held")
    return 0 if held and stopped_well else 1


def _serve(app: App, port: int) -> None:
    """Keep handler, dispatcher and dashboard up until Ctrl-C."""
    from safedefer.dashboard.access import Access  # noqa: PLC0415  # of the extra `dashboard`
    from safedefer.dashboard.standalone import serve_dashboard  # noqa: PLC0415

    click.echo("\nup until Ctrl-C: handler, dispatcher, and the queue as it is now in a browser")
    asyncio.run(serve_dashboard(app, "127.0.0.1", port, Access(user="demo", read=True, act=True), click.echo))


def _work(app: App, processes: Processes, database: str, limit: int | None, kill: bool) -> _Run:
    run = _Run()
    paths = sources()[:limit]
    started = time.perf_counter()
    for path, (function, args, kwargs) in zip(paths, calls_for(paths, database), strict=True):
        task = app.defer(function, *args, **kwargs)
        run.deferred.append(task)
        run.paths[task.id] = path
        if len(run.deferred) % 50 == 0:
            processes.tend()
    run.defer_seconds = time.perf_counter() - started
    click.echo(f"deferred    {len(paths)} tasks, one for each file of the standard library")
    if limit is None:
        click.echo("            (a few files of Python's own tests are wrong on purpose: their tasks are to fail)")
    _watch(app, processes, len(paths), kill)
    run.work_seconds = time.perf_counter() - started
    started = time.perf_counter()
    app.defer_many([(tasks.nothing, (), {})] * _EMPTY)
    _watch(app, processes, _EMPTY, kill=False, label="the queue")
    run.empty_seconds = time.perf_counter() - started
    for number in range(_PINGS):
        run.latencies.append(_ping(app, database, f"ping {number}"))
    dead = app.queue.tasks(states=[TaskState.DEAD], limit=len(paths))
    run.dead = [found for view in dead if (found := app.queue.find(view.id)) is not None]
    return run


def _watch(app: App, processes: Processes, total: int, kill: bool, label: str = "working") -> None:
    """Show progress until no task waits or runs."""
    shown, moved = 0, time.monotonic()
    with click.progressbar(length=total, label=f"{label:<11}", show_pos=True, file=sys.stderr) as bar:
        while True:
            left = sum(stats.waiting + stats.running for stats in app.queue.stats(now=time.time()))
            if total - left > shown:
                bar.update(total - left - shown)
                shown, moved = total - left, time.monotonic()
            if not left:
                return
            if time.monotonic() - moved > _PATIENCE:
                raise click.ClickException(f"nothing moved for {_PATIENCE:.0f} s; {processes.log('dispatcher')}")
            if kill and shown > total // 3:
                processes.kill()
                kill = False
            processes.tend()
            time.sleep(0.1)


def _ping(app: App, database: str, name: str) -> float:
    """Return the seconds from ``defer()`` until the task has run, in an idle system."""
    before = time.time()
    app.defer(tasks.ping, database, name)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        rows = _query(database, "SELECT stored FROM findings WHERE path = ?", name)
        if rows:
            return float(str(rows[0][0])) - before
        time.sleep(0.002)
    raise click.ClickException("a task that was deferred in an idle system did not run")


def _query(database: str, sql: str, *values: object) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        return connection.execute(sql, values).fetchall()


def _count(database: str) -> int:
    return int(str(_query(database, "SELECT count(*) FROM findings")[0][0]))


# --- The summary ----------------------------------------------------------------------------------


def _report(run: _Run, database: str) -> bool:
    """Say what came of the work and of the attacks; return whether it is what should."""
    total = len(run.deferred)
    rows = _query(
        database, "SELECT kind, count(*), sum(lines) FROM findings WHERE kind != 'ping' GROUP BY kind ORDER BY kind"
    )
    click.echo(f"\n{'kind':<14}{'files':>7}{'lines':>11}")
    for kind, files, lines in rows:
        click.echo(f"{kind!s:<14}{files!s:>7}{lines!s:>11}")
    done = {str(row[0]) for row in _query(database, "SELECT DISTINCT path FROM findings WHERE kind != 'ping'")}
    failed = {run.paths[view.id]: view for view in run.dead if view.id in run.paths}
    lost = set(run.paths.values()) - done - set(failed)
    click.echo(f"\ntasks       {total} deferred, {len(done)} succeeded, {len(failed)} failed, {len(lost)} lost")
    again = _count(database) - len(run.latencies) - len(done)
    if again:
        click.echo(f"            {again} ran once more: a process ended before it could say that they had run")
    surprises = _explain(failed)
    _say_times(run, database)
    click.echo("\nattacks on the handler, over HTTP")
    for each in run.attacks:
        click.echo(f"  {'refused' if each.held else 'NOT REFUSED'}: {each.tried}\n           -> {each.came}")
    return not lost and not surprises and all(each.held for each in run.attacks) and bool(done)


def _say_times(run: _Run, database: str) -> None:
    total, latency = len(run.deferred), sorted(run.latencies)
    parsing = float(str(_query(database, "SELECT coalesce(sum(seconds), 0) FROM findings")[0][0]))
    click.echo(
        f"time        {run.work_seconds:.1f} s for all, {parsing:.1f} s of it parsing (processor time); "
        f"defer() took {1e6 * run.defer_seconds / total:.0f} us each"
    )
    click.echo(
        f"queue       {_EMPTY / run.empty_seconds:.0f} tasks/s that do nothing, over HTTP, signed and in a ledger"
    )
    click.echo(
        f"latency     {1e3 * statistics.median(latency):.1f} ms from defer() to run in an idle system, "
        f"{1e3 * latency[int(0.9 * len(latency))]:.1f} ms at the 90th percentile"
    )


def _explain(failed: dict[str, TaskView]) -> list[str]:
    """Say why tasks failed; return those that should not have: files that do parse."""
    surprises = []
    if failed:
        click.echo("            files that this Python cannot parse, and is not meant to:")
    for path, view in sorted(failed.items()):
        record = view.records[-1] if view.records else None
        why = "no record" if record is None or record.traceback is None else _last_line(record.traceback)
        expected = not _parses(path)
        surprises += [] if expected else [path]
        click.echo(f"            - {Path(path).name}: {why}{'' if expected else ' (UNEXPECTED)'}")
    return surprises


def _last_line(traceback: str) -> str:
    return traceback.strip().splitlines()[-1].removeprefix("safedefer.errors.")


def _parses(path: str) -> bool:
    try:
        with warnings.catch_warnings(), tokenize.open(path) as file:
            warnings.simplefilter("ignore")
            ast.parse(file.read(), path)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
