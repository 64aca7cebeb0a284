"""A thread that empties the outboxes in users' databases, once their transactions are committed.

``transfer`` moves the tasks of one, in batches.

Each database is swept by itself: one that somebody keeps locked, or whose server does not answer, keeps neither the other
databases waiting nor a producer, a fork or the end of the process.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from safedefer.concurrency.forks import register_fork
from safedefer.errors import QueueError
from safedefer.transactions.databases import Source
from safedefer.transactions.handover import slug

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safedefer.queues.base import Queue

_log: Final = logging.getLogger("safedefer.outbox")

#: Seconds between two looks at an outbox in which nothing is expected.
_SWEEP_SECONDS: Final = 2.0
#: The same in a process that has left nothing there for so long: another one may have died.
_IDLE_SECONDS: Final = 30.0
_IDLE_AFTER: Final = 600.0
#: Seconds between the first looks for what a transaction of the user's may have committed meanwhile.
_FIRST_LOOK: Final = 0.01
#: Seconds that a count waits for a sweep under way.
_COUNT_SECONDS: Final = 2.0
#: Seconds that the block of a producer gives to a sweep, and that the databases that answer wait for those that do not.
_BLOCK_SECONDS: Final = 1.0
_APART_SECONDS: Final = 2.0
#: Seconds that a fork waits for sweeps under way, of all databases together, and that the end of the process waits for each.
_FORK_SECONDS: Final = 2.0
_END_SECONDS: Final = 10.0
#: Seconds between two looks while transactions are open: a connection may begin another one at once.
_PACE: Final = 0.1


class Outlet(Protocol):
    """One database with outboxes. It raises what its library raises, and ``FileNotFoundError`` if nobody has made it yet."""

    def move(self, queue: Queue, schemas: Sequence[str | None], until: float | None, /) -> int | None:
        """Move the committed tasks to a queue; returns how many, or None if the time was over before the last one.

        Raises:
            QueueUnavailable: The queue did not store a task, or any; what is left stays in the outbox.
        """
        ...

    def count(self, schemas: Sequence[str | None], /) -> int:
        """Return how many committed tasks wait."""
        ...

    def refusal(self, schema: str | None, /) -> str | None:
        """Return why an outbox cannot be used; None if it can, or is not made yet."""
        ...


class Relay:
    """A thread that sweeps outboxes: at once when something is expected, and every few seconds anyway.

    Args:
        queue: Where the tasks go; called in any thread.
    """

    def __init__(self, queue: Callable[[], Queue]) -> None:
        self._queue = queue
        self._outlets: dict[str, Outlet] = {}
        self._schemas: dict[str, tuple[str | None, ...]] = {}
        """Where the outboxes of each database are; None is on the search path of our own connection."""
        self._problems: dict[str, str] = {}
        """What was logged of each database since it could last be read."""
        self.tireless = False
        """Whether looking after what others have left is this process's business."""
        self._begin()
        register_fork(self, early=True)

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._sweeping = {name: threading.Lock() for name in self._outlets}
        self._held: list[threading.Lock] = []
        """What the fork under way has waited for."""
        self._apart: dict[str, threading.Thread] = {}
        self._thread: threading.Thread | None = None
        self._expected = False
        self._closed = False
        self._open: list[tuple[Source, float]] = []
        self._patient_until: float | None = None
        self._last = time.monotonic()
        self._wanted = 0
        self._swept: dict[str, int] = {}
        """The value of ``_wanted`` when the last sweep of each database began that has not failed."""

    def add(self, identity: str, outlet: Outlet, schema: str | None = None) -> None:
        """Add a database, and the schema of its outbox, to those that are swept."""
        with self._changed:
            self._sweeping.setdefault(identity, threading.Lock())
            self._outlets.setdefault(identity, outlet)
            self._schemas[identity] = tuple(dict.fromkeys((*self._schemas.get(identity, ()), schema)))

    def expect(self, source: Source | None = None) -> None:
        """Look now, and then less and less often; if ``source`` is given, when its transaction has ended.

        The end of a transaction that lasts is not waited for.
        """
        with self._changed:
            if source is not None:
                self._open.append((source, time.monotonic() + _SWEEP_SECONDS))
            self._expected = self._expected or source is None or source.dialect == "sqlite"
            self._last = time.monotonic()
            self._wanted += 1
            self._changed.notify()
            _finish_at_exit(self)
            if self._thread is None and not self._closed:
                # The thread must not keep its owner alive.
                self._thread = threading.Thread(
                    target=_sweep_loop, args=(weakref.ref(self),), name="safedefer-outbox", daemon=True
                )
                try:
                    self._thread.start()  # kept already: Ctrl-C may come when it runs
                except RuntimeError as error:  # the rows stay: the next call tries again, and so does any other process
                    self._thread = None
                    _log.warning("no thread can be started for the outbox (%s); trying again later", error)

    def rest(self, seconds: float) -> bool:
        """Wait for the next look; returns whether something is expected."""
        with self._changed:
            if not self._expected and not self._closed:
                self._changed.wait(seconds)
            expected, self._expected = self._expected, False
            return expected

    def too_early(self) -> bool:
        """Whether only open transactions are waited for, or one is open in whose way a reader could be; waits a moment."""
        with self._changed:
            now = time.monotonic()
            still = [(source, until) for source, until in self._open if now < until and is_open(source)]
            ended, self._open = len(still) < len(self._open), still
            in_the_way = any(source.dialect == "sqlite" for source, _ in still)
            if in_the_way or (still and not ended and not self._expected):
                patience = _SWEEP_SECONDS if in_the_way else _PACE
                self._patient_until = self._patient_until or now + patience
                if now < self._patient_until and not self._closed:
                    self._changed.wait(_FIRST_LOOK)
                    return True
            self._patient_until = None
            return False

    @property
    def longest_pause(self) -> float:
        """Seconds between two looks, at most: a look at a server is a connection."""
        idle = not self.tireless and time.monotonic() > self._last + _IDLE_AFTER
        return _IDLE_SECONDS if idle else _SWEEP_SECONDS

    @property
    def closed(self) -> bool:
        """Whether the thread should end."""
        return self._closed

    def sweep(self) -> int:
        """Relay every known outbox; returns how many tasks were moved."""
        return sum(self._sweep(identity) or 0 for identity in list(self._outlets))

    def sweep_apart(self) -> None:
        """Relay every known outbox; where there are several, each in a thread of its own, and the slow ones go on meanwhile."""
        names = list(self._outlets)
        if len(names) <= 1:
            self.sweep()
            return
        for name in names:
            if name not in self._apart or not self._apart[name].is_alive():
                thread = threading.Thread(target=self._sweep, args=(name,), name="safedefer-outbox-one", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # there is no room for another thread
                    self._sweep(name)
                else:
                    self._apart[name] = thread
        until = time.monotonic() + _APART_SECONDS
        for thread in self._apart.values():
            thread.join(max(0.0, until - time.monotonic()))

    def sweep_one(self, identity: str) -> bool:
        """Relay one outbox, for a moment; whether it is empty now."""
        return self._sweep(identity, _BLOCK_SECONDS, until=time.monotonic() + _BLOCK_SECONDS) is not None

    def _sweep(self, identity: str, patience: float = -1.0, *, until: float | None = None) -> int | None:
        lock = self._sweeping[identity]
        if not lock.acquire(timeout=patience):
            return None
        try:
            wanted, still_open = self._wanted, bool(self._open)
            moved = self._sweep_locked(identity, until)
            if moved is not None and not still_open:
                self._swept[identity] = wanted
            return moved
        finally:
            lock.release()

    def _sweep_locked(self, identity: str, until: float | None) -> int | None:
        try:
            moved = self._outlets[identity].move(self._queue(), self._schemas[identity], until)
        except FileNotFoundError:  # nobody has made the database yet
            return 0
        except QueueError as error:
            if self._is_new(identity, error):
                _log.warning("the queue takes nothing from the outbox now (%s); trying again", slug(error))
        except Exception as error:  # noqa: BLE001  # the user's database, by whatever library
            if self._is_new(identity, error):
                _log.warning("the outbox in %a cannot be read now (%s); trying again", identity, slug(error))
        else:
            self._problems.pop(identity, None)
            return moved
        return None

    def databases(self) -> list[tuple[str, str | None]]:
        """Return every database and schema."""
        return [(identity, schema) for identity in self._outlets for schema in self._schemas[identity]]

    def count(self) -> int | None:
        """Return how many rows wait in all outboxes; None if one cannot be read now."""
        counted = 0
        for identity in list(self._outlets):
            lock = self._sweeping[identity]
            if not lock.acquire(timeout=_COUNT_SECONDS):
                return None
            try:
                counted += self._outlets[identity].count(self._schemas[identity])
            except FileNotFoundError:  # nobody has made the database yet
                continue
            except Exception:  # noqa: BLE001  # the user's database, by whatever library; a sweep logs what is wrong
                return None
            finally:
                lock.release()
        return counted

    def look(self) -> list[tuple[str, str | None]]:
        """Return why the outbox of each database and schema cannot be used; None if it can, or is not made yet."""
        return [(identity, self._trouble(identity, schema)) for identity, schema in self.databases()]

    def _trouble(self, identity: str, schema: str | None) -> str | None:
        with self._sweeping[identity]:
            try:
                return self._outlets[identity].refusal(schema)
            except FileNotFoundError:  # nobody has made the database yet
                return None
            except Exception as error:  # noqa: BLE001  # the user's database, by whatever library
                return f"it cannot be read ({type(error).__name__}); see that it runs, and that this user may connect"

    def _is_new(self, identity: str, error: Exception) -> bool:
        was, self._problems[identity] = self._problems.get(identity), slug(error)
        return was != slug(error)

    def close(self) -> None:
        """End the thread, and look once more if something is expected."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(_END_SECONDS)
        self.finish()
        _finishing.discard(self)  # the queue is closed soon

    def finish(self) -> None:
        """Look once more at each outbox if something is expected, or the last look failed."""
        wanted = self._wanted
        for identity in list(self._outlets):
            if self._swept.get(identity, 0) != wanted:
                self._sweep(identity, _END_SECONDS)

    def before_fork(self) -> None:
        """Let sweeps end first. One that does not in time goes on in the parent: the child never uses its connection."""
        until = time.monotonic() + _FORK_SECONDS
        for lock in list(self._sweeping.values()):
            if lock.acquire(timeout=max(0.0, until - time.monotonic())):
                self._held.append(lock)

    def after_fork_in_parent(self) -> None:
        """Go on."""
        while self._held:
            self._held.pop().release()

    def after_fork_in_child(self) -> None:
        """Begin anew: the thread is the parent's."""
        closed = self._closed
        self._begin()
        self._closed = closed


#: Relays with tasks to come: a short program empties its outboxes before it ends.
_finishing: Final[weakref.WeakSet[Relay]] = weakref.WeakSet()


def _finish_at_exit(member: Relay) -> None:
    # Not at import: what is registered last is called first, and the queue must still be open.
    if not _finishing:
        atexit.unregister(_finish_all)
        atexit.register(_finish_all)
    _finishing.add(member)


def _finish_all() -> None:
    for member in list(_finishing):
        member.finish()


def is_open(source: Source) -> bool:
    """Whether a connection, which may be closed, has a transaction open."""
    try:
        return source.in_transaction()
    except Exception:  # noqa: BLE001  # the connection was closed, by whatever library
        return False


def _sweep_loop(reference: weakref.ref[Relay]) -> None:
    pause = _FIRST_LOOK
    while (this := reference()) is not None and not this.closed:
        if not this.too_early():
            this.sweep_apart()
            pause = _FIRST_LOOK if this.rest(pause) else min(pause * 2, this.longest_pause)
        del this
