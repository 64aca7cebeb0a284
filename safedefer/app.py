"""The application: keys, policy, codecs, a queue and a handler, put together.

``App`` is the composition root. It does nothing when it is made but check its configuration; the
queue is opened when it is first used, in the process that uses it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import secrets
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeAlias, cast, overload

from safedefer.blobs import Blob
from safedefer.claims import (
    LIFETIME,
    MAX_LIFETIME,
    VERSION,
    Call,
    Claims,
    Limits,
    callable_name,
    split_audience,
    write_json,
)
from safedefer.codecs.pickled import PickledCodec
from safedefer.codecs.typed import TypedCodec
from safedefer.delivery.handler import Delivery, DeliveryOptions, Response
from safedefer.errors import (
    BadTransactionStateError,
    CapabilityExceeded,
    ConfigurationError,
    Error,
    InvalidTaskError,
    InvalidTaskRetryOptionsError,
    InvalidUrlError,
    NotDeferrable,
    PermanentTaskFailure,
    QueueUnavailable,
    RejectedTask,
    UnknownQueueError,
)
from safedefer.events import LogObserver, Observer, TaskEnqueued, hears_enqueued, notify
from safedefer.execution.binding import check_binds
from safedefer.execution.run import Codec, Validate, call_in_thread, current_task, is_async, prepare
from safedefer.keys import Keyring
from safedefer.options import (
    DEFAULT_OPTIONS,
    DEFAULT_QUEUE,
    DEFAULT_TARGET,
    DEFAULT_URL,
    QUEUE_URLS,
    Options,
    Task,
    TaskRetryOptions,
)
from safedefer.policy import Policy
from safedefer.queues import open_queue
from safedefer.queues.base import (
    FULL,
    AlreadyWaiting,
    DeadFilter,
    PullQueue,
    QueuedTask,
    StorageOptions,
    TaskState,
    TaskView,
)
from safedefer.queues.capabilities import refuse_gaps
from safedefer.queues.config import QueueFile
from safedefer.refs import UNBOUND, bound_object
from safedefer.settings import Settings
from safedefer.signing import Serves, Signer, Verifier
from safedefer.task import VerifiedPointer, VerifiedTask
from safedefer.transactions.databases import AwaitedConnection
from safedefer.transactions.outbox import Outbox

if TYPE_CHECKING:
    from aiohttp.web import AbstractRouteDef

_P = ParamSpec("_P")

#: One call of ``defer_many``: the callable, its positional and its keyword arguments.
CallTuple: TypeAlias = tuple[Callable[..., object], Sequence[object], Mapping[str, object]]


class App:
    """What defers and handles the tasks of one application.

    Args:
        keyring: The keys; the active one signs.
        policy: What may be deferred and run.
        queue: A queue's URL (``sqlite:///tasks.db``, ``memory://``) or a queue.
        environment: ``prod``, ``staging``, ...: tasks of one do not run in another.
        url: The path that tasks are posted to by default.
        prefix: A path in front of the handler's, which tokens do not name.
        queues: The names of the queues there are; None is those of ``queue_yaml``, or any name without one.
        queue_yaml: A ``queue.yaml``: rates, caps, targets and retry parameters of queues. Without one nothing is limited.
        storage: How long and how much the queue keeps, where ``queue`` is a URL.
        outboxes: Databases that dispatching processes sweep for transactional tasks, besides those that they use
            themselves: ``sqlite:///shop.db``, ``postgresql://user@host/shop`` or a SQLAlchemy URL.
        targets: Addresses of handlers by the name that ``target`` gives them; None is any name, one handler.
        allow_pickle: Whether arguments may travel as pickles where a call and its key say so too.
        by_value_pickles_run_code: Whether functions may travel by value inside pickles: whoever has
            a key that may sign pickles then runs any code.
        validate: ``"annotations"`` checks arguments against the callable's annotations in the handler.
        concurrency: How many tasks run at once in this process.
        lease_seconds: How long a silent handler is believed to be running a task; a live one prolongs it.
        inline_limit: Tokens above this many bytes are stored as blobs (App Engine: about 10 kilobytes).
        limits: Bounds of tokens and arguments.
        observer: Told what happens; logs by default.
        clock: Seconds since the epoch.

    Raises:
        ConfigurationError: An argument is wrong.
    """

    def __init__(
        self,
        *,
        keyring: Keyring,
        policy: Policy,
        queue: str | PullQueue = "sqlite:///safedefer.db",
        environment: str = "default",
        url: str = DEFAULT_URL,
        prefix: str = "",
        queues: Iterable[str] | None = None,
        queue_yaml: str | Path | QueueFile | None = None,
        storage: StorageOptions | None = None,
        outboxes: Sequence[str] = (),
        targets: Mapping[str, str] | None = None,
        allow_pickle: bool = False,
        by_value_pickles_run_code: bool = False,
        validate: Validate = None,
        concurrency: int = 16,
        lease_seconds: float = 60.0,
        inline_limit: int = 10 * 1024,
        limits: Limits | None = None,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not isinstance(keyring, Keyring) or not isinstance(policy, Policy):
            raise ConfigurationError(
                "an App needs keyring=Keyring(...) and policy=Policy(...); see `safedefer keys new`"
            )
        self.queue_file = QueueFile.load(queue_yaml) if isinstance(queue_yaml, str | Path) else queue_yaml
        queues = _declared(queues, targets, self.queue_file)
        _check_names(environment, url, prefix, queues, targets)
        _check_numbers(concurrency, inline_limit, lease_seconds, validate)
        self._keyring = keyring
        self.environment = environment
        self.url = url
        self.prefix = prefix.rstrip("/")
        self.queues = None if queues is None else frozenset({*queues, DEFAULT_QUEUE})
        self.targets = None if targets is None else dict(targets)
        self.policy = policy
        self._loaded = False
        self._own_urls = _OwnUrls(url)
        self.observer: Observer = LogObserver() if observer is None else observer
        self._clock = clock
        self._inline_limit = inline_limit
        limits = limits or Limits()
        served = None if targets is None else frozenset({*targets, DEFAULT_TARGET})
        self._signer = Signer(keyring, policy, limits=limits)
        self._verifier = Verifier(
            keyring,
            policy,
            serves=Serves(environment=environment, queues=self.queues, targets=served),
            allow_pickle=allow_pickle,
            limits=limits,
        )
        self._codecs: dict[str, Codec] = {"typed": TypedCodec(limits=limits)}
        if allow_pickle:
            self._codecs["pickle"] = PickledCodec(limits=limits, by_value_runs_code=by_value_pickles_run_code)
        self._queue: PullQueue | str = queue
        limit = None if self.queue_file is None else self.queue_file.total_storage_limit
        self._storage = storage if limit is None else replace(storage or StorageOptions(), blob_limit=limit)
        self._default_route = self._route(DEFAULT_OPTIONS)
        self.outbox = Outbox(
            lambda: self.queue, environment=environment, queues=self.queues, urls=outboxes, clock=clock
        )
        # Reentrant: loading the policy imports modules, and one of them may defer something.
        self._lock = RLock()
        self._delivery: Delivery | None = None
        self._closed = False
        self._delivery_options = DeliveryOptions(
            max_bytes=limits.token_bytes, concurrency=concurrency, lease_seconds=lease_seconds, validate=validate
        )

    @classmethod
    def from_settings(cls, settings: Settings | None = None) -> App:
        """Build from ``SAFEDEFER_*`` in the environment.

        Raises:
            ConfigurationError: Keys or policy are missing, or a setting is wrong.
        """
        settings = settings or Settings.load()
        return cls(
            keyring=settings.keyring(),
            policy=settings.load_policy(),
            queue=settings.queue,
            environment=settings.environment,
            url=settings.url,
            prefix=settings.prefix,
            queues=settings.queues,
            queue_yaml=settings.queue_yaml,
            storage=settings.storage(),
            outboxes=settings.outboxes or (),
            targets=settings.targets,
            allow_pickle=settings.allow_pickle,
            concurrency=settings.concurrency,
            lease_seconds=settings.lease_seconds,
            inline_limit=settings.inline_limit,
        )

    # --- Deferring ---

    def defer(self, obj: Callable[_P, object], /, *args: _P.args, **kwargs: _P.kwargs) -> Task:
        """Call ``obj(*args, **kwargs)`` later, as soon as possible, on the default queue.

        When it returns, the task is stored and survives a crash of this process.

        Args:
            obj: A function or class at the top level of a module, an object of such a class with
                ``__call__``, one of its instance or class methods, a built-in function or method.
            args: Its positional arguments.
            kwargs: Its keyword arguments, all of them: options are given with ``options``.

        Returns:
            The task.

        Raises:
            NotDeferrable: The callable is of another category, or the policy does not admit it.
            TypeError: It does not take these arguments.
            UnencodableArgument: A value cannot arrive exactly as it is; ``path`` says which.
            TaskTooLargeError: The token is over the limit.
            QueueUnavailable: The task was not stored.
        """
        return self.defer_with(DEFAULT_OPTIONS, obj, args, kwargs)

    async def defer_async(self, obj: Callable[_P, object], /, *args: _P.args, **kwargs: _P.kwargs) -> Task:
        """Do what ``defer`` does, without blocking the event loop."""
        return await self.defer_with_async(DEFAULT_OPTIONS, obj, args, kwargs)

    def defer_many(self, calls: Iterable[CallTuple], /) -> list[Task]:
        """Defer several calls in one transaction: all are stored, or none."""
        return self.defer_many_with(DEFAULT_OPTIONS, calls)

    def options(
        self,
        *,
        countdown: float | None = None,
        eta: datetime | None = None,
        headers: Mapping[str, str] | None = None,
        name: str | None = None,
        queue: str = DEFAULT_QUEUE,
        retry_options: TaskRetryOptions | None = None,
        target: str | None = None,
        transactional: bool = False,
        unique: bool = False,
        url: str | None = DEFAULT_URL,
        pickle: bool = False,
    ) -> Deferral:
        """Return a front of ``defer`` with options; see ``Options`` for their meaning.

        Raises:
            InvalidTaskError: An option is wrong.
        """
        target, url = self.destination(target, url)
        chosen = Options(
            countdown=countdown,
            eta=eta,
            headers={} if headers is None else headers,
            name=name,
            queue=queue,
            retry_options=retry_options,
            target=target,
            transactional=transactional,
            unique=unique,
            url=url,
            pickle=pickle,
        )
        return Deferral(self, chosen)

    def destination(self, target: str | None, url: str | None) -> tuple[str | None, str | None]:
        """Turn an absolute URL below the address of a target into that target and a path.

        Args:
            target: The target that was asked for, if one was.
            url: A path, None, or an absolute URL.

        Returns:
            The target and the path; unchanged if ``url`` is not absolute.

        Raises:
            InvalidUrlError: The URL is below no address that the operator listed, or below another target's.
        """
        if type(url) is not str or not url.startswith(("http://", "https://")):
            return target, url
        for name, address in (self.targets or {}).items():
            base = address.rstrip("/")
            if url.startswith(f"{base}/") and target in {None, name}:
                return name, url.removeprefix(base)
        raise InvalidUrlError(
            "an absolute URL must be below the address of a target, so that tasks go only where the operator allows; "
            "set SAFEDEFER_TARGETS, or give a path"
        )

    def defer_with(
        self, options: Options, obj: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Task:
        """Defer one call with an ``Options`` object: what every other form of ``defer`` comes to."""
        task, queued = self._build(options, obj, args, kwargs)
        if options.transactional:
            try:
                self.outbox.put(queued)
            except AlreadyWaiting as error:
                return self._waiting_with(error) or self._waiting(error)
            task = replace(task, was_enqueued=False)
        elif options.unique:
            return self._enqueue_unique(task, queued)
        else:
            self.queue.enqueue(queued)
        self._tell(queued)
        return task

    async def defer_with_async(
        self, options: Options, obj: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Task:
        """Do what ``defer_with`` does, without blocking the event loop."""
        if not options.transactional:
            return await asyncio.to_thread(self.defer_with, options, obj, args, kwargs)
        # Here: a transaction belongs to its thread, and to its task.
        task, queued = self._build(options, obj, args, kwargs, awaits=True)
        try:
            await self.outbox.put_async(queued)
        except AlreadyWaiting as error:
            ours = self._waiting_with(error)
            return await asyncio.to_thread(self._waiting, error) if ours is None else ours
        self._tell(queued)
        return replace(task, was_enqueued=False)

    def _waiting_with(self, error: AlreadyWaiting) -> Task | None:
        """Return the task that a unique one is the same as, if it was deferred in the same transaction."""
        queued = self.outbox.written(error.task_id)
        return None if queued is None else replace(_task_of(queued), was_enqueued=False)

    def _waiting(self, error: AlreadyWaiting) -> Task:
        """Return the task that a unique one is the same as. Raises ``error`` if it has ended meanwhile."""
        existing = self.queue.find(error.task_id)
        if existing is None or existing.state not in {TaskState.WAITING, TaskState.RUNNING}:
            raise error
        return _task_of(existing)

    def defer_many_with(self, options: Options, calls: Iterable[CallTuple]) -> list[Task]:
        """Defer several calls with an ``Options`` object, in one transaction."""
        if self.queue.capabilities.streams and not (options.name or options.unique or options.transactional):
            return self._defer_stream(options, calls)
        built = [self._build(options, obj, args, kwargs) for obj, args, kwargs in calls]
        if options.name is not None and len(built) > 1:
            raise InvalidTaskError("several tasks cannot have one name; defer them one by one, or without a name")
        if options.unique:
            raise InvalidTaskError("unique tasks are deferred one by one; leave unique out, or call defer() for each")
        if options.transactional:
            self.outbox.put(*(queued for _, queued in built))
        elif built:
            self.queue.enqueue_many([queued for _, queued in built])
        for _, queued in built:
            self._tell(queued)
        return [replace(task, was_enqueued=not options.transactional) for task, _ in built]

    def _defer_stream(self, options: Options, calls: Iterable[CallTuple]) -> list[Task]:
        """Sign tasks while the queue stores those before them, in one transaction."""
        tasks: list[Task] = []
        told: list[QueuedTask] = []

        def build() -> Iterator[QueuedTask]:
            for obj, args, kwargs in calls:
                task, queued = self._build(options, obj, args, kwargs)
                tasks.append(task)
                told.append(queued)
                yield queued

        self.queue.enqueue_many(build())
        for queued in told:
            self._tell(queued)
        return tasks

    def _enqueue_unique(self, task: Task, queued: QueuedTask) -> Task:
        while True:
            try:
                self.queue.enqueue(queued)
            except AlreadyWaiting as error:
                existing = self.queue.find(error.task_id)
                if existing is not None and existing.state in {TaskState.WAITING, TaskState.RUNNING}:
                    return _task_of(existing)
                continue  # it ended in between
            self._tell(queued)
            return task

    # --- Transactions ---

    @overload
    def transaction(self, connection: AwaitedConnection) -> AbstractAsyncContextManager[None]: ...  # type: ignore[overload-overlap]  # the first one counts

    @overload
    def transaction(self, connection: object) -> AbstractContextManager[None]: ...

    def transaction(self, connection: object) -> AbstractContextManager[None] | AbstractAsyncContextManager[None]:
        """Make tasks that are deferred with ``transactional=True`` in this block go with a transaction.

        They are enqueued if it commits, and only then. If no transaction is open, the block opens one, commits it
        at its end, and undoes it if the block raises; one that is open already stays the caller's to commit.

        The block of a connection that is awaited is awaited, too, and so are its tasks::

            async with app.transaction(connection):
                await app.options(transactional=True).defer_async(send_receipt, order_id)

        Args:
            connection: A connection of psycopg 3 or asyncpg, a ``sqlite3.Connection``, a SQLAlchemy connection or
                session (on SQLite or PostgreSQL), Django's connection (as well), or an ``apsw.Connection``. It may be
                to the queue's own database, by apsw in the case of a file.

        Raises:
            BadTransactionStateError: On entering: the connection is of no known kind, or cannot be used for this.
        """
        return self.outbox.transaction(connection)

    @overload
    def once(  # type: ignore[overload-overlap]  # the first one counts
        self, connection: AwaitedConnection, effect: str | None = None
    ) -> AbstractAsyncContextManager[bool]: ...

    @overload
    def once(self, connection: object, effect: str | None = None) -> AbstractContextManager[bool]: ...

    def once(
        self, connection: object, effect: str | None = None
    ) -> AbstractContextManager[bool] | AbstractAsyncContextManager[bool]:
        """Give True the first time, and False when the effect has been had: for an effect that happens exactly once.

        The note is in the transaction of the effect itself, which is opened and ended as ``transaction`` does. ::

            with app.once(connection) as first:
                if first:
                    connection.execute("UPDATE accounts ...")

        Args:
            connection: As for ``transaction``.
            effect: Names it, up to 700 characters; without it, the task that runs and the one that it re-runs.

        Raises:
            BadTransactionStateError: There is no name and no task runs here, or as ``transaction``.
            InvalidTaskError: The name is empty, too long, or has a character that a database does not take.
        """
        context = current_task()
        if effect is not None:
            _check_effect(effect)
            return self.outbox.once(connection, effect=f"effect:{effect}")
        if context is None:
            raise BadTransactionStateError("no task runs here; name the effect: app.once(connection, 'charge-42')")
        also = None if context.retry_of is None else f"task:{context.retry_of}"
        return self.outbox.once(connection, effect=f"task:{context.id}", also=also)

    def serialize(self, obj: Callable[..., object], /, *args: Any, **kwargs: Any) -> bytes:
        """Return the signed token of a call, for the default queue and URL; enqueues nothing."""
        return self._signer.sign(self._claims(DEFAULT_OPTIONS, obj, args, kwargs, self._clock()))

    def _build(
        self,
        options: Options,
        obj: Callable[..., object],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        awaits: bool = False,
    ) -> tuple[Task, QueuedTask]:
        if options.transactional:
            self.outbox.check(named=options.name is not None or options.unique, awaits=awaits)
        self._check_destination(options)
        now = self._clock()
        claims = self._claims(options, obj, args, kwargs, now)
        task, queued = self._package(claims, options, now)
        if options.unique:
            queued = queued._replace(unique_key=_unique_key(claims))
        if (capabilities := self.queue.capabilities) is not FULL:
            refuse_gaps(capabilities, queued)
        return task, queued

    def _package(self, claims: Claims, options: Options, now: float) -> tuple[Task, QueuedTask]:
        """Sign claims, and wrap the token for the queue: as a blob with a pointer where it is oversize."""
        payload = token = self._signer.sign(claims)
        digest = sha256(token)
        blob = None
        if len(token) > self._inline_limit:
            blob = Blob(_random_id(), token)
            pointer = {"id": blob.id, "sha256": digest.hexdigest(), "length": len(token)}
            shared = {name: value for name, value in claims.items() if name in _POINTER_CLAIMS}
            payload = self._signer.sign(cast("Claims", {**shared, "blob": pointer}))
        eta = options.due(now)
        _, queue, target, url = split_audience(claims["aud"])
        trace = claims.get("trace")
        headers = {**options.headers, **({"traceparent": trace} if trace is not None else {})}
        queued = QueuedTask(
            id=claims["jti"],
            queue=queue,
            token=payload,
            audience=claims["aud"],
            url=url,
            target=target,
            eta=eta,
            created=now,
            expires=claims["exp"],
            name=claims.get("name"),
            headers=headers,
            retry_options={} if options.retry_options is None else options.retry_options.given(),
            digest=digest.digest(),
            blob=blob,
            blob_id=None if blob is None else blob.id,
            callable_name=callable_name(claims["call"]),
        )
        task = Task(
            id=queued.id,
            name=queued.name,
            queue_name=queue,
            url=url,
            target=target,
            headers=headers,
            payload=payload,
            eta=datetime.fromtimestamp(eta, UTC),
            retry_options=options.retry_options,
            was_enqueued=True,
        )
        return task, queued

    def _claims(
        self,
        options: Options,
        obj: Callable[..., object],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        now: float,
    ) -> Claims:
        gate = self._signer.gate
        ref = gate.callable_ref(obj)
        try:
            check_binds(obj, args, kwargs)
        except TypeError as error:
            raise TypeError(
                f"{ref} does not take these arguments: {error}; defer() passes them on as they are"
            ) from None
        codec = self._pickled() if options.pickle else self._codecs["typed"]
        # What makes a call unique is compared as trees, whose members can be sorted.
        encode = codec.encode if options.unique else codec.write
        bound, positional, named = encode((bound_object(obj), tuple(args), dict(kwargs)), gate)
        made = due = int(now)
        audience, lifetime = self._default_route
        if options is not DEFAULT_OPTIONS:
            due = int(options.due(now))
            audience, lifetime = self._route(options)
        # Every part was checked by itself.
        claims: Claims = {
            "v": VERSION,
            "jti": new_task_id(now),
            "iat": made,
            "nbf": due,
            "exp": due + lifetime,
            "aud": audience,
            "cty": "pickle" if options.pickle else "typed",
        }
        if options.name is not None:
            claims["name"] = options.name
        call: Call = {"kind": ref.kind, "module": ref.module, "qualname": ref.qualname}
        if ref.member is not None:
            call["member"] = ref.member
        if bound is not UNBOUND:
            call["bound"] = bound
        claims["call"] = call
        claims["args"] = positional
        claims["kwargs"] = named
        if options.headers:
            claims["headers"] = dict(options.headers)
        return claims

    def _pickled(self) -> Codec:
        """Return the codec of pickled arguments. Raises ``NotDeferrable`` if they may not be sent."""
        codec = self._codecs.get("pickle")
        if codec is None:
            raise NotDeferrable("pickled arguments are off; make the App with allow_pickle=True", reason="pickle-off")
        if not self._keyring.active.pickle:
            raise NotDeferrable(
                f"key {self._keyring.active.kid} may not sign pickled arguments; give it pickle=True, or use another",
                reason="pickle-key",
            )
        return codec

    def _route(self, options: Options) -> tuple[str, int]:
        """Return the audience of a task, and for how many seconds after its eta it lives."""
        url = self.url if options.url == DEFAULT_URL else options.path
        target = options.target or self._target(options.queue)
        retry_options = self._retry_options(options.queue, options.retry_options)
        return f"{self.environment}:{options.queue}:{target}:{url}", _lifetime(retry_options)

    def check_queue(self, name: str) -> None:
        """Check that a queue may exist.

        Raises:
            InvalidTaskError: The name is impossible.
            UnknownQueueError: It is not one of those that are declared.
        """
        self._check_destination(Options(queue=name))

    def _check_destination(self, options: Options) -> None:
        if self.queues is not None and options.queue not in self.queues:
            raise UnknownQueueError(
                f"there is no queue {options.queue}; declare it, or use one of {_list(self.queues)}"
            )
        known = self.targets is None or options.target in {None, DEFAULT_TARGET, *self.targets}
        if not known:
            raise InvalidTaskError(
                f"there is no target {options.target}; set SAFEDEFER_TARGETS, or use one of {_list(self.targets or ())}"
            )

    def _target(self, queue: str) -> str:
        section = None if self.queue_file is None else self.queue_file.section(queue)
        return DEFAULT_TARGET if section is None or section.target is None else section.target

    def _retry_options(self, queue: str, own: TaskRetryOptions | None) -> TaskRetryOptions | None:
        """Return the retry options of a task, completed by its queue's."""
        section = None if self.queue_file is None else self.queue_file.section(queue)
        if section is None:
            return own
        return TaskRetryOptions.from_given({**section.retry_parameters.given(), **(own.given() if own else {})})

    def _tell(self, queued: QueuedTask) -> None:
        if not hears_enqueued(self.observer):
            return
        notify(
            self.observer,
            TaskEnqueued(task_id=queued.id, queue=queued.queue, callable=queued.callable_name, size=len(queued.token)),
        )

    # --- Handling ---

    async def handle(
        self, headers: Mapping[str, str], body: bytes, *, path: str | None = None, method: str = "POST"
    ) -> Response:
        """Handle one request: the whole handler, without a framework.

        Args:
            headers: The request's headers.
            body: The raw body.
            path: The path that the request came on, which the token must name; None accepts the
                application's own URL and those of its queues.
            method: The request's method.

        Returns:
            ``(status, headers, body)``. Nothing is raised.
        """
        return await self.delivery.handle(headers, body, url=self.accepts(path), method=method)

    def accepts(self, path: str | None) -> str | Container[str]:
        """Return the paths that a token may name which came on ``path``, the configured prefix removed."""
        if path is None:
            return self._own_urls
        if not self.prefix:
            return path
        return path.removeprefix(self.prefix) if path.startswith(f"{self.prefix}/") else path

    @property
    def delivery(self) -> Delivery:
        """The handler behind ``handle``; the policy's modules are imported when it is first asked for."""
        with self._lock:
            if self._delivery is None:
                self._load_policy()
                self._delivery = Delivery(
                    verifier=self._verifier,
                    codecs=self._codecs,
                    ledger=lambda: self.queue.ledger,
                    blobs=lambda: self.queue.blobs,
                    clock=self._clock,
                    observer=self.observer,
                    options=self._delivery_options,
                )
            return self._delivery

    def routes(self) -> list[AbstractRouteDef]:
        """Return the aiohttp routes of the handler: ``web_app.add_routes(app.routes())``."""
        # Here and not at the top: importing safedefer must not import aiohttp.
        from safedefer.web.handler import routes  # noqa: PLC0415

        return routes(self)

    def verify(self, data: bytes, *, expired: bool = False) -> VerifiedTask | VerifiedPointer:
        """Verify a token, whichever of this application's URLs and queues it is for; runs nothing.

        Raises:
            RejectedTask: One of its subclasses.
        """
        return self._verifier.verify(data, url=_OwnUrls(None), now=self._clock(), expired=expired)

    def run(self, data: bytes) -> object:
        """Verify a token, call what it says, and return the result. Asks no ledger: the handler does.

        Raises:
            RejectedTask: The token is refused. Whatever the callable raises passes through.
            RuntimeError: An event loop runs in this thread; use ``run_async``.
        """
        if asyncio._get_running_loop() is not None:  # noqa: SLF001  # public in asyncio's words: in events.__all__
            raise RuntimeError("run() blocks and an event loop runs here; await run_async() instead")
        target, args, kwargs = prepare(self._runnable(data), self._codecs)
        result = target(*args, **kwargs)
        return asyncio.run(_awaited(result)) if result is not None and inspect.isawaitable(result) else result

    async def run_async(self, data: bytes) -> object:
        """Do what ``run`` does inside a running loop: plain callables run in a thread."""
        target, args, kwargs = await asyncio.to_thread(prepare, self._runnable(data), self._codecs)
        call = partial(target, *args, **kwargs)
        result = call() if is_async(target) else await call_in_thread(call)
        return await _awaited(result) if inspect.isawaitable(result) else result

    def run_from_datastore(self, key: str) -> object:
        """Run the oversize task whose stored token has the id ``key``, and delete it unless it must be retried.

        Raises:
            PermanentTaskFailure: There is no such blob (as the original). Else as ``run``.
        """
        data = self.queue.blobs.get(key)
        if data is None:
            raise PermanentTaskFailure("there is no stored task of this key; it has ended, or was never enqueued")
        try:
            result = self.run(data)
        except PermanentTaskFailure:
            self.queue.blobs.delete(key)
            raise
        self.queue.blobs.delete(key)
        return result

    def _runnable(self, data: bytes) -> VerifiedTask:
        if not self._loaded:
            self._load_policy()
        verified = self._verifier.verify(data, self._own_urls, self._clock())
        return verified if type(verified) is VerifiedTask else self.follow(verified)

    def _load_policy(self) -> None:
        """Import the modules that the policy names, once."""
        if not self._loaded:
            self.policy.load()
            self._loaded = True

    def follow(self, verified: VerifiedTask | VerifiedPointer, *, expired: bool = False) -> VerifiedTask:
        """Return the task that a verified pointer leads to, verified too; runs nothing.

        Raises:
            PermanentTaskFailure: The stored token is gone.
            RejectedTask: It is not the one that was pointed to, or is refused.
        """
        if isinstance(verified, VerifiedTask):
            return verified
        data = self.queue.blobs.get(verified.blob["id"])
        if data is None:
            raise PermanentTaskFailure("the stored token is gone; the task has ended, or the blob was lost")
        return self._verifier.verify_stored(
            verified, data, url=split_audience(verified.claims["aud"])[3], now=self._clock(), expired=expired
        )

    # --- Looking after tasks ---

    @property
    def queue(self) -> PullQueue:
        """The queue, opened when it is first used. Raises ``QueueUnavailable`` after ``close``."""
        with self._lock:
            if self._closed:
                raise QueueUnavailable("the App is closed; make another one")
            if isinstance(self._queue, str):
                self._queue = open_queue(self._queue, self._storage)
            return self._queue

    def cancel(self, task_id: str) -> bool:
        """End a waiting task unrun; False if it does not wait (any more)."""
        return self.queue.cancel(task_id, now=self._clock())

    def retry(self, task_id: str, *, queue: str | None = None, eta: datetime | None = None) -> Task | None:
        """Re-run a dead letter as a new task, which names it in ``retry_of``; None if there is none.

        Only what verifies now is signed again, expiry aside: by a key that is not revoked, within that
        key's limits, and under the policy, arguments included.

        Args:
            task_id: The dead letter.
            queue: Another queue to run it in.
            eta: When it is due, aware; now without it.

        Raises:
            RejectedTask: The dead letter does not verify now; it stays where it is.
            UnknownQueueError: There is no such queue.
            InvalidTaskError: The queue's name or the eta is impossible.
        """
        view = self.queue.find(task_id)
        if view is None or view.state is not TaskState.DEAD:
            return None
        self._load_policy()
        task = self._verifier.verify(view.token, url=view.url, now=self._clock(), expired=True)
        if not isinstance(task, VerifiedTask):
            raise _unstored()
        # Decoded under the limits of the key that signed: signing again must not widen what it could name.
        prepare(task, self._codecs)
        now = self._clock()
        retry_options = _hinted(view.retry_options)
        environment, old_queue, target, url = split_audience(task.claims["aud"])
        options = Options(
            headers=task.claims.get("headers", {}),
            retry_options=retry_options,
            queue=queue or old_queue,
            eta=eta,
            target=target,
            url=f"{QUEUE_URLS}{queue}" if queue and url == f"{QUEUE_URLS}{old_queue}" else url,
        )
        self._check_destination(options)
        key = next(key for key in self._keyring.keys if key.kid == task.identity.kid)
        if key.queues is not None and options.queue not in key.queues:
            raise CapabilityExceeded(
                f"key {key.kid} may not sign for the queue {options.queue!a}; defer the task anew there"
            )
        due = int(options.due(now))
        renewed: Claims = {
            **task.claims,
            "jti": new_task_id(now),
            "iat": int(now),
            "nbf": due,
            "exp": due + _lifetime(self._retry_options(options.queue, retry_options)),
            "aud": f"{environment}:{options.queue}:{target}:{options.path}",
            "retry_of": task_id,
        }
        renewed.pop("name", None)
        again, queued = self._package(renewed, options, now)
        return again if self.queue.replace_dead(task_id, queued, now=now) else None

    def retry_all(self, where: DeadFilter, *, queue: str | None = None) -> tuple[list[Task], dict[str, Error]]:
        """Re-run every dead letter that ``where`` means; return the new tasks, and by id why others stay.

        Raises:
            UnknownQueueError: There is no such ``queue``.
        """
        if queue is not None:
            self.check_queue(queue)
        tasks: list[Task] = []
        refused: dict[str, Error] = {}
        after: tuple[float, str] | None = None
        started = self._clock()
        # What dies again meanwhile is for the next time.
        where = replace(where, before=min(started, started if where.before is None else where.before))
        while page := self.queue.dead_letters(where, after=after):
            for view in page:
                after = (view.ended or 0.0, view.id)
                try:
                    task = self.retry(view.id, queue=queue)
                except (RejectedTask, UnknownQueueError) as error:  # the latter: our key may not sign for its queue
                    refused[view.id] = error
                else:
                    tasks += [] if task is None else [task]
        return tasks, refused

    def set_log_level(self, level: int) -> None:
        """Set the level that a normal run is logged at (App Engine ``set_log_level``).

        Raises:
            TypeError: It is not one of logging's numbers.
        """
        if type(level) is not int:
            raise TypeError("the log level is a number such as logging.INFO")
        if isinstance(self.observer, LogObserver):
            self.observer.level = level
        else:
            logging.getLogger("safedefer").setLevel(level)

    def close(self) -> None:
        """Finish what was accepted, and let go of the queue and the threads."""
        self.outbox.close()  # before the lock, which its thread may be waiting for
        with self._lock:
            if self._delivery is not None:
                self._delivery.close()
                self._delivery = None
            self._closed = True
            if not isinstance(self._queue, str):
                self._queue.close()


