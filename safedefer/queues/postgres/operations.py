"""What the PostgreSQL engine does within a transaction: one function for each step of a task's life.

Every function takes the connection first, and leaves opening and ending transactions to the engine, ``lease`` aside.
Jobs are picked, retried and ended by the statements of pgqueuer, which come in as ``Statements``.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from safedefer.ledger import AttemptRecord, EndState
from safedefer.queues.base import Lease, QueuedTask, Settlement, Verdict, task_digest
from safedefer.queues.postgres.rows import (
    LOST_LEASE,
    SOON,
    Hold,
    Progress,
    dead_values,
    entrypoint,
    joined,
    keys,
    read_task,
    record_values,
    to_json,
    write_hints,
    write_holds,
)
from safedefer.queues.rates import QueueControl, QueueLimits
from safedefer.queues.sql import load_statements

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from uuid import UUID

_T = TypeVar("_T")

SQL: Final = load_statements(__file__)
"""The statements of ``postgres.sql`` by name."""

RECORDS_KEPT: Final = 100
"""The newest attempt records that are kept of one task."""

_ENDED: Final = frozenset({EndState.SUCCEEDED, EndState.FAILED, EndState.CANCELLED})
#: Of each queue, before a lease.
_PROMOTED_AT_ONCE: Final = 1_000
#: How pgqueuer logs the end of a job; it deletes those that have not failed, and holds the others.
_LOGGED: Final = {EndState.SUCCEEDED: "successful", EndState.CANCELLED: "canceled", EndState.FAILED: "failed"}


class Connection(Protocol):
    """One connection, as asyncpg has it. Placeholders are ``$1``."""

    async def execute(self, statement: str, /, *values: Any) -> object:
        """Run a statement."""
        ...

    async def executemany(self, statement: str, values: Sequence[Sequence[Any]], /) -> object:
        """Run a statement for each row of values."""
        ...

    async def fetch(self, statement: str, /, *values: Any) -> Sequence[Mapping[str, Any]]:
        """Run a query."""
        ...

    def transaction(self) -> AbstractAsyncContextManager[Any]:
        """Open a transaction, or a savepoint within one."""
        ...


class Apart(Protocol):
    """Does what takes several statements in a transaction of its own, on a loop that no task blocks."""

    async def __call__(self, action: Callable[[Connection], Awaitable[_T]], /) -> _T:
        """Return what the action returns."""
        ...


class Statements(Protocol):
    """pgqueuer's statements."""

    @property
    def enqueue(self) -> str:
        """Admit and insert jobs: arrays of priority, entrypoint, payload, execute_after, dedupe_key and headers.

        Then of name, created, unique key, blob id and blob, each None where no task has one; the limit of blobs; and the queues.
        """
        ...

    @property
    def retry(self) -> str:
        """Queue a picked job again: id, delay, traceback."""
        ...

    @property
    def log(self) -> str:
        """End jobs: arrays of id, status, traceback."""
        ...

    async def dequeue(
        self, connection: Connection, queues: Mapping[str, int], *, limit: int, seconds: float, manager: UUID
    ) -> Sequence[Mapping[str, Any]]:
        """Pick jobs of queues, each with its cap on concurrency (0 is none)."""
        ...


_NO_TIME: Final = timedelta()


def ago(seconds: float) -> timedelta:
    """Return seconds as an interval that PostgreSQL takes."""
    if not seconds:
        return _NO_TIME
    return timedelta(seconds=min(max(seconds, -1e9), 1e9))


async def _together(
    connection: Connection, apart: Apart | None, action: Callable[[Connection], Awaitable[_T]], /
) -> _T:
    if apart is not None:
        return await apart(action)
    async with connection.transaction():
        return await action(connection)


def changed(status: object) -> int:
    """Return how many rows a statement has changed, by what the server says of it."""
    return int(str(status).rpartition(" ")[2])


# --- Enqueue --------------------------------------------------------------------------------------


