"""The parts of an App in test mode that differ from those of others."""

from __future__ import annotations

import random
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from safedefer.app import App
from safedefer.concurrency.threads import InThread
from safedefer.dispatcher.attempt import AttemptRunner
from safedefer.dispatcher.reports import Reports
from safedefer.dispatcher.transport import Unreachable
from safedefer.errors import ConfigurationError
from safedefer.events import Event, LogObserver, Observer, Observers, TaskHandled, notify
from safedefer.headers import Response
from safedefer.keys import MIN_SECRET_BYTES, Key, Keyring
from safedefer.options import Options, Task
from safedefer.policy import Policy
from safedefer.queues.base import Lease, PullQueue, QueuedTask
from safedefer.queues.rules import give_back
from safedefer.sending.sender import Built, CallTuple, Sender

if TYPE_CHECKING:
    from safedefer.queues.config import QueueFile

_OWNER: Final = "testing"


async def deliver_due(
    queue: PullQueue,
    transport: KitTransport,
    threads: InThread,
    attempted: set[str],
    *,
    clock: Callable[[], float],
    observer: Observer,
    file: QueueFile | None,
    seconds: float,
) -> None:
    """Deliver every due task once, in the order in which they are due, by the dispatcher's own judgement.

    Args:
        queue: The queue.
        transport: Delivers.
        threads: Calls the queue where a handler asks for a pause.
        attempted: The ids of tasks that were delivered in this run; those that are added.
        clock: Seconds since the epoch.
        observer: Told of tasks that are put off or given up.
        file: The ``queue.yaml``: its limits and retry parameters hold.
        seconds: The length of a lease.
    """
    queue.configure(() if file is None else file.limits, now=clock())
    reports = Reports(observer, clock=clock)
    attempts = AttemptRunner(
        queue,
        transport,
        threads,
        clock=clock,
        rng=NoJitter(),
        slots=1,
        retry_options={} if file is None else {each.name: each.retry_parameters.given() for each in file.queue},
        reports=reports,
    )
    again: list[Lease] = []
    while leases := queue.lease(owner=_OWNER, limit=1, seconds=seconds, now=clock()):
        for lease in leases:
            if lease.task.id in attempted:  # to be retried at once
                again.append(lease)
                continue
            attempted.add(lease.task.id)
            settlements = [(lease, await attempts.run(lease))]
            reports.settled(settlements, queue.settle_many(settlements, now=clock()))
    queue.settle_many([(lease, give_back(lease, now=clock())) for lease in again], now=clock())


class KitObserver(LogObserver):
    """Keeps the answers of a run, and hands every event on."""

    def __init__(self, inner: Observer) -> None:
        super().__init__()
        self._inner = inner if isinstance(inner, Observers) else Observers(inner)  # which awaits async ones
        self.handled: list[TaskHandled] = []

    def __call__(self, event: Event) -> None:
        """Keep an answer, and hand the event on."""
        if isinstance(event, TaskHandled):
            self.handled.append(event)
        notify(self._inner, event)


class KitSender(Sender):
    """Calls ``after`` when tasks were enqueued."""

    def __init__(self, after: Callable[[], None], **parts: Any) -> None:
        super().__init__(**parts)
        self._after = after

    def send(
        self, options: Options, obj: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Task:
        """Defer one call."""
        task = super().send(options, obj, args, kwargs)  # send_async calls it in a thread
        if not options.transactional:
            self._after()
        return task

    def send_many(self, options: Options, calls: Iterable[CallTuple], *, atomic: bool = True) -> list[Task]:
        """Defer several calls."""
        tasks = super().send_many(options, calls, atomic=atomic)
        if not options.transactional:
            self._after()
        return tasks

    def store(self, built: Sequence[Built]) -> list[Task]:
        """Store tasks that were signed before."""
        tasks = super().store(built)
        self._after()
        return tasks


class KitTransport:
    """Delivers to a handler in this process, unless it is down."""

    several = False

    def __init__(self, handle: Callable[..., Awaitable[Response]]) -> None:
        self._handle = handle
        self.down = False

    def __call__(self, task: QueuedTask, headers: Mapping[str, str]) -> Awaitable[Response]:
        """Hand one task to the handler."""
        if self.down:
            raise Unreachable("handler_down")
        return self._handle(headers, task.token, path=task.url)

    def address(self, task: QueuedTask, /) -> str:  # noqa: ARG002  # one handler takes all
        """Return the empty text."""
        return ""


class Raises:
    """A context manager that raises when it is entered."""

    def __init__(self, error: BaseException | type[BaseException]) -> None:
        self._error = error

    def __enter__(self) -> None:
        raise self._error

    def __exit__(self, *_: object) -> None:
        """Do nothing: it is never left."""


class NoJitter(random.Random):
    """Takes nothing off the intervals of retries: a test knows when a task is due again."""

    def random(self) -> float:
        """Return 0."""
        return 0.0


def nothing() -> None:
    """Do nothing after a task was enqueued."""


def arguments_of(what: Sequence[App | str | Policy]) -> tuple[App | None, dict[str, Any]]:
    """Return the App, if there is one, and the arguments of an App in test mode."""
    apps = [item for item in what if isinstance(item, App)]
    if apps:
        if len(what) > 1:
            raise ConfigurationError("give TestApp one App, or patterns; use a TestApp for each App")
        arguments = apps[0]._arguments()  # noqa: SLF001  # of the App, for this
        # The limits of its keys, and secrets of this test: its tokens are worth nothing elsewhere.
        arguments["keyring"] = Keyring(_with_new_secret(key) for key in arguments["keyring"].keys)
        return apps[0], arguments
    key = Key("testing", secrets.token_bytes(MIN_SECRET_BYTES), pickle=True)
    return None, {"keyring": Keyring(key), "policy": _policy(cast("Sequence[str | Policy]", what))}


def _with_new_secret(key: Key) -> Key:
    secret = secrets.token_bytes(MIN_SECRET_BYTES)
    return Key(key.kid, secret, key.state, queues=key.queues, patterns=key.patterns, pickle=key.pickle)


def _policy(given: Sequence[str | Policy]) -> Policy:
    patterns = [item for item in given if isinstance(item, str)]
    if len(patterns) == len(given):
        return Policy(*patterns)
    if len(given) > 1:
        raise ConfigurationError("give TestApp either patterns or one Policy")
    (policy,) = (item for item in given if isinstance(item, Policy))
    return policy
