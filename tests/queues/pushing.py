"""A push engine for the tests of the seam: it keeps tasks in memory, and posts them by HTTP until they are answered 2xx."""

from __future__ import annotations

import asyncio
import hmac
import threading
import time

import aiohttp

from safedefer.errors import QueueUnavailable
from safedefer.headers import CONTENT_TYPE
from safedefer.queues.base import NotAllStored, QueueStats
from safedefer.queues.capabilities import Capabilities
from safedefer.queues.push_engine import Attempt

PROOF = "proof-of-the-engine"
RETRIES, SINCE, TASK, PROVEN = "X-Test-Retries", "X-Test-Since", "X-Test-Task", "X-Test-Proof"


class PushEngineInMemory:
    """Keeps what it was given; ``post_all`` delivers by HTTP.

    Args:
        longest_wait: As ``Capabilities.longest_wait``.
    """

    def __init__(self, *, longest_wait=None):
        self.capabilities = Capabilities(
            names=False, unique=False, batch_atomic=False, due_order=False, longest_wait=longest_wait
        )
        self.tasks = {}
        self.delivered = {}
        self.down = False
        self.refuses = set()
        self.closed = False
        self._lock = threading.Lock()

    def enqueue_many(self, tasks, /):
        if self.down:
            raise QueueUnavailable("the engine is down; start it")
        failed = {}
        with self._lock:
            for task in tasks:
                assert task.blob is None, "the store keeps blobs"
                if task.callable_name in self.refuses:
                    failed[task.id] = QueueUnavailable("refused")
                else:
                    self.tasks[task.id] = task
        if failed:
            raise NotAllStored(failed)

    def cancel(self, task_id, *, now):
        with self._lock:
            return self.tasks.pop(task_id, None) is not None

    def stats(self, *, now):
        with self._lock:
            queues = [task.queue for task in self.tasks.values()]
        return [
            QueueStats(queue=queue, waiting=queues.count(queue), running=0, dead=0, oldest=None)
            for queue in sorted(set(queues))
        ]

    def attempt(self, headers, /):
        given = {name.lower(): value for name, value in headers.items()}
        since = given.get(SINCE.lower())
        return Attempt(
            retries=_number(given.get(RETRIES.lower(), "0")) or 0,
            since=None if since is None else _number(since),
            task_id=given.get(TASK.lower(), ""),
        )

    def authenticate(self, headers, /):
        given = {name.lower(): value for name, value in headers.items()}
        return hmac.compare_digest(given.get(PROVEN.lower(), "").encode(errors="replace"), PROOF.encode())

    def close(self):
        self.closed = True

    def headers(self, task, *, now):
        """Return the headers of the next delivery of a task."""
        count, since = self.delivered.get(task.id, (0, now))
        self.delivered[task.id] = count + 1, since
        return {
            "Content-Type": CONTENT_TYPE,
            RETRIES: str(count),
            SINCE: repr(since),
            TASK: task.id,
            PROVEN: PROOF,
        }

    async def post_all(self, address, *, seconds=60.0):
        """Post every task to a handler, again and again, until all are answered 2xx; return the statuses by task."""
        statuses = {}
        async with asyncio.timeout(seconds), aiohttp.ClientSession(auto_decompress=False) as session:
            while self.tasks:
                for task in list(self.tasks.values()):
                    headers = self.headers(task, now=time.time())
                    async with session.post(f"{address}{task.url}", data=task.token, headers=headers) as response:
                        statuses.setdefault(task.id, []).append(response.status)
                        if response.ok:
                            self.tasks.pop(task.id, None)
                await asyncio.sleep(0.01)
        return statuses


def _number(text):
    """Return what a header says, which anybody may have written; None if that is no number."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return None
