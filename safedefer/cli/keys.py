"""``safedefer keys``: makes keys, and lists those of an App by their ids."""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime
from typing import Any, Final

import click

from safedefer.cli.common import app_option, load_app
from safedefer.cli.options import json_option
from safedefer.cli.terminal import Column, show_table
from safedefer.cli.text import many
from safedefer.errors import ConfigurationError
from safedefer.keys import MIN_SECRET_BYTES, Key
from safedefer.token import encode_segment

_COLUMNS: Final = Column("KID"), Column("STATE", whole=True), Column("QUEUES"), Column("PATTERNS"), Column("PICKLES")


@click.group()
def keys() -> None:
    """Make and list keys."""


@keys.command("new")
@click.option("--kid", default=None, help="The key's name in tokens; not secret.")
@click.option("--jwk", is_flag=True, help="Print a JWK Set for SAFEDEFER_KEYS_FILE instead.")
def keys_new(*, kid: str | None, jwk: bool) -> None:
    """Print a new key, in the form that SAFEDEFER_KEYS takes."""
    if kid is None:
        kid = f"{datetime.now(UTC):k%Y%m%d}-{secrets.token_hex(2)}"
    raw = secrets.token_bytes(MIN_SECRET_BYTES)
    try:
        Key(kid, raw)  # the rule of every kid is its own
    except ConfigurationError as error:
        raise click.BadParameter(f"{error}; choose such a name, or leave --kid out", param_hint="--kid") from error
    secret = encode_segment(raw).decode()
    if jwk:
        key = {"kty": "oct", "kid": kid, "alg": "HS256", "k": secret, "safedefer_state": "active"}
        click.echo(json.dumps({"keys": [key]}, indent=2))
    else:
        click.echo(f"SAFEDEFER_KEYS={kid}:{secret}")


@keys.command("list")
@app_option
@json_option
def keys_list(*, app: str | None, as_json: bool) -> None:
    """List the App's keys: ids, states and limits, never secrets. The active one signs."""
    found = [_document(key) for key in load_app(app).keyring.keys]
    if as_json:
        for each in found:
            click.echo(json.dumps(each))
        return
    rows = [tuple(_words(value) for value in each.values()) for each in found]
    if not show_table(_COLUMNS, rows, many(len(found), "key")):
        for row in rows:
            click.echo("  ".join(row))


def _document(key: Key) -> dict[str, Any]:
    return {
        "kid": key.kid,
        "state": str(key.state),
        "queues": None if key.queues is None else sorted(key.queues),
        "patterns": None if key.patterns is None else list(key.patterns),
        "pickle": key.pickle,
    }


def _words(value: object) -> str:
    """Return a limit in words."""
    if value is None:
        return "any"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return {True: "pickles", False: "no pickles"}.get(value, "") if isinstance(value, bool) else str(value)
