"""``safedefer doctor``: checks keys, policy, queue, clock, environment and limits, and says what to do about what is wrong.

A check is a function of the App that returns its findings; what it raises is an error of its own. New ones are added to
``CHECKS``. Nothing is changed or made, but a notice that is taken back at once: only a write shows whether one succeeds.
"""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from typing import Final, Literal

import click

from safedefer.app import App
from safedefer.cli.common import NO_ENVIRONMENT, app_option, is_of_settings, load_app, missing_file
from safedefer.cli.findings import Check, Finding
from safedefer.cli.options import TEXT
from safedefer.cli.surroundings import check_pgqueuer, check_settings, check_target, check_users, check_writes
from safedefer.cli.terminal import Column, show_table
from safedefer.cli.text import many, plain
from safedefer.errors import Error
from safedefer.execution.deadline import DEFAULT_DEADLINE
from safedefer.keys import KeyState
from safedefer.queues.addresses import redacted, split_urls
from safedefer.queues.file_owner import trouble_with_folders

#: Seconds between two clocks: as much as a token's times are allowed (``claims``).
_CLOCK_LEEWAY: Final = 10.0
#: Bodies of the largest size that should be read at once.
_BODIES: Final = 4
#: A reset of the write-ahead log could lose commits from 3.7.0 on, until this release.
_FIXED_SQLITE: Final = (3, 51, 3)

_COLUMNS: Final = Column("STATUS", whole=True), Column("CHECK", whole=True), Column("FOUND, AND WHAT TO DO")


