"""Modules that import when they are asked for an attribute (PEP 562): no token makes them do it."""

import sys
import zoneinfo
from pathlib import Path

import pytest

from safedefer.codecs import zones
from safedefer.errors import ConfigurationError, InvalidArguments, NotDeferrable, RejectedTask, UnresolvableCallable
from safedefer.policy import Policy
from safedefer.refs import CallableRef
from tests.adversarial import test_pickled
from tests.adversarial.finder import put_first
from tests.zoo.exactly import decode_one

PACKAGE = {
    "lazy_shop/__init__.py": (
        "import importlib\n"
        "def __getattr__(name):\n    return importlib.import_module('.' + name, __name__)\n"
        "def __dir__():\n    return []\n"
        "def send(): ...\n"
    ),
    "lazy_shop/hidden.py": "RAN = True\n",
    "lazy_shop/tasks.py": (
        "ASKED = []\n"
        "def __getattr__(name):\n    ASKED.append(name)\n    if name == 'late':\n        return send\n    return ['/']\n"
        "def send(): ...\n"
        "def __private__(): ...\n"
    ),
    "lazy_victim.py": "RAN = True\n",
}


@pytest.fixture(autouse=True)
def _shop(tmp_path, monkeypatch):
    for path, text in PACKAGE.items():
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("lazy_")]:
        del sys.modules[name]


def ref(module, qualname):
    return CallableRef(kind="function", module=module, qualname=qualname)


@pytest.mark.parametrize(("module", "name"), [
    ("lazy_shop", "__getattr__"), ("lazy_shop", "__dir__"), ("lazy_shop.tasks", "__getattr__"), ("lazy_shop.tasks", "__private__"),
])  # fmt: skip
@pytest.mark.parametrize("pattern", ["lazy_shop.*", ("lazy_shop", "lazy_shop.tasks")])
def test_what_a_module_has_for_python_is_no_task_at_either_end(module, name, pattern):
    policy = Policy(*((pattern,) if isinstance(pattern, str) else pattern))
    with pytest.raises(UnresolvableCallable, match=r"special function.*another name"):
        policy.load_callable(ref(module, name))
    with pytest.raises(NotDeferrable, match="special function") as caught:
        CallableRef.of(vars(sys.modules[module])[name])
    assert caught.value.reason == "dunder"
    assert "lazy_shop.hidden" not in sys.modules


def test_no_exact_pattern_makes_one_a_task():
    with pytest.raises(ConfigurationError, match="special function"):
        Policy("lazy_shop:__getattr__").load()


@pytest.mark.parametrize("name", ["late", "anything", "hidden"])
def test_a_name_that_only_the_module_s_getattr_knows_does_not_exist(name):
    policy = Policy("lazy_shop.*")
    for module in ("lazy_shop", "lazy_shop.tasks"):
        with pytest.raises(UnresolvableCallable, match="does not exist .no __getattr__ is asked"):
            policy.load_callable(ref(module, name))
    assert sys.modules["lazy_shop.tasks"].ASKED == []
    assert "lazy_shop.hidden" not in sys.modules


def test_the_module_s_own_functions_are_tasks_as_ever():
    policy = Policy("lazy_shop.*")
    for module in ("lazy_shop", "lazy_shop.tasks"):
        found = policy.load_callable(ref(module, "send"))
        assert CallableRef.of(found) == ref(module, "send")


# --- Time zones -------------------------------------------------------------------------------------------------------


@pytest.fixture
def finder(monkeypatch):
    return put_first(monkeypatch)


@pytest.mark.parametrize(
    "key", ["Nowhere/Else", "Nowhere", "x/y/z", "__main__", "Europe/Nowhere", "America/Nowhere/At_All"]
)
def test_a_time_zone_that_is_not_here_imports_nothing(finder, key):
    """``ZoneInfo`` imports ``tzdata.zoneinfo.Nowhere`` before it says that there is none."""
    with pytest.raises(InvalidArguments, match="install tzdata"):
        decode_one({"$zoneinfo": key})
    with pytest.raises(RejectedTask):
        unpickled_zone(key)
    assert not finder.asked


def unpickled_zone(key):
    named = b"\x8c\x08zoneinfo\x8c\x08ZoneInfo\x93"
    return test_pickled.load(test_pickled.wrap(test_pickled.call(named, test_pickled.text(key)))).args[0]


def test_a_time_zone_of_the_package_is_found_once_the_handler_has_started(monkeypatch, finder):
    monkeypatch.setattr(zoneinfo, "TZPATH", ())
    zones.load_zones()
    finder.asked.clear()
    for key in ("Pacific/Kiritimati", "America/Argentina/Salta", "Zulu"):
        assert decode_one({"$zoneinfo": key}).key == key
        assert unpickled_zone(key).key == key
    assert not finder.asked


def test_without_the_package_there_are_the_machines_zones(monkeypatch):
    monkeypatch.setattr(zones, "_PACKAGE", "there.is.no_tzdata")
    zones.load_zones()
    assert zones.has_zone("Europe/Paris") == any(Path(folder, "Europe/Paris").is_file() for folder in zoneinfo.TZPATH)
    assert not zones.has_zone("Europe/Nowhere")
