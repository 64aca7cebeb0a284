"""The row of a task in an outbox: JSON text. Whoever may write to the table may have written anything there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from safedefer.blobs import Blob
from safedefer.queues.base import QueuedTask


def to_text(task: QueuedTask) -> str:
    """Return a task as JSON text; bytes as Latin-1, one character for each."""
    document: dict[str, Any] = task._asdict()
    document["token"] = task.token.decode("latin-1")
    document["digest"] = task.digest.decode("latin-1")
    document["headers"], document["retry_options"] = dict(task.headers), dict(task.retry_options)
    document["blob"] = None if task.blob is None else [task.blob.id, task.blob.data.decode("latin-1")]
    return json.dumps(document)


_TEXT: Final = (str,)
_TEXT_OR_NONE: Final = (str, type(None))
_NUMBER: Final = (int, float)
#: The types of a row's members. A queue that is given another says that it is not available.
_KINDS: Final = {
    **dict.fromkeys(("id", "queue", "token", "audience", "url", "target", "digest", "callable_name"), _TEXT),
    **dict.fromkeys(("name", "blob_id", "unique_key"), _TEXT_OR_NONE),
    **dict.fromkeys(("headers", "retry_options"), (dict,)),
    "eta": _NUMBER,
    "created": _NUMBER,
    "expires": (int,),
}
#: Characters, at most: a database refuses a longer one, where it is in an index, and names no cause that a relay knows.
_LENGTHS: Final = {
    **dict.fromkeys(("id", "queue", "target", "name", "blob_id", "unique_key"), 500),
    **dict.fromkeys(("audience", "url", "callable_name"), 5_000),
}
#: Values in a row, at most. What is one text, as a token, is one value, however long: parsing millions of them takes gigabytes,
#: and seconds in which no other thread runs.
_VALUES: Final = 200_000
#: The largest number that a database's column of eight bytes takes.
_LARGEST: Final = 2**63 - 1


def from_text(text: str) -> QueuedTask:
    """Return the task that ``to_text`` wrote. Any other text raises, in whatever way."""
    if sum(map(text.count, "[{,")) > _VALUES:  # within texts too: a header of ours has no room for so many
        raise ValueError("too many values")
    document: Mapping[str, Any] = json.loads(text)
    for name, kinds in _KINDS.items():
        if type(document[name]) not in kinds:
            raise ValueError(name)
    _check(document)
    blob = document["blob"]
    return QueuedTask(
        **{
            **document,
            "token": document["token"].encode("latin-1"),
            "digest": document["digest"].encode("latin-1"),
            "blob": None if blob is None else Blob(_plain(blob[0]), blob[1].encode("latin-1")),
        }
    )


def _check(document: Mapping[str, Any]) -> None:
    for name, most in _LENGTHS.items():
        if len(_plain(document[name] or "")) > most:
            raise ValueError(name)
    for name in ("eta", "created", "expires"):
        # A queue sorts by these: NaN is neither before nor after another time.
        if not math.isfinite(document[name]) or abs(document[name]) > _LARGEST:
            raise ValueError(name)
    for name, value in document["headers"].items():
        _plain(name + value)
    for name, value in document["retry_options"].items():
        _plain(name)
        if type(value) not in _NUMBER or not math.isfinite(value):
            raise ValueError("retry_options")


def _plain(text: str) -> str:
    """Return a text that every database takes; raise for one with NUL or half a surrogate pair."""
    if "\0" in text:
        raise ValueError("NUL")
    text.encode()
    return text


def transactional(text: str, task_id: str) -> QueuedTask:
    """Return the task of a row that a transactional task may have.

    Raises:
        ValueError: It has a name, a unique key or another id. A name would be taken from the task that may have it:
            ``defer()`` writes none to an outbox.
        Exception: As ``from_text``.
    """
    task = from_text(text)
    if task.id != task_id:
        raise ValueError("another task's id")
    if task.name is not None or task.unique_key is not None:
        raise ValueError("a name or a unique key")
    return task


def environment_of(task: QueuedTask) -> str:
    """Return the environment that a task's audience names. Raises ValueError if it names none."""
    environment, _, _, _ = task.audience.split(":", 3)  # environment, queue, target, path
    return environment
