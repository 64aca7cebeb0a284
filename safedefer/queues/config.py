"""``queue.yaml``: the queues of an application, in App Engine's format.

Read with ruamel.yaml: YAML 1.2 (``on`` and ``12:30`` stay text), duplicate keys are errors, nothing is
constructed but plain values, and every value knows its line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from safedefer.errors import ConfigurationError
from safedefer.queues.rates import DEFAULT_BUCKET, QueueLimits

_STRICT: Final = ConfigDict(strict=True, frozen=True, extra="forbid", hide_input_in_errors=True)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_RATE: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{0,9})?)/([smhd])")
_SPAN: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])")
_SIZE: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)([BKMGT]?)")
_NAME: Final = r"^[A-Za-z0-9.-]{1,100}$"
_MOST: Final = 2**31 - 1
#: Bytes of a file at most.
_MAX_BYTES: Final = 1_048_576
#: App Engine's own, for a queue that the file names without one.
_DEFAULT_RATE: Final = 5.0


def _rate(value: object) -> object:
    """Read ``5/s``, ``10/m``, ``2/h``, ``1/d`` and ``0`` as tasks a second."""
    if type(value) is int and value == 0:
        return 0.0
    match = _RATE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("a rate is written 5/s, 10/m, 2/h, 1/d or 0")
    return float(match[1]) / _SECONDS[match[2]]


def _span(value: object) -> object:
    """Read ``30s``, ``5m``, ``6h``, ``2d`` as seconds."""
    match = _SPAN.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("an age is written 30s, 5m, 6h or 2d")
    return float(match[1]) * _SECONDS[match[2]]


def _size(value: object) -> object:
    """Read ``120M`` and the like as bytes."""
    match = _SIZE.fullmatch(str(value)) if type(value) in {str, int} else None
    if match is None:
        raise ValueError("a size is written 500K, 120M or 1.5G")
    return int(float(match[1]) * 1024 ** "BKMGT".index(match[2] or "B"))


def _number(value: object) -> object:
    return float(value) if type(value) is int and -_MOST <= value <= _MOST else value


_Seconds = Annotated[float, BeforeValidator(_number), Field(ge=0, le=_MOST, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, le=_MOST)]


class RetryParameters(BaseModel):
    """``retry_parameters``: those of tasks that do not bring their own."""

    model_config = _STRICT

    task_retry_limit: _Count | None = None
    """Retries after the first attempt."""
    task_age_limit: Annotated[float, BeforeValidator(_span), Field(le=_MOST)] | None = None
    """Seconds, in the file ``2d``."""
    min_backoff_seconds: _Seconds | None = None
    max_backoff_seconds: _Seconds | None = None
    max_doublings: _Count | None = None

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        low, high = self.min_backoff_seconds, self.max_backoff_seconds
        if low is not None and high is not None and low > high:
            raise ValueError("min_backoff_seconds is above max_backoff_seconds")
        return self

    def given(self) -> dict[str, float]:
        """Return the values that were given, by the names of ``TaskRetryOptions``."""
        return {name: value for name, value in self if value is not None}


class QueueSection(BaseModel):
    """One entry of ``queue``."""

    model_config = _STRICT

    name: Annotated[str, Field(pattern=_NAME)]
    rate: Annotated[float, BeforeValidator(_rate)] | None = None
    """Tasks a second; 0 gives none. Not given, it is 5/s."""
    bucket_size: Annotated[int, Field(ge=1, le=_MOST)] = DEFAULT_BUCKET
    max_concurrent_requests: Annotated[int, Field(ge=1, le=_MOST)] | None = None
    target: Annotated[str, Field(pattern=_NAME)] | None = None
    """The target of tasks that name none."""
    retry_parameters: RetryParameters = RetryParameters()
    attempt_deadline: Annotated[float, BeforeValidator(_number), Field(ge=0, le=86_400, allow_inf_nan=False)] | None = (
        None
    )
    """Seconds that one attempt may take where the task itself does not say; 0 is no deadline, None is 600."""
    mode: Literal["push"] = "push"

    @model_validator(mode="before")
    @classmethod
    def _push_with_a_rate(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("mode") == "pull":
            raise ValueError(
                "mode: pull is of App Engine's pull queues, whose tasks an application leases itself; "
                "remove the queue, and defer functions to a push queue"
            )
        return {"rate": f"{_DEFAULT_RATE:g}/s", **values}

    @property
    def limits(self) -> QueueLimits:
        """What the queue itself enforces."""
        return QueueLimits(
            queue=self.name, rate=self.rate, bucket_size=self.bucket_size, max_concurrent=self.max_concurrent_requests
        )


class QueueFile(BaseModel):
    """A whole ``queue.yaml``."""

    model_config = _STRICT

    queue: list[QueueSection] = []
    total_storage_limit: Annotated[int, BeforeValidator(_size), Field(ge=0)] | None = None
    """Bytes that the stored tokens of all oversize tasks may take together, in the file ``120M``."""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [section.name for section in self.queue]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ValueError(f"the queue {name} is declared twice")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file.

        Raises:
            ConfigurationError: It cannot be read, or something in it is wrong; the message names the line.
        """
        try:
            with Path(path).open("rb") as file:
                text = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read ({error.strerror}); check SAFEDEFER_QUEUE_YAML") from error
        return cls.parse(text, name=str(path))

    @classmethod
    def parse(cls, text: bytes | str, *, name: str = "queue.yaml") -> Self:
        """Read a file's text; ``name`` is what messages call it.

        Raises:
            ConfigurationError: As ``load``.
        """
        document = _read(text, name)
        try:
            return cls.model_validate(_plain(document, name, document))
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
            line = _line(document, problem["loc"])
            where = ".".join(str(part) for part in problem["loc"] if isinstance(part, str))
            message = problem["msg"].removeprefix("Value error, ")
            raise ConfigurationError(
                f"{name}, line {line}{f', {where}' if where else ''}: {message}; see docs/reference/queue-yaml.md"
            ) from None

    def section(self, queue: str) -> QueueSection | None:
        """Return the entry of a queue."""
        return next((section for section in self.queue if section.name == queue), None)

    @property
    def deadlines(self) -> dict[str, float]:
        """The declared ``attempt_deadline`` of each queue, in seconds; 0 is none."""
        given = ((section.name, section.attempt_deadline) for section in self.queue)
        return {name: seconds for name, seconds in given if seconds is not None}

    @property
    def limits(self) -> list[QueueLimits]:
        """What the queues themselves enforce. An unlisted ``default`` queue has App Engine's 5/s."""
        listed = [section.limits for section in self.queue]
        if self.section("default") is None:
            listed.append(QueueLimits(queue="default", rate=_DEFAULT_RATE))
        return listed


