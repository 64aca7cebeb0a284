r"""Makes readable what somebody else wrote into the file: text that is no UTF-8, which this library never writes.

SQLite stores any bytes as text, and reading such a text fails, and with it every row beside it. The bytes that are no
UTF-8 are written out instead (``\xff``), for good: a row has one name, also for who asks for the rows after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import apsw

_TABLES: Final = ("tasks", "dead", "ended", "attempts", "ledger", "names", "controls", "blobs")


def mend(connection: apsw.Connection) -> None:
    """Mend all texts, within a transaction. Reads every row but the tokens: for when reading has failed."""
    connection.create_scalar_function("safedefer_mended", _mended, 1)
    for table in _TABLES:
        described = connection.execute(f"PRAGMA table_info(safedefer_{table})").fetchall()
        texts = [name for _, name, kind, *_ in described if kind == "TEXT"]
        mended = ", ".join(f"{name} = coalesce(safedefer_mended(CAST({name} AS BLOB)), {name})" for name in texts)
        broken = " OR ".join(f"safedefer_mended(CAST({name} AS BLOB)) IS NOT NULL" for name in texts)
        # What is mended has a backslash, as no id, name or queue of ours has: it takes nobody's place.
        connection.execute(f"UPDATE OR REPLACE safedefer_{table} SET {mended} WHERE {broken}")  # noqa: S608 - our names


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
