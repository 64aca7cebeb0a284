"""A refused call runs no code of the classes that nobody admitted: not to refuse it, and not to say what else is missing."""

import sys
from collections import defaultdict
from types import ModuleType

import attr
import pytest

from safedefer import Policy
from safedefer.errors import NotDeferrable, UnencodableArgument
from tests import sample_tasks as tasks
from tests.unit.apps import make_app
from tests.zoo import loud


@pytest.fixture
def app():
    app = make_app(policy=Policy("tests.sample_tasks"))
    yield app
    app.close()


def refused(app, *args):
    with pytest.raises((NotDeferrable, UnencodableArgument)) as caught:
        app.defer(*args)
    assert app.queue.tasks() == []
    return caught.value


#: Where the objects of every base are, each day; those of object are everywhere.
EVERY_DAY = ("list", "dict_key", "set", "argument_of_an_error")
CASES = [
    pytest.param(base, place, id=f"{base.__name__}-{place}", marks=() if base is object or place in EVERY_DAY else pytest.mark.nightly)
    for base in loud.BASES
    for place in loud.PLACES
]  # fmt: skip


@pytest.mark.parametrize(("base", "place"), CASES)
def test_no_hook_of_a_class_runs_while_the_message_is_put_together(app, base, place):
    ran = {}
    for hook in loud.HOOKS:
        cls = loud.loud(base, hook)
        try:
            value = loud.PLACES[place](loud.objects(base, hook, 66 if place in loud.MANY else 3), cls)
        except TypeError:  # such objects have no hash
            continue
        loud.RAN.clear()
        # The first is refused whatever the others are: they are looked at for the message alone.
        error = refused(app, tasks.take, object(), loud.Level.LOW, value)
        assert f"{loud.__name__}:Level" in error.missing
        if loud.RAN:
            ran[hook] = list(loud.RAN)
    assert ran == {}


def test_no_module_is_imported_for_what_says_another_module_than_its_own(app, tmp_path, monkeypatch):
    (tmp_path / "nobody_imported_this.py").write_text("raise SystemExit\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    cls = type("Elsewhere", (), {"__module__": "nobody_imported_this"})

    def elsewhere(): ...

    elsewhere.__module__, elsewhere.__qualname__ = "nobody_imported_this", "elsewhere"
    error = refused(app, tasks.take, object(), cls, cls(), elsewhere, [cls(), loud.Level.LOW])
    assert error.missing == (f"{loud.__name__}:Level",)
    assert "nobody_imported_this" not in sys.modules


class _Elsewhere:
    def method(self): ...

    def __call__(self): ...

    @classmethod
    def make(cls): ...


@pytest.mark.parametrize("make", [
    lambda cls: cls().method, lambda cls: cls.make, lambda cls: defaultdict(cls), lambda cls: defaultdict(cls()), lambda cls: {cls(), 1},
    lambda cls: {cls(): 1, 2: 3}, lambda cls: type("Heir", (cls, list), {"__module__": cls.__module__})().append,
], ids=["method", "class method", "factory", "object as a factory", "set", "keys", "method of the base"])  # fmt: skip
def test_no_module_is_imported_for_the_class_of_what_is_held(app, tmp_path, monkeypatch, make):
    (tmp_path / "nobody_imported_this.py").write_text("raise SystemExit\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    cls = type("Elsewhere", (_Elsewhere,), {"__module__": "nobody_imported_this"})
    error = refused(app, tasks.take, object(), make(cls), loud.Level.LOW)
    assert f"{loud.__name__}:Level" in error.missing
    assert "nobody_imported_this" not in sys.modules


@attr.s(slots=True)
class Asking:
    """attrs makes it a ``__getstate__``, which its own objects do without and those of a derived class do not."""

    ran = []
    a = attr.ib(default=1)

    def __getattribute__(self, name):
        Asking.ran.append(name)
        return object.__getattribute__(self, name)


class Derived(Asking):
    pass


def test_a_hook_that_a_library_made_for_a_base_does_not_run_for_what_is_derived_from_it():
    app = make_app(policy=Policy("tests.sample_tasks", f"{__name__}:Derived"))
    value = Derived()
    Asking.ran.clear()
    error = refused(app, tasks.take, object(), value, loud.Level.LOW)
    assert Asking.ran == []
    assert set(error.missing) == {f"{__name__}:Asking", f"{loud.__name__}:Level"}
    app.close()


def test_the_hooks_of_the_table_tell_when_they_run():
    for hook in ("__hash__", "__bool__", "__class__", "__getstate__"):
        each = loud.objects(object, hook, 1)[0]
        loud.RAN.clear()
        {
            "__hash__": hash,
            "__bool__": bool,
            "__class__": lambda value: isinstance(value, ModuleType),
            "__getstate__": lambda value: value.__getstate__(),
        }[hook](each)
        assert loud.RAN == [hook]
