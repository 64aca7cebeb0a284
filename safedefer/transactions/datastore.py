"""Tasks that go with a Datastore transaction: the block, and how the relay empties the outbox there.

google-cloud-ndb is imported when a task is put there, or an outbox there is swept: ``databases.datastore``.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from safedefer.blobs import Blob
from safedefer.errors import BadTransactionStateError, ConfigurationError
from safedefer.queues.base import QueuedTask
from safedefer.transactions.ambient import running_transaction
from safedefer.transactions.blocks import NO_NAMES, OpenBlock
from safedefer.transactions.handover import ID_LENGTH, Judge

if TYPE_CHECKING:
    from safedefer.errors import QueueUnavailable
    from safedefer.queues.base import Queue
    from safedefer.transactions.databases.datastore import EntityReader, EntityRow, OwnTransaction

#: Seconds between two queries for what others have left, by the relay's own thread: each one costs a read.
_LOOK_SECONDS: Final = 2.0
#: Tasks whose entities are read, and that are handed over, at once.
_PAGE: Final = 25
#: Committed tasks of one entity that are remembered until the relay takes them, so that none need be read: 200 MB at most.
_REMEMBERED: Final = 200
#: Of these, so many are handed over at once.
_KNOWN_PAGE: Final = 100
#: Ids of entities that are no tasks of the application, and are not read again; and of tasks that are read after a pause.
_ASIDE: Final = 10_000
#: Seconds before a task that the queue does not take is read again; at first it is ``_LOOK_SECONDS``, and each time twice as long.
_LONGEST_PAUSE: Final = 600.0

_URL: Final = r"datastore://([A-Za-z0-9:.-]{1,100})(?:/([A-Za-z0-9-]{1,100}|\(default\)))?/?"


def import_entities() -> ModuleType:
    """Import what speaks to Datastore. Raises ``MissingExtra``."""
    from safedefer.transactions.databases import datastore  # noqa: PLC0415 - see above

    return datastore


class Address(NamedTuple):
    """A Datastore: ``datastore://PROJECT`` or ``datastore://PROJECT/DATABASE``."""

    project: str
    database: str = ""
    """Empty is the default one."""

    def __str__(self) -> str:
        return f"datastore://{self.project}" + (f"/{self.database}" if self.database else "")


def is_datastore(url: str) -> bool:
    """Whether a URL names a Datastore."""
    return url.lower().startswith("datastore:")


def parse(url: str) -> Address:
    """Read the URL of a Datastore.

    Raises:
        ConfigurationError: It is malformed.
        MissingExtra: google-cloud-ndb is not installed.
    """
    match = re.fullmatch(_URL, url)
    if match is None:
        raise ConfigurationError(
            "an outbox in Datastore is written datastore://PROJECT or datastore://PROJECT/DATABASE"
        )
    import_entities()
    return Address(match[1], "" if match[2] in {None, "(default)"} else match[2])


class EntityOwner(Protocol):
    """The member of an outbox that its blocks in Datastore use."""

    def write_entities(self, tasks: Sequence[QueuedTask]) -> None:
        """Write tasks to the Datastore transaction that runs here."""
        ...