def enqueue(tasks: Sequence[QueuedTask], *, blob_limit: int) -> tuple[object, ...]:
    """Return the values of the statement that stores tasks, their names and their blobs."""
    named = any(task.name is not None for task in tasks)
    unique = any(task.unique_key is not None for task in tasks)
    oversize = any(task.blob is not None for task in tasks)
    return (
        [0] * len(tasks),
        [entrypoint(task.queue, task.eta - task.created) for task in tasks],
        [task.token for task in tasks],
        # A span, which the database adds to its own clock: producers' clocks need not agree with it.
        [ago(task.eta - task.created) for task in tasks],
        [task.id for task in tasks],
        [write_hints(task) for task in tasks],
        [task.name for task in tasks] if named else None,
        [float(task.created) for task in tasks] if named else None,  # drivers take no array of two types
        [task.unique_key for task in tasks] if unique else None,
        [None if task.blob is None else task.blob.id for task in tasks] if oversize else None,
        [None if task.blob is None else task.blob.data for task in tasks] if oversize else None,
        blob_limit,
        [task.queue for task in tasks],
    )


# --- Lease ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Look:
    """What ``look`` found."""

    queues: list[str]
    fallen_due: list[str]
    """Entrypoints of jobs that were put aside, some of which are due."""
    lost: dict[int, float]
    """Jobs whose lease has run out, or nearly: when they were leased."""
    controlled: bool
    now: float
    """By the clock of the database."""


async def look(connection: Connection, *, seconds: float) -> Look:
    """Return which queues have jobs, and what was lost."""
    (row,) = await connection.fetch(SQL["look"], ago(seconds))
    lost = dict(zip(row["stale"], row["leased"], strict=True))
    return Look(row["queues"], row["fallen_due"], lost, row["controlled"], row["now"])


async def lease(
    connection: Connection,
    statements: Statements,
    apart: Apart | None,
    *,
    owner: str,
    manager: UUID,
    limit: int,
    seconds: float,
    now: float,
    queues: Sequence[str] | None,
) -> list[Lease]:
    """Claim what is due, what was enqueued first before the others.

    What is more than one statement is done in a transaction, by ``apart`` if that is given.
    """
    seen = await look(connection, seconds=seconds)
    names = seen.queues if queues is None else [queue for queue in dict.fromkeys(queues) if queue in set(seen.queues)]
    if limit < 1 or not names:
        return []
    fallen_due = [aside for aside in seen.fallen_due if aside.partition("@")[0] in names]
    if fallen_due:
        await connection.execute(SQL["promote"], fallen_due, _PROMOTED_AT_ONCE)
    if seen.controlled:
        picking = partial(_dequeue_under_control, statements=statements, queues=names, limit=limit)
        picked = partial(picking, seconds=seconds, now=seen.now, manager=manager)
        jobs: Sequence[Mapping[str, Any]] = await _together(connection, apart, picked)
    else:
        free = dict.fromkeys(names, 0)
        jobs = await statements.dequeue(connection, free, limit=limit, seconds=seconds, manager=manager)
    tasks = {job["id"]: read_task(job) for job in jobs}
    # Only what was retried or lost has a row there.
    again = [job["id"] for job in jobs if job["attempts"] or job["id"] in seen.lost]
    progress = await _progress(connection, again) if again else {}
    lost = {job_id: seen.lost[job_id] for job_id in again if job_id in seen.lost}
    if lost:
        charging = partial(_after_lost_lease, tasks=tasks, lost=lost, progress=progress, now=now)
        progress |= await _together(connection, apart, charging)
    leases = []
    jobs, until = sorted(jobs, key=_number), now + seconds
    for job, name in zip(jobs, write_holds(owner, manager.hex, jobs, leased=now), strict=True):
        task, counters = tasks[job["id"]], progress.get(job["id"])
        leases.append(Lease(task, name, until) if counters is None else counters.leased(task, owner=name, until=until))
    return leases


def _number(job: Mapping[str, Any]) -> int:
    return int(job["id"])


