"""No callee is implicit: what a key holder calls, and what its construction runs, the operator has named."""

import io
import logging
import pickle
import threading
from base64 import b64encode
from collections import OrderedDict, defaultdict
from enum import Enum
from typing import Generic, TypeVar

import pytest
from pydantic import BaseModel

from safedefer.codecs.pickled import PickledCodec
from safedefer.codecs.typed import CallData
from safedefer.errors import (
    CapabilityExceeded,
    ConfigurationError,
    NotDeferrable,
    PolicyViolation,
    RejectedTask,
    UnencodableArgument,
)
from safedefer.policy import Policy
from safedefer.refs import UNBOUND, reference
from tests.adversarial.forge import NOW, URL, make_app, mint
from tests.adversarial.test_pickled import STAMP
from tests.zoo.exactly import carry_one, decode_one

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


# --- Factories of defaultdicts ----------------------------------------------------------------------------------------


class Calls:
    def __call__(self):
        return []


def make_handler():
    return None


class Borrowed:
    def __call__(self):
        return []


class Borrower(Borrowed):
    pass


FACTORIES = {
    "a class that inherits an __init__ of another": (Handler, {"$class": f"{HOME}:Handler"}),
    "a class of a list": (Names, {"$class": f"{HOME}:Names"}),
    "a class of bytes": (Bytes, {"$class": f"{HOME}:Bytes"}),
    "an object that calls what another class defines": (Borrower(), {"$object": {"class": f"{HOME}:Borrower"}}),
}


@pytest.mark.parametrize("what", FACTORIES)
def test_the_factory_of_a_defaultdict_passes_the_rule_of_callees(what):
    """Code that looks a missing key up calls it: a class that may be a value, and no callee, was called so."""
    policy = Policy(HOME) if "object" not in what else Policy(f"{HOME}:Borrower")
    with pytest.raises(PolicyViolation, match="may not be called|not admitted"):
        decode_one({"$defaultdict": [FACTORIES[what][1], ["k", 1]]}, policy=policy)


@pytest.mark.parametrize("what", FACTORIES)
def test_the_sender_of_such_a_factory_is_told(what):
    factory = FACTORIES[what][0]
    policy = Policy(HOME) if "object" not in what else Policy(f"{HOME}:Borrower")
    with pytest.raises(UnencodableArgument, match="missing key"):
        carry_one(defaultdict(factory), _policy=policy)


def test_a_factory_is_within_the_keys_patterns_as_a_callee():
    """The key may name the class, and not call it: ``Names`` needs ``list.__init__`` in the patterns of the key too."""
    policy = Policy(HOME, "builtins:list.__init__")
    assert decode_one({"$defaultdict": [{"$class": f"{HOME}:Names"}]}, policy=policy)["missing"] == Names()
    with pytest.raises(PolicyViolation):
        decode_one({"$defaultdict": [{"$class": f"{HOME}:Names"}]}, policy=policy.restricted([HOME]))


def test_factories_that_may_be_called_arrive():
    for factory in (list, int, dict, set, Calls, Calls(), None, make_handler):
        arrived = carry_one(defaultdict(factory), _policy=POLICY)
        assert type(arrived.default_factory) is type(factory)
    assert decode_one({"$defaultdict": [{"$class": "builtins:list"}]}, policy=POLICY)["missing"] == []


def unpickled(value, policy):
    data = b64encode(pickle.dumps(((), (value,), {}), 5)).decode()
    (arrived,) = PickledCodec().decode(CallData(UNBOUND, [data, *STAMP], {}), policy, text=b"").args
    return arrived


def test_the_factory_of_a_pickled_defaultdict_passes_the_rule_too():
    for factory, policy in ((Borrower(), Policy(f"{HOME}:Borrower")), (Handler, POLICY)):
        with pytest.raises(RejectedTask):
            unpickled(defaultdict(factory), policy)
    assert unpickled(defaultdict(Calls()), POLICY)["missing"] == []


class Meta(type):
    """Registers its classes, as those of frameworks do."""

    made = []

    def __new__(cls, name, bases, namespace):
        return super().__new__(cls, name, bases, namespace)

    def __init__(cls, name, bases, namespace):
        Meta.made.append(name)


class Bare(Enum):
    """An enum without members: to call it is the functional API."""


class Colour(Bare):
    RED = 1


@pytest.mark.parametrize("kid", ["now", "narrow"])
@pytest.mark.parametrize("name", ["Meta", "Bare"])
def test_nothing_that_makes_a_class_is_a_callee(name, kid):
    """A token of 466 kB with 20,000 members that have no hash made an enum for 12 s; a metaclass registered the class of a token."""
    ref = reference("class", HOME, name, None)
    for policy in (POLICY, Policy(f"{HOME}:{name}")):
        gate = policy if kid == "now" else policy.restricted([HOME])
        with pytest.raises(RejectedTask, match="makes a class"):
            gate.load_callable(ref)
        with pytest.raises(NotDeferrable, match="makes a class"):
            gate.callable_ref(globals()[name])
        with pytest.raises(RejectedTask):
            decode_one({"$defaultdict": [{"$class": f"{HOME}:{name}"}]}, policy=gate)
    assert Meta.made == []


def test_an_enum_with_members_is_a_callee_and_one_without_is_a_value():
    assert POLICY.load_callable(reference("class", HOME, "Colour", None))(1) is Colour.RED
    assert carry_one(Bare, _policy=POLICY) is Bare
