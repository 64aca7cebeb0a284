"""``run`` and ``serve --processes``: a supervisor, its workers, and what happens to each of them."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time

import pytest

# ``hold`` keeps the interpreter in a loop of C, which nothing but SIGKILL ends; ``block`` keeps the event loop.
TASKS = """

def pid(number):
    (FOLDER / f"pid-{number}").write_text(str(os.getpid()))
    write(number)

def hold(number):
    (FOLDER / f"held-{number}-{os.getpid()}").touch()
    set().isdisjoint(range(10**18)) if False else {-1}.isdisjoint(range(10**18))

async def block(number, seconds):
    (FOLDER / f"blocked-{number}").touch()
    time.sleep(seconds)
    write(number)

def compute(number, loops):
    total = 0
    for n in range(loops):
        total += n * n
    write(number)

def pause(number):
    (FOLDER / f"paused-{number}-{os.getpid()}").touch()
    while not (FOLDER / "go").exists():
        time.sleep(0.05)
    with open(FOLDER / f"effect-{number}", "a") as file:
        file.write(f"{os.getpid()} ")
    write(number)

def defer_again(number):
    from safedefer import deferred

    deferred.defer(write, number)

def environment(number):
    (FOLDER / "environment").write_text("\\n".join(sorted(os.environ)))
    (FOLDER / "environment").rename(FOLDER / f"environment-{number}")
