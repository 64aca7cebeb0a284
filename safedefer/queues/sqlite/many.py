"""One statement for several rows of values.

Each statement, and each step of one, lets go of the interpreter and waits for it again. While the event loop is busy it gives
it up once a turn: a batch of twenty rows that took twenty steps would take twenty turns.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from safedefer.queues.sqlite.connection import SQL

if TYPE_CHECKING:
    from collections.abc import Sequence

    import apsw

_ROW: Final = re.compile(r"(?<=VALUES )\([?, ]+\)")
#: The most rows of one statement; SQLite takes 32,766 values.
_MOST: Final = 256


def execute_rows(connection: apsw.Connection, name: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Execute a named statement, which has one row of values (``VALUES (?, ?)``), with all these rows."""
    for first in range(0, len(rows), _MOST):
        part = rows[first : first + _MOST]
        connection.execute(_statement(name, len(part)), tuple(chain.from_iterable(part)))


@lru_cache(maxsize=1024)
def _statement(name: str, rows: int) -> str:
    return _ROW.sub(lambda row: ", ".join([row[0]] * rows), SQL[name], count=1)
