"""Copies of tasks that an engine has taken and may lose: when one is looked at, and when its task is handed over again.

A broker such as Redis takes a message out of its queue before it notes who has it, and may keep nothing on a disk. So the
store keeps a copy of each task that such an engine was given, until the ledger says that the task has ended. A task that has
neither ended nor runs is handed over again after a while: the ledger lets it run once, however many messages of it there are.
Pure functions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from safedefer.queues.base import Copy, QueuedTask
from safedefer.queues.rules import LEDGER_LEEWAY, unfolds

#: Seconds until the first look, each look doubling them; the SQL of the engines has these numbers too.
FIRST_LOOK: Final = 5.0
LONGEST_LOOK: Final = 300.0
#: Looks that find a task still on its way: it is handed over again from the next one on, 40 s after it was due.
_PATIENT_LOOKS: Final = 3
#: Messages in a broker's queue that say that tasks are late, and not lost.
MANY_WAITING: Final = 1_000
#: With so many messages before it, a task is handed over again at this look, after 55 minutes, and at each double of it.
_LATE_LOOK: Final = 16
#: The same where the broker cannot say how many there are: after 80 s.
_UNCOUNTED_LOOK: Final = 4
#: The year 9999, after which no time of ours is.
_LATEST: Final = 253_402_300_799.0
_MOST_LOOKS: Final = 1_000_000
#: Objects in a copy: itself, headers, retry options.
_OBJECTS: Final = 3
_NUMBERS: Final = ("eta", "created")
_TEXTS: Final = ("queue", "token", "url", "target", "callable_name")


def first_look(task: QueuedTask) -> float:
    """Return when a copy is looked at first."""
    return max(task.eta, task.created) + FIRST_LOOK


def count(stored: int) -> int:
    """Return the looks at a copy, whatever somebody wrote into the storage."""
    return min(max(stored, 0), _MOST_LOOKS)


def wait(looks: int) -> float:
    """Return the seconds from a look to the next one."""
    return min(FIRST_LOOK * 2.0 ** min(looks, 10), LONGEST_LOOK)


def is_overdue(looks: int) -> bool:
    """Whether a task that has neither ended nor runs is to be handed over again, if few messages wait before it."""
    return looks >= _PATIENT_LOOKS


def is_time(looks: int, waiting: int | None) -> bool:
    """Whether such a task is handed over again at this look.

    Where many messages wait it is so seldom, since each one more makes all later; likewise where nobody knows how many do.

    Args:
        looks: Those before this one.
        waiting: Messages in the broker's queue; None if it cannot say.
    """
    if waiting is not None and waiting < MANY_WAITING:
        return is_overdue(looks)
    first = _LATE_LOOK if waiting is not None else _UNCOUNTED_LOOK
    return looks >= first and looks & (looks - 1) == 0


def is_last_look(task: QueuedTask, now: float) -> bool:
    """Whether the ledger may forget how the task ended: it is handed over once more, and its copy goes."""
    return now > task.expires + LEDGER_LEEWAY


def dump(task: QueuedTask) -> str:
    """Return a task as it is stored, without its blob."""
    values: dict[str, object] = {
        name: getattr(task, name) for name in (*_TEXTS, *_NUMBERS, "expires") if name != "token"
    }
    values["token"] = task.token.decode("ascii")
    if task.headers:
        values["headers"] = dict(task.headers)
    if task.retry_options:
        values["retry_options"] = dict(task.retry_options)
    if (blob_id := task.blob.id if task.blob else task.blob_id) is not None:
        values["blob_id"] = blob_id
    if task.deadline is not None:
        values["deadline"] = task.deadline
    return json.dumps(values, separators=(",", ":"))


def load(copy: Copy) -> QueuedTask | None:
    """Read what ``dump`` wrote; None where somebody else wrote it. Nothing of it is believed: the token is signed."""
    try:
        values = {} if unfolds(copy.task, objects=_OBJECTS) else json.loads(copy.task)
    except (ValueError, RecursionError):
        return None
    if type(values) is not dict or not _is_ours(values):
        return None
    return QueuedTask(
        id=copy.task_id,
        audience=copy.audience,
        token=values["token"].encode("ascii", "replace"),
        headers=_mapping(values.get("headers")),
        retry_options=_mapping(values.get("retry_options")),
        blob_id=blob if type(blob := values.get("blob_id")) is str else None,
        deadline=deadline if _is_time(deadline := values.get("deadline")) else None,
        **{name: values[name] for name in (*_TEXTS, *_NUMBERS, "expires") if name != "token"},
    )


def _is_ours(values: Mapping[str, Any]) -> bool:
    return (
        all(type(values.get(name)) is str for name in _TEXTS)
        and all(_is_time(values.get(name)) for name in (*_NUMBERS, "expires"))
        and type(values["expires"]) is int
    )


def _is_time(value: Any) -> bool:
    return type(value) in {int, float} and 0 <= value < _LATEST  # JSON of Python's has Infinity and NaN


def _mapping(value: object) -> dict[str, Any]:
    return value if type(value) is dict else {}
