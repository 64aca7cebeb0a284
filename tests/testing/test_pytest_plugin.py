"""The pytest plugin, in a pytest of its own."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from safedefer import deferred
from safedefer.testing import TestApp
from tests.testing import shop
from tests.testing.plugin import FILE, ROOT, plugin

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"

SHOP = """
import safedefer, secrets
from safedefer import Key, Keyring, Policy

app = safedefer.App(
    keyring=Keyring(Key("k1", secrets.token_bytes(32))), policy=Policy("shop"), queue="sqlite:///tasks.db"
)
OUTBOX = []

def send_receipt(order_id): OUTBOX.append(order_id)
async def send_later(order_id): OUTBOX.append(order_id)
def pay(order_id): app.options(countdown=60).defer(send_receipt, order_id)
"""

TESTS = """
import pytest, shop

def test_the_receipt_is_sent_in_a_minute(safedefer_app):
    shop.pay(42)
    safedefer_app.assert_deferred(shop.send_receipt, 42, countdown=60)
    assert safedefer_app.run_due() == []
    safedefer_app.clock.advance(60)
    safedefer_app.run_due()
    assert shop.OUTBOX == [42]

def test_it_begins_anew_for_every_test(safedefer_app):
    assert safedefer_app.deferred_tasks == []

@pytest.mark.asyncio
async def test_with_pytest_asyncio(safedefer_app):
    await shop.app.defer_async(shop.send_later, 1)
    await safedefer_app.run_due_async()
    shop.app.defer(shop.send_receipt, 2)
    safedefer_app.run_due()
    assert shop.OUTBOX[-2:] == [1, 2]
"""

NOTHING = """
import sys

def test_nothing_of_ours_is_imported():
    assert sorted(name for name in sys.modules if name.split(".")[0] == "safedefer") == []
    assert "safedefer_pytest" in sys.modules
"""


def run_pytest(folder, *arguments, autoload=False):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "SAFEDEFER_", "COV"))}
    more = {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    shutil.copy(FILE, folder / "safedefer_pytest.py")  # as the wheel installs it
    if not autoload:
        more["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder, env={**kept, **more}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_the_entry_point_makes_pytest_load_it_and_import_nothing_else(tmp_path):
    """By the metadata of a distribution as it is installed; other plugins are not loaded by it."""
    points = tomllib.loads(PROJECT.read_text())["project"]["entry-points"]["pytest11"]
    assert points == {"safedefer": "safedefer_pytest"}
    wheel = tomllib.loads(PROJECT.read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"safedefer/pytest_plugin.py": "safedefer_pytest.py"}
    info = tmp_path / "safedefer_plugin_test-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: safedefer-plugin-test\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[pytest11]\nsafedefer = safedefer_pytest\n")
    (tmp_path / "test_it.py").write_text(NOTHING)
    code, output = run_pytest(tmp_path, autoload=True)
    assert (code, "1 passed" in output) == (0, True), output


def test_its_fixture_is_the_app_of_the_ini_file(tmp_path):
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nsafedefer_app = shop:app\nasyncio_mode = strict\n")
    code, output = run_pytest(tmp_path, "-p", "safedefer_pytest", "-p", "pytest_asyncio.plugin")
    assert (code, "3 passed" in output) == (0, True), output
    assert not list(tmp_path.glob("tasks.db*"))


def test_without_settings_it_says_which():
    with pytest.raises(pytest.UsageError, match="safedefer_app = module:app"):
        plugin.app_by("", [])


@pytest.mark.parametrize("name", ["tests.testing.shop:nothing", "tests.testing.shop:DONE", "no_such_module:app", "a b"])
def test_an_app_that_is_none_is_a_usage_error(name):
    with pytest.raises(pytest.UsageError, match=r"App.*write module:app; set safedefer_app"):
        plugin.app_by(name, [])


def test_patterns_are_enough_for_the_functions_of_deferred():
    shop.DONE.clear()
    with plugin.app_by("", ["tests.testing.shop", "operator:add"]) as tasks:
        deferred.defer(shop.keep, 1)
        tasks.run_due()
    assert shop.DONE == [1]
    with plugin.app_by("tests.testing.shop:app", ["ignored"]) as tasks:
        assert isinstance(tasks, TestApp)
        assert tasks.app is shop.app
