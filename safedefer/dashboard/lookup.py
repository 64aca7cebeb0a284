"""Search among tasks: bounded looks at the newest rows of a state; how many stand on a page, and how many one button acts on."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final
from urllib.parse import urlencode

from safedefer.claims import split_audience
from safedefer.dashboard.access import Access
from safedefer.dashboard.arguments import search_text
from safedefer.dashboard.managed import Managed
from safedefer.errors import RejectedTask
from safedefer.queues.base import DeadFilter, Position, TaskState, TaskView

ROWS: Final = 50
"""Tasks on a page."""
LOOKED_AT: Final = 5_000
"""Rows that one request looks at, at most."""
BULK: Final = 500
"""Dead letters that one button acts on, at most."""
#: Seconds that one request looks, at most: rows may have megabytes.
_SECONDS: Final = 1.0
#: Rows of one call of the queue.
_AT_ONCE: Final = 250
_DEAD_AT_ONCE: Final = 50
_MOST_TEXT: Final = 200
_ID: Final = re.compile(r"[A-Za-z0-9_-]{16,64}")
_LAST_SECOND: Final = 253_402_300_799.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskQuery:
    """What the page of tasks is asked for; its URL says all of it."""

    state: TaskState = TaskState.WAITING
    text: str = ""
    queue: str = ""
    since: float | None = None
    before: float | None = None
    after: Position | None = None

    @classmethod
    def read(cls, values: Mapping[str, str]) -> TaskQuery:
        """Return the query of a URL; what cannot be read is left out."""
        states = {str(state): state for state in TaskState}
        return cls(
            state=states.get(values.get("state", ""), TaskState.WAITING),
            text=values.get("q", "").strip()[:_MOST_TEXT],
            queue=values.get("queue", "").strip()[:_MOST_TEXT],
            since=read_time(values.get("since", "")),
            before=read_time(values.get("before", "")),
            after=read_position(values.get("after", "")),
        )

    def url(self, **changes: Any) -> str:
        """Return the relative URL of this page, or of one that differs so."""
        values = {
            "state": str(self.state),
            "q": self.text,
            "queue": self.queue,
            "since": time_field(self.since),
            "before": time_field(self.before),
            "after": "" if self.after is None else write_position(self.after),
        } | {name: str(value) for name, value in changes.items()}
        return f"tasks?{urlencode({name: value for name, value in values.items() if value})}"

    def matches(self, view: TaskView, search: Callable[[], str]) -> bool:
        """Whether a task is what is asked for; ``search`` returns the text of its arguments."""
        if self.queue and view.queue != self.queue:
            return False
        at = view.created if view.ended is None else view.ended
        if (self.since is not None and at < self.since) or (self.before is not None and at >= self.before):
            return False
        wanted = self.text.casefold()
        return not wanted or (
            any(wanted in text.casefold() for text in (view.id, view.name or "", view.callable_name, view.reason or ""))
            or wanted in search().casefold()
        )


@dataclass(slots=True)
class FoundTasks:
    """Tasks that a look has found."""

    tasks: list[TaskView] = field(default_factory=list)
    looked_at: int = 0
    after: Position | None = None
    """Where the next page goes on; None: there are no more."""


def find_tasks(
    app: Managed, query: TaskQuery, access: Access, *, monotonic: Callable[[], float] = time.monotonic
) -> FoundTasks:
    """Look for tasks among the newest ``LOOKED_AT`` of a state that are not yet seen; one of that very id is found in any state."""
    if _ID.fullmatch(query.text) and query.after is None:
        view = app.queue.find(query.text)
        if view is not None and access.may_read(view.queue):
            return FoundTasks([view], 1)
    found, position, end = FoundTasks(), query.after, monotonic() + _SECONDS
    while True:
        look = min(_AT_ONCE, LOOKED_AT - found.looked_at)
        page = app.queue.page(query.state, queue=query.queue or None, after=position, look=look)
        for task in page.tasks:
            view, found.after = task.view, task.position
            if access.may_read(view.queue) and query.matches(view, partial(_search_text, app, view, access)):
                found.tasks.append(view)
            found.looked_at += 1
            if len(found.tasks) == ROWS or monotonic() > end:
                is_last = page.after is None and task is page.tasks[-1]
                found.after = None if is_last else found.after
                return found
        if page.after is None:
            found.after = None
            return found
        found.looked_at += look - len(page.tasks)
        position = found.after = page.after
        if found.looked_at >= LOOKED_AT or monotonic() > end:
            return found


def _search_text(app: Managed, view: TaskView, access: Access) -> str:
    """Return the text of a task's arguments, of a token that one of our keys signed for a queue that may be seen."""
    if not view.token:
        return ""
    try:
        claims = app.authenticate(view.token)
    except RejectedTask:
        return ""
    return search_text(claims) if access.may_read(split_audience(claims["aud"])[1]) else ""


def all_dead(app: Managed, where: DeadFilter, after: Position | None = None) -> Iterator[TaskView]:
    """Yield the dead letters that a filter means, oldest first, some at a time."""
    while page := app.queue.dead_letters(where, after=after, limit=_DEAD_AT_ONCE):
        yield from page
        after = (page[-1].ended or 0.0, page[-1].id)


def bulk_ids(app: Managed, where: DeadFilter, access: Access) -> list[str]:
    """Return the ids of the oldest ``BULK`` dead letters that a filter means and that the person may act on."""
    ids: list[str] = []
    for view in all_dead(app, where):
        if access.may_act(view.queue):
            ids.append(view.id)
        if len(ids) == BULK:
            break
    return ids


def dead_filter(values: Mapping[str, str]) -> DeadFilter:
    """Return the filter that a URL or a form says."""
    return DeadFilter(
        queue=values.get("queue", "").strip() or None,
        reason=values.get("reason", "").strip() or None,
        callable_name=values.get("callable", "").strip() or None,
        since=read_time(values.get("since", "")),
        before=read_time(values.get("before", "")),
    )


def dead_values(where: DeadFilter) -> dict[str, str]:
    """Return a filter as fields of a URL or form."""
    values = {
        "queue": where.queue or "",
        "reason": where.reason or "",
        "callable": where.callable_name or "",
        "since": time_field(where.since),
        "before": time_field(where.before),
    }
    return {name: value for name, value in values.items() if value}


def read_time(text: str) -> float | None:
    """Return the time of a field: ``2026-11-29T08:30`` in UTC, or seconds since the epoch; None if it is none."""
    try:
        seconds = float(text) if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text) else _of_iso(text)
    except ValueError:
        return None
    return seconds if 0 <= seconds <= _LAST_SECOND else None


def _of_iso(text: str) -> float:
    found = datetime.fromisoformat(text[:40])
    return (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp()


def time_field(seconds: float | None) -> str:
    """Return a time as a field of a form: what ``datetime-local`` takes, in UTC."""
    if seconds is None:
        return ""
    found = datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)
    return found.isoformat(timespec="minutes" if not found.second and not found.microsecond else "microseconds")


def read_position(text: str) -> Position | None:
    """Return the position that a URL says; None if it says none."""
    number, dot, task_id = text[:120].partition("~")
    if not dot or re.fullmatch(r"-?[0-9]{1,20}(\.[0-9]{1,20})?(e\+?[0-9]{1,2})?", number) is None:
        return None
    return (float(number) if set(number) & set(".e") else int(number)), task_id


def write_position(position: Position) -> str:
    """Return a position as a part of a URL."""
    return f"{position[0]!r}~{position[1]}"
