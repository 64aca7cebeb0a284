"""SQL in files of its own: statements under ``-- name:`` lines."""

from __future__ import annotations

import re
from pathlib import Path


def load_statements(module: str) -> dict[str, str]:
    """Return the statements of ``schema.sql`` and ``statements.sql`` beside a module, by their names.

    Args:
        module: The module's ``__file__``.
    """
    statements: dict[str, str] = {}
    for file in ("schema.sql", "statements.sql"):
        text = Path(module).with_name(file).read_text(encoding="utf-8")
        parts = re.split(r"^-- name: (\w+)$", text, flags=re.MULTILINE)
        statements.update({name: body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)})
    return statements
