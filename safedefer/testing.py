"""For the tests of applications that defer tasks: a whole App in memory, and a clock to move.

    from safedefer.testing import TestApp

    def test_the_receipt_is_sent_an_hour_later(outbox):
        with TestApp("shop.tasks") as app:
            place_order(42)  # calls deferred.defer(...), as in production
            assert app.run_due() == []
            app.clock.advance(3600)
            (ran,) = app.run_due()
            assert ran.outcome == "succeeded"
            assert outbox == [42]

Tasks are signed with a random key, encoded, queued in memory, verified, decoded and called, in the
same code as in production: a call that could not be deferred or run there fails here too.

In pytest, a fixture does it for all tests::

    @pytest.fixture
    def tasks():
        with TestApp("shop.tasks") as app:
            yield app
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Self

from safedefer import deferred
from safedefer.app import App
from safedefer.dispatcher.loop import Dispatcher, InProcessDelivery
from safedefer.errors import ConfigurationError
from safedefer.events import Event, LogObserver, TaskHandled
from safedefer.keys import MIN_SECRET_BYTES, Key, Keyring, KeyState
from safedefer.policy import Policy
from safedefer.queues.base import TaskState, TaskView
from safedefer.queues.memory.queue import MemoryQueue

__all__ = ["Clock", "Ran", "TaskFailed", "TestApp"]

_WITHOUT_FAILURE: Final = frozenset({"succeeded", "duplicate", "early", "busy", "running"})


class Clock:
    """A clock that stands still until it is moved: seconds since the epoch, when called.

    Args:
        now: Where it begins; the present by default.
    """

    def __init__(self, now: float | datetime | None = None) -> None:
        self._now = time.time() if now is None else now.timestamp() if isinstance(now, datetime) else float(now)

    def __call__(self) -> float:
        """Return the time, in seconds since the epoch."""
        return self._now

    @property
    def now(self) -> datetime:
        """The time, aware, in UTC."""
        return datetime.fromtimestamp(self._now, UTC)

    def advance(self, seconds: float) -> None:
        """Move the clock.

        Raises:
            ValueError: Backwards.
        """
        if seconds < 0:
            raise ValueError("a clock goes forwards; make another one for an earlier time")
        self._now += seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One delivery that ``run_due`` made."""

    task_id: str
    callable: str
    """``shop.tasks:send_receipt``."""
    outcome: str
    """The ``Safedefer-Outcome``."""
    status: int
    reason: str | None
    traceback: str | None
    """Of what the task raised, as it is recorded: without tokens."""


class TaskFailed(AssertionError):
    """Tasks failed in ``run_due``. ``ran`` (list of ``Ran``) holds all deliveries, these among them."""

    def __init__(self, ran: Sequence[Ran]) -> None:
        failures = [one for one in ran if one.outcome not in _WITHOUT_FAILURE]
        lines = [
            f"{one.callable or one.task_id}: {one.outcome} ({one.reason})\n{one.traceback or ''}" for one in failures
        ]
        super().__init__(
            "\n".join([f"{len(failures)} of {len(ran)} deliveries failed; raises=False reports only", *lines])
        )
        self.ran = list(ran)


class TestApp(App):
    """An App with a random key, a queue in memory and a clock that is moved by hand.

    As a context manager it is also what ``safedefer.deferred`` uses meanwhile.

    Args:
        policy: What may run: patterns, or a ``Policy``. Nothing runs without one.
        clock: The clock; one that begins now by default.
        settings: Any other argument of ``App``.
    """

    __test__ = False  # pytest would take it for a test

    def __init__(self, *policy: str | Policy, clock: Clock | None = None, **settings: Any) -> None:
        self.clock = clock or Clock()
        self._told: list[TaskHandled] = []
        observer = settings.pop("observer", None) or LogObserver()

        def observe(event: Event) -> None:
            if isinstance(event, TaskHandled):
                self._told.append(event)
            observer(event)

        key = Key("testing", secrets.token_bytes(MIN_SECRET_BYTES), KeyState.ACTIVE, pickle=True)
        super().__init__(
            **{
                "keyring": Keyring(key),
                "policy": _policy(policy),
                "queue": MemoryQueue(),
                "environment": "testing",
                "clock": self.clock,
                "observer": observe,
                **settings,
            }
        )
        self._before: App | None = None

    def __enter__(self) -> Self:
        """Be the App that ``safedefer.deferred`` uses."""
        self._before = deferred.configured_app()
        deferred.configure(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the App from before be used again, and close this one."""
        deferred.configure(self._before)
        self.close()

    def run_due(self, *, raises: bool = True) -> list[Ran]:
        """Run the tasks that are due by the clock, and those due now that they defer, through the handler.

        Transactional tasks whose transaction has been committed are among them.

        A task that fails is not tried again before the clock is moved.

        Args:
            raises: Whether a failure raises; else it is reported like a success.

        Returns:
            The deliveries, in the order in which they ended.

        Raises:
            TaskFailed: A task raised, or was rejected.
        """
        # In a thread: there may be a running loop here, that of an async test.
        with ThreadPoolExecutor(1, thread_name_prefix="safedefer-testing") as thread:
            ran = thread.submit(lambda: asyncio.run(self._run_due())).result()
        if raises and any(one.outcome not in _WITHOUT_FAILURE for one in ran):
            raise TaskFailed(ran)
        return ran

    async def run_due_async(self, *, raises: bool = True) -> list[Ran]:
        """Do what ``run_due`` does in the running loop, so that coroutines share it with the test."""
        ran = await self._run_due()
        if raises and any(one.outcome not in _WITHOUT_FAILURE for one in ran):
            raise TaskFailed(ran)
        return ran

    def waiting(self) -> list[TaskView]:
        """Return the tasks that wait, the one that is due first before the others."""
        self.outbox.sweep()
        found = self.queue.tasks(states=[TaskState.WAITING], limit=1_000_000)
        return sorted(found, key=lambda view: view.eta)

    def dead(self) -> list[TaskView]:
        """Return the dead letters, oldest first."""
        found = self.queue.tasks(states=[TaskState.DEAD], limit=1_000_000)
        return sorted(found, key=lambda view: view.created)

    async def _run_due(self) -> list[Ran]:
        self._told.clear()
        await asyncio.to_thread(self.outbox.sweep)
        await Dispatcher(
            self.queue, InProcessDelivery(self.handle), clock=self.clock, observer=self.observers
        ).run_until_empty()
        told, self._told = self._told, []
        return [self._report(event) for event in told]

    def _report(self, event: TaskHandled) -> Ran:
        view = self.queue.find(event.task_id)
        records = () if view is None else view.records
        return Ran(
            task_id=event.task_id,
            callable=event.callable,
            outcome=event.outcome,
            status=event.status,
            reason=event.reason,
            traceback=records[-1].traceback if records else None,
        )


def _policy(given: Sequence[str | Policy]) -> Policy:
    patterns = [item for item in given if isinstance(item, str)]
    if len(patterns) == len(given):
        return Policy(*patterns)
    if len(given) > 1:
        raise ConfigurationError("give TestApp either patterns or one Policy")
    (policy,) = (item for item in given if isinstance(item, Policy))
    return policy
