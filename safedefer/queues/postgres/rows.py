"""Rows of the PostgreSQL engine to the values of the seam, and back.

A job's ``payload`` is the token. What else a queue needs to hand it on is in the job's ``headers``, under
``safedefer``: hints, which the token says again, signed. Whoever writes the table may have made anything of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson
from pybase64 import b64decode as decode
from pybase64 import b64encode as encode

from safedefer.ledger import AttemptRecord
from safedefer.queues.base import Lease, QueuedTask, TaskState, TaskView, task_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from safedefer.queues.base import Settlement

LOST_LEASE: Final = "lease-expired"
"""The reason of a delivery that ended with its lease, and not with an answer."""

SOON: Final = 5.0
"""Seconds: what falls due later is put aside until then."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_MOST: Final = 2**62
_MOST_SECONDS: Final = 1e18
#: Parts of the text that every job has in its headers.
_PLAIN: Final = 5
#: Destinations are remembered, if they are no longer than this.
_COMMON: Final = 500


def entrypoint(queue: str, wait: float) -> str:
    """Return the entrypoint of a task that falls due in some seconds: its queue, or where it is put aside."""
    return queue if wait <= SOON else f"{queue}@later"


def write_hints(task: QueuedTask) -> str:
    """Return the headers of a job.

    What every task has is one text without quotes, which drivers and server copy as it is: escaping it, and making
    members of it, was seen to cost as much as all the rest of storing a job.
    """
    digest = task_digest(task)
    # Of a task that is not oversize it is that of the payload.
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
        return f'{{"safedefer": "{plain}"}}'  # as below, in a tenth of the time
    return json.dumps({"safedefer": plain, "safedefer_more": more} if more else {"safedefer": plain})


def audience_parts(audience: str) -> tuple[str, str, str, str]:
    """Return environment, queue, target and URL of an audience; empty texts for what it has not."""
    parts = audience.split(":", 3)
    parts += [""] * (4 - len(parts))
    return parts[0], parts[1], parts[2], parts[3]


def read_task(job: Mapping[str, Any]) -> QueuedTask:
    """Return the task of a job, without its blob; hints of a wrong type are left out."""
    hints = _read_object(job["headers"])
    plain = (_text(hints.get("safedefer")) or "").split(" ", 4)
    eta, created, expires, digest, rest = plain if len(plain) == _PLAIN else plain + [""] * (_PLAIN - len(plain))
    audience, target, url, callable_name = _destination(rest) if len(rest) <= _COMMON else _read_destination(rest)
    token = b"" if job["payload"] is None else job["payload"]
    due, made, ends = _read_times(eta, created, expires)
    queue = job["entrypoint"].partition("@")[0]
    known = b"" if digest in {"-", ""} else _bytes(digest)
    task_id = job["dedupe_key"] or f"job-{job['id']}"
    # As QueuedTask(...), in a third of the time.
    values = task_id, queue, token, audience, url, target, due, made, ends, None, _NONE, _NONE, known, None, None
    task = _tuple(QueuedTask, (*values, callable_name, None))
    more = hints.get("safedefer_more")
    return task if more is None else _completed(task, _object(more))


def _completed(task: QueuedTask, more: Mapping[str, Any]) -> QueuedTask:
    """Return a task with what not every one has."""
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
        value = orjson.loads(text)  # type: ignore[arg-type]  # NULL is no text, and an error
        # A driver that makes JSON of what it is given may have made it twice.
        return _object(orjson.loads(value.replace("\\u0000", "")) if type(value) is str else value)
    except orjson.JSONDecodeError:
        return {}


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
    """What fences a lease: the job, who picked it, and when. Written into ``Lease.owner``."""

    manager: str
    job: int
    updated: int
    """By the clock of the database, in microseconds since the epoch."""
    leased: float
    """By the clock of the dispatcher."""

    @classmethod
    def read(cls, owner: str) -> Hold | None:
        """Return what ``write_holds`` wrote; None for anything else."""
        try:
            _, manager, leased, updated, job = owner.rsplit(":", 4)
            return cls(manager, int(job), int(updated), float(leased))
        except ValueError:
            return None


def write_holds(owner: str, manager: str, jobs: Iterable[Mapping[str, Any]], *, leased: float) -> list[str]:
    """Return the ``owner`` of the lease of each job. Those that were picked together have one time."""
    found, moment, prefix = [], None, ""
    for job in jobs:
        if job["updated"] != moment:
            moment = job["updated"]
            prefix = f"{owner}:{manager}:{leased!r}:{microseconds(moment)}:"
        found.append(f"{prefix}{job['id']}")
    return found


