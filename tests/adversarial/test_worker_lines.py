"""A task that has found the line between its worker process and the supervisor, or the listening socket that all share."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from safedefer.cli.supervisor import Supervisor, SupervisorOptions, _Worker, listen


class Silent:
    """Shows nothing."""

    def left(self, worker: object) -> None: ...

    def heard(self, worker: object, word: bytes, argument: bytes) -> bool:
        return False


@pytest.fixture
def listener():
    listener, _ = listen("127.0.0.1", 0)
    with listener:
        yield listener


def supervisor(listener) -> Supervisor:
    return Supervisor([], listener, "", SupervisorOptions(hang_seconds=0.1), Silent())


@pytest.mark.parametrize("line", [b"beat abc", b"beat", b"beat nan", b"beat 1e9", b"beat \xff", b"hello", b"", b"\0"])
async def test_what_is_no_line_of_a_worker_is_no_sign_of_life_and_harms_nothing(listener, line):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        worker = _Worker(1, "owner", SimpleNamespace(pid=1), ours, 0.0, 0.0, 0.0)
        theirs.sendall(line + b"\n")
        assert supervisor(listener)._hear(worker)
        assert (worker.heard, worker.began) == (0.0, False)
        theirs.sendall(b"beat 0.01\n")
        assert supervisor(listener)._hear(worker)
        assert worker.heard > 0.0


async def test_a_line_without_an_end_does_not_fill_the_memory(listener, monkeypatch):
    monkeypatch.setattr("safedefer.cli.supervisor._LINE_BYTES", 1_000)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        worker = _Worker(1, "owner", SimpleNamespace(pid=1), ours, 0.0, 0.0, 0.0)
        for _ in range(10):
            theirs.sendall(b"x" * 600)
            supervisor(listener)._hear(worker)
            assert len(worker.rest) <= 1_000


async def test_a_listening_socket_that_a_task_has_shut_down_listens_again(listener, caplog):
    """It was refused from then on by all workers, each of which wrote 10,000 lines a second."""
    watch = asyncio.create_task(supervisor(listener)._watch())
    listener.shutdown(socket.SHUT_RDWR)
    assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    deadline = time.monotonic() + 60
    while not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    watch.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watch
    assert caplog.text.count("shut the listening socket down") == 1


def test_a_supervisor_that_stands_still_keeps_no_beat_from_the_timer():
    """A beat that waited for room in the line ended its process by the timer that is set anew before each."""
    code = """
import contextlib, os, socket, time
from safedefer.cli.worker import Worker

line, supervisor = socket.socketpair()
line.setblocking(False)
with contextlib.suppress(BlockingIOError):
    while True:
        line.send(b"x")
line.setblocking(True)
worker = Worker(line, socket.socket(), 8.0, "owner", [])
time.sleep(0.5)  # it beats at once
os._exit(worker._writing.locked())
"""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    assert subprocess.run([sys.executable, "-c", code], env=bare, timeout=120, check=False).returncode == 0
