"""Exceptions as arguments: showing one imports nothing.

From 3.12 on, ``traceback`` imports the module that an ImportError with a ``name_from`` names, to suggest a spelling:
whoever logs the exception imports what a holder of a key wrote, whatever the policy says.
"""

import pickle
import sys
import traceback
from base64 import b64encode

import pytest

from safedefer.codecs.pickled import PickledCodec
from safedefer.codecs.shared import CallData
from safedefer.errors import InvalidArguments, UnencodableArgument
from safedefer.policy import Policy
from safedefer.refs import UNBOUND
from tests.adversarial import forge, victim

ATTACK = {"$exception": ["builtins:ImportError", ["no"], {"name": "this", "name_from": "zen"}]}
ATTACKS = {
    "an ImportError": ATTACK,
    "its subclass": {"$exception": ["builtins:ModuleNotFoundError", *ATTACK["$exception"][1:]]},
    "a class of the application": {"$exception": [f"{forge.VICTIM}:NoSuchThing", *ATTACK["$exception"][1:]]},
    "a cause": {"$exception": ["builtins:ValueError", [], {"__cause__": ATTACK}]},
    "a context": {"$exception": ["builtins:ValueError", [], {"__context__": ATTACK}]},
    "a member of a group": {"$exception": ["builtins:ExceptionGroup", ["all", [ATTACK]], {}]},
}


@pytest.fixture
def unimported():
    held = sys.modules.pop("this", None)
    victim.RAN.clear()
    yield
    sys.modules.pop("this", None)
    if held is not None:
        sys.modules["this"] = held


@pytest.mark.parametrize("argument", ATTACKS.values(), ids=ATTACKS)
def test_an_exception_that_is_shown_imports_no_module_that_it_names(argument, unimported):
    app = forge.make_app()
    answer = forge.post(app, forge.mint(call=forge.call("reraise"), args=[argument]))
    for _, error in victim.RAN:
        traceback.format_exception(error)
    assert "this" not in sys.modules
    assert (answer.status, answer.headers["Safedefer-Outcome"], victim.RAN) == (200, "failed", [])


@pytest.mark.parametrize("kind", [ImportError, ModuleNotFoundError, victim.NoSuchThing])
def test_defer_says_what_to_do_about_one(kind):
    error = kind("no", name="this")
    error.name_from = "zen"
    app = forge.make_app()
    with pytest.raises(UnencodableArgument, match=r"\$\.args\[0\].*set it to None"):
        app.serialize(victim.reraise, error)


@pytest.mark.parametrize("kind", [ImportError, victim.NoSuchThing])
def test_a_pickle_of_one_is_refused_at_both_ends_where_it_would_import(kind, unimported):
    error = kind("no", name="this")
    values = CallData(UNBOUND, (error,), {})
    codec, gate = PickledCodec(), Policy(forge.VICTIM)
    sent = codec.encode(values, gate)
    codec.decode(sent, gate, text=b"")
    error.name_from = "zen"
    if sys.version_info < (3, 12):  # an attribute like any other, which traceback does not read
        (shown,) = codec.decode(codec.encode(values, gate), gate, text=b"")[1]
        traceback.format_exception(shown)
        assert (shown.name_from, "this" in sys.modules) == ("zen", False)
        return
    with pytest.raises(UnencodableArgument, match="set it to None"):
        codec.encode(values, gate)
    data = pickle.dumps(((), (error,), {}), protocol=5)
    with pytest.raises(InvalidArguments, match="makes a traceback import"):
        codec.decode(CallData(UNBOUND, [b64encode(data).decode(), *list(sent)[1][1:]], {}), gate, text=b"")


def test_one_without_it_is_carried_with_its_name():
    app = forge.make_app()
    app.run(app.serialize(victim.note, ImportError("no", name="this")))
    assert victim.RAN[-1][0][0].name == "this"
    app.run(forge.mint(args=[{"$exception": ["builtins:ImportError", ["no"], {"name": "this", "name_from": None}]}]))
