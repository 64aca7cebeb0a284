"""What a queue is: the seam between ``defer()``, the dispatcher, the handler and people, a Protocol for each; what it keeps, how long.

Queues carry opaque bytes. All else in a ``QueuedTask`` is a hint for routing and display: the signed token repeats it, and
only the token is believed.

Over 450 lines, since the Protocols and the values that they exchange are one seam.

Times are seconds since the epoch (``float``) and come in as arguments. Every method is thread-safe, and may raise
``QueueUnavailable``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, Protocol, TypeAlias

from safedefer.errors import QueueUnavailable, TaskAlreadyExistsError

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from safedefer.blobs import Blob, BlobStore
    from safedefer.ledger import AttemptRecord, Ledger, VerifiedLetter
    from safedefer.queues.capabilities import Capabilities
    from safedefer.queues.rates import QueueControl, QueueLimits


#: Seconds for which every engine knows what has ended, where nothing else is said.
HISTORY_SECONDS: Final = 7 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageOptions:
    """How long and how much a queue keeps."""

    tombstone_seconds: float = 9 * 86_400.0
    """How long the name of an ended task is not free (App Engine: 9 days)."""
    history_seconds: float = HISTORY_SECONDS
    """How long ``find`` and ``tasks`` know what succeeded or was cancelled."""
    blob_limit: int = 2**30
    """Bytes that the stored tokens of all oversize tasks may take together."""
    dead_seconds: float = 90 * 86_400.0
    """Dead letters that are older are archived."""
    dead_limit: int = 100_000
    """Of more dead letters the oldest are archived."""


#: Begins the unique key of a task that is looked for only until its first delivery begins.
UNTIL_START: Final = "start:"
_UNTIL_START: Final = re.compile(UNTIL_START + "[0-9a-f]{64}")
#: Shared by all tasks that have nothing there: nobody changes it.
_NONE: Final[Mapping[str, Any]] = {}


class QueuedTask(NamedTuple):
    """A token and the hints that a queue needs to hand it on."""

    id: str
    """The token's ``jti``."""
    queue: str
    token: bytes
    """What is POSTed: the task's token, or the signed pointer of an oversize task."""
    audience: str
    """The token's ``aud``: with ``id`` it names the ledger entry."""
    url: str
    target: str
    eta: float
    created: float
    expires: int
    """The token's ``exp``."""
    name: str | None = None
    headers: Mapping[str, str] = _NONE
    retry_options: Mapping[str, float] = _NONE
    """The task's own ``TaskRetryOptions``, those that were given; empty: the queue's."""
    digest: bytes = b""
    """SHA-256 of the token, of the stored one where the task is oversize: the ledger's digest. Empty: not computed yet."""
    blob: Blob | None = None
    """To be stored in the same transaction. None in what ``lease`` returns."""
    blob_id: str | None = None
    callable_name: str = ""
    """For people who look: ``shop.tasks:send_receipt``. Empty if unknown."""
    unique_key: str | None = None
    """At most one waiting or running task of the queue has it; see ``AlreadyWaiting``. One that begins with ``start:`` is
    free again when its task is leased."""
    deadline: float | None = None
    """Seconds that an attempt may take, for an engine that waits for the answer; 0 is none, None is not known. Not stored."""


def is_free_when_leased(unique_key: str | None) -> bool:
    """Whether a unique key is one of ours that ends with the first delivery, whatever somebody wrote into the storage."""
    return unique_key is not None and _UNTIL_START.fullmatch(unique_key) is not None


def task_digest(task: QueuedTask) -> bytes:
    """Return the ledger's digest of a task, computed where the task does not say it."""
    return task.digest or sha256(task.blob.data if task.blob else task.token).digest()


