"""The tables ``safedefer_outbox`` and ``safedefer_once`` in a user's database: found, judged and created.

Another role of a PostgreSQL database may have made a table of that name, in a schema of its own or in one that all may
create in. A trigger, a rule, a row policy or the predicate of an index would then run that role's code as whoever uses
the table. So a table is used only if

- its owner is the role of this connection, a superuser, or the owner of the database (the relay: the first only),
- its schema belongs to one of these: the owner of a schema can rename it, and put another in its place,
- it is an ordinary table, without heirs, triggers, rules and row security, and with our columns, and
- nobody else may create triggers on it.

``search_path`` also decides which functions and operators an unqualified name means. Every statement that runs on a
connection of the user's names the schema of each table, function, operator and type, and does not change the path.

SQLite has no roles: who can write to the file can write to all its tables. There the checks keep a row from being
swallowed by a view or a trigger, and the relay from running in a circle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from safedefer.errors import BadTransactionStateError
from safedefer.transactions.savepoints import Savepoint

if TYPE_CHECKING:
    from safedefer.transactions.databases.base import Source

#: OIDs of ``text``, ``varchar`` and ``float8``, the same on every server.
_TEXT: Final = frozenset({"25", "1043"})
_NUMBER: Final = frozenset({"701"})


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Form:
    """The columns and indexes of one of the tables."""

    name: str
    columns: Mapping[str, frozenset[str]]
    """The types of each column in PostgreSQL, by OID."""
    create: Sequence[str]
    """Statements with ``{...}`` for what differs between databases, see ``provide``."""
    added: frozenset[str] = frozenset()
    """Columns that a table may lack which an earlier release made."""


OUTBOX: Final = Form(
    "safedefer_outbox",
    {"id": _TEXT, "created": _NUMBER, "task": _TEXT, "environment": _TEXT},
    (
        """
        CREATE TABLE {unless} {schema}.safedefer_outbox (
            id VARCHAR(64) NOT NULL PRIMARY KEY, created DOUBLE PRECISION NOT NULL, task {text} NOT NULL,
            environment VARCHAR(100)
        )
        """,
    ),
    frozenset({"environment"}),
)
ONCE: Final = Form(
    "safedefer_once",
    {"effect": _TEXT, "expires": _NUMBER},
    (
        """
        CREATE TABLE {unless} {schema}.safedefer_once (
            effect VARCHAR(720) NOT NULL PRIMARY KEY, expires DOUBLE PRECISION NOT NULL
        )
        """,
        "CREATE INDEX {unless} {index} ON {table} (expires)",
    ),
)

_TRUSTED: Final = """
    SELECT role.oid FROM pg_catalog.pg_roles AS role
    WHERE role.rolsuper OR role.rolname OPERATOR(pg_catalog.=) current_user
    OR role.rolname OPERATOR(pg_catalog.=) 'pg_database_owner'
    OR role.oid OPERATOR(pg_catalog.=) (
        SELECT base.datdba FROM pg_catalog.pg_database AS base
        WHERE base.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()
    )