class Deferral:
    """``defer`` with options: what ``app.options(...)`` returns. Reusable."""

    def __init__(self, app: App, options: Options) -> None:
        self._app = app
        self._options = options

    def defer(self, obj: Callable[_P, object], /, *args: _P.args, **kwargs: _P.kwargs) -> Task:
        """Do what ``App.defer`` does, with these options.

        Raises:
            TaskAlreadyExistsError: A task of this name lives in the queue.
            TombstonedTaskError: A task of this name ended there not long ago.
            UnknownQueueError: There is no such queue.
            DeferError: As ``App.defer``.
        """
        return self._app.defer_with(self._options, obj, args, kwargs)

    async def defer_async(self, obj: Callable[_P, object], /, *args: _P.args, **kwargs: _P.kwargs) -> Task:
        """Do what ``defer`` does, without blocking the event loop."""
        return await self._app.defer_with_async(self._options, obj, args, kwargs)

    def defer_many(self, calls: Iterable[CallTuple], /) -> list[Task]:
        """Defer several calls with these options, in one transaction: all are stored, or none."""
        return self._app.defer_many_with(self._options, calls)


class _OwnUrls(Container[str]):
    """The application's URL and those of its queues; None: any path."""

    def __init__(self, url: str | None) -> None:
        self._url = url

    def __contains__(self, path: object) -> bool:
        return (
            path == self._url
            or self._url is None
            or (isinstance(path, str) and path.startswith(QUEUE_URLS) and "/" not in path[len(QUEUE_URLS) :])
        )


