"""Rows of the SQLite engine to the values of the seam, and back."""

from __future__ import annotations

import json
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import apsw
import orjson

from safedefer.ledger import AttemptRecord
from safedefer.queues.base import Lease, QueuedTask, TaskState, TaskView, task_digest
from safedefer.queues.rules import UNREADABLE, Counters, Known, stored_mapping
from safedefer.queues.sqlite.connection import SQL
from safedefer.queues.sqlite.repair import BYTES, NUMBER, OR_NONE, TEXT, WHOLE, BadValue, Kinds

if TYPE_CHECKING:
    from collections.abc import Sequence


class TaskRow(NamedTuple):
    """One row of ``tasks_by_seq``."""

    seq: int
    id: str
    queue: str
    name: str | None
    callable_name: str
    url: str
    target: str
    audience: str
    headers: str
    retry_options: str
    eta: float
    created: float
    expires: int
    digest: bytes
    blob_id: str | None
    due: float
    owner: str | None
    leased_at: float | None
    attempts: int
    deliveries: int
    executions: int
    first_attempt: float | None
    rejections: int
    first_rejection: float | None
    previous_response: int | None
    retry_reason: str | None
    token: bytes
    unique_key: str | None

    @classmethod
    def read(cls, row: Sequence[Any]) -> TaskRow:
        """Return a row, its types checked."""
        return cls._make(_TASK.check(row))

    @property
    def counters(self) -> Counters:
        """What is counted of the task, with the delivery under way if there is one."""
        return Counters(
            self.attempts,
            self.deliveries,
            self.executions,
            self.first_attempt,
            self.rejections,
            self.first_rejection,
            self.previous_response,
            self.retry_reason,
        )


class Standing(NamedTuple):
    """One row of ``task_standing``: what decides how a task can be settled."""

    seq: int
    queue: str
    name: str | None
    audience: str
    expires: int
    digest: bytes
    owner: str | None
    due: float
    leased_at: float | None


class LedgerRow(NamedTuple):
    """One row of ``ledger_find``."""

    digest: bytes
    state: str
    owner: str | None
    until: float
    uncharged: int
    not_before: float
    losses: int
    first_loss: float | None

    def known(self, now: float) -> Known:
        """Return the facts that admission and settlement depend on."""
        early = self.not_before > now
        return Known(self.state, bool(self.uncharged), self.until > now, early, self.losses, self.first_loss)


#: The history keeps no tokens.
_WITHOUT_TOKEN: Final = (TaskState.SUCCEEDED, TaskState.CANCELLED)

_TEXT_OR_NONE: Final = TEXT | OR_NONE
_NUMBER_OR_NONE: Final = NUMBER | OR_NONE
_TASK: Final = Kinds(
    WHOLE, TEXT, TEXT, _TEXT_OR_NONE, TEXT, TEXT, TEXT, TEXT, TEXT, TEXT, NUMBER, NUMBER, WHOLE, BYTES, _TEXT_OR_NONE, NUMBER,
    _TEXT_OR_NONE, _NUMBER_OR_NONE, WHOLE, WHOLE, WHOLE, _NUMBER_OR_NONE, WHOLE, _NUMBER_OR_NONE, WHOLE | OR_NONE,
    _TEXT_OR_NONE, BYTES, _TEXT_OR_NONE,
)  # fmt: skip
STANDING: Final = Kinds(
    WHOLE, TEXT, _TEXT_OR_NONE, TEXT, WHOLE, BYTES, _TEXT_OR_NONE, NUMBER, _NUMBER_OR_NONE,
)  # fmt: skip
LEDGER: Final = Kinds(BYTES, TEXT, _TEXT_OR_NONE, NUMBER, WHOLE, NUMBER, WHOLE, _NUMBER_OR_NONE)
_VIEW: Final = Kinds(
    TEXT, TEXT, TEXT, _TEXT_OR_NONE, TEXT, TEXT, TEXT, TEXT, TEXT, TEXT, NUMBER, NUMBER, WHOLE, WHOLE, _TEXT_OR_NONE,
    _NUMBER_OR_NONE, BYTES,
)  # fmt: skip
#: Of ``view_tasks``: when it is due, and its place.
_LIVE: Final = _VIEW + Kinds(NUMBER, WHOLE)
_RECORD: Final = Kinds(
    TEXT, TEXT, NUMBER, NUMBER, TEXT, WHOLE | OR_NONE, _TEXT_OR_NONE, _TEXT_OR_NONE, _TEXT_OR_NONE,
)  # fmt: skip


