"""A task as Cloud Tasks takes it: its name, its request, its times, and how many are sent at once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any, Final

from safedefer.errors import InvalidTaskError, InvalidTaskNameError, TaskTooLargeError
from safedefer.headers import CONTENT_TYPE
from safedefer.options import DEFAULT_TARGET
from safedefer.queues.base import QueuedTask
from safedefer.queues.cloudtasks.address import CloudTasksAddress

#: Headers of ours that say to the handler which task it is, and since when it is due. Hints: the token is signed, they are not.
TASK_ID_HEADER: Final = "Safedefer-Task-Id"
DUE_HEADER: Final = "Safedefer-Due"
SENT_HEADER: Final = "Safedefer-Sent"
#: Bytes of a task: Google's limits, less room for the rest of the request.
_HTTP_BYTES: Final = 1_048_569
_APP_ENGINE_BYTES: Final = 102_400
_ROOM: Final = 8_192
#: Seconds for an attempt: Google's least and most, and more than the handler takes, which ends it itself.
_SHORTEST_ATTEMPT: Final = 15
_LONGEST_ATTEMPT: Final = {True: 1_800, False: 86_415}
#: What the handler gives an attempt of which neither the task nor its queue says how long it may take.
_ATTEMPT: Final = 600.0
_MORE: Final = 30
#: So that a task is delivered in its last day, in which the handler buries it.
_LONGEST_BACKOFF: Final = 43_200
_BATCH: Final = 100
_BATCH_BYTES: Final = 4 * 2**20
_QUEUE: Final = re.compile("[A-Za-z0-9-]{1,100}")
_RESERVED: Final = re.compile(
    r"(?i)(authorization|host|content-length|user-agent|x-google-.*|x-appengine-.*|x-cloudtasks-.*)"
)
_TIME: Final = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?")


def task_request(address: CloudTasksAddress, task: QueuedTask, *, now: float) -> dict[str, Any]:
    """Return the task as Google's client takes it.

    Raises:
        InvalidTaskError: Cloud Tasks cannot have it.
        TaskTooLargeError: It is larger than Google's limit.
    """
    for name in task.headers:
        if _RESERVED.fullmatch(name) is not None:
            raise InvalidTaskError(f"Cloud Tasks sets the header {name} itself; leave it out of _headers")
    http = address.address is not None
    headers = {
        **task.headers,
        "Content-Type": CONTENT_TYPE,
        TASK_ID_HEADER: task.id,
        DUE_HEADER: f"{max(task.eta, task.created):.6f}",
        SENT_HEADER: f"{now:.6f}",
    }
    request: dict[str, Any] = {"http_method": "POST", "headers": headers, "body": task.token}
    if http:
        target = address.address_of(task.target, DEFAULT_TARGET)
        if target is None:
            raise InvalidTaskError(
                f"there is no target {task.target}; give its address in the queue's URL: target.{task.target}=https://…"
            )
        audience = address.audience or target
        request["url"] = f"{target}{task.url}"
        request["oidc_token"] = {"service_account_email": address.service_accounts[0], "audience": audience}
    else:
        request["relative_uri"] = task.url
        if task.target != DEFAULT_TARGET:
            request["app_engine_routing"] = {"service": task.target}
    size, limit = len(task.token) + _ROOM, _HTTP_BYTES if http else _APP_ENGINE_BYTES
    if size > limit:
        raise TaskTooLargeError(
            f"the task is {len(task.token)} bytes signed, and Cloud Tasks takes {limit - _ROOM}; lower inline_limit, and the "
            "store keeps it",
            size=len(task.token),
            limit=limit - _ROOM,
        )
    made = {
        "name": task_name(address, task),
        "http_request" if http else "app_engine_http_request": request,
        "dispatch_deadline": {"seconds": _attempt_seconds(task.deadline, _LONGEST_ATTEMPT[http])},
        "retry_config": _retry_config(task.retry_options),
    }
    if task.eta > task.created:
        whole = math.floor(task.eta)
        made["schedule_time"] = {"seconds": whole, "nanos": math.floor((task.eta - whole) * 1e6) * 1_000}
    return made


def queue_name(address: CloudTasksAddress, queue: str) -> str:
    """Return a queue's name in the API.

    Raises:
        InvalidTaskNameError: Cloud Tasks can have no such queue.
    """
    if _QUEUE.fullmatch(queue) is None:
        raise InvalidTaskNameError(
            f"Cloud Tasks has no queue of the name {queue}: letters, numbers and hyphens; rename it in queue.yaml"
        )
    return f"{address.parent}/queues/{queue}"


def task_name(address: CloudTasksAddress, task: QueuedTask) -> str:
    """Return a task's name in the API: of its own name, or of its id."""
    kind, text = ("id", task.id) if task.name is None else ("name", task.name)
    return f"{queue_name(address, task.queue)}/tasks/{hashed(kind, text)}"


def hashed(kind: str, text: str) -> str:
    """Return the id of a task in the API. Names and ids of one text have different ones."""
    return sha256(f"{kind}:{text}".encode()).hexdigest()


def _attempt_seconds(deadline: float | None, longest: int) -> int:
    """Return how long Google waits for an answer. If that is too short, the ledger keeps the run from being run twice."""
    if deadline == 0:
        return longest
    seconds = math.ceil(_ATTEMPT if deadline is None else deadline) + _MORE
    return min(max(seconds, _SHORTEST_ATTEMPT), longest)


def due_of(task: Any) -> float:
    """Return when a listed task was due first, as we noted; of one that is not ours, when it is tried next."""
    for request in (task.http_request, task.app_engine_http_request):
        text = dict(request.headers).get(DUE_HEADER, "")
        if _TIME.fullmatch(text):
            return float(text)
    return float(task.schedule_time.timestamp())


def _retry_config(options: Mapping[str, float]) -> dict[str, Any]:
    """Return when Google tries again. It counts whole seconds; the ledger refuses what comes before our own time."""
    least = min(max(math.ceil(options.get("min_backoff_seconds", 0.1)), 1), _LONGEST_BACKOFF)
    most = max(min(math.ceil(options.get("max_backoff_seconds", 3_600.0)), _LONGEST_BACKOFF), least)
    return {
        "max_attempts": -1,
        "min_backoff": {"seconds": least},
        "max_backoff": {"seconds": most},
        "max_doublings": int(options.get("max_doublings", 16)),
    }


def chunks(
    made: Sequence[tuple[QueuedTask, dict[str, Any]]],
) -> Iterable[tuple[str, Sequence[tuple[QueuedTask, dict[str, Any]]]]]:
    """Yield tasks of one queue each, so many as a batch takes; their order within a queue stays."""
    queues: dict[str, list[tuple[QueuedTask, dict[str, Any]]]] = {}
    for each in made:
        queues.setdefault(each[0].queue, []).append(each)
    for queue, tasks in queues.items():
        chunk: list[tuple[QueuedTask, dict[str, Any]]] = []
        size = 0
        for each in tasks:
            length = len(each[0].token) + _ROOM
            if chunk and (len(chunk) == _BATCH or size + length > _BATCH_BYTES):
                yield queue, chunk
                chunk, size = [], 0
            chunk.append(each)
            size += length
        yield queue, chunk


def is_queue_name(text: str) -> bool:
    """Whether Cloud Tasks can have a queue of this name."""
    return _QUEUE.fullmatch(text) is not None


def is_time(text: str) -> bool:
    """Whether a header's text is a time of ours."""
    return _TIME.fullmatch(text) is not None
