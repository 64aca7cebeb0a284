"""A PostgreSQL queue whose database has the time that a test says.

The queue goes by the database's clock, and the contract says what time it is. So ``now()`` is looked up in a schema
of the test's before PostgreSQL's own. Each change is a little later than the one before, and each look than the last
change, as in life: pgqueuer takes what is due *before* now.
"""

from __future__ import annotations

import psycopg

_TICK = 1e-6
#: They change nothing. Ticks are spared where they can be: some times are read back in milliseconds.
_LOOKS = ("controls", "next_due", "stats")

TABLES = (
    "pgqueuer", "pgqueuer_log", "controls", "names", "uniques", "blobs", "blob_totals", "progress", "dead", "ended",
    "ledger", "attempts", "kept", "copies",
)  # fmt: skip
"""What tests empty when they are over."""

CLOCK = """
CREATE SCHEMA clock;
CREATE TABLE clock.time (seconds double precision NOT NULL);
INSERT INTO clock.time VALUES (0);
CREATE FUNCTION clock.now() RETURNS timestamptz LANGUAGE sql STABLE AS
    'SELECT pg_catalog.to_timestamp(seconds) FROM clock.time';
"""
#: The ``search_path`` of a queue that goes by it.
CLOCKED_PATH = "clock,pg_catalog,safedefer"


class Clocked:
    """Passes every call on, having set the clock to the ``now`` of the call.

    ``ticks`` are those of the queue that was open before: opening it anew does not turn back the clock.
    """

    def __init__(self, inner, dsn, *, ticks=0):
        self._inner = inner
        self._setter = psycopg.connect(dsn, autocommit=True)
        self.ticks = ticks
        self.ledger = _At(inner.ledger, self)
        self.copies = _At(inner.copies, self)
        self.blobs = inner.blobs

    def set(self, now):
        if not self._setter.closed:
            self._setter.execute("UPDATE clock.time SET seconds = %s", (now,))

    def tick(self, now):
        self.ticks += 1
        self.set(now + self.ticks * _TICK)

    def look(self, now):
        self.set(now + (self.ticks + 1) * _TICK)

    def enqueue_many(self, tasks):
        for task in tasks[:1]:
            self.set(task.created)
        self._inner.enqueue_many(tasks)

    def replace_dead(self, task_id, task, letter, *, now):
        self.set(task.created)
        return self._inner.replace_dead(task_id, task, letter, now=now)

    def next_due(self, *, now, queues=None):
        self.look(now)
        due = self._inner.next_due(now=now, queues=queues)
        return None if due is None else round(due, 3)

    def close(self):
        self._setter.close()
        self._inner.close()

    def __getattr__(self, name):
        return _timed(self, getattr(self._inner, name))


class _At:
    def __init__(self, inner, clock):
        self._inner = inner
        self._clock = clock

    def __getattr__(self, name):
        return _timed(self._clock, getattr(self._inner, name))


def _timed(clock, attribute):
    if not callable(attribute):
        return attribute

    def call(*args, **kwargs):
        if "now" in kwargs:
            (clock.look if attribute.__name__ in _LOOKS else clock.tick)(kwargs["now"])
        return attribute(*args, **kwargs)

    return call