def tasks_by_seq(connection: apsw.Connection, seqs: Sequence[int]) -> dict[int, TaskRow]:
    """Return the rows of tasks by number; in one step, unless one of them is unusual.

    Raises:
        BadValue, UnicodeDecodeError: A row has to be repaired.
    """
    numbers = {"seqs": json.dumps(seqs)}
    try:
        rows: list[list[Any]] = orjson.loads(str(connection.execute(SQL["tasks_by_seq_together"], numbers).get))
        for row in rows:
            row[_DIGEST], row[_TOKEN] = bytes.fromhex(row[_DIGEST]), bytes.fromhex(row[_TOKEN])
        return {row[0]: TaskRow.read(row) for row in rows}
    except (ValueError, TypeError, BadValue, apsw.SQLError, apsw.TooBigError):  # or it is null; JSON holds no bytes
        return {row[0]: TaskRow.read(row) for row in connection.execute(SQL["tasks_by_seq"], numbers)}


_DIGEST, _TOKEN = TaskRow._fields.index("digest"), TaskRow._fields.index("token")


def task_values(task: QueuedTask) -> dict[str, Any]:
    """Return the bindings of ``task_insert``."""
    return {
        "id": task.id,
        "queue": task.queue,
        "name": task.name,
        "callable_name": task.callable_name,
        "url": task.url,
        "target": task.target,
        "audience": task.audience,
        "headers": json.dumps(dict(task.headers)) if task.headers else "{}",
        "retry_options": json.dumps(dict(task.retry_options)) if task.retry_options else "{}",
        "eta": task.eta,
        "created": task.created,
        "expires": task.expires,
        "digest": task_digest(task),
        "blob_id": task.blob.id if task.blob else task.blob_id,
        "token": task.token,
        "unique_key": task.unique_key,
    }


#: The bindings of ``tasks_insert``, which stores tasks without a name and a unique key, in its order.
_PLAIN: Final = itemgetter(
    "id", "queue", "callable_name", "url", "target", "audience", "headers", "retry_options",
    "eta", "created", "expires", "digest", "blob_id", "eta", "token",
)  # fmt: skip


def plain_task_values(task: QueuedTask) -> tuple[Any, ...]:
    """Return the bindings of ``tasks_insert``."""
    values: tuple[Any, ...] = _PLAIN(task_values(task))
    return values


def queued_task(row: TaskRow) -> QueuedTask:
    """Return the task of a row, without its blob."""
    return QueuedTask(
        row.id,
        row.queue,
        row.token,
        row.audience,
        row.url,
        row.target,
        row.eta,
        row.created,
        row.expires,
        row.name,
        stored_mapping(row.headers),
        stored_mapping(row.retry_options),
        row.digest,
        None,
        row.blob_id,
        row.callable_name,
        row.unique_key,
    )  # by position, which takes half of the time


def leased_task(row: TaskRow, *, owner: str, until: float, losses: int) -> Lease:
    """Return the new lease of a row, whose counters are those before this delivery."""
    return Lease(queued_task(row), owner, until, *row.counters, losses)


def task_view(row: tuple[Any, ...], records: Sequence[AttemptRecord] = ()) -> TaskView:
    """Return what a row of ``view_tasks``, ``view_dead`` or ``view_ended`` shows."""
    is_live = len(row) > len(_VIEW)
    (task_id, queue, state, name, callable_name, url, target, audience) = (_LIVE if is_live else _VIEW).check(row)[:8]
    (headers, retry_options, eta, created, expires, attempts, reason, ended, token) = row[8 : len(_VIEW)]
    return TaskView(
        id=task_id,
        queue=queue,
        state=TaskState(state),
        name=name,
        callable_name=callable_name,
        url=url,
        target=target,
        audience=audience,
        headers=stored_mapping(headers),
        eta=eta,
        created=created,
        expires=expires,
        attempts=attempts,
        token=token,
        reason=reason if token or state in _WITHOUT_TOKEN else UNREADABLE,
        ended=ended,
        retry_options=stored_mapping(retry_options),
        records=records,
        due=row[len(_VIEW)] if is_live else None,
    )


def attempt_record(row: tuple[Any, ...]) -> AttemptRecord:
    """Return the record of a row of ``attempts_of``."""
    return AttemptRecord._make(_RECORD.check(row))


def first_row(cursor: apsw.Cursor) -> tuple[Any, ...] | None:
    """Return the first row of a result, and finish the statement."""
    rows = cursor.fetchall()
    return rows[0] if rows else None
