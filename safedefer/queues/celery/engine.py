"""The push engine on Celery: one generic task carries the token, and a Celery worker hands it to the handler.

The broker may be Celery's RabbitMQ or Redis. A message says nothing that is believed: the worker hands the token to the same
handler as any other transport, which verifies it. Of Celery's own ways with tasks only these are used: the message is
acknowledged after the handler has answered (``acks_late``), it goes back to the queue when its worker process dies
(``reject_on_worker_lost``) or runs into Celery's hard time limit, and a retry is a new message with a countdown of whole
seconds, confirmed by the broker before the old one is acknowledged.

Only RabbitMQ keeps each message until it is acknowledged: of a task that another broker is given the store keeps a copy until it
has ended (``queues.hand_over``).

What is due in more than a minute is never given to the broker: Redis delivers a message again that nobody has acknowledged
for its visibility timeout, and RabbitMQ closes the channel of a consumer that holds one too long. It waits in the store.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn, Protocol
from urllib.parse import parse_qs, urlsplit
from weakref import WeakKeyDictionary

from celery import Celery  # type: ignore[import-untyped]
from celery.exceptions import Reject, SoftTimeLimitExceeded  # type: ignore[import-untyped]
from celery.signals import worker_before_create_process, worker_ready  # type: ignore[import-untyped]
from kombu.pools import ProducerPool

from safedefer.errors import ConfigurationError, Error, QueueUnavailable
from safedefer.headers import CONTENT_TYPE, OUTCOME_HEADER, RETRY_HEADER
from safedefer.options import DEFAULT_QUEUE
from safedefer.queues.base import NotAllStored
from safedefer.queues.capabilities import Capabilities
from safedefer.queues.celery.acknowledging import Acknowledgements
from safedefer.queues.celery.broker import is_lossless, waiting, weaknesses
from safedefer.queues.celery.task import register
from safedefer.queues.push_engine import Attempt

if TYPE_CHECKING:
    from kombu.messaging import Producer

    from safedefer.headers import Response
    from safedefer.queues.base import QueuedTask, QueueStats

_log: Final = logging.getLogger("safedefer.celery")

#: The name of the one Celery task.
TASK_NAME: Final = "safedefer.deliver"
#: Seconds that the broker holds a message back at most.
LONGEST_WAIT: Final = 60
#: Connections of a process through which it enqueues.
_CONNECTIONS: Final = 8
#: When a message was enqueued first: of what no key of ours signed, it says for how long it was tried.
_SINCE: Final = "Safedefer-Since"
#: The id of the message, which is the task's where we published it.
_TASK: Final = "Safedefer-Task"
_REFUSED: Final = 403
#: Of a message: token, url, retries, since.
_VALUES: Final = 4
#: Seconds that a worker without an App holds a message.
_NOBODY_SECONDS: Final = 5.0
#: Seconds that a worker whose handler cannot be asked holds a message.
_NOT_HANDLED_SECONDS: Final = 1.0
#: The year 9999.
_LATEST: Final = 253_402_300_799.0
_MOST_RETRIES: Final = 10**9 - 1
_CAPABILITIES: Final = Capabilities(
    names=False, unique=False, targets=False, batch_atomic=False, due_order=False, longest_wait=float(LONGEST_WAIT)
)


#: What a message says of the parent that will acknowledge it, after a sync: its process id, else 0.
PARENT: Final = "safedefer_parent"
#: The engine of each Celery application.
_engines: Final[WeakKeyDictionary[Celery, CeleryEngine]] = WeakKeyDictionary()
#: Connections of a parent process, never used again.
_inherited: Final[list[object]] = []


class WorkerHeaders(dict[str, str]):
    """The headers of a delivery by a worker of this process. No request from outside has this type: it is the proof."""


class WorkerHandler(Protocol):
    """The handler of an App, as a Celery worker uses it."""

    def submit(self, headers: Mapping[str, str], token: bytes, url: str, /) -> Future[Response]:
        """Hand a token to the handler, in the event loop of this process."""
        ...

    def start(self) -> None:
        """Hand over what falls due in the store, and sweep outboxes, from now on."""
        ...

    def syncs(self) -> Callable[[], object] | None:
        """Return what has the store sync all that any process has committed to it, and returns its mark.

        The mark is another one after a crash that may have undone commits. None: the store syncs each change itself.
        """
        ...


class CeleryEngine:
    """Publishes tasks to a Celery broker, and runs them in the workers of the Celery application.

    Args:
        celery: The application, whose workers import the module that makes the ``App``.
    """

    in_process: ClassVar[bool] = True
    """``authenticate`` does not wait."""

    def __init__(self, celery: Celery) -> None:
        self.celery = celery
        self._serves: WorkerHandler | None = None
        self._lock = threading.RLock()  # reentrant: a signal handler may defer at any point
        self._producers: Any = None
        self._pid = 0
        self._closed = False
        other = _engines.get(celery)
        if other is not None and not other._closed:  # noqa: SLF001  # of this class
            raise ConfigurationError("another App uses this Celery application; give each App one of its own")
        _engines[celery] = self
        self.acknowledgements: Acknowledgements | None = None
        """Those of this process, if it is the parent of worker processes; inherited by these."""
        self._capabilities: Capabilities | None = None
        self._parent = 0
        self._left_to = 0
        self._task: Any = register(celery, _deliver, TASK_NAME)
        steps: dict[str, set[str]] = celery.steps  # pyright: ignore[reportAssignmentType]
        steps["consumer"].add("safedefer.queues.celery.worker:_LastSync")
        worker_before_create_process.connect(self._before_child, weak=False)
        worker_ready.connect(self._worker_ready, weak=False)

    @classmethod
    def from_url(cls, url: str) -> CeleryEngine:
        """Make a Celery application for a broker: ``celery+amqp://user@host/vhost``, ``celery://?broker=redis%3A%2F%2Fhost``.

        Raises:
            ConfigurationError: The URL names no broker.
        """
        scheme, _, rest = url.partition("://")
        broker = f"{scheme.partition('+')[2]}://{rest}" if "+" in scheme else ""
        if not broker:
            given = parse_qs(urlsplit(url).query)
            broker = given.get("broker", [""])[0]
        if "://" not in broker:
            raise ConfigurationError(
                "a Celery URL names its broker: celery+amqp://user@host/vhost, celery+redis://host/0, or "
                "celery://?broker=… with the broker's URL escaped"
            )
        celery = Celery("safedefer", broker=broker, set_as_current=False)
        celery.conf.update(accept_content=["json"], task_serializer="json", task_ignore_result=True)
        return cls(celery)

    def worker_command(self, module: str = "") -> str:
        """Return the command that starts a worker; ``module`` is looked at for the Celery application."""
        names = vars(sys.modules[module]) if module in sys.modules else {}
        found = next((name for name, value in names.items() if value is self.celery), None)
        return f"celery -A {module if found else 'MODULE'}:{found or 'CELERY_APPLICATION'} worker"

    def serve(self, serves: WorkerHandler) -> None:
        """Hand what the workers of the Celery application get to a handler."""
        self._serves = serves

    def _before_child(self, **_: Any) -> None:
        """Acknowledge in this process, the parent of a prefork pool, what its children have ended."""
        if self._parent == os.getpid() or self._serves is None:
            return
        syncs = self._serves.syncs()
        if syncs is not None:
            self.acknowledgements, self._parent = Acknowledgements(syncs), os.getpid()

    @property
    def syncs_before_ack(self) -> bool:
        """Whether this process is a child whose parent has the store sync before it acknowledges the message of now."""
        return self._left_to != 0 and self._left_to == os.getppid()

    def _worker_ready(self, sender: Any = None, **_: Any) -> None:
        # One worker process hands over for all of its children, as the dispatcher does for a pull queue.
        if self._serves is not None and getattr(sender, "app", None) is self.celery:
            self._serves.start()

    # --- Producers --------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """No names, unique tasks, targets or atomic batches; a minute at most."""
        if self._capabilities is None:
            self._capabilities = replace(_CAPABILITIES, lossless=is_lossless(self._task))
        return self._capabilities

    def messages(self, queue: str) -> int | None:
        """Return how many messages wait in the queue of the broker that is named so; None if it cannot say."""
        with _asked():
            return waiting(self._task, None if queue == DEFAULT_QUEUE else queue)

    def enqueue_many(self, tasks: Iterable[QueuedTask], /) -> None:
        """Publish tasks one by one; the broker has confirmed each of them when this returns."""
        check_content(self.celery)
        failed: dict[str, Exception] = {}
        stored = 0
        for task in tasks:
            countdown = math.ceil(max(0.0, task.eta - time.time()))
            # Named as the queue of Celery's own default, where the workers of an existing deployment listen.
            route = {} if task.queue == DEFAULT_QUEUE else {"queue": task.queue}
            try:
                self._publish(task.id, (task.token.decode("ascii"), task.url, 0, task.created), countdown, route)
            except QueueUnavailable as error:
                failed[task.id] = error
            else:
                stored += 1
        if failed and not stored:
            raise next(iter(failed.values()))
        if failed:
            raise NotAllStored(failed)

    def _publish(self, task_id: str, values: Sequence[Any], countdown: int, route: Mapping[str, Any]) -> None:
        try:
            with self._producer() as producer:
                self._task.apply_async(
                    args=values,
                    task_id=task_id,
                    countdown=min(countdown, LONGEST_WAIT) or None,
                    producer=producer,
                    **route,
                )
        except Exception as error:
            raise _unavailable("did not take the task", error) from error

    def reach(self) -> None:
        """Connect to the broker, and disconnect: ``stats`` does not ask it.

        Raises:
            QueueUnavailable: It does not answer, refuses the user, or its transport does not import.
        """
        with _asked(), self.celery.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1)

    def weaknesses(self) -> list[str]:
        """Say how the broker may lose messages that it has accepted, and what to do; it is asked. The store hands them over again.

        Raises:
            QueueUnavailable: It does not answer.
        """
        with _asked():
            return weaknesses(self._task)

    def _producer(self) -> AbstractContextManager[Producer]:
        """Return a producer of this process whose messages the broker confirms."""
        with self._lock:
            if self._pid != os.getpid():
                # A connection is not carried across a fork: collecting the parent's here would end it there.
                _inherited.append(self._producers)
                connection = self.celery.connection_for_write(transport_options={"confirm_publish": True})
                self._producers = ProducerPool(connection.Pool(limit=_CONNECTIONS), limit=_CONNECTIONS)  # type: ignore[no-untyped-call]
                self._pid = os.getpid()
            producers = self._producers
        # Not under the lock: where all of them wait for a broker that does not answer, ``close`` does not.
        acquired: AbstractContextManager[Producer] = producers.acquire(block=True)
        return acquired

    def cancel(self, task_id: str, *, now: float) -> bool:  # noqa: ARG002 - the seam has them
        """Return False: a broker gives no message back. The mark in the store keeps the task from running."""
        return False

    def stats(self, *, now: float) -> Sequence[QueueStats]:  # noqa: ARG002 - the seam has it
        """Return nothing: Celery's own tools count the messages of its queues."""
        return ()

    def close(self) -> None:
        """Disconnect."""
        worker_ready.disconnect(self._worker_ready)
        worker_before_create_process.disconnect(self._before_child)
        self._closed = True
        with self._lock:
            if self._pid == os.getpid():
                self._producers.force_close_all()
                self._producers.connections.force_close_all()
            self._producers, self._pid = None, 0

    # --- Workers ----------------------------------------------------------------------------------

    def attempt(self, headers: Mapping[str, str], /) -> Attempt:
        """Read the headers that a worker has made of a message; those of any other request say nothing."""
        if not isinstance(headers, WorkerHeaders):
            return Attempt()
        return Attempt(retries=int(headers[RETRY_HEADER]), since=float(headers[_SINCE]), task_id=headers.get(_TASK, ""))

    def authenticate(self, headers: Mapping[str, str], /) -> bool:
        """Whether a worker of this process made the headers. A request by HTTP, whatever its headers, is not the engine's."""
        return isinstance(headers, WorkerHeaders)

    def deliver(self, request: Any, token: str, url: str, retries: int, since: float) -> None:
        """Hand the token of a message to the handler, and publish it again where it is to be tried again."""
        if not (type(token) is type(url) is str and token.isascii() and _is_count(retries) and _is_time(since)):
            _log.error("a message of %s is dropped: it is none of ours", TASK_NAME)
            return
        if self._serves is None:
            _nobody()
        count = str(min(retries, _MOST_RETRIES))
        headers = WorkerHeaders({"Content-Type": CONTENT_TYPE, RETRY_HEADER: count, _SINCE: repr(float(since))})
        headers[_TASK] = str(request.request.id)
        self._left_to = getattr(request.request, PARENT, 0)
        try:
            answer = _result(self._serves.submit(headers, token.encode("ascii"), url))
        except Exception as error:
            # Whatever another exception says, Celery would drop the message: a store that does not open loses no task.
            name = error.slug if isinstance(error, Error) else type(error).__name__
            _log.error("a task is not handled (%s); the broker delivers it again", name)
            time.sleep(_NOT_HANDLED_SECONDS)
            raise Reject(reason=name, requeue=True) from error
        if 200 <= answer.status <= 299:  # noqa: PLR2004  # the engine's part is done
            known = answer.headers.get(OUTCOME_HEADER) == "duplicate"
            if known and not self.syncs_before_ack and (sync := self._serves.syncs()) is not None:
                sync()  # a child elsewhere may have left this end to its parent
            return
        countdown = _wait(answer, retries)
        route = _route_back(request.request.delivery_info or {})
        try:
            self._publish(request.request.id, (token, url, retries + 1, since), countdown, route)
        except Error as error:
            # It is not acknowledged: the broker delivers it again.
            raise Reject(reason=error.slug, requeue=True) from error