class BlobsFull(QueueUnavailable):
    """There is no room for the stored token of an oversize task; others are taken."""

    # To callers it is what it is to them: a queue that does not take the task now.
    slug: ClassVar[str] = QueueUnavailable.slug

    def __init__(self, limit: object) -> None:
        super().__init__(
            f"the stored tokens of oversize tasks would take more than {limit} bytes; "
            "let some of these tasks end, or raise blob_limit"
        )


class NotAllStored(QueueUnavailable):
    """An engine that stores no batch as a whole stored a part of one. ``failed`` says by task id what refused the others."""

    slug: ClassVar[str] = QueueUnavailable.slug

    def __init__(self, failed: Mapping[str, Exception]) -> None:
        super().__init__(
            f"{len(failed)} tasks of the batch were not stored, and the others were; `failed` has an error for each id: defer "
            "these again"
        )
        self.failed: dict[str, Exception] = dict(failed)


class AlreadyWaiting(TaskAlreadyExistsError):
    """A task of the same ``unique_key`` waits or runs in the queue: ``task_id``."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"the task {task_id} has the same call and waits or runs; let it run, or cancel it")
        self.task_id = task_id


class BlobTaken(TaskAlreadyExistsError):
    """The blob of a task is that of another task: the task itself is not known."""

    # To callers it is what it is to them.
    slug: ClassVar[str] = TaskAlreadyExistsError.slug

    def __init__(self, blob_id: object) -> None:
        super().__init__(f"the blob {blob_id} belongs to another task; give every blob its own id")


class Lease(NamedTuple):
    """A claim on a task until a time. ``owner`` fences it: only the newest owner can settle."""

    task: QueuedTask
    owner: str
    until: float
    attempts: int = 0
    """Charged attempts before this one; this one is ``attempts + 1``."""
    retries: int = 0
    """Deliveries before this one, charged or not (``X-AppEngine-TaskRetryCount``)."""
    executions: int = 0
    """Attempts that were answered, not with a 5xx (``X-AppEngine-TaskExecutionCount``)."""
    first_attempt: float | None = None
    """When the first charged attempt began; ``task_age_limit`` counts from ``task.eta``."""
    rejections: int = 0
    """Answers ``rejected`` or ``refused`` so far, and when the first of them came."""
    first_rejection: float | None = None
    previous_response: int | None = None
    retry_reason: str | None = None
    losses: int = 0
    """Deliveries in a row whose run began and never ended; see ``rules.must_be_alone``."""


class Verdict(StrEnum):
    """How a delivery leaves the task in the queue."""

    DONE = "done"
    """Ended: the row goes, its name becomes a tombstone, its blob is deleted."""
    RETRY = "retry"
    """Due again at ``Settlement.at``."""
    DEAD = "dead"
    """Not tried again: moved to the dead letters, its name becomes a tombstone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """What the dispatcher says of one delivery."""

    verdict: Verdict
    at: float | None = None
    """RETRY: when the task is due again."""
    charged: bool = True
    """Whether the delivery counts as an attempt."""
    executed: bool = False
    """Whether it counts for ``X-AppEngine-TaskExecutionCount``."""
    rejected: bool = False
    """Whether it counts towards the limit of rejections."""
    status: int | None = None
    reason: str | None = None
    """A slug; the reason of the dead letter, or of the retry."""
    record: AttemptRecord | None = None
    """An attempt that the handler could not record itself: there was no response."""
    answered: bool = True
    """Whether there was one; if not, the ledger says whether the task ran."""