async def _progress(connection: Connection, jobs: Sequence[int]) -> dict[int, Progress]:
    return {row["job_id"]: Progress(**row) for row in await connection.fetch(SQL["progress"], jobs)}


async def _after_lost_lease(
    connection: Connection,
    tasks: Mapping[int, QueuedTask],
    lost: Mapping[int, float],
    progress: Mapping[int, Progress],
    *,
    now: float,
) -> dict[int, Progress]:
    """Count the deliveries that nobody settled, and charge those whose run had begun."""
    named = keys(tasks[job_id] for job_id in lost)
    entries = {(row["audience"], row["task_id"]): row for row in await connection.fetch(SQL["ledger_find"], named)}
    after, records = {}, []
    for job_id, leased in lost.items():
        task = tasks[job_id]
        before = progress.get(job_id) or Progress(job_id=job_id)
        counted = replace(before, deliveries=before.deliveries + 1, retry_reason=LOST_LEASE, previous_response=None)
        entry = entries.get((task.audience, task.id))
        if entry is not None and entry["uncharged"]:
            first = leased if before.first_attempt is None else before.first_attempt
            counted = replace(counted, attempts=before.attempts + 1, first_attempt=first)
            if entry["state"] == "running":  # a run that ended has left a record of its own
                records.append(_lost_record(task, leased, now))
        after[job_id] = counted
    await connection.execute(SQL["ledger_charged"], named)
    await connection.execute(SQL["progress_set"], to_json([asdict(row) for row in after.values()]))
    await add_records(connection, records)
    return after


def _lost_record(task: QueuedTask, started: float, ended: float) -> AttemptRecord:
    return AttemptRecord(
        task_id=task.id,
        audience=task.audience,
        started=started,
        ended=ended,
        outcome="retry",
        status=None,
        reason=LOST_LEASE,
    )


# --- Holding queues back --------------------------------------------------------------------------


async def controls(connection: Connection, *, lock: bool = False) -> dict[str, QueueControl]:
    """Return all controls by queue, sorted; ``lock`` keeps them from others until the transaction ends."""
    found = {}
    for row in await connection.fetch(SQL["controls_lock" if lock else "controls"]):
        limits = QueueLimits(
            queue=row["queue"],
            rate=row["rate"],
            bucket_size=row["bucket_size"],
            max_concurrent=row["max_concurrent"],
        )
        found[row["queue"]] = QueueControl(
            limits=limits,
            paused=row["paused"],
            held_until=row["held_until"],
            tokens=row["tokens"],
            refilled=row["refilled"],
        )
    return found


async def put_control(connection: Connection, control: QueueControl, *, now: float) -> None:
    """Store a control, or forget one that holds nothing back."""
    if not control.binds(now):
        await connection.execute(SQL["control_delete"], control.queue)
        return
    limits = control.limits
    await connection.execute(
        SQL["control_set"],
        control.queue,
        limits.rate,
        limits.bucket_size,
        limits.max_concurrent,
        control.paused,
        control.held_until,
        control.tokens,
        control.refilled,
    )


async def clock(connection: Connection) -> float:
    """Return the time of the database."""
    (row,) = await connection.fetch(SQL["clock"])
    return float(row["now"])


async def configure(connection: Connection, limits: Sequence[QueueLimits]) -> None:
    """Put the declared limits in force; the other queues keep a pause or a hold at most."""
    now = await clock(connection)
    known = await controls(connection, lock=True)
    declared = {item.queue: item for item in limits}
    for queue, item in declared.items():
        control = known.get(queue)
        changed = QueueControl.new(item, now=now) if control is None else control.configured(item, now=now)
        if changed is not control:
            await put_control(connection, changed, now=now)
    for queue in known.keys() - declared.keys():
        await put_control(connection, known[queue].configured(QueueLimits(queue=queue), now=now), now=now)