def microseconds(moment: datetime) -> int:
    """Return a time of the database in microseconds since the epoch."""
    return (moment - _EPOCH) // _MICROSECOND


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A row of ``progress``."""

    job_id: int
    attempts: int = 0
    deliveries: int = 0
    executions: int = 0
    first_attempt: float | None = None
    rejections: int = 0
    first_rejection: float | None = None
    previous_response: int | None = None
    retry_reason: str | None = None

    @classmethod
    def after(cls, lease: Lease, settlement: Settlement, hold: Hold, *, now: float) -> Progress:
        """Return the counters as a delivery that is to be retried leaves them."""
        return cls(
            job_id=hold.job,
            attempts=lease.attempts + settlement.charged,
            deliveries=lease.retries + 1,
            executions=lease.executions + settlement.executed,
            first_attempt=hold.leased if settlement.charged and lease.first_attempt is None else lease.first_attempt,
            rejections=lease.rejections + settlement.rejected,
            first_rejection=now if settlement.rejected and lease.first_rejection is None else lease.first_rejection,
            previous_response=settlement.status,
            retry_reason=settlement.reason,
        )

    def leased(self, task: QueuedTask, *, owner: str, until: float) -> Lease:
        """Return the lease of a task with these counters."""
        return Lease(
            task=task,
            owner=owner,
            until=until,
            attempts=self.attempts,
            retries=self.deliveries,
            executions=self.executions,
            first_attempt=self.first_attempt,
            rejections=self.rejections,
            first_rejection=self.first_rejection,
            previous_response=self.previous_response,
            retry_reason=self.retry_reason,
        )


def joined(*columns: Sequence[str]) -> tuple[str, ...]:
    """Return a separator, and the values of each column joined by it, for ``string_to_array``.

    asyncpg looks at each element of an array several times: 200 rows of five columns took it a millisecond and more.
    """
    separator = "\x1f"
    texts = [separator.join(column) for column in columns]
    if any(text.count(separator) != len(column) - 1 for text, column in zip(texts, columns, strict=True)):
        separator = f"\x1f{token_hex(16)}\x1f"  # which nobody can have written into a value
        texts = [separator.join(column) for column in columns]
    return separator, *texts


def to_json(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows for ``json_to_recordset``: one text, where arrays would have each element looked at."""
    return orjson.dumps(rows).decode()


def keys(tasks: Iterable[QueuedTask]) -> str:
    """Return what names the entries of tasks in the ledger."""
    return to_json([{"audience": task.audience, "task_id": task.id} for task in tasks])


def record_values(record: AttemptRecord) -> dict[str, object]:
    """Return one row for ``attempts_insert``."""
    return {
        "task_id": record.task_id,
        "audience": record.audience,
        "started": record.started,
        "ended": record.ended,
        "outcome": record.outcome,
        "status": record.status,
        "reason": record.reason,
        "exception_type": _storable(record.exception_type),
        "traceback": _storable(record.traceback),
    }


def _storable(text: str | None) -> str | None:
    """Return text as PostgreSQL takes it: without NUL and lone surrogates."""
    if text is None:
        return None
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def dead_values(
    task: QueuedTask, job_id: int, *, reason: str | None, last_reason: bool, attempts: int, now: float
) -> tuple[object, ...]:
    """Return the values of ``dead_insert``; ``last_reason`` prefers that of the last record."""
    return (
        task.id, job_id, task.queue, task.name, task.callable_name, task.url, task.target, task.audience,
        json.dumps(dict(task.headers)), json.dumps(dict(task.retry_options)), task.eta, task.created, task.expires,
        attempts, last_reason, reason, now, task.blob_id, task.token,
    )  # fmt: skip


def job_view(job: Mapping[str, Any], blob: bytes | None, records: Sequence[AttemptRecord] = ()) -> TaskView:
    """Return what a row of ``view_jobs`` shows, with the stored token where the task is oversize."""
    task = read_task(job)
    return TaskView(
        id=task.id,
        queue=task.queue,
        state=TaskState.WAITING if job["status"] == "queued" else TaskState.RUNNING,
        name=task.name,
        callable_name=task.callable_name,
        url=task.url,
        target=task.target,
        audience=task.audience,
        headers=task.headers,
        eta=task.eta,
        created=task.created,
        expires=task.expires,
        attempts=job["attempts"],
        token=task.token if blob is None else blob,
        reason=job["retry_reason"],
        retry_options=task.retry_options,
        records=records,
    )


def ended_view(row: Mapping[str, Any], records: Sequence[AttemptRecord] = ()) -> TaskView:
    """Return what a row of ``view_ended`` shows: neither token nor what else came with it."""
    hints = {"id": 0, "dedupe_key": row["id"], "entrypoint": row["queue"], "headers": row["headers"], "payload": None}
    task = read_task(hints)
    return TaskView(
        id=task.id,
        queue=task.queue,
        state=TaskState(row["state"]),
        name=task.name,
        callable_name=task.callable_name,
        url=task.url,
        target=task.target,
        audience=task.audience,
        headers={},
        eta=task.eta,
        created=task.created,
        expires=task.expires,
        attempts=row["attempts"],
        token=b"",
        reason=row["reason"],
        ended=row["ended"],
        records=records,
    )


def dead_view(row: Mapping[str, Any], records: Sequence[AttemptRecord] = ()) -> TaskView:
    """Return what a row of ``view_dead`` shows."""
    values = dict(row)
    for name in ("headers", "retry_options"):
        values[name] = _object(json.loads(values[name]))
    return TaskView(**{**values, "state": TaskState(values["state"]), "records": records})


def attempt_record(row: Mapping[str, Any]) -> AttemptRecord:
    """Return the record of a row of ``attempts_of``."""
    return AttemptRecord(**dict(row))
