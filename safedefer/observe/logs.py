"""Logs: the task that a line is of, and lines of JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from typing import Any, Final

from safedefer.execution.context import CURRENT

__all__ = ["JsonFormatter", "TaskFilter"]

#: What every log record has; the rest was given as ``extra``.
_USUAL: Final = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "safedefer"})
_TEXT: Final = "%(asctime)s %(levelname)s %(name)s%(of_task)s: %(message)s"


class TaskFilter(logging.Filter):
    """Adds the running task to log records, or that of the event of a line: ``%(task_id)s`` and ``%(task_callable)s``, else empty.

    Put it on a handler, not on a logger: ``handler.addFilter(TaskFilter())``. It lets every record pass.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the attributes."""
        task = CURRENT.get()
        record.task_id = _text_of_event(record, "task_id") if task is None else task.id
        record.task_callable = _text_of_event(record, "callable") if task is None else task.callable
        return True


def _text_of_event(record: logging.LogRecord, name: str) -> str:
    """Return a text of the event of a line; nothing where a new line in it, which the storage may hold, would begin another."""
    value: object = getattr(getattr(record, "safedefer", None), name, "")
    return value if type(value) is str and value.isprintable() else ""


class _TextFormatter(logging.Formatter):
    """Writes a line for people: that of a task's own names the task, as the lines about events do by themselves."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        task = None if hasattr(record, "safedefer") else CURRENT.get()
        record.of_task = "" if task is None else f" [{task.id} {task.callable}]"
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """Writes a log record as one line of JSON.

    The members are ``time`` (UTC, ISO 8601), ``level``, ``logger``, ``message``, ``task_id`` and ``task_callable`` where a task
    runs or an event is of one, ``exception`` if there is one, and what was given as ``extra`` and is a text, a number or a
    truth value. A line about an event has its name in ``event``, and its fields.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        document: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in (*vars(record).items(), *_fields_of(getattr(record, "safedefer", None))):
            if name not in _USUAL and type(value) in {str, int, float, bool} and value != "":  # 0 is shown
                document.setdefault(name, value)
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document)


def _fields_of(event: object) -> Iterator[tuple[str, object]]:
    """Give name and value of what an event says."""
    if not is_dataclass(event) or isinstance(event, type):
        return
    yield "event", type(event).__name__
    for each in fields(event):
        yield ("task_callable" if each.name == "callable" else each.name), getattr(event, each.name)


def configure_log(*, verbose: bool, as_json: bool) -> None:
    """Let a command log to standard error, unless a handler is there already.

    Args:
        verbose: Log from INFO on, not from WARNING.
        as_json: Write lines of JSON; the banners of processes are among them.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else _TextFormatter(_TEXT))
    handler.addFilter(TaskFilter())
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    if as_json:
        logging.getLogger("safedefer.process").setLevel(logging.INFO)


def is_json() -> bool:
    """Whether the root logger writes lines of JSON: then nothing else may be on standard error."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)
