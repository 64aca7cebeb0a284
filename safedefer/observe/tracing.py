"""OpenTelemetry: spans of deferring and of runs, by the messaging conventions. The only importer of its library.

No span holds an argument, a key or a token. What the storage or a request says is in none but for the number of the attempt:
the trace that a run is linked to was signed with its task.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, Literal, Self

from safedefer import __version__
from safedefer.delivery.redaction import exception_type, redacted_traceback
from safedefer.errors import ConfigurationError, MissingExtra
from safedefer.execution.context import TaskContext
from safedefer.execution.deadline import DEADLINE_EXCEEDED
from safedefer.execution.run import Outcome, Result

try:
    from opentelemetry import trace as otel
    from opentelemetry.context import attach, detach
except ModuleNotFoundError as _error:
    raise MissingExtra("otel", "tracing") from _error

__all__ = ["Tracing"]

_log: Final = logging.getLogger("safedefer")

_TRACEPARENT: Final = re.compile("([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
#: The version that the W3C's recommendation makes invalid.
_NO_VERSION: Final = "ff"
#: Ends that are not an error of the run.
_NO_ERROR: Final = frozenset({Result.SUCCEEDED, Result.CANCELLED})


class Tracing:
    """Traces tasks by OpenTelemetry: ``App(tracing=Tracing())``.

    Deferring is a span ``send <queue>``; its W3C ``traceparent`` is signed with the task. Every run is a span
    ``process <queue>``, active in the task's code. What raises in the SDK changes nothing of a task: it is logged once.

    Args:
        trace: ``"link"``: runs are linked to the span that sent the task, in traces of their own. ``"parent"``: they are its
            children, in one trace.
        tracer_provider: Makes the spans; the global one by default.
        tracebacks: Whether spans of failed runs hold the exception's traceback and text, redacted as records of attempts
            are. Texts of exceptions often hold arguments.

    Raises:
        ConfigurationError: ``trace`` is neither.
    """

    def __init__(
        self,
        *,
        trace: Literal["link", "parent"] = "link",
        tracer_provider: otel.TracerProvider | None = None,
        tracebacks: bool = False,
    ) -> None:
        if trace not in {"link", "parent"}:
            raise ConfigurationError('trace is "link" or "parent"')
        self._is_parent = trace == "parent"
        self._tracer = otel.get_tracer("safedefer", __version__, tracer_provider)
        self._tracebacks = tracebacks
        self._warned = False

    def traceparent(self) -> str | None:
        """Return the active span as a W3C ``traceparent``; None if there is none."""
        found = otel.get_current_span().get_span_context()
        return (
            f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags & 0xFF:02x}" if found.is_valid else None
        )

    def sending(self, queue: str, *, batch: bool = False) -> TaskSpan:
        """Make the span of deferring one task to ``queue``, or several, active."""

        def start() -> otel.Span:
            return self._tracer.start_span(
                f"send {queue}", kind=otel.SpanKind.PRODUCER, attributes=_attributes("send", queue)
            )

        return TaskSpan(start, self._failed, batch=batch)

    def running(self, context: TaskContext, *, attempt: int) -> TaskSpan:
        """Make the span of one run active."""

        def start() -> otel.Span:
            parent, links, here = None, [], otel.get_current_span().get_span_context()
            sent = span_context(context.trace)
            if sent is not None and self._is_parent:
                parent = otel.set_span_in_context(otel.NonRecordingSpan(sent))
                links = [otel.Link(here)] if here.is_valid else []
            elif sent is not None:
                links = [otel.Link(sent)]
            return self._tracer.start_span(
                f"process {context.queue_name}",
                context=parent,
                kind=otel.SpanKind.CONSUMER,
                links=links,
                attributes={
                    **_attributes("process", context.queue_name),
                    "messaging.message.id": context.id,
                    "safedefer.callable": context.callable,
                    "safedefer.attempt": attempt,
                },
            )

        return TaskSpan(start, self._failed, tracebacks=self._tracebacks)

    def _failed(self, error: Exception) -> None:
        """Log that the SDK raised, once."""
        if not self._warned:
            self._warned = True
            _log.error("tracing failed (%s); tasks go on, and spans may be missing", exception_type(error))


class TaskSpan:
    """A span while a block lasts, in which it is active.

    Args:
        start: Starts it.
        failed: Told of exceptions of the SDK, which reach nobody else.
        batch: Whether it is about several tasks.
        tracebacks: Whether it holds the traceback of a failed run.
    """

    __slots__ = ("_batch", "_failed", "_span", "_start", "_token", "_tracebacks")

    def __init__(
        self,
        start: Callable[[], otel.Span],
        failed: Callable[[Exception], None],
        *,
        batch: bool = False,
        tracebacks: bool = False,
    ) -> None:
        self._start = start
        self._failed = failed
        self._batch = batch
        self._tracebacks = tracebacks
        self._span: otel.Span = otel.INVALID_SPAN
        self._token: Any = None

    def __enter__(self) -> Self:
        """Start the span, and make it active."""
        try:
            self._span = self._start()
            self._token = attach(otel.set_span_in_context(self._span))
        except Exception as error:  # noqa: BLE001  # a sampler or a processor of the user's
            self._failed(error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it; an exception that leaves the block is its error."""
        if error is not None:
            self._note(lambda: self._set_error(exception_type(error), error))
        if self._token is not None:
            detach(self._token)
        self._note(self._span.end)

    def sent(self, task_ids: Sequence[str], /) -> None:
        """Note the tasks that were stored."""
        if self._batch:
            self._note(lambda: self._span.set_attribute("messaging.batch.message_count", len(task_ids)))
        else:
            self._note(lambda: self._span.set_attribute("messaging.message.id", task_ids[0]))

    def ended(self, outcome: Outcome, /) -> None:
        """Note how a run ended."""
        self._note(lambda: self._end_of_run(outcome))

    def _end_of_run(self, outcome: Outcome) -> None:
        self._span.set_attribute("safedefer.outcome", str(outcome.result))
        if outcome.reason is not None:
            self._span.set_attribute("safedefer.reason", outcome.reason)
        if outcome.result in _NO_ERROR:
            return
        error = None if outcome.reason == DEADLINE_EXCEEDED else outcome.error  # else it is the cancellation
        self._set_error(outcome.reason or "_OTHER" if error is None else exception_type(error), error)

    def _set_error(self, name: str, error: BaseException | None) -> None:
        self._span.set_attribute("error.type", name)
        self._span.set_status(otel.StatusCode.ERROR)
        if error is not None and self._tracebacks:
            # Not by record_exception: it would take the text as it is.
            self._span.add_event(
                "exception", {"exception.type": name, "exception.stacktrace": redacted_traceback(error)}
            )

    def _note(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  # as above
            self._failed(error)


def _attributes(operation: str, queue: str) -> dict[str, str | int]:
    return {
        "messaging.system": "safedefer",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": queue,
    }


def span_context(trace: str | None) -> otel.SpanContext | None:
    """Return the span that a W3C ``traceparent`` names; None if it names none."""
    found = None if trace is None else _TRACEPARENT.fullmatch(trace)
    if found is None or found[1] == _NO_VERSION:
        return None
    context = otel.SpanContext(
        int(found[2], 16), int(found[3], 16), is_remote=True, trace_flags=otel.TraceFlags(int(found[4], 16))
    )
    return context if context.is_valid else None
