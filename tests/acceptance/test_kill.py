"""kill -9 in the middle of the work: no task is lost, and the ledger explains every one that ran twice."""

import random
import time
from collections import Counter

from safedefer.queues.base import TaskState
from safedefer.queues.sqlite.queue import SQLiteQueue
from tests.ports import ReservedPort

TASKS = 300
#: From this one on they go on until we let go: something runs at the last kill, and something is left after it.
FIRST_HELD = 200


def defer_all(project):
    project.python(
        "import shop_tasks as t\n"
        "from safedefer.deferred import current_app\n"
        f"calls = [((t.work, t.work_async)[n % 2] if n < {FIRST_HELD} else t.held, (n,), {{}}) for n in range({TASKS})]\n"
        "current_app().defer_many(calls)\n"
    )


def one_is_held(project):
    return any(project.folder.glob("started-*"))


def finished(project):
    queue = SQLiteQueue(project.folder / "tasks.db")
    try:
        waiting = queue.tasks(states=[TaskState.WAITING, TaskState.RUNNING], limit=1)
        return not waiting
    finally:
        queue.close()


def check(project):
    """Every task left its row; one that left two was begun again, and its attempts say so."""
    counted = Counter(project.results())
    assert set(counted) == set(range(TASKS))
    queue = SQLiteQueue(project.folder / "tasks.db")
    try:
        views = [queue.find(view.id) for view in queue.tasks(states=[TaskState.SUCCEEDED], limit=10_000)]
        assert len(views) == TASKS
        assert queue.tasks(states=[TaskState.DEAD]) == []
        begun_again = sum(len(view.records) > 1 for view in views)
        for view in views:
            assert [record.outcome for record in view.records].count("succeeded") == 1
    finally:
        queue.close()
    repeated = {number: count for number, count in counted.items() if count > 1}
    print(f"{len(repeated)} tasks ran twice, {begun_again} were begun again")
    assert len(repeated) <= begun_again
    return begun_again


def test_killing_handler_and_dispatcher_loses_no_task(project, request):
    chance = random.Random(7)
    project.environment["SAFEDEFER_LEASE_SECONDS"] = "1"
    kept = ReservedPort()
    request.addfinalizer(kept.close)
    port = str(kept.number)
    server, url = project.start("serve", "--port", port)
    options = ("dispatch", "--to", url, "--lease", "1", "--concurrency", "8")
    dispatcher, _ = project.start(*options, wait_for_line=False)
    defer_all(project)
    for wanted, victim in ((25, "dispatcher"), (50, "server"), (75, "dispatcher"), (None, "server")):
        project.until(lambda wanted=wanted: one_is_held(project) or (wanted and len(project.results()) > wanted))
        time.sleep(chance.random() / 20)
        if victim == "server":
            server.kill()
            server.wait()
            server, again = project.start("serve", "--port", port)
            assert again == url
        else:
            dispatcher.kill()
            dispatcher.wait()
            dispatcher, _ = project.start(*options, wait_for_line=False)
    assert len(project.results()) <= FIRST_HELD
    project.let_go()
    # A run that was killed is believed alive for as long as the ledger's lease lasts.
    project.until(lambda: finished(project))
    assert check(project) > 0
    assert project.terminate(dispatcher)[0] == 0
    assert project.terminate(server)[0] == 0
