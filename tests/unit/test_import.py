"""What ``import safedefer`` does before anything else."""

import subprocess
import sys

import pytest

from tests.acceptance.processes import ROOT

IMPORT = """
import os, sys
os.name = {name!r}
try:
    import safedefer
    safedefer.App
except ImportError as error:
    print(error)
print(sorted(name for name in sys.modules if name.startswith(("safedefer.", "aiohttp", "apsw", "pydantic"))))
"""


@pytest.mark.parametrize("name", ["nt", "java"])
def test_a_system_that_is_not_posix_is_refused_with_the_remedy_before_anything_is_loaded(name):
    code = IMPORT.format(name=name)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    message, loaded = done.stdout.splitlines()
    assert f"safedefer runs on POSIX systems only (Linux, macOS, BSD), and this is {name!r}" in message
    assert message.endswith("on Windows, run it in WSL 2 or in a Linux container")
    assert loaded == "[]"


def test_posix_is_welcome():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT.format(name="posix")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (loaded,) = done.stdout.splitlines()
    assert "'safedefer.app'" in loaded
