"""Options that several commands share: texts, filters with patterns, and what is asked before much is changed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final, TypeVar

import click

from safedefer.cli.terminal import is_terminal
from safedefer.queues.base import DeadFilter, PullQueue, TaskView

_F = TypeVar("_F", bound=Callable[..., Any])

#: A row may have 2 MiB and its records.
_PAGE: Final = 50
_PATTERN: Final = frozenset("*?[")


class Text(click.types.StringParamType):
    """A text that a storage can hold. What the command line has beside UTF-8 arrives as lone surrogates."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text."""
        text = str(value)
        try:
            text.encode()
        except UnicodeEncodeError:
            self.fail("has bytes that are not UTF-8, which no id or name has; copy it from a list again", param, ctx)
        if "\0" in text:
            self.fail("has a NUL, which no id or name has; copy it from a list again", param, ctx)
        return text


TEXT: Final = Text()
"""The type of ids, names, queues and patterns."""

json_option: Final = click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
yes_option: Final = click.option("--yes", is_flag=True, help="Do not ask.")
dry_run_option: Final = click.option("--dry-run", is_flag=True, help="Say which and how many; change nothing.")


def pattern_options(command: _F) -> _F:
    """Add ``--name`` and ``--callable``."""
    options = (
        click.option("--name", "name", default=None, type=TEXT, help="Only tasks of this name; * and ? stand for others."),
        click.option("--callable", "callable_name", default=None, type=TEXT,
                     help="Only of this callable, module:name; * and ? stand for others: 'shop.*'."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class Patterns:
    """Which tasks are meant, by what the storage says of them."""

    name: str | None = None
    callable_name: str | None = None

    def __bool__(self) -> bool:
        """Whether anything is asked."""
        return self.name is not None or self.callable_name is not None

    def match(self, view: TaskView) -> bool:
        """Whether a task is meant."""
        return (self.name is None or fnmatchcase(view.name or "", self.name)) and (
            self.callable_name is None or fnmatchcase(view.callable_name, self.callable_name)
        )

    @property
    def exact_callable(self) -> str | None:
        """The callable, where the store can look for it itself."""
        given = self.callable_name
        return None if given is None or _PATTERN & {*given} else given


def living(queue: PullQueue, patterns: Patterns, *, of_queue: str | None = None) -> Iterator[TaskView]:
    """Give the waiting and running tasks that are meant, a page at a time."""
    after = 0
    while page := queue.live_tasks(queue=of_queue, after=after, limit=_PAGE):
        yield from (view for _, view in page if patterns.match(view))
        after = page[-1][0]


def dead_pages(queue: PullQueue, where: DeadFilter, patterns: Patterns) -> Iterator[list[TaskView]]:
    """Give the dead letters that are meant, a page at a time; one may be empty."""
    after: tuple[float, str] | None = None
    while page := queue.dead_letters(where, after=after, limit=_PAGE):
        yield [view for view in page if patterns.match(view)]
        after = (page[-1].ended or 0.0, page[-1].id)


def confirm(question: str, *, yes: bool) -> None:
    """Ask a person; a script says --yes.

    Raises:
        click.ClickException: Nobody can be asked.
        click.Abort: The answer is no.
    """
    if yes:
        return
    if not is_terminal(sys.stdin):
        raise click.ClickException(
            f"{question} Nobody can answer here, so nothing was changed; add --yes to the command"
        )
    click.confirm(question, abort=True, err=True)