_MAX_LEASE: Final = 86_400
_MAX_EFFECT: Final = 700
_POINTER_CLAIMS: Final = frozenset({"v", "jti", "iat", "nbf", "exp", "aud", "cty", "name"})
_OF_ONE_TASK: Final = frozenset({"jti", "iat", "nbf", "exp", "trace"})


def new_task_id(now: float) -> str:
    """Return a UUID of version 7 in hex (RFC 9562, section 5.7): ids sort by time."""
    try:
        noise = _noise.pop()
    except IndexError:
        noise = _more_noise()
    return (int(now * 1000) & 0xFFFF_FFFF_FFFF).to_bytes(6, "big").hex() + noise


#: The parts of ids that are not the time, made many at once: to ask the system for each would take half of their cost.
_noise: Final[list[str]] = []
# A forked process must not draw what its parent will.
os.register_at_fork(after_in_child=_noise.clear)


def _more_noise() -> str:
    noise = bytearray(os.urandom(_NOISE_BYTES * _NOISES))
    noise[0::_NOISE_BYTES] = noise[0::_NOISE_BYTES].translate(_VERSION_7)
    noise[2::_NOISE_BYTES] = noise[2::_NOISE_BYTES].translate(_VARIANT_10)
    digits = noise.hex()
    _noise.extend(digits[at : at + 2 * _NOISE_BYTES] for at in range(0, len(digits), 2 * _NOISE_BYTES))
    return _noise.pop()


