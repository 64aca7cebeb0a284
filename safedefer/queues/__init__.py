"""Queues, and the one way to open one from a URL."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

from safedefer.errors import ConfigurationError
from safedefer.queues.memory import MemoryQueue
from safedefer.queues.sqlite import SQLiteQueue

if TYPE_CHECKING:
    from safedefer.queues.base import PullQueue, StorageOptions

__all__ = ["open_queue"]

_FORMS: Final = "sqlite:///relative.db, sqlite:////absolute.db or memory://"


def open_queue(url: str, storage: StorageOptions | None = None) -> PullQueue:
    """Return the queue that a URL names: ``sqlite:///relative.db``, ``sqlite:////absolute.db``, ``memory://``.

    Percent-escapes in the path are decoded. Raises ``ConfigurationError`` for anything else.
    """
    options = {} if storage is None else asdict(storage)
    parts = urlsplit(url)
    if parts.scheme in ("postgresql", "postgres"):
        raise ConfigurationError(f"this version of safedefer has no PostgreSQL engine; use {_FORMS}")
    if parts.query or parts.fragment:
        raise ConfigurationError(f"a queue's URL has no options (? or #: write them as %3F and %23); use {_FORMS}")
    if parts.scheme == "memory":
        if parts.netloc or parts.path not in ("", "/"):
            raise ConfigurationError("a memory queue has no name; use memory://")
        return MemoryQueue(**options)
    if parts.scheme == "sqlite":
        if parts.netloc:
            raise ConfigurationError(f"the path of a sqlite URL begins after three slashes; use {_FORMS}")
        return SQLiteQueue(unquote(parts.path.removeprefix("/")), **options)
    raise ConfigurationError(f"no queue has URLs of the scheme {parts.scheme!r}; use {_FORMS}")
