"""The command line: the ``safedefer`` group, its log, and how errors become exit statuses. A command is imported when it is named.

``COMMANDS`` has the first sentence of each command's help, so that ``safedefer --help`` imports none of them.
"""

from __future__ import annotations

import errno
import select
import sys
from importlib import import_module
from typing import Any, Final, NamedTuple

import click
from click.shell_completion import CompletionItem

from safedefer import __version__
from safedefer.cli.text import plain
from safedefer.errors import Error


class Lazy(NamedTuple):
    """Where a command is."""

    module: str
    """In ``safedefer.cli``. The command has the name that it has on the command line."""
    help: str


COMMANDS: Final = {
    "check": Lazy("check", "Check that every reference of the queue and the policy resolves here."),
    "cloudtasks-emulator": Lazy("cloudtasks", "Emulate Google Cloud Tasks: the v2 REST API, on this machine."),
    "dashboard": Lazy("dashboard", "Show queues, tasks and dead letters in a browser, and act on them."),
    "dead": Lazy("dead", "Look at dead letters, run them again, export and delete them."),
    "demo": Lazy("more", "Defer one task for every file of Python's standard library, and attack the handler."),
    "dispatch": Lazy("processes", "Run the dispatcher: lease due tasks and POST them to a handler."),
    "doctor": Lazy("doctor", "Check keys, policy, queue, clock, environment and limits."),
    "explain": Lazy("explain", "Say whether NAME, a module:name, may be deferred, and why not."),
    "inspect": Lazy("more", "Verify TOKEN (- reads it from standard input) and print what it would do."),
    "keys": Lazy("keys", "Make and list keys."),
    "migrate": Lazy("more", "Make the tables of a queue's database, or bring them up to date."),
    "migrate-code": Lazy(
        "migrate_code",
        "Rewrite code that uses App Engine's deferred, RQ or Celery, and say what a person must look at.",
    ),
    "queues": Lazy("queues", "Look at queues, pause, resume and purge them."),
    "run": Lazy("processes", "Run handler and dispatcher together, in worker processes that a supervisor keeps."),
    "serve": Lazy("processes", "Run the handler: receive tasks by HTTP."),
    "tasks": Lazy("tasks", "Look at tasks, cancel them, re-run dead letters."),
    "top": Lazy("top", "Show what each queue does now: waiting, running, dead, lag, and tasks a second."),
}
"""The commands, by name."""


class _Group(click.Group):
    """Imports commands when they are named, and shows our errors as one line: the message says what to do."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = super().get_command(ctx, cmd_name)
        if found is None and cmd_name in COMMANDS:
            found = getattr(import_module(f"safedefer.cli.{COMMANDS[cmd_name].module}"), cmd_name.replace("-", "_"))
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = formatter.width - 6 - max(map(len, self.list_commands(ctx)))
        rows = []
        for name in self.list_commands(ctx):
            known = super().get_command(ctx, name)
            text = COMMANDS[name].help if known is None else known.get_short_help_str(width)
            rows.append((name, text))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        helps = {name: lazy.help for name, lazy in COMMANDS.items()}
        found = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        options = click.Command.shell_complete(self, ctx, incomplete)  # the group's own would import every command
        return [*(CompletionItem(name, help=helps.get(name)) for name in found), *options]

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Error as error:
            # A database quotes what is in it: names of tables, texts of triggers.
            raise click.ClickException(plain(" ".join(str(error).splitlines()))) from error
        except OSError as error:  # the port is taken, the host is not ours, the disk is full
            if isinstance(error, BrokenPipeError) and _output_is_closed():
                raise  # click ends the process without a word
            in_use = error.errno == errno.EADDRINUSE
            remedy = (
                "stop what listens there, or give another port: 0 takes a free one"
                if in_use
                else "correct that and start again"
            )
            raise click.ClickException(f"{error.strerror or error}; {remedy}") from error


def _output_is_closed() -> bool:
    """Whether the reader of standard output has left, as ``head`` does; a socket breaks with the same error."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # it is no file
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # errors are reported unasked
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="safedefer")
@click.option("--verbose", "-v", is_flag=True, help="Log every task.")
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True,
    help="The log on standard error: lines for people, or one JSON object a line.",
)  # fmt: skip
def main(*, verbose: bool, log_format: str) -> None:
    """Call Python functions later: signed tasks, a queue, and a handler."""
    # Here and not at the top: `--help` needs no log.
    from safedefer.observe.logs import configure_log  # noqa: PLC0415

    configure_log(verbose=verbose, as_json=log_format == "json")
