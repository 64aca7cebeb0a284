"""SQL in files of its own: statements under ``-- name:`` lines."""

from __future__ import annotations

import re
from pathlib import Path


def load_statements(file: str) -> dict[str, str]:
    """Return the statements of a file in this folder by their names."""
    text = Path(__file__).with_name(file).read_text(encoding="utf-8")
    parts = re.split(r"^-- name: (\w+)$", text, flags=re.MULTILINE)
    return {name: body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)}
