"""The dispatcher: leases due tasks, delivers them, settles what came of it.

It believes nothing but the handler's answer, and decodes nothing: a token goes from the queue to the
handler as the bytes that it is. Delivery is in process or by HTTP POST; either way it ends in
``Delivery.handle``, which verifies.

An attempt is charged only when the handler took the request: one that is down, busy or running the
task already charges none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol, Self, TypeVar

import aiohttp

from safedefer.claims import TaskRetryOptions
from safedefer.delivery import OUTCOME_HEADER, QUEUE_HEADER, RETRY_HEADER, Response
from safedefer.errors import InvalidTaskRetryOptionsError, LeaseLost, QueueError
from safedefer.ledger import AttemptRecord
from safedefer.queues.base import Lease, PullQueue, QueuedTask, Settlement, Verdict

_T = TypeVar("_T")
_log: Final = logging.getLogger("safedefer.dispatcher")

#: Defaults of App Engine's retry parameters.
MIN_BACKOFF: Final = 0.1
MAX_BACKOFF: Final = 3_600.0
MAX_DOUBLINGS: Final = 16
#: Rejections (a bad deploy, a wrong key) after which a task is given up, if they span ``REJECT_SECONDS``.
REJECT_LIMIT: Final = 10
REJECT_SECONDS: Final = 3_600.0

_CONTENT_TYPE: Final = "application/jose"


class Unreachable(Exception):
    """No connection to the handler could be made; nothing was sent."""


class Interrupted(Exception):
    """The request was sent and no answer came: the handler may have run the task."""


class Deliver(Protocol):
    """How one request gets to a handler."""

    async def __call__(self, task: QueuedTask, headers: Mapping[str, str]) -> Response:
        """POST the task's token. Raises ``Unreachable`` or ``Interrupted``."""
        ...


def backoff(options: TaskRetryOptions, n: int, *, jitter: float = 0.0) -> float:
    """Seconds to wait before retry ``n``, counted from 1 (App Engine task queue backoff).

    The interval doubles ``max_doublings`` times and then grows linearly, up to the maximum.

    Args:
        options: The task's or queue's own values.
        n: Which retry.
        jitter: From 0 to 1: the part of the interval that is taken off.
    """
    low = MIN_BACKOFF if options.min_backoff_seconds is None else options.min_backoff_seconds
    high = MAX_BACKOFF if options.max_backoff_seconds is None else options.max_backoff_seconds
    doublings = MAX_DOUBLINGS if options.max_doublings is None else options.max_doublings
    exponent = min(n - 1, doublings)
    # 2**63 times the least float is over any maximum; larger powers would only overflow.
    interval = min(max(high, low), low * 2.0 ** min(exponent, 63) * max(n - exponent, 1))
    return interval * (1 - jitter)


def gives_up(options: TaskRetryOptions, *, attempts: int, age: float) -> str | None:
    """Say whether a failed task is tried no more, and why: a slug, or None.

    With a limit of retries and one of age, it is given up when both are exceeded (App Engine).
    """
    retries_over = options.task_retry_limit is not None and attempts > options.task_retry_limit
    age_over = options.task_age_limit is not None and age > options.task_age_limit
    if options.task_retry_limit is not None and options.task_age_limit is not None:
        return "retry-and-age-limit" if retries_over and age_over else None
    return "retry-limit" if retries_over else "age-limit" if age_over else None


def attempt_headers(lease: Lease) -> dict[str, str]:
    """Return the headers of one delivery (App Engine's, with the task's own)."""
    task = lease.task
    headers = {
        **task.headers,
        "Content-Type": _CONTENT_TYPE,
        QUEUE_HEADER: task.queue,
        "X-AppEngine-TaskName": task.name or task.id,
        RETRY_HEADER: str(lease.retries),
        "X-AppEngine-TaskExecutionCount": str(lease.executions),
        "X-AppEngine-TaskETA": f"{task.eta:.6f}",
    }
    if lease.previous_response is not None:
        headers["X-AppEngine-TaskPreviousResponse"] = str(lease.previous_response)
    if lease.retry_reason is not None:
        headers["X-AppEngine-TaskRetryReason"] = lease.retry_reason
    return headers


