"""``safedefer demo``: the first command of the README, on a part of the files."""

import re
import signal
import subprocess
import sys
import urllib.request

import pytest


@pytest.mark.parametrize("more", [(), pytest.param(("--kill",), marks=pytest.mark.nightly)], ids=["", "kill"])
def test_the_demonstration_runs_and_everything_holds(more):
    run = subprocess.run(
        [sys.executable, "-m", "safedefer", "demo", "--tasks", "60", *more],
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "60 deferred, 60 succeeded, 0 failed, 0 lost" in run.stdout
    assert run.stdout.count("  refused: ") == 4
    assert run.stdout.count("nothing ran") == 4
    assert re.search(r"queue +\d+ tasks/s that do nothing", run.stdout)
    assert run.stdout.endswith("everything held\n")


def test_it_stays_up_with_the_dashboard_until_ctrl_c():
    with subprocess.Popen(
        [sys.executable, "-m", "safedefer", "demo", "--tasks", "5", "--serve"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as run:  # fmt: skip
        try:
            link = next(line for line in run.stdout if "/login?token=" in line).strip()
            with urllib.request.urlopen(link, timeout=60) as answer:
                assert answer.status == 200
            run.send_signal(signal.SIGINT)
            assert run.stdout.read().endswith("everything held\n")
            assert run.wait(60) == 0
        finally:
            run.kill()
