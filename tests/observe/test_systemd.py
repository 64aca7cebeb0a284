"""What systemd is told, over a real datagram socket of Unix."""

import asyncio
import contextlib
import os
import secrets
import socket

import pytest

from safedefer.observe.systemd import Systemd


@pytest.fixture(params=["path", "abstract"])
def listener(request, tmp_path):
    """A socket as systemd has it, and its address as ``NOTIFY_SOCKET`` says it."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@safedefer-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(name.replace("@", "\0", 1) if name.startswith("@") else name)
        server.settimeout(30)
        yield server, name


def test_the_start_and_the_stop_are_datagrams_of_their_own(listener):
    server, name = listener
    systemd = Systemd.take_from({"NOTIFY_SOCKET": name})
    systemd.ready()
    systemd.stopping()
    assert server.recv(4096).split(b"\n")[0] == b"READY=1"
    assert server.recv(4096).split(b"\n")[0] == b"STOPPING=1"


async def test_the_watchdog_is_fed_while_the_event_loop_turns(listener):
    server, name = listener
    systemd = Systemd.take_from({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "30000", "WATCHDOG_PID": str(os.getpid())})
    assert systemd.watchdog_seconds == 0.03
    async with systemd.service():
        for _ in range(3):
            assert await asyncio.to_thread(server.recv, 4096) == b"WATCHDOG=1"
    server.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            assert server.recv(4096) == b"WATCHDOG=1"
    await asyncio.sleep(0)
    with pytest.raises(BlockingIOError):
        server.recv(4096)


async def test_without_a_watchdog_nothing_is_sent(listener):
    server, name = listener
    async with Systemd.take_from({"NOTIFY_SOCKET": name}).service():
        await asyncio.sleep(0)
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.recv(4096)


def test_what_this_process_starts_is_not_the_service():
    environment = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "HOME": "/"}
    Systemd.take_from(environment)
    assert environment == {"HOME": "/"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"NOTIFY_SOCKET": "relative"},
        {"NOTIFY_SOCKET": ""},
        {"NOTIFY_SOCKET": "vsock:2:1234"},
        {"WATCHDOG_USEC": "30000"},
    ],
)
def test_where_systemd_does_not_ask_nothing_is_sent(environment):
    systemd = Systemd.take_from(dict(environment))
    assert (systemd.send("READY=1"), systemd.watchdog_seconds) == (False, None)


@pytest.mark.parametrize("watchdog", [
    {"WATCHDOG_USEC": "30000", "WATCHDOG_PID": "1"},
    {"WATCHDOG_USEC": "0"},
    {"WATCHDOG_USEC": "soon"},
    {"WATCHDOG_USEC": "²"},
    {"WATCHDOG_USEC": "-5"},
])  # fmt: skip
def test_a_watchdog_of_another_process_or_of_no_time_is_not_fed(watchdog):
    assert Systemd.take_from({"NOTIFY_SOCKET": "/run/x", **watchdog}).watchdog_seconds is None


@pytest.mark.parametrize("name", ["/nowhere/at/all", "@nobody-" + "0" * 16, "/" + "x" * 200])
def test_a_systemd_that_is_not_there_hurts_nothing(name):
    assert Systemd(name).send("READY=1") is False


def test_a_systemd_that_does_not_read_hurts_nothing(listener):
    """Its socket is full: the event loop must not wait for it."""
    systemd = Systemd(listener[1])
    sent = [systemd.send("WATCHDOG=1") for _ in range(2_000)]
    assert (sent[0], sent[-1]) == (True, False)


async def test_a_state_that_the_full_socket_did_not_take_is_sent_again(listener):
    """A service whose READY=1 is lost is ended at its start, though it runs; beats may be lost, a state may not."""
    server, name = listener
    systemd = Systemd.take_from({"NOTIFY_SOCKET": name})
    while systemd.send("WATCHDOG=1"):
        pass
    async with systemd.service():
        systemd.ready()
        systemd.stopping()
        async with asyncio.timeout(30):
            while (said := await asyncio.to_thread(server.recv, 4096)) == b"WATCHDOG=1":
                pass
        assert said.split(b"\n")[0] == b"STOPPING=1"
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.recv(4096)


async def test_a_state_is_tried_a_last_time_at_the_end(listener):
    server, name = listener
    systemd = Systemd.take_from({"NOTIFY_SOCKET": name})
    while systemd.send("WATCHDOG=1"):
        pass
    async with systemd.service():
        systemd.stopping()
        assert server.recv(4096) == b"WATCHDOG=1"
    while (said := server.recv(4096)) == b"WATCHDOG=1":
        pass
    assert said.split(b"\n")[0] == b"STOPPING=1"
