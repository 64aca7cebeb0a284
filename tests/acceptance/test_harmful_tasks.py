"""Tasks that harm the worker process in which they run: its neighbours, the supervisor and the stop of all do not suffer."""

import contextlib
import os
import resource
import signal
import socket
import threading

import pytest

from tests.acceptance.test_supervisor import alive, defer, workers

HARM = """
import signal, subprocess, threading

async def deafen(number):
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    write(number)

def leave(number):
    (FOLDER / "left").write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
    if os.fork() == 0:
        (FOLDER / "left-too.new").write_text(str(os.getpid()))
        (FOLDER / "left-too.new").rename(FOLDER / "left-too")
        time.sleep(1000)
    while not (FOLDER / "left-too").exists():
        time.sleep(0.01)
    write(number)

async def note():
    with open(FOLDER / "noted", "a") as file:
        file.write(".")

async def fork_in_loop(number):
    # The steps of these are ready when it forks: they are the parent's alone.
    noted = [asyncio.create_task(note()) for _ in range(50)]
    os.fork()
    await asyncio.sleep(0.05)
    await asyncio.sleep(0.05)
    with open(FOLDER / "forked", "a") as file:
        file.write(f"{os.getpid()} ")
    write(number)

def silence(number):
    sys.stderr = None
    time.sleep(1.2)  # some beats
    write(number if "safedefer-beat" in {thread.name for thread in threading.enumerate()} else -number)

async def block(number):
    (FOLDER / f"blocked-{number}").touch()
    time.sleep(600)

def linger(number):
    threading.Thread(target=time.sleep, args=(10**6,)).start()
    write(number)

def quit_once(number):
    if not (FOLDER / "quit").exists():
        (FOLDER / "quit").touch()
        os._exit(3)
    write(number)
"""


@pytest.fixture
def project(project):
    path = project.folder / "shop_tasks.py"
    path.write_text(path.read_text() + HARM)
    return project


def is_free(port):
    with contextlib.suppress(OSError), socket.socket() as again:
        again.bind(("127.0.0.1", port))
        return True
    return False


def test_tasks_that_harm_their_process_leave_nothing_behind(project):
    """Deaf to signals, without standard error, forked and with children: all is over soon after one SIGTERM."""
    process, url = project.start("run", "--port", "0", "--processes", "2", "--drain", "250", "--hang-seconds", "16")
    pids = workers(process)
    defer(project, "t.silence, 1", "t.leave, 2", "t.fork_in_loop, 3", "t.deafen, 4", "t.deafen, 5", "t.work, 6")
    project.until(lambda: len(project.results()) >= 6)
    assert project.results() == [1, 2, 3, 4, 5, 6], "a silent one has no beat, or a forked one went on"
    assert len((project.folder / "forked").read_text().split()) == 1
    assert len((project.folder / "noted").read_text()) == 50
    assert set(workers(process)) == set(pids), "none of it needs another worker"
    assert project.terminate(process)[0] == 0  # not after the 260 s in which a deaf worker would be killed
    left = [int((project.folder / name).read_text()) for name in ("left", "left-too")]
    project.until(lambda: not any(map(alive, [*pids, *left])))
    project.until(lambda: is_free(int(url.rpartition(":")[2])))  # unless another program was just given it


def test_a_worker_that_does_not_end_after_its_last_task_is_replaced(project):
    process, _ = project.start("run", "--port", "0", "--max-tasks", "1", "--hang-seconds", "2")
    (first,) = workers(process)
    defer(project, "t.linger, 1")
    project.until(lambda: not alive(first) and workers(process))
    defer(project, "t.work, 2")
    project.until(lambda: set(project.results()) == {1, 2})
    process.kill()


def test_a_worker_whose_loop_stands_ends_without_a_supervisor_too(project):
    process, _ = project.start("run", "--port", "0", "--hang-seconds", "2")
    pids = workers(process)
    defer(project, "t.block, 1")
    project.until(lambda: (project.folder / "blocked-1").exists())
    process.kill()
    project.until(lambda: not any(map(alive, pids)))


def test_a_task_that_ends_its_process_before_the_others_are_ready_ends_no_other(project):
    defer(project, "t.quit_once, 1")
    path = project.folder / "shop_tasks.py"
    path.write_text(
        path.read_text()
        + "\ntry:\n    (FOLDER / 'first').touch(exist_ok=False)\nexcept FileExistsError:\n"
        + "    while not (FOLDER / 'quit').exists():\n        time.sleep(0.02)\n"
    )
    project.environment["SAFEDEFER_LEASE_SECONDS"] = "1"
    process, url = project.start("run", "--port", "0", "--processes", "2", "--lease", "1")
    assert url.startswith("http://")
    project.until(lambda: project.results())
    status, _, err = project.terminate(process)
    assert status == 0
    assert err.count("ended with status 3") == 1


def test_a_worker_that_cannot_be_started_now_is_started_later(project):
    """Tasks may have used up all processes; here it is the descriptors that the supervisor may have."""
    process, _ = project.start("run", "--port", "0", "--processes", "2")
    said = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr))
    reader.start()
    before = workers(process)
    limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    os.kill(before[0], signal.SIGKILL)
    project.until(lambda: process.poll() is not None or any("cannot be started (OSError)" in line for line in said))
    assert process.poll() is None
    assert alive(before[1])
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)
    project.until(lambda: len(workers(process)) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    reader.join(60)