def judge(lease: Lease, response: Response, *, now: float, jitter: float) -> Settlement:
    """Turn a handler's answer into what becomes of the task."""
    status = response.status
    outcome = response.headers.get(OUTCOME_HEADER, "")
    if 200 <= status <= 299:  # noqa: PLR2004  # the range of success
        if outcome == "failed":
            return Settlement(verdict=Verdict.DEAD, status=status, executed=True, reason=None)
        return Settlement(verdict=Verdict.DONE, status=status, executed=True)
    if outcome in {"early", "busy", "running"}:
        wait = _seconds(response.headers.get("Retry-After")) * (1 + jitter)
        return Settlement(verdict=Verdict.RETRY, at=now + wait, charged=False, status=status, reason=outcome)
    if outcome in {"rejected", "refused"}:
        return _judge_rejection(lease, status, outcome, now=now, jitter=jitter)
    return _judge_failure(lease, status, now=now, jitter=jitter)


def _judge_rejection(lease: Lease, status: int | None, outcome: str, *, now: float, jitter: float) -> Settlement:
    count = lease.rejections + 1
    since = now if lease.first_rejection is None else lease.first_rejection
    if count >= REJECT_LIMIT and now - since >= REJECT_SECONDS:
        return Settlement(
            verdict=Verdict.DEAD,
            charged=False,
            rejected=True,
            status=status,
            reason=outcome,
            record=_record(lease, outcome, status, now),
        )
    wait = backoff(_options(lease), count, jitter=jitter / 2)
    return Settlement(
        verdict=Verdict.RETRY,
        at=now + wait,
        charged=False,
        rejected=True,
        status=status,
        reason=outcome,
        record=_record(lease, outcome, status, now) if outcome == "refused" else None,
    )


def _judge_failure(lease: Lease, status: int | None, *, now: float, jitter: float) -> Settlement:
    options = _options(lease)
    attempts = lease.attempts + 1
    record = _record(lease, "no-response", None, now) if status is None else None
    executed = status is not None and status < 500  # noqa: PLR2004  # as App Engine counts
    given_up = gives_up(options, attempts=attempts, age=now - lease.task.eta)
    reason = "no-response" if status is None else "retry"
    if given_up is not None:
        return Settlement(verdict=Verdict.DEAD, executed=executed, status=status, reason=given_up, record=record)
    wait = backoff(options, attempts, jitter=jitter / 2)
    return Settlement(
        verdict=Verdict.RETRY, at=now + wait, executed=executed, status=status, reason=reason, record=record
    )


def _options(lease: Lease) -> TaskRetryOptions:
    try:
        return TaskRetryOptions.from_given(lease.task.retry_options)
    except InvalidTaskRetryOptionsError:  # a hint in the storage, which nobody signed: defaults will do
        return TaskRetryOptions()


def _record(lease: Lease, outcome: str, status: int | None, now: float) -> AttemptRecord:
    """Return the record of an attempt that the handler could not write."""
    task = lease.task
    return AttemptRecord(
        task_id=task.id, audience=task.audience, started=now, ended=now, outcome=outcome, status=status, reason=outcome
    )


def _seconds(text: str | None) -> float:
    """Read ``Retry-After`` in seconds; 1 if it is absent, a date, or beyond an hour."""
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 9:  # noqa: PLR2004  # a billion
        return 1.0
    return float(min(max(int(text), 1), 3_600))


class HttpDelivery:
    """Delivers by HTTP POST, to the address of the task's target and to no other. Follows no redirect.

    Args:
        address: Where tasks without a configured target go: ``http://127.0.0.1:8080``, with a prefix if there is one.
        targets: Addresses by the names of targets.
        timeout: Seconds that a handler may take for one task (App Engine: ten minutes).
        concurrency: Connections at most.
    """

    def __init__(
        self, address: str, *, targets: Mapping[str, str] | None = None, timeout: float = 600.0, concurrency: int = 16
    ) -> None:
        self._address = address.rstrip("/")
        self._targets = {name: url.rstrip("/") for name, url in (targets or {}).items()}
        self._timeout = aiohttp.ClientTimeout(total=timeout, connect=10.0)
        self._concurrency = concurrency
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            timeout=self._timeout,
            connector=aiohttp.TCPConnector(limit=self._concurrency),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            skip_auto_headers={"Accept", "Accept-Encoding"},
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def __call__(self, task: QueuedTask, headers: Mapping[str, str]) -> Response:
        """POST one task. Raises ``Unreachable`` or ``Interrupted``."""
        if self._session is None:
            raise Unreachable("the delivery is not open; enter it with `async with`")
        address = self._targets.get(task.target, self._address)
        try:
            async with self._session.post(
                address + task.url, data=task.token, headers=headers, allow_redirects=False
            ) as response:
                # The body says nothing that the headers do not: it is not read, and cannot fill the memory.
                return Response(response.status, dict(response.headers), b"")
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL) as error:
            raise Unreachable(type(error).__name__) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Interrupted(type(error).__name__) from error


