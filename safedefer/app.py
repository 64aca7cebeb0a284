"""The application: keys, policy, codecs, a queue and a handler, put together.

``App`` is the composition root and a facade. It builds the parts (``sending``, ``execution.direct``, ``delivery``,
``transactions``), hands each what it needs, and passes calls on; what it does for those who defer is in ``Producer``. It does nothing when it is made but check its
configuration; the queue is opened when it is first used, in the process that uses it.

Over 450 lines, since it is the facade: a short method and its documentation for each thing that an application does.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from safedefer.claims import Claims
from safedefer.codecs.protocol import Codec
from safedefer.codecs.typed import TypedCodec
from safedefer.delivery.budget import UNVERIFIED_BYTES
from safedefer.delivery.options import DeliveryOptions
from safedefer.delivery.redaction import redacted_traceback
from safedefer.errors import ConfigurationError, Error, QueueUnavailable
from safedefer.events import LogObserver, Observer, Observers
from safedefer.execution.around import Around
from safedefer.execution.direct import DirectRunner
from safedefer.execution.prepare import Validate
from safedefer.keys import Keyring
from safedefer.options import DEFAULT_TARGET, DEFAULT_URL, INLINE_LIMIT, Limits, Options, Serves, Task
from safedefer.policy import Policy
from safedefer.queues import PushAddress, load_queue_file, open_push, open_queue, queue_or_push
from safedefer.queues.addresses import place
from safedefer.queues.base import DeadFilter, PullQueue, StorageOptions
from safedefer.sending.builder import Builder
from safedefer.sending.dead_letters import DeadLetters
from safedefer.sending.producer import Producer
from safedefer.sending.routes import ANY_URL, Routes
from safedefer.sending.sender import CallTuple, Deferral, Sender
from safedefer.sending.test_mode import TEST_MODE, refuse
from safedefer.signing import Signer, Verifier
from safedefer.task import VerifiedPointer, VerifiedTask
from safedefer.transactions.outbox import Outbox

if TYPE_CHECKING:
    from aiohttp.web import AbstractRouteDef
    from aiohttp.web import Application as WebApplication

    from safedefer.dashboard.guard import Authorize
    from safedefer.delivery.handler import Delivery
    from safedefer.execution.tracing import TaskTracing
    from safedefer.headers import Response
    from safedefer.observe.notices import Notices
    from safedefer.queues.config import QueueFile
    from safedefer.queues.push import PushQueue
    from safedefer.queues.push_engine import PushEngine
    from safedefer.settings import Settings
    from safedefer.web.asgi import Asgi
    from safedefer.web.wsgi import Wsgi

__all__ = ["App", "CallTuple", "Deferral"]


class App(Producer):
    """What defers and handles the tasks of one application.

    Args:
        keyring: The keys; the active one signs.
        policy: What may be deferred and run.
        queue: A queue's URL (``sqlite:///tasks.db``, ``memory://``) or a queue; or those of a push engine, which needs ``store``.
        store: The ledger, dead letters and stored tokens of a push engine: the URL of a pull engine, or one.
        environment: ``prod``, ``staging``, ...: tasks of one do not run in another. None is ``default``, which every
            deployment that does not say shares; commands that run tasks warn of it.
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
        validate: ``"annotations"`` checks arguments against the callable's annotations in the handler, and runs the
            validators of models in them.
        around: Callables that return a context manager, sync or async, such as ``client.context``: each is called and
            entered around every run, a sync one in the thread of the run.
        concurrency: How many tasks run at once in this process.
        lease_seconds: How long a silent handler is believed to be running a task; a live one prolongs it.
        inline_limit: Tokens above this many bytes are stored as blobs (App Engine: about 10 kilobytes).
        unverified_bytes: Bytes that the bodies of all requests may take together before they are verified; one more is
            answered ``busy``.
        limits: Bounds of tokens and arguments.
        observer: Told what happens, in place of the log.
        observers: Told what happens too, besides the log or ``observer``; plain callables or async ones.
        log_tracebacks: Whether the log shows the traceback of a task's exception, with its text, and not its type only.
        tracing: ``safedefer.observe.tracing.Tracing()`` makes OpenTelemetry spans (extra ``otel``); None makes none.
        clock: Seconds since the epoch.

    Raises:
        ConfigurationError: An argument is wrong.
    """

    policy: Policy
    keyring: Keyring
    queue_file: QueueFile | None
    environment: str
    environment_given: bool
    url: str
    prefix: str
    queues: frozenset[str] | None
    targets: dict[str, str] | None
    allow_pickle: bool
    observer: Observer
    observers: Observers
    queue_place: str
    pushes: bool
    _queue: PullQueue | PushAddress | str
    _delivery: Delivery | None = None
    _wsgi: Wsgi | None = None
    _notices: Notices | None = None
    trace_url: str | None = None
    """Where traces are shown, as the settings say it."""
    of_settings: bool = False
    """Whether ``SAFEDEFER_*`` made it; ``App(...)`` reads no variable."""
    _closed = False
    _is_opening = False

    def __init__(
        self,
        *,
        keyring: Keyring,
        policy: Policy,
        queue: str | PullQueue | PushEngine = "sqlite:///safedefer.db",
        store: str | PullQueue | None = None,
        environment: str | None = None,
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
        around: Sequence[Around] = (),
        concurrency: int = 16,
        lease_seconds: float = 60.0,
        inline_limit: int = INLINE_LIMIT,
        unverified_bytes: int = UNVERIFIED_BYTES,
        limits: Limits | None = None,
        observer: Observer | None = None,
        observers: Sequence[Observer] = (),
        log_tracebacks: bool = False,
        tracing: TaskTracing | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        limits, self.policy = limits or Limits(), _checked(keyring, policy)
        self.environment_given, self._by_value = environment is not None, by_value_pickles_run_code
        self.observer, self.observers = _observers(observer, observers, tracebacks=log_tracebacks)
        self.queue_file = file = load_queue_file(queue_yaml) if isinstance(queue_yaml, str | Path) else queue_yaml
        routes = Routes(environment=environment, url=url, prefix=prefix, queues=queues, targets=targets, file=file)
        self._queue, self._storage, self._clock = queue_or_push(queue, store), _storage(storage, file), clock
        self.delivery_options: DeliveryOptions = DeliveryOptions(
            max_bytes=limits.token_bytes,
            concurrency=concurrency,
            lease_seconds=lease_seconds,
            unverified_bytes=unverified_bytes,
            validate=validate,
            around=tuple(around),
            deadlines={} if file is None else file.deadlines,
            tracing=tracing,
        )
        self._codecs = _codecs(limits, allow_pickle=allow_pickle, by_value_runs_code=self._by_value)
        builder = Builder(
            signer=Signer(keyring, policy, limits=limits),
            key=keyring.active,
            codecs=self._codecs,
            routes=routes,
            inline_limit=inline_limit,
            clock=clock,
            trace=None if tracing is None else tracing.traceparent,
        )
        box = Outbox(self._get_queue, environment=routes.environment, queues=routes.queues, urls=outboxes, clock=clock)
        sender = Sender(builder=builder, queue=self._get_queue, outbox=box, observer=self.observers, tracing=tracing)
        super().__init__(sender=sender, builder=builder, routes=routes, outbox=box)
        self._build_handling(keyring, limits, allow_pickle=allow_pickle)

    def _build_handling(self, keyring: Keyring, limits: Limits, *, allow_pickle: bool) -> None:
        routes, codecs, clock = self._routes, self._codecs, self._clock
        self._lock = RLock()  # reentrant: loading the policy imports modules, and one of them may defer something
        self.environment, self.url, self.prefix = routes.environment, routes.url, routes.prefix
        self.queues, self.targets = routes.queues, routes.targets
        self.keyring, self.allow_pickle, self._limits = keyring, allow_pickle, limits
        self.queue_place, self.pushes = _place(self._queue), _pushes(self._queue)
        if isinstance(self._queue, PushAddress):
            self._connect(self._queue.engine)
        served = None if routes.targets is None else frozenset({*routes.targets, DEFAULT_TARGET})
        self._verifier = Verifier(
            keyring,
            self.policy,
            serves=Serves(environment=routes.environment, queues=routes.queues, targets=served),
            allow_pickle=allow_pickle,
            limits=limits,
        )
        self._direct = DirectRunner(
            verifier=self._verifier,
            policy=self.policy,
            codecs=codecs,
            urls=routes.own_urls,
            blobs=lambda: self.queue.blobs,
            clock=clock,
            around=self.delivery_options.around,
        )
        self._dead_letters = DeadLetters(
            verifier=self._verifier,
            keyring=keyring,
            builder=self._builder,
            routes=routes,
            queue=self._get_queue,
            load_policy=self._direct.load_policy,
            clock=clock,
        )

    def _arguments(self) -> dict[str, Any]:
        """Return the arguments of an App like this one, but for its queue, outboxes, observer and clock: for test mode."""
        options = self.delivery_options
        return {
            "keyring": self.keyring,
            "policy": self.policy,
            "environment": self.environment if self.environment_given else None,
            "url": self.url,
            "prefix": self.prefix,
            "queues": self.queues,
            "queue_yaml": self.queue_file,
            "targets": self.targets,
            "allow_pickle": self.allow_pickle,
            "by_value_pickles_run_code": self._by_value,
            "validate": options.validate,
            "around": options.around,
            "concurrency": options.concurrency,
            "lease_seconds": options.lease_seconds,
            "inline_limit": self._builder.inline_limit,
            "unverified_bytes": options.unverified_bytes,
            "tracing": options.tracing,
            "limits": self._limits,
        }

    @classmethod
    def from_settings(cls, settings: Settings | None = None) -> App:
        """Build from ``SAFEDEFER_*`` in the environment.

        Raises:
            ConfigurationError: Keys or policy are missing, or a setting is wrong.
        """
        if settings is None:
            # Here and not at the top: an App that is made in code needs no settings library.
            from safedefer.settings import Settings  # noqa: PLC0415

            settings = Settings.load()
        app = cls(
            keyring=settings.keyring(),
            policy=settings.load_policy(),
            queue=settings.queue,
            store=settings.store,
            environment=settings.environment if "environment" in settings.model_fields_set else None,
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
            unverified_bytes=settings.unverified_bytes,
            limits=Limits(token_bytes=settings.token_bytes),
            log_tracebacks=settings.log_tracebacks,
            tracing=settings.load_tracing(),
        )
        app.trace_url, app.of_settings = settings.trace_url, True
        return app

    # --- Handling ---

    async def handle(
        self, headers: Mapping[str, str], body: bytes, *, path: str | None = None, mount: str = "", method: str = "POST"
    ) -> Response:
        """Handle one request: the whole handler, without a framework.

        Args:
            headers: The request's headers.
            body: The raw body.
            path: The path that the request came on, which the token must name; None accepts the
                application's own URL and those of its queues.
            mount: The path at which the framework mounts the handler (ASGI ``root_path``, WSGI ``SCRIPT_NAME``), where
                ``path`` begins with it: the token need not name it.
            method: The request's method.

        Returns:
            ``(status, headers, body)``. Nothing is raised.
        """
        return await self.delivery.handle(headers, body, url=self.accepts(path, mount), method=method)

    def authenticate(self, data: bytes) -> Claims:
        """Return the claims of a token that one of our keys signed. Says nothing of audience, time and policy.

        Raises:
            RejectedTask: One of its subclasses says what is wrong.
        """
        return self._verifier.authenticate(data)

    def accepts(self, path: str | None, mount: str = "") -> str | Container[str]:
        """Return the paths that a token may name which came on ``path`` below ``mount``, the configured prefix removed."""
        return self._routes.accepts(path, mount)

    @property
    def delivery(self) -> Delivery:
        """The handler behind ``handle``; the policy's modules are imported when it is first asked for."""
        with self._lock:
            if self._delivery is None:
                self._direct.load_policy()
                if not self._builder.in_test:
                    _ = self.notices
                self._delivery = self._new_delivery()
            return self._delivery

    def _new_delivery(self) -> Delivery:
        # Here and not at the top: a process that only defers needs no handler.
        from safedefer.delivery.handler import Delivery  # noqa: PLC0415

        parts: dict[str, Any] = {
            "verifier": self._verifier,
            "codecs": self._codecs,
            "ledger": lambda: self.queue.ledger,
            "blobs": lambda: self.queue.blobs,
            "clock": self._clock,
            "observer": self.observers,
            "options": self.delivery_options,
        }
        if not self.pushes:
            return Delivery(**parts)
        from safedefer.delivery.pushed import PushedDelivery  # noqa: PLC0415 - most Apps pull

        self.push_queue.start(self._clock)
        return PushedDelivery(queue=lambda: self.push_queue, retry_options=_retry_options(self.queue_file), **parts)

    @property
    def notices(self) -> Notices:
        """What tells dashboards of other processes what is wrong in this one, by notices in the store."""
        with self._lock:
            if self._notices is None:
                from safedefer.observe.notices import Notices  # noqa: PLC0415 - as delivery

                self._notices = Notices(self._get_queue, self.observers, self._clock, is_open=self._has_queue)
            return self._notices

    def routes(self) -> list[AbstractRouteDef]:
        """Return the aiohttp routes of the handler: ``web_app.add_routes(app.routes())``."""
        # Here and not at the top: importing safedefer must not import aiohttp.
        from safedefer.web.handler import routes  # noqa: PLC0415

        return routes(self)

    def dashboard(self, *, authorize: Authorize | None = None, trace_url: str | None = None) -> WebApplication:
        """Return the dashboard: ``web_app.add_subapp("/tasks/", app.dashboard())``. Needs the extra ``dashboard``.

        Args:
            authorize: Called with every request, or awaited; returns an ``Access``, or None. Without it people log in by links
                that ``safedefer dashboard --link`` prints.
            trace_url: Where traces are shown, such as ``https://traces.example/trace/{trace_id}``: a task's page links to its
                trace. Without it, that of the settings (``SAFEDEFER_TRACE_URL``).

        Raises:
            ConfigurationError: ``trace_url`` is not of http or https, or has no ``{trace_id}``.
        """
        from safedefer.dashboard.site import Site  # noqa: PLC0415 - as routes

        return Site(self, authorize, self._clock, trace_url=trace_url or self.trace_url).application()

    @property
    def asgi(self) -> Asgi:
        """The handler as an ASGI application: ``uvicorn shop.tasks:asgi``, or ``api.mount("/tasks", app.asgi)``."""
        from safedefer.web.asgi import Asgi  # noqa: PLC0415 - as routes

        return Asgi(self)

    @property
    def wsgi(self) -> Wsgi:
        """The handler as a WSGI application, one for each App: ``gunicorn shop.tasks:wsgi``. ``close`` ends its event loop."""
        from safedefer.web.wsgi import Wsgi  # noqa: PLC0415 - as routes

        with self._lock:
            if self._wsgi is None:
                self._wsgi = Wsgi(self)
            return self._wsgi

    def verify(self, data: bytes, *, expired: bool = False) -> VerifiedTask | VerifiedPointer:
        """Verify a token, whichever of this application's URLs and queues it is for; runs nothing.

        Raises:
            RejectedTask: One of its subclasses.
        """
        return self._verifier.verify(data, url=ANY_URL, now=self._clock(), expired=expired)

    def follow(self, verified: VerifiedTask | VerifiedPointer, *, expired: bool = False) -> VerifiedTask:
        """Return the task that a verified pointer leads to, verified too; runs nothing.

        Raises:
            PermanentTaskFailure: The stored token is gone.
            RejectedTask: It is not the one that was pointed to, or is refused.
        """
        return self._direct.follow(verified, expired=expired)

    def check_call(self, task: VerifiedTask) -> None:
        """Check that a task's callable is here and takes its arguments; calls nothing. Pickles are not read.

        Raises:
            RejectedTask: One of its subclasses says why the task would not run.
        """
        self._direct.check(task)

    def run(self, data: bytes) -> object:
        """Verify a token, call what it says, and return the result. Asks no ledger: the handler does.

        Raises:
            RejectedTask: The token is refused. Whatever the callable raises passes through.
            RuntimeError: An event loop runs in this thread; use ``run_async``.
        """
        return self._direct.run(data)

    async def run_async(self, data: bytes) -> object:
        """Do what ``run`` does inside a running loop: plain callables run in a thread."""
        return await self._direct.run_async(data)

    def run_from_datastore(self, key: str) -> object:
        """Run the oversize task whose stored token has the id ``key``, and delete it unless it must be retried.

        Raises:
            PermanentTaskFailure: There is no such blob (as the original). Else as ``run``.
        """
        return self._direct.run_from_datastore(key)

    # --- Looking after tasks ---

    @property
    def queue(self) -> PullQueue:
        """The queue, opened when it is first used. Raises ``QueueUnavailable`` after ``close``."""
        return self._get_queue()

    def _connect(self, engine: object) -> None:
        """Give the handler to an engine whose workers run in this process."""
        serve = getattr(engine, "serve", None)
        if serve is not None:
            from safedefer.web.pushed import PushService  # noqa: PLC0415 - most Apps pull

            serve(PushService(lambda: self.wsgi, self._start_push, lambda: self.push_queue.store))

    def _start_push(self) -> None:
        self.push_queue.start(self._clock)
        self.outbox.start()

    @property
    def push_queue(self) -> PushQueue:
        """The push engine and its store. Raises ``ConfigurationError`` if the queue is a pull engine."""
        from safedefer.queues.push import PushQueue  # noqa: PLC0415 - most Apps pull

        queue: object = self.queue
        if not isinstance(queue, PushQueue):
            raise ConfigurationError("the queue is no push engine; run a worker: `safedefer run`")
        return queue

    def _has_queue(self) -> bool:
        return not isinstance(self._queue, str | PushAddress)

    def _get_queue(self) -> PullQueue:
        with self._lock:
            if self._closed:
                raise QueueUnavailable("the App is closed; make another one")
            if isinstance(self._queue, str | PushAddress):
                if TEST_MODE.active and not self._builder.in_test:
                    refuse()
                if self._is_opening:  # by this thread, which has the lock: a signal handler asks
                    raise QueueUnavailable("the App opens its queue at this moment; try again when that is done")
                self._is_opening = True
                try:
                    if isinstance(self._queue, str | PushAddress):  # still: one may have asked in between
                        self._queue = self._open_queue(self._queue)
                finally:
                    self._is_opening = False
            return self._queue

    def _open_queue(self, address: str | PushAddress) -> PullQueue:
        if isinstance(address, str):
            return open_queue(address, self._storage)
        pushes = open_push(address, self._storage)
        self._connect(pushes.engine)
        return pushes

    @contextlib.asynccontextmanager
    async def on_loop(self) -> AsyncIterator[None]:
        """Keep the queue's connections of the running loop while the context lasts; any queue may be asked.

        With them a handler in a server of your own calls a PostgreSQL queue without threads, and answers sooner. Other
        queues have none, and nothing changes.
        """
        try:
            async with self.queue.on_loop():
                yield
        finally:
            if self.observers.has_async:
                import asyncio  # noqa: PLC0415 - a process without a loop needs none

                await asyncio.to_thread(self.observers.flush)

    def check_queue(self, name: str) -> None:
        """Check that a queue may exist.

        Raises:
            InvalidTaskError: The name is impossible.
            UnknownQueueError: It is not one of those that are declared.
        """
        self._routes.check(Options(queue=name))

    def cancel(self, task_id: str) -> bool:
        """Cancel a task that waits or runs; False if there is none, or it has ended.

        A coroutine that runs is cancelled, in any process within some seconds; a plain function sees
        ``current_task().cancelled``. The task does not run again.
        """
        cancelled = self.queue.cancel(task_id, now=self._clock())
        if cancelled and self._delivery is not None:
            self._delivery.cancel(task_id)
        return cancelled

    def retry(self, task_id: str, *, queue: str | None = None, eta: datetime | None = None) -> Task | None:
        """Re-run a dead letter as a new task, which names it in ``retry_of``; None if there is none.

        Only what verifies now is signed again, expiry aside, and what has neither succeeded, nor been cancelled or
        re-run; once it has expired, the ledger must know that it died. Arguments are not decoded: the handler does, within
        the limits of the key that signed the first task.

        Args:
            task_id: The dead letter.
            queue: Another queue to run it in.
            eta: When it is due, aware; now without it.

        Raises:
            RejectedTask: The dead letter does not verify now, or may not run again; it stays where it is.
            UnknownQueueError: There is no such queue.
            DeferError: The new task cannot be signed, or stored.
            InvalidTaskError: The queue's name or the eta is impossible.
        """
        return self._dead_letters.retry(task_id, queue=queue, eta=eta)

    def retry_all(self, where: DeadFilter, *, queue: str | None = None) -> tuple[list[Task], dict[str, Error]]:
        """Re-run every dead letter that ``where`` means; return the new tasks, and by id why others stay.

        Raises:
            UnknownQueueError: There is no such ``queue``.
        """
        return self._dead_letters.retry_all(where, queue=queue)

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
        if self._wsgi is not None:
            self._wsgi.close()
        if self._notices is not None:
            self._notices.close()
        self.outbox.close()  # before the lock, which its thread may be waiting for
        with self._lock:
            if self._delivery is not None:
                self._delivery.close()
                self._delivery = None
            self._closed = True
            if not isinstance(self._queue, str):
                self._queue.close()
        self.observers.close()


