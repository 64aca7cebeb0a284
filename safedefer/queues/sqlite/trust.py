"""What a queue's file must be before it is used: nobody else's to change, and with the schema that the migrations make.

A trigger, a column or an index that somebody adds stays in the file, and SQLite runs it inside this process: one on the
ledger makes it forget, and tasks run again. The user's own tables, indexes, triggers and views may be in the file, as
long as none of them but a view names a table of the queue. What counts is the statement that SQLite parses, and not what the
columns beside it say.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import closing
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

import apsw

from safedefer.errors import QueueUnavailable
from safedefer.queues.file_owner import trouble_with_owner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: The file, and those beside it that SQLite takes for a part of it: it replays a log that it finds.
_PARTS: Final = ("", "-wal", "-shm", "-journal")
#: What SQLite takes for a space: another one, such as U+00A0, is a part of a name.
_SPACES: Final = re.compile(r"[ \t\n\f\r]+")
_VIEW: Final = re.compile(r"create\s+view\s", re.IGNORECASE)
_RESTORE: Final = "restore the file from a backup, or use another file"


#: What is written to one of two such tables changes the other: the ledger could be one.
_SHARED_PAGES: Final = "SELECT 1 FROM sqlite_schema WHERE rootpage <> 0 GROUP BY rootpage HAVING count(*) > 1 LIMIT 1"


class _Item(NamedTuple):
    """A row of ``sqlite_schema``."""

    kind: str
    name: str
    table: str
    sql: str | None


class _Schema(NamedTuple):
    items: frozenset[_Item]
    names: frozenset[str]
    mention: re.Pattern[str]
    """Finds a table of the queue in a statement."""


def sqlite_release() -> tuple[int, ...]:
    """Return the release of the SQLite library that opens queues."""
    return tuple(map(int, apsw.sqlite_lib_version().split(".")))


def check_file(path: str) -> None:
    """Check who may change the file and those beside it. They are looked at and not opened: that would drop locks.

    Raises:
        QueueUnavailable: One of them belongs to somebody else, may be written by anybody, or is a symbolic link, or one beside the
            file has another name too.
    """
    for suffix in _PARTS:
        part = path + suffix
        try:
            status = os.lstat(part)
        except FileNotFoundError:
            continue
        trouble = trouble_with_owner("the queue's file", part, status)
        if trouble is None and stat.S_ISLNK(status.st_mode):
            trouble = f"the queue's file {part!a} is a symbolic link; remove it, and name the file that is meant"
        if trouble is None and suffix and status.st_nlink > 1:
            # SQLite would write over the file of the other name.
            trouble = f"the queue's file {part!a} is a hard link; remove it if the queue is not open anywhere"
        if trouble is None and status.st_mode & stat.S_IWOTH:
            trouble = f"the queue's file {part!a} may be changed by anybody; run `chmod o-w {part!a}`"
        if trouble is not None:
            raise QueueUnavailable(trouble)


def check_schema(connection: apsw.Connection, path: str, migrate: Callable[[apsw.Connection], object]) -> None:
    """Compare the schema of a file with the one that the migrations make.

    Args:
        connection: To the file, whose schema is of the current version.
        path: The file, for the message.
        migrate: Makes the tables in an empty database.

    Raises:
        QueueUnavailable: Something of the queue's is missing or changed, or something else names its tables.
    """
    schema = _made_by(migrate)
    try:
        found = _items(connection)
    except UnicodeDecodeError:
        raise _refused(path, "a schema that is not UTF-8", _RESTORE) from None
    if connection.execute(_SHARED_PAGES).get is not None:
        raise _refused(path, "two tables or indexes in the same pages", _RESTORE)
    if found == schema.items:
        return
    for item in sorted(found - schema.items, key=str):
        sql = str(item.sql or "")
        named = item.name.lower() in schema.names or item.table.lower() in schema.names
        if named and item.kind in {"trigger", "index"} and item.name.lower() not in schema.names:
            drop = f'DROP {item.kind.upper()} "{item.name}"'
            raise _refused(path, f'the {item.kind} "{item.name}" on {item.table}', f"run {drop} if it is not an attack")
        if named:
            raise _refused(path, f"another {item.kind} {item.name} than the queue's own", _RESTORE)
        if not isinstance(item.sql, str | None) or (schema.mention.search(sql) and not _VIEW.match(sql)):
            raise _refused(
                path,
                f'the {item.kind} "{item.name}", which names a table of the queue',
                f'run DROP {item.kind.upper()} "{item.name}" if it can be missed, or use another file for the queue',
            )
    for item in sorted(schema.items - found, key=str):
        raise _refused(path, f"no {item.kind} {item.name}, or another one", _RESTORE)


def _refused(path: str, what: str, remedy: str) -> QueueUnavailable:
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in what)
    return QueueUnavailable(f"the queue's file {path} has {shown}, which safedefer did not make; {remedy}")


@lru_cache(maxsize=1)
def _made_by(migrate: Callable[[apsw.Connection], object]) -> _Schema:
    with closing(apsw.Connection(":memory:")) as connection:
        migrate(connection)
        items = _items(connection)
    tables = {item.name for item in items if item.kind == "table" and not item.name.startswith("sqlite_")}
    mention = re.compile(rf"(?<![\w$])(?:{'|'.join(map(re.escape, sorted(tables)))})(?![\w$])", re.IGNORECASE)
    names = frozenset(item.name.lower() for item in items if not item.name.startswith("sqlite_"))
    return _Schema(items, names, mention)


def _items(connection: apsw.Connection) -> frozenset[_Item]:
    rows: Iterable[tuple[str, str, str, str | None]] = connection.execute(
        "SELECT type, name, tbl_name, sql FROM sqlite_schema"
    )
    return frozenset(_Item(str(kind), str(name), str(table), _one_line(sql)) for kind, name, table, sql in rows)


def _one_line(sql: str | None) -> str | None:
    """Return a statement with one space where there were more: how it was laid out says nothing."""
    return _SPACES.sub(" ", sql).strip(" ") if isinstance(sql, str) else sql
