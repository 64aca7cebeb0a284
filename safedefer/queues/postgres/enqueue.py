"""Enqueue: the parameters of the statement that admits and inserts tasks (``Statements.enqueue``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safedefer.queues.postgres.rows import entrypoint, write_hints
from safedefer.queues.postgres.statements import interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safedefer.queues.base import QueuedTask


def enqueue_values(tasks: Sequence[QueuedTask], *, blob_limit: int) -> tuple[object, ...]:
    """Return the parameters, $1 to $13.

    pgqueuer's: arrays of priority, entrypoint, payload, execute_after, dedupe_key and headers. Those of ``admit``: arrays of
    name, created, unique key, blob id and blob, each None where no task has one; the limit of blobs; the queues.
    """
    named = any(task.name is not None for task in tasks)
    unique = any(task.unique_key is not None for task in tasks)
    oversize = any(task.blob is not None for task in tasks)
    return (
        [0] * len(tasks),
        [entrypoint(task.queue, task.eta - task.created) for task in tasks],
        [task.token for task in tasks],
        # An interval, added to the database's clock: clocks of producers need not agree with it.
        [interval(task.eta - task.created) for task in tasks],
        [task.id for task in tasks],
        [write_hints(task) for task in tasks],
        [task.name for task in tasks] if named else None,
        [float(task.created) for task in tasks] if named else None,  # an array has one type: no int beside float
        [task.unique_key for task in tasks] if unique else None,
        [None if task.blob is None else task.blob.id for task in tasks] if oversize else None,
        [None if task.blob is None else task.blob.data for task in tasks] if oversize else None,
        blob_limit,
        [task.queue for task in tasks],
    )