def acknowledgements_of(celery: Celery) -> Acknowledgements | None:
    """Return those of the engine of a Celery application, in the parent of its worker processes; else None."""
    engine = _engines.get(celery)
    return None if engine is None else engine.acknowledgements


def check_content(celery: Celery) -> None:
    """Raise ``ConfigurationError`` if the workers of a Celery application would drop our messages: they take no JSON."""
    # By its names: to ask kombu for all would fail where a serializer of the workers' is not registered here.
    if not {"json", "application/json"}.intersection(celery.conf.accept_content or ("json",)):
        raise ConfigurationError(
            "the Celery application takes no JSON, and its workers would drop each task; add 'json' to its accept_content"
        )


@contextmanager
def _asked() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _unavailable("does not answer", error) from error


def _unavailable(what: str, error: Exception) -> QueueUnavailable:
    """Say what is wrong with the broker, without its URL. A transport that does not import is said as it is."""
    if isinstance(error, ImportError):
        remedy = "install what its transport needs: for Redis and Valkey, pip install 'celery[redis]'"
        return QueueUnavailable(f"the Celery broker {what} ({error}); {remedy}")
    return QueueUnavailable(f"the Celery broker {what} ({type(error).__name__}); see that it runs, and try again")


def _deliver(task: Any, *values: Any, **named: Any) -> None:
    """Run the one Celery task in a worker. Celery would drop the message of one that raises anything but ``Reject``."""
    try:
        engine = _engines.get(task.app)
        if engine is None:  # Celery knows the task of one application in all others of a process
            _nobody()
        elif len(values) != _VALUES or named:
            _log.error("a message of %s is dropped: it is none of ours", TASK_NAME)
        else:
            engine.deliver(task, *values)
    except Reject:
        raise
    except Exception as error:  # Celery's soft time limit, too, which may end any step
        _log.error("a task is not handled (%s); the broker delivers it again", type(error).__name__)
        time.sleep(_NOT_HANDLED_SECONDS)
        raise Reject(reason=type(error).__name__, requeue=True) from error