class TaskState(StrEnum):
    """Where a task stands, for people who look."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    DEAD = "dead"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskView:
    """One task as the queue knows it. A dead letter keeps its original token for ever."""

    id: str
    queue: str
    state: TaskState
    name: str | None
    callable_name: str
    url: str
    target: str
    audience: str
    headers: Mapping[str, str]
    eta: float
    created: float
    expires: int
    attempts: int
    token: bytes
    """The task's own token: the stored one where the task is oversize."""
    reason: str | None = None
    ended: float | None = None
    retry_options: Mapping[str, float] = field(default_factory=dict)
    records: Sequence[AttemptRecord] = ()
    """Oldest first."""
    due: float | None = None
    """When one that waits may be delivered: its eta, or the time of its retry. When the lease of one that runs ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadFilter:
    """Which dead letters are meant: those that agree with all that is given."""

    queue: str | None = None
    reason: str | None = None
    """The slug of the reason."""
    callable_name: str | None = None
    """``shop.tasks:send_receipt``."""
    since: float | None = None
    """Dead at this time or later."""
    before: float | None = None
    """Dead before this time."""
    archived: bool = False
    """The archived ones, instead of the others."""


Position: TypeAlias = tuple[float, str]
"""Where a task stands in the list of its state: a number that falls from task to task, and the id."""


class ListedTask(NamedTuple):
    """A task of a page."""

    position: Position
    view: TaskView


class TaskPage(NamedTuple):
    """A part of the list of the tasks of one state."""

    tasks: Sequence[ListedTask]
    """Without records."""
    after: Position | None
    """The position of the last row that was looked at; None: there are no more."""


class EndCount(NamedTuple):
    """How many tasks of a queue ended so within a step of time."""

    queue: str
    state: TaskState
    step: int
    """Counted from ``since``."""
    number: int


class AttemptTime(NamedTuple):
    """How long one attempt took."""

    queue: str
    seconds: float


def queue_of(audience: str) -> str:
    """Return the queue that an audience names; empty if somebody stored what is none."""
    parts = audience.split(":", 2)
    return parts[1] if len(parts) > 1 else ""


class Notice(NamedTuple):
    """What a process says of itself, for people who look: a hint, which nobody signed."""

    process: str
    text: str
    at: float
    """When it was written, by the clock of the process."""


#: A notice that is older is deleted when the next one is written.
NOTICE_SECONDS: Final = 900.0
#: Characters of a process's name and bytes of a notice's text that are stored and read; a longer text reads as an empty one.
NOTICE_NAME: Final = 200
NOTICE_BYTES: Final = 8_192
#: Notices that are read.
NOTICES: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStats:
    """Counts of one queue.

    ``oldest`` is the earliest eta of those that wait, in seconds since the epoch, whatever put them off since. The queue's
    lag is the time since then.
    """

    queue: str
    waiting: int
    running: int
    dead: int
    oldest: float | None


class EnqueueStatements(Protocol):
    """How a connection of the user's to the queue's own PostgreSQL database stores tasks, in its transaction."""

    @property
    def marker(self) -> str:
        """A random text that is in this database alone, in the table ``safedefer.settings``."""
        ...

    def enqueue_statements(self, tasks: Sequence[QueuedTask], /) -> Sequence[tuple[str, tuple[object, ...]]]:
        """Statements with parameters ``$1``, to be run in order, that store all tasks or fail."""
        ...

    def refusal(self, error: BaseException, /) -> Exception | None:
        """Return what an error of such a statement means, as ``enqueue_many`` says it; None if it is something else."""
        ...


class EnqueueFile(Protocol):
    """How an apsw connection of the user's to the queue's own SQLite file stores tasks, in its transaction."""

    @property
    def path(self) -> str:
        """The absolute path of the file."""
        ...

    def enqueue_on(self, connection: Any, tasks: Sequence[QueuedTask], /) -> None:
        """Store all tasks or none. Raises what ``enqueue_many`` raises, and apsw's errors."""
        ...


