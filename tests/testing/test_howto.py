"""``docs/how-to/test-your-tasks.md``, followed literally: every fence is the file that its first line names."""

import base64
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.snippets import FENCE
from tests.testing.plugin import FILE

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/how-to/test-your-tasks.md"
#: What the page's reader has already: a Django project.
PROJECT = {
    "settings.py": """
SECRET_KEY = "of a test"
INSTALLED_APPS = ["orders"]
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "orders.db"}}
""",
    "orders/__init__.py": "",
    "orders/models.py": """
from django.db import models

class Order(models.Model):
    shipped = models.BooleanField(default=False)
""",
    "orders/tasks.py": """
import os
import safedefer
from safedefer import Keyring, Policy

app = safedefer.App(
    keyring=Keyring.from_text(os.environ["SAFEDEFER_KEYS"]), policy=Policy("orders.tasks"), queue="sqlite:///tasks.db"
)

def ship(pk):
    from orders.models import Order
    Order.objects.filter(pk=pk).update(shipped=True)
""",
    "shop/__init__.py": "",
}
KEY = f"k1:{base64.urlsafe_b64encode(bytes(range(7, 39))).decode().rstrip('=')}"
#: Frameworks whose parts are run where they are installed, with what their tests need, and compiled in any case.
OPTIONAL = {"fastapi": ("httpx", "httpx2"), "flask": ("werkzeug",)}


def fences():
    for found in FENCE.finditer(PAGE.read_text()):
        name = re.match(r"# ([\w/]+\.(?:py|ini))\n", found["text"])
        assert name is not None, f"a fence that names no file:\n{found['text']}"
        yield name[1], found["text"]


def is_there(module):
    return importlib.util.find_spec(module) is not None


def run(folder, *command):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "SAFEDEFER_"))}
    path = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    more = {"PYTHONPATH": os.pathsep.join(path), "SAFEDEFER_KEYS": KEY, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder, env={**kept, **more}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path):
    left_out = {name for name, needs in OPTIONAL.items() if not (is_there(name) and any(map(is_there, needs)))}
    for name, text in [*PROJECT.items(), *fences()]:
        if name.endswith(".py"):
            compile(text, name, "exec")
        if not any(name.endswith(f"_{each}.py") for each in left_out):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
    shutil.copy(FILE, tmp_path / "safedefer_pytest.py")  # as the wheel installs it
    yield tmp_path
    assert not list(tmp_path.glob("tasks.db*"))


def test_the_tests_of_the_page_pass(folder):
    # Loaded by the entry point in an installation.
    plugins = [each for name in ("safedefer_pytest", "pytest_asyncio.plugin") for each in ("-p", name)]
    output = run(folder, "pytest", "-q", *plugins, "-p", "no:cacheprovider", "tests")
    assert int(re.search(r"(\d+) passed", output)[1]) >= 18
    assert "skipped" not in output


def test_the_tests_of_its_django_project_pass(folder):
    assert "Ran 2 tests" in run(folder, "django", "test", "--settings", "settings", "orders")
