"""What holds a queue back: its rate, its cap on concurrency, a pause, and a handler that asked for one.

The rate is a token bucket (App Engine ``queue.yaml``): the bucket holds ``bucket_size`` tokens and gains
``rate`` a second, and each delivery takes one. Everything here is a function of its arguments; the state is
kept by the queue, beside the tasks, so that it holds for all dispatchers together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

#: Seconds after which a queue that is full is looked at again: nobody is told when another process's task ends.
FULL_LOOK: Final = 0.05
#: Seconds after which a queue that is paused is looked at again.
PAUSED_LOOK: Final = 1.0
#: The size of a bucket whose file does not say it (App Engine).
DEFAULT_BUCKET: Final = 5
#: The longest that a handler can hold up a queue with ``Retry-After``, in seconds.
MAX_HOLD: Final = 3_600.0

# Tokens are floats: what lacks so little of a whole one is one.
_WHOLE: Final = 1 - 1e-9
#: The end of the year 9999, in seconds since the epoch.
_LATEST: Final = 253_402_300_799


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """What a configuration declares of one queue."""

    queue: str
    rate: float | None = None
    """Deliveries a second; None is as many as there are, 0 is none."""
    bucket_size: int = DEFAULT_BUCKET
    """How many deliveries may follow each other at once after a time without any."""
    max_concurrent: int | None = None
    """Deliveries under way at once, in all dispatchers together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueControl:
    """Limits of one queue and how they stand."""

    limits: QueueLimits
    paused: bool = False
    """By hand, until it is resumed."""
    held_until: float = 0.0
    """Nothing is delivered before: a handler answered with ``Retry-After``."""
    tokens: float = 0.0
    """In the bucket, at ``refilled``."""
    refilled: float = 0.0
    """Seconds since the epoch."""

    @classmethod
    def new(cls, limits: QueueLimits, *, now: float) -> QueueControl:
        """Return limits whose bucket is full."""
        return cls(limits=limits, tokens=float(limits.bucket_size), refilled=now)

    @classmethod
    def stored(
        cls,
        *,
        queue: str,
        rate: object,
        bucket_size: object,
        max_concurrent: object,
        paused: object,
        held_until: object,
        tokens: object,
        refilled: object,
    ) -> QueueControl:
        """Return a control that was stored. What is no number, negative or beyond any use is bounded."""
        limits = QueueLimits(
            queue=queue,
            rate=None if rate is None else _bounded(rate, 1e9),
            bucket_size=int(_bounded(bucket_size, 2**31)),
            max_concurrent=None if max_concurrent is None else int(_bounded(max_concurrent, 2**31)),
        )
        return cls(
            limits=limits,
            paused=bool(paused),
            held_until=_bounded(held_until, _LATEST),
            tokens=_bounded(tokens, 2**31),
            refilled=_bounded(refilled, _LATEST),
        )

    @property
    def queue(self) -> str:
        """The queue's name."""
        return self.limits.queue

    def binds(self, now: float) -> bool:
        """Whether anything may hold the queue back now."""
        limits = self.limits
        return self.paused or self.held_until > now or limits.rate is not None or limits.max_concurrent is not None

    def refill(self, now: float) -> QueueControl:
        """Return the control with what its bucket has gained by ``now``.

        A clock that was set back costs nothing but the tokens of that step: the bucket goes on from the new time.
        """
        rate = self.limits.rate or 0.0
        gained = max(now - self.refilled, 0.0) * rate
        return replace(self, tokens=min(float(self.limits.bucket_size), self.tokens + gained), refilled=now)

    def spend(self, count: int) -> QueueControl:
        """Return the control after ``count`` deliveries."""
        return self if self.limits.rate is None else replace(self, tokens=max(self.tokens - count, 0.0))

    def allowance(self, *, now: float, running: int) -> int | None:
        """How many deliveries may begin now; None is any number. ``refill`` comes first.

        ``running`` is how many are under way.
        """
        if self.paused or self.held_until > now or self.limits.rate == 0:
            return 0
        bounds = []
        if self.limits.rate is not None:
            bounds.append(int(self.tokens + 1 - _WHOLE))
        if self.limits.max_concurrent is not None:
            bounds.append(max(self.limits.max_concurrent - running, 0))
        return min(bounds, default=None)

    def opens(self, due: float, *, now: float, running: int) -> float:
        """When to look for a task that falls due at ``due``, by what holds the queue back. ``refill`` comes first."""
        rate = self.limits.rate
        if self.paused or rate == 0:
            return max(due, now + PAUSED_LOOK)
        opens = max(due, self.held_until)
        if rate is not None and self.tokens < _WHOLE:
            opens = max(opens, now + (1 - self.tokens) / rate)
        if self.limits.max_concurrent is not None and running >= self.limits.max_concurrent:
            opens = max(opens, now + FULL_LOOK)
        return opens

    def configured(self, limits: QueueLimits, *, now: float) -> QueueControl:
        """Return the control under new limits: a pause stays, and a bucket keeps what it holds."""
        if limits == self.limits:
            return self
        fresh = self.limits.rate is None
        tokens = float(limits.bucket_size) if fresh else min(self.refill(now).tokens, float(limits.bucket_size))
        return replace(self, limits=limits, tokens=tokens, refilled=now)


def _bounded(value: object, most: float) -> float:
    """Return a stored number between 0 and ``most``; 0 where it is none."""
    return min(max(value, 0), most) if isinstance(value, int | float) and value == value else 0  # noqa: PLR0124  # NaN
