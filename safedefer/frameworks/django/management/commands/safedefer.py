"""``manage.py safedefer run``, and every other command of the command line, with the App of the project."""

from __future__ import annotations

import argparse
from typing import Any

from django.core.management.base import BaseCommand

from safedefer.cli import main


class Command(BaseCommand):  # type: ignore[misc]  # Django has no types
    """Passes its arguments to ``safedefer``."""

    help = "Run safedefer's command line for this project: manage.py safedefer run, tasks list, doctor, ..."
    requires_system_checks: tuple[str, ...] = ()
    requires_migrations_checks = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Take all arguments as they are."""
        parser.add_argument("arguments", nargs=argparse.REMAINDER, help="a command, and its arguments; --help after it")

    def handle(self, *_: Any, arguments: list[str], **__: Any) -> None:
        """Run the command. Raises ``SystemExit`` if it fails."""
        try:
            main.main(args=arguments or ["--help"], prog_name="manage.py safedefer")
        except SystemExit as end:
            if end.code:
                raise
