"""Real servers of the examples, and the dispatcher that delivers to them, in processes of their own."""

import base64
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEY = f"k1:{base64.urlsafe_b64encode(bytes(range(7, 39))).decode().rstrip('=')}"
_SECONDS = 60


class Process:
    """A process whose output is read in a thread. It and what it started end with the context."""

    def __init__(self, folder, *command, **environment):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SAFEDEFER_", "DJANGO_"))}
        more = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "SAFEDEFER_KEYS": KEY, "HOME": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=folder, env={**kept, **more, **environment},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            self.lines.append(line)

    @property
    def output(self):
        return "".join(self.lines)

    def until(self, pattern):
        """Wait for a line, and return the match."""
        until(lambda: re.search(pattern, self.output) or self._process.poll() is not None, self)
        found = re.search(pattern, self.output)
        assert found is not None, self.output
        return found

    def ends(self):
        """Wait until it has ended by itself, well."""
        assert self._process.wait(_SECONDS) == 0, self.output

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            with contextlib.suppress(ProcessLookupError):  # children that it left
                os.killpg(self._process.pid, signal.SIGKILL)
            self._reader.join(_SECONDS)
            self._process.stdout.close()


def until(condition, process):
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen in time:\n{process.output}"
        time.sleep(0.02)


def post(url, data=b""):
    """Return status and text of a POST."""
    with urllib.request.urlopen(urllib.request.Request(url, data, method="POST"), timeout=_SECONDS) as answer:
        return answer.status, answer.read().decode()


def get(url):
    """Return the text of a page."""
    with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
        return answer.read().decode()


def copied(example, folder):
    """Copy an example; return its folder."""
    return Path(shutil.copytree(ROOT / "examples" / example, folder / example))