class DatastoreBlock(OpenBlock, AbstractContextManager[None]):
    """One ``app.transaction(ndb)``. If no transaction runs, it opens one, and commits it at its end."""

    def __init__(self, outbox: EntityOwner) -> None:
        super().__init__(outbox)
        self._outbox = outbox
        self._own: OwnTransaction | None = None

    def __enter__(self) -> None:
        if self.here is not None:
            raise BadTransactionStateError("this block is open already; call app.transaction() again")
        if running_transaction() is None:
            entities = import_entities()
            if not entities.has_context():
                raise BadTransactionStateError(
                    "there is no ndb context; write `with client.context():` around the block"
                )
            own: OwnTransaction = entities.OwnTransaction()
            own.begin()
            self._own = own
        self.begin_here()

    async def __aenter__(self) -> None:
        raise BadTransactionStateError("google.cloud.ndb is not awaited; write `with`")

    async def __aexit__(self, *_: object) -> None:
        """Do nothing: it was not entered."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_here()
        own, self._own = self._own, None
        if own is not None:
            own.end(commit=error is None)

    def check(self, *, named: bool, awaits: bool) -> None:  # noqa: ARG002 - nothing is awaited here
        """Check that a task may be put into it. Raises ``BadTransactionStateError``."""
        if named:
            raise BadTransactionStateError(NO_NAMES)
        self.check_here()
        if running_transaction() is None:
            raise BadTransactionStateError(
                "no Datastore transaction runs here: it has ended already, or @ndb.non_transactional() has paused it"
            )
        if import_entities().is_over():
            raise BadTransactionStateError(
                "the Datastore transaction has ended already; defer before the commit, or without transactional=True"
            )

    def add(self, tasks: Sequence[QueuedTask]) -> None:
        """Write tasks."""
        self._outbox.write_entities(tasks)

    async def add_async(self, tasks: Sequence[QueuedTask]) -> None:
        """Write tasks: in a transaction nothing is sent before the commit."""
        self._outbox.write_entities(tasks)


class _Pause(NamedTuple):
    """How long a task is not read that the queue has not taken."""

    until: float
    """The time of the monotonic clock."""
    seconds: float


@dataclass
class _Sweep:
    """One sweep: where tasks go, and what became of them so far."""

    queue: Queue
    until: float | None
    """The time of the monotonic clock after which no other page is read."""
    moved: int = 0
    failure: QueueUnavailable | None = None
    """Why the queue did not store a task. The sweep goes on with the others."""
    is_over: bool = False
    """Whether the time was over before the last page."""


class DatastoreOutlet:
    """The outbox in one Datastore, as the relay empties it. It enqueues first and deletes after.

    Args:
        address: The Datastore.
        judge: Tells which entities are tasks of the application, and hands them over.
        is_given: Whether it is swept by a process that does not use it itself.
    """

    def __init__(self, address: Address, judge: Judge, *, is_given: bool) -> None:
        self._is_given = is_given
        self._address = address
        self._judge = judge
        self._credentials: Any = None
        """Kept, with the access token that they have: a new one costs a request."""
        self._client: tuple[int, Any] | None = None
        """The client that this process has used here, and the process."""
        self._expected: deque[tuple[int, QueuedTask, int]] = deque()
        """What was committed here: the process, the task, its entities."""
        self._aside: set[str] = set()
        self._paused: dict[str, _Pause] = {}
        """Tasks that the queue has not taken."""
        self._next_look = 0.0

    def adopt(self, client: Any) -> None:
        """Read by this client from now on, in this process."""
        self._client = os.getpid(), client

    def expect(self, written: Sequence[tuple[QueuedTask, int]]) -> None:
        """Hand over tasks that were committed, each in so many entities, at the next sweep."""
        for task, pieces in written:
            if pieces == 1 and len(self._expected) < _REMEMBERED:
                self._expected.append((os.getpid(), task, pieces))
            else:
                self._next_look = 0.0

    def look_soon(self) -> None:
        """Query at the next sweep, however short ago the last one was."""
        self._next_look = 0.0

    def look_now(self) -> None:
        """Query at the next sweep, however short ago the last one was, and read all tasks that the queue has not taken."""
        self._paused = {}
        self._next_look = 0.0

    @contextlib.contextmanager
    def _reader(self) -> Iterator[EntityReader | None]:
        entities = import_entities()
        # A channel of the parent's hangs in a child of a fork.
        if self._client is not None and self._client[0] == os.getpid():
            yield entities.EntityReader(self._client[1], self._judge.environment)
            return
        if not self._is_given:
            yield None
            return
        if self._credentials is None:
            self._credentials = entities.find_credentials()
        with entities.connected(*self._address, self._credentials) as client:
            yield entities.EntityReader(client, self._judge.environment)

    def move(self, queue: Queue, _schemas: Sequence[str | None], until: float | None) -> int | None:
        """Hand over what was committed here, and now and then what others have left.

        Raises:
            QueueUnavailable: The queue did not store a task, or any.
            GoogleAPICallError: Datastore did not answer.
        """
        expected = self._take_expected()
        now = time.monotonic()
        if not expected and now < self._next_look:
            return 0
        sweep = _Sweep(queue, until)
        try:
            with self._reader() as reader:
                if reader is None:
                    return 0
                while expected:
                    self._hand_over(reader, sweep, expected[:_KNOWN_PAGE])
                    del expected[:_KNOWN_PAGE]
                if now >= self._next_look:
                    self._next_look = now + _LOOK_SECONDS
                    self._look(reader, sweep)
        except BaseException:
            self._expected.extendleft((os.getpid(), *each) for each in reversed(expected))
            self._next_look = 0.0
            raise
        if sweep.failure is not None:
            raise sweep.failure
        if sweep.is_over:
            self._next_look = 0.0
        return None if sweep.is_over else sweep.moved

    def _take_expected(self) -> list[tuple[QueuedTask, int]]:
        taken = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self._expected.popleft())
        return [(task, pieces) for pid, task, pieces in taken if pid == os.getpid()]

    def _look(self, reader: EntityReader, sweep: _Sweep) -> None:
        now = time.monotonic()
        self._paused = {key: each for key, each in self._paused.items() if now < each.until + _LONGEST_PAUSE}
        after: Any = None
        while keys := reader.keys(after):
            after = keys[-1]
            ids = [each for each in map(import_entities().id_of, keys) if 0 < len(each) <= ID_LENGTH]
            for page in _pages([each for each in ids if self._is_due(each, now)], _PAGE):
                self._move_page(reader, sweep, page)
                if sweep.until is not None and time.monotonic() > sweep.until:
                    sweep.is_over = True
                    return

    def _is_due(self, task_id: str, now: float) -> bool:
        pause = self._paused.get(task_id)
        return task_id not in self._aside and (pause is None or now >= pause.until)

    def _move_page(self, reader: EntityReader, sweep: _Sweep, ids: Sequence[str]) -> None:
        together: list[tuple[QueuedTask, int]] = []
        for task_id, row in reader.rows(ids).items():
            task = self._task(reader, task_id, row)
            if task is None or row is None:
                continue
            if row.pieces > 1:  # by itself: some of these would be many bytes
                self._hand_over(reader, sweep, [(task, row.pieces)])
            else:
                together.append((task, row.pieces))
        self._hand_over(reader, sweep, together)

    def _task(self, reader: EntityReader, task_id: str, row: EntityRow | None) -> QueuedTask | None:
        """Return the task of an entity; None if it is not one of this application's, or none at all."""
        place = str(self._address)
        payload = None if row is None else reader.payload(row)
        if payload is None and not reader.rows([task_id]):  # another process has moved it meanwhile
            return None
        text = None if row is None or payload is None else payload[: row.text_bytes]
        task = self._judge.read(place, task_id.encode(), text)
        if task is None or row is None or payload is None or not self._judge.is_mine(place, task):
            if len(self._aside) < _ASIDE:
                self._aside.add(task_id)
            return None
        return task if task.blob is None else task._replace(blob=Blob(task.blob.id, payload[row.text_bytes :]))

    def _hand_over(self, reader: EntityReader, sweep: _Sweep, written: Sequence[tuple[QueuedTask, int]]) -> None:
        done = self._judge.hand_over(sweep.queue, str(self._address), [task for task, _ in written])
        if done.ids:
            pieces = {task.id: pieces for task, pieces in written}
            reader.delete([(task_id, pieces[task_id]) for task_id in done.ids])
        sweep.moved += len(done.ids)
        if done.is_away and done.failure is not None:
            raise done.failure
        sweep.failure = done.failure or sweep.failure
        taken = frozenset(done.ids)
        for task, _ in written:
            if task.id not in taken:
                self._pause(task.id)

    def _pause(self, task_id: str) -> None:
        """Read a task that the queue does not take only after a while, and the next time after a longer one."""
        last = self._paused.get(task_id)
        seconds = _LOOK_SECONDS if last is None else min(last.seconds * 2, _LONGEST_PAUSE)
        if last is not None or len(self._paused) < _ASIDE:
            self._paused[task_id] = _Pause(time.monotonic() + seconds, seconds)

    def count(self, _schemas: Sequence[str | None]) -> int:
        """Return how many tasks wait. Raises ``GoogleAPICallError``."""
        with self._reader() as reader:
            return 0 if reader is None else reader.count()

    def refusal(self, _schema: str | None) -> str | None:
        """Return None: what can be read can be used. Raises ``GoogleAPICallError``."""
        with self._reader() as reader:
            if reader is not None:
                reader.keys(None)
        return None


def _pages(every: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(every), most):
        yield every[start : start + most]
