"""A Django project with the Tasks backend, its settings, its command and its view; its own tests are run by Django."""

import os
import re
import subprocess
import sys

from tests.frameworks.django_project import FILES
from tests.frameworks.servers import KEY, ROOT


def test_tests_of_a_project_pass(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SAFEDEFER_", "DJANGO_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "django", "test", "--settings", "settings"],
        cwd=tmp_path, env={**kept, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))), "TEST_KEY": KEY},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"Ran (\d+) tests", done.stderr)[1]) == 38
    assert not list(tmp_path.glob("tasks.db*"))