class Queue(Protocol):
    """Takes tasks: what producers need. What was enqueued when ``enqueue_many`` returns survives a crash."""

    @property
    def capabilities(self) -> Capabilities:
        """What the engine can do."""
        ...

    @property
    def statements(self) -> EnqueueStatements | None:
        """How users' connections store tasks by SQL; None: the queue is in no database that they could connect to."""
        ...

    @property
    def file(self) -> EnqueueFile | None:
        """How users' connections store tasks in the queue's file; None: it is in none."""
        ...

    def enqueue_many(self, tasks: Iterable[QueuedTask], /) -> None:
        """Store all tasks or none, with their blobs, in one transaction; an error of the iterator undoes it.

        Raises:
            TaskAlreadyExistsError: A task of the same name lives in its queue, or the id is known already.
            TombstonedTaskError: The name's task ended within the tombstone window, counted to ``task.created``; or the
                task of this id has ended.
            AlreadyWaiting: A task of the same ``unique_key`` waits or runs in the queue.
            QueueUnavailable: Also if there is no room for a blob.
        """
        ...

    def cancel(self, task_id: str, *, now: float) -> bool:
        """Cancel a task: end one that waits, unrun; mark the ledger's entry of one that is leased or runs.

        A marked task does not begin again, and the handler that runs it stops it. Its delivery ends as cancelled.
        False if there is none, or by the ledger it has ended.
        """
        ...

    def stats(self, *, now: float) -> Sequence[QueueStats]:
        """Counts of every queue that has a task, sorted by name."""
        ...

    def close(self) -> None:
        """Finish what was accepted and let go of the storage."""
        ...


class LeaseCalls(Protocol):
    """``Leasing.lease`` and ``Leasing.settle_many``, awaited."""

    async def lease(
        self, *, owner: str, limit: int, seconds: float, now: float, queues: Sequence[str] | None = None
    ) -> Sequence[Lease]:
        """Claim tasks."""
        ...

    async def settle_many(self, settlements: Sequence[tuple[Lease, Settlement]], *, now: float) -> Sequence[bool]:
        """Settle tasks."""
        ...


class Leasing(Protocol):
    """Hands tasks out and takes back what became of them: what a dispatcher needs."""

    def lease(
        self, *, owner: str, limit: int, seconds: float, now: float, queues: Sequence[str] | None = None
    ) -> Sequence[Lease]:
        """Claim up to ``limit`` due tasks (of ``queues``, or of all) for ``seconds``.

        What fell due first comes first: a task falls due at its eta, at the time of its retry, or
        when its lease runs out; what was enqueued first comes first of those that fell due together.
        If the run of a lost delivery had begun by the ledger, it counts as a charged attempt: the
        process died while it ran, or before it could settle. A task that lost too many runs in a row becomes a
        dead letter instead (``rules.is_poison``).

        Queues that are paused or held give nothing; a rate and a cap on concurrency bound what the others give.
        """
        ...

    def extend_many(self, leases: Sequence[Lease], *, seconds: float, now: float) -> Sequence[bool]:
        """Prolong leases to ``seconds`` from now; False stands for a lost one."""
        ...

    def release(self, owners: Sequence[str], *, now: float) -> int:
        """Let the leases of dispatchers that are dead fall due now, unless a run began; returns how many.

        ``owners`` is what they gave to ``lease``. The caller knows that their processes have ended.
        """
        ...

    def settle_many(self, settlements: Sequence[tuple[Lease, Settlement]], *, now: float) -> Sequence[bool]:
        """Say how deliveries ended, in one transaction; False stands for a lost lease, of which nothing changes.

        RETRY writes its time and the attempts into the ledger: no run begins before.
        Where DONE or DEAD contradicts an end that the ledger knows, the ledger is believed (``rules.end_of``). A dead
        letter of no reason gets that of its newest record.
        """
        ...

    def next_due(self, *, now: float, queues: Sequence[str] | None = None) -> float | None:
        """When the next task or lease falls due, maybe in the past; None if there is none.

        Where a queue is held back, it is when that is worth another look.
        """
        ...

    def wait(self, timeout: float) -> bool:
        """Block until a task is enqueued (by any process) or ``timeout`` seconds pass.

        True if something may have changed. A change since the last ``lease`` or ``wait`` counts.
        What the dispatchers of other processes settle or lose ends no wait: let ``timeout`` end at
        ``next_due``, and within some seconds in any case.
        """
        ...

    def wake(self) -> None:
        """End a ``wait`` of this process early."""
        ...

    def on_loop(self) -> AbstractAsyncContextManager[LeaseCalls | None]:
        """Have connections of the running loop while the context lasts; the ledger's ``here`` has them too.

        None: the engine has none, and is called in threads.
        """
        ...


