"""``TestApp``: an App in test mode, and its assertions (``assert_deferred``, ``run_due``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, cast

from safedefer import deferred
from safedefer.app import App
from safedefer.callables.wrappers import unwrapped
from safedefer.claims import split_audience
from safedefer.delivery.handler import Delivery
from safedefer.errors import ConfigurationError
from safedefer.events import LogObserver, Observer, TaskHandled
from safedefer.execution.context import current_task
from safedefer.execution.prepare import prepare
from safedefer.headers import Response
from safedefer.policy import Policy
from safedefer.queues.base import QueuedTask, TaskState, TaskView
from safedefer.sending.builder import stored_retry_options
from safedefer.sending.routes import ANY_URL
from safedefer.sending.test_mode import TEST_MODE, refuse
from safedefer.task import VerifiedTask
from safedefer.testing.caller import CallThreads, run_here, run_on_loop
from safedefer.testing.clock import Clock
from safedefer.testing.outbox import OwnOutbox
from safedefer.testing.parts import KitObserver, KitSender, KitTransport, Raises, arguments_of, deliver_due, nothing
from safedefer.testing.recorded import Anything, DeferredTask, RecordingQueue, Wanted
from safedefer.testing.reports import Ran, check

if TYPE_CHECKING:
    from collections.abc import Coroutine

#: What an App has made since it was: not of ``__init__``.
_MADE_LATER: Final = {"_delivery": None, "_wsgi": None, "_closed": False}
#: The Apps that a TestApp has made those of ``safedefer.deferred``, the innermost last.
_placed: Final[list[App]] = []


class TestApp(App):
    """An App in test mode: a random key, a queue in memory, a clock that is moved by hand.

    While its context lasts, the App that it was made of, and ``safedefer.deferred``, defer to it; nothing reaches their
    queue. An App that is not in test mode may not enqueue meanwhile: ``ConfigurationError``.

    Args:
        what: An App, whose policy, limits of keys, queues, ``queue.yaml``, targets and ``around`` it takes over; or what
            may run where there is none: patterns, or a ``Policy``.
        clock: The clock; one that begins now by default.
        inline: Run a task when it is deferred, if it is due: ``defer`` returns when it has run, and raises ``TaskFailed``
            if it failed. Tasks of a transaction wait for ``run_due``.
        settings: Any other argument of ``App``; it counts before that of the App.

    Raises:
        ConfigurationError: A setting is wrong.
    """

    __test__ = False  # pytest would take it for a test

    def __init__(
        self, *what: App | str | Policy, clock: Clock | None = None, inline: bool = False, **settings: Any
    ) -> None:
        app, given = arguments_of(what)
        clock = clock or Clock()
        inner: Observer = settings.pop("observer", None) or (LogObserver() if app is None else app.observers)
        observer = KitObserver(inner)
        base = {"environment": "testing", "queue": RecordingQueue(), "clock": clock, "observer": observer}
        super().__init__(**{**base, **given, **settings})
        self._builder.in_test = True
        self.outbox: OwnOutbox = OwnOutbox(
            self._get_queue, environment=self.environment, queues=self.queues, clock=clock
        )
        after = self._run_inline if inline else nothing
        self._sender = KitSender(
            after,
            builder=self._builder,
            queue=self._get_queue,
            outbox=self.outbox,
            observer=self.observers,
            tracing=self.delivery_options.tracing,
        )
        self._parts = dict(vars(self))
        self.app: App = self if app is None else app
        """The App in test mode."""
        self.clock = clock
        """Moves the time of the App."""
        self._observer = observer
        self._faults: list[tuple[str, BaseException | type[BaseException]]] = []
        self._threads = CallThreads(self.delivery_options.concurrency)
        self._transport = KitTransport(self._handle_delivery)
        self._running = Lock()
        self._kept: dict[str, Any] | None = None
        self._real_queue = self.app.outbox.queue
        self._before: App | None = None

    # --- Test mode ---

    def __enter__(self) -> Self:
        """Put the App into test mode, and be the App that ``safedefer.deferred`` uses.

        Raises:
            ConfigurationError: It is active already.
        """
        if self._kept is not None:
            raise ConfigurationError("this TestApp is active already; make another one")
        TEST_MODE.active += 1
        self._kept = {}
        if self.app is not self:
            parts, own = {**self._parts, **_MADE_LATER}, vars(self.app)
            self._real_queue = self.app.outbox.queue
            self._kept = {name: own[name] for name in parts if name in own}
            # What the relay of the App still has to move waits: by the App it would find the queue of the test.
            self.app.outbox.queue = refuse
            own.update(parts)
        self._before = deferred.configured_app()
        if self.app is self or self._before is None or any(self._before is each for each in (self.app, *_placed)):
            deferred.configure(self.app)
        _placed.append(self.app)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the App, and ``safedefer.deferred``, be what they were, and close this one."""
        assert self._kept is not None, "it was entered"
        TEST_MODE.active -= 1
        _placed.pop()
        deferred.configure(self._before)
        try:
            if self.app is not self:
                self._end_made(self.app)
        finally:
            if self.app is not self:
                own = vars(self.app)
                for name in (*self._parts, *_MADE_LATER):
                    own.pop(name, None)
                own.update(self._kept)
                self.app.outbox.queue = self._real_queue
            self._kept = None
            self.close()
            self._threads.close(wait=False)

    @staticmethod
    def _end_made(app: App) -> None:
        """Close what an App has made in test mode: a handler, a loop for WSGI."""
        delivery, wsgi = vars(app).get("_delivery"), vars(app).get("_wsgi")
        if wsgi is not None:
            wsgi.close()
        if delivery is not None:
            delivery.close()

    @property
    def delivery(self) -> Delivery:
        """The handler that ``run_due`` calls; the policy's modules are imported when it is first asked for."""
        with self._lock:
            if self._delivery is None:
                self._direct.load_policy()
                options = self.delivery_options
                self._delivery = Delivery(
                    verifier=self._verifier,
                    codecs=self._codecs,
                    ledger=lambda: self.queue.ledger,
                    blobs=lambda: self.queue.blobs,
                    clock=self.clock,
                    observer=self.observers,
                    options=replace(options, around=(*options.around, self._fault)),
                    threads=self._threads,
                )
            return self._delivery

    # --- What was deferred ---

    @property
    def deferred_tasks(self) -> list[DeferredTask]:
        """What was deferred since the test mode began, in this order, whether it has run or not; arguments are decoded.

        Tasks of a transaction are among them when it has been committed.
        """
        self.outbox.sweep()
        return [self._decoded(task) for task in cast("RecordingQueue", self.queue).recorded]

    def assert_deferred(
        self,
        obj: Callable[..., object],
        /,
        *args: Any,
        queue: str | Anything = ...,
        name: str | Anything | None = ...,
        countdown: float | Anything | None = ...,
        eta: datetime | Anything = ...,
        kwargs: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> DeferredTask:
        """Assert that a call was deferred; return the first such task.

        Args:
            obj: The callable.
            args: Its positional arguments. Without any argument of the task, it may have been called with whatever
                arguments; ``kwargs={}`` asks for none. Arguments are compared by parameter, with defaults, so that
                ``f(1)`` and ``f(order_id=1)`` are one call.
            queue: The queue's name.
            name: The task's name; None is no name.
            countdown: Seconds from the call of ``defer`` to the eta; None is 0.
            eta: When it is due, aware.
            kwargs: Keyword arguments of the task that are named like an option here.
            named: Its other keyword arguments.

        Raises:
            AssertionError: No such call was deferred. The message lists what was.
            NotDeferrable: The callable can never be deferred, or the policy does not name it.
            TypeError: The callable does not take these arguments.
        """
        options = {"queue": queue, "name": name, "countdown": countdown, "eta": eta}
        wanted = self._wanted(obj, args, kwargs, named, options)
        tasks = self.deferred_tasks
        found = next((task for task in tasks if wanted.matches(task)), None)
        if found is None:
            lines = [f"\n    {task}" for task in tasks] or [" nothing"]
            raise AssertionError(f"not deferred: {wanted}; deferred:{''.join(lines)}")
        return found

    def refute_deferred(
        self,
        obj: Callable[..., object],
        /,
        *args: Any,
        queue: str | Anything = ...,
        name: str | Anything | None = ...,
        countdown: float | Anything | None = ...,
        eta: datetime | Anything = ...,
        kwargs: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> None:
        """Assert that no such call was deferred; arguments are those of ``assert_deferred``.

        Without any argument of the task: that the callable was not deferred at all.

        Raises:
            AssertionError: One was.
            NotDeferrable: The callable can never be deferred: the assertion could not fail.
            TypeError: The callable does not take these arguments.
        """
        options = {"queue": queue, "name": name, "countdown": countdown, "eta": eta}
        wanted = self._wanted(obj, args, kwargs, named, options)
        found = [task for task in self.deferred_tasks if wanted.matches(task)]
        if found:
            lines = [f"\n    {task}" for task in found]
            raise AssertionError(f"deferred, {len(found)} times: {wanted}{''.join(lines)}")

    def waiting(self) -> list[TaskView]:
        """Return the tasks that wait, the one that is due first before the others."""
        self.outbox.sweep()
        found = self.queue.tasks(states=[TaskState.WAITING], limit=1_000_000)
        return sorted(found, key=lambda view: view.eta)

    def dead(self) -> list[TaskView]:
        """Return the dead letters, oldest first."""
        found = self.queue.tasks(states=[TaskState.DEAD], limit=1_000_000)
        return sorted(found, key=lambda view: view.created)

    # --- Running ---

    def run_due(self, *, raises: bool = True) -> list[Ran]:
        """Run the tasks that are due by the clock, and those due now that they defer, through the handler, one by one.

        They run in this thread, in an empty context, so that they see the database connections of the test. Inside a running
        event loop they run in another thread; ``run_due_async`` runs coroutines on that loop. Transactional tasks whose
        transaction has been committed are among them; so are, in Django's ``TestCase``, those of blocks that have ended.

        A task that fails is not tried again before the clock is moved. The rates of ``queue.yaml`` hold.

        Args:
            raises: Whether a failure raises; else it is reported like a success.

        Returns:
            The deliveries, in the order in which they ended.

        Raises:
            TaskFailed: A task raised, or was rejected. Its cause is the first error.
            RuntimeError: A task calls it.
        """
        with self._one_run() as run:
            self.outbox.sweep()
            run_here(self._threads, run)
            while self.outbox.sweep():
                run_here(self._threads, run)
        return self._reported(raises=raises)

    async def run_due_async(self, *, raises: bool = True) -> list[Ran]:
        """Do what ``run_due`` does in the running loop: coroutines share it with the test, plain callables run in threads.

        In an async test of Django's, plain callables run in the thread of ``sync_to_async``.
        """
        with self._one_run() as run:
            await self.outbox.sweep_async()
            await run_on_loop(self._threads, run)
            while await self.outbox.sweep_async():
                await run_on_loop(self._threads, run)
        return self._reported(raises=raises)

    def fail_next(
        self,
        obj: Callable[..., object],
        error: BaseException | type[BaseException] = RuntimeError,
        *,
        times: int = 1,
    ) -> None:
        """Let the next attempts of a callable raise instead of being made. They are retried, or not, as in production.

        Args:
            obj: The callable.
            error: What is raised: ``PermanentTaskFailure`` makes a dead letter.
            times: How many attempts.

        Raises:
            NotDeferrable: The callable can never be deferred, or the policy does not name it.
        """
        self._faults += [(self._name_of(obj), error)] * times

    @contextmanager
    def handler_down(self) -> Iterator[None]:
        """Let no handler take a connection while the context lasts: tasks wait, and no attempt is charged."""
        self._transport.down = True
        try:
            yield
        finally:
            self._transport.down = False

    # --- Inside ---

    @contextmanager
    def _one_run(self) -> Iterator[Callable[[], Coroutine[Any, Any, None]]]:
        if not self._running.acquire(blocking=False):
            raise RuntimeError("tasks run already: a task, or another thread, calls run_due(); let the test call it")
        self._observer.handled = []
        attempted: set[str] = set()
        try:
            yield lambda: self._deliver_due(attempted)
        finally:
            self._running.release()

    def _run_inline(self) -> None:
        if not self._running.locked():  # else the run under way finds it
            self.run_due()

    async def _deliver_due(self, attempted: set[str]) -> None:
        seconds = self.delivery_options.lease_seconds
        await deliver_due(
            self.queue,
            self._transport,
            self._threads,
            attempted,
            clock=self.clock,
            observer=self.observers,
            file=self.queue_file,
            seconds=seconds,
        )

    async def _handle_delivery(self, headers: Mapping[str, str], body: bytes, *, path: str) -> Response:
        return await self.handle(headers, body, path=path)

    def _reported(self, *, raises: bool) -> list[Ran]:
        handled, self._observer.handled = self._observer.handled, []
        for event in handled:
            if isinstance(event.error, KeyboardInterrupt):  # the developer's, not the task's
                raise event.error
        ran = [self._report(event) for event in handled]
        if raises:
            check(ran)
        return ran

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
            error=event.error,
        )

    def _fault(self) -> AbstractContextManager[object]:
        """Return what is entered around a run: it raises what ``fail_next`` was told."""
        running = current_task()
        view = None if running is None or not self._faults else self.queue.find(running.id)
        for fault in self._faults:
            if view is not None and fault[0] == view.callable_name:
                self._faults.remove(fault)
                return Raises(fault[1])
        return nullcontext()

    def _name_of(self, obj: Callable[..., object]) -> str:
        return str(self._builder.callable_ref(obj))

    def _wanted(
        self,
        obj: Callable[..., object],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        named: Mapping[str, Any],
        options: Mapping[str, object],
    ) -> Wanted:
        exact = bool(args or named or kwargs is not None)
        wanted = Wanted(
            callable=self._name_of(obj),
            function=cast("Callable[..., object]", unwrapped(obj)),
            args=args,
            kwargs={**named, **(kwargs or {})} if exact else None,
            options=options,
        )
        wanted.check()
        return wanted

    def _decoded(self, queued: QueuedTask) -> DeferredTask:
        self._direct.load_policy()
        token = queued.token if queued.blob is None else queued.blob.data
        # At its time: what is not due yet is decoded, too.
        task = self._verifier.verify(token, url=ANY_URL, now=max(queued.eta, queued.created))
        assert isinstance(task, VerifiedTask), "a stored token holds the call itself"
        prepared = prepare(task, self._codecs)
        _, queue, target, url = split_audience(task.claims["aud"])
        return DeferredTask(
            id=queued.id,
            callable=str(task.ref),
            function=prepared.target,
            args=tuple(prepared.args),
            kwargs=dict(prepared.kwargs),
            queue=queue,
            name=queued.name,
            eta=datetime.fromtimestamp(queued.eta, UTC),
            countdown=queued.eta - queued.created,
            url=url,
            target=target,
            headers=queued.headers,
            retry_options=stored_retry_options(queued.retry_options),
        )