"""


@pytest.fixture
def project(project):
    path = project.folder / "shop_tasks.py"
    path.write_text(path.read_text() + TASKS)
    return project


def workers(process):
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False
    )
    return [int(line) for line in found.stdout.split()]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return not state.startswith("Z")


def defer(project, *calls):
    """Defer calls, in one process of their own."""
    project.python("import shop_tasks as t; from safedefer import defer; " + "; ".join(f"defer({c})" for c in calls))


def waits_for_its_task(process):
    """Return when it has said so: a second signal before it has heard the first would be one with it."""
    return any("waiting for 1 task" in line for line in process.stderr)


@pytest.mark.parametrize("command", ["run", pytest.param("serve", marks=pytest.mark.nightly)])
def test_the_url_is_printed_when_all_are_ready_and_sigterm_ends_them(project, command):
    process, url = project.start(command, "--port", "0", "--processes", "2")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
    pids = workers(process)
    assert len(pids) == 2
    status, out, err = project.terminate(process)
    assert (status, out) == (0, "")
    banner = rf"safedefer {command}: the queue is in .*/tasks\.db; environment test; .* in each of 2 processes\n"
    assert re.fullmatch(banner, err)
    assert not any(map(alive, pids))


def test_workers_share_the_queue_and_run_everything(project):
    process, _ = project.start("run", "--port", "0", "--processes", "2")
    project.python("import shop_tasks as t; from safedefer.deferred import current_app\n"
                   "current_app().defer_many([(t.work, (n,), {}) for n in range(100)])")  # fmt: skip
    project.until(lambda: len(project.results()) >= 100)
    assert project.results() == list(range(100))
    assert project.terminate(process)[0] == 0


def test_a_killed_worker_is_replaced_and_its_task_runs_again(project):
    project.environment["SAFEDEFER_LEASE_SECONDS"] = "1"
    process, _ = project.start("run", "--port", "0", "--processes", "2", "--lease", "1")
    defer(project, "t.held, 1")
    project.until(lambda: (project.folder / "started-1").exists())
    before = workers(process)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    project.until(lambda: len(set(workers(process)) - set(before)) == 2)
    project.let_go()
    project.until(lambda: project.results())
    status, _, err = project.terminate(process)
    assert status == 0
    assert err.count("ended with status 137; another one starts") == 2


def test_a_loop_that_stands_is_named_and_its_worker_replaced(project):
    project.environment["SAFEDEFER_LEASE_SECONDS"] = "1"
    process, _ = project.start("run", "--port", "0", "--processes", "2", "--lease", "1", "--hang-seconds", "2")
    pids = workers(process)
    defer(project, "t.block, 1, 600", "t.work, 2")
    project.until(lambda: (project.folder / "blocked-1").exists())
    project.until(lambda: 2 in project.results())
    project.until(lambda: set(workers(process)) != set(pids) and len(workers(process)) == 2)
    status, _, err = project.terminate(process)
    assert "gave no sign of life for 2 s and is ended" in err
    assert re.search(r"the event loop stands for [\d.]+ s, in .*block \(shop_tasks\.py:\d+\)", err)


def test_a_loop_of_c_that_holds_the_interpreter_is_ended_with_or_without_a_supervisor(project):
    project.environment["SAFEDEFER_LEASE_SECONDS"] = "1"
    process, _ = project.start("run", "--port", "0", "--processes", "2", "--lease", "1", "--hang-seconds", "2")
    first = workers(process)
    defer(project, "t.hold, 1")
    project.until(lambda: list(project.folder.glob("held-1-*")))
    held = int(min(project.folder.glob("held-1-*"), key=lambda path: path.stat().st_mtime_ns).name.split("-")[2])
    # The supervisor says what became of it before it starts another one.
    project.until(lambda: not alive(held) and not {*workers(process)} <= {*first})
    pids = workers(process)
    process.kill()
    # A frozen worker hears of nothing, and ends all the same.
    project.until(lambda: not any(map(alive, pids)))
    err = process.communicate()[1]
    # The supervisor and the worker's own timer wait equally long: on a busy machine the timer may be first.
    assert "gave no sign of life for 2 s and is ended" in err or "ended with status" in err
    assert re.search(r'shop_tasks\.py", line \d+ in hold', err), "its own timer says where"


def test_a_task_that_ends_each_process_takes_none_of_its_neighbours_with_it_for_long(project):
    project.environment["SAFEDEFER_LEASE_SECONDS"] = "1"
    defer(project, "t.hold, 1", *(f"t.slow, {number}, 0.05" for number in range(2, 17)))
    process, _ = project.start("run", "--port", "0", "--lease", "1", "--hang-seconds", "1")
    project.until(lambda: set(project.results()) == set(range(2, 17)))
    # Alone from its second loss on; where its neighbours were quick, that is still to come.
    project.until(lambda: len(list(project.folder.glob("held-1-*"))) >= 2)
    states = project.run("tasks", "list", "--json").stdout.decode().splitlines()
    assert [json.loads(line)["callable"].rpartition(":")[2] for line in states] == ["hold"], "and only it is left"
    process.kill()


def test_a_worker_whose_threads_do_not_return_is_replaced(project):
    (project.folder / "queue.yaml").write_text("queue:\n- name: default\n  rate: 100/s\n  attempt_deadline: 0.5\n")
    project.environment["SAFEDEFER_QUEUE_YAML"] = str(project.folder / "queue.yaml")
    process, _ = project.start("run", "--port", "0", "--drain", "1")
    pids = workers(process)
    defer(project, *(f"t.slow, {number}, 600" for number in range(4)))  # a quarter of 16
    project.until(lambda: not any(map(alive, pids)) and len(workers(process)) == 1)
    defer(project, "t.work, 7")
    project.until(lambda: project.results() == [7])
    status, _, err = project.terminate(process)
    assert status == 0
    assert "4 tasks go on past their deadlines in this process" in err
    assert "4 tasks still running; will be tried again" in err
    assert err.count("passed its deadline of 0.5 s and goes on, as it cannot be cancelled") >= 4


def test_a_second_signal_ends_at_once(project):
    process, _ = project.start("run", "--port", "0", "--processes", "2", "--drain", "280")
    pids = workers(process)
    defer(project, "t.held, 1")
    project.until(lambda: (project.folder / "started-1").exists())
    process.send_signal(signal.SIGINT)
    assert waits_for_its_task(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(100) == 130  # the task that runs would take minutes, and a drain too
    project.until(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize("command", ["serve", pytest.param("dispatch", marks=pytest.mark.nightly)])
def test_a_second_signal_ends_an_unsupervised_process_at_once(project, command):
    server, url = project.start("serve", "--port", "0", "--drain", "280")
    process = server
    dispatcher, _ = project.start("dispatch", "--to", url, "--drain", "280", wait_for_line=False)
    if command == "dispatch":
        process = dispatcher
    defer(project, "t.held, 1")
    project.until(lambda: (project.folder / "started-1").exists())
    process.send_signal(signal.SIGTERM)
    assert waits_for_its_task(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 143


def test_a_stop_lets_the_task_that_runs_end(project):
    process, _ = project.start("run", "--port", "0", "--processes", "2")
    defer(project, "t.held, 1")
    project.until(lambda: (project.folder / "started-1").exists())
    assert project.terminate(process, holds=True)[0] == 0
    assert project.results() == [1]


def test_workers_whose_supervisor_was_killed_let_their_tasks_end_and_go(project):
    process, _ = project.start("run", "--port", "0", "--processes", "2")
    pids = workers(process)
    defer(project, "t.held, 1")
    project.until(lambda: (project.folder / "started-1").exists())
    process.kill()
    time.sleep(0.3)  # they see that it is gone, and that a task runs
    project.let_go()
    project.until(lambda: not any(map(alive, pids)))
    assert project.results() == [1]


def test_a_worker_is_replaced_after_so_many_tasks(project):
    process, _ = project.start("run", "--port", "0", "--max-tasks", "5")
    first = workers(process)
    defer(project, *(f"t.pid, {n}" for n in range(6)))
    project.until(lambda: len(project.results()) >= 6)
    project.until(lambda: workers(process) and workers(process) != first)
    defer(project, *(f"t.pid, {n}" for n in range(6, 12)))
    project.until(lambda: len(project.results()) >= 12)
    pids = {path.read_text() for path in project.folder.glob("pid-*")}
    assert len(pids) >= 2
    status, _, err = project.terminate(process)
    assert status == 0
    # On a busy machine they are late, or their ends are not stored yet.
    said = [line for line in err.splitlines() if not re.search("tasks are late|^waiting for ", line)]
    assert len(said) == 1, "a replacement needs no word"
    assert said[0].startswith("safedefer run: the queue is in ")


def test_what_is_wrong_with_the_application_is_said_once(project):
    done = project.run("run", "nowhere:app", "--port", "0", "--processes", "2", check=False)
    assert done.returncode == 1
    assert 1 <= done.stderr.decode().count("the module nowhere is not found") <= 2
    assert b"Traceback" not in done.stderr


def test_a_task_sees_neither_that_it_runs_in_a_worker_nor_the_keys(project):
    process, _ = project.start("run", "--port", "0")
    defer(project, "t.environment, 1")
    project.until(lambda: (project.folder / "environment-1").exists())
    names = (project.folder / "environment-1").read_text().split()
    assert "PATH" in names
    assert "SAFEDEFER_WORKER" not in names
    assert "SAFEDEFER_KEYS" not in names, "nor does what a task starts inherit the keys"
    assert project.terminate(process)[0] == 0


def test_a_task_defers_another_though_the_keys_are_out_of_the_environment(project):
    process, _ = project.start("run", "--port", "0")
    defer(project, "t.defer_again, 7")
    project.until(lambda: project.results() == [7])
    assert project.terminate(process)[0] == 0


def test_a_worker_that_is_killed_before_it_is_ready_is_replaced(project):
    """The kernel kills a process that takes too much memory: that says nothing of the application."""
    path = project.folder / "shop_tasks.py"
    path.write_text(
        path.read_text()
        + "\nmarker = FOLDER / 'killed'\nif not marker.exists():\n    marker.touch()\n    os.kill(os.getpid(), 9)\n"
    )
    process, url = project.start("run", "--port", "0", "--processes", "2")
    assert url.startswith("http://")
    assert (project.folder / "killed").exists()
    assert "ended with status 137" in project.terminate(process)[2]


def test_a_frozen_worker_is_ended_and_replaced_and_its_task_has_one_effect(project):
    """SIGSTOP: the frozen process finds, when it is woken, that it is dead. Its neighbours go on meanwhile."""
    # A worker that a busy machine lets stand is ended before what it runs is begun again elsewhere.
    project.environment["SAFEDEFER_LEASE_SECONDS"] = "4"
    process, _ = project.start("run", "--port", "0", "--processes", "2", "--lease", "4", "--hang-seconds", "2")
    pids = workers(process)
    defer(project, *(f"t.pause, {n}" for n in range(8)))
    project.until(lambda: len(list(project.folder.glob("paused-*"))) == 8)
    frozen = int(next(project.folder.glob("paused-0-*")).name.rpartition("-")[2])
    os.kill(frozen, signal.SIGSTOP)
    (project.folder / "go").touch()
    project.until(lambda: not alive(frozen))
    project.until(lambda: len(workers(process)) == 2 and frozen not in workers(process))
    project.until(lambda: len(project.results()) == 8)
    with contextlib.suppress(ProcessLookupError):
        os.kill(frozen, signal.SIGCONT)
    status, _, err = project.terminate(process)
    assert status == 0
    assert f"(pid {frozen}) gave no sign of life for" in err
    assert set(pids) - {frozen}, "the other one lives"
    # The ledger has each task once; one that was frozen in the middle of its run began a second time.
    begun = [path.name.split("-")[1] for path in project.folder.glob("paused-*")]
    assert sorted(set(begun)) == [str(n) for n in range(8)]
    for n in range(8):
        assert len((project.folder / f"effect-{n}").read_text().split()) == 1, "its effect was had twice"
