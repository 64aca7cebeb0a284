"""Checks of ``safedefer doctor`` on what is around an App: who else uses its queue, its libraries, and its handlers."""

from __future__ import annotations

import contextlib
import gzip
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from importlib.metadata import version
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

from safedefer.app import App
from safedefer.claims import split_audience
from safedefer.cli.common import missing_file
from safedefer.cli.findings import Finding
from safedefer.errors import RejectedTask
from safedefer.headers import CONTENT_TYPE, OUTCOME_HEADER
from safedefer.observe.troubles import ProcessReport
from safedefer.queues.addresses import full_place, place
from safedefer.queues.base import NOTICE_NAME
from safedefer.sending.addresses import check_address

T = TypeVar("T")

#: Tasks whose environments are looked at.
_TASKS: Final = 100
#: Processes that are named.
_PROCESSES: Final = 10
#: Seconds to wait for a handler to say anything.
_TIMEOUT: Final = 5.0
#: Seconds for a whole answer, or for two on one connection.
_WHOLE: Final = 10.0
#: No token, so that nothing can run.
_BODY: Final = b"safedefer-doctor"
#: Bytes that are read of an answer that says nothing.
_MOST: Final = 65_536


def check_writes(app: App) -> Iterable[Finding]:
    """The store takes writes: its disk is not full, its file not read-only, and the role may. What reads sees nothing of that."""
    if missing_file(app) is not None:
        return
    # A dashboard that looks at this moment shows nothing of it: it says neither that a process lives nor that something is wrong.
    name, text = f"doctor {os.getpid()} on {socket.gethostname()}"[:NOTICE_NAME], ProcessReport(command="doctor").text()
    app.queue.put_notice(name, text, now=time.time())
    app.queue.put_notice(name, "", now=time.time())
    yield Finding("writes", "ok", "the store takes them")


def check_users(app: App) -> Iterable[Finding]:
    """The queue is where it is meant to be, and is not shared with another environment."""
    if missing_file(app) is not None:
        return
    where = full_place(app.queue, app.queue_place)
    using = [] if app.queue.file is None else [*_processes_with(app.queue.file.path)]
    named = ", ".join(f"{pid} ({name})" for pid, name in using[:_PROCESSES])
    more = f" and {len(using) - _PROCESSES} more" if len(using) > _PROCESSES else ""
    text = f"the queue is {where}" + (f"; open in the processes {named}{more}" if using else "")
    others = sorted({*_environments(app)} - {app.environment})
    if others:
        yield Finding(
            "users", "warn", f"{text}; tasks of the environment {', '.join(others)} are in it, which do not run in "
            f"{app.environment}; give each environment a queue of its own, or correct SAFEDEFER_ENVIRONMENT",
        )  # fmt: skip
    else:
        yield Finding("users", "ok", text)


def check_settings(app: App) -> Iterable[Finding]:
    """An App that was made in code has what the variables say that are set: it reads none of them."""
    if app.of_settings or not any(name.startswith("SAFEDEFER_") for name in os.environ):
        return
    from safedefer.settings import Settings  # noqa: PLC0415  # an App that is made in code needs no settings library

    settings, options = Settings.load(), app.delivery_options
    has: dict[str, object] = {
        "environment": app.environment,
        "url": app.url,
        "prefix": app.prefix,
        "allow_pickle": app.allow_pickle,
        "concurrency": options.concurrency,
        "lease_seconds": options.lease_seconds,
        "token_bytes": options.max_bytes,
        "unverified_bytes": options.unverified_bytes,
    }
    other = [name for name, value in has.items() if getattr(settings, name) != value]
    if "://" in app.queue_place and place(settings.queue) != app.queue_place:
        other.append("queue")
    if settings.outboxes and not app.outbox.databases():
        other.append("outboxes")
    unread = [f"SAFEDEFER_{name.upper()}" for name in sorted({*other} & settings.model_fields_set)]
    if unread:
        yield Finding(
            "settings", "warn", f"{', '.join(unread)}: set, but this App was made by App(...), which reads no variable, and has another "
            "value; give it as an argument, or make the App by App.from_settings()",
        )  # fmt: skip


def _environments(app: App) -> Iterator[str]:
    """Give the environments that the newest tasks were signed for."""
    for view in app.queue.tasks(limit=_TASKS):
        with contextlib.suppress(RejectedTask):
            yield split_audience(app.authenticate(view.token)["aud"])[0]


def _processes_with(path: str) -> Iterator[tuple[int, str]]:
    """Give the other processes of this user that have a file open, with their names, where the system has ``/proc``."""
    with contextlib.suppress(OSError):
        wanted = os.stat(path)  # noqa: PTH116  # a text, as in the queue
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and int(folder.name) != os.getpid():
                with contextlib.suppress(OSError):  # it has ended, or is another user's
                    if any(os.path.samestat(each.stat(), wanted) for each in (folder / "fd").iterdir()):
                        yield int(folder.name), (folder / "comm").read_text(errors="replace").strip()