class Throttle(Protocol):
    """Holds queues back: what the dispatcher and people need."""

    def configure(self, limits: Sequence[QueueLimits], *, now: float) -> None:
        """Put the declared limits in force, for every dispatcher; a queue that is not among them has none."""
        ...

    def controls(self, *, now: float) -> Sequence[QueueControl]:
        """Return the current limits, pauses and holds, sorted by queue."""
        ...

    def pause(self, queue: str, *, paused: bool, now: float) -> None:
        """Lease nothing of a queue until it is resumed (``paused=False``); what runs goes on."""
        ...

    def hold(self, queue: str, *, until: float, now: float) -> None:
        """Lease nothing of a queue before ``until`` (a handler's ``Retry-After``); an earlier time changes nothing."""
        ...

    def purge(self, queue: str, *, now: float) -> int:
        """Cancel all that waits in a queue at the time of the call; returns how many. Not one transaction."""
        ...


class Keep(Protocol):
    """Opaque values under keys, each until a time: what a push engine's tasks leave in a store (``queues.pushing``)."""

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, bytes]:
        """Return the values of those keys that have one, whose time may be over."""
        ...

    def put(self, key: str, value: bytes, *, expires: int) -> None:
        """Store a value, in the place of another one; the store deletes it some time after ``expires``.

        Raises:
            BlobsFull: The key is a blob's (``BLOB_KEY``), and all of these would take more than ``blob_limit`` bytes.
        """
        ...

    def delete(self, keys: Sequence[str], /) -> None:
        """Delete values; nothing happens for keys that have none."""
        ...


class Copy(NamedTuple):
    """A copy that is due for a look. By the ledger its task has not ended, and does not run now."""

    audience: str
    task_id: str
    looks: int
    """Those before this one."""
    task: str
    """As ``queues.copies.dump`` made it."""


class Copies(Protocol):
    """Copies of tasks that a push engine has taken and may lose (``queues.copies``), each until the ledger has its end.

    A key is a task's audience and id.
    """

    def put_many(self, tasks: Sequence[QueuedTask], /) -> None:
        """Store copies, in one transaction, in the place of others; the first look at each is due soon after its eta."""
        ...

    def look(self, *, now: float, limit: int) -> tuple[int, Sequence[Copy]]:
        """Look at copies that are due, each by one caller, and put the next look off; return how many, and those that count.

        Copies of tasks that have ended are deleted, and those that somebody wrote who is not the queue. Of the others those
        count whose task does not run now.
        """
        ...

    def put_off(self, keys: Sequence[tuple[str, str]], /, *, until: float) -> None:
        """Look at copies again at a time."""
        ...

    def delete(self, keys: Sequence[tuple[str, str]], /) -> None:
        """Delete copies; nothing happens for keys that have none."""
        ...


#: Begins the keys of stored tokens in a ``Keep``, whose bytes are limited together.
BLOB_KEY: Final = "blob:"


