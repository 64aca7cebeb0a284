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
import re
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Protocol, Self, TypeVar

import aiohttp
from yarl import URL

from safedefer.claims import Options, TaskRetryOptions
from safedefer.delivery import OUTCOME_HEADER, QUEUE_HEADER, RETRY_HEADER, Response
from safedefer.errors import Error, InvalidTaskError, InvalidTaskRetryOptionsError, LeaseLost, QueueError
from safedefer.ledger import AttemptRecord
from safedefer.queues.base import Lease, PullQueue, QueuedTask, Settlement, Verdict
from safedefer.queues.rates import MAX_HOLD, QueueLimits

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
_OUTCOME: Final = OUTCOME_HEADER.lower()
#: The longest that a handler can put off a task, in seconds: its clock may be wrong, and be corrected.
_MAX_PUT_OFF: Final = 60.0
#: The first hold of a queue whose handler is at capacity; it doubles with each such answer in a row.
_BUSY_SECONDS: Final = 0.02
#: How far ahead of free places tasks are leased, in seconds of the work that was done of late.
_AHEAD_SECONDS: Final = 0.02
#: Tasks for a place that is down are put off one after the other, by so many seconds each, up to a minute.
_SPREAD_SECONDS: Final = 0.01
_MAX_SPREAD: Final = 60.0


class Unreachable(Exception):
    """No connection to the handler could be made; nothing was sent.

    ``place`` is where it was looked for, and ``everywhere`` whether all tasks go there.
    """

    def __init__(self, message: str = "", *, place: str = "", everywhere: bool = True) -> None:
        super().__init__(message)
        self.place = place
        self.everywhere = everywhere


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
    """Return the headers of one delivery (App Engine's, with the task's own).

    Raises:
        InvalidTaskError: The storage says something that no ``defer()`` wrote, and that would make another
            request of this one.
    """
    task = lease.task
    _check_hints(task)
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
    if lease.retry_reason is not None and _SLUG.fullmatch(lease.retry_reason):
        headers["X-AppEngine-TaskRetryReason"] = lease.retry_reason
    return headers


_SLUG: Final = re.compile("[a-z0-9-]{1,100}")
_TRACE: Final = re.compile("[0-9a-f-]{1,100}")
_TRACE_HEADER: Final = "traceparent"


def _check_hints(task: QueuedTask) -> None:
    headers = dict(task.headers)
    trace = headers.pop(_TRACE_HEADER, None)  # written by defer() itself, and not by its caller
    if trace is not None and _TRACE.fullmatch(trace) is None:
        raise InvalidTaskError("the stored trace is not one; defer the task anew")
    Options(name=task.name or task.id, queue=task.queue, target=task.target, url=str(task.url), headers=headers)


def _headers(response: Response) -> dict[str, str]:
    # Proxies write the names of headers as they like.
    return {name.lower(): value for name, value in response.headers.items()}


def asks_to_wait(response: Response) -> float | None:
    """Return the seconds for which an answer asks to send nothing more; None if it does not.

    That is 429 or 503 with ``Retry-After``, of our handler or of whatever stands before it. A task that came
    too early says nothing of its queue.
    """
    headers = _headers(response)
    if response.status not in {429, 503} or "retry-after" not in headers or headers.get(_OUTCOME) == "early":
        return None
    return min(_seconds(headers["retry-after"]), MAX_HOLD)


def judge(lease: Lease, response: Response, *, now: float, jitter: float) -> Settlement:
    """Turn a handler's answer into what becomes of the task."""
    status = response.status
    headers = _headers(response)
    outcome = headers.get(_OUTCOME, "")
    if 200 <= status <= 299:  # noqa: PLR2004  # the range of success
        if outcome == "failed":
            return Settlement(verdict=Verdict.DEAD, status=status, executed=True, reason=None)
        # Any 2xx is success, as on App Engine: a handler of the user's own may call run() and say no more.
        return Settlement(verdict=Verdict.DONE, status=status, executed=True)
    if outcome in {"early", "busy", "running"}:
        wait = min(_seconds(headers.get("retry-after")), _MAX_PUT_OFF) * (1 + jitter)
        return Settlement(verdict=Verdict.RETRY, at=now + wait, charged=False, status=status, reason=outcome)
    if outcome in {"rejected", "refused"}:
        return _judge_rejection(lease, status, outcome, now=now, jitter=jitter)
    if not outcome and (asked := asks_to_wait(response)) is not None:  # whoever it is has not taken the request
        at = now + asked * (1 + jitter)
        return Settlement(verdict=Verdict.RETRY, at=at, charged=False, status=status, reason="busy")
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
            record=_record(lease, outcome, status, now) if outcome == "refused" else None,
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


