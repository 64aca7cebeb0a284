"""Three small applications pass their own tests in the form of App Engine, RQ and Celery, and with safedefer after ``migrate-code``."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from safedefer.migrate.code import as_json, migrate_code

APPS = Path(__file__).parent / "apps"
#: Name, what is left to do by hand or refused, and the notes, in the copy but for its ``running.py``.
EXPECTED = {
    "app_engine": ([], []),
    "rq": ([], ["option-left-out"] * 3 + ["retries"] * 2),
    "celery": ([], ["option-left-out"] * 2 + ["retries"] * 2 + ["task-option"] * 2),
}
TESTS = {"app_engine": 5, "rq": 3, "celery": 3}


def own_tests(folder, python=sys.executable):
    """Run the tests of an application in a process of its own, and return how many there were."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SAFEDEFER_", "PYTHON"))}
    path = [str(folder / "sdk")] if (folder / "sdk").exists() and python == sys.executable else []
    path += [str(Path(__file__).parents[2])] if python == sys.executable else []
    done = subprocess.run(
        [python, "-m", "unittest"], cwd=folder, env={**kept, "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stderr.partition("Ran ")[2].partition(" ")[0])


@pytest.mark.parametrize("name", TESTS)
def test_an_application_passes_its_tests_in_its_original_form(name):
    python = os.environ.get("APP_ENGINE_PYTHON", sys.executable) if name == "app_engine" else sys.executable
    assert own_tests(APPS / name, python) == TESTS[name]


@pytest.mark.parametrize("name", TESTS)
def test_an_application_passes_its_tests_with_safedefer_after_migrate_code(tmp_path, name):
    copy = tmp_path / name
    shutil.copytree(APPS / name, copy, ignore=shutil.ignore_patterns("sdk", "__pycache__"))
    shutil.copy(APPS / "after/running.py", copy)
    reports = migrate_code([str(copy)], write_files=True)
    notes = [note for report in reports for note in report.notes]
    left = [f"{note.code}: {note.text}" for note in notes if note.level != "note"]
    assert (left, sorted(note.code for note in notes if note.level == "note")) == EXPECTED[name]
    assert own_tests(copy) == TESTS[name]
    again = as_json(migrate_code([str(copy)], write_files=True))
    assert again["totals"]["changed"] == 0
    sources = "".join(path.read_text() for path in copy.rglob("*.py"))
    assert "from google.appengine" not in sources
    assert ".delay(" not in sources
    assert ".enqueue" not in sources
    json.dumps(again)
