"""Beats that a worker process forges are ignored by its supervisor, with one warning."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from typing import cast

import pytest

from safedefer.cli.supervisor import Shows, Supervisor, SupervisorOptions, _Worker


class _Nothing:
    def heard(self, _worker: object, _word: bytes, _argument: bytes) -> bool:
        return False


@pytest.mark.parametrize("forged", [b"x", b"", b"nan", b"inf", b"-1", b"\xff", b"1 2"])
def test_a_malformed_beat_is_no_sign_of_life_and_is_logged_once(
    forged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither an error of the event loop nor a beat: the worker's next true beat counts again."""

    async def work() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs, socket.socket() as listener:
            ours.setblocking(False)
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
            await process.wait()
            supervisor = Supervisor([], listener, "", SupervisorOptions(), cast("Shows", _Nothing()))
            worker = _Worker(1, "owner", process, ours, 0.0, 0.0, 0.0)
            theirs.sendall(b"beat " + forged + b"\nbeat " + forged + b"\n")
            assert supervisor._hear(worker)
            assert (worker.heard, worker.began) == (0.0, False)
            theirs.sendall(b"beat 0.001\n")
            assert supervisor._hear(worker)
            assert worker.heard > 0 and worker.began

    with caplog.at_level(logging.WARNING, "safedefer"):
        asyncio.run(work())
    (record,) = caplog.records
    assert "malformed beat" in record.getMessage() and record.exc_info is None
