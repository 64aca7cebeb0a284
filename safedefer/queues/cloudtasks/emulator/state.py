"""The state of the emulator: queues, tasks and used names, and which task is dispatched when. No IO but the journal's."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final

from safedefer.queues.cloudtasks.emulator.journal import Journal
from safedefer.queues.cloudtasks.emulator.resources import QueueEntry, RetryConfig, TaskEntry
from safedefer.queues.cloudtasks.emulator.values import time_text

#: Seconds for which the name of an ended task is not free.
TOMBSTONE: Final = 86_400.0
YAML_TOMBSTONE: Final = 9 * 86_400.0
#: Seconds for which that of a deleted queue is not.
QUEUE_TOMBSTONE: Final = 3 * 86_400.0
#: Seconds after which a task is deleted.
RETENTION: Final = 31 * 86_400.0
_OVERLOADED: Final = {"httpRequest": frozenset({429, 503}), "appEngineHttpRequest": frozenset({503})}
_WHOLE: Final = 1 - 1e-9
_SERVER_ERROR: Final = 500


@dataclass(slots=True)
class Line:
    """A queue with its tasks."""

    queue: QueueEntry
    tokens: float
    refilled: float
    tasks: dict[str, TaskEntry] = field(default_factory=dict)
    order: list[tuple[float, int, str]] = field(default_factory=list)
    """A heap of schedule times. An entry counts if its task has its number."""
    running: int = 0
    slowed: float = 1.0
    """What overload leaves of the rate: 1 is all of it."""

    @property
    def rate(self) -> float:
        """Dispatches a second, as things stand."""
        return self.queue.rate * self.slowed

    def refill(self, now: float) -> None:
        """Add the tokens of the time since the last call."""
        gained = max(now - self.refilled, 0.0) * self.rate
        self.tokens, self.refilled = min(self.tokens + gained, float(self.queue.bucket)), now

    def first(self) -> TaskEntry | None:
        """Return the task that is to be dispatched first, due or not; those under way are not among them."""
        while self.order:
            _, entry, name = self.order[0]
            task = self.tasks.get(name)
            if task is not None and task.entry == entry and not task.running:
                return task
            heapq.heappop(self.order)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """One attempt that is to be made."""

    line: Line
    task: TaskEntry
    at: float
    eta: float
    retries: int
    executions: int
    previous: int | None
    forced: bool
    """By RunTask."""


class State:
    """Queues and tasks.

    Args:
        journal: Keeps changes.
        clock: Returns seconds since the epoch.
    """

    def __init__(self, journal: Journal, clock: Callable[[], float]) -> None:
        self.journal = journal
        self.clock = clock
        self.lines: dict[str, Line] = {}
        self.free_at: dict[str, float] = {}
        """When names of ended tasks and of deleted queues are free again."""
        self.key: str | None = None
        """The private key of OIDC tokens, as PEM."""
        self.changed: Callable[[], None] = lambda: None
        """Called when something may have to be dispatched earlier than known."""
        self._entries = count(1)
        self._replay()

    def _replay(self) -> None:
        for change in self.journal.read():
            match change:
                case {"queue": record}:
                    self._line(QueueEntry.from_record(record))
                case {"task": record}:
                    task = TaskEntry.from_record(record)
                    self._enter(self.lines[_queue_of(task.name)], task)
                case {"ended": name, "free_at": moment}:
                    self.lines[_queue_of(name)].tasks.pop(name, None)
                    self.free_at[name] = moment
                case {"deleted": name, "free_at": moment}:
                    del self.lines[name]
                    self.free_at[name] = moment
                case {"key": pem}:
                    self.key = pem
        self.journal.rewrite(self._changes())

    def _changes(self) -> Iterator[dict[str, Any]]:
        if self.key is not None:
            yield {"key": self.key}
        for line in self.lines.values():
            yield {"queue": line.queue.record()}
            yield from ({"task": task.record()} for task in line.tasks.values())
        now = self.clock()
        deleted = [name for name in self.free_at if "/tasks/" not in name and name not in self.lines]
        for name in deleted:
            yield {"queue": QueueEntry(name=name).record()}
            yield {"deleted": name, "free_at": self.free_at[name]}
        for name, moment in self.free_at.items():
            if "/tasks/" in name and moment > now and _queue_of(name) in self.lines:
                yield {"ended": name, "free_at": moment}

    def keep_key(self, pem: str) -> None:
        """Keep the private key of OIDC tokens."""
        self.key = pem
        self.journal.append({"key": pem})

    # --- Queues ---

    def put_queue(self, queue: QueueEntry) -> Line:
        """Add a queue, or replace its configuration."""
        line = self._line(queue)
        self.journal.append({"queue": queue.record()})
        self.changed()
        return line

    def _line(self, queue: QueueEntry) -> Line:
        line = self.lines.get(queue.name)
        if line is None:
            line = self.lines[queue.name] = Line(queue, float(queue.bucket), self.clock())
            return line
        line.refill(self.clock())
        line.queue, line.tokens = queue, min(line.tokens, float(queue.bucket))
        return line

    def delete_queue(self, line: Line) -> None:
        """Delete a queue with its tasks."""
        name, moment = line.queue.name, self.clock() + QUEUE_TOMBSTONE
        del self.lines[name]
        self.free_at[name] = moment
        self.journal.append({"deleted": name, "free_at": moment})

    # --- Tasks ---

    def is_used(self, name: str) -> bool:
        """Whether a name is not free: of a task that ended, or of a queue that was deleted."""
        return self.free_at.get(name, 0.0) > self.clock()

    def add(self, line: Line, task: TaskEntry) -> None:
        """Add a task."""
        self._enter(line, task)
        self._keep(task)

    def _enter(self, line: Line, task: TaskEntry) -> None:
        task.entry = next(self._entries)
        line.tasks[task.name] = task
        heapq.heappush(line.order, (task.schedule, task.entry, task.name))
        self.changed()

    def _keep(self, task: TaskEntry) -> None:
        self.journal.append({"task": task.record()})

    def end(self, line: Line, task: TaskEntry) -> None:
        """Delete a task; its name is not free for a while."""
        moment = self.clock() + (YAML_TOMBSTONE if line.queue.from_yaml else TOMBSTONE)
        del line.tasks[task.name]
        self.free_at[task.name] = moment
        self.journal.append({"ended": task.name, "free_at": moment})

    # --- Dispatching ---

    def take(self) -> list[Dispatch]:
        """Return the attempts that are to be made now, and count them as under way."""
        now, taken = self.clock(), []
        for line in self.lines.values():
            if line.queue.state != "RUNNING":
                continue
            line.refill(now)
            while line.tokens >= _WHOLE and line.running < line.queue.concurrent:
                task = line.first()
                if task is None or task.schedule > now:
                    break
                if now - task.created >= RETENTION:
                    self.end(line, task)
                    continue
                line.tokens -= 1
                taken.append(self.begin(line, task, forced=False))
        return taken

    def next_time(self) -> float | None:
        """Return when ``take`` may have something, in seconds since the epoch; None is after a change only."""
        found = None
        for line in self.lines.values():
            if line.queue.state != "RUNNING" or line.running >= line.queue.concurrent:
                continue
            task = line.first()
            if task is None:
                continue
            refill = line.refilled + max(_WHOLE - line.tokens, 0.0) / line.rate
            found = min(max(task.schedule, refill), math.inf if found is None else found)
        return found

    def begin(self, line: Line, task: TaskEntry, *, forced: bool) -> Dispatch:
        """Count an attempt as under way."""
        now = self.clock()
        dispatch = Dispatch(
            line=line,
            task=task,
            at=now,
            eta=task.schedule,
            retries=task.dispatches,
            executions=task.executions,
            previous=task.previous,
            forced=forced,
        )
        task.dispatches += 1
        task.running += 1
        line.running += 1
        task.first = now if task.first is None else task.first
        task.last = {"scheduleTime": time_text(task.schedule), "dispatchTime": time_text(now)}
        self._keep(task)
        return dispatch

    def finish(self, dispatch: Dispatch, status: int | None, *, retry_after: float = 0.0) -> None:
        """Settle an attempt.

        Args:
            dispatch: The attempt.
            status: Of the answer; None: there was none in time.
            retry_after: Seconds that the answer asked for.
        """
        line, task, now = dispatch.line, dispatch.task, self.clock()
        line.running -= 1
        task.running -= 1
        self.changed()
        if line.tasks.get(task.name) is not task or self.lines.get(line.queue.name) is not line:
            return  # deleted meanwhile
        task.previous = status
        if status is not None:
            task.responses += 1
            task.executions += status < _SERVER_ERROR or not task.is_http
            task.last = {**(task.last or {}), "responseTime": time_text(now), "responseStatus": {"code": _code(status)}}
            if 200 <= status < 300:  # noqa: PLR2004  # RFC 9110: success
                line.slowed = min(line.slowed * 2, 1.0)
                self.end(line, task)
                return
            if status in _OVERLOADED[task.kind]:
                line.refill(now)
                line.slowed = max(line.slowed / 2, 1 / 64)
        retry: RetryConfig = task.retry or line.queue.retry
        if retry.is_exhausted(task.dispatches, now - (task.first or now)):
            self.end(line, task)
            return
        wait = max(retry.backoff(task.dispatches), min(retry_after, retry.max_backoff))
        task.schedule = (dispatch.at if dispatch.forced else now) + wait
        self._enter(line, task)
        self._keep(task)


def _queue_of(task_name: str) -> str:
    return task_name.rpartition("/tasks/")[0]


def _code(status: int) -> int:
    """Return the ``google.rpc.Code`` nearest to an HTTP status: OK or UNKNOWN."""
    return 0 if 200 <= status < 300 else 2  # noqa: PLR2004  # as in finish
