"""Orders in a database of their own, each with a transactional task; some are undone."""

from __future__ import annotations

import contextlib
import sqlite3
import sys

from safedefer import App
from tests.chaos.tasks import mark, note


class Undone(Exception):
    """The order is not wanted after all."""


def order(app: App, path: str, first: int, stop: int) -> None:
    """Order ``first <= n < stop``; every fourth is undone, every second commits by itself, every 50th is oversize."""
    with contextlib.closing(sqlite3.connect(path, timeout=30.0)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY)")
        connection.commit()
        for number in range(first, stop):
            note("try", number)
            own = number % 2 == 0
            with contextlib.suppress(Undone):
                if own:
                    connection.execute("BEGIN IMMEDIATE")
                with app.transaction(connection):
                    connection.execute("INSERT INTO orders VALUES (?)", (number,))
                    padding = "x" * 20_000 if number % 50 == 0 else ""
                    app.options(transactional=True).defer(mark, number, padding=padding)
                    if number % 4 == 3 and not own:
                        raise Undone
                if own and number % 4 == 2:
                    connection.rollback()
                elif own:
                    connection.commit()


if __name__ == "__main__":
    chosen = App.from_settings()
    order(chosen, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    chosen.close()
