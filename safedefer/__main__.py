"""``python -m safedefer`` is ``safedefer``."""

from __future__ import annotations

from safedefer.cli import main

if __name__ == "__main__":
    main(prog_name="safedefer")
