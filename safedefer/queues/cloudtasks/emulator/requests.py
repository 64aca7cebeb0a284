"""What requests carry, read and checked: queues, tasks, retry configurations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from safedefer.queues.cloudtasks.emulator.errors import ApiError, invalid
from safedefer.queues.cloudtasks.emulator.resources import QueueEntry, RetryConfig, TaskEntry
from safedefer.queues.cloudtasks.emulator.values import (
    blob,
    choice,
    duration,
    message,
    number,
    queue_name,
    queue_of_task,
    text,
    timestamp,
)

#: Bytes of a task; Google's pages say 1 MB and 100 KB.
HTTP_TASK_BYTES: Final = 1_048_569
APP_ENGINE_TASK_BYTES: Final = 102_400
#: Seconds ahead that a task may be scheduled.
MAX_AHEAD: Final = 30 * 86_400.0
_METHODS: Final = {1: "POST", 2: "GET", 3: "HEAD", 4: "PUT", 5: "DELETE", 6: "PATCH", 7: "OPTIONS"}
_HEADER_BYTES: Final = 80 * 1024
_URL_CHARACTERS: Final = 2_083
_MOST: Final = 2**31 - 1
_SHORTEST: Final = 15.0
_LONGEST: Final = {"httpRequest": 1_800.0, "appEngineHttpRequest": 86_415.0}
_DEADLINE: Final = 600.0
_RETRY_FIELDS: Final = frozenset({"maxAttempts", "maxRetryDuration", "minBackoff", "maxBackoff", "maxDoublings"})
_RATE_FIELDS: Final = frozenset({"maxDispatchesPerSecond", "maxBurstSize", "maxConcurrentDispatches"})
_ROUTING_FIELDS: Final = frozenset({"service", "version", "instance", "host"})
_QUEUE_FIELDS: Final = frozenset({
    "name", "rateLimits", "retryConfig", "appEngineRoutingOverride", "httpTarget", "state", "purgeTime",
    "stackdriverLoggingConfig",
})  # fmt: skip
_TASK_FIELDS: Final = frozenset({
    "name", "httpRequest", "appEngineHttpRequest", "scheduleTime", "dispatchDeadline", "retryConfig", "createTime",
    "dispatchCount", "responseCount", "firstAttempt", "lastAttempt", "view",
})  # fmt: skip


def read_retry(value: object, base: RetryConfig | None = None) -> RetryConfig:
    """Return a retry configuration; members that are not given are those of ``base``, or the defaults.

    Raises:
        ApiError: It is wrong.
    """
    given, found = message(value, "retryConfig", _RETRY_FIELDS), base or RetryConfig()
    if "maxAttempts" in given:
        found = replace(found, max_attempts=int(number(given["maxAttempts"], "maxAttempts", least=-1, most=_MOST)))
    if "maxDoublings" in given:
        found = replace(found, max_doublings=int(number(given["maxDoublings"], "maxDoublings", least=0, most=_MOST)))
    found = replace(
        found,
        max_retry_duration=_whole(given, "maxRetryDuration", found.max_retry_duration),
        min_backoff=_whole(given, "minBackoff", found.min_backoff),
        max_backoff=_whole(given, "maxBackoff", found.max_backoff),
    )
    if found.min_backoff > found.max_backoff:
        raise invalid("minBackoff is above maxBackoff")
    return found


def _whole(given: Mapping[str, Any], name: str, otherwise: float) -> float:
    """Return a duration, truncated to whole seconds; ``otherwise`` where none is given."""
    if name not in given:
        return otherwise
    seconds = float(math.floor(duration(given[name], name)))
    if seconds < 0:
        raise invalid(f"{name} is negative")
    return seconds


def read_queue(
    value: object, *, parent: str | None = None, base: QueueEntry | None = None, mask: Sequence[str] = ()
) -> QueueEntry:
    """Return the queue of a CreateQueue or UpdateQueue.

    Args:
        value: The queue in the request.
        parent: The location that it must be in.
        base: The queue as it is.
        mask: What is updated; empty is everything.

    Raises:
        ApiError: It is wrong.
    """
    given = message(value, "queue", _QUEUE_FIELDS)
    name = queue_name(given.get("name"))
    if parent is not None and name.rpartition("/queues/")[0] != parent:
        raise invalid("the queue's name is not in the location of the request")
    if "httpTarget" in given:
        raise ApiError("UNIMPLEMENTED", "the emulator has no httpTarget of queues")
    rates = message(given.get("rateLimits"), "rateLimits", _RATE_FIELDS)
    routing = message(given.get("appEngineRoutingOverride"), "appEngineRoutingOverride", _ROUTING_FIELDS)
    found = QueueEntry(name=name) if base is None else replace(base, burst=0)
    fresh = QueueEntry(name=name)
    if _is_meant(mask, "rateLimits.maxDispatchesPerSecond"):
        rate = rates.get("maxDispatchesPerSecond", fresh.rate)
        found.rate = number(rate, "maxDispatchesPerSecond", least=1e-9, most=500)
    if _is_meant(mask, "rateLimits.maxConcurrentDispatches"):
        concurrent = rates.get("maxConcurrentDispatches", fresh.concurrent)
        found.concurrent = int(number(concurrent, "maxConcurrentDispatches", least=1, most=5_000))
    if any(_is_meant(mask, f"retryConfig.{each}") for each in _RETRY_FIELDS):
        part = message(given.get("retryConfig"), "retryConfig", _RETRY_FIELDS)
        meant = {each: part[each] for each in part if _is_meant(mask, f"retryConfig.{each}")}
        whole = _is_meant(mask, "retryConfig")
        found.retry = read_retry(meant, None if whole else found.retry)
    if _is_meant(mask, "appEngineRoutingOverride"):
        found.routing = {each: text(routing[each], each) for each in routing if each != "host"}
    return found


def _is_meant(mask: Sequence[str], path: str) -> bool:
    """Whether an update mask has a field, by its own path or by that of a message that it is in."""
    return not mask or any(path == each or path.startswith(f"{each}.") for each in mask)


def read_task(value: object, queue: str, *, now: float, make_id: str) -> tuple[TaskEntry, bool]:
    """Return the task of a CreateTask, and whether the request names it.

    Args:
        value: The task in the request.
        queue: The queue's name.
        now: Seconds since the epoch.
        make_id: The id of a task that is not named.

    Raises:
        ApiError: It is wrong.
    """
    given = message(value, "task", _TASK_FIELDS)
    named = bool(given.get("name"))
    name = text(given["name"], "name") if named else f"{queue}/tasks/{make_id}"
    if queue_of_task(name) != queue:
        raise invalid("the queue in the task's name is not that of the request")
    kinds = [kind for kind in _LONGEST if kind in given]
    if len(kinds) != 1:
        raise invalid("a task has either httpRequest or appEngineHttpRequest")
    kind = kinds[0]
    request = _read_http(given[kind]) if kind == "httpRequest" else _read_app_engine(given[kind])
    schedule = timestamp(given["scheduleTime"], "scheduleTime") if "scheduleTime" in given else now
    if schedule > now + MAX_AHEAD:
        raise invalid("scheduleTime is over 30 days ahead")
    task = TaskEntry(
        name=name,
        kind=kind,
        request=request,
        schedule=max(schedule, now),
        created=now,
        deadline=_read_deadline(given.get("dispatchDeadline"), kind),
        retry=read_retry(given["retryConfig"]) if "retryConfig" in given else None,
    )
    size, limit = _size(task), HTTP_TASK_BYTES if task.is_http else APP_ENGINE_TASK_BYTES
    if size > limit:
        raise invalid(f"Task size too large: {size} bytes, the most are {limit}")
    return task, named


def _read_deadline(value: object, kind: str) -> float:
    if value is None:
        return _DEADLINE
    seconds, longest = math.floor(duration(value, "dispatchDeadline") * 1000) / 1000, _LONGEST[kind]
    if kind == "appEngineHttpRequest" and seconds == 0:
        return _DEADLINE
    if not _SHORTEST <= seconds <= longest:
        raise invalid(f"dispatchDeadline must be from {_SHORTEST:g} s to {longest:g} s")
    return seconds


def _read_http(value: object) -> dict[str, Any]:
    given = message(value, "httpRequest", {"url", "httpMethod", "headers", "body", "oauthToken", "oidcToken"})
    url = text(given.get("url", ""), "url")
    if not url.startswith(("http://", "https://")):
        raise invalid("HttpRequest.url must begin with http:// or https://")
    if len(url) > _URL_CHARACTERS:
        raise invalid(f"HttpRequest.url has over {_URL_CHARACTERS} characters")
    found = {"url": url, **_read_common(given, bodies=("POST", "PUT", "PATCH"))}
    if "oauthToken" in given and "oidcToken" in given:
        raise invalid("a request has either oauthToken or oidcToken")
    if "oauthToken" in given:
        raise ApiError("UNIMPLEMENTED", "the emulator makes no OAuth tokens: they are for Google's own APIs")
    if "oidcToken" in given:
        token = message(given["oidcToken"], "oidcToken", {"serviceAccountEmail", "audience"})
        if "@" not in text(token.get("serviceAccountEmail", ""), "serviceAccountEmail"):
            raise invalid("oidcToken.serviceAccountEmail must be an e-mail address")
        found["oidcToken"] = {each: text(token[each], each) for each in token}
    return found


def _read_app_engine(value: object) -> dict[str, Any]:
    known = {"httpMethod", "appEngineRouting", "relativeUri", "headers", "body"}
    given = message(value, "appEngineHttpRequest", known)
    path = text(given.get("relativeUri", ""), "relativeUri") or "/"
    if not path.startswith("/") or " " in path or len(path) > _URL_CHARACTERS:
        raise invalid(f"relativeUri begins with /, has no spaces, and up to {_URL_CHARACTERS} characters")
    routing = message(given.get("appEngineRouting"), "appEngineRouting", _ROUTING_FIELDS)
    found = {"relativeUri": path, **_read_common(given, bodies=("POST", "PUT"))}
    if routing:
        found["appEngineRouting"] = {each: text(routing[each], each) for each in routing if each != "host"}
    return found


def _read_common(given: Mapping[str, Any], *, bodies: Sequence[str]) -> dict[str, Any]:
    method = choice(given["httpMethod"], "httpMethod", _METHODS) if given.get("httpMethod") else "POST"
    headers = given.get("headers", {})
    if not isinstance(headers, dict) or not all(isinstance(each, str) for each in headers.values()):
        raise invalid("headers is not a map of strings")
    if sum(len(name.encode()) + len(each.encode()) for name, each in headers.items()) >= _HEADER_BYTES:
        raise invalid("the headers have 80 KB or more")
    found: dict[str, Any] = {"httpMethod": method, "headers": headers}
    if given.get("body"):
        if method not in bodies:
            raise invalid(f"a request of the method {method} has no body")
        blob(given["body"], "body")
        found["body"] = given["body"]
    return found


def _size(task: TaskEntry) -> int:
    request = task.request
    body = blob(request["body"], "body") if "body" in request else b""
    parts = (task.name, request.get("url", ""), request.get("relativeUri", ""))
    headers = sum(len(name.encode()) + len(each.encode()) for name, each in request["headers"].items())
    return len(body) + headers + sum(len(each.encode()) for each in parts)
