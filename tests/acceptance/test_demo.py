"""``safedefer demo``: the first command of the README, on a part of the files."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("more", [(), pytest.param(("--kill",), marks=pytest.mark.nightly)], ids=["", "kill"])
def test_the_demonstration_runs_and_everything_holds(more):
    run = subprocess.run(
        [sys.executable, "-m", "safedefer", "demo", "--tasks", "60", *more],
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "60 deferred, 60 succeeded, 0 failed, 0 lost" in run.stdout
    assert run.stdout.count("attack      refused") == 4
    assert run.stdout.endswith("everything held\n")
