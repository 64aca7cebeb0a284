"""What is done with a row of any outbox: is it a task of this application's, and does the queue take it?

The outbox carries opaque bytes, like the queue: nothing here can decode, import or run a task.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

from safedefer.errors import Error, QueueUnavailable, TaskAlreadyExistsError, TombstonedTaskError
from safedefer.queues.base import BlobsFull, BlobTaken, Queue, QueuedTask
from safedefer.transactions.rows import environment_of, transactional

_log: Final = logging.getLogger("safedefer.outbox")

#: Characters of the longest id that is read, and of a name that is logged. An id of ours has 32.
ID_LENGTH: Final = 64
#: Complaints of each kind that are remembered, so that each is logged once.
_COMPLAINTS: Final = 1_000


class HandedOver(NamedTuple):
    """Which tasks of a page the queue has taken."""

    ids: Sequence[str]
    """Those that the queue has now."""
    failure: QueueUnavailable | None = None
    """Why it did not store another one."""
    is_away: bool = False
    """Whether it stores none."""


class Judge:
    """Tells the tasks of one application from other rows, and hands them over to its queue.

    Args:
        environment: Whose rows are taken, and those of before there was the column, if their audience names it.
        queues: The names of its queues; None is any.
    """

    def __init__(self, *, environment: str, queues: Collection[str] | None = None) -> None:
        self.environment = environment
        self.queues: frozenset[str] | None = None if queues is None else frozenset(queues)
        self._said: dict[object, set[object]] = {}

    def says_first(self, kind: str, *complaint: object) -> bool:
        """Whether a complaint is to be logged: once, and none of its kind any more after so many."""
        # Without a lock: the worst that two threads do is to log one twice.
        said = self._said.setdefault(kind, set())
        if complaint in said or len(said) >= _COMPLAINTS:
            return False
        said.add(complaint)
        return True

    def is_mine(self, place: str, task: QueuedTask) -> bool:
        """Whether a task is of this application; logs the first of each queue that it does not have."""
        if environment_of(task) != self.environment:  # from before there was the column
            return False
        if self.queues is not None and task.queue not in self.queues:
            if self.says_first("queue", place, task.queue):
                _log.warning(
                    "the outbox has a task for the queue %a, which this application does not have; it stays there",
                    task.queue[:ID_LENGTH],
                )
            return False
        return True

    def read(self, place: str, raw_id: bytes, text: bytes | None) -> QueuedTask | None:
        """Return the task of a row; None, which is logged once, if it is none.

        Args:
            place: Names the outbox.
            raw_id: The id of the row.
            text: What the row has; None if it is too long.
        """
        try:
            if text is None:
                raise ValueError("too long")  # noqa: TRY301  # it is as unreadable as the others
            task = transactional(text.decode(), raw_id.decode())
            environment_of(task)
        except Exception as error:  # noqa: BLE001  # whatever somebody has written there
            if self.says_first("no task", place, raw_id):
                shown = raw_id.decode(errors="backslashreplace")
                _log.error("the outbox has a row that is no task (%s): %a; look at it", slug(error), shown)
            return None
        return task

    def hand_over(self, queue: Queue, place: str, tasks: Sequence[QueuedTask]) -> HandedOver:
        """Enqueue tasks; those that the queue has already count as taken."""
        if not tasks:
            return HandedOver(())
        try:
            queue.enqueue_many(tasks)
        except QueueUnavailable as error:
            if is_away(queue):
                return HandedOver((), error, is_away=True)
        except Exception as error:  # noqa: BLE001  # one is there already, is of a kind that no queue takes, or none is taken
            _log.debug("the outbox is emptied one by one (%s)", slug(error))
        else:
            return HandedOver([task.id for task in tasks])
        return self._one_by_one(queue, place, tasks)

    def _one_by_one(self, queue: Queue, place: str, tasks: Sequence[QueuedTask]) -> HandedOver:
        """Enqueue tasks of which one is refused: it stays where it is, and the others go on."""
        arrived: list[str] = []
        failure = None
        for task in tasks:
            try:
                _enqueue(queue, task)
            except BlobsFull as error:
                if self.says_first("full", place, task.id):
                    _log.warning("task %s stays in the outbox: %s", task.id, error)
            except Exception as error:  # noqa: BLE001  # as above
                if isinstance(error, QueueUnavailable):
                    failure = error
                    if is_away(queue):
                        return HandedOver(arrived, failure, is_away=True)
                if self.says_first("refused", place, task.id):
                    _log.error("the queue does not take task %a of the outbox (%s); look at it", task.id, slug(error))
            else:
                arrived.append(task.id)
        return HandedOver(arrived, failure)


def is_away(queue: Queue) -> bool:
    """Whether a queue that took no task is not available at all. Else it is the task that it cannot store."""
    try:
        queue.stats(now=0.0)
    except QueueUnavailable:
        return True
    return False


def _enqueue(queue: Queue, task: QueuedTask) -> None:
    """Enqueue a task, unless the queue has it, or had it. Raises what refuses it."""
    try:
        queue.enqueue_many((task,))
    except BlobTaken:
        raise
    except (TaskAlreadyExistsError, TombstonedTaskError):
        pass  # it has no name: it is its id that is known. A push engine could not be asked where it is.


def slug(error: BaseException) -> str:
    """Return what a log says of an error: no text of a database's."""
    return error.slug if isinstance(error, Error) else type(error).__name__