_NOISE_BYTES: Final = 10
_NOISES: Final = 64
_VERSION_7: Final = bytes(0x70 | byte & 0x0F for byte in range(256))
_VARIANT_10: Final = bytes(0x80 | byte & 0x3F for byte in range(256))


def _check_effect(effect: str) -> None:
    if type(effect) is not str or not 0 < len(effect) <= _MAX_EFFECT or "\0" in effect or not _is_unicode(effect):
        raise InvalidTaskError(f"an effect's name is a text of 1 to {_MAX_EFFECT} characters, without NUL")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _task_of(view: TaskView | QueuedTask) -> Task:
    """Return a task that the queue has, as ``defer()`` returned it."""
    return Task(
        id=view.id,
        name=view.name,
        queue_name=view.queue,
        url=view.url,
        target=view.target,
        headers=view.headers,
        payload=view.token,
        eta=datetime.fromtimestamp(view.eta, UTC),
        retry_options=_hinted(view.retry_options),
        was_enqueued=True,
    )


def _hinted(values: Mapping[str, float]) -> TaskRetryOptions | None:
    try:
        return TaskRetryOptions.from_given(values) if values else None
    except InvalidTaskRetryOptionsError:  # a hint in the storage, which nobody signed: the queue's own will do
        return None


def _unique_key(claims: Claims) -> str:
    """Return what tasks of the same call and destination have in common."""
    same = {name: value for name, value in claims.items() if name not in _OF_ONE_TASK}
    return sha256(write_json({**same, "kwargs": dict(sorted(claims["kwargs"].items()))})).hexdigest()


