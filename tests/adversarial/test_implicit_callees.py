"""No callee is implicit: what a key holder calls, and what its construction runs, the operator has named."""

import io
import logging
import pickle
import threading
from collections import OrderedDict
from enum import Enum
from typing import Generic, TypeVar

import pytest
from pydantic import BaseModel

from safedefer.errors import CapabilityExceeded, ConfigurationError, NotDeferrable, PolicyViolation
from safedefer.policy import Policy
from safedefer.refs import UNBOUND, reference
from tests.adversarial.forge import NOW, URL, make_app, mint

HOME = __name__
T = TypeVar("T")
POLICY = Policy(HOME)

BOMBS = {
    "set.isdisjoint": ({-1}, {"$set": [-1]}, [{"$range": [0, {"$int": str(10**18)}, 1]}]),
    "list.extend": ([], [], [{"$range": [0, 60_000_000, 1]}]),
    "list.count": ([], [], [1]),
    "str.join": (",", ",", [{"$range": [0, 60_000_000, 1]}]),
    "dict.fromkeys": ({}, {"$class": "builtins:dict"}, [{"$range": [0, 60_000_000, 1]}]),
    "set.union": (set(), {"$set": []}, [{"$range": [0, {"$int": str(10**18)}, 1]}]),
    "bytes.split": (b"", {"$bytes": "YQ=="}, []),
    "int.bit_length": (1, 1, []),
    "tuple.index": ((), {"$tuple": []}, [1]),
}


@pytest.mark.parametrize("kid", ["now", "narrow"])
@pytest.mark.parametrize("what", BOMBS)
def test_a_built_in_method_needs_its_exact_pattern(what, kid):
    """``set.isdisjoint({-1}, range(10**18))``, a token of 577 bytes of a key limited to one function, held a process for ever."""
    owner, _, member = what.partition(".")
    _, bound, args = BOMBS[what]
    app = make_app()
    call = {"kind": "builtin_method", "module": "builtins", "qualname": owner, "member": member, "bound": bound}
    with pytest.raises((PolicyViolation, CapabilityExceeded)) as caught:
        app._verifier.verify(mint(kid=kid, call=call, args=args), url=URL, now=NOW)
    if kid == "now":
        assert f"builtins:{what}" in str(caught.value), "the pattern that is missing"
    app.close()


@pytest.mark.parametrize("what", BOMBS)
def test_the_sender_is_told_which_pattern_is_missing(what):
    owner, _, member = what.partition(".")
    method = getattr(BOMBS[what][0], member)
    with pytest.raises(NotDeferrable, match=f"'builtins:{owner}.{member}'"):
        POLICY.callable_ref(method)
    ref = Policy(f"builtins:{owner}.{member}").callable_ref(method)
    assert str(ref) == f"builtins:{owner}.{member}"


def test_the_pattern_of_a_built_in_type_admits_its_construction_only():
    policy = Policy("builtins:list")
    assert policy.load_callable(reference("class", "builtins", "list", None)) is list
    with pytest.raises(PolicyViolation, match="builtins:list.append"):
        policy.load_callable(reference("builtin_method", "builtins", "list", "append"), [])


class Names(list):
    pass


class Ordered(OrderedDict):
    pass


def test_a_built_in_method_of_an_admitted_class_needs_its_pattern_too():
    with pytest.raises(NotDeferrable, match="builtins:list.extend"):
        POLICY.callable_ref(Names().extend)
    assert Policy(HOME, "builtins:list.extend").callable_ref(Names().extend).member == "extend"
    assert Policy(HOME, f"{HOME}:Names.extend").callable_ref(Names().extend).member == "extend"


class Handler(logging.FileHandler):
    """Inherits an ``__init__`` that makes a file of any name."""


class File(io.FileIO):
    pass


class Thread(threading.Thread):
    pass


class Unpickler(pickle._Unpickler):
    pass


class Bytes(bytes):
    pass


class Text(str):
    pass


class OwnInit(logging.FileHandler):
    def __init__(self):
        self.ready = True


class Deep(Names):
    pass


INHERITS = {
    Handler: "logging:FileHandler.__init__",
    Names: "builtins:list.__init__",
    Deep: "builtins:list.__init__",
    Ordered: "collections:OrderedDict.__init__",
    Bytes: "builtins:bytes.__init__",
    Text: "builtins:str.__init__",
}


@pytest.mark.parametrize("cls", [*INHERITS, Unpickler, Thread, File])
def test_a_class_is_no_callee_if_it_inherits_a_construction_that_nobody_admitted(cls):
    """``Handler("/tmp/owned")`` of an admitted class made a file."""
    with pytest.raises(NotDeferrable) as caught:
        POLICY.callable_ref(cls)
    with pytest.raises(PolicyViolation):
        POLICY.load_callable(reference("class", HOME, cls.__name__, None), UNBOUND)
    if cls in INHERITS:
        assert f"'{INHERITS[cls]}'" in str(caught.value), "the pattern that is missing"


@pytest.mark.parametrize("cls", INHERITS)
def test_the_pattern_that_the_refusal_names_admits_it(cls):
    assert Policy(HOME, INHERITS[cls]).callable_ref(cls).qualname == cls.__name__


class Plain:
    pass


class Child(Plain):
    def __init__(self, n=0):
        self.n = n


class Grandchild(Child):
    pass


class Typed(Generic[T]):
    pass


class Failure(ValueError):
    pass


class Model(BaseModel):
    n: int = 0


class Color(Enum):
    RED = 1


class Amount(int):
    pass


class Labels(dict):
    pass


@pytest.mark.parametrize("cls", [Plain, Child, Grandchild, Typed, Failure, Model, Color, Amount, Labels, OwnInit])
def test_a_class_that_inherits_from_its_own_kind_or_a_harmless_base_is_a_callee(cls):
    if cls is OwnInit:  # its base is no gadget, and its construction is its own
        assert POLICY.callable_ref(cls).qualname == "OwnInit"
        return
    assert POLICY.load_callable(POLICY.callable_ref(cls)) is cls


def test_a_pattern_of_a_construction_is_no_callee_itself():
    policy = Policy(HOME, "logging:FileHandler.__init__")
    with pytest.raises(PolicyViolation):
        policy.load_callable(reference("class", "logging", "FileHandler", None))
    with pytest.raises(ConfigurationError):
        Policy(f"{HOME}:Plain.missing").load()
