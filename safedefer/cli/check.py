"""``safedefer check``: a gate for deployments. Whether all that is declared and queued resolves in this code.

What is believed of a task is what its verified token says. A module is imported only if the policy, and the key that signed,
admit the reference. No argument is decoded, and nothing runs.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from typing import Any, Final

import click

from safedefer.app import App
from safedefer.cli.common import app_option, check_filter, json_text, load_app_to_look
from safedefer.cli.options import TEXT, Patterns, dead_pages, json_option, living
from safedefer.cli.references import prove
from safedefer.cli.terminal import Column, progress, show_table
from safedefer.cli.text import many, plain
from safedefer.errors import (
    CapabilityExceeded,
    ConfigurationError,
    Error,
    PermanentTaskFailure,
    PolicyViolation,
    RejectedTask,
    UnresolvableCallable,
)
from safedefer.keys import KeyState
from safedefer.policy_cache import Gate
from safedefer.queues.base import DeadFilter, PullQueue, TaskView
from safedefer.task import VerifiedPointer

#: References that are told apart, and verdicts that are remembered: somebody may have queued any number.
_MOST: Final = 1_000
_OTHERS: Final = "(others)"
#: What the code here decides, not the token's signature, time or audience.
_OURS: Final = PolicyViolation, CapabilityExceeded, UnresolvableCallable

_COLUMNS: Final = Column("REFERENCE"), Column("TASKS", right=True), Column("STATES"), Column("WHAT TO DO")


@dataclass(slots=True)
class Problem:
    """A reference that does not resolve."""

    what: str
    """``task``, ``pattern`` or ``key``."""
    name: str
    reason: str
    text: str
    states: Counter[str] = field(default_factory=Counter)
    """How many tasks have it, by their state."""
    example: str | None = None
    """The id of one of them."""

    def document(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "what": self.what,
            "name": self.name,
            "reason": self.reason,
            "text": self.text,
            "tasks": self.states.total(),
            "states": dict(self.states),
            "example": self.example,
        }


class Checking:
    """What was found so far. Its size does not grow with the number of tasks."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._problems: dict[tuple[str, str], Problem] = {}
        self._verdicts: dict[tuple[int, Any], Error | None] = {}
        self.unverified: Counter[str] = Counter()
        """Tasks of which nothing is known, since their tokens do not verify here, by the reason."""
        self.tasks: int = 0
        self.declared: int = 0

    @property
    def problems(self) -> Sequence[Problem]:
        """What does not resolve."""
        return [*self._problems.values()]

    def declarations(self) -> None:
        """Check every pattern of the policy, and those of the keys."""
        for pattern in self._app.policy.patterns:
            self.declared += 1
            try:
                self._app.policy.only(pattern).load()
                if pattern.endswith(".*") and not _is_there(pattern.removesuffix(".*")):
                    self._add(
                        "pattern", pattern, "names-nothing", "names nothing here; correct it, or deploy what it names"
                    )
            except Error as error:
                self._add("pattern", pattern, error.slug, str(error))
        for key in self._app.keyring.keys:
            if key.patterns is not None and key.state is not KeyState.REVOKED:
                self.declared += len(key.patterns)
                try:
                    self._app.policy.only(*key.patterns).resolve()
                except Error as error:
                    self._add("key", key.kid, error.slug, str(error))

    def task(self, view: TaskView) -> None:
        """Check one task."""
        self.tasks += 1
        try:
            verified = self._app.verify(view.token, expired=True)
            if isinstance(verified, VerifiedPointer):
                verified = self._app.follow(verified, expired=True)
        except _OURS as error:
            name = "" if error.identity is None else error.identity.callable_name
            self._add("task", name or "(a stored token)", error.slug, str(error), view)
        except (RejectedTask, PermanentTaskFailure, ConfigurationError) as error:
            self.unverified[error.slug] += 1
        else:
            refusal = self._verdict(verified.gate, verified.ref)
            if refusal is not None:
                self._add("task", str(verified.ref), refusal.slug, str(refusal), view)

    def _verdict(self, gate: Gate, ref: Any) -> Error | None:
        known = (id(gate), ref.parts)  # the App keeps its gates
        if known not in self._verdicts:
            if len(self._verdicts) >= _MOST:
                self._verdicts.clear()
            try:
                prove(gate, ref)
                self._verdicts[known] = None
            except RejectedTask as error:
                self._verdicts[known] = error
        return self._verdicts[known]

    def _add(self, what: str, name: str, reason: str, text: str, view: TaskView | None = None) -> None:
        if len(self._problems) >= _MOST and (name, reason) not in self._problems:
            name, text = _OTHERS, "more references than are told apart; correct those above first"
        problem = self._problems.setdefault((name, reason), Problem(what, name, reason, text))
        if view is not None:
            problem.states[view.state] += 1
            problem.example = problem.example or view.id

    def summary(self) -> str:
        """Return the line at the end."""
        count = len(self._problems)
        failed = f"{many(count, 'name')} that cannot be found or may not run" if count else "all resolve here"
        text = f"{many(self.declared, 'pattern')} and {many(self.tasks, 'task')}: {failed}"
        if self.unverified:
            reasons = ", ".join(f"{count} {slug}" for slug, count in self.unverified.most_common())
            text += f"; not looked at, since their tokens do not verify here: {reasons}"
        return text


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _import(module: str) -> None:
    try:
        import_module(module)
    except Exception as error:
        raise ConfigurationError(f"{module!a} cannot be imported ({type(error).__name__}); correct --import") from error


def _all(queue: PullQueue, queues: Sequence[str]) -> Iterator[TaskView]:
    for name in queues or (None,):
        yield from living(queue, Patterns(), of_queue=name)
        yield from chain.from_iterable(dead_pages(queue, DeadFilter(queue=name), Patterns()))


@click.command()
@app_option
@click.option("--queue", "queues", multiple=True, type=TEXT, help="Only tasks of this queue; repeatable.")
@click.option(
    "--import",
    "modules",
    multiple=True,
    type=TEXT,
    metavar="MODULE",
    help="Import this first, for its @deferrable marks; repeatable.",
)
@json_option
def check(*, app: str | None, queues: Sequence[str], modules: Sequence[str], as_json: bool) -> None:
    """Check that every reference of the queue and the policy resolves here. Exit status 1 if one does not.

    For a deployment, with the new code, before the old one stops. Looks at waiting, running and dead tasks.
    """
    loaded = load_app_to_look(app)
    check_filter(loaded, *queues)
    for module in modules:
        _import(module)
    checking = Checking(loaded)
    checking.declarations()
    with progress("checking tasks", None) as advance:
        for view in _all(loaded.queue, queues):
            checking.task(view)
            advance()
    problems = checking.problems
    if as_json:
        for problem in problems:
            click.echo(json_text(problem.document()))
    else:
        _say(problems, checking.summary())
    if problems:
        sys.exit(1)


def _say(problems: Sequence[Problem], summary: str) -> None:
    rows = [(each.name, each.states.total() or each.what, _states(each), each.text) for each in problems]
    if problems and show_table(_COLUMNS, rows, summary):
        return
    for each in problems:
        count = f"{many(each.states.total(), 'task')} ({_states(each)})" if each.states else each.what
        example = f"  for example {each.example}" if each.example else ""
        click.echo(plain(f"{each.name}  {count}  {each.reason}: {each.text}{example}"))
    click.echo(plain(summary))


def _states(problem: Problem) -> str:
    return ", ".join(f"{count} {state}" for state, count in problem.states.items())
