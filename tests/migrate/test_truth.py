"""What ``migrate-code`` says of a call site is what ``defer()`` does with it."""

import re
import sys
from types import ModuleType

import pytest

import safedefer
from safedefer import DeferError, Policy
from safedefer.migrate.notes import Level
from tests.migrate.test_shapes import SHAPES, run
from tests.unit.apps import make_app

RUNS = [
    shape
    for shape in SHAPES
    if re.search("^from safedefer import deferred", shape[1], re.MULTILINE) and shape[2] is None
]
#: Those that do not run by themselves: they are calls in functions that nothing calls, or are about another process.
CALLED = {"nested": "go()", "generator inside": "", "super": "A().m()", "request": "view(SimpleNamespace())", "handler's method": "H().post()",
          "main": None, "made aware": None, "main, through a function": None, "flask's request": None, "user": None, "static": "A().go()",
          **dict.fromkeys(("stored", "stored, made aware", "stored with a zone", "stored, in a name", "handler of Python 3",
                           "wrapped without deferred", "a deadline that is caught", "several deadlines", "tasks and queues beside", "keys of db"))}  # fmt: skip


@pytest.fixture
def given(monkeypatch):
    """Return the names that shapes take for granted, as those of their module."""
    module = ModuleType("shape")
    sys.modules["shape"] = module
    exec(
        "from types import SimpleNamespace\n"
        "def f(*args, **kwargs): ...\n"
        "class webapp2:\n    class RequestHandler:\n        request = None\n        def __init__(self): self.request = iter([])\n"
        "class B:\n    def m(self): ...\n"
        "ndb = SimpleNamespace(in_transaction=lambda: True)\n"
        "def log(*args): ...\n"
        "class Registry(type):\n    def __call__(cls): ...\n"
        "y, d, n = [1], {}, 1\n"
        "from datetime import datetime, timezone\nwhen = datetime.now(timezone.utc)\n"
        "class A:\n    def m(self): ...\na = A()\n"
        "User = SimpleNamespace(objects=SimpleNamespace(filter=lambda **k: iter([])))\n",
        vars(module),
    )  # fmt: skip
    yield module
    del sys.modules["shape"]


@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")  # from Python 3.12 on
@pytest.mark.parametrize("name", [shape[0] for shape in RUNS if CALLED.get(shape[0], "") is not None])
def test_what_is_said_to_be_refused_is_and_nothing_else(tmp_path, monkeypatch, given, name):
    before = next(shape[1] for shape in RUNS if shape[0] == name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").touch()
    _, notes = run(tmp_path, shape=before)["shape"]
    refused = {note.code for note in notes if note.level is Level.REFUSED}
    maybe = {note.code for note in notes} - refused
    app = make_app(policy=Policy("shape"))
    safedefer.configure(app)
    raised = None
    try:
        exec(compile(f"{before}\n{CALLED.get(name, '')}", "shape.py", "exec"), vars(given))
    except (DeferError, TypeError) as error:
        raised = error
    finally:
        safedefer.configure(None)
    if refused or not maybe:  # a note says that it may be refused
        assert (raised is not None) == bool(refused), raised
