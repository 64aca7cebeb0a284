"""The headers of one delivery, and the check of the stored values that become a part of the request."""

from __future__ import annotations

import re
from functools import lru_cache, partial
from typing import Final

from safedefer.errors import InvalidTaskError
from safedefer.headers import ATTEMPT_HEADER, CONTENT_TYPE, QUEUE_HEADER, RETRY_HEADER, AttemptHeaders, Hints
from safedefer.options import Options
from safedefer.queues.base import Lease, QueuedTask

_SLUG: Final = re.compile("[a-z0-9-]{1,100}")
_TRACE: Final = re.compile("[0-9a-f-]{1,100}")
_TRACE_HEADER: Final = "traceparent"
#: Names and ids. ``Options`` says what is wrong with any other text.
_NAME: Final = re.compile("[a-zA-Z0-9_-]{1,500}")


def delivery_headers(lease: Lease) -> AttemptHeaders:
    """Return the headers of one delivery, made when they are first read: a handler in this process reads ``hints`` only.

    Raises:
        InvalidTaskError: As ``attempt_headers``.
    """
    _check_hints(lease.task)
    hints = Hints(None, CONTENT_TYPE, lease.task.queue, lease.retries, attempt=lease.attempts + 1)
    return AttemptHeaders(hints, partial(attempt_headers, lease))


def attempt_headers(lease: Lease) -> dict[str, str]:
    """Return the headers of one delivery (App Engine's, with the task's own).

    Raises:
        InvalidTaskError: The storage holds a value that no ``defer()`` wrote, and that could change the meaning of
            the request.
    """
    task = lease.task
    _check_hints(task)
    headers = {
        **task.headers,
        "Content-Type": CONTENT_TYPE,
        QUEUE_HEADER: task.queue,
        "X-AppEngine-TaskName": task.name or task.id,
        RETRY_HEADER: str(lease.retries),
        ATTEMPT_HEADER: str(lease.attempts + 1),
        "X-AppEngine-TaskExecutionCount": str(lease.executions),
        "X-AppEngine-TaskETA": f"{task.eta:.6f}",
    }
    if lease.previous_response is not None:
        headers["X-AppEngine-TaskPreviousResponse"] = str(lease.previous_response)
    if lease.retry_reason is not None and _SLUG.fullmatch(lease.retry_reason):
        headers["X-AppEngine-TaskRetryReason"] = lease.retry_reason
    return headers


def _check_hints(task: QueuedTask) -> None:
    name, headers = task.name or task.id, task.headers
    if _NAME.fullmatch(name) is None:
        Options(name=name)
    if not headers:
        _check_destination(task.queue, task.target, task.url)
        return
    others = dict(headers)
    trace = others.pop(_TRACE_HEADER, None)  # defer() writes it, not its caller
    if trace is not None and _TRACE.fullmatch(trace) is None:
        raise InvalidTaskError("the stored trace is not one; defer the task anew")
    Options(queue=task.queue, target=task.target, url=str(task.url), headers=others)


@lru_cache(maxsize=1024)
def _check_destination(queue: str, target: str, url: str) -> None:
    """Check the destination of a task, once for all tasks with the same one."""
    Options(queue=queue, target=target, url=str(url))