async def change_control(
    connection: Connection, queue: str, *, paused: bool | None = None, hold_for: float | None = None
) -> None:
    """Pause or resume a queue, or hold it for some seconds, or longer if it is held already."""
    now = await clock(connection)
    control = (await controls(connection, lock=True)).get(queue) or QueueControl.new(QueueLimits(queue=queue), now=now)
    if paused is not None:
        control = replace(control, paused=paused)
    if hold_for is not None:
        control = replace(control, held_until=max(now + hold_for, control.held_until))
    await put_control(connection, control, now=now)


async def _dequeue_under_control(
    connection: Connection,
    statements: Statements,
    queues: Sequence[str],
    *,
    limit: int,
    seconds: float,
    now: float,
    manager: UUID,
) -> list[Mapping[str, Any]]:
    """Pick what is due and may be leased now, and take the tokens for it. The cap on concurrency is pgqueuer's."""
    known = await controls(connection, lock=True)
    found: list[Mapping[str, Any]] = []
    others: dict[str, int] = {}
    for queue in queues:
        control = known.get(queue)
        if control is None:
            others[queue] = 0
            continue
        filled = control.refill(now)
        # Who runs is counted, and the cap kept, by the statement that picks.
        allowed = filled.allowance(now=now, running=-limit)
        if control.refilled > now and control.limits.rate is not None:
            await put_control(connection, filled, now=now)  # the clock was set back: from here the bucket gains again
        cap = control.limits.max_concurrent or 0
        if allowed == 0 or control.limits.max_concurrent == 0:
            continue
        if control.limits.rate is None:
            others[queue] = cap
            continue
        most = min(limit - len(found), limit if allowed is None else allowed)
        if most > 0:
            jobs = await statements.dequeue(connection, {queue: cap}, limit=most, seconds=seconds, manager=manager)
            found += jobs
            if jobs:
                await put_control(connection, filled.spend(len(jobs)), now=now)
    if others and limit > len(found):
        found += await statements.dequeue(
            connection, others, limit=limit - len(found), seconds=seconds, manager=manager
        )
    return found


async def next_due(connection: Connection, *, seconds: float, now: float, queues: Sequence[str] | None) -> float | None:
    """When the next task or lease falls due, or its queue lets it, by the clock that says ``now``."""
    if queues is None:
        queues = [row["queue"] for row in await connection.fetch(SQL["queues_with_jobs"])]
    rows = await connection.fetch(SQL["next_due"], list(dict.fromkeys(queues)), ago(seconds))
    due = {row["queue"]: row["due"] for row in rows if row["due"] is not None}
    if not due:
        return None
    here = await clock(connection)
    known = {queue: control for queue, control in (await controls(connection)).items() if queue in due}
    counts = await connection.fetch(SQL["running"], list(known)) if known else ()
    running = {row["queue"]: row["running"] for row in counts}
    for queue, control in known.items():
        if control.binds(here):
            due[queue] = control.refill(here).opens(due[queue], now=here, running=running.get(queue, 0))
    return float(min(due.values())) - here + now


# --- Settle ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class End:
    """A task that ends now."""

    task: QueuedTask
    job_id: int
    state: EndState
    reason: str | None
    attempts: int
    known: str | None
    """The state of the ledger's entry, if there is one."""
    has_progress: bool


async def settle(
    connection: Connection,
    statements: Statements,
    apart: Apart | None,
    settlements: Sequence[tuple[Lease, Settlement]],
    *,
    now: float,
    tombstone_seconds: float,
) -> list[bool]:
    """Apply what a dispatcher says of deliveries, in one transaction; False, and nothing, for tasks that are not its own now.

    What is more than one statement is done in a transaction, by ``apart`` if that is given.
    """
    plain = [index for index, (lease, settlement) in enumerate(settlements) if _is_plain(lease, settlement)]
    if len({lease.owner for lease, _ in settlements}) != len(settlements):
        plain = []  # told twice: the first counts
    if plain and len(plain) == len(settlements):
        ended = await _settle_plain(connection, settlements, now=now)
        if ended is not None:
            return ended
        plain = []
    mixed = partial(_settle_mixed, statements=statements, settlements=settlements, plain=plain)
    return await _together(connection, apart, partial(mixed, now=now, tombstone_seconds=tombstone_seconds))


