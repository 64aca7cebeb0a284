"""Log lines of a task that an engine buries as poison; ``rules`` says when it does."""

from __future__ import annotations

import logging
from typing import Final

from safedefer.queues.rules import POISON, LostDelivery

_log: Final = logging.getLogger("safedefer")


def log_burial(task_id: str, reason: str, lost: LostDelivery) -> None:
    """Log that a task is a dead letter because its process died, or hung, while it ran."""
    if reason != POISON:
        text = (
            "task %a is dead (%s), attempts: %d; the process died or hung while it ran; `safedefer dead show` says more"
        )
        _log.error(text, task_id, reason, lost.counters.attempts)
        return
    _log.error(
        "task %a is a dead letter (poison): %d times in a row its run began and the process died or hung before its end; "
        "look what it does to the process, and run it again with `safedefer tasks retry`",
        task_id,
        lost.losses,
    )
