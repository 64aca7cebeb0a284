"""Queues, and the one way to open one from a URL. The door to the engines: each is imported when it is named."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

from safedefer.errors import ConfigurationError, MissingExtra
from safedefer.queues.addresses import is_push_address, place

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from safedefer.queues.base import PullQueue, StorageOptions
    from safedefer.queues.config import QueueFile
    from safedefer.queues.push import PushQueue
    from safedefer.queues.push_engine import PushEngine

__all__ = ["PushAddress", "load_queue_file", "migrate_queue", "open_push", "open_queue"]

_FORMS: Final = "sqlite:///relative.db, sqlite:////absolute.db, postgresql://user@host/database or memory://"


#: Both are libpq's.
_POSTGRES: Final = frozenset({"postgresql", "postgres"})


@dataclass(frozen=True, slots=True)
class PushAddress:
    """A push engine and its store, neither of which is open yet."""

    engine: str | PushEngine
    store: str | PullQueue

    def __repr__(self) -> str:
        """Show neither password nor parameters."""
        return f"PushAddress({self.place!r})"

    @property
    def place(self) -> str:
        """The addresses as they may be shown."""
        shown = [place(each) if isinstance(each, str) else type(each).__name__ for each in (self.engine, self.store)]
        return f"{shown[0]} with {shown[1]}"

    def close(self) -> None:
        """Close what was given open."""
        for each in (self.engine, self.store):
            if not isinstance(each, str):
                each.close()


def queue_or_push(queue: str | PullQueue | PushEngine, store: str | PullQueue | None) -> str | PullQueue | PushAddress:
    """Return what an App's ``queue`` and ``store`` name: a pull engine, or a push engine and its store.

    Raises:
        ConfigurationError: A push engine has no store, or a pull engine has one.
    """
    if _is_celery(queue):
        queue = _celery().CeleryEngine(queue)
    pushes = is_push_address(queue) if isinstance(queue, str) else hasattr(queue, "attempt")
    if not pushes:
        if store is not None:
            raise ConfigurationError("store is for push engines: this queue is its own store; leave it out")
        return queue  # type: ignore[return-value]  # pyright: ignore[reportReturnType]  # it is no push engine
    if store is None:
        raise ConfigurationError(
            "a push engine needs a store, which has the ledger and the dead letters: give store=, or SAFEDEFER_STORE, such as "
            "postgresql://user@host/database"
        )
    if isinstance(store, str) and is_push_address(store):
        raise ConfigurationError(f"the store is a pull engine; use {_FORMS}")
    return PushAddress(queue, store)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # it is one


def _is_celery(queue: object) -> bool:
    # By its name: importing Celery to know that a queue is none of its applications would take longer than all else here.
    return any((each.__module__, each.__qualname__) == ("celery.app.base", "Celery") for each in type(queue).__mro__)


def open_push(address: PushAddress, storage: StorageOptions | None = None) -> PushQueue:
    """Open a push engine and its store.

    Raises:
        ConfigurationError: An address is malformed.
        MissingExtra: The engine's packages are not installed.
    """
    from safedefer.queues.push import PushQueue  # noqa: PLC0415

    store = open_queue(address.store, storage) if isinstance(address.store, str) else address.store
    if not isinstance(address.engine, str):
        return PushQueue(address.engine, store)
    return PushQueue(open_engine(address.engine), store, name=place(address.engine))


def open_engine(url: str) -> PushEngine:
    """Return the push engine that a URL names; its packages are imported now.

    Raises:
        ConfigurationError: No engine has such URLs, or it is malformed.
        MissingExtra: The engine's packages are not installed.
    """
    if url.partition(":")[0].lower() == "cloudtasks":
        from safedefer.queues.cloudtasks.engine import CloudTasks  # noqa: PLC0415 - as open_queue

        return CloudTasks(url)
    if url.partition(":")[0].partition("+")[0].lower() == "celery":
        return _celery().CeleryEngine.from_url(url)  # type: ignore[no-any-return]
    raise ConfigurationError(f"no push engine has the URL {place(url)}; see docs/explanation/delivery.md")


def open_queue(url: str, storage: StorageOptions | None = None) -> PullQueue:
    """Return the queue that a URL names: ``sqlite:///relative.db``, ``sqlite:////absolute.db``, ``postgresql://...``, ``memory://``.

    Percent-escapes in the path of a file are decoded; a PostgreSQL URL is libpq's, parameters included.

    Raises:
        ConfigurationError: The URL is none of these.
        MissingExtra: The engine's packages are not installed.
    """
    # Each engine is imported here, and only when it is named: importing safedefer must not load what it is not asked for.
    options = {} if storage is None else asdict(storage)
    if _is_postgres(url):
        queue: PullQueue = _postgres().PostgresQueue(url, **options)
        return queue
    try:
        parts = urlsplit(url)
    except ValueError:  # its text quotes the URL
        parts = urlsplit("")
    if parts.query or parts.fragment:
        raise ConfigurationError(f"a queue's URL has no options (? or #: write them as %3F and %23); use {_FORMS}")
    if parts.scheme == "memory":
        if parts.netloc or parts.path not in ("", "/"):
            raise ConfigurationError("a memory queue has no name; use memory://")
        from safedefer.queues.memory.queue import MemoryQueue  # noqa: PLC0415

        return MemoryQueue(**options)
    if parts.scheme == "sqlite":
        if parts.netloc:
            raise ConfigurationError(f"the path of a sqlite URL begins after three slashes; use {_FORMS}")
        from safedefer.queues.sqlite.queue import SQLiteQueue  # noqa: PLC0415

        return SQLiteQueue(unquote(parts.path.removeprefix("/")), **options)
    raise ConfigurationError(f"no queue has URLs of the scheme {parts.scheme!r}; use {_FORMS}")


def migrate_queue(url: str) -> list[str]:
    """Make the tables of a queue's database, or bring them up to date; return what was done.

    A SQLite file is made and brought up to date when it is opened: there is nothing to do.

    Raises:
        ConfigurationError: The URL is understood by no engine.
        QueueUnavailable: The database is not there, or its user may not make tables.
    """
    if _is_postgres(url):
        done: list[str] = _postgres().migrate(url)
        return done
    open_queue(url).close()
    return []


def _is_postgres(url: str) -> bool:
    return url.partition(":")[0].lower() in _POSTGRES


def load_queue_file(path: str | Path) -> QueueFile:
    """Read a ``queue.yaml``.

    Raises:
        ConfigurationError: It cannot be read, or something in it is wrong; the message names the line.
    """
    # Here: only who has such a file needs YAML.
    from safedefer.queues.config import QueueFile  # noqa: PLC0415

    return QueueFile.load(path)


def _celery() -> ModuleType:
    # Here: as below.
    try:
        from safedefer.queues.celery import engine  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise MissingExtra("celery", "a queue on a Celery broker") from error
    return engine


def _postgres() -> ModuleType:
    # Here: an extra, and only for who uses it.
    try:
        from safedefer.queues import postgres  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise MissingExtra("postgres", "a queue in PostgreSQL") from error
    return postgres