def _read(text: bytes | str, name: str) -> Any:
    if len(text) > _MAX_BYTES:
        raise ConfigurationError(f"{name} is larger than {_MAX_BYTES} bytes; shorten it")
    try:
        document = YAML(typ="rt", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigurationError(f"{name}{line}: {_first_line(error.problem)}; correct it") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{name} is not YAML ({_first_line(error)}); correct it") from None
    return CommentedMap() if document is None else document


def _first_line(problem: object) -> str:
    return str(problem).partition("\n")[0]


def _plain(value: object, name: str, root: object, path: tuple[str | int, ...] = ()) -> Any:
    """Return plain values: whatever YAML can say beyond them is refused."""
    if len(path) > 8:  # noqa: PLR2004  # twice what the format has; an alias may lead back to itself
        raise ConfigurationError(f"{name}, line {_line(root, path)}: nested too deep; see docs/reference/queue-yaml.md")
    if isinstance(value, CommentedMap | CommentedSeq) and value.tag.value is not None:
        raise ConfigurationError(f"{name}, line {_line(root, path)}: a tag has no place here; remove it")
    if isinstance(value, CommentedMap):
        return {_key(key, name, root, path): _plain(item, name, root, (*path, key)) for key, item in value.items()}
    if isinstance(value, CommentedSeq):
        return [_plain(item, name, root, (*path, number)) for number, item in enumerate(value)]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    raise ConfigurationError(f"{name}, line {_line(root, path)}: a {type(value).__name__} has no place here; remove it")


def _key(key: object, name: str, root: object, path: tuple[str | int, ...]) -> str:
    if not isinstance(key, str):
        raise ConfigurationError(f"{name}, line {_line(root, path)}: {key!a} is not the name of anything; correct it")
    return str(key)


def _line(document: object, path: Sequence[str | int]) -> int:
    """Return the line, from 1, of the innermost part of ``path`` that the document has."""
    line = 0
    for part in path:
        if isinstance(document, CommentedMap) and part in document:
            place = document.lc.key
        elif isinstance(document, CommentedSeq) and isinstance(part, int) and part < len(document):
            place = document.lc.item
        else:
            break
        try:
            line = place(part)[0]
        except (KeyError, TypeError):  # an alias, or a node with a tag, has no line of its own
            break
        document = document[part]
    return line + 1
