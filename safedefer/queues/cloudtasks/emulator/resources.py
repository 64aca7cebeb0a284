"""Queues and tasks as the emulator keeps them, and as the API shows them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from safedefer.queues.cloudtasks.emulator.values import duration_text, time_text

#: What Cloud Tasks picks for a queue that does not say (page *Configure queues*).
_ATTEMPTS: Final = 100
_MIN_BACKOFF: Final = 0.1
_MAX_BACKOFF: Final = 3_600.0
_DOUBLINGS: Final = 16
_RATE: Final = 500.0
_CONCURRENT: Final = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryConfig:
    """``RetryConfig``; durations are seconds."""

    max_attempts: int = _ATTEMPTS
    max_retry_duration: float = 0.0
    min_backoff: float = _MIN_BACKOFF
    max_backoff: float = _MAX_BACKOFF
    max_doublings: int = _DOUBLINGS

    def backoff(self, failures: int) -> float:
        """Return seconds to wait after so many failures, from 1."""
        doubled = min(failures - 1, self.max_doublings)
        # 2.0 ** 1024 overflows: beyond 64 doublings every interval is above any maximum.
        return min(self.max_backoff, self.min_backoff * 2.0 ** min(doubled, 64) * max(failures - doubled, 1))

    def is_exhausted(self, attempts: int, elapsed: float) -> bool:
        """Whether a task is given up after so many attempts, so many seconds after the first one."""
        if self.max_attempts < 0:
            return 0 < self.max_retry_duration <= elapsed
        return attempts >= self.max_attempts and elapsed >= self.max_retry_duration

    def document(self) -> dict[str, Any]:
        """Return what the API shows."""
        return {
            "maxAttempts": self.max_attempts,
            "maxRetryDuration": duration_text(self.max_retry_duration),
            "minBackoff": duration_text(self.min_backoff),
            "maxBackoff": duration_text(self.max_backoff),
            "maxDoublings": self.max_doublings,
        }


@dataclass(slots=True, kw_only=True)
class QueueEntry:
    """A queue."""

    name: str
    rate: float = _RATE
    concurrent: int = _CONCURRENT
    burst: int = 0
    """0: as large as the rate."""
    retry: RetryConfig = field(default_factory=RetryConfig)
    state: str = "RUNNING"
    purged: float | None = None
    routing: dict[str, str] = field(default_factory=dict)
    """``appEngineRoutingOverride``."""
    from_yaml: bool = False
    """Whether a queue.yaml made it: names of ended tasks are not free for 9 days."""

    @property
    def bucket(self) -> int:
        """The most tokens."""
        return self.burst or max(math.ceil(self.rate), 1)

    def document(self) -> dict[str, Any]:
        """Return what the API shows."""
        shown: dict[str, Any] = {
            "name": self.name,
            "rateLimits": {
                "maxDispatchesPerSecond": self.rate,
                "maxBurstSize": self.bucket,
                "maxConcurrentDispatches": self.concurrent,
            },
            "retryConfig": self.retry.document(),
            "state": self.state,
        }
        if self.purged is not None:
            shown["purgeTime"] = time_text(self.purged)
        if self.routing:
            shown["appEngineRoutingOverride"] = self.routing
        return shown

    def record(self) -> dict[str, Any]:
        """Return what the journal keeps."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> QueueEntry:
        """Return the queue of a record."""
        return cls(**{**record, "retry": RetryConfig(**record["retry"])})


@dataclass(slots=True, kw_only=True)
class TaskEntry:
    """A task that has not ended."""

    name: str
    kind: str
    """``httpRequest`` or ``appEngineHttpRequest``."""
    request: dict[str, Any]
    """That member, checked."""
    schedule: float
    created: float
    deadline: float
    """Seconds for an attempt."""
    retry: RetryConfig | None = None
    dispatches: int = 0
    responses: int = 0
    executions: int = 0
    """``TaskExecutionCount``."""
    first: float | None = None
    """When the first attempt was dispatched."""
    last: dict[str, Any] | None = None
    """``lastAttempt``."""
    previous: int | None = None
    """The status of the answer before; None: there was none."""
    running: int = 0
    entry: int = 0
    """Of its entry in the queue's order that counts."""

    @property
    def is_http(self) -> bool:
        """Whether its target is an HTTP one."""
        return self.kind == "httpRequest"

    def document(self, *, full: bool) -> dict[str, Any]:
        """Return what the API shows, with the body or without it."""
        request = self.request if full else {name: each for name, each in self.request.items() if name != "body"}
        shown: dict[str, Any] = {
            "name": self.name,
            self.kind: request,
            "scheduleTime": time_text(self.schedule),
            "createTime": time_text(math.floor(self.created)),
            "dispatchDeadline": duration_text(self.deadline),
            "dispatchCount": self.dispatches,
            "responseCount": self.responses,
            "view": "FULL" if full else "BASIC",
        }
        if self.retry is not None:
            shown["retryConfig"] = self.retry.document()
        if self.first is not None:
            shown["firstAttempt"] = {"dispatchTime": time_text(self.first)}
        if self.last is not None:
            shown["lastAttempt"] = self.last
        return shown

    def record(self) -> dict[str, Any]:
        """Return what the journal keeps: of an attempt under way nothing but its count."""
        return asdict(replace(self, running=0, entry=0))

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> TaskEntry:
        """Return the task of a record."""
        retry = record["retry"]
        return cls(**{**record, "retry": None if retry is None else RetryConfig(**retry)})