def check_pgqueuer(app: App) -> Iterable[Finding]:
    """The pgqueuer of a PostgreSQL queue is one that this release was tested with."""
    if app.queue.statements is None:
        return
    from safedefer.queues.postgres.pgqueuer import untested  # noqa: PLC0415  # only where it is the queue's

    found = version("pgqueuer")
    warning = untested(found)
    yield Finding("pgqueuer", "ok", f"pgqueuer {found}") if warning is None else Finding("pgqueuer", "warn", warning)


def check_target(app: App, address: str) -> Iterable[Finding]:
    """A handler is reached at an address, and answers as one of ours. It is sent what is no token.

    Raises:
        ConfigurationError: It is no address.
    """
    check_address("--to", address)
    shown = place(address)  # without user and password
    try:
        status, outcome = _in_time(partial(_answer, address, app.url))
    except (OSError, HTTPException) as error:
        yield Finding(
            "target",
            "error",
            f"{shown} does not answer ({type(error).__name__}: {error}); start the handler, or correct --to",
        )
        return
    if outcome is None:
        yield Finding(
            "target", "error", f"{shown.rstrip('/')}{app.url} answers {status} without {OUTCOME_HEADER}, so it is no handler of ours, or a "
            "proxy takes the header away; correct --to, the mount or SAFEDEFER_PREFIX",
        )  # fmt: skip
        return
    answers = f"{shown.rstrip('/')}{app.url} answers as a handler: {status} {outcome} to what is no token"
    if _inflates(address):
        yield Finding(
            "target", "warn", f"{answers}, but its server inflates bodies before the handler refuses them, so a stranger's small "
            "request costs much memory and time; make aiohttp's runner with AppRunner(web_app, auto_decompress=False)",
        )  # fmt: skip
    else:
        yield Finding("target", "ok", answers)


def _inflates(address: str) -> bool:
    """Whether a server inflates bodies by itself.

    aiohttp's parser fails then at a body that is not what its encoding says. It answers, since nobody reads the body of a path
    where nothing is, and closes the connection then, which it has not announced. The handler's own path tells
    nothing: it closes after each request that it refuses. A server or a firewall that takes no encoding at all closes after a
    body that is well encoded too.
    """
    encoded = {"Content-Encoding": "gzip"}
    return (
        _keeps_alive(address, _BODY, {})
        and _keeps_alive(address, gzip.compress(_BODY), encoded)
        and not _keeps_alive(address, _BODY, encoded)
    )


def _keeps_alive(address: str, body: bytes, headers: dict[str, str]) -> bool:
    """Whether a server takes another request after a POST of this body, to a path where nothing is, or says that it does not."""
    try:
        return _in_time(partial(_takes_two, address, body, headers))
    except (OSError, HTTPException):
        return False


def _in_time(call: Callable[[], T]) -> T:
    """Return what a call returns, or raise ``TimeoutError``: a server may send a byte now and then, or interim answers, for ever.

    Also the look-up of a name and a TLS handshake take the time that others want. The thread ends with the process.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except Exception as error:  # noqa: BLE001  # it is raised by who waits
            answer.set_exception(error)

    threading.Thread(target=run, name="safedefer-doctor", daemon=True).start()
    try:
        return answer.result(_WHOLE)
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no whole answer in {_WHOLE:.0f} s") from None


def _takes_two(address: str, first: bytes, headers: dict[str, str]) -> bool:
    connection, path = _connect(address)
    try:
        for body in (first, None):
            connection.request("POST", f"{path}/safedefer-doctor-{secrets.token_hex(8)}", body, headers if body else {})
            connection.auto_open = 0
            response = connection.getresponse()
            response.read(_MOST)
            if response.will_close:
                break
    finally:
        connection.close()
    return True


def _answer(address: str, path: str) -> tuple[int, str | None]:
    """Return status and outcome of a POST. Follows no redirect, and uses no proxy."""
    connection, prefix = _connect(address)
    try:
        connection.request("POST", prefix + path, _BODY, {"Content-Type": CONTENT_TYPE})
        response: HTTPResponse = connection.getresponse()
        return response.status, response.getheader(OUTCOME_HEADER)
    finally:
        connection.close()


def _connect(address: str) -> tuple[HTTPConnection, str]:
    """Return a connection to an address, which opens when it is used, and the path that the address begins with."""
    parts = urlsplit(address)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    return kind(parts.hostname or "", parts.port, timeout=_TIMEOUT), parts.path.rstrip("/")
