"""The statements of ``schema.sql`` and ``statements.sql`` by name, and the encoding of their parameters.

Batches travel as text, not as arrays: asyncpg inspects each element of an array several times, and 200 rows of five
columns took it more than a millisecond.
"""

from __future__ import annotations

from datetime import timedelta
from secrets import token_hex
from typing import TYPE_CHECKING, Final

import orjson

from safedefer.queues.sql import load_statements

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SQL: Final = load_statements(__file__)
"""The statements by the names in their ``-- name:`` lines."""

_NO_TIME: Final = timedelta()
_MOST_SECONDS: Final = 1e9


#: The year 9999: what no ``datetime`` can say is no time.
_LATEST: Final = 253_402_300_799.0


def moment(seconds: float) -> float:
    """Return a time of the database between 1970 and 9999: somebody may have stored infinity."""
    return min(max(seconds, 0.0), _LATEST)


def interval(seconds: float) -> timedelta:
    """Return seconds as an ``interval`` parameter, limited to 31 years either way."""
    if not seconds:
        return _NO_TIME
    return timedelta(seconds=min(max(seconds, -_MOST_SECONDS), _MOST_SECONDS))


def changed_rows(status: object) -> int:
    """Return the number of rows in a command status (``UPDATE 3``)."""
    return int(str(status).rpartition(" ")[2])


def joined(*columns: Sequence[str]) -> tuple[str, ...]:
    """Return a separator, and each column as one text joined by it: parameters of ``string_to_array``."""
    separator = "\x1f"
    texts = [separator.join(column) for column in columns]
    if any(text.count(separator) != len(column) - 1 for text, column in zip(texts, columns, strict=True)):
        separator = f"\x1f{token_hex(16)}\x1f"  # random: no value can contain it
        texts = [separator.join(column) for column in columns]
    return separator, *texts


def to_json(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows as the parameter of ``json_to_recordset``."""
    return orjson.dumps(rows).decode()
