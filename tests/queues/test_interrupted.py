"""Signal handlers that defer, in the middle of whatever their thread does: see ``interrupting``."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from safedefer import QueueUnavailable
from safedefer.queues.postgres.migrations import migrate
from tests import sample_tasks as tasks
from tests.postgres.server import fresh_database, shared_server
from tests.unit.apps import make_app


def interrupt_each_line(url: str, what: str, step: int = 1) -> int:
    """Return how many lines there were."""
    command = [sys.executable, "-m", "tests.queues.interrupting", url, what, str(step)]
    done = subprocess.run(command, timeout=150, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("what", ["defer", "first defer", "stats", "first stats", "fork"])
def test_a_handler_may_defer_at_any_line_of_a_call_on_sqlite(tmp_path, what):
    assert interrupt_each_line(f"sqlite:///{tmp_path}/tasks.db", what) > 50


@pytest.mark.parametrize(("what", "step"), [("defer", 1), ("first defer", 7)])  # to connect takes 50 ms
def test_a_handler_may_defer_at_any_line_of_a_call_on_postgres(what, step):
    server = shared_server()
    with fresh_database(server) as name:
        migrate(server.dsn(name))
        assert interrupt_each_line(server.dsn(name), what, step) > 50


@pytest.mark.parametrize("what", ["defer", "first defer"])
def test_a_handler_may_defer_at_any_line_of_a_call_in_memory(what):
    assert interrupt_each_line("memory://", what) > 50


def test_a_handler_that_comes_while_the_app_opens_its_queue_is_told_so(monkeypatch):
    app = make_app(queue="memory://")
    open_queue = app._open_queue

    def interrupted(address):
        with pytest.raises(QueueUnavailable, match="opens its queue"):
            app.defer(tasks.add, 1, 2)
        return open_queue(address)

    monkeypatch.setattr(app, "_open_queue", interrupted)
    app.defer(tasks.add, 1, 2)
    assert sum(stats.waiting for stats in app.queue.stats(now=0.0)) == 1
    app.close()


STORM = """
import signal, sys
from tests.queues.interrupting import app_of, tasks, waiting
app, done, depth = app_of(sys.argv[1]), [], []
app.defer(tasks.add, 1, 2)
def handle(*_):
    if len(depth) < 3:
        depth.append(1)
        app.defer(tasks.add, 1, 2)
        done.append(1)
        depth.pop()
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
for _ in range(500):
    app.defer(tasks.add, 1, 2)
signal.setitimer(signal.ITIMER_REAL, 0)
assert len(done) > 20
assert waiting(app) == 501 + len(done)
app.close()
"""


def test_a_storm_of_signals_whose_handler_defers_loses_and_stops_nothing(tmp_path):
    # coverage holds a lock of its own at some lines, which a handler that it measures waits for.
    unmeasured = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    command = [sys.executable, "-c", STORM, f"sqlite:///{tmp_path}/tasks.db"]
    subprocess.run(command, timeout=120, check=True, env=unmeasured)
