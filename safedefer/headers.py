"""HTTP headers between a dispatcher and a handler: their names, and how requests and answers are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

#: The media type of a token (RFC 7515, section 9.2.1), and the one of App Engine's library.
CONTENT_TYPE: Final = "application/jose"
CONTENT_TYPES: Final = frozenset({CONTENT_TYPE, "application/octet-stream"})
OUTCOME_HEADER: Final = "Safedefer-Outcome"
QUEUE_HEADER: Final = "X-AppEngine-QueueName"
RETRY_HEADER: Final = "X-AppEngine-TaskRetryCount"
#: Cloud Tasks sets it on every request that it pushes.
PUSH_HEADER: Final = "X-CloudTasks-TaskName"
#: Which attempt of the task this delivery is, from 1: deliveries that no handler took are no attempts.
ATTEMPT_HEADER: Final = "Safedefer-Attempt"


class Response(NamedTuple):
    """The answer of a handler."""

    status: int
    headers: dict[str, str]
    body: bytes


class Hints(NamedTuple):
    """The headers of a request that the handler reads. The values of a repeated header are joined, and match nothing."""

    encoding: str | None
    type: str | None
    queue: str | None
    retries: int
    pushed: bool = False
    """Whether a push engine sent it, which takes 503 as a reason to slow the whole queue."""
    attempt: int = 0
    """0 from a dispatcher that does not say."""


class AttemptHeaders(Mapping[str, str]):
    """The headers of one delivery, made when they are first read.

    Args:
        hints: The result of ``read_hints`` for these headers.
        make: Makes the headers.
    """

    __slots__ = ("_made", "_make", "hints", "ran", "retry")

    def __init__(self, hints: Hints, make: Callable[[], dict[str, str]]) -> None:
        self.hints: Hints = hints
        self.retry: Mapping[str, float] | None = None
        """The retry options that were signed with the task, noted by what verified the token; None: none were."""
        self.ran: Callable[[], None] | None = None
        """Called when the task's code has ended, and its end is still to be stored: another task may run meanwhile."""
        self._make = make
        self._made: dict[str, str] | None = None

    def _headers(self) -> dict[str, str]:
        if self._made is None:
            self._made = self._make()
        return self._made

    def __getitem__(self, name: str) -> str:
        return self._headers()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers())

    def __len__(self) -> int:
        return len(self._headers())


class Answer(NamedTuple):
    """The parts of a response that the dispatcher reads."""

    status: int
    outcome: str | None
    retry_after: str | None


_HINTS: Final = {
    "content-encoding": "encoding",
    "content-type": "type",
    QUEUE_HEADER.lower(): "queue",
    RETRY_HEADER.lower(): "retries",
    PUSH_HEADER.lower(): "pushed",
    ATTEMPT_HEADER.lower(): "attempt",
}
#: Names as our dispatcher writes them: for these no lower-case copy is made. None: the handler ignores the header.
_SPELLED: Final = {
    "Content-Type": "type",
    QUEUE_HEADER: "queue",
    RETRY_HEADER: "retries",
    ATTEMPT_HEADER: "attempt",
    "X-AppEngine-TaskName": None,
    "X-AppEngine-TaskExecutionCount": None,
    "X-AppEngine-TaskETA": None,
}


def read_hints(headers: Mapping[str, str]) -> Hints:
    """Read the headers of a request in one pass; their names may be in any case."""
    found: dict[str, str] = {}
    for name, value in headers.items():
        hint = _SPELLED[name] if name in _SPELLED else _HINTS.get(name.lower())
        if hint is not None:
            found[hint] = f"{found[hint]}, {value}" if hint in found else value
    get = found.get
    return Hints(
        get("encoding"), get("type"), get("queue"), _count(get("retries")), "pushed" in found, _count(get("attempt"))
    )


def _count(text: str | None) -> int:
    if text is None or text == "0":
        return 0
    return int(text) if _COUNT.fullmatch(text) else 0


_COUNT: Final = re.compile("[0-9]{1,9}")
_OUTCOME: Final = OUTCOME_HEADER.lower()


def read_answer(response: Response) -> Answer:
    """Read the headers of a response in one pass; proxies write their names in any case."""
    headers = response.headers
    if len(headers) == 1 and OUTCOME_HEADER in headers:
        return Answer(response.status, headers[OUTCOME_HEADER], None)
    lower = {name.lower(): value for name, value in headers.items()}
    return Answer(response.status, lower.get(_OUTCOME), lower.get("retry-after"))
