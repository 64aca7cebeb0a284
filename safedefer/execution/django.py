"""Django's connections around a run, where the process uses Django; nothing is imported.

A connection belongs to a thread. Django closes the broken and the old ones at the begin and the end of a request. A run is
no request: after one disconnect by the server every later task of the thread would fail.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Final

_log: Final = logging.getLogger("safedefer")


def close_old_connections() -> None:
    """Close this thread's connections that are broken or too old. Raises nothing.

    In a ``TestCase`` none is closed: Django would take the test's own transaction for one that the application left open.
    """
    if (database := _database()) is not None:
        try:
            if not any(is_of_testcase(each) for each in database.connections.all(initialized_only=True)):
                database.close_old_connections()
        except Exception as error:  # noqa: BLE001  # the task may not use it
            _log.error("Django's connections cannot be closed (%s)", type(error).__name__)


async def close_old_async() -> None:
    """Do the same in the thread in which coroutines of this loop use Django's connections."""
    asgiref = sys.modules.get("asgiref.sync")
    if asgiref is not None and _database() is not None:
        await asgiref.sync_to_async(close_old_connections, thread_sensitive=True)()


def is_of_testcase(connection: Any) -> bool:
    """Whether the outermost ``atomic`` of a connection is that of a ``TestCase``."""
    blocks: list[Any] = getattr(connection, "atomic_blocks", [])
    return bool(blocks) and getattr(blocks[0], "_from_testcase", False)


def is_used() -> bool:
    """Whether this process uses Django: it is loaded and configured."""
    return _database() is not None


def _database() -> Any:
    """Return ``django.db``; None where it is not loaded, or Django is not configured."""
    database, conf = sys.modules.get("django.db"), sys.modules.get("django.conf")
    settings = getattr(conf, "settings", None)  # another thread may import the module now
    configured = settings is not None and settings.configured and hasattr(database, "close_old_connections")
    return database if configured else None
