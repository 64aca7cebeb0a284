"""Names, times and durations of the API as JSON has them (protobuf's JSON format)."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Container, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from safedefer.queues.cloudtasks.emulator.errors import invalid

_LOCATION: Final = r"projects/[A-Za-z0-9:.-]+/locations/[A-Za-z0-9-]+"
LOCATION_NAME: Final = re.compile(_LOCATION)
QUEUE_NAME: Final = re.compile(rf"({_LOCATION})/queues/[A-Za-z0-9-]{{1,100}}")
TASK_NAME: Final = re.compile(rf"({_LOCATION}/queues/[A-Za-z0-9-]{{1,100}})/tasks/[A-Za-z0-9_-]{{1,500}}")
_DURATION: Final = re.compile(r"(-?[0-9]{1,12}(?:\.[0-9]{1,9})?)s")
_TIME: Final = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2})(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


def message(value: object, where: str, fields: Container[str]) -> dict[str, Any]:
    """Return a JSON object whose members are all known; None is an empty one.

    Raises:
        ApiError: It is no object, or has a member that the API does not know.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid(f"{where} is not an object")
    for name in value:
        if name not in fields:
            raise invalid(f"Invalid JSON payload received. Unknown name {name!r} at {where}: no such field")
    return {name: each for name, each in value.items() if each is not None}


def text(value: object, where: str) -> str:
    """Return a string.

    Raises:
        ApiError: It is none.
    """
    if not isinstance(value, str):
        raise invalid(f"{where} is not a string")
    return value


def number(value: object, where: str, *, least: float, most: float) -> float:
    """Return a number, which JSON may also have as a string.

    Raises:
        ApiError: It is none, or out of range.
    """
    try:
        found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except ValueError:
        found = None
    if found is None or not least <= found <= most:
        raise invalid(f"{where} must be a number from {least:g} to {most:g}")
    return found


def choice(value: object, where: str, names: Mapping[int, str]) -> str:
    """Return the name of an enum's value, which is given by name or by number.

    Raises:
        ApiError: The enum does not have it.
    """
    if isinstance(value, str) and value in names.values():
        return value
    if type(value) is int and value in names:
        return names[value]
    raise invalid(f"{where} has no value {value!r}")


def duration(value: object, where: str) -> float:
    """Return seconds of ``3.5s``.

    Raises:
        ApiError: It is no duration.
    """
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise invalid(f"{where} is not a duration such as 3.5s")
    return float(match[1])


def timestamp(value: object, where: str) -> float:
    """Return seconds since the epoch of an RFC 3339 time, truncated to microseconds.

    Raises:
        ApiError: It is no time.
    """
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    try:
        if match is not None:
            zone = "+00:00" if match[3] in "Zz" else match[3]
            fraction = f"{(match[2] or '.0')[1:7]:0<6}"
            return datetime.fromisoformat(f"{match[1]}.{fraction}{zone}").timestamp()
    except ValueError:
        pass
    raise invalid(f"{where} is not an RFC 3339 time")


def blob(value: object, where: str) -> bytes:
    """Return the bytes of base64, of either alphabet.

    Raises:
        ApiError: It is no base64.
    """
    given = text(value, where).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(given + "=" * (-len(given) % 4), validate=True)
    except binascii.Error:
        raise invalid(f"{where} is not base64") from None


def time_text(seconds: float) -> str:
    """Return a time as JSON has it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def duration_text(seconds: float) -> str:
    """Return a duration as JSON has it."""
    return f"{seconds:.9f}".rstrip("0").rstrip(".") + "s"


def queue_name(value: object) -> str:
    """Return a queue's name.

    Raises:
        ApiError: It is none.
    """
    if not isinstance(value, str) or QUEUE_NAME.fullmatch(value) is None:
        raise invalid('Queue name must be formatted: "projects/PROJECT_ID/locations/LOCATION_ID/queues/QUEUE_ID"')
    return value


def queue_of_task(value: object) -> str:
    """Return the queue's name in that of a task.

    Raises:
        ApiError: It is no task's name.
    """
    match = TASK_NAME.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise invalid(
            'Task name must be formatted: "projects/PROJECT_ID/locations/LOCATION_ID/queues/QUEUE_ID/tasks/TASK_ID"; '
            "a task's id has 1 to 500 letters, numbers, hyphens or underscores"
        )
    return match[1]
