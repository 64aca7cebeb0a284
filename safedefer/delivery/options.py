"""How a handler runs tasks: checked where an App is made, which may be long before a handler is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from safedefer.delivery.budget import UNVERIFIED_BYTES
from safedefer.errors import ConfigurationError
from safedefer.execution.around import Around, check_around
from safedefer.execution.deadline import DEFAULT_DEADLINE, MAX_DEADLINE
from safedefer.execution.tracing import TaskTracing
from safedefer.queues.rules import MOST_ROW_BYTES

if TYPE_CHECKING:
    from safedefer.execution.prepare import Validate

_MAX_LEASE: Final = 86_400


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class DeliveryOptions:
    """How a handler runs tasks.

    Raises:
        ConfigurationError: A value is wrong.
    """

    max_bytes: int = 1_048_576
    """The largest body, in bytes: that of the largest token, which no queue may be unable to read."""
    concurrency: int = 16
    """The most tasks that run at once; the handler answers ``busy`` to another one."""
    lease_seconds: float = 60.0
    """Seconds after which the ledger takes a run for dead unless its lease is extended; a live handler extends it."""
    unverified_bytes: int = UNVERIFIED_BYTES
    """Bytes that the bodies of all requests take together while they are read; one more is answered ``busy``."""
    validate: Validate = None
    """``"annotations"``: check the arguments against the callable's annotations before the call."""
    around: tuple[Around, ...] = ()
    """Return context managers that are entered around every run."""
    deadline: float = DEFAULT_DEADLINE
    """Seconds that an attempt may take where neither the task nor its queue says so; 0 is no deadline."""
    deadlines: Mapping[str, float] = field(default_factory=dict)
    """The ``attempt_deadline`` of queues, in seconds; 0 is no deadline."""
    tracing: TaskTracing | None = None
    """Makes a span of every run."""

    def __post_init__(self) -> None:
        """Check every value."""
        if type(self.max_bytes) is not int or not 0 < self.max_bytes <= MOST_ROW_BYTES:
            raise ConfigurationError(
                f"token_bytes is a whole number, at most {MOST_ROW_BYTES:,}: no queue reads a longer token; "
                "store the data and pass its id"
            )
        if type(self.concurrency) is not int or self.concurrency < 1:
            raise ConfigurationError("concurrency is a whole number, 1 or more")
        if type(self.lease_seconds) not in {int, float} or not 0 < self.lease_seconds <= _MAX_LEASE:
            raise ConfigurationError("lease_seconds is a number of seconds, at most a day")
        if type(self.unverified_bytes) is not int or self.unverified_bytes < self.max_bytes:
            raise ConfigurationError(
                f"unverified_bytes is a whole number, at least the largest body's {self.max_bytes:,} bytes"
            )
        for seconds in (self.deadline, *self.deadlines.values()):
            if type(seconds) not in {int, float} or not 0 <= seconds <= MAX_DEADLINE:
                raise ConfigurationError("a deadline is a number of seconds, at most a day; 0 is none")
        check_around(self.around)
        if self.tracing is not None and (isinstance(self.tracing, type) or not hasattr(self.tracing, "running")):
            raise ConfigurationError("tracing is safedefer.observe.tracing.Tracing(), or None")
        if self.validate not in {None, "annotations"}:
            raise ConfigurationError('validate is None or "annotations"')