class Store(Protocol):
    """Remembers: what the handler and people need."""

    @property
    def ledger(self) -> Ledger:
        """The ledger in the same storage."""
        ...

    @property
    def blobs(self) -> BlobStore:
        """The blobs in the same storage."""
        ...

    def find(self, task_id: str) -> TaskView | None:
        """One task in whatever state, with the records of its attempts.

        What succeeded or was cancelled is known for a while, without its token, headers and options.
        """
        ...

    def tasks(
        self, *, states: Sequence[TaskState] = (), queue: str | None = None, limit: int = 100
    ) -> Sequence[TaskView]:
        """List tasks, newest first, without records; without ``states``: waiting, running and dead.

        Running means leased, here and in ``find``: neither knows the time.
        """
        ...

    def live_tasks(
        self, *, queue: str | None = None, after: int = 0, limit: int = 100
    ) -> Sequence[tuple[int, TaskView]]:
        """List waiting and running tasks, each with its place, in the order of their places, without records.

        ``after`` is the place of the last one seen. A task keeps its place; one that is enqueued later has a later one, but
        for transactions that end in another order.
        """
        ...

    def page(
        self, state: TaskState, *, queue: str | None = None, after: Position | None = None, look: int = 100
    ) -> TaskPage:
        """List tasks of one state, newest first, from the one behind ``after`` on: at most ``look`` rows are looked at.

        An engine may look at rows of other queues, and of what ended in another way: a page may be empty and not the last.
        Newest means enqueued last, or ended last. Archived dead letters are left out.
        """
        ...

    def ends(self, *, since: float, step: float, most: int = 100_000) -> Sequence[EndCount]:
        """Count what succeeded, was cancelled and died since a time, in steps of so many seconds: of each the newest ``most``.

        Archived dead letters are left out.
        """
        ...

    def attempt_times(self, *, since: float, most: int = 1_000) -> Sequence[AttemptTime]:
        """Return how long the newest attempts took that ended since a time: the newest ``most`` of those that are recorded.

        An engine may have ``most`` successes and ``most`` others.
        """
        ...

    def put_notice(self, process: str, text: str, *, now: float) -> None:
        """Store what a process says of itself, in place of what it said before; an empty text deletes that.

        A power cut may undo it. Notices of others that are older than ``NOTICE_SECONDS`` are deleted.
        """
        ...

    def notices(self, *, since: float) -> Sequence[Notice]:
        """Return the newest ``NOTICES`` notices that were written since a time, the newest first."""
        ...

    def dead_letters(
        self, where: DeadFilter, *, after: tuple[float, str] | None = None, limit: int = 100
    ) -> Sequence[TaskView]:
        """List dead letters with their records, oldest first; ``after`` is ``(ended, id)`` of the last one seen."""
        ...

    @property
    def keep(self) -> Keep:
        """What it keeps of tasks that a push engine delivers."""
        ...

    @property
    def copies(self) -> Copies:
        """Copies of tasks that a push engine may lose."""
        ...

    def bury(self, task: QueuedTask, *, reason: str | None, attempts: int, now: float, verified: bool) -> bool:
        """Make a dead letter of a task that the queue does not have, since a push engine delivers it.

        A letter of the same id is replaced by one whose token is ``verified``, and by no other: then False. The ledger is not
        changed: store the end of the run after that.
        """
        ...

    def hand_over(self, leases: Sequence[Lease], *, now: float) -> Sequence[bool]:
        """Forget tasks that a push engine has taken over, in one transaction; False for a lost lease, and nothing for it.

        Neither history nor ledger says that they ended. A retry that the ledger knows of them is settled.
        """
        ...

    def drop_dead(self, task_ids: Sequence[str]) -> int:
        """Delete dead letters, archived ones too, in one transaction; returns how many there were."""
        ...

    def replace_dead(self, task_id: str, task: QueuedTask, letter: VerifiedLetter, *, now: float) -> bool:
        """Enqueue ``task`` for the dead letter, in one transaction; False if there is none. See ``check_replacement``."""
        ...

    def prune(self, *, now: float) -> int:
        """Delete what is too old: tombstones, history, ledger entries; archive old dead letters; returns how many.

        The ledger keeps what it knows of dead letters. Bounded work in a call; ``lease`` has it done now and then.
        """
        ...


class DispatchedQueue(Leasing, Throttle, Protocol):
    """What a dispatcher empties."""


class PullQueue(Queue, DispatchedQueue, Store, Protocol):
    """A queue that a dispatcher empties, and that keeps its own ledger, blobs and dead letters."""
