from __future__ import annotations

import contextlib
import os
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import apsw
import pytest

from safedefer.queues.sqlite.queue import SQLiteQueue
from tests.queues.contract import ids, make_task, take
from tests.queues.processes import run, start


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tasks.db"


@pytest.fixture
def queue(path):
    queue = SQLiteQueue(path)
    yield queue
    queue.close()


def in_child(action) -> int:
    """Run ``action`` in a forked child; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        action()
        status = 0
    finally:
        os._exit(status)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- Waking -------------------------------------------------------------------------------------


def test_an_enqueue_wakes_a_wait_of_another_process(queue, path, capsys):
    queue.enqueue_many([make_task()])
    waiter = start(
        """
        queue.wait(0)
        print("ready", flush=True)
        for _ in range(9):
            while not queue.wait(60): pass
            print(time.monotonic(), flush=True)
        """,
        path,
    )
    assert waiter.stdout.readline() == "ready\n"
    latencies = []
    for number in range(9):
        # Short and long pauses: looking is rarer after a while without a change.
        time.sleep(random.Random(number).uniform(0.01, 0.05) if number % 2 else 0.3)
        queue.enqueue_many([make_task()])
        stored = time.monotonic()
        latencies.append((float(waiter.stdout.readline()) - stored) * 1000)
    assert waiter.communicate(timeout=60)[1] == ""
    with capsys.disabled():
        print(f"\nwake-up across processes: median {statistics.median(latencies):.1f} ms, max {max(latencies):.1f} ms")
    assert statistics.median(latencies) < 10_000
    assert max(latencies) < 50_000


def test_what_another_dispatcher_settles_wakes_nobody(queue, path):
    queue.enqueue_many([make_task() for _ in range(20)])
    queue.wait(0)
    other = start(
        """
        for lease in take(queue, limit=20):
            queue.settle_many([(lease, DONE)], now=101.0)
        print("settled")
        """,
        path,
    )
    while other.poll() is None:
        assert queue.wait(0.2) is False
    assert queue.wait(0.2) is False
    assert other.communicate(timeout=60) == ("settled\n", "")


# --- Crashes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("acknowledged", [1, 40, 150])
def test_what_was_acknowledged_survives_kill_9(path, acknowledged):
    victim = start(
        """
        lock = threading.Lock()
        def give():
            while True:
                task = make_task(id=os.urandom(16).hex())
                queue.enqueue_many([task])
                with lock:
                    os.write(1, (task.id + "\\n").encode())
        for _ in range(4):
            threading.Thread(target=give).start()
        """,
        path,
    )
    lines = [victim.stdout.readline() for _ in range(acknowledged)]
    victim.kill()
    rest, _ = victim.communicate(timeout=60)
    # What readline() had read ahead is gone: the rest may begin within a line.
    told = {line.strip() for line in [*lines, *rest.splitlines(keepends=True)] if len(line) == 33 and line[-1] == "\n"}
    connection = apsw.Connection(str(path))
    assert connection.pragma("integrity_check") == "ok"
    connection.close()
    queue = SQLiteQueue(path)
    stored = ids(take(queue, limit=100_000))
    queue.close()
    assert len(told) >= acknowledged
    assert told <= set(stored)
    assert len(stored) == len(set(stored))


def test_a_killed_dispatchers_tasks_are_due_again(queue, path):
    queue.enqueue_many([make_task() for _ in range(5)])
    victim = start(
        """
        print(len(take(queue, limit=3, seconds=60)), flush=True)
        time.sleep(60)
        """,
        path,
    )
    assert victim.stdout.readline() == "3\n"
    victim.kill()
    victim.communicate(timeout=60)
    assert len(take(queue, now=159.0)) == 2
    assert len(take(queue, now=160.0)) == 3


# --- Several processes --------------------------------------------------------------------------


def test_two_processes_lease_every_task_once(queue, path):
    tasks = [make_task() for _ in range(500)]
    queue.enqueue_many(tasks)
    program = """
        queue.stats(now=0.0)
        print("ready", flush=True)
        sys.stdin.readline()
        leases = take(queue, limit=3)
        print("began", flush=True)
        sys.stdin.readline()
        while leases:
            assert all(queue.settle_many([(lease, DONE) for lease in leases], now=101.0))
            for lease in leases: print(lease.task.id)
            time.sleep(0.001)
            leases = take(queue, limit=3)
    """
    workers = [start(program, path) for _ in range(2)]
    assert [worker.stdout.readline() for worker in workers] == ["ready\n", "ready\n"]
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    assert [worker.stdout.readline() for worker in workers] == ["began\n", "began\n"]
    for worker in workers:
        worker.stdin.write("go on\n")
        worker.stdin.flush()
    answers = [worker.communicate(timeout=60) for worker in workers]
    assert [errors for _, errors in answers] == ["", ""]
    leased = [output.split() for output, _ in answers]
    assert sorted(leased[0] + leased[1]) == sorted(task.id for task in tasks)
    assert all(leased), "each has some before either goes on"


def test_processes_may_make_the_file_at_the_same_time(path):
    program = "sys.stdin.readline(); queue.enqueue_many([make_task(id=os.urandom(16).hex())])"
    givers = [start(program, path) for _ in range(4)]
    for giver in givers:
        assert giver.communicate("go\n", timeout=60) == ("", "")
    queue = SQLiteQueue(path)
    assert len(take(queue)) == 4
    queue.close()


# --- Forks --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_parent_and_children_enqueue_at_the_same_time(queue):
    expected: set[str] = set()
    lock = threading.Lock()
    stop = threading.Event()

    def give() -> None:
        while not stop.is_set():
            task = make_task(id=os.urandom(16).hex())
            queue.enqueue_many([task])
            with lock:
                expected.add(task.id)

    def child(names: list[str]) -> None:
        for task_id in names:
            queue.enqueue_many([make_task(id=task_id)])
            assert queue.find(task_id) is not None
            assert queue.wait(30.0)

    threads = [threading.Thread(target=give) for _ in range(3)]
    for thread in threads:
        thread.start()
    children = []
    for number in range(4):
        names = [f"child-{number}-{n:016}" for n in range(20)]
        children.append(in_child(lambda names=names: child(names)))
        with lock:
            expected.update(names)
    codes = [exit_code(pid) for pid in children]
    stop.set()
    for thread in threads:
        thread.join()
    assert codes == [0] * 4
    assert set(ids(take(queue, limit=100_000))) == expected


def test_who_used_the_connection_last_waits_for_a_fork_like_any_other(queue):
    # A lone caller had taken itself for somebody within its own operation, and was refused.
    queue.enqueue_many([make_task()])
    handle = queue._writer._handle
    held, let_go = threading.Event(), threading.Event()

    def fork_for_long() -> None:
        handle.before_fork()
        held.set()
        let_go.wait(60)
        handle.after_fork_in_parent()

    def enqueue_twice() -> None:
        queue.enqueue_many([make_task(id="first-of-this-thread")])
        forking.start()
        held.wait(60)
        assert not handle.in_use_here
        threading.Timer(0.2, let_go.set).start()
        queue.enqueue_many([make_task(id="second-of-this-thread")])

    forking = threading.Thread(target=fork_for_long)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(enqueue_twice).result(60)
    forking.join()
    assert {"first-of-this-thread", "second-of-this-thread"} <= set(ids(take(queue, limit=10)))


def test_a_child_keeps_its_tasks_when_its_parent_closes_the_queue(path):
    # A connection carried across the fork would let the parent remove the log that the child writes.
    queue = SQLiteQueue(path)
    queue.enqueue_many([make_task()])
    go, gone = os.pipe()

    def child() -> None:
        queue.enqueue_many([make_task(id="from-the-child-1")])
        os.read(go, 1)
        queue.enqueue_many([make_task(id="from-the-child-2")])

    pid = in_child(child)
    with contextlib.closing(SQLiteQueue(path)) as other:
        while other.find("from-the-child-1") is None:
            time.sleep(0.005)
    queue.enqueue_many([make_task()])
    queue.close()
    os.write(gone, b"x")
    assert exit_code(pid) == 0
    os.close(go)
    os.close(gone)
    again = SQLiteQueue(path)
    assert len(take(again)) == 4
    again.close()


def test_a_fork_leaves_no_connection_open_in_the_child(queue, path):
    queue.enqueue_many([make_task()])
    queue.stats(now=100.0)
    queue.wait(0)

    def child() -> None:
        for descriptor in range(256):
            with contextlib.suppress(OSError):
                status = os.fstat(descriptor)
                assert (status.st_dev, status.st_ino) not in files

    files = {(file.stat().st_dev, file.stat().st_ino) for file in path.parent.iterdir()}
    assert len(files) >= 3  # with the log, its index, and where there is one the bell
    assert exit_code(in_child(child)) == 0
    assert len(take(queue)) == 1


def test_a_program_without_threads_of_its_own_forks_without_a_warning(path):
    # Python 3.12 warns of a fork in a process that has several threads: ours has ended by then.
    output = run(
        """
        queue.enqueue_many([make_task(id="parent-0123456789")])
        pid = os.fork()
        queue.enqueue_many([make_task(id=f"{'parent' if pid else 'child'}-012345678")])
        if pid:
            assert os.waitpid(pid, 0)[1] == 0
            print(sorted(ids(take(queue))))
        """,
        path,
    )
    assert output == "['child-012345678', 'parent-012345678', 'parent-0123456789']\n"


def test_a_fork_that_python_does_not_know_of_is_refused(path):
    output = run(
        """
        import ctypes
        queue.enqueue_many([make_task()]); queue.stats(now=0.0)
        pid = ctypes.PyDLL(None).fork()
        for call in (lambda: queue.enqueue_many([make_task()]), lambda: queue.stats(now=0.0)):
            try: call()
            except QueueUnavailable as error: os.write(1, b"refused\\n" if "lazy-apps" in str(error) else b"?\\n")
            else: os.write(1, b"ok\\n")
        if not pid: os._exit(0)
        os.waitpid(pid, 0)
        """,
        path,
    )
    assert sorted(output.split()) == ["ok", "ok", "refused", "refused"]


def test_waiting_costs_little(path, capsys):
    output = run(
        """
        queue.enqueue_many([make_task()]); queue.wait(0); queue.wait(0.5)
        before = time.process_time(); queue.wait(2.0); print((time.process_time() - before) / 2.0)
        """,
        path,
    )
    with capsys.disabled():
        print(f"\nan idle wait takes {float(output):.2%} of a core")
    assert float(output) < 0.05
