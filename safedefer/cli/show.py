"""One task as text for people: what it calls with which arguments, and its attempts. Nothing of the user's is imported."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

from safedefer.app import App
from safedefer.claims import Claims, callable_name, split_audience
from safedefer.cli.common import missing_file, summary
from safedefer.cli.terminal import is_terminal
from safedefer.cli.text import plain, relative, span, time_text
from safedefer.errors import PermanentTaskFailure, RejectedTask
from safedefer.ledger import AttemptRecord
from safedefer.queues.base import TaskState, TaskView
from safedefer.task import VerifiedPointer, VerifiedTask

#: Characters of a call, and of a traceback, that are shown.
_CALL: Final = 2_000
_TRACEBACK: Final = 20_000


def document(view: TaskView, *, dead: bool) -> dict[str, Any]:
    """Return what ``--json`` prints of a task."""
    more = {"retry_options": dict(view.retry_options)} if dead else {}
    return {
        **summary(view),
        "headers": dict(view.headers),
        **more,
        "attempts": [record._asdict() for record in view.records],
    }


def wants_text(*, as_json: bool, as_text: bool) -> bool:
    """Whether a task is shown as text: on a terminal, or because that was asked. JSON is for programs."""
    return as_text or (not as_json and is_terminal(sys.stdout))


def lines(app: App, view: TaskView) -> Iterator[str]:
    """Give the lines that show a task. No line has a control character."""
    now = time.time()
    state = str(view.state)
    if view.state is TaskState.WAITING and view.due is not None:
        state += f", due {_when(view.due, now)}"
    yield f"id        {plain(view.id)}"
    yield f"state     {state}"
    if view.reason:
        yield f"reason    {plain(view.reason)}"
    yield f"queue     {plain(view.queue)}" + (f", target {plain(view.target)}" if view.target != "default" else "")
    if view.name is not None:
        yield f"name      {plain(view.name)}"
    yield f"deferred  {_when(view.created, now)}"
    yield f"eta       {_when(view.eta, now)}"
    if view.ended is not None:
        yield f"ended     {_when(view.ended, now)}"
    yield f"call      {_call(app, view)}"
    yield from (f"header    {plain(name)}: {plain(value)}" for name, value in view.headers.items())
    yield f"attempts  {view.attempts}"
    for number, record in enumerate(view.records, 1):
        yield ""
        yield _attempt(number, record, now)
        yield from _traceback(record.traceback)


def token_lines(verified: VerifiedTask | VerifiedPointer) -> Iterator[str]:
    """Give the lines that show a verified token."""
    claims, now = verified.claims, time.time()
    environment, queue, target, url = split_audience(claims["aud"])
    yield f"id        {claims['jti']}"
    if isinstance(verified, VerifiedPointer):
        yield f"call      in a stored token of {claims['blob']['length']} bytes, which is not there"
    else:
        yield f"call      {call_text(claims)}"
    yield f"signed by {verified.identity.kid}, {_when(claims['iat'], now)}"
    yield f"for       environment {environment}, queue {queue}, target {target}, URL {url}"
    if claims.get("name") is not None:
        yield f"name      {claims['name']}"
    yield f"due       {_when(claims['nbf'], now)}"
    yield f"{'expired' if claims['exp'] < now else 'expires'}   {_when(claims['exp'], now)}"
    for name in ("deadline", "retry", "retry_of", "root", "headers", "trace"):
        if (value := claims.get(name)) is not None:
            yield f"{name:9} {plain(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))}"


def _when(seconds: float, now: float) -> str:
    return f"{relative(seconds, now)} ({time_text(seconds)})"


def _attempt(number: int, record: AttemptRecord, now: float) -> str:
    what = [record.outcome, record.exception_type or record.reason or ""]
    what += [] if record.status is None else [f"HTTP {record.status}"]
    took = max(record.ended - record.started, 0.0)
    how_long = f"{took:.3f} s" if took < 60 else span(took)  # noqa: PLR2004  # seconds of a minute
    said = ", ".join(plain(each) for each in what if each)
    return f"{number}. {_when(record.started, now)}, took {how_long}: {said}"


def _traceback(text: str | None) -> Iterator[str]:
    shown = (text or "")[:_TRACEBACK]
    yield from (f"    {plain(line)}" for line in shown.splitlines())
    if text is not None and len(text) > _TRACEBACK:
        yield f"    ... {len(text) - _TRACEBACK} more characters; --json has them"


def _call(app: App, view: TaskView) -> str:
    """Return the call that the token says, if it verifies; it may be anybody's else."""
    if not view.token:
        return f"{plain(view.callable_name)} (its token is not kept, so its arguments are not known)"
    try:
        verified = app.verify(view.token, expired=True)
        if isinstance(verified, VerifiedPointer) and missing_file(app) is None:
            with contextlib.suppress(PermanentTaskFailure):
                verified = app.follow(verified, expired=True)
    except RejectedTask as error:
        return f"{plain(view.callable_name)} by the storage, which nobody signed; the token says nothing: {error.slug}: {plain(error)}"
    if isinstance(verified, VerifiedPointer):
        return f"{plain(view.callable_name)} by the storage; the stored token is gone"
    return call_text(verified.claims)


def call_text(claims: Claims) -> str:
    """Return the call of a verified token, with arguments as the wire has them."""
    name = callable_name(claims["call"])
    if claims["cty"] == "pickle":
        return f"{plain(name)}(...) with pickled arguments, which are not read here"
    words = [_value(each) for each in claims["args"]]
    words += [f"{key}={_value(value)}" for key, value in claims["kwargs"].items()]
    if "bound" in claims["call"]:
        name = f"{name} of {_value(claims['call']['bound'])}"
    text = f"{name}({', '.join(words)})"
    more = len(text) - _CALL
    return plain(text[:_CALL]) + (
        f" ... {more} more characters; `safedefer inspect --json` prints them" if more > 0 else ""
    )


def _value(tree: Any) -> str:
    """Return a typed value as the wire has it: nothing is decoded."""
    return json.dumps(tree, ensure_ascii=False)
