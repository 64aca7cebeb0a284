"""The sending end: leases due tasks and delivers them."""

from __future__ import annotations

from safedefer.dispatcher.loop import (
    MAX_BACKOFF,
    MAX_DOUBLINGS,
    MIN_BACKOFF,
    REJECT_LIMIT,
    REJECT_SECONDS,
    Deliver,
    Dispatcher,
    DispatcherOptions,
    HttpDelivery,
    InProcessDelivery,
    Interrupted,
    Unreachable,
    asks_to_wait,
    attempt_headers,
    backoff,
    gives_up,
    judge,
)

__all__ = [
    "MAX_BACKOFF",
    "MAX_DOUBLINGS",
    "MIN_BACKOFF",
    "REJECT_LIMIT",
    "REJECT_SECONDS",
    "Deliver",
    "Dispatcher",
    "DispatcherOptions",
    "HttpDelivery",
    "InProcessDelivery",
    "Interrupted",
    "Unreachable",
    "asks_to_wait",
    "attempt_headers",
    "backoff",
    "gives_up",
    "judge",
]
