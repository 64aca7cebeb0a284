"""The blobs, in the queue's PostgreSQL database."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safedefer.queues.postgres.statements import SQL

if TYPE_CHECKING:
    from safedefer.queues.postgres.store import PostgresStore


class PostgresBlobs:
    """A ``BlobStore`` in the queue's database. Every method may raise ``QueueUnavailable``."""

    def __init__(self, store: PostgresStore) -> None:
        self._store = store

    def get(self, blob_id: str) -> bytes | None:
        """Return the bytes of a blob, or None if there is none."""
        rows = self._store.run(lambda connection: connection.fetch(SQL["blob_get"], blob_id), idempotent=True)
        return bytes(rows[0]["data"]) if rows else None

    def delete(self, blob_id: str) -> None:
        """Delete a blob; nothing happens if there is none."""
        self._store.run(lambda connection: connection.fetch(SQL["blobs_drop"], [blob_id]))