class InProcessDelivery:
    """Delivers to a handler in this process: the same function that HTTP requests end in."""

    def __init__(self, handle: Callable[..., Awaitable[Response]]) -> None:
        self._handle = handle

    async def __call__(self, task: QueuedTask, headers: Mapping[str, str]) -> Response:
        """Hand one task to the handler."""
        return await self._handle(headers, task.token, path=task.url)


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatcherOptions:
    """How a dispatcher works."""

    concurrency: int = 16
    """Deliveries at once."""
    lease_seconds: float = 60.0
    """How long a silent dispatcher keeps a task; a live one prolongs it."""
    drain_seconds: float = 30.0
    """How long a stop waits for what is being delivered."""
    queues: Sequence[str] | None = None
    """The queues to empty; None is all."""
    poll_seconds: float = 5.0
    """The longest sleep between two looks at the queue."""


@dataclass(slots=True)
class _State:
    """What is under way."""

    leases: dict[str, Lease] = field(default_factory=dict)
    deliveries: set[asyncio.Task[None]] = field(default_factory=set)
    settlements: list[tuple[Lease, Settlement]] = field(default_factory=list)
    unreachable: int = 0
    """Deliveries in a row that reached no handler."""
    pause_until: float = 0.0


class Dispatcher:
    """Empties a queue.

    Args:
        queue: The queue.
        deliver: How a task gets to a handler.
        clock: Seconds since the epoch.
        options: How it works.
        rng: Where jitter comes from.
    """

    def __init__(
        self,
        queue: PullQueue,
        deliver: Deliver,
        *,
        clock: Callable[[], float],
        options: DispatcherOptions | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._queue = queue
        self._deliver = deliver
        self._clock = clock
        self._options = options or DispatcherOptions()
        self._random = rng or random.SystemRandom()
        self._owner = secrets.token_hex(8)
        self._state = _State()
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._settle_now = asyncio.Event()
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="safedefer-dispatcher")

    def stop(self) -> None:
        """Lease nothing more, finish what is being delivered, then return from ``run``."""
        self._stopping.set()
        self._changed.set()
        self._queue.wake()

    async def run(self) -> None:
        """Work until ``stop``. Storage that fails is tried again; nothing else ends it."""
        helpers = [asyncio.create_task(self._settle_loop()), asyncio.create_task(self._extend_loop())]
        try:
            while not self._stopping.is_set():
                try:
                    if not await self._turn():
                        await self._rest()
                except QueueError as error:
                    _log.error("the queue is unavailable (%s); trying again", error.slug)
                    await self._sleep(1.0)
            await self._drain()
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
            await self._settle()
            self._threads.shutdown(wait=False)

    async def run_until_empty(self) -> None:
        """Work until no task is due or being delivered: for tests and scripts. Later tasks stay."""
        watcher = asyncio.create_task(self._stop_when_empty())
        try:
            await self.run()
        finally:
            watcher.cancel()

    async def _stop_when_empty(self) -> None:
        while True:
            await asyncio.sleep(0.01)
            if self._state.deliveries or self._state.settlements or self._state.leases:
                continue
            due = await self._in_thread(partial(self._queue.next_due, now=self._clock(), queues=self._options.queues))
            if (due is None or due > self._clock()) and not self._state.deliveries and not self._state.leases:
                self.stop()
                return

    # --- Leasing ---

    async def _turn(self) -> bool:
        """Lease and start what fits; whether anything was leased."""
        free = self._options.concurrency - len(self._state.deliveries)
        if free <= 0 or self._clock() < self._state.pause_until:
            return False
        leases = await self._in_thread(
            partial(
                self._queue.lease,
                owner=self._owner,
                limit=free,
                seconds=self._options.lease_seconds,
                now=self._clock(),
                queues=self._options.queues,
            )
        )
        for lease in leases:
            self._state.leases[lease.owner] = lease
            delivery = asyncio.create_task(self._deliver_one(lease))
            self._state.deliveries.add(delivery)
            delivery.add_done_callback(self._delivered)
        return bool(leases)

    def _delivered(self, delivery: asyncio.Task[None]) -> None:
        self._state.deliveries.discard(delivery)
        self._changed.set()
        if not delivery.cancelled() and (error := delivery.exception()) is not None:
            _log.error("a delivery failed unexpectedly", exc_info=error)

    async def _rest(self) -> None:
        """Sleep until a place is free, a task falls due, or one is enqueued by whatever process."""
        self._changed.clear()
        now = self._clock()
        if now < self._state.pause_until:
            await self._sleep(self._state.pause_until - now)
            return
        if len(self._state.deliveries) >= self._options.concurrency:
            await self._sleep(self._options.poll_seconds)
            return
        due = await self._in_thread(partial(self._queue.next_due, now=now, queues=self._options.queues))
        timeout = self._options.poll_seconds if due is None else min(max(due - now, 0.0), self._options.poll_seconds)
        if timeout > 0:
            await self._in_thread(partial(self._queue.wait, timeout))

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

    # --- Delivering ---

    async def _deliver_one(self, lease: Lease) -> None:
        state, jitter = self._state, self._random.random()
        try:
            response = await self._deliver(lease.task, attempt_headers(lease))
            settlement = judge(lease, response, now=self._clock(), jitter=jitter)
            state.unreachable = 0
        except Unreachable:
            state.unreachable += 1
            # A handler that is down is asked again soon, and the queue keeps its order meanwhile.
            pause = min(0.1 * 2 ** min(state.unreachable, 6), 5.0) * (1 - jitter / 2)
            state.pause_until = max(state.pause_until, self._clock() + pause)
            settlement = Settlement(
                verdict=Verdict.RETRY, at=self._clock() + pause, charged=False, reason="unreachable"
            )
        except Interrupted:
            settlement = _judge_failure(lease, None, now=self._clock(), jitter=jitter)
        except asyncio.CancelledError:
            # The drain is over. The lease runs out by itself, and the ledger knows whether it ran.
            state.leases.pop(lease.owner, None)
            raise
        except Exception:  # noqa: BLE001  # see below
            # A row that somebody wrote into the storage, say: it counts as refused, and its neighbours go on.
            _log.exception("task %s cannot be delivered", lease.task.id)
            settlement = _judge_rejection(lease, None, "refused", now=self._clock(), jitter=jitter)
        state.settlements.append((lease, settlement))
        self._settle_now.set()

    # --- Settling: one transaction for all that ended meanwhile ---

    async def _settle_loop(self) -> None:
        while True:
            await self._settle_now.wait()
            self._settle_now.clear()
            await self._settle()

    async def _settle(self) -> None:
        while self._state.settlements:
            batch, self._state.settlements = self._state.settlements, []
            newest = [(self._state.leases.get(lease.owner, lease), settlement) for lease, settlement in batch]
            try:
                kept = await self._in_thread(partial(self._queue.settle_many, newest, now=self._clock()))
            except QueueError as error:
                _log.error("settling failed (%s); trying again", error.slug)
                self._state.settlements = batch + self._state.settlements
                await asyncio.sleep(0.5)
                continue
            for (lease, _), ours in zip(batch, kept, strict=True):
                self._state.leases.pop(lease.owner, None)
                if not ours:
                    _log.warning("task %s was delivered elsewhere meanwhile", lease.task.id)
            self._changed.set()
            if any(settlement.verdict is Verdict.RETRY for _, settlement in batch):
                self._queue.wake()  # a retry may fall due before what is waited for

    async def _extend_loop(self) -> None:
        while True:
            await asyncio.sleep(self._options.lease_seconds / 3)
            for owner, lease in list(self._state.leases.items()):
                try:
                    extended = await self._in_thread(
                        partial(self._queue.extend, lease, seconds=self._options.lease_seconds, now=self._clock())
                    )
                except LeaseLost:
                    continue  # its settlement will say so
                except QueueError as error:
                    _log.error("leases cannot be prolonged (%s)", error.slug)
                    break
                if owner in self._state.leases:
                    self._state.leases[owner] = extended

    # --- The end ---

    async def _drain(self) -> None:
        deliveries = set(self._state.deliveries)
        if deliveries:
            _, unfinished = await asyncio.wait(deliveries, timeout=self._options.drain_seconds)
            for delivery in unfinished:
                delivery.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    async def _in_thread(self, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)
