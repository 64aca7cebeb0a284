"""Why a task does not run, in sentences for people: its token, its time, its queue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from safedefer.claims import Claims
from safedefer.dashboard.managed import Managed
from safedefer.dispatcher.signed_route import difference
from safedefer.errors import RejectedTask
from safedefer.queues.base import TaskState, TaskView
from safedefer.queues.rates import QueueControl

#: Seconds for which a due task may wait without a word about it.
_LATE: Final = 30.0
#: Characters of an error's last line.
_MOST_TEXT: Final = 300

_DEATHS: Final = {
    "retry-limit": "It failed as often as its retry limit allows.",
    "age-limit": "It failed until it was older than its age limit.",
    "retry-and-age-limit": "It failed until both its retry limit and its age limit were over.",
    "exception": "It raised an error that ends a task.",
    "permanent-task-failure": "It raised PermanentTaskFailure: it asked not to be tried again.",
    "expired-task": "Its time was over before it could run.",
    "poison": "The process that ran it died, several times in a row.",
    "unreadable": "What is stored of it cannot be read.",
    "bad-signature": "Its signature does not match: the token was changed, or a key of the same name differs.",
    "unknown-key": "No key of the handler's ring signed it.",
    "revoked-key": "The key that signed it is revoked.",
    "policy-violation": "The policy of the handler does not name its callable.",
    "wrong-audience": "It is for another environment, queue, target or URL than the handler's.",
    "unreachable": "Its target could not be reached.",
    "deadline-exceeded": "It ran longer than its deadline.",
}
_TRIES: Final = {
    **_DEATHS,
    "exception": "Its last attempt raised an exception; the attempts below have the traceback.",
    "unreachable": "Its target does not answer: look whether the handler runs.",
    "busy": "The handler, or a proxy before it, had no room for it.",
    "lease-expired": "The process that ran it stopped in the middle.",
    "no-response": "Its target took it, and gave no answer.",
}


@dataclass(frozen=True, slots=True)
class Obstacle:
    """A sentence on why a task does not run."""

    level: Literal["bad", "warn", "info"]
    text: str


def read_claims_of(app: Managed, view: TaskView) -> tuple[Claims | None, str]:
    """Return what one of our keys signed of a task, or None and why its token is not believed."""
    if not view.token:
        return None, "its token is no longer stored"
    try:
        claims = app.authenticate(view.token)
    except RejectedTask as error:
        return None, f"{error.slug}: {error}"
    if claims["jti"] != view.id:
        return None, "the token is that of another task"
    return claims, ""


def obstacles(
    app: Managed, view: TaskView, claims: Claims | None, control: QueueControl | None, *, now: float
) -> list[Obstacle]:
    """Return why a task does not run now, the gravest first; nothing for one that ended well."""
    if view.state in {TaskState.SUCCEEDED, TaskState.CANCELLED}:
        return []
    found = []
    error = last_error(view)
    if view.state is TaskState.DEAD:
        found.append(Obstacle("bad", f"Dead: {_DEATHS.get(view.reason or '', 'it will not be tried again.')}"))
    if error:
        found.append(Obstacle("bad" if view.state is TaskState.DEAD else "warn", f"Its last error: {error}"))
    found += _of_the_token(app, view, claims)
    if view.state is not TaskState.DEAD:
        ends = view.expires if claims is None else claims["exp"]
        if ends < now:
            found.append(
                Obstacle("bad", "Expired: its time is over, and it becomes a dead letter when it is delivered.")
            )
    if view.state is TaskState.WAITING:
        found += _of_the_queue(view, control, now)
        found += _of_the_time(view, found, now)
    if view.state is TaskState.RUNNING:
        found.append(Obstacle("info", "A dispatcher has taken it: it runs, or is on its way."))
    return found


def _of_the_token(app: Managed, view: TaskView, claims: Claims | None) -> list[Obstacle]:
    if claims is None:
        _, why = read_claims_of(app, view)
        return [Obstacle("bad", f"Its token is refused: {why}.")]
    try:
        app.verify(view.token, expired=True)
    except RejectedTask as error:
        return [Obstacle("bad", f"Its token is refused here: {error.slug}: {error}.")]
    # A dead letter runs again as its token says, whatever is stored.
    what = difference(view, claims)
    if what is not None and view.state is not TaskState.DEAD:
        return [Obstacle("bad", f"Its row was changed: the {what} that is stored is not the one that was signed.")]
    return []


def _of_the_queue(view: TaskView, control: QueueControl | None, now: float) -> list[Obstacle]:
    if control is None:
        return []
    found = []
    if control.paused or control.limits.rate == 0:
        found.append(Obstacle("bad", f"Its queue {view.queue} is paused; resume it under Queues."))
    elif control.held_until > now:
        found.append(
            Obstacle(
                "warn",
                f"Its queue {view.queue} is held for {control.held_until - now:.0f} s more: a handler asked for that.",
            )
        )
    elif control.limits.max_concurrent is not None or control.limits.rate is not None:
        found.append(Obstacle("info", f"Its queue has limits: {limits_text(control)}."))
    return found


def _of_the_time(view: TaskView, found: list[Obstacle], now: float) -> list[Obstacle]:
    if view.eta > now:
        return [Obstacle("info", "Not due yet.")]
    if view.reason is not None:
        said = _TRIES.get(view.reason, f"The last try ended with {view.reason}.")
        return [Obstacle("warn", f"Waits for its next try. {said}")]
    if now - view.eta > _LATE and not any(each.level == "bad" for each in found):
        return [Obstacle("warn", "It is due, and nobody has taken it: look whether a dispatcher runs for this queue.")]
    return []


def last_error(view: TaskView) -> str:
    """Return the type and the first line of the text of the newest exception, as they were redacted when they were recorded.

    Empty if there is none. Below that line may be more lines of the text, and notes: the last one seldom says what is wrong.
    """
    record = view.records[-1] if view.records else None
    if record is None or record.outcome == "succeeded":
        return ""
    kind = record.exception_type or ""
    # Where the exception is a group of some, each line of the traceback stands behind a bar.
    lines = [line.lstrip(" |+") for line in (record.traceback or "").strip().splitlines()] or [kind]
    heads = tuple(name + end for name in {kind, kind.removeprefix("builtins.")} - {""} for end in (":", " ("))
    named = [line for line in lines if line.startswith(heads) or f"{line}:" in heads]
    error = (named or lines)[-1].rstrip()
    return error if len(error) <= _MOST_TEXT else f"{error[:_MOST_TEXT]}…"


def limits_text(control: QueueControl) -> str:
    """Return the limits of a queue in words."""
    limits = control.limits
    words = [] if limits.rate is None else [f"{limits.rate:g} a second, bucket {limits.bucket_size}"]
    words += [] if limits.max_concurrent is None else [f"at most {limits.max_concurrent} at once"]
    return ", ".join(words) or "none"
