"""Blobs: where the tokens of oversize tasks are kept (App Engine: a datastore entry).

A blob is opaque bytes under a random id. The signed pointer that names it carries its SHA-256 and
length, so whoever writes the store gains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Blob:
    """The stored token of an oversize task."""

    id: str
    """``[A-Za-z0-9_-]{16,64}``, random."""
    data: bytes


class BlobStore(Protocol):
    """Reads and deletes blobs. They are written by ``enqueue_many`` in the task's own transaction, and go when the task ends."""

    def get(self, blob_id: str) -> bytes | None:
        """Return the bytes, or None if there are none. Raises ``QueueUnavailable``."""
        ...

    def delete(self, blob_id: str) -> None:
        """Delete a blob; nothing happens if there is none. Raises ``QueueUnavailable``."""
        ...