def _checked(keyring: object, policy: object) -> Policy:
    if not isinstance(keyring, Keyring) or not isinstance(policy, Policy):
        raise ConfigurationError("an App needs keyring=Keyring(...) and policy=Policy(...); see `safedefer keys new`")
    return policy


def _observers(
    observer: Observer | None, others: Sequence[Observer], *, tracebacks: bool
) -> tuple[Observer, Observers]:
    first = LogObserver(traceback_of=redacted_traceback if tracebacks else None) if observer is None else observer
    return first, Observers(first, *others)


def _place(queue: str | PullQueue | PushAddress) -> str:
    if isinstance(queue, PushAddress):
        return queue.place
    return place(queue) if isinstance(queue, str) else type(queue).__name__


def _pushes(queue: object) -> bool:
    return isinstance(queue, PushAddress)


def _retry_options(file: QueueFile | None) -> dict[str, dict[str, float]]:
    return {} if file is None else {each.name: each.retry_parameters.given() for each in file.queue}


def _storage(storage: StorageOptions | None, file: QueueFile | None) -> StorageOptions | None:
    limit = None if file is None else file.total_storage_limit
    return storage if limit is None else replace(storage or StorageOptions(), blob_limit=limit)


def _codecs(limits: Limits, *, allow_pickle: bool, by_value_runs_code: bool) -> dict[str, Codec]:
    codecs: dict[str, Codec] = {"typed": TypedCodec(limits=limits)}
    if allow_pickle:
        # Here and not at the top: an App that takes no pickles loads nothing that could read one.
        from safedefer.codecs.pickled import PickledCodec  # noqa: PLC0415

        codecs["pickle"] = PickledCodec(limits=limits, by_value_runs_code=by_value_runs_code)
    return codecs
