"""A task with an effect in a database of its own, which it has exactly once."""

import sqlite3
from contextlib import closing

from safedefer.deferred import current_app

RAN = []


def charge(path):
    with closing(sqlite3.connect(path)) as connection, current_app().once(connection) as first:
        RAN.append(first)
        if first:
            connection.execute("INSERT INTO orders VALUES (1)")
    raise ValueError("after the effect")
