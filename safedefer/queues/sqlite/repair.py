r"""Makes readable what somebody else wrote into the file: text that is no UTF-8, and values that the columns do not take.

SQLite stores any bytes as text, and reading such a text fails, and with it every row beside it. The bytes that are no
UTF-8 are written out instead (``\xff``), for good: a row has one name, also for who asks for the rows after it. Who writes
the file past SQLite's checks stores values of any type in any column; they are converted to the type of the column.
"""

from __future__ import annotations

from functools import lru_cache
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from safedefer.queues.sqlite.connection import SQL

if TYPE_CHECKING:
    from collections.abc import Sequence

    import apsw

_TABLES: Final = (
    "tasks", "dead", "ended", "attempts", "ledger", "names", "controls", "blobs", "kept", "notices", "copies",
)  # fmt: skip
#: By the declared type of a column: the types of its values, and what a value of another type becomes.
_KINDS: Final = {
    # With a backslash, as no id, name or queue of ours has: it takes nobody's place.
    "TEXT": ("'text'", r"'\' || quote(substr({0}, 1, 100))"),
    "INTEGER": ("'integer'", "CAST({0} AS INTEGER)"),
    "REAL": ("'real', 'integer'", "CAST({0} AS REAL)"),
    "BLOB": ("'blob'", "CAST({0} AS BLOB)"),
}

_Row = TypeVar("_Row", bound="Sequence[Any]")

TEXT: Final = frozenset({str})
WHOLE: Final = frozenset({int})
NUMBER: Final = frozenset({float, int})
BYTES: Final = frozenset({bytes})
OR_NONE: Final = frozenset({NoneType})


MOST_SEQ: Final = 2**53
"""No task of ours has a larger number. After 2**63 - 1 SQLite would have none for a new row."""
#: Rows are numbered anew so far above those before: whoever waits for a task knows the largest number there was.
_STEP: Final = 2**32
#: No row has a larger number after a repair, and room is left for the numbers that it gives.
_MOST_REPAIRED: Final = MOST_SEQ - 2**40


class BadValue(Exception):  # it is not raised to callers
    """A row has a value that its column does not take. ``mend`` converts it."""


class Kinds:
    """The types that the values of a row may have, by column."""

    def __init__(self, *kinds: frozenset[type]) -> None:
        self._kinds = kinds
        # Nearly all rows have the types of one before; whoever writes the file can make rows of any.
        self._fit = lru_cache(maxsize=256)(self._fits)

    def __add__(self, other: Kinds) -> Kinds:
        """Return the types of rows with more columns."""
        return Kinds(*self._kinds, *other._kinds)

    def __len__(self) -> int:
        """Return the number of columns."""
        return len(self._kinds)

    def check(self, row: _Row) -> _Row:
        """Return a row whose values have these types.

        Raises:
            BadValue: One has not.
        """
        if not self._fit(tuple(map(type, row))):
            raise BadValue
        return row

    def _fits(self, types: tuple[type, ...]) -> bool:
        return all(found in kind for found, kind in zip(types, self._kinds, strict=True))


def number(value: object) -> float | None:
    """Return a number or None as it is.

    Raises:
        BadValue: It is something else.
    """
    if value is not None and not isinstance(value, int | float):
        raise BadValue
    return value


def mend(connection: apsw.Connection) -> None:
    """Mend all texts, values and numbers of rows, within a transaction: for when reading has failed."""
    _number_anew(connection)
    count_blobs(connection)
    # Where it is known already it must not be made again: statements may be under way.
    if connection.execute("SELECT 1 FROM pragma_function_list WHERE name = 'safedefer_mended'").get is None:
        connection.create_scalar_function("safedefer_mended", _mended, 1)
    for table in _TABLES:
        described = connection.execute(f"PRAGMA table_info(safedefer_{table})").fetchall()
        for _, name, kind, *_ in described:
            types, converted = _KINDS[str(kind)]
            connection.execute(
                f"UPDATE OR REPLACE safedefer_{table} SET {name} = {converted.format(name)} "  # noqa: S608 - our names
                f"WHERE typeof({name}) NOT IN ({types}, 'null')"
            )
        texts = [name for _, name, kind, *_ in described if kind == "TEXT"]
        mended = ", ".join(f"{name} = coalesce(safedefer_mended(CAST({name} AS BLOB)), {name})" for name in texts)
        broken = " OR ".join(f"safedefer_mended(CAST({name} AS BLOB)) IS NOT NULL" for name in texts)
        # What is mended has a backslash, as no id, name or queue of ours has: it takes nobody's place.
        connection.execute(f"UPDATE OR REPLACE safedefer_{table} SET {mended} WHERE {broken}")  # noqa: S608 - our names


def count_blobs(connection: apsw.Connection) -> None:
    """Count the bytes of all blobs anew."""
    connection.execute(SQL["totals_delete"])
    connection.execute(SQL["totals_count"])


def _number_anew(connection: apsw.Connection) -> None:
    """Number the tasks whose number is none of ours, and go on from there."""
    values = {"most": _MOST_REPAIRED, "step": _STEP}
    if connection.execute(SQL["numbers_bad"], values).get is None:
        return
    connection.execute("PRAGMA defer_foreign_keys = ON")  # until the transaction ends
    for name in ("numbers_of_blobs", "numbers_of_tasks"):
        connection.execute(SQL[name], values)
    connection.execute(SQL["numbers_go_on"], values)


def _mended(*values: object) -> str | None:
    """Return the text of some bytes; None if nothing is wrong with them."""
    (data,) = values
    if not isinstance(data, bytes):  # NULL
        return None
    try:
        data.decode()
    except UnicodeDecodeError:
        return data.decode(errors="backslashreplace")
    return None
