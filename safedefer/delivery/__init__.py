"""The receiving end: one request becomes one answer.

The handler is imported when it is first asked for: a process that only defers needs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safedefer.delivery.options import DeliveryOptions
from safedefer.headers import CONTENT_TYPES, OUTCOME_HEADER, QUEUE_HEADER, RETRY_HEADER, Response

if TYPE_CHECKING:
    from safedefer.delivery.handler import Delivery
    from safedefer.delivery.redaction import redacted_traceback

__all__ = [
    "CONTENT_TYPES",
    "OUTCOME_HEADER",
    "QUEUE_HEADER",
    "RETRY_HEADER",
    "Delivery",
    "DeliveryOptions",
    "Response",
    "redacted_traceback",
]


def __getattr__(name: str) -> Any:
    if name not in {"Delivery", "redacted_traceback"}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from safedefer.delivery import handler  # noqa: PLC0415

    return getattr(handler, name)