"""
# The tables of a name on the path, in that schema (:schema), and those of this role elsewhere.
_LOOK: Final = f"""
    WITH trusted (oid) AS ({_TRUSTED}), path (schemas) AS (SELECT pg_catalog.current_schemas(false))
    SELECT
        n.nspname, CAST(c.oid AS pg_catalog.int8),
        pg_catalog.array_position(path.schemas, n.nspname), path.schemas[1] OPERATOR(pg_catalog.=) n.nspname,
        owner.rolname, current_user, owner.rolname OPERATOR(pg_catalog.=) current_user,
        EXISTS (SELECT FROM trusted WHERE trusted.oid OPERATOR(pg_catalog.=) c.relowner),
        EXISTS (SELECT FROM trusted WHERE trusted.oid OPERATOR(pg_catalog.=) n.nspowner),
        c.relkind OPERATOR(pg_catalog.=) 'r' AND NOT c.relispartition AND NOT EXISTS (
            SELECT FROM pg_catalog.pg_inherits AS heir
            WHERE heir.inhrelid OPERATOR(pg_catalog.=) c.oid OR heir.inhparent OPERATOR(pg_catalog.=) c.oid
        ),
        EXISTS (SELECT FROM pg_catalog.pg_trigger AS t WHERE t.tgrelid OPERATOR(pg_catalog.=) c.oid),
        EXISTS (SELECT FROM pg_catalog.pg_rewrite AS rule WHERE rule.ev_class OPERATOR(pg_catalog.=) c.oid),
        c.relrowsecurity OR c.relforcerowsecurity,
        EXISTS (
            SELECT FROM pg_catalog.aclexplode(c.relacl) AS may
            WHERE may.privilege_type OPERATOR(pg_catalog.=) 'TRIGGER'
            AND may.grantee OPERATOR(pg_catalog.<>) c.relowner
            AND NOT EXISTS (SELECT FROM trusted WHERE trusted.oid OPERATOR(pg_catalog.=) may.grantee)
        ),
        pg_catalog.has_schema_privilege(n.oid, 'USAGE'::pg_catalog.text)
        AND pg_catalog.has_table_privilege(c.oid, 'SELECT'::pg_catalog.text)
        AND pg_catalog.has_table_privilege(c.oid, 'UPDATE'::pg_catalog.text)
        AND pg_catalog.has_table_privilege(c.oid, 'DELETE'::pg_catalog.text),
        pg_catalog.has_table_privilege(c.oid, 'INSERT'::pg_catalog.text),
        (
            SELECT pg_catalog.string_agg(
                pg_catalog.concat(
                    CASE WHEN a.attname OPERATOR(pg_catalog.~) '^[a-z]+$' THEN a.attname ELSE '?' END,
                    ' ', a.atttypid::pg_catalog.int8, ' ', a.attgenerated
                ), ','::pg_catalog.text
            )
            FROM pg_catalog.pg_attribute AS a
            WHERE a.attrelid OPERATOR(pg_catalog.=) c.oid AND a.attnum OPERATOR(pg_catalog.>) 0 AND NOT a.attisdropped
        )
    FROM pg_catalog.pg_class AS c
    JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace
    JOIN pg_catalog.pg_roles AS owner ON owner.oid OPERATOR(pg_catalog.=) c.relowner
    CROSS JOIN path
    WHERE c.relname OPERATOR(pg_catalog.=) '{{table}}' AND c.relpersistence OPERATOR(pg_catalog.<>) 't'
    AND (
        pg_catalog.array_position(path.schemas, n.nspname) IS NOT NULL
        OR owner.rolname OPERATOR(pg_catalog.=) current_user
        OR n.nspname OPERATOR(pg_catalog.=) CAST(:schema AS pg_catalog.text)::pg_catalog.name
    )
    ORDER BY 3, 1
"""  # noqa: S608 - of constants
_CURRENT: Final = "SELECT pg_catalog.current_schema()"

_LOOK_SQLITE: Final = """
    SELECT type, rootpage, (
        SELECT count(*) FROM (
            SELECT type, tbl_name FROM main.sqlite_master UNION ALL SELECT type, tbl_name FROM temp.sqlite_master
        ) WHERE type = 'trigger' AND lower(tbl_name) = '{table}'
    ), lower(sql) LIKE '%check%' OR EXISTS (
        SELECT 1 FROM pragma_index_list('{table}', 'main') AS i, pragma_index_xinfo(i.name, 'main') AS part
        WHERE i.partial OR part.cid < -1
    ) FROM main.sqlite_master WHERE lower(name) = '{table}' AND type IN ('table', 'view')
"""
_COLUMNS_SQLITE: Final = "PRAGMA main.table_xinfo({table})"
#: Changes nothing, runs no trigger and no view, and takes the write lock of the file.
_LOCK_SQLITE: Final = "INSERT INTO main.{table} ({column}) SELECT NULL WHERE 0"

#: The queue's own database has the mark of the queue, in a table of a role whose code may run as this one: the queue's
#: statements call functions in the schema.
_HAS_MARK: Final = f"""
    WITH trusted (oid) AS ({_TRUSTED})
    SELECT 1 FROM pg_catalog.pg_namespace AS n
    JOIN pg_catalog.pg_class AS c ON c.relnamespace OPERATOR(pg_catalog.=) n.oid
        AND c.relname OPERATOR(pg_catalog.=) 'settings' AND c.relkind OPERATOR(pg_catalog.=) 'r'
        AND NOT c.relrowsecurity
    JOIN pg_catalog.pg_attribute AS a ON a.attrelid OPERATOR(pg_catalog.=) c.oid
        AND a.attname OPERATOR(pg_catalog.=) 'marker' AND NOT a.attisdropped
    WHERE n.nspname OPERATOR(pg_catalog.=) 'safedefer'
    AND EXISTS (SELECT FROM trusted WHERE trusted.oid OPERATOR(pg_catalog.=) n.nspowner)
    AND EXISTS (SELECT FROM trusted WHERE trusted.oid OPERATOR(pg_catalog.=) c.relowner)
    AND pg_catalog.has_schema_privilege(n.oid, 'USAGE'::pg_catalog.text)
    AND pg_catalog.has_table_privilege(c.oid, 'SELECT'::pg_catalog.text)