async def _settle_mixed(
    connection: Connection,
    *,
    statements: Statements,
    settlements: Sequence[tuple[Lease, Settlement]],
    plain: Sequence[int],
    now: float,
    tombstone_seconds: float,
) -> list[bool]:
    """Settle tasks of which some, ``plain``, may end together."""
    results, ended = [False] * len(settlements), None
    if plain:
        holds = (Hold.read(lease.owner) for lease, _ in settlements)
        await connection.fetch(SQL["lock_jobs"], [hold.job for hold in holds if hold is not None])
        ended = await _settle_plain(connection, [settlements[index] for index in plain], now=now)
    together = () if ended is None else plain
    others = sorted({*range(len(settlements))}.difference(together))
    kept = await _settle_each(
        connection, statements, [settlements[index] for index in others], now=now, tombstone_seconds=tombstone_seconds
    )
    for index, ours in (*zip(together, ended or (), strict=True), *zip(others, kept, strict=True)):
        results[index] = ours
    return results


async def _settle_plain(
    connection: Connection, settlements: Sequence[tuple[Lease, Settlement]], *, now: float
) -> list[bool] | None:
    """End tasks that succeeded at once, in one statement; None, and nothing, if one of them is not what it seems."""
    held: dict[int, tuple[int, QueuedTask]] = {}
    managers = set()
    for lease, _ in settlements:
        hold = Hold.read(lease.owner)
        if hold is None:
            return None
        held[hold.job] = hold.updated, lease.task
        managers.add(hold.manager)
    if len(held) != len(settlements) or len(managers) != 1:
        return None
    jobs = sorted(held)  # in one order, so that two batches do not wait for each other
    rows = await connection.execute(
        SQL["done"],
        *joined(
            [str(job) for job in jobs],
            [str(held[job][0]) for job in jobs],
            [held[job][1].audience for job in jobs],
            [held[job][1].id for job in jobs],
        ),
        managers.pop(),
        now,
    )
    if changed(rows) in {0, len(jobs)}:
        return [True] * len(jobs) if changed(rows) else None
    # Somebody took over a lease, or ended a task, just then.
    ids = [task.id for _, task in held.values()]
    ours = {row["id"] for row in await connection.fetch(SQL["done_now"], ids, now)}
    return [task_id in ours for task_id in ids]


def _is_plain(lease: Lease, settlement: Settlement) -> bool:
    """Whether a task ends by its first delivery, and leaves nothing to be forgotten but its job."""
    task = lease.task
    return (
        settlement.verdict is Verdict.DONE
        and settlement.charged
        and settlement.reason is None
        and settlement.record is None
        and lease.retries == 0
        and task.name is None
        and task.unique_key is None
        and task.blob_id is None
    )


async def _settle_each(
    connection: Connection,
    statements: Statements,
    settlements: Sequence[tuple[Lease, Settlement]],
    *,
    now: float,
    tombstone_seconds: float,
) -> list[bool]:
    holds = [Hold.read(lease.owner) for lease, _ in settlements]
    asked = {
        hold.job: {
            "id": hold.job,
            "manager": hold.manager,
            "updated": hold.updated,
            "audience": lease.task.audience,
            "task_id": lease.task.id,
        }
        for hold, (lease, _) in zip(holds, settlements, strict=True)
        if hold is not None
    }
    found = await connection.fetch(SQL["held"], to_json(list(asked.values())))
    held = {row["id"]: {"known": row["state"], "uncharged": row["uncharged"]} for row in found}
    results, ends, retries, over, records = [], [], [], [], []
    for hold, (lease, settlement) in zip(holds, settlements, strict=True):
        ours = hold is not None and hold.job in held and asked[hold.job]["updated"] == hold.updated
        results.append(ours)
        if not ours or hold is None:
            continue
        if settlement.record is not None:
            records.append(settlement.record)
        if settlement.verdict is Verdict.RETRY:
            retries.append((hold, lease, settlement))
            # A run that another delivery began, and that goes on, is not charged yet.
            if settlement.charged or held[hold.job]["known"] == EndState.RETRY:
                over.append(lease.task)
        else:
            ends.append(_end(hold, lease, settlement, **held[hold.job]))
        del held[hold.job]
    await add_records(connection, records)
    if retries:
        await _retry(connection, statements, retries, now=now)
        if over:
            await connection.execute(SQL["ledger_charged"], keys(over))
    if ends:
        await end(connection, statements, ends, now=now, tombstone_seconds=tombstone_seconds)
    return results


