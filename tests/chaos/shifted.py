"""``python -m tests.chaos.shifted SECONDS AFTER command...``: safedefer with a clock that jumps."""

from __future__ import annotations

import sys
import time

if __name__ == "__main__":
    shift, after = float(sys.argv[1]), float(sys.argv[2])
    real, began = time.time, time.monotonic()
    time.time = lambda: real() + (shift if time.monotonic() - began > after else 0.0)
    from safedefer.cli import main

    main(sys.argv[3:])
