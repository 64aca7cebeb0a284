"""What every engine says of a task that it buries because its runs ended no delivery."""

from __future__ import annotations

import logging
from typing import Final

_log: Final = logging.getLogger("safedefer")


def log_burial(task_id: str, losses: int) -> None:
    """Log that a task is a dead letter because process after process died, or hung, while it ran."""
    _log.error(
        "task %a is a dead letter (poison): %d times in a row its run began and the process died or hung before its end; "
        "look what it does to the process, and run it again with `safedefer tasks retry`",
        task_id,
        losses,
    )