def _end(hold: Hold, lease: Lease, settlement: Settlement, *, known: str | None, uncharged: bool | None) -> End:
    state = EndState.SUCCEEDED if settlement.verdict is Verdict.DONE else EndState.FAILED
    charged = settlement.charged
    # The ledger has the last word: it knows how the run ended, also when the dispatcher that saw it
    # died, and the next one got no more than "duplicate".
    if known is not None and known in _ENDED:
        state = EndState(known)
        # What is not uncharged was charged when its lease ran out, and this delivery found it ended.
        charged = charged and bool(uncharged)
    attempts = lease.attempts + charged
    return End(lease.task, hold.job, state, settlement.reason, attempts, known, has_progress=lease.retries > 0)


async def _retry(
    connection: Connection,
    statements: Statements,
    retries: Sequence[tuple[Hold, Lease, Settlement]],
    *,
    now: float,
) -> None:
    delays = [
        (hold.job, ago(max((now if settlement.at is None else settlement.at) - now, 0.0)), None)
        for hold, _, settlement in retries
    ]
    await connection.executemany(statements.retry, delays)
    aside = [job for job, delay, _ in delays if delay.total_seconds() > SOON]
    if aside:
        await connection.execute(SQL["put_aside"], aside)
    after = [Progress.after(lease, settlement, hold, now=now) for hold, lease, settlement in retries]
    await connection.execute(SQL["progress_set"], to_json([asdict(row) for row in after]))
    for _, lease, _ in retries:
        if lease.retries >= RECORDS_KEPT:
            await connection.execute(SQL["attempts_trim"], lease.task.id, RECORDS_KEPT)


async def end(
    connection: Connection, statements: Statements, ends: Sequence[End], *, now: float, tombstone_seconds: float
) -> None:
    """End tasks: history or dead letter, tombstone, ledger; their jobs and blobs go."""
    history: list[dict[str, object]] = [
        {
            "id": item.task.id,
            "queue": item.task.queue,
            "headers": write_hints(item.task._replace(headers={}, retry_options={}, unique_key=None)),
            "attempts": item.attempts,
            "state": str(item.state),
            "reason": item.reason,
        }
        for item in ends
        if item.state is not EndState.FAILED
    ]
    if history:
        await connection.execute(SQL["ended_insert"], to_json(history), now)
    for item in ends:
        if item.state is EndState.FAILED:
            values = dead_values(
                item.task,
                item.job_id,
                reason=item.reason,
                last_reason=item.known == EndState.FAILED and item.reason is None,
                attempts=item.attempts,
                now=now,
            )
            await connection.execute(SQL["dead_insert"], *values)
    # Dead letters stay with pgqueuer too, held; the others are deleted there.
    statuses = [_LOGGED[item.state] for item in ends]
    await connection.execute(statements.log, [item.job_id for item in ends], statuses, list(repeat(None, len(ends))))
    await _forget(connection, ends, now=now, tombstone_seconds=tombstone_seconds)
    unknown = [item for item in ends if item.known is None or item.known not in _ENDED]
    if unknown:
        entries = [
            {
                "audience": item.task.audience,
                "task_id": item.task.id,
                "digest": task_digest(item.task).hex(),
                "state": str(item.state),
                "expires": item.task.expires,
            }
            for item in unknown
        ]
        await connection.execute(SQL["ledger_end"], to_json(entries))