def _nobody() -> NoReturn:
    _log.error("no App uses this Celery application in this process; import the module that makes it")
    time.sleep(_NOBODY_SECONDS)  # it comes back at once
    raise Reject(reason="no App uses this Celery application here", requeue=True)


def _result(future: Future[Response]) -> Response:
    """Wait for an answer. Celery's soft time limit does not end the wait: the task has a deadline of its own."""
    while True:
        try:
            return future.result()
        except SoftTimeLimitExceeded:
            continue


def _wait(answer: Response, retries: int) -> int:
    """Return the whole seconds until a message is delivered again."""
    asked = answer.headers.get("Retry-After", "")
    if asked.isdigit():
        return min(max(int(asked), 1), LONGEST_WAIT)
    # The answers that say nothing of a time: a run that goes on elsewhere, and what no key of ours signed.
    longest = LONGEST_WAIT if answer.status == _REFUSED else LONGEST_WAIT // 6
    return min(1 << min(retries, 6), longest)


def _route_back(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return where the next message of a task goes: to the queue that this one came from."""
    exchange, key = info.get("exchange"), info.get("routing_key")
    if exchange:
        return {"exchange": exchange, "routing_key": key}
    # The default exchange, which takes the name of a queue. By an empty name Celery means its own default queue.
    return {"queue": key} if key else {}


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < _LATEST
