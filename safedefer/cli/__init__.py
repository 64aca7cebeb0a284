"""The command line: ``safedefer``."""

from __future__ import annotations

from safedefer.cli.root import main

__all__ = ["main"]
