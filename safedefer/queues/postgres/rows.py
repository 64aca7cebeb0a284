"""Tasks as rows of pgqueuer's table, and back: which are parked for later; leases as texts.

The ``payload`` of a job is the token. Its ``headers`` hold hints for routing and display: eta, created, expires, digest,
audience and callable name as one text under ``safedefer``, the rest as an object under ``safedefer_more``. The signed
token repeats all of it. Any writer of the table can have changed the hints, so a hint of a wrong type is ignored.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson
from pybase64 import b64decode as decode
from pybase64 import b64encode as encode

from safedefer.queues.base import QueuedTask, task_digest
from safedefer.queues.postgres.statements import to_json
from safedefer.queues.rules import unfolds

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PARKED_AFTER: Final = 5.0
"""Seconds: a task that falls due later is parked under ``queue@later``, which is indexed by due time."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_MOST: Final = 2**62
_MOST_SECONDS: Final = 1e18
#: Parts of the text under ``safedefer``.
_PLAIN: Final = 5
#: Objects in the hints: themselves, ``safedefer_more``, headers, retry options.
_OBJECTS: Final = 4
#: The longest audience that fits into the ledger's index, beside an id. A longer one is none of ours: its URL would be.
_LONGEST_AUDIENCE: Final = 2_600
#: Characters of a destination (audience and callable name) that is cached; longer ones are parsed each time.
_CACHED_LENGTH: Final = 500


def entrypoint(queue: str, wait: float) -> str:
    """Return the entrypoint of a task that falls due in ``wait`` seconds: its queue, or ``queue@later``."""
    return queue if wait <= PARKED_AFTER else f"{queue}@later"


def write_hints(task: QueuedTask) -> str:
    """Return the headers of a job, as JSON.

    The values that every task has are one text without quotes, which drivers and server copy unchanged. As members of an
    object, escaped one by one, they doubled the time of storing a job.
    """
    digest = task_digest(task)
    # "-": the digest is that of the payload, as for every task that is not oversize.
    written = "-" if digest == sha256(task.token).digest() else encode(digest).decode()
    plain = f"{task.eta!r} {task.created!r} {task.expires} {written} {task.audience} {task.callable_name}"
    more: dict[str, object] = {}
    _, _, target, url = audience_parts(task.audience)
    if (target, url) != (task.target, task.url):
        more |= {"target": task.target, "url": task.url}
    if task.name is not None:
        more["name"] = task.name
    if task.headers:
        more["headers"] = dict(task.headers)
    if task.retry_options:
        more["retry_options"] = dict(task.retry_options)
    if task.blob is not None or task.blob_id is not None:
        more["blob_id"] = task.blob.id if task.blob else task.blob_id
    if task.unique_key is not None:
        more["unique_key"] = task.unique_key
    if not more and plain.isascii() and plain.isprintable() and '"' not in plain and "\\" not in plain:
        return f'{{"safedefer": "{plain}"}}'  # the text of the line below, in a tenth of the time
    return json.dumps({"safedefer": plain, "safedefer_more": more} if more else {"safedefer": plain})


def audience_parts(audience: str) -> tuple[str, str, str, str]:
    """Return environment, queue, target and URL of an audience; a missing part is empty."""
    parts = audience.split(":", 3)
    parts += [""] * (4 - len(parts))
    return parts[0], parts[1], parts[2], parts[3]


def read_task(job: Mapping[str, Any]) -> QueuedTask:
    """Return the task of a job, without its blob; hints of a wrong type are ignored."""
    hints = _read_object(job["headers"])
    plain = (_text(hints.get("safedefer")) or "").split(" ", 4)
    eta, created, expires, digest, rest = plain if len(plain) == _PLAIN else plain + [""] * (_PLAIN - len(plain))
    audience, target, url, callable_name = (
        _destination(rest) if len(rest) <= _CACHED_LENGTH else _read_destination(rest)
    )
    token = b"" if job["payload"] is None else job["payload"]
    due, made, ends = _read_times(eta, created, expires)
    queue = job["entrypoint"].partition("@")[0]
    known = b"" if digest in {"-", ""} else _bytes(digest)
    task_id = job["dedupe_key"] or f"job-{job['id']}"
    # The same as QueuedTask(...), in a third of the time.
    values = task_id, queue, token, audience, url, target, due, made, ends, None, _NONE, _NONE, known, None, None
    task = _tuple(QueuedTask, (*values, callable_name, None, None))
    more = hints.get("safedefer_more")
    return task if more is None else _completed(task, _object(more))


