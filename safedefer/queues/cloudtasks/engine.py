"""The push engine that hands tasks to Google Cloud Tasks, and from when on: those far ahead wait in the store.

Google keeps a task for 31 days and deletes it then, whatever came of it, so the engine holds a task back for 20 days at most:
11 are left to try it. Attempts are unlimited at Google's, for every task: ours are counted, and end with a dead letter.

A task is named by a hash: ids of ours begin with the time, and such names slow a queue down. The name of an id makes a second
try of a call harmless that got no answer.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from safedefer.concurrency.forks import register_fork
from safedefer.errors import (
    ConfigurationError,
    QueueUnavailable,
    TaskAlreadyExistsError,
    TombstonedTaskError,
)
from safedefer.queues.base import NotAllStored, QueuedTask, QueueStats
from safedefer.queues.capabilities import Capabilities
from safedefer.queues.cloudtasks.address import CloudTasksAddress
from safedefer.queues.cloudtasks.task_request import (
    DUE_HEADER,
    SENT_HEADER,
    TASK_ID_HEADER,
    chunks,
    due_of,
    hashed,
    is_queue_name,
    is_time,
    queue_name,
    task_name,
    task_request,
)
from safedefer.queues.push_engine import Attempt
from safedefer.queues.rates import QueueControl, QueueLimits

if TYPE_CHECKING:
    from safedefer.queues.cloudtasks.client import CloudTasksClient
    from safedefer.queues.cloudtasks.oidc import SenderCheck

_log: Final = logging.getLogger("safedefer")

_LONGEST_WAIT: Final = 20 * 86_400.0
#: Seconds after which Google deletes a task.
_KEPT: Final = 31 * 86_400.0
#: Seconds before each further try of a call that got no answer.
_PAUSES: Final = (0.1, 0.5)
_MOST_RATE: Final = 500.0
_MOST_CONCURRENT: Final = 5_000
_DEFAULT_CONCURRENT: Final = 1_000
_COUNTED: Final = 10_000
_NUMBER: Final = re.compile("[0-9]{1,9}")
_PATHS: Final = (
    "rate_limits.max_dispatches_per_second",
    "rate_limits.max_concurrent_dispatches",
    "retry_config.max_attempts",
)


class CloudTasks:
    """A push engine: ``safedefer.queues.push_engine.PushEngine``, and ``configure``, ``controls``, ``pause`` and ``purge``.

    Args:
        url: ``cloudtasks://PROJECT/LOCATION?…``; see ``CloudTasksAddress``.
        clock: Returns seconds since the epoch.

    Raises:
        ConfigurationError: The URL is malformed.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        self.address: CloudTasksAddress = CloudTasksAddress.parse(url)
        self._clock = clock
        self._lock = threading.RLock()  # reentrant: a signal handler may defer at any point
        self._client: CloudTasksClient | None = None
        self._sender: SenderCheck | None = None
        register_fork(self)
        if self.address.any_sender:
            _log.warning(
                "unsafe_accept_any_sender: the handler does not ask who sends a task; whoever has a copy of one can post it, and "
                "fill the dead letters. Let something in front of it ask"
            )

    @property
    def capabilities(self) -> Capabilities:
        """What Cloud Tasks can do: no batches as a whole, and no unique tasks."""
        return Capabilities(unique=False, batch_atomic=False, due_order=False, longest_wait=_LONGEST_WAIT, kept=_KEPT)

    @property
    def client(self) -> CloudTasksClient:
        """Google's client, one for each process; it is imported when it is first used.

        Raises:
            MissingExtra: google-cloud-tasks is not installed.
            ConfigurationError: There are no credentials.
        """
        with self._lock:
            if self._client is None:
                # Here: a handler needs no client, and importing it takes a second.
                from safedefer.queues.cloudtasks.client import CloudTasksClient  # noqa: PLC0415

                self._client = CloudTasksClient(self.address.endpoint)
            return self._client

    # --- Producers --------------------------------------------------------------------------------

    def enqueue_many(self, tasks: Iterable[QueuedTask], /) -> None:
        """Create tasks, each by itself.

        Raises:
            NotAllStored: Some of several were not created.
            DeferError: One was not, or none: the first one's error.
            QueueUnavailable: None was.
        """
        now = self._clock()
        # All of them first: what is wrong with one is found before another is stored.
        made = [(task, task_request(self.address, task, now=now)) for task in tasks]
        if len(made) == 1:
            task, request = made[0]
            self._create(task, request)
            return
        failed: dict[str, Exception] = {}
        for queue, chunk in chunks(made):
            errors = self._create_many(queue_name(self.address, queue), chunk)
            failed |= {task.id: error for (task, _), error in zip(chunk, errors, strict=True) if error is not None}
        if failed and len(failed) == len(made):
            raise next(iter(failed.values()))
        if failed:
            raise NotAllStored(failed)

    def _create(self, task: QueuedTask, request: Mapping[str, Any]) -> None:
        """Create a task. A try without an answer is repeated where its name is its own; if the name is in use then, it was it."""
        from safedefer.queues.cloudtasks.client import Uncertain  # noqa: PLC0415

        client, queue = self.client, queue_name(self.address, task.queue)
        pauses = _PAUSES if task.name is None else ()
        for number in range(len(pauses) + 1):
            try:
                client.create(queue, request)
            except TaskAlreadyExistsError as error:
                if number:
                    return
                raise self._refusal(task, error) from error
            except Uncertain:
                if number == len(pauses):
                    raise
                time.sleep(pauses[number])
            else:
                return

    def _create_many(
        self, queue: str, chunk: Sequence[tuple[QueuedTask, Mapping[str, Any]]]
    ) -> Sequence[Exception | None]:
        from safedefer.queues.cloudtasks.client import Uncertain  # noqa: PLC0415

        client, repeated = self.client, False
        errors: Sequence[Exception | None] = ()
        requests = [request for _, request in chunk]
        for pause in (*_PAUSES, 0.0):
            try:
                errors = client.create_many(queue, requests)
                break
            except Uncertain as error:
                repeated, errors = True, [error] * len(chunk)
                time.sleep(pause)
            except Exception as error:  # noqa: BLE001  # it is the error of each task of the chunk
                errors = [error] * len(chunk)
                break
        return [
            self._after_batch(task, error, repeated=repeated) for (task, _), error in zip(chunk, errors, strict=True)
        ]

    def _after_batch(self, task: QueuedTask, error: Exception | None, *, repeated: bool) -> Exception | None:
        if not isinstance(error, TaskAlreadyExistsError):
            return error
        if not repeated:
            return self._refusal(task, error)
        if task.name is None:
            return None
        return QueueUnavailable(f"whether the task {task.name} was stored is not known: its name is in use now")

    def _refusal(self, task: QueuedTask, error: TaskAlreadyExistsError) -> Exception:
        """Return what a name in use means: a task that lives, or a tombstone."""
        try:
            if self.client.exists(task_name(self.address, task)):
                return error
        except QueueUnavailable:  # who may create tasks need not be one who may look at them
            return error
        return TombstonedTaskError(
            f"a task of the name {task.name} ended in queue {task.queue} not long ago; use another name"
            if task.name is not None
            else "the task has ended; defer a new one"
        )

    def cancel(self, task_id: str, *, now: float) -> bool:  # noqa: ARG002  # the engine's clock is Google's
        """Delete a task that has no name, in whatever queue it is; False if none has it, or it has a name."""
        return any(
            self.client.delete(f"{queue.name}/tasks/{hashed('id', task_id)}")
            for queue in self.client.queues(self.address.parent)
        )

    # --- The handler ------------------------------------------------------------------------------

    def attempt(self, headers: Mapping[str, str], /) -> Attempt:
        """Read the headers of a delivery. They are Google's word, once ``authenticate`` says so."""
        lower = {name.lower(): value for name, value in headers.items()}
        family = "x-cloudtasks" if self.address.address is not None else "x-appengine"
        status = _count(lower.get(f"{family}-taskpreviousresponse"))
        due, sent = lower.get(DUE_HEADER.lower(), ""), lower.get(SENT_HEADER.lower(), "")
        return Attempt(
            retries=_count(lower.get(f"{family}-taskretrycount")) or 0,
            executions=_count(lower.get(f"{family}-taskexecutioncount")) or 0,
            since=float(due) if is_time(due) else None,
            task_id=lower.get(TASK_ID_HEADER.lower(), ""),
            previous_response=status,
            retry_reason=lower.get(f"{family}-taskretryreason") or None,
            sent=float(sent) if is_time(sent) else None,
        )

    def authenticate(self, headers: Mapping[str, str], /) -> bool:
        """Whether Cloud Tasks sent the request: by its OIDC token; on App Engine by a header that only Google can set.

        Raises:
            QueueUnavailable: Google's public keys are not known now.
        """
        address = self.address
        if address.any_sender:
            return True
        if address.address is None:
            # App Engine removes this header from requests of others. Elsewhere nobody does.
            named = any(name.lower() == "x-appengine-queuename" and value for name, value in headers.items())
            return named and ("GAE_APPLICATION" in os.environ or address.endpoint is not None)
        return self._check().allows(headers)

    def _check(self) -> SenderCheck:
        with self._lock:
            if self._sender is None:
                # Here: a producer verifies nothing.
                from safedefer.queues.cloudtasks.oidc import PublicKeys, SenderCheck, fetch_keys  # noqa: PLC0415

                address = self.address
                self._sender = SenderCheck(
                    PublicKeys(lambda: fetch_keys(address.keys_url), self._clock),
                    issuers=address.issuers,
                    audiences=address.audiences,
                    emails=address.service_accounts,
                    clock=self._clock,
                )
            return self._sender

    # --- People -----------------------------------------------------------------------------------

    def configure(self, limits: Sequence[QueueLimits], *, now: float) -> None:  # noqa: ARG002  # as cancel
        """Make the declared queues, or give them these limits. A rate of 0 pauses a queue; one that is paused stays it.

        Raises:
            ConfigurationError: A queue's name or limits are beyond Google's.
        """
        for each in limits:
            if not is_queue_name(each.queue):
                raise ConfigurationError(
                    f"Cloud Tasks has no queue of the name {each.queue}: letters, numbers and hyphens; rename it"
                )
            rate = _MOST_RATE if each.rate is None else each.rate
            concurrent = each.max_concurrent or _DEFAULT_CONCURRENT
            if rate > _MOST_RATE or concurrent > _MOST_CONCURRENT:
                raise ConfigurationError(
                    f"Cloud Tasks dispatches at most 500 tasks a second and 5,000 at once; lower the limits of {each.queue}"
                )
            queue = {
                "name": queue_name(self.address, each.queue),
                "rate_limits": {
                    "max_dispatches_per_second": rate or _MOST_RATE,
                    "max_concurrent_dispatches": concurrent,
                },
                "retry_config": {"max_attempts": -1},
            }
            made = self.client.update_queue(queue, _PATHS)
            if rate == 0:
                self.client.pause(made.name, paused=True)
            elif made.state.name != "RUNNING":
                _log.warning("queue %s stays paused; run `safedefer queues resume %s`", each.queue, each.queue)

    def controls(self, *, now: float) -> Sequence[QueueControl]:
        """Return the limits of the location's queues."""
        return [
            QueueControl(
                limits=QueueLimits(
                    queue=queue.name.rpartition("/")[2],
                    rate=queue.rate_limits.max_dispatches_per_second,
                    bucket_size=queue.rate_limits.max_burst_size,
                    max_concurrent=queue.rate_limits.max_concurrent_dispatches,
                ),
                paused=queue.state.name != "RUNNING",
                refilled=now,
            )
            for queue in sorted(self.client.queues(self.address.parent), key=lambda queue: queue.name)
        ]

    def pause(self, queue: str, *, paused: bool, now: float) -> None:  # noqa: ARG002  # as cancel
        """Pause or resume a queue."""
        self.client.pause(queue_name(self.address, queue), paused=paused)

    def purge(self, queue: str, *, now: float) -> int:  # noqa: ARG002  # as cancel
        """Delete the tasks of a queue; returns how many there were, up to 10,000. Google takes up to a minute."""
        name = queue_name(self.address, queue)
        number = sum(1 for _ in self.client.tasks(name, _COUNTED))
        self.client.purge(name)
        return number

    def stats(self, *, now: float) -> Sequence[QueueStats]:  # noqa: ARG002  # as cancel
        """Counts of the location's queues, up to 10,000 tasks of each, by listing them."""
        found = []
        for queue in self.client.queues(self.address.parent):
            waiting, running, oldest = 0, 0, None
            for task in self.client.tasks(queue.name, _COUNTED):
                is_running = bool(task.last_attempt.dispatch_time and not task.last_attempt.response_time)
                running += is_running
                waiting += not is_running
                if not is_running:
                    moment = due_of(task)
                    oldest = moment if oldest is None else min(oldest, moment)
            if waiting or running:
                name = queue.name.rpartition("/")[2]
                found.append(QueueStats(queue=name, waiting=waiting, running=running, dead=0, oldest=oldest))
        return sorted(found, key=lambda stats: stats.queue)

    def close(self) -> None:
        """Close the connections of this process."""
        with self._lock:
            if self._client is not None:
                self._client.close()
            self._client = None

    # --- Forks ------------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Wait for the client or the check that is being made."""
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Leave connections to the parent, and the lock of keys to who fetched them."""
        self._client = self._sender = None
        self._lock.release()


def _count(text: str | None) -> int | None:
    return int(text) if text is not None and _NUMBER.fullmatch(text) else None