@click.command()
@app_option
@click.option(
    "--to",
    "addresses",
    multiple=True,
    type=TEXT,
    metavar="URL",
    help="Ask the handler at this address too; repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def doctor(*, app: str | None, addresses: Sequence[str], as_json: bool) -> None:
    """Check keys, policy, queue, clock, environment and limits. Exit status 1 if something is wrong."""
    findings = [*examine(app, addresses)]
    counted = Counter(finding.status for finding in findings)
    totals = (
        f"{many(len(findings), 'check')}: {counted['ok']} ok, {counted['warn']} to look at, {counted['error']} wrong"
    )
    rows = [(finding.status, finding.name, finding.text) for finding in findings]
    if as_json or not show_table(_COLUMNS, rows, totals):
        for finding in findings:
            if as_json:
                click.echo(json.dumps(asdict(finding)))
            else:
                click.echo(f"{finding.status:5}  {plain(finding.name)}: {plain(finding.text)}")
    if counted["error"]:
        sys.exit(1)


def examine(spec: str | None, addresses: Sequence[str] = ()) -> Iterator[Finding]:
    """Make the App and run every check; without an App, say why there is none. ``addresses`` are those of handlers."""
    loaded: list[App] = []
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = []
    if spec is None and is_of_settings():
        checks += [("keys", _keys_of_settings), ("policy", _policy_of_settings)]
    failed = False
    for name, check in checks:
        for finding in _guarded(name, check):
            failed = failed or finding.status == "error"
            if finding.status != "ok":
                yield finding
    if failed:
        yield Finding("application", "error", "not made; correct what is said above, and run this again")
        return

    def load() -> Iterable[Finding]:
        loaded.append(load_app(spec))
        _urls[:] = [url for url in (loaded[0]._queue,) if isinstance(url, str)]  # noqa: SLF001  # it has passwords
        return ()

    yield from _guarded("application", load)
    for app in loaded:
        try:
            for each in CHECKS:
                yield from _guarded(each.__name__.removeprefix("check_"), partial(each, app))
            for address in addresses:
                yield from _guarded("target", partial(check_target, app, address))
        finally:
            app.close()


def _guarded(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    try:
        found = list(check())
    except Error as error:
        found = [Finding(name, "error", str(error))]
    except Exception as error:  # noqa: BLE001  # a module of the user's, or a driver
        found = [Finding(name, "error", f"{type(error).__name__}: {error}; correct that, and run this again")]
    return [Finding(each.name, each.status, _without_passwords(each.text)) for each in found]


_urls: Final[list[str]] = []
"""The queue's URL of an App that was not made of the environment."""


def _without_passwords(text: str) -> str:
    urls = [*_urls, os.environ.get("SAFEDEFER_QUEUE", ""), *split_urls(os.environ.get("SAFEDEFER_OUTBOXES", ""))]
    for url in urls:
        text = redacted(text, url)
    return text


def _keys_of_settings() -> Iterable[Finding]:
    from safedefer.settings import Settings  # noqa: PLC0415  # an App that is made in code needs no settings library

    settings = Settings.load()
    settings.keyring()
    return ()


def _policy_of_settings() -> Iterable[Finding]:
    from safedefer.settings import Settings  # noqa: PLC0415  # as above

    Settings.load().load_policy()
    return ()


def check_keys(app: App) -> Iterable[Finding]:
    """Keys load; they are kept from others."""
    ring = app.keyring
    states = {state: sum(key.state is state for key in ring.keys) for state in KeyState}
    counts = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    yield Finding("keys", "ok", f"{counts}; {ring.active.kid} signs")
    path = os.environ.get("SAFEDEFER_KEYS_FILE")
    if path and os.path.exists(path) and os.stat(path).st_mode & stat.S_IROTH:  # noqa: PTH110, PTH116
        yield Finding(
            "keys", "warn", f"every user of this machine may read {path}, which belongs to root; run `chmod o-r {path}`"
        )


def check_policy(app: App) -> Iterable[Finding]:
    """The policy's modules import, and every pattern names something."""
    app.policy.load()
    missing = [pattern for pattern in app.policy.patterns if not _leads_somewhere(pattern)]
    for pattern in missing:
        yield Finding(
            "policy", "error", f"the pattern {pattern} names nothing here; correct it, or deploy what it names"
        )
    if not app.policy.patterns:
        yield Finding(
            "policy", "warn", "the policy has no pattern: only what is marked @deferrable may run, if that counts"
        )
    elif not missing:
        yield Finding("policy", "ok", f"{many(len(app.policy.patterns), 'pattern')}, and each names something")


def _leads_somewhere(pattern: str) -> bool:
    if ":" in pattern:  # an exact one was looked up when the policy was loaded
        return True
    try:
        return find_spec(pattern.removesuffix(".*")) is not None
    except (ImportError, ValueError):
        return False


def check_queue(app: App) -> Iterable[Finding]:
    """The queue opens, and its tables are those of this release; every process uses the same file."""
    if getattr(app.queue.file, "is_relative", False):
        assert app.queue.file is not None  # of none the line above is false
        yield Finding(
            "queue", "warn", f"its path is relative to the current folder: here it is {app.queue.file.path}, and a process that runs "
            f"in another folder uses another file; {_to_set(app, 'queue')} to sqlite:///{app.queue.file.path} for all of them",
        )  # fmt: skip
    missing = missing_file(app)
    if missing is not None:
        yield Finding(
            "queue", "warn", f"the file {missing} does not exist: no process has used it yet, or they use another one; "
            "compare the path that `safedefer run` says when it starts",
        )  # fmt: skip
        return
    engine = getattr(app.queue, "engine", None)
    reach, weaknesses = getattr(engine, "reach", None), getattr(engine, "weaknesses", None)
    if reach is not None:  # a push engine that the counts do not ask
        reach()
    if weaknesses is not None:
        for text in weaknesses():
            yield Finding("queue", "warn", f"the broker may lose messages, whose tasks run late then: {text}")
    counted = app.queue.stats(now=time.time())
    waiting, dead = sum(each.waiting for each in counted), sum(each.dead for each in counted)
    yield Finding("queue", "ok", f"{app.queue!r} opens; {many(waiting, 'task')} waiting, {many(dead, 'dead letter')}")
    if app.queue.file is None:
        return
    path = app.queue.file.path
    if os.stat(path).st_mode & stat.S_IWGRP:  # noqa: PTH116
        yield Finding("queue", "warn", f"the group of {path} may write it, and so remove tasks; run `chmod g-w {path}`")
    trouble = trouble_with_folders(path)
    if trouble is not None:
        yield Finding("queue", "warn", trouble)


def _to_set(app: App, name: str) -> str:
    """Return what to set: a variable, which an App that was made in code does not read, or an argument of it."""
    return f"set SAFEDEFER_{name.upper()}" if app.of_settings else f"set {name}= of App(...)"


def check_clock(app: App) -> Iterable[Finding]:
    """The queue's clock, and those of who deferred, are close to ours."""
    now = time.time()
    read = getattr(app.queue, "clock", None)
    apart = 0.0 if read is None else read() - now
    if abs(apart) > _CLOCK_LEEWAY:
        yield Finding("clock", "error", f"the database's clock is {apart:+.0f} s from ours; keep both by NTP")
        return
    views = () if missing_file(app) is not None else app.queue.tasks(limit=10)
    newest = max((view.created for view in views), default=now)
    if newest > now + _CLOCK_LEEWAY:
        yield Finding(
            "clock",
            "warn",
            f"a task was deferred {newest - now:.0f} s in our future; keep the clocks of all machines by NTP",
        )
        return
    yield Finding("clock", "ok", f"at most {_CLOCK_LEEWAY:.0f} s apart")


def check_environment(app: App) -> Iterable[Finding]:
    """The environment was given."""
    if app.environment_given:
        yield Finding("environment", "ok", app.environment)
    else:
        yield Finding("environment", "error", NO_ENVIRONMENT)


def check_sqlite(app: App) -> Iterable[Finding]:
    """The SQLite libraries do not lose commits."""
    if app.queue.file is not None:
        from safedefer.queues.sqlite.trust import sqlite_release  # noqa: PLC0415  # only where it is the queue's

        yield _sqlite_release("apsw", sqlite_release(), "upgrade apsw", "error")
    if any(name.startswith(("/", "sqlalchemy:sqlite")) for name, _ in app.outbox.databases()):
        yield _sqlite_release(
            "Python's sqlite3",
            sqlite3.sqlite_version_info,
            "use a Python that has a newer one, or apsw connections",
            "warn",
        )


def _sqlite_release(what: str, version: tuple[int, ...], remedy: str, wrong: Literal["warn", "error"]) -> Finding:
    text = f"{what} has SQLite {'.'.join(map(str, version))}"
    if version >= _FIXED_SQLITE:
        return Finding("sqlite", "ok", text)
    fixed = ".".join(map(str, _FIXED_SQLITE))
    return Finding(
        "sqlite", wrong, f"{text}, which may lose commits when its log is reset; {remedy} ({fixed} or later)"
    )


def check_outboxes(app: App) -> Iterable[Finding]:
    """The outboxes can be read, are ours, and have no triggers."""
    for name, trouble in dict.fromkeys(app.outbox.look()):
        if trouble is None:
            yield Finding("outboxes", "ok", name)
        else:
            yield Finding("outboxes", "error", f"{name}: {trouble}")


def check_deadlines(app: App) -> Iterable[Finding]:
    """Every declared queue says how long an attempt may take."""
    file = app.queue_file
    silent = [] if file is None else [section.name for section in file.queue if section.attempt_deadline is None]
    limit = f"{DEFAULT_DEADLINE:.0f} s"
    if silent:
        yield Finding(
            "deadlines",
            "warn",
            f"no attempt_deadline for {', '.join(silent)}: an attempt that takes over {limit} is ended and tried again; write "
            "attempt_deadline into queue.yaml (0 is none)",
        )
    else:
        where = "no queue.yaml, so an attempt may take" if file is None else "declared; else an attempt may take"
        yield Finding("deadlines", "ok", f"{where} {limit}, unless its task says so")


def check_pickle(app: App) -> Iterable[Finding]:
    """No pickles are taken."""
    may = [key.kid for key in app.keyring.keys if key.pickle and key.state is not KeyState.REVOKED]
    if app.allow_pickle:
        who = f"who has {', '.join(may)} may send them" if may else "no key may sign them"
        yield Finding(
            "pickle", "warn", f"pickled arguments are taken, and {who}; leave allow_pickle off if typed values will do"
        )
    elif may:
        yield Finding(
            "pickle",
            "warn",
            f"{', '.join(may)} may sign pickles, which are not taken here; take safedefer_pickle from the key",
        )
    else:
        yield Finding("pickle", "ok", "no pickles are taken")


def check_unverified_bytes(app: App) -> Iterable[Finding]:
    """Some requests of the largest size can be read at once."""
    options = app.delivery_options
    text = f"{options.unverified_bytes:,} bytes for all requests that are not verified, {options.max_bytes:,} for one"
    if options.unverified_bytes < _BODIES * options.max_bytes:
        yield Finding(
            "unverified_bytes",
            "warn",
            f"{text}: a few large ones make all others busy; {_to_set(app, 'unverified_bytes')} higher",
        )
    else:
        yield Finding("unverified_bytes", "ok", text)


CHECKS: Final[Sequence[Check]] = (
    check_keys,
    check_policy,
    check_queue,
    check_writes,
    check_users,
    check_clock,
    check_environment,
    check_settings,
    check_sqlite,
    check_pgqueuer,
    check_outboxes,
    check_deadlines,
    check_pickle,
    check_unverified_bytes,
)
"""In the order in which they are shown."""
