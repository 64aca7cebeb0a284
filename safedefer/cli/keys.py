"""``safedefer keys``: makes keys."""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime

import click

from safedefer.errors import ConfigurationError
from safedefer.keys import MIN_SECRET_BYTES, Key
from safedefer.token import encode_segment


@click.group()
def keys() -> None:
    """Make keys."""


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