async def _forget(connection: Connection, ends: Sequence[End], *, now: float, tombstone_seconds: float) -> None:
    tasks = [item.task for item in ends]
    names = [(task.queue, task.name) for task in tasks if task.name is not None]
    if names:
        await connection.execute(
            SQL["names_bury"], [queue for queue, _ in names], [name for _, name in names], now + tombstone_seconds
        )
    unique = [task for task in tasks if task.unique_key is not None]
    if unique:
        values = [task.id for task in unique], [task.queue for task in unique], [task.unique_key for task in unique]
        await connection.execute(SQL["uniques_delete"], *values)
    blobs = [task.blob_id for task in tasks if task.blob_id is not None]
    if blobs:
        await connection.execute(SQL["blobs_drop"], blobs)
    counted = [item.job_id for item in ends if item.has_progress]
    if counted:
        await connection.execute(SQL["progress_delete"], counted)


async def cancel(
    connection: Connection,
    statements: Statements,
    task_ids: Sequence[str],
    *,
    now: float,
    seconds: float,
    tombstone_seconds: float,
) -> int:
    """End waiting tasks unrun; not those that by the ledger run now or have ended. Returns how many."""
    jobs = await connection.fetch(SQL["waiting_of"], task_ids, ago(seconds))
    tasks = {job["id"]: read_task(job) for job in jobs}
    found = await connection.fetch(SQL["ledger_find"], keys(tasks.values()))
    entries = {(row["audience"], row["task_id"]): row for row in found}
    progress = await _progress(connection, list(tasks))
    ends = []
    for job_id, task in tasks.items():
        entry = entries.get((task.audience, task.id))
        if entry is not None and (entry["state"] in _ENDED or (entry["state"] == "running" and entry["alive"])):
            continue
        attempts = progress[job_id].attempts if job_id in progress else 0
        known = None if entry is None else entry["state"]
        ends.append(End(task, job_id, EndState.CANCELLED, None, attempts, known, has_progress=job_id in progress))
    if ends:
        await end(connection, statements, ends, now=now, tombstone_seconds=tombstone_seconds)
    return len(ends)


async def drop_dead(connection: Connection, statements: Statements, task_ids: Sequence[str]) -> int:
    """Delete dead letters, and the jobs that pgqueuer holds of them; their records go with time."""
    dropped = await connection.fetch(SQL["dead_delete"], list(task_ids))
    if dropped:
        await connection.execute(SQL["attempts_become_stray"], [row["id"] for row in dropped])
        jobs = [row["job_id"] for row in dropped]
        await connection.execute(statements.log, jobs, ["deleted"] * len(jobs), [None] * len(jobs))
    return len(dropped)


async def execute(connection: Connection, *, statement: str, values: Sequence[object]) -> None:
    """Run one statement."""
    await connection.execute(statement, *values)


# --- Records --------------------------------------------------------------------------------------


async def add_records(connection: Connection, records: Sequence[AttemptRecord]) -> None:
    """Store records of attempts."""
    if records:
        await connection.execute(SQL["attempts_insert"], to_json([record_values(record) for record in records]))


async def prune(
    connection: Connection,
    *,
    now: float,
    history_seconds: float,
    dead_seconds: float,
    dead_limit: int,
    leeway: float,
    limit: int,
) -> int:
    """Forget tombstones, history, stray records and ledger entries by age, up to ``limit`` of each; archive dead letters."""
    before = now - history_seconds
    removed = 0
    for name, values in (
        ("names_prune", (now, limit)),
        ("ended_prune", (before, limit)),
        ("attempts_prune", (before, limit)),
        ("dead_archive_old", (now, now - dead_seconds, limit)),
        ("dead_archive_excess", (now, dead_limit, limit)),
        ("ledger_prune", (now - leeway, limit)),
    ):
        removed += len(await connection.fetch(SQL[name], *values))
    return removed
