"""The demonstration's two processes, a handler and a dispatcher, started as a user would start them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

#: Short: the tasks that a killed process had leased are due again soon.
LEASE: Final = "4"


class Processes:
    """``safedefer serve`` and ``safedefer dispatch``; one that dies is started again.

    Args:
        folder: Where their logs go.
        settings: The ``SAFEDEFER_*`` variables.
        say: Called with a line when a process has died.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str], say: Callable[[str], None]) -> None:
        self._folder = folder
        # Old sources warn about their own syntax when they are parsed.
        self._environment = {**os.environ, **settings, "PYTHONWARNINGS": "ignore"}
        self._say = say
        self._port = "0"
        self.url: str = ""
        self._handler = self._start_handler()
        self._dispatcher = self._start_dispatcher()

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        with (self._folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "safedefer", *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment,
            )

    def _start_handler(self) -> subprocess.Popen[str]:
        process = self._start("handler", "serve", "--port", self._port)
        assert process.stdout is not None
        self.url = process.stdout.readline().strip()
        if not self.url:
            process.wait()
            raise RuntimeError(f"the handler did not start:\n{self.log('handler')}")
        self._port = self.url.rpartition(":")[2]
        return process

    def _start_dispatcher(self) -> subprocess.Popen[str]:
        return self._start("dispatcher", "dispatch", "--to", self.url, "--lease", LEASE, "--concurrency", "8")

    def tend(self) -> None:
        """Restart the processes that have died."""
        if self._handler.poll() is not None:
            self._say(f"the handler ended ({self._handler.returncode}); starting it again")
            self._handler = self._start_handler()
        if self._dispatcher.poll() is not None:
            self._say(f"the dispatcher ended ({self._dispatcher.returncode}); starting it again")
            self._dispatcher = self._start_dispatcher()

    def kill(self) -> None:
        """Send SIGKILL to both."""
        for process in (self._handler, self._dispatcher):
            process.kill()
            process.wait()

    def stop(self) -> bool:
        """Send SIGTERM to both, the dispatcher first; whether both then ended well."""
        ended = []
        for process in (self._dispatcher, self._handler):
            process.terminate()
            try:
                ended.append(process.wait(30) == 0)
            except subprocess.TimeoutExpired:
                process.kill()
                ended.append(False)
            if process.stdout is not None:
                process.stdout.close()
        return all(ended)

    def log(self, name: str) -> str:
        """Return the end of what a process logged."""
        path = self._folder / f"{name}.log"
        return path.read_text(errors="replace")[-2_000:] if path.exists() else ""
