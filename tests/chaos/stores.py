"""What the queue of a scenario is stored in, and how a scenario looks into it from outside."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

import apsw
import psycopg

from tests.postgres.server import Given, Server, shared_server


class SqliteFile:
    """A file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tasks.db"
        self.url = f"sqlite:///{self.path}"

    def close(self) -> None:
        """The folder goes, and the file with it."""

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Read from the file, by another connection."""
        if not self.path.exists():
            return []
        connection = apsw.Connection(str(self.path), flags=apsw.SQLITE_OPEN_READWRITE)
        connection.set_busy_timeout(60_000)
        try:
            return connection.execute(sql).fetchall()
        finally:
            connection.close()

    def left(self) -> int:
        return int(self.query("SELECT count(*) FROM safedefer_tasks")[0][0])

    def held(self) -> int:
        return int(self.query("SELECT count(*) FROM safedefer_tasks WHERE owner IS NOT NULL")[0][0])

    def is_free(self) -> bool:
        """Whether nobody is within a transaction that writes."""
        connection = apsw.Connection(str(self.path), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            connection.execute("BEGIN IMMEDIATE; ROLLBACK")
        except apsw.BusyError:
            return False
        finally:
            connection.close()
        return True

    def charged(self) -> tuple[int, int]:
        """Return the attempts and the deliveries of all that waits."""
        ((attempts, deliveries),) = self.query(
            "SELECT coalesce(sum(attempts), 0), coalesce(sum(deliveries), 0) FROM safedefer_tasks"
        )
        return attempts, deliveries

    def attempts(self) -> Counter[int]:
        """Return how many tasks ended with how many charged attempts."""
        return Counter(dict(self.query("SELECT attempts, count(*) FROM safedefer_ended GROUP BY attempts")))  # type: ignore[arg-type]

    def dead(self, callable_name: str) -> list[tuple[str, int]]:
        """Return the reasons and attempts of the dead letters of one callable."""
        return self.query(f"SELECT reason, attempts FROM safedefer_dead WHERE callable_name LIKE '%{callable_name}'")  # type: ignore[return-value]

    def everything(self) -> set[tuple[Any, ...]]:
        """Return what a settlement could change."""
        return set(
            self.query("""
            SELECT 'ended', id, state, attempts, ended FROM safedefer_ended
            UNION ALL SELECT 'dead', id, reason, attempts, ended FROM safedefer_dead
            UNION ALL SELECT 'task', id, owner, attempts, due FROM safedefer_tasks
            UNION ALL SELECT 'ledger', task_id, state, uncharged, until FROM safedefer_ledger
            """)
        )

    def wrong(self) -> list[str]:
        """Return what must not be: the file is whole, and no blob is without its task."""
        found = []
        if self.query("PRAGMA integrity_check") != [("ok",)] or self.query("PRAGMA foreign_key_check"):
            found.append("the file is damaged")
        oversize = self.query("SELECT count(*) FROM safedefer_tasks WHERE blob_id IS NOT NULL")
        if self.query("SELECT count(*) FROM safedefer_blobs") != oversize:
            found.append("blobs are left without their tasks")
        return found


_numbers: Final = itertools.count(1)

_LIVE: Final = "SELECT dedupe_key FROM safedefer.pgqueuer WHERE status IN ('queued', 'picked')"
_IMPOSSIBLE: Final = {
    "two jobs of one task": f"SELECT dedupe_key FROM ({_LIVE}) AS live GROUP BY dedupe_key HAVING count(*) > 1",
    "both waiting and ended": f"SELECT id FROM safedefer.ended WHERE id IN ({_LIVE})",
    "both waiting and dead": f"SELECT id FROM safedefer.dead WHERE id IN ({_LIVE})",
    "both dead and ended": "SELECT id FROM safedefer.dead WHERE id IN (SELECT id FROM safedefer.ended)",
    "a blob without its task": f"SELECT id FROM safedefer.blobs WHERE task_id NOT IN ({_LIVE})",
    "a unique key without its task": f"SELECT task_id FROM safedefer.uniques WHERE task_id NOT IN ({_LIVE})",
    "counters without their job": """SELECT job_id FROM safedefer.progress
        WHERE job_id NOT IN (SELECT id FROM safedefer.pgqueuer)""",
    "the sum of the blobs": """SELECT 1 WHERE (SELECT coalesce(sum(bytes), 0) FROM safedefer.blob_totals)
        != (SELECT coalesce(sum(length), 0) FROM safedefer.blobs)""",
    "ended, and the ledger does not know": """SELECT id FROM safedefer.ended AS e WHERE NOT EXISTS (
        SELECT FROM safedefer.ledger AS l WHERE l.audience = split_part(e.headers->>'safedefer', ' ', 5)
            AND l.task_id = e.id AND l.state = e.state)""",
    "dead, and the ledger does not know": """SELECT id FROM safedefer.dead AS d WHERE NOT EXISTS (
        SELECT FROM safedefer.ledger AS l WHERE l.audience = d.audience AND l.task_id = d.id AND l.state = 'failed')""",
    "a name that nobody has": f"""SELECT name FROM safedefer.names WHERE until IS NULL
        AND name NOT IN (SELECT headers->'safedefer_more'->>'name' FROM safedefer.pgqueuer
                         WHERE headers->'safedefer_more'->>'name' IS NOT NULL AND dedupe_key IN ({_LIVE}))""",
}


class PostgresDatabase:
    """A database of its own, on a server that is shared unless one is given."""

    def __init__(self, server: Server | Given | None = None) -> None:
        self._server = server or shared_server()
        self._name = f"safedefer_chaos_{os.getpid()}_{next(_numbers)}"
        with psycopg.connect(self._server.dsn(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {self._name}")
        self.url = self._server.dsn(self._name)
        command = [sys.executable, "-m", "safedefer", "migrate", "--queue", self.url]
        subprocess.run(command, check=True, capture_output=True)

    def close(self) -> None:
        with contextlib.suppress(psycopg.Error), psycopg.connect(self._server.dsn(), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {self._name} WITH (FORCE)")

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.url, autocommit=True, application_name="chaos")

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Read, by another connection."""
        with self.connect() as connection:
            return connection.execute(sql.encode()).fetchall()

    def left(self) -> int:
        return int(self.query("SELECT count(*) FROM safedefer.pgqueuer WHERE status IN ('queued', 'picked')")[0][0])

    def held(self) -> int:
        return int(self.query("SELECT count(*) FROM safedefer.pgqueuer WHERE status = 'picked'")[0][0])

    def is_free(self) -> bool:
        """True: the server ends a transaction that stands still."""
        return True

    def charged(self) -> tuple[int, int]:
        ((attempts, deliveries),) = self.query(
            "SELECT coalesce(sum(attempts), 0)::int, coalesce(sum(deliveries), 0)::int FROM safedefer.progress"
        )
        return attempts, deliveries

    def attempts(self) -> Counter[int]:
        return Counter(dict(self.query("SELECT attempts, count(*) FROM safedefer.ended GROUP BY attempts")))  # type: ignore[arg-type]

    def tried_again(self) -> list[tuple[Any, ...]]:
        """Return the records of what was charged more than one attempt."""
        return self.query("""
            SELECT task_id, started, ended, outcome, status, reason, exception_type FROM safedefer.attempts
            WHERE task_id IN (SELECT id FROM safedefer.ended WHERE attempts > 1) ORDER BY task_id, seq LIMIT 20
        """)

    def dead(self, callable_name: str) -> list[tuple[str, int]]:
        return self.query(f"SELECT reason, attempts FROM safedefer.dead WHERE callable_name LIKE '%{callable_name}'")  # type: ignore[return-value]

    def everything(self) -> set[tuple[Any, ...]]:
        return set(
            self.query("""
            SELECT 'ended', id, state, attempts, ended::text FROM safedefer.ended
            UNION ALL SELECT 'dead', id, reason, attempts, ended::text FROM safedefer.dead
            UNION ALL SELECT 'job', dedupe_key, status::text, attempts, updated::text FROM safedefer.pgqueuer
            UNION ALL SELECT 'progress', job_id::text, retry_reason, attempts, deliveries::text FROM safedefer.progress
            UNION ALL SELECT 'ledger', task_id, state, uncharged::int, until::text FROM safedefer.ledger
            """)
        )

    def wrong(self) -> list[str]:
        """Return what must not be in the tables."""
        return [f"{name}: {rows[:3]}" for name, sql in _IMPOSSIBLE.items() if (rows := self.query(sql))]


Store = SqliteFile | PostgresDatabase


def make_store(kind: str, folder: Path) -> Store:
    """Return a new store: of kind ``sqlite`` or ``postgres``."""
    return SqliteFile(folder) if kind == "sqlite" else PostgresDatabase()
