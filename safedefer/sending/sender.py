"""Every way to defer: one call or many, from a thread or a coroutine, at once or with a transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, ParamSpec, TypeAlias

from safedefer.errors import DeferError, InvalidTaskError, QueueUnavailable
from safedefer.events import Observer, TaskEnqueued, hears_enqueued, notify
from safedefer.execution.tracing import TaskTracing
from safedefer.options import Options, Task
from safedefer.queues.base import AlreadyWaiting, PullQueue, QueuedTask, TaskState
from safedefer.queues.capabilities import FULL, Capabilities, refuse_gaps
from safedefer.sending.advice import tell_more
from safedefer.sending.builder import Builder, stored_task
from safedefer.transactions.outbox import Outbox

_P = ParamSpec("_P")

#: One call of ``defer_many``: the callable, its positional and its keyword arguments.
CallTuple: TypeAlias = tuple[Callable[..., object], Sequence[object], Mapping[str, object]]

#: A task that was signed, and is not stored yet.
Built: TypeAlias = tuple[Task, QueuedTask]

#: How often a unique task is offered to the queue, where the task that it is the same as ends meanwhile.
_UNIQUE_TRIES: Final = 5


class Sender:
    """Builds tasks and hands them to the queue, or to the outbox.

    Args:
        builder: Makes the task of a call.
        queue: Returns the queue; called for every call.
        outbox: Where transactional tasks go.
        observer: Told of every task that was enqueued.
        tracing: Makes a span of every call.
    """

    def __init__(
        self,
        *,
        builder: Builder,
        queue: Callable[[], PullQueue],
        outbox: Outbox,
        observer: Observer,
        tracing: TaskTracing | None = None,
    ) -> None:
        self._builder = builder
        self._queue = queue
        self._outbox = outbox
        self._observer = observer
        self._tracing = tracing

    def send(
        self, options: Options, obj: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Task:
        """Defer one call: what every other form of ``defer`` comes to.

        Raises:
            DeferError: One of its subclasses says what is wrong with the call or its options.
            QueueUnavailable: The task was not stored.
        """
        if self._tracing is None:
            return self._send(options, obj, args, kwargs)
        with self._tracing.sending(options.queue) as span:
            task = self._send(options, obj, args, kwargs)
            span.sent((task.id,))
            return task

    def _send(
        self, options: Options, obj: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Task:
        if options.transactional:
            return self._send_with_transaction(options, obj, args, kwargs)
        task, queued = self._builder.build(options, obj, args, kwargs)
        queue = self._queue()
        if (capabilities := queue.capabilities) is not FULL:
            refuse_gaps(capabilities, queued)
        if options.unique:
            return self._enqueue_unique(queue, task, queued)
        queue.enqueue_many((queued,))
        self._tell(queued)
        return task

    async def send_async(
        self, options: Options, obj: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Task:
        """Do what ``send`` does, without blocking the event loop."""
        import asyncio  # noqa: PLC0415  # loaded already, where there is a loop

        if not options.transactional:
            return await asyncio.to_thread(self.send, options, obj, args, kwargs)
        # On the loop: a transaction belongs to its thread, and to its task.
        if self._tracing is None:
            return await self._await_with_transaction(options, obj, args, kwargs)
        with self._tracing.sending(options.queue) as span:
            task = await self._await_with_transaction(options, obj, args, kwargs)
            span.sent((task.id,))
            return task

    async def _await_with_transaction(
        self, options: Options, obj: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Task:
        import asyncio  # noqa: PLC0415  # as above

        task, queued = self._build_for_transaction(options, obj, args, kwargs, awaits=True)
        try:
            await self._outbox.put_async(queued)
        except AlreadyWaiting as error:
            ours = self._written(error)
            return await asyncio.to_thread(self._waiting, error) if ours is None else ours
        self._tell(queued)
        return replace(task, was_enqueued=False)

    def send_many(self, options: Options, calls: Iterable[CallTuple], *, atomic: bool = True) -> list[Task]:
        """Defer several calls with the same options.

        Args:
            options: Those of every call.
            calls: The calls.
            atomic: Whether all are stored or none. False is for engines that cannot: where it raises, some of the
                tasks may have been stored.

        Raises:
            InvalidTaskError: The engine stores no batch as a whole, or the options fit one task only.
            DeferError: As ``send``.
        """
        if self._tracing is None:
            return self._send_many(options, calls, atomic=atomic)
        with self._tracing.sending(options.queue, batch=True) as span:
            tasks = self._send_many(options, calls, atomic=atomic)
            span.sent([task.id for task in tasks])
            return tasks

    def _send_many(self, options: Options, calls: Iterable[CallTuple], *, atomic: bool) -> list[Task]:
        if options.transactional:
            return self._send_many_with_transaction(options, calls)
        queue = self._queue()
        capabilities = queue.capabilities
        if atomic and not capabilities.batch_atomic:
            raise InvalidTaskError(
                "the engine of this queue cannot store several tasks as a whole: some could be stored where others "
                "are not; pass atomic=False if that will do, or use another engine"
            )
        built = self._built(capabilities, options, calls)
        if capabilities.streams and not (options.name or options.unique):
            return self._send_stream(queue, built)
        pairs = list(built)
        _check_many(options, len(pairs))
        if pairs:
            queue.enqueue_many([queued for _, queued in pairs])
        for _, queued in pairs:
            self._tell(queued)
        return [task for task, _ in pairs]

    def _send_stream(self, queue: PullQueue, built: Iterable[tuple[Task, QueuedTask]]) -> list[Task]:
        """Sign tasks while the queue stores those before them, in one transaction."""
        tasks: list[Task] = []
        told: list[QueuedTask] = []

        def stream() -> Iterator[QueuedTask]:
            for task, queued in built:
                tasks.append(task)
                told.append(queued)
                yield queued

        queue.enqueue_many(stream())
        for queued in told:
            self._tell(queued)
        return tasks

    def _built(
        self, capabilities: Capabilities, options: Options, calls: Iterable[CallTuple]
    ) -> Iterator[tuple[Task, QueuedTask]]:
        for obj, args, kwargs in calls:
            task, queued = self._builder.build(options, obj, args, kwargs)
            if capabilities is not FULL:
                refuse_gaps(capabilities, queued)
            yield task, queued

    def build(
        self, options: Options, obj: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Built:
        """Sign the task of a call, to be stored by ``store``. What can be wrong with the call is raised here.

        Raises:
            InvalidTaskError: It is transactional, or the engine lacks what the options ask for.
            DeferError: As ``send``.
        """
        if options.transactional:
            raise InvalidTaskError("a task that is stored later cannot be transactional; defer it inside the block")
        built = self._builder.build(options, obj, args, kwargs)
        if (capabilities := self._queue().capabilities) is not FULL:
            refuse_gaps(capabilities, built[1])
        return built

    def store(self, built: Sequence[Built]) -> list[Task]:
        """Store tasks: all or none where the engine can, then the unique ones, one by one.

        Raises:
            QueueUnavailable: Those that are not unique were not stored, or some of them where the engine cannot do that;
                of unique ones, this and those after it.
            DeferError: As ``send``: a name is taken.
        """
        if self._tracing is None or not built:
            return self._store(built)
        with self._tracing.sending(built[0][1].queue, batch=len(built) > 1) as span:
            tasks = self._store(built)
            span.sent([task.id for task in tasks])
            return tasks

    def _store(self, built: Sequence[Built]) -> list[Task]:
        queue = self._queue()
        plain = [queued for _, queued in built if queued.unique_key is None]
        for some in [plain] if queue.capabilities.batch_atomic else [[queued] for queued in plain]:
            if some:
                queue.enqueue_many(some)
            for queued in some:
                self._tell(queued)
        return [
            task if queued.unique_key is None else self._enqueue_unique(queue, task, queued) for task, queued in built
        ]

    def _enqueue_unique(self, queue: PullQueue, task: Task, queued: QueuedTask) -> Task:
        blocker = ""
        for _ in range(_UNIQUE_TRIES):
            try:
                queue.enqueue_many((queued,))
            except AlreadyWaiting as error:
                blocker = error.task_id
                existing = queue.find(blocker)
                if existing is not None and existing.state in _ALIVE:
                    return stored_task(existing)
                continue  # it ended in between
            self._tell(queued)
            return task
        raise QueueUnavailable(
            f"the queue keeps this unique call for the task {blocker}, which has ended; the task was not stored: "
            "defer it again, or without unique; on PostgreSQL, let this user delete rows of safedefer.uniques"
        )

    # --- With a transaction ---

    def _build_for_transaction(
        self,
        options: Options,
        obj: Callable[..., object],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        awaits: bool = False,
    ) -> tuple[Task, QueuedTask]:
        try:
            self._outbox.check(named=options.name is not None or bool(options.unique), awaits=awaits)
        except DeferError as error:
            if not options.pickle:  # to pickle runs code of the values
                tell_more(error, partial(self._builder.build, options, obj, args, kwargs))
            raise
        task, queued = self._builder.build(options, obj, args, kwargs)
        if (capabilities := self._queue().capabilities) is not FULL:
            refuse_gaps(capabilities, queued)
        return task, queued

    def _send_with_transaction(
        self, options: Options, obj: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Task:
        task, queued = self._build_for_transaction(options, obj, args, kwargs)
        try:
            self._outbox.put(queued)
        except AlreadyWaiting as error:
            return self._written(error) or self._waiting(error)
        self._tell(queued)
        return replace(task, was_enqueued=False)

    def _send_many_with_transaction(self, options: Options, calls: Iterable[CallTuple]) -> list[Task]:
        built = [self._build_for_transaction(options, obj, args, kwargs) for obj, args, kwargs in calls]
        _check_many(options, len(built))
        self._outbox.put(*(queued for _, queued in built))
        for _, queued in built:
            self._tell(queued)
        return [replace(task, was_enqueued=False) for task, _ in built]

    def _written(self, error: AlreadyWaiting) -> Task | None:
        """Return the task that a unique one is the same as, if it was deferred in the same transaction."""
        queued = self._outbox.written(error.task_id)
        return None if queued is None else replace(stored_task(queued), was_enqueued=False)

    def _waiting(self, error: AlreadyWaiting) -> Task:
        """Return the task that a unique one is the same as. Raises ``error`` if it has ended meanwhile."""
        existing = self._queue().find(error.task_id)
        if existing is None or existing.state not in _ALIVE:
            raise error
        return stored_task(existing)

    def _tell(self, queued: QueuedTask) -> None:
        if not hears_enqueued(self._observer):
            return
        notify(
            self._observer,
            TaskEnqueued(task_id=queued.id, queue=queued.queue, callable=queued.callable_name, size=len(queued.token)),
        )


_ALIVE: Final = frozenset({TaskState.WAITING, TaskState.RUNNING})


def _check_many(options: Options, count: int) -> None:
    if options.name is not None and count > 1:
        raise InvalidTaskError("several tasks cannot have one name; defer them one by one, or without a name")
    if options.unique:
        raise InvalidTaskError("unique tasks are deferred one by one; leave unique out, or call defer() for each")


class Deferral:
    """``defer`` with options: what ``app.options(...)`` returns. Reusable."""

    def __init__(self, sender: Callable[[], Sender], options: Options) -> None:
        self._sender = sender  # asked at every call: one that a module keeps must obey the test mode of its App
        self._options = options

    def defer(self, obj: Callable[_P, object], /, *args: _P.args, **kwargs: _P.kwargs) -> Task:
        """Do what ``App.defer`` does, with these options.

        Raises:
            TaskAlreadyExistsError: A task of this name lives in the queue.
            TombstonedTaskError: A task of this name ended there not long ago.
            UnknownQueueError: There is no such queue.
            DeferError: As ``App.defer``.
        """
        return self._sender().send(self._options, obj, args, kwargs)

    async def defer_async(self, obj: Callable[_P, object], /, *args: _P.args, **kwargs: _P.kwargs) -> Task:
        """Do what ``defer`` does, without blocking the event loop."""
        return await self._sender().send_async(self._options, obj, args, kwargs)

    def defer_many(self, calls: Iterable[CallTuple], /, *, atomic: bool = True) -> list[Task]:
        """Defer several calls with these options, in one transaction: all are stored, or none.

        Args:
            calls: Callables with their positional and keyword arguments.
            atomic: False lets an engine store some of them that cannot store all or none.

        Raises:
            InvalidTaskError: The engine cannot store all or none, and ``atomic`` is True.
            DeferError: As ``App.defer``.
        """
        return self._sender().send_many(self._options, calls, atomic=atomic)
