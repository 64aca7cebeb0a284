"""Half of an application: what it does for those who defer. ``App`` is this and the handler's half."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, ParamSpec, overload

from safedefer.errors import InvalidTaskError
from safedefer.execution.context import current_task
from safedefer.options import DEFAULT_OPTIONS, Options, Task
from safedefer.sending.advice import tell_options
from safedefer.sending.builder import Builder
from safedefer.sending.effects import effect_of
from safedefer.sending.routes import Routes
from safedefer.sending.sender import Built, CallTuple, Deferral, Sender
from safedefer.sending.signatures import method_takes
from safedefer.transactions.databases import AwaitedConnection
from safedefer.transactions.outbox import Outbox

_P = ParamSpec("_P")


class Producer:
    """Defers calls.

    Args:
        sender: Stores tasks.
        builder: Makes them.
        routes: Where they may go.
        outbox: Where transactional tasks go.
    """

    def __init__(self, *, sender: Sender, builder: Builder, routes: Routes, outbox: Outbox) -> None:
        self._sender = sender
        self._builder = builder
        self._routes = routes
        self.outbox = outbox

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
        return self._sender.send(DEFAULT_OPTIONS, obj, args, kwargs)

    async def defer_async(self, obj: Callable[_P, object], /, *args: _P.args, **kwargs: _P.kwargs) -> Task:
        """Do what ``defer`` does, without blocking the event loop."""
        return await self._sender.send_async(DEFAULT_OPTIONS, obj, args, kwargs)

    def defer_many(self, calls: Iterable[CallTuple], /, *, atomic: bool = True) -> list[Task]:
        """Defer several calls in one transaction: all are stored, or none.

        Args:
            calls: Callables with their positional and keyword arguments.
            atomic: False lets an engine store some of them that cannot store all or none.

        Raises:
            InvalidTaskError: The engine cannot store all or none, and ``atomic`` is True.
            DeferError: As ``defer``.
        """
        return self._sender.send_many(DEFAULT_OPTIONS, calls, atomic=atomic)

    @method_takes(Options)
    def options(self, **given: Any) -> Deferral:
        """Return a front of ``defer`` with options, those of ``Options``; all are given by name.

        Options:
            countdown: Seconds from now until the task is due, at most 30 days.
            eta: When it is due, an aware datetime; not together with ``countdown``.
            headers: Further headers of the request that delivers the task.
            name: ``[a-zA-Z0-9_-]{1,500}``, which no other task of the queue has, or had in the last days.
            queue: The queue's name, ``default`` by default.
            retry_options: ``TaskRetryOptions``: when it is tried again.
            target: Which handler.
            transactional: Enqueue if, and only if, the transaction of ``app.transaction(...)``, or of ``@ndb.transactional()``, commits.
            unique: Return the task of the same call and destination that waits or runs already, if there is one. Names of
                parameters, ``("order_id",)``: calls with the same values of these arguments are the same.
            unique_until: ``"start"``: look for it only until its first delivery begins; ``"end"`` by default.
            url: The path that the task is posted to, or a URL below the address of a target; None is the queue's own.
            deadline: Seconds that one attempt may take, from 1 to 86,400; the queue's own without it.
            pickle: Carry the arguments as a pickle; both ends and the key must allow it.

        Raises:
            InvalidTaskError: An option is wrong.
        """
        return Deferral(lambda: self._sender, self._options_of(given))

    def _options_of(self, given: dict[str, Any]) -> Options:
        try:
            return self._checked_options(dict(given))
        except InvalidTaskError as error:
            tell_options(error, given, self._checked_options)
            raise

    def _checked_options(self, given: dict[str, Any]) -> Options:
        if "url" in given:
            given["target"], given["url"] = self._routes.destination(given.get("target"), given["url"])
        return Options(**given)

    def defer_with(
        self, options: Options, obj: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Task:
        """Defer one call with an ``Options`` object."""
        return self._sender.send(options, obj, args, kwargs)

    def _build(
        self, options: Options, obj: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Built:
        """Sign the task of a call; ``_store`` enqueues it. For frameworks, where the two happen at two times."""
        return self._sender.build(options, obj, args, kwargs)

    def _store(self, built: Sequence[Built]) -> list[Task]:
        """Enqueue tasks that were signed before."""
        return self._sender.store(built)

    def serialize(self, obj: Callable[..., object], /, *args: Any, **kwargs: Any) -> bytes:
        """Return the signed token of a call, for the default queue and URL; enqueues nothing."""
        return self._builder.serialize(obj, args, kwargs)

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
                to the queue's own database, by apsw in the case of a file. The module ``google.cloud.ndb`` is the
                Datastore transaction of its context; inside ``@ndb.transactional()`` no block is needed.

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
            effect: Names it, up to 700 characters; without it, the task that runs, the same for all its re-runs.

        Raises:
            BadTransactionStateError: There is no name and no task runs here, or as ``transaction``.
            InvalidTaskError: The name is empty, too long, or has a character that a database does not take.
        """
        task = current_task()
        noted, also = effect_of(effect, None if task is None else (task.root or task.id, task.retry_of))
        return self.outbox.once(connection, effect=noted, also=also)
