"""A backend of Django's Tasks: ``TASKS = {"default": {"BACKEND": "safedefer.frameworks.django.backend.SafedeferBackend"}}``.

It is one of ``django.tasks`` in Django 6, and one of the package ``django-tasks`` before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, Final, Self

from django.db import connections, transaction
from django.utils import timezone

from safedefer.callables.wrappers import register_wrapper
from safedefer.errors import BadTransactionStateError, InvalidTaskError
from safedefer.frameworks.django.conf import project_app
from safedefer.frameworks.django.task_context import carry_contexts
from safedefer.options import DEFAULT_URL, Options, TaskRetryOptions, UniqueUntil
from safedefer.sending.sender import Built
from safedefer.transactions.databases import source_of
from safedefer.transactions.databases.django import is_in_transaction

__all__ = ["SafedeferBackend", "SafedeferTask"]

_LIBRARY: Final = "django.tasks" if find_spec("django.tasks") is not None else "django_tasks"
_base: Final[Any] = import_module(f"{_LIBRARY}.base")
_backends: Final[Any] = import_module(f"{_LIBRARY}.backends.base")
_exceptions: Final[Any] = import_module(f"{_LIBRARY}.exceptions")
_signals: Final[Any] = import_module(f"{_LIBRARY}.signals")
#: Django's own name, and that of django-tasks.
_InvalidTask: Final[Any] = getattr(_exceptions, "InvalidTask", None) or _exceptions.InvalidTaskError
#: Options of ``SafedeferTask`` that are given to ``Options`` as they are.
_OURS: Final = ("deadline", "retry_options", "target", "unique", "unique_until", "url")


@dataclass(frozen=True, slots=True, kw_only=True)
class SafedeferTask(_base.Task):  # type: ignore[misc]  # Django has no types
    """What ``@task`` makes: a task of Django's with options of ``App.options``, ``@task(deadline=60)``."""

    deadline: float | None = None
    """Seconds that one attempt may take."""
    headers: Mapping[str, str] | None = None
    """Further headers of the request that delivers it."""
    retry_options: TaskRetryOptions | None = None
    """When it is tried again."""
    target: str | None = None
    """Which handler."""
    unique: bool | Sequence[str] = False
    """Whether a task of the same call that waits or runs already is returned in its place; names of parameters."""
    unique_until: UniqueUntil = "end"
    """``start``: it is looked for only until its first delivery begins."""
    url: str | None = DEFAULT_URL
    """The path that it is posted to."""

    def using(self, **changes: Any) -> Self:
        """Return the task with other options: those of Django's ``using``, and those above. None changes nothing."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


register_wrapper(SafedeferTask, "func")
carry_contexts(_base, SafedeferTask)


class SafedeferBackend(_backends.BaseTaskBackend):  # type: ignore[misc]  # as above
    """Enqueues tasks by the App of the project, with the transaction that is open, if one is.

    ``OPTIONS``: ``DATABASE`` is the alias of the database whose transactions count, ``default`` by default; ``TRANSACTIONAL``
    False enqueues at once, whatever is open.
    """

    task_class: ClassVar[type[SafedeferTask]] = SafedeferTask
    supports_defer = True
    supports_async_task = True
    supports_get_result = False
    """Return values are not kept."""
    supports_priority = False

    def __init__(self, alias: str, params: Mapping[str, Any]) -> None:
        super().__init__(alias, params)
        unknown = set(self.options) - {"DATABASE", "TRANSACTIONAL"}
        if unknown:
            raise InvalidTaskError(
                f"TASKS[{alias!a}] has unknown OPTIONS {sorted(unknown)}; there are DATABASE, TRANSACTIONAL"
            )
        self._database = str(self.options.get("DATABASE", "default"))
        self._transactional = bool(self.options.get("TRANSACTIONAL", True))

    def validate_task(self, task: Any) -> None:
        """Check a task when it is made. Raises Django's ``InvalidTask``."""
        super().validate_task(task)
        try:
            _options_of(task)
        except InvalidTaskError as error:
            raise _InvalidTask(str(error)) from error

    def enqueue(self, task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Enqueue a call: with the transaction that is open, or at once.

        Arguments are JSON values, as Django says: a tuple arrives as a list.

        Args:
            task: What ``@task`` made.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            Django's ``TaskResult``, with the id of the task.

        Raises:
            TypeError: An argument is no JSON, or the task does not take the arguments.
            DeferError: As ``App.defer``.
        """
        self.validate_task(task)
        app, options = project_app(), _options_of(task)
        given = _base.normalize_json(list(args)), _base.normalize_json(dict(kwargs))
        call = self._call(task, *given)
        connection = connections[self._database]
        if not (self._transactional and is_in_transaction(connection)):
            result = self._result(task, app.defer_with(options, *call).id, *given)
            self._enqueued(result)
            return result
        if _has_outbox(connection, reads_own=app.outbox.reads_own):
            with app.transaction(connection):
                sent = app.defer_with(replace(options, transactional=True), *call)
            result = self._result(task, sent.id, *given)
            transaction.on_commit(partial(self._enqueued, result), using=self._database)
        else:
            built = app._build(options, *call)  # noqa: SLF001  # of the App, for this
            result = self._result(task, built[0].id, *given)
            transaction.on_commit(partial(self._store, app._store, built, result), using=self._database)  # noqa: SLF001
        return result

    def _store(self, store: Callable[[Sequence[Built]], object], built: Built, result: Any) -> None:
        store([built])
        self._enqueued(result)

    def _call(self, task: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, list[Any], dict[str, Any]]:
        if task.takes_context:
            args = [_base.TaskContext(task_result=self._result(task, "", args, kwargs)), *args]
        return task.func, args, kwargs

    def _result(self, task: Any, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return _base.TaskResult(
            task=task,
            id=task_id,
            status=_base.TaskResultStatus.READY,
            enqueued_at=None,
            started_at=None,
            finished_at=None,
            last_attempted_at=None,
            args=args,
            kwargs=kwargs,
            backend=self.alias,
            errors=[],
            worker_ids=[],
        )

    def _enqueued(self, result: Any) -> None:
        object.__setattr__(result, "enqueued_at", timezone.now())  # as Django's own backends do
        _signals.task_enqueued.send(type(self), task_result=result)


def _options_of(task: Any) -> Options:
    """Return the options of a task. One of another backend's class has Django's only. Raises ``InvalidTaskError``."""
    ours = {name: getattr(task, name) for name in _OURS if hasattr(task, name)}
    eta = task.run_after
    if eta is not None and timezone.is_naive(eta):  # where USE_TZ is off
        eta = timezone.make_aware(eta)
    return Options(queue=task.queue_name, eta=eta, headers=getattr(task, "headers", None) or {}, **ours)


def _has_outbox(connection: Any, *, reads_own: bool) -> bool:
    """Whether a task can be written by a connection: not by MySQL's, Oracle's, psycopg2's, nor to a database in memory."""
    try:
        source = source_of(connection)
    except BadTransactionStateError:
        return False
    return source.identity is not None or reads_own