def _declared(
    queues: Iterable[str] | None, targets: Mapping[str, str] | None, file: QueueFile | None
) -> Iterable[str] | None:
    """Return the queues there are, with those of the file."""
    if file is None or isinstance(queues, str):
        return queues
    for section in file.queue:
        if targets is not None and section.target not in {None, DEFAULT_TARGET, *targets}:
            raise ConfigurationError(
                f"the queue {section.name} has the target {section.target}, which has no address; set SAFEDEFER_TARGETS"
            )
    return [*(queues or ()), *(section.name for section in file.queue)]


def _random_id() -> str:
    return secrets.token_hex(16)


def _lifetime(options: TaskRetryOptions | None) -> int:
    age = None if options is None else options.task_age_limit
    return LIFETIME if age is None else min(max(LIFETIME, int(age)), MAX_LIFETIME)


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "(none)"


def _unstored() -> RejectedTask:
    return RejectedTask("the dead letter holds a pointer whose stored token is gone; restore the blobs")


async def _awaited(result: Any) -> object:
    return await result


def _check_names(
    environment: str, url: str, prefix: str, queues: Iterable[str] | None, targets: Mapping[str, str] | None
) -> None:
    if isinstance(queues, str):
        raise ConfigurationError("queues is a list of names, not one text")
    named = [("environment", environment), *(("queue", name) for name in queues or ())]
    for what, name in (*named, *(("target", name) for name in targets or ())):
        try:
            Options(queue=name)
        except InvalidTaskError:
            raise ConfigurationError(
                f"the {what} {name!a} is not 1 to 100 characters of A-Z a-z 0-9 . -; rename it"
            ) from None
    for what, path in (("url", url), ("prefix", prefix.rstrip("/") or "/")):
        try:
            Options(url=path)
        except InvalidTaskError as error:
            raise ConfigurationError(f"the {what} {path!a} is impossible: {error}") from error
        if "{" in path or "}" in path:
            raise ConfigurationError(f"the {what} {path!a} has a brace, which routes give a meaning; leave it out")
    for name, address in (targets or {}).items():
        if not address.startswith(("http://", "https://")):
            raise ConfigurationError(f"the address of the target {name} must begin with http:// or https://")


def _check_numbers(concurrency: int, inline_limit: int, lease_seconds: float, validate: Validate) -> None:
    for what, number in (("concurrency", concurrency), ("inline_limit", inline_limit)):
        if type(number) is not int or number < 1:
            raise ConfigurationError(f"{what} is a whole number, 1 or more")
    if type(lease_seconds) not in {int, float} or not 0 < lease_seconds <= _MAX_LEASE:
        raise ConfigurationError("lease_seconds is a number of seconds, at most a day")
    if validate not in {None, "annotations"}:
        raise ConfigurationError('validate is None or "annotations"')