"""  # noqa: S608 - as above
_READ_MARK: Final = "SELECT marker FROM ONLY safedefer.settings"


class Table(NamedTuple):
    """A table that was found."""

    name: str
    """With its schema, quoted."""
    schema: str
    """Its schema; ``main`` in SQLite."""
    oid: int
    on_path: bool
    is_current: bool
    """Whether it is in the schema where a new table would be made."""
    owner: str
    role: str
    """The role that looked."""
    is_own: bool
    is_trusted: bool
    columns: frozenset[str]
    may_empty: bool
    may_insert: bool
    flaw: str | None
    """Why it is not used, whoever owns it, with the remedy."""

    @property
    def refusal(self) -> str | None:
        """Why a producer does not write to it; None if it does."""
        if not self.is_trusted:
            return (
                f"{self.name} belongs to {self.owner}, whose code it could run as {self.role}; drop it, give it to "
                f"{self.role} (ALTER TABLE ... OWNER TO), or put a schema of your own first in search_path"
            )
        if self.flaw is None and not self.may_insert:
            return f"{self.role} may not write to {self.name}; GRANT INSERT on it"
        return self.flaw


async def look(source: Source, form: Form, schema: str | None = None) -> list[Table]:
    """Find the tables of a form: those on the search path in its order, that of ``schema``, other ones of this role."""
    if source.dialect == "sqlite":
        return await _look_sqlite(source, form)
    rows = await source.rows(_LOOK.format(table=form.name), {"schema": schema or ""})
    return [_table(form, row) for row in rows]


def _table(form: Form, row: Sequence[object]) -> Table:
    (name, oid, place, current, owner, role, own, trusted, schema_trusted, plain, triggers, rules, policies, grants,
     may_empty, may_insert, columns) = row  # fmt: skip
    schema, table = str(name), f"{quote(str(name))}.{form.name}"
    types = dict((each.split(" ", 1)) for each in str(columns or "").split(",") if each)
    flaw = None
    if not plain:
        flaw = f"{table} is no ordinary table, or has heirs; create it as docs/how-to/transactions.md has it"
    elif not _fits(form, types):
        flaw = f"{table} has other columns than ours; rename it, or create it as docs/how-to/transactions.md has it"
    elif triggers:
        flaw = f"{table} has a trigger, whose code would run as {role}; drop it"
    elif rules:
        flaw = f"{table} has a rule, whose code would run as {role}; drop it"
    elif policies:
        flaw = f"{table} has row security, whose code would run as {role}; disable it"
    elif grants:
        flaw = f"others may create triggers on {table}, whose code would run as {role}; REVOKE TRIGGER on it from them"
    elif not schema_trusted:
        flaw = (
            f"the schema of {table} belongs to another role, which could put another table in its place; use one that "
            f"belongs to {role} or to the owner of the database"
        )
    return Table(
        table, schema, int(str(oid)), place is not None, bool(current), str(owner), str(role), bool(own), bool(trusted),
        frozenset(types), bool(may_empty), bool(may_insert), flaw,
    )  # fmt: skip


def _fits(form: Form, types: Mapping[str, str]) -> bool:
    known = {name: {f"{kind} " for kind in kinds} for name, kinds in form.columns.items()}
    return set(types) | form.added == set(known) and all(kind in known[name] for name, kind in types.items())


async def _look_sqlite(source: Source, form: Form) -> list[Table]:
    found = await source.rows(_LOOK_SQLITE.format(table=form.name))
    if not found:
        return []
    kind, page, triggers, expressions = found[0]
    columns = await source.rows(_COLUMNS_SQLITE.format(table=form.name))
    names, flaw = frozenset(str(column[1]) for column in columns), None
    if kind != "table" or not page:
        flaw = f"{form.name} is no ordinary table; drop it"
    elif triggers:
        flaw = f"{form.name} has a trigger; drop it"
    elif expressions:  # calculated for each row: one of them may take a gigabyte
        flaw = f"{form.name} has a CHECK, or an index of an expression or with a condition; drop it"
    elif names | form.added != set(form.columns) or any(column[6] for column in columns):
        flaw = f"{form.name} has other columns than ours; rename it, or create it as docs/how-to/transactions.md has it"
    return [Table(f"main.{form.name}", "main", 0, True, True, "", "", True, True, names, True, True, flaw)]


async def provide(source: Source, form: Form) -> tuple[Table, bool]:
    """Return the table that a producer writes to, created where it is missing; and whether it was there.

    The first on the search path whose owner is trusted. One of another role is passed over, unless it is where ours would
    have to be made.

    Raises:
        BadTransactionStateError: It cannot be used or created; the transaction can go on.
    """
    if source.dialect == "sqlite" and not await _lock_sqlite(source, form):
        return await _create_sqlite(source, form), False
    found = _chosen(await look(source, form))
    if found is not None:
        return found, True
    schema = (await source.rows(_CURRENT))[0][0]
    if schema is None:
        raise BadTransactionStateError(f"there is no schema in search_path to create {form.name} in; set it to one")
    return await _create(source, form, quote(str(schema)))


def _chosen(tables: Sequence[Table]) -> Table | None:
    usable = [table for table in tables if table.on_path and (table.is_trusted or table.is_current)]
    usable.sort(key=lambda table: not table.is_trusted)  # those of others last
    if not usable:
        return None
    if usable[0].refusal is not None:
        raise BadTransactionStateError(usable[0].refusal)
    return usable[0]


async def _lock_sqlite(source: Source, form: Form) -> bool:
    """Wait for the write lock before anything is read; False if there is no such table to write to.

    SQLite lets a transaction that has read not wait for another writer: "database is locked", at once, however long the
    busy timeout of the connection is.
    """
    try:
        await source.execute(_LOCK_SQLITE.format(table=form.name, column=next(iter(form.columns))))
    except Exception:  # noqa: BLE001  # whatever library; what creates the table says what is wrong
        return False
    return True


async def _create_sqlite(source: Source, form: Form) -> Table:
    # SQLite creates an index in the database that stands before its own name.
    where = {"schema": "main", "table": form.name, "index": f"main.{form.name}_expires"}
    try:
        for statement in form.create:
            await source.execute(statement.format(unless="IF NOT EXISTS", text="TEXT", **where))
    except Exception:
        _chosen(await look(source, form))  # refuses what has the table's name and is none of ours
        raise
    made = _chosen(await look(source, form))
    assert made is not None, "its own transaction has just made it"
    return made


async def _create(source: Source, form: Form, schema: str) -> tuple[Table, bool]:
    # PostgreSQL creates an index in the schema of its table.
    where = {"schema": schema, "table": f"{schema}.{form.name}", "index": f"{form.name}_expires"}
    statements = [statement.format(unless="", text="pg_catalog.text", **where) for statement in form.create]
    failure: Exception | None = None
    # Two that create at once: the second waits for the first one's commit, fails, and finds it then.
    for _ in range(2):
        try:
            async with Savepoint(source):
                for statement in statements:
                    await source.execute(statement)
                made = _chosen(await look(source, form))
                if made is not None:
                    return made, False
        except BadTransactionStateError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever library
            failure = error
        found = _chosen(await look(source, form))
        if found is not None:
            return found, True
    raise BadTransactionStateError(
        f"the table {form.name} is missing and cannot be created here ({type(failure).__name__}); create it by hand, see "
        "docs/how-to/transactions.md, or let this user create tables"
    ) from failure


async def read_mark(source: Source) -> str | None:
    """Return the mark of the queue whose own database this is; None if it is none, or none that may be trusted."""
    if not await source.rows(_HAS_MARK):
        return None
    marks = [str(row[0]) for row in await source.rows(_READ_MARK)]
    return marks[0] if len(marks) == 1 else None


def quote(name: str) -> str:
    """Return a name of PostgreSQL's in quotes, in characters that no driver takes for a parameter."""
    if re.fullmatch(r"[A-Za-z0-9_]+", name):
        return f'"{name}"'
    return 'U&"' + "".join(c if re.fullmatch("[A-Za-z0-9_]", c) else f"\\+{ord(c):06x}" for c in name) + '"'