def _judge_failure(lease: Lease, status: int | None, *, now: float, jitter: float, reason: str = "retry") -> Settlement:
    options = _options(lease)
    attempts = lease.attempts + 1
    reason = "no-response" if status is None else reason
    # The handler could not write these down itself.
    record = None if reason == "retry" else _record(lease, reason, status, now)
    executed = status is not None and status < 500  # noqa: PLR2004  # as App Engine counts
    given_up = gives_up(options, attempts=attempts, age=now - lease.task.eta)
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
        """POST one task. Raises ``Unreachable``, ``Interrupted``, or what aiohttp has against the request."""
        if self._session is None:
            raise Unreachable("the delivery is not open; enter it with `async with`")
        address = self.place(task)
        # As it was signed: a normalised path is another one, and the handler compares.
        url = URL(address + task.url, encoded=True)
        try:
            async with self._session.post(url, data=task.token, headers=headers, allow_redirects=False) as response:
                # The body says nothing that the headers do not: it is not read, and cannot fill the memory.
                return Response(response.status, dict(response.headers), b"")
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            only = all(target == self._address for target in self._targets.values())
            raise Unreachable(type(error).__name__, place=address, everywhere=only) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Interrupted(type(error).__name__) from error

    def place(self, task: QueuedTask) -> str:
        """Return the address that a task is sent to."""
        return self._targets.get(task.target, self._address)


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
    limits: Sequence[QueueLimits] | None = None
    """Put in force at the start, for every dispatcher of the queue; None leaves them as they are."""
    retry_options: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By queue: what counts where a task brings nothing of its own."""


@dataclass(slots=True)
class _Down:
    """A place where no handler was found."""

    failures: int = 0
    """Deliveries in a row that did not get there."""
    until: float = 0.0
    """When it is tried again."""
    everywhere: bool = False
    """Whether all tasks go there, so that nothing needs to be leased before ``until``."""
    probing: bool = False
    """Whether one delivery is trying; the others need not wait for a time-out with it."""
    put_off: int = 0


@dataclass(slots=True)
class _State:
    """What is under way."""

    leases: dict[str, Lease] = field(default_factory=dict)
    ready: deque[Lease] = field(default_factory=deque)
    """Leased ahead, and started when a place is free."""
    deliveries: set[asyncio.Task[None]] = field(default_factory=set)
    settlements: list[tuple[Lease, Settlement]] = field(default_factory=list)
    settling: bool = False
    leasing: bool = False
    dry: bool = False
    """Whether the last look at the queue found nothing."""
    configured: bool = False
    """Whether the limits are in force."""
    busy: dict[str, int] = field(default_factory=dict)
    """Answers in a row that asked a queue to wait."""
    ended: deque[float] = field(default_factory=deque)
    """When the last deliveries ended, as many as may run at once."""
    down: dict[str, _Down] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not (self.leases or self.ready or self.deliveries or self.settlements or self.settling or self.leasing)


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
        self._random = rng or random.Random()  # noqa: S311  # jitter; a secret source costs a system call
        self._owner = secrets.token_hex(8)
        self._capped = any(limits.max_concurrent is not None for limits in self._options.limits or ())
        self._state = _State(ended=deque(maxlen=self._options.concurrency))
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._settle_now = asyncio.Event()
        self._threads: ThreadPoolExecutor | None = None

    def stop(self) -> None:
        """Lease nothing more, finish what is being delivered, then return from ``run``."""
        self._stopping.set()
        self._changed.set()
        self._queue.wake()

    async def run(self) -> None:
        """Work until ``stop``. Storage that fails is tried again; nothing else ends it."""
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="safedefer-dispatcher")
        helpers = [asyncio.create_task(self._settle_loop()), asyncio.create_task(self._extend_loop())]
        try:
            while not self._stopping.is_set():
                try:
                    await self._configure()
                    if not await self._turn():
                        await self._rest()
                except Exception as error:  # noqa: BLE001  # the storage's, or of a row that somebody wrote into it
                    _log.error("the queue is unavailable (%s); trying again", _name(error))
                    await self._sleep(1.0)
            await self._drain()
        finally:
            await self._end(helpers)

    async def _configure(self) -> None:
        limits = self._options.limits
        if limits is not None and not self._state.configured:
            await self._in_thread(partial(self._queue.configure, limits, now=self._clock()))
        self._state.configured = True

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
            if not self._state.idle:
                continue
            try:
                due = await self._next_due()
            except QueueError:  # run() says so, and tries again
                continue
            if (due is None or due > self._clock()) and self._state.idle:
                self.stop()
                return

    # --- Leasing ---

    async def _turn(self) -> bool:
        """Lease and start what fits; whether anything was leased."""
        wanted = self._wanted()
        if wanted <= 0:
            return False
        self._state.leasing = True
        try:
            leases = await self._in_thread(
                partial(
                    self._queue.lease,
                    owner=self._owner,
                    limit=wanted,
                    seconds=self._options.lease_seconds,
                    now=self._clock(),
                    queues=self._options.queues,
                )
            )
            self._state.dry = not leases
            leases = [self._completed(lease) for lease in leases]
            self._state.leases.update((lease.owner, lease) for lease in leases)
            self._state.ready.extend(leases)
        finally:
            self._state.leasing = False
        self._start()
        return bool(leases)

    def _completed(self, lease: Lease) -> Lease:
        """Return a lease whose task has the retry options of its queue where it has none of its own."""
        queues_own = self._options.retry_options.get(lease.task.queue)
        if not queues_own:
            return lease
        merged = {**queues_own, **lease.task.retry_options}
        try:
            TaskRetryOptions.from_given(merged)
        except InvalidTaskRetryOptionsError:  # the file has changed since: the task's own count
            return lease
        return replace(lease, task=replace(lease.task, retry_options=merged))

    def _wanted(self) -> int:
        """How many tasks to lease now: for the free places, and a little ahead where tasks are short."""
        state = self._state
        if any(down.everywhere and self._clock() < down.until for down in state.down.values()):
            return 0
        free = self._options.concurrency - len(state.deliveries)
        if state.ready or free <= 0:
            ahead = self._ahead()
            return 0 if state.dry or len(state.ready) > ahead // 2 else ahead - len(state.ready)
        return free + (0 if state.dry else self._ahead())

    def _ahead(self) -> int:
        ended = self._state.ended
        if len(ended) < self._options.concurrency:
            return 0
        seconds = max(time.monotonic() - ended[0], 1e-6)
        return min(self._options.concurrency, int(len(ended) / seconds * _AHEAD_SECONDS))

    def _start(self) -> None:
        state = self._state
        while state.ready and len(state.deliveries) < self._options.concurrency and not self._stopping.is_set():
            delivery = asyncio.create_task(self._deliver_one(state.ready.popleft()))
            state.deliveries.add(delivery)
            delivery.add_done_callback(self._delivered)

    def _delivered(self, delivery: asyncio.Task[None]) -> None:
        self._state.deliveries.discard(delivery)
        self._state.ended.append(time.monotonic())
        self._start()
        self._changed.set()
        if not delivery.cancelled() and (error := delivery.exception()) is not None:
            _log.error("a delivery failed unexpectedly (%s); report it", _name(error))

    async def _rest(self) -> None:
        """Sleep until a place is free, a task falls due, or one is enqueued by whatever process."""
        self._changed.clear()
        state, now = self._state, self._clock()
        pause = max((down.until - now for down in state.down.values() if down.everywhere), default=0.0)
        if pause > 0:
            await self._sleep(pause)
        elif state.ready or len(state.deliveries) >= self._options.concurrency:
            await self._sleep(self._options.poll_seconds)
        else:
            due = await self._next_due()
            poll = self._options.poll_seconds
            timeout = poll if due is None else min(max(due - now, 0.0), poll)
            if timeout > 0 and not self._stopping.is_set():
                await self._in_thread(partial(self._queue.wait, timeout))

    async def _next_due(self) -> float | None:
        return await self._in_thread(partial(self._queue.next_due, now=self._clock(), queues=self._options.queues))

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

    # --- Delivering ---

    async def _deliver_one(self, lease: Lease) -> None:
        jitter = self._random.random()
        try:
            settlement = self._put_off(lease) or await self._attempt(lease, jitter)
        except asyncio.CancelledError:
            # The drain is over. Whether it ran, and still runs, is for the ledger to say.
            self._settled(lease, _given_back(lease, self._clock()))
            raise
        except Exception as error:  # noqa: BLE001  # see below
            # A row that somebody wrote into the storage, say: it counts as refused, and its neighbours go on.
            _log.error("task %a cannot be delivered (%s); look at what is stored of it", lease.task.id, _name(error))
            settlement = _judge_rejection(lease, None, "refused", now=self._clock(), jitter=jitter)
        self._settled(lease, settlement)

    async def _attempt(self, lease: Lease, jitter: float) -> Settlement:
        place = self._place(lease.task)
        down = self._state.down.get(place)
        if down is not None:
            down.probing = True
        try:
            response = await self._deliver(lease.task, attempt_headers(lease))
        except Unreachable as error:
            return self._unreachable(error, jitter)
        except Interrupted:
            self._state.down.pop(place, None)
            return _judge_failure(lease, None, now=self._clock(), jitter=jitter)
        finally:
            if down is not None:
                down.probing = False
        self._state.down.pop(place, None)
        settlement = judge(lease, response, now=self._clock(), jitter=jitter)
        await self._slow(lease.task.queue, response)
        if settlement.verdict is Verdict.DONE and not any(name.lower() == _OUTCOME for name in response.headers):
            _log.warning(
                "%s answered %d without %s, which counts as done; if it is no handler, correct the address",
                place,
                response.status,
                OUTCOME_HEADER,
            )
        if settlement.verdict is Verdict.DEAD and settlement.reason in {None, "rejected"}:
            return replace(settlement, reason=await self._recorded_reason(lease.task.id) or settlement.reason)
        return settlement

    async def _slow(self, queue: str, response: Response) -> None:
        """Hold a queue whose handler asks for it; our own at capacity, at first for a moment only."""
        seconds = asks_to_wait(response)
        if seconds is None:
            self._state.busy.pop(queue, None)
            return
        times = self._state.busy[queue] = self._state.busy.get(queue, 0) + 1
        if _headers(response).get(_OUTCOME) == "busy":
            seconds = min(seconds, _BUSY_SECONDS * 2 ** min(times, 10))
        now = self._clock()
        try:
            await self._in_thread(partial(self._queue.hold, queue, until=now + seconds, now=now))
        except QueueError as error:
            _log.error("the queue %a cannot be held (%s)", queue, _name(error))

    async def _recorded_reason(self, task_id: str) -> str | None:
        """Return what the handler wrote down of the attempt before it answered."""
        view = await self._in_thread(partial(self._queue.find, task_id))
        return view.records[-1].reason if view is not None and view.records else None

    def _place(self, task: QueuedTask) -> str:
        place: Callable[[QueuedTask], str] | None = getattr(self._deliver, "place", None)
        return "" if place is None else place(task)

    def _unreachable(self, error: Unreachable, jitter: float) -> Settlement:
        now = self._clock()
        down = self._state.down.setdefault(error.place, _Down())
        down.failures += 1
        down.everywhere = error.everywhere
        # A handler that is down is asked again soon, and the queue keeps its order meanwhile.
        down.until = max(down.until, now + min(0.1 * 2 ** min(down.failures, 6), 5.0) * (1 - jitter / 2))
        return Settlement(verdict=Verdict.RETRY, at=down.until, charged=False, reason="unreachable")

    def _put_off(self, lease: Lease) -> Settlement | None:
        """Spare a task the way to a place that is down, so that tasks for other places have theirs."""
        down = self._state.down.get(self._place(lease.task))
        now = self._clock()
        if down is None or (now >= down.until and not down.probing):
            return None
        down.put_off += 1
        at = max(down.until, now) + min(down.put_off * _SPREAD_SECONDS, _MAX_SPREAD)
        return Settlement(verdict=Verdict.RETRY, at=at, charged=False, reason="unreachable")

    # --- Settling: one transaction for all that ended meanwhile ---

    def _settled(self, lease: Lease, settlement: Settlement) -> None:
        self._state.settlements.append((lease, settlement))
        self._settle_now.set()

    async def _settle_loop(self) -> None:
        while True:
            await self._settle_now.wait()
            self._settle_now.clear()
            await self._settle()

    async def _settle(self) -> None:
        state = self._state
        while state.settlements:
            batch, state.settlements = state.settlements, []
            state.settling = True
            settling = asyncio.ensure_future(
                self._in_thread(partial(self._queue.settle_many, batch, now=self._clock()))
            )
            try:
                kept = await asyncio.shield(settling)
            except asyncio.CancelledError:
                # Its thread goes on. Settled a second time, which changes nothing, the tasks would look lost.
                await asyncio.wait({settling}, timeout=self._options.drain_seconds)
                if settling.done() and not settling.cancelled() and settling.exception() is None:
                    self._note_settled(batch, settling.result())
                else:
                    state.settlements = batch + state.settlements
                raise
            except Exception as error:  # noqa: BLE001  # whatever it is, the tasks are ours until it is stored
                _log.error("settling failed (%s); trying again", _name(error))
                state.settlements = batch + state.settlements
                await asyncio.sleep(0.5)
                continue
            finally:
                state.settling = False
            self._note_settled(batch, kept)
            self._changed.set()
            if self._capped or any(settlement.verdict is Verdict.RETRY for _, settlement in batch):
                # A retry may fall due before what is waited for, and what has ended makes room under a cap.
                self._queue.wake()

    def _note_settled(self, batch: Sequence[tuple[Lease, Settlement]], kept: Sequence[bool]) -> None:
        for (lease, _), ours in zip(batch, kept, strict=True):
            self._state.leases.pop(lease.owner, None)
            if not ours:
                _log.warning("task %a was delivered elsewhere meanwhile", lease.task.id)

    async def _extend_loop(self) -> None:
        while True:
            await asyncio.sleep(self._options.lease_seconds / 3)
            for owner, lease in list(self._state.leases.items()):
                extend = partial(self._queue.extend, lease, seconds=self._options.lease_seconds, now=self._clock())
                try:
                    extended = await self._in_thread(extend)
                except LeaseLost:
                    continue  # its settlement will say so
                except Exception as error:  # noqa: BLE001  # the next turn may go better
                    _log.error("leases cannot be prolonged (%s)", _name(error))
                    break
                if owner in self._state.leases:
                    self._state.leases[owner] = extended

    # --- The end ---

    async def _drain(self) -> None:
        self._give_back()
        deliveries = set(self._state.deliveries)
        if deliveries:
            await asyncio.wait(deliveries, timeout=self._options.drain_seconds)

    def _give_back(self) -> None:
        """Let others have what was leased ahead."""
        while self._state.ready:
            lease = self._state.ready.popleft()
            self._settled(lease, _given_back(lease, self._clock()))

    async def _end(self, helpers: Sequence[asyncio.Task[None]]) -> None:
        self._queue.wake()  # whoever cancels run() leaves a thread that waits
        self._give_back()
        unfinished = set(self._state.deliveries)
        for task in (*unfinished, *helpers):
            task.cancel()
        await asyncio.gather(*unfinished, *helpers, return_exceptions=True)
        with contextlib.suppress(TimeoutError):  # leases run out by themselves
            async with asyncio.timeout(self._options.drain_seconds + 1.0):
                await self._settle()
        if self._threads is not None:
            self._threads.shutdown(wait=False)
        self._state = _State(ended=deque(maxlen=self._options.concurrency))
        self._stopping.clear()

    async def _in_thread(self, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def _given_back(lease: Lease, now: float) -> Settlement:
    """Return what leaves a task as it was before it was leased."""
    return Settlement(
        verdict=Verdict.RETRY, at=now, charged=False, status=lease.previous_response, reason=lease.retry_reason
    )


def _name(error: BaseException) -> str:
    """Name an exception for the log, which its text is not for."""
    return error.slug if isinstance(error, Error) else type(error).__name__