def _completed(task: QueuedTask, more: Mapping[str, Any]) -> QueuedTask:
    """Return a task with the optional hints, those under ``safedefer_more``."""
    return task._replace(
        url=_text(more.get("url")) or task.url,
        target=_text(more.get("target")) or task.target,
        name=_text(more.get("name")),
        headers=_object(more.get("headers")),
        retry_options=_object(more.get("retry_options")),
        blob_id=_text(more.get("blob_id")),
        unique_key=_text(more.get("unique_key")),
    )


def _read_destination(text: str) -> tuple[str, str, str, str]:
    """Return audience, target, URL and callable name."""
    audience, _, callable_name = text.rpartition(" ")
    if len(audience.encode(errors="replace")) > _LONGEST_AUDIENCE:
        audience = ""
    _, _, target, url = audience_parts(audience)
    return audience, target, url, callable_name


_tuple: Final = tuple.__new__
_NONE: Final = QueuedTask._field_defaults["headers"]
_destination: Final = lru_cache(maxsize=1024)(_read_destination)


def _read_times(eta: str, created: str, expires: str) -> tuple[float, float, int]:
    try:
        times = float(eta), float(created), int(expires)
    except ValueError:
        return _number(eta), _number(created), _integer(expires)
    if abs(times[0]) < _MOST_SECONDS and abs(times[1]) < _MOST_SECONDS and abs(times[2]) < _MOST:
        return times
    return _number(eta), _number(created), _integer(expires)


def _read_object(text: object) -> dict[str, Any]:
    try:
        value = _parsed(text)
        # A driver that encodes its parameters as JSON has encoded the text a second time.
        return _object(_parsed(value.replace("\\u0000", "")) if type(value) is str else value)
    except orjson.JSONDecodeError:
        return {}


def _parsed(text: object) -> object:
    if type(text) is str and unfolds(text, objects=_OBJECTS):
        return None
    return orjson.loads(text)  # type: ignore[arg-type]  # NULL raises too


def _object(value: object) -> dict[str, Any]:
    return value if type(value) is dict else {}


def _text(value: object) -> str | None:
    return value if type(value) is str else None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if -_MOST_SECONDS < value < _MOST_SECONDS else 0.0


def _integer(text: str) -> int:
    try:
        return min(max(int(text), -_MOST), _MOST)
    except ValueError:
        return 0


def _bytes(text: str) -> bytes:
    try:
        return decode(text.encode())
    except ValueError:
        return b""


class Hold(NamedTuple):
    """The fence of a lease, written into ``Lease.owner``: a job is held as long as ``manager`` and ``updated`` are unchanged."""

    manager: str
    """pgqueuer's ``queue_manager_id``."""
    job: int
    updated: int
    """When the job was picked: microseconds since the epoch, by the database's clock."""
    leased: float
    """The same in seconds, by the dispatcher's clock."""

    @classmethod
    def read(cls, owner: str) -> Hold | None:
        """Parse an owner of ``write_holds``; None for any other text."""
        try:
            _, manager, leased, updated, job = owner.rsplit(":", 4)
            return cls(manager, int(job), int(updated), float(leased))
        except ValueError:
            return None


def write_holds(owner: str, manager: str, jobs: Iterable[Mapping[str, Any]], *, leased: float) -> list[str]:
    """Return the ``owner`` of the lease of each job. Jobs picked together share ``updated``, so its text is made once."""
    found, moment, prefix = [], None, ""
    for job in jobs:
        if job["updated"] != moment:
            moment = job["updated"]
            prefix = f"{owner}:{manager}:{leased!r}:{microseconds(moment)}:"
        found.append(f"{prefix}{job['id']}")
    return found


def microseconds(moment: datetime) -> int:
    """Return a ``timestamptz`` in microseconds since the epoch."""
    return (moment - _EPOCH) // _MICROSECOND


def ledger_keys(tasks: Iterable[QueuedTask]) -> str:
    """Return the primary keys of tasks' ledger entries, as JSON."""
    return to_json([{"audience": task.audience, "task_id": task.id} for task in tasks])


def dead_values(
    task: QueuedTask, job_id: int, *, reason: str | None, last_reason: bool, attempts: int, now: float
) -> tuple[object, ...]:
    """Return the parameters of ``dead_insert``; ``last_reason`` prefers the reason of the last record to ``reason``."""
    return (
        task.id, job_id, task.queue, task.name, task.callable_name, task.url, task.target, task.audience,
        json.dumps(dict(task.headers)), json.dumps(dict(task.retry_options)), task.eta, task.created, task.expires,
        attempts, last_reason, reason, now, task.blob_id, task.token,
    )  # fmt: skip
