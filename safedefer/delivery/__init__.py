"""The receiving end: one request becomes one answer."""

from __future__ import annotations

from safedefer.delivery.handler import (
    CONTENT_TYPES,
    OUTCOME_HEADER,
    QUEUE_HEADER,
    RETRY_HEADER,
    Delivery,
    DeliveryOptions,
    Response,
    redacted_traceback,
)

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
