"""Tables, progress bars and live views, by rich, on a terminal only. The one module that imports rich (extra ``cli``).

Without a terminal, or without rich, nothing here prints: the commands then print their plain lines. Every text is shown as
it is: markup is off, and control characters are replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from safedefer.cli.text import plain

if TYPE_CHECKING:
    from rich.table import Table


class Column(NamedTuple):
    """A column of a table."""

    title: str
    right: bool = False
    """Aligned to the right: numbers."""
    whole: bool = False
    """Never broken into lines: ids, which are copied."""


def for_people() -> bool:
    """Whether standard output is a terminal, and rich is installed."""
    return is_terminal(sys.stdout) and find_spec("rich") is not None


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # it is None or closed
        return False


def show_table(columns: Sequence[Column], rows: Sequence[Sequence[object]], totals: str) -> bool:
    """Print a table with headers and a line of totals; False, and nothing is printed, where it is not for people."""
    if not for_people():
        return False
    from rich.console import Console  # noqa: PLC0415  # only who looks needs rich
    from rich.text import Text  # noqa: PLC0415

    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    console.print(table(columns, rows))
    console.print(Text(plain(totals), style="dim"))
    return True


def table(columns: Sequence[Column], rows: Sequence[Sequence[object]]) -> Table:
    """Return rich's table of some rows."""
    from rich.table import Table  # noqa: PLC0415  # as above
    from rich.text import Text  # noqa: PLC0415

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(
            Text(column.title),
            justify="right" if column.right else "left",
            no_wrap=column.whole,
            overflow="fold",
        )
    for row in rows:
        made.add_row(*(Text(plain(value)) for value in row))
    return made


@contextmanager
def progress(doing: str, total: int | None) -> Iterator[Callable[[], None]]:
    """Give a function that says that one more is done; it moves a bar on standard error where that is a terminal.

    Args:
        doing: Our own words, such as ``deleting``.
        total: How many there are, if that is known.
    """
    if not is_terminal(sys.stderr) or find_spec("rich") is None:
        yield lambda: None
        return
    from rich.console import Console  # noqa: PLC0415  # as above
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    shown = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*shown, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda: bar.advance(task)


def keep_showing(
    draw: Callable[[], tuple[Sequence[Column], Sequence[Sequence[object]], str]], wait: Callable[[], bool]
) -> None:
    """Redraw a table, and its line of totals, on the whole screen until ``wait`` returns False or Ctrl-C is pressed."""
    from rich.console import Console, Group  # noqa: PLC0415  # as above
    from rich.live import Live  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    def drawn() -> Group:
        columns, rows, totals = draw()
        return Group(table(columns, rows), Text(""), Text(plain(totals), style="dim"))

    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    with Live(drawn(), console=console, screen=True, auto_refresh=False) as live:
        while wait():
            live.update(drawn(), refresh=True)
